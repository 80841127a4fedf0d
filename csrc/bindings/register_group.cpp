// fastreward._core.group_advantages, group_statistics (see csrc/cpu/group.hpp), number_labels and number_integers, which
// number what Python calls groups.
#include <algorithm>
#include <cstdint>
#include <memory>

#include "bindings/addresses.hpp"
#include "bindings/registry.hpp"
#include "cpu/common/number_integers.hpp"
#include "cpu/group.hpp"

namespace fastreward {
namespace {

// Sets p.groups; labels that are no positions in [0, rows) are numbered into `numbered` first.
void find_groups(GroupProblem& p, std::unique_ptr<std::int64_t[]>& numbered) {
  if (p.group_index == nullptr) {
    p.groups = (p.rows + p.group_size - 1) / p.group_size;
    return;
  }
  const auto [smallest, largest] = std::minmax_element(p.group_index, p.group_index + p.rows);
  if (*smallest >= 0 && *largest < p.rows) {
    p.groups = *largest + 1;
    return;
  }
  numbered.reset(new std::int64_t[static_cast<std::size_t>(p.rows)]);
  p.groups = number_integers(p.group_index, p.rows, numbered.get());
  p.group_index = numbered.get();
}

// Memory for a problem whose groups have been found.
struct Scratch {
  explicit Scratch(const GroupProblem& p, bool with_totals)
      : order(p.group_index != nullptr ? new std::int64_t[count(p.rows)] : nullptr),
        starts(p.group_index != nullptr ? new std::int64_t[count(p.groups) + 1] : nullptr),
        values(new double[count(p.rows)]),
        totals(with_totals ? new double[count(p.rows)] : nullptr) {}
  GroupScratch pointers() const { return {order.get(), starts.get(), values.get(), totals.get()}; }

  std::unique_ptr<std::int64_t[]> order, starts;
  std::unique_ptr<double[]> values, totals;

 private:
  static std::size_t count(std::int64_t n) { return static_cast<std::size_t>(n); }
};

void group_advantages(Address rewards, bool rewards_f64, std::int64_t rows, std::int64_t components,
                      Address group_index, std::int64_t group_size, Address lengths, Address component_weights,
                      Address center_values, Address scale_values, int center, int scale, int ddof, double eps,
                      bool eps_inside, int singleton, int normalize, Address advantages, int threads) {
  if (rows == 0) return;
  GroupProblem p;
  p.rows = rows;
  p.components = components;
  p.rewards = at<const void>(rewards);
  p.rewards_f64 = rewards_f64;
  p.group_index = at<const std::int64_t>(group_index);
  p.group_size = group_size;
  p.lengths = at<const float>(lengths);
  p.component_weights = at<const float>(component_weights);
  p.center_values = at<const float>(center_values);
  p.scale_values = at<const float>(scale_values);
  p.center = static_cast<Center>(center);
  p.scale = static_cast<Scale>(scale);
  p.singleton = static_cast<Singleton>(singleton);
  p.normalize = static_cast<Normalize>(normalize);
  p.ddof = ddof;
  p.eps = eps;
  p.eps_inside = eps_inside;
  p.advantages = at<float>(advantages);
  p.threads = threads;
  std::unique_ptr<std::int64_t[]> numbered;
  find_groups(p, numbered);

  const Scratch scratch(p, true);
  FASTREWARD_DISPATCH(group_advantages)(p, scratch.pointers());
}

void group_statistics(Address x, bool x_f64, std::int64_t rows, Address group_index, std::int64_t group_size,
                      Address weights, bool exponentials, Address statistics, int threads) {
  if (rows == 0) return;
  GroupProblem p;
  p.rows = rows;
  p.components = 1;
  p.rewards = at<const void>(x);
  p.rewards_f64 = x_f64;
  p.group_index = at<const std::int64_t>(group_index);
  p.group_size = group_size;
  p.lengths = at<const float>(weights);
  p.statistics = at<double>(statistics);
  p.threads = threads;
  std::unique_ptr<std::int64_t[]> numbered;
  find_groups(p, numbered);
  const Scratch scratch(p, false);
  FASTREWARD_DISPATCH(group_statistics)(p, scratch.pointers(), exponentials);
}

// Whether equal values of this type are equal labels; others (tensors, NaN, plain objects) are looked at in Python.
bool compares_by_value(PyObject* label) {
  return PyUnicode_Check(label) || PyLong_Check(label) || PyBytes_Check(label) || label == Py_None;
}

// labels[i] -> index[i], equal labels the same number, 0, 1, ... in first-seen order. False where a label was met that
// is not known to compare by value, unless all have been `looked_at`. The dict is Python's own: a string's hash is kept
// in the string, so that one pass over a batch of uids costs little more than its cache misses.
bool number_labels(const pybind11::list& labels, Address index, bool looked_at) {
  auto* const out = at<std::int64_t>(index);
  const pybind11::dict seen;
  std::int64_t groups = 0;
  const Py_ssize_t count = PyList_GET_SIZE(labels.ptr());
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* const label = PyList_GET_ITEM(labels.ptr(), i);
    if (!looked_at && !compares_by_value(label)) return false;
    PyObject* number = PyDict_GetItemWithError(seen.ptr(), label);
    if (number == nullptr) {
      if (PyErr_Occurred() != nullptr) throw pybind11::error_already_set();
      const pybind11::int_ next(groups++);
      number = next.ptr();
      if (PyDict_SetItem(seen.ptr(), label, number) != 0) throw pybind11::error_already_set();
    }
    out[i] = PyLong_AsLongLong(number);
  }
  return true;
}

}  // namespace

void register_group(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("group_advantages", &group_advantages, py::call_guard<py::gil_scoped_release>(), py::arg("rewards"),
        py::arg("rewards_f64"), py::arg("rows"), py::arg("components"), py::arg("group_index"), py::arg("group_size"),
        py::arg("lengths"), py::arg("component_weights"), py::arg("center_values"), py::arg("scale_values"),
        py::arg("center"), py::arg("scale"), py::arg("ddof"), py::arg("eps"), py::arg("eps_inside"),
        py::arg("singleton"), py::arg("normalize"), py::arg("advantages"), py::arg("threads"));
  m.def("group_statistics", &group_statistics, py::call_guard<py::gil_scoped_release>(), py::arg("x"), py::arg("x_f64"),
        py::arg("rows"), py::arg("group_index"), py::arg("group_size"), py::arg("weights"), py::arg("exponentials"),
        py::arg("statistics"), py::arg("threads"));
  m.def(
      "number_integers",
      [](Address labels, std::int64_t rows, bool absent, Address index) {
        return number_integers(at<const std::int64_t>(labels), rows, at<std::int64_t>(index), absent);
      },
      py::call_guard<py::gil_scoped_release>(), py::arg("labels"), py::arg("rows"), py::arg("absent"),
      py::arg("index"));
  m.def("number_labels", &number_labels, py::arg("labels"), py::arg("index"), py::arg("looked_at"));
}

}  // namespace fastreward
