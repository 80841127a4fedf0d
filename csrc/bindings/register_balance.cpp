// fastreward._core.balance (see csrc/cpu/balance.hpp).
#include <cstdint>

#include "bindings/addresses.hpp"
#include "bindings/registry.hpp"
#include "cpu/balance.hpp"

namespace fastreward {
namespace {

void balance(Address lengths, std::int64_t count, std::int64_t parts, bool equal_size, Address order, Address starts) {
  BalanceProblem p;
  p.count = count;
  p.lengths = required<const std::int64_t>("lengths", lengths, count);
  p.parts = parts;
  p.equal_size = equal_size;
  p.order = required<std::int64_t>("order", order, count);
  p.starts = required<std::int64_t>("starts", starts, parts + 1);
  FASTREWARD_DISPATCH(balance)(p);
}

}  // namespace

void register_balance(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("balance", &balance, py::call_guard<py::gil_scoped_release>(), py::arg("lengths"), py::arg("count"),
        py::arg("parts"), py::arg("equal_size"), py::arg("order"), py::arg("starts"));
}

}  // namespace fastreward
