// fastreward._core.logits_policy_loss: see csrc/cpu/logits_policy_loss.hpp.
#include <pybind11/stl.h>

#include <cstdint>
#include <vector>

#include "bindings/addresses.hpp"
#include "bindings/registry.hpp"
#include "cpu/logits_policy_loss.hpp"

namespace fastreward {
namespace {

void run(LogprobsRows in, Address code, const std::vector<Address>& inputs, int logprob, int entropy,
         int logprob_gradient, int entropy_gradient, const std::vector<double>& scalars, double scale,
         Address logprobs, Address entropies, Address grad_logits, std::int64_t grad_stride) {
  const pybind11::gil_scoped_release unlocked;
  LogitsPolicyLoss call;
  call.in = in;
  call.code = required<const ProgramCode>("code", code, 1);
  expect_size("inputs", inputs.size(), call.code->inputs.size);
  expect_size("scalars", scalars.size(), call.code->scalars.size);
  const int gradients = (logprob_gradient >= 0) + (entropy_gradient >= 0);
  if (gradients != call.code->outputs.size || logprob_gradient >= gradients || entropy_gradient >= gradients)
    throw std::invalid_argument("logprob_gradient, entropy_gradient: expected the places of all outputs");
  std::vector<const float*> sources;
  for (int k = 0; k < call.code->inputs.size; ++k) {
    const bool computed = k == logprob || k == entropy;
    sources.push_back(required<const float>("inputs", inputs[static_cast<std::size_t>(k)], computed ? 0 : in.rows));
  }
  call.inputs = sources.data();
  call.logprob = logprob;
  call.entropy = entropy;
  call.logprob_gradient = logprob_gradient;
  call.entropy_gradient = entropy_gradient;
  call.scalars = scalars.data();
  call.scale = static_cast<float>(scale);
  call.logprobs = required<float>("logprobs", logprobs, in.rows);
  call.entropies = required<float>("entropies", entropies, entropy >= 0 || entropy_gradient >= 0 ? in.rows : 0);
  call.grad_logits = required<void>("grad_logits", grad_logits, in.rows * in.columns);
  call.grad_stride = grad_stride;
  FASTREWARD_DISPATCH(logits_policy_loss)(call);
}

}  // namespace

void register_logits_policy_loss(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("logits_policy_loss", &run, py::kw_only(), py::arg("rows"), py::arg("code"), py::arg("inputs"),
        py::arg("logprob"), py::arg("entropy"), py::arg("logprob_gradient"), py::arg("entropy_gradient"),
        py::arg("scalars"), py::arg("scale"), py::arg("logprobs"), py::arg("entropies"), py::arg("grad_logits"),
        py::arg("grad_stride"),
        "The loss's gradient for each row of logits, and the rows' log-probs and entropies.");
}

}  // namespace fastreward
