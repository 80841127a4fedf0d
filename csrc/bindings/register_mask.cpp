// fastreward._core.mask_count: see csrc/cpu/mask.hpp.
#include <cstdint>

#include "bindings/registry.hpp"
#include "cpu/mask.hpp"

namespace fastreward {
namespace {

std::int64_t mask_count(std::uintptr_t mask, int mask_kind, std::int64_t positions, int threads) {
  return FASTREWARD_DISPATCH(mask_count)(
      {reinterpret_cast<const void*>(mask), static_cast<MaskKind>(mask_kind)}, positions, threads);
}

}  // namespace

void register_mask(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("mask_count", &mask_count, py::call_guard<py::gil_scoped_release>(), py::arg("mask"), py::arg("mask_kind"),
        py::arg("positions"), py::arg("threads"), "How many positions of a contiguous mask are not 0.");
}

}  // namespace fastreward
