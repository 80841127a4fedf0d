// fastreward._core.segment_reduce, segment_adjoint and segment_ids: see csrc/cpu/segments.hpp.
#include <cstdint>
#include <memory>

#include "bindings/addresses.hpp"
#include "bindings/registry.hpp"
#include "cpu/segments.hpp"

namespace fastreward {
namespace {

TokenRows rows_of(std::int64_t rows, std::int64_t columns, Address bounds) {
  TokenRows tokens;
  tokens.rows = rows;
  tokens.columns = columns;
  tokens.bounds = at<const std::int64_t>(bounds);
  return tokens;
}

SegmentProblem problem_of(std::int64_t rows, std::int64_t columns, Address bounds, std::int64_t segments, Address x,
                          Address ids, int id_kind, Address weights, int weight_kind, int op, double temperature,
                          double empty, int threads) {
  SegmentProblem p;
  p.tokens = rows_of(rows, columns, bounds);
  p.segments = segments;
  p.x = at<const float>(x);
  p.ids = at<const void>(ids);
  p.id_kind = static_cast<IdKind>(id_kind);
  p.weights = at<const void>(weights);
  p.weight_kind = static_cast<WeightKind>(weight_kind);
  p.op = static_cast<SegmentOp>(op);
  p.temperature = temperature;
  p.empty = empty;
  p.threads = threads;
  return p;
}

// The caller's scratch: the states of a row's segments, for each thread.
std::unique_ptr<SegmentState[]> scratch_of(const SegmentProblem& p) {
  return std::unique_ptr<SegmentState[]>(new SegmentState[static_cast<std::size_t>(p.threads * p.segments)]);
}

int segment_reduce(std::int64_t rows, std::int64_t columns, Address bounds, std::int64_t segments, Address x, Address ids,
                   int id_kind, Address weights, int weight_kind, int op, double temperature, double empty, Address out,
                   int threads) {
  const SegmentProblem p = problem_of(rows, columns, bounds, segments, x, ids, id_kind, weights, weight_kind, op,
                                      temperature, empty, threads);
  return FASTREWARD_DISPATCH(segment_reduce)(p, scratch_of(p).get(), at<float>(out));
}

int segment_adjoint(std::int64_t rows, std::int64_t columns, Address bounds, std::int64_t segments, Address x, Address ids,
                    int id_kind, Address weights, int weight_kind, int op, double temperature, Address values, Address out,
                    int threads) {
  const SegmentProblem p = problem_of(rows, columns, bounds, segments, x, ids, id_kind, weights, weight_kind, op,
                                      temperature, 0.0, threads);
  return FASTREWARD_DISPATCH(segment_adjoint)(p, at<const float>(values), scratch_of(p).get(), at<float>(out));
}

void segment_ids(std::int64_t rows, std::int64_t columns, Address bounds, Address mask, Address labels, int label_kind,
                 Address marks, int mark_kind, bool tail, Address out, int threads) {
  SegmentMarks m;
  m.tokens = rows_of(rows, columns, bounds);
  m.mask = at<const std::uint8_t>(mask);
  m.labels = at<const void>(labels);
  m.label_kind = static_cast<LabelKind>(label_kind);
  m.marks = at<const void>(marks);
  m.mark_kind = static_cast<MarkKind>(mark_kind);
  m.tail = tail;
  m.threads = threads;
  FASTREWARD_DISPATCH(segment_ids)(m, at<std::int32_t>(out));
}

}  // namespace

void register_segments(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("segment_reduce", &segment_reduce, py::call_guard<py::gil_scoped_release>(), py::arg("rows"), py::arg("columns"),
        py::arg("bounds"), py::arg("segments"), py::arg("x"), py::arg("ids"), py::arg("id_kind"), py::arg("weights"),
        py::arg("weight_kind"), py::arg("op"), py::arg("temperature"), py::arg("empty"), py::arg("out"),
        py::arg("threads"), "1: an id is illegal, 2: a value that counts is NaN, 3: both, 0: neither.");
  m.def("segment_adjoint", &segment_adjoint, py::call_guard<py::gil_scoped_release>(), py::arg("rows"),
        py::arg("columns"), py::arg("bounds"), py::arg("segments"), py::arg("x"), py::arg("ids"), py::arg("id_kind"),
        py::arg("weights"), py::arg("weight_kind"), py::arg("op"), py::arg("temperature"), py::arg("values"),
        py::arg("out"), py::arg("threads"), "1: an id is illegal, 0: none is.");
  m.def("segment_ids", &segment_ids, py::call_guard<py::gil_scoped_release>(), py::arg("rows"), py::arg("columns"),
        py::arg("bounds"), py::arg("mask"), py::arg("labels"), py::arg("label_kind"), py::arg("marks"),
        py::arg("mark_kind"), py::arg("tail"), py::arg("out"), py::arg("threads"));
}

}  // namespace fastreward
