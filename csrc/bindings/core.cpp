// fastreward._core: the CPU kernels. Takes data pointers, never links libtorch, so one build serves every torch.
#include "bindings/registry.hpp"
#include "cpu/common/isa.hpp"
#include "cpu/threads.hpp"

PYBIND11_MODULE(_core, m) {
  m.doc() = "fastreward's C++ kernels for the CPU. Pointers in, nothing allocated; use fastreward's functions instead.";
  m.def("isa", [] { return fastreward::isa_name(fastreward::active_isa()); },
        "Instruction set in use: baseline, avx2 or avx512 (FASTREWARD_ISA lowers it).");
  m.def("set_worth_waking", &fastreward::threads::set_worth_waking, pybind11::arg("microseconds"),
        "How much work must be left for threads to be woken (csrc/cpu/threads.hpp); returns what it was. For tests.");
  fastreward::register_memory(m);
  fastreward::register_mask(m);
  fastreward::register_logprobs(m);
  fastreward::register_program(m);
  fastreward::register_logits_policy_loss(m);
  fastreward::register_divergence(m);
  fastreward::register_group(m);
  fastreward::register_balance(m);
  fastreward::register_whiten(m);
  fastreward::register_segments(m);
  fastreward::register_returns(m);
  fastreward::register_prefix_tree(m);
  fastreward::register_rewards(m);
}
