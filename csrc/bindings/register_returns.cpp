// fastreward._core.returns_scan: see csrc/cpu/returns/returns.hpp.
#include <pybind11/stl.h>

#include <cstdint>
#include <vector>

#include "bindings/addresses.hpp"
#include "bindings/registry.hpp"
#include "cpu/returns/returns.hpp"

namespace fastreward {
namespace {

// tensors: rewards, values, log_ratios, next_values, gamma, lam, terminated, done, beyond, mask, bounds
// numbers: gamma, lam, scale, rho_bar, c_bar
// options: kind, at_masked, op, reverse, move, mask_kind, gamma per row, lam per row
bool returns_scan(const std::vector<Address>& tensors, const std::vector<double>& numbers, const std::vector<int>& options,
                  std::int64_t rows, std::int64_t columns, Address out, Address second, int threads) {
  expect_size("tensors", tensors.size(), 11);
  expect_size("numbers", numbers.size(), 5);
  expect_size("options", options.size(), 8);
  ReturnsInput in;
  in.rewards = at<const float>(tensors[0]);
  in.values = at<const float>(tensors[1]);
  in.log_ratios = at<const float>(tensors[2]);
  in.next_values = at<const float>(tensors[3]);
  in.gamma = {numbers[0], at<const float>(tensors[4]), options[6] != 0};
  in.lam = {numbers[1], at<const float>(tensors[5]), options[7] != 0};
  in.terminated = at<const std::uint8_t>(tensors[6]);
  in.done = at<const std::uint8_t>(tensors[7]);
  in.beyond = at<const float>(tensors[8]);
  in.mask = {at<const void>(tensors[9]), static_cast<MaskKind>(options[5])};
  in.bounds = at<const std::int64_t>(tensors[10]);
  in.rows = rows;
  in.columns = columns;
  in.scale = numbers[2];
  in.rho_bar = static_cast<float>(numbers[3]);
  in.c_bar = static_cast<float>(numbers[4]);
  in.kind = static_cast<ReturnsKind>(options[0]);
  in.at_masked = static_cast<AtMasked>(options[1]);
  in.op = static_cast<ReturnsOp>(options[2]);
  in.reverse = options[3] != 0;
  in.move = options[4] != 0;
  const pybind11::gil_scoped_release release;
  return FASTREWARD_DISPATCH(returns_scan)(in, at<float>(out), at<float>(second), threads);
}

}  // namespace

void register_returns(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("returns_scan", &returns_scan, py::arg("tensors"), py::arg("numbers"), py::arg("options"), py::arg("rows"),
        py::arg("columns"), py::arg("out"), py::arg("second"), py::arg("threads"),
        "Recurrences along rows; False: something that counts was not finite.");
}

}  // namespace fastreward
