// fastreward._core.mask_count, mask_flags (see csrc/cpu/mask.hpp) and ids_below.
#include <cstdint>

#include "bindings/addresses.hpp"
#include "bindings/registry.hpp"
#include "cpu/mask.hpp"

namespace fastreward {
namespace {

std::int64_t mask_count(Address mask, int mask_kind, std::int64_t positions, int threads) {
  return FASTREWARD_DISPATCH(mask_count)({at<const void>(mask), static_cast<MaskKind>(mask_kind)}, positions, threads);
}

bool mask_flags(Address mask, int mask_kind, std::int64_t rows, std::int64_t columns, Address flags, Address counts,
                int threads) {
  const MaskView view{at<const void>(mask), static_cast<MaskKind>(mask_kind)};
  return FASTREWARD_DISPATCH(mask_flags)(view, rows, columns, at<std::uint8_t>(flags), at<float>(counts), threads);
}

bool ids_below(Address ids, std::int64_t count, std::int64_t limit) {
  const auto* const values = required<const std::int64_t>("ids", ids, count);
  bool outside = false;
  for (std::int64_t k = 0; k < count; ++k)
    outside |= static_cast<std::uint64_t>(values[k]) >= static_cast<std::uint64_t>(limit);
  return !outside;
}

}  // namespace

void register_mask(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("mask_count", &mask_count, py::call_guard<py::gil_scoped_release>(), py::arg("mask"), py::arg("mask_kind"),
        py::arg("positions"), py::arg("threads"), "How many positions of a contiguous mask are not 0.");
  m.def("mask_flags", &mask_flags, py::call_guard<py::gil_scoped_release>(), py::arg("mask"), py::arg("mask_kind"),
        py::arg("rows"), py::arg("columns"), py::arg("flags"), py::arg("counts"), py::arg("threads"),
        "Whether all of a contiguous mask is 0 or 1; it as bytes, and f32 counts by row, where there is an address.");
  m.def("ids_below", &ids_below, py::call_guard<py::gil_scoped_release>(), py::arg("ids"), py::arg("count"),
        py::arg("limit"), "Whether all ids, contiguous i64, lie in [0, limit).");
}

}  // namespace fastreward
