// fastreward._core.logprobs_*: pointers as integers, 0 = absent; the GIL is released while a kernel runs.
#include <cstdint>
#include <memory>

#include "bindings/addresses.hpp"
#include "bindings/registry.hpp"
#include "cpu/logprobs/logprobs.hpp"

namespace py = pybind11;

namespace fastreward {
namespace {

constexpr int kValues = 8, kIndices = 2;  // rows of `values` and `indices`

void check_rows(const LogprobsRows& in) {
  required<const void>("logits", reinterpret_cast<Address>(in.logits), in.rows * in.columns);
  required<const void>("labels", reinterpret_cast<Address>(in.labels), in.rows);
}

std::unique_ptr<double[]> scratch_for(const LogprobsRows& in) {
  const std::int64_t length = in.keep_ids != nullptr ? in.keep_count : in.columns;
  if (!logprobs_splits_rows(in.rows, length, in.threads)) return nullptr;
  const std::int64_t doubles = in.rows * logprobs_blocks(length) * kLogprobsPartial;
  return std::make_unique<double[]>(static_cast<std::size_t>(doubles));
}

void forward(LogprobsRows in, int flags, Address values, Address indices, Address id_logprobs) {
  const py::gil_scoped_release unlocked;
  check_rows(in);
  const auto scratch = scratch_for(in);
  LogprobsForward call;
  call.in = in;
  call.flags = flags;
  call.values = required<float>("values", values, kValues * in.rows);
  call.indices = required<std::int64_t>("indices", indices, kIndices * in.rows);
  call.id_logprobs = required<float>("id_logprobs", id_logprobs, in.rows * in.token_count);
  call.scratch = scratch.get();
  FASTREWARD_DISPATCH(logprobs_forward)(call);
}

void accumulate(LogprobsRows in, std::int64_t vocab_start, int flags, Address label_logits, Address state) {
  const py::gil_scoped_release unlocked;
  check_rows(in);
  const auto scratch = scratch_for(in);
  LogprobsAccumulate call;
  call.in = in;
  call.vocab_start = vocab_start;
  call.flags = flags;
  call.label_logits = at<const float>(label_logits);
  call.state = required<double>("state", state, in.rows);
  call.scratch = scratch.get();
  FASTREWARD_DISPATCH(logprobs_accumulate)(call);
}

void finish(Address state, Address inv_temperature, std::int64_t stride, double scalar, std::int64_t rows,
            std::int64_t vocab_size, int flags, Address values, Address indices) {
  const py::gil_scoped_release unlocked;
  LogprobsFinish call;
  call.state = required<const double>("state", state, rows);
  call.inv_temperature = at<const double>(inv_temperature);
  call.inv_temperature_stride = stride;
  call.inv_temperature_scalar = scalar;
  call.rows = rows;
  call.vocab_size = vocab_size;
  call.flags = flags;
  call.values = required<float>("values", values, kValues * rows);
  call.indices = required<std::int64_t>("indices", indices, kIndices * rows);
  FASTREWARD_DISPATCH(logprobs_finish)(call);
}

void backward(LogprobsRows in, Address values, Address grad_values, Address grad_ids, Address grad_logits,
              std::int64_t grad_stride, double inv_softcap) {
  const py::gil_scoped_release unlocked;
  check_rows(in);
  const auto threads = static_cast<std::size_t>(in.threads < 1 ? 1 : in.threads);
  const auto columns = std::make_unique<ColumnGradient[]>(threads * static_cast<std::size_t>(in.token_count + 1));
  const auto kept = std::make_unique<float[]>(threads * static_cast<std::size_t>(in.keep_count));
  LogprobsBackward call;
  call.in = in;
  call.values = required<const float>("values", values, kValues * in.rows);
  call.grad_values = required<const float>("grad_values", grad_values, kValues * in.rows);
  call.grad_ids = at<const float>(grad_ids);
  call.grad_logits = required<void>("grad_logits", grad_logits, in.rows * in.columns);
  call.grad_stride = grad_stride;
  call.inv_softcap = inv_softcap;
  call.columns = columns.get();
  call.kept_logits = kept.get();
  FASTREWARD_DISPATCH(logprobs_backward)(call);
}

// One field of LogprobsRows that is a pointer, set and read as an address.
template <class T>
void address(py::class_<LogprobsRows>& rows, const char* name, const T* LogprobsRows::*field) {
  rows.def_property(
      name, [field](const LogprobsRows& r) { return reinterpret_cast<Address>(r.*field); },
      [field](LogprobsRows& r, Address a) { r.*field = at<const T>(a); });
}

}  // namespace

void register_logprobs(py::module_& m) {
  py::enum_<DType>(m, "DType").value("f32", DType::f32).value("bf16", DType::bf16).value("f16", DType::f16);
  py::class_<LogprobsRows> rows(m, "LogprobsRows", "Rows of logits and their data; see csrc/cpu/logprobs/logprobs.hpp.");
  rows.def(py::init<>());
  rows.def_property(
      "logits", [](const LogprobsRows& r) { return reinterpret_cast<Address>(r.logits); },
      [](LogprobsRows& r, Address a) { r.logits = at<const void>(a); });
  address(rows, "labels", &LogprobsRows::labels);
  address(rows, "inv_temperature", &LogprobsRows::inv_temperature);
  address(rows, "mask", &LogprobsRows::mask);
  address(rows, "keep_mask", &LogprobsRows::keep_mask);
  address(rows, "keep_ids", &LogprobsRows::keep_ids);
  address(rows, "token_ids", &LogprobsRows::token_ids);
  rows.def_readwrite("dtype", &LogprobsRows::dtype)
      .def_readwrite("rows", &LogprobsRows::rows)
      .def_readwrite("columns", &LogprobsRows::columns)
      .def_readwrite("row_stride", &LogprobsRows::row_stride)
      .def_readwrite("inv_temperature_stride", &LogprobsRows::inv_temperature_stride)
      .def_readwrite("inv_temperature_scalar", &LogprobsRows::inv_temperature_scalar)
      .def_readwrite("keep_mask_stride", &LogprobsRows::keep_mask_stride)
      .def_readwrite("keep_count", &LogprobsRows::keep_count)
      .def_readwrite("keep_ids_stride", &LogprobsRows::keep_ids_stride)
      .def_readwrite("token_count", &LogprobsRows::token_count)
      .def_readwrite("token_ids_stride", &LogprobsRows::token_ids_stride)
      .def_readwrite("threads", &LogprobsRows::threads);
  m.def("logprobs_forward", &forward, py::arg("rows"), py::arg("flags"), py::arg("values"), py::arg("indices"),
        py::arg("id_logprobs"));
  m.def("logprobs_accumulate", &accumulate, py::arg("rows"), py::arg("vocab_start"), py::arg("flags"),
        py::arg("label_logits"), py::arg("state"));
  m.def("logprobs_finish", &finish, py::arg("state"), py::arg("inv_temperature"), py::arg("inv_temperature_stride"),
        py::arg("inv_temperature_scalar"), py::arg("rows"), py::arg("vocab_size"), py::arg("flags"), py::arg("values"),
        py::arg("indices"));
  m.def("logprobs_backward", &backward, py::arg("rows"), py::arg("values"), py::arg("grad_values"), py::arg("grad_ids"),
        py::arg("grad_logits"), py::arg("grad_stride"), py::arg("inv_softcap"));
}

}  // namespace fastreward
