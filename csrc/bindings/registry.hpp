// One register_<operation>.cpp per operation; core.cpp calls each once.
#pragma once

#include <pybind11/pybind11.h>

namespace fastreward {

void register_logprobs(pybind11::module_& m);
void register_program(pybind11::module_& m);
void register_logits_policy_loss(pybind11::module_& m);
void register_divergence(pybind11::module_& m);
void register_group(pybind11::module_& m);
void register_balance(pybind11::module_& m);
void register_prefix_tree(pybind11::module_& m);
void register_segments(pybind11::module_& m);
void register_rewards(pybind11::module_& m);
void register_whiten(pybind11::module_& m);
void register_returns(pybind11::module_& m);
void register_mask(pybind11::module_& m);
void register_memory(pybind11::module_& m);

}  // namespace fastreward
