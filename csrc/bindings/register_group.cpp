// fastreward._core.group_advantages: see csrc/cpu/group.hpp.
#include <cstdint>
#include <memory>

#include "bindings/registry.hpp"
#include "cpu/group.hpp"

namespace fastreward {
namespace {

template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

std::int64_t count_groups(const GroupProblem& p) {
  if (p.group_index == nullptr) return (p.rows + p.group_size - 1) / p.group_size;
  std::int64_t largest = -1;
  for (std::int64_t b = 0; b < p.rows; ++b) largest = p.group_index[b] > largest ? p.group_index[b] : largest;
  return largest + 1;
}

void group_advantages(std::uintptr_t rewards, bool rewards_f64, std::int64_t rows, std::int64_t components,
                      std::uintptr_t group_index, std::int64_t group_size, std::uintptr_t lengths,
                      std::uintptr_t component_weights, std::uintptr_t center_values, std::uintptr_t scale_values,
                      int center, int scale, int ddof, double eps, bool eps_inside, int singleton, int normalize,
                      std::uintptr_t advantages, int threads) {
  if (rows == 0) return;
  GroupProblem p;
  p.rows = rows;
  p.components = components;
  p.rewards = pointer<const void>(rewards);
  p.rewards_f64 = rewards_f64;
  p.group_index = pointer<const std::int64_t>(group_index);
  p.group_size = group_size;
  p.lengths = pointer<const float>(lengths);
  p.component_weights = pointer<const float>(component_weights);
  p.center_values = pointer<const float>(center_values);
  p.scale_values = pointer<const float>(scale_values);
  p.center = static_cast<Center>(center);
  p.scale = static_cast<Scale>(scale);
  p.singleton = static_cast<Singleton>(singleton);
  p.normalize = static_cast<Normalize>(normalize);
  p.ddof = ddof;
  p.eps = eps;
  p.eps_inside = eps_inside;
  p.advantages = pointer<float>(advantages);
  p.threads = threads;
  p.groups = count_groups(p);

  const bool indexed = p.group_index != nullptr;
  const auto n = static_cast<std::size_t>(rows);
  const std::unique_ptr<std::int64_t[]> order(indexed ? new std::int64_t[n] : nullptr);
  const std::unique_ptr<std::int64_t[]> starts(indexed ? new std::int64_t[static_cast<std::size_t>(p.groups) + 1]
                                                       : nullptr);
  const std::unique_ptr<double[]> values(new double[n]);
  const std::unique_ptr<double[]> totals(new double[n]);
  FASTREWARD_DISPATCH(group_advantages)(p, {order.get(), starts.get(), values.get(), totals.get()});
}

}  // namespace

void register_group(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("group_advantages", &group_advantages, py::call_guard<py::gil_scoped_release>(), py::arg("rewards"),
        py::arg("rewards_f64"), py::arg("rows"), py::arg("components"), py::arg("group_index"), py::arg("group_size"),
        py::arg("lengths"), py::arg("component_weights"), py::arg("center_values"), py::arg("scale_values"),
        py::arg("center"), py::arg("scale"), py::arg("ddof"), py::arg("eps"), py::arg("eps_inside"),
        py::arg("singleton"), py::arg("normalize"), py::arg("advantages"), py::arg("threads"));
}

}  // namespace fastreward
