// fastreward._core.whiten_statistics and whiten_apply: see csrc/cpu/whiten.hpp.
#include <cstdint>
#include <memory>
#include <tuple>

#include "bindings/addresses.hpp"
#include "bindings/registry.hpp"
#include "cpu/whiten.hpp"

namespace fastreward {
namespace {

WhitenInput input_of(Address x, Address mask, int mask_kind, std::int64_t rows, std::int64_t columns) {
  WhitenInput in;
  in.x = at<const float>(x);
  in.mask = {at<const void>(mask), static_cast<MaskKind>(mask_kind)};
  in.rows = rows;
  in.columns = columns;
  return in;
}

std::tuple<double, double, double> whiten_statistics(Address x, Address mask, int mask_kind, std::int64_t rows,
                                                     std::int64_t columns, int threads) {
  Moments m;
  {
    const pybind11::gil_scoped_release release;
    const WhitenInput in = input_of(x, mask, mask_kind, rows, columns);
    const std::unique_ptr<Moments[]> scratch(new Moments[static_cast<std::size_t>(rows * in.blocks_per_row())]);
    m = FASTREWARD_DISPATCH(whiten_statistics)(in, scratch.get(), threads);
  }
  return {m.count, m.mean, m.m2};
}

void whiten_apply(Address x, Address mask, int mask_kind, std::int64_t rows, std::int64_t columns,
                  double shift, double scale, double offset, Address out, int threads) {
  FASTREWARD_DISPATCH(whiten_apply)
  (input_of(x, mask, mask_kind, rows, columns), {shift, scale, offset}, at<float>(out), threads);
}

}  // namespace

void register_whiten(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("whiten_statistics", &whiten_statistics, py::arg("x"), py::arg("mask"), py::arg("mask_kind"), py::arg("rows"),
        py::arg("columns"), py::arg("threads"), "(count, mean, sum of squared deviations) of the counted positions.");
  m.def("whiten_apply", &whiten_apply, py::call_guard<py::gil_scoped_release>(), py::arg("x"), py::arg("mask"),
        py::arg("mask_kind"), py::arg("rows"), py::arg("columns"), py::arg("shift"), py::arg("scale"),
        py::arg("offset"), py::arg("out"), py::arg("threads"));
}

}  // namespace fastreward
