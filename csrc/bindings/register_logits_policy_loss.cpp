// fastreward._core.logits_policy_loss: see csrc/cpu/logits_policy_loss.hpp.
#include <pybind11/stl.h>

#include <cstdint>
#include <vector>

#include "bindings/registry.hpp"
#include "cpu/logits_policy_loss.hpp"

namespace fastreward {
namespace {

using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

void run(LogprobsRows in, Address code, const std::vector<Address>& inputs, int logprob, int entropy,
         bool has_entropy_gradient, const std::vector<double>& scalars, double scale, Address logprobs,
         Address entropies, Address grad_logits, std::int64_t grad_stride) {
  const pybind11::gil_scoped_release unlocked;
  std::vector<const float*> sources;
  for (const Address address : inputs) sources.push_back(at<const float>(address));
  LogitsPolicyLoss call;
  call.in = in;
  call.code = at<const ProgramCode>(code);
  call.inputs = sources.data();
  call.logprob = logprob;
  call.entropy = entropy;
  call.has_entropy_gradient = has_entropy_gradient;
  call.scalars = scalars.data();
  call.scale = static_cast<float>(scale);
  call.logprobs = at<float>(logprobs);
  call.entropies = at<float>(entropies);
  call.grad_logits = at<void>(grad_logits);
  call.grad_stride = grad_stride;
  FASTREWARD_DISPATCH(logits_policy_loss)(call);
}

}  // namespace

void register_logits_policy_loss(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("logits_policy_loss", &run, py::kw_only(), py::arg("rows"), py::arg("code"), py::arg("inputs"),
        py::arg("logprob"), py::arg("entropy"), py::arg("has_entropy_gradient"), py::arg("scalars"), py::arg("scale"),
        py::arg("logprobs"), py::arg("entropies"), py::arg("grad_logits"), py::arg("grad_stride"),
        "The loss's gradient for each row of logits, and the rows' log-probs and entropies.");
}

}  // namespace fastreward
