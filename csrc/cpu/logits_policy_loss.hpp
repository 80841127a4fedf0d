// Logits to the gradient of a loss for them, row by row, while a row is in cache.
#pragma once

#include "cpu/logprobs/logprobs.hpp"
#include "cpu/program/program.hpp"

namespace fastreward {

struct LogitsPolicyLoss {
  LogprobsRows in;  // no kept sets, no token ids
  // One pass without reductions over one token: its outputs are the loss's derivatives.
  const ProgramCode* code = nullptr;
  const float* const* inputs = nullptr;  // one per code.inputs, [rows]; those of logprob and entropy are not looked at
  int logprob = -1, entropy = -1;        // their numbers among the inputs, -1: not read
  int logprob_gradient = -1, entropy_gradient = -1;  // their numbers among the outputs, -1: there is none
  const double* scalars = nullptr;
  float scale = 1.0f;            // multiplies the gradient
  float* logprobs = nullptr;     // [rows], 0 where masked out
  float* entropies = nullptr;    // [rows], or null where neither read nor differentiated
  void* grad_logits = nullptr;   // [rows, columns], may be `in.logits`
  std::int64_t grad_stride = 0;
};

}  // namespace fastreward

FASTREWARD_DECLARE(void logits_policy_loss(const ::fastreward::LogitsPolicyLoss& call);)
