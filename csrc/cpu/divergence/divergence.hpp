// Divergences of two distributions over the vocabulary, row by row, and their gradient, each a program of the loss
// language over the log-probs of a row's tokens.
#pragma once

#include "cpu/logprobs/logprobs.hpp"
#include "cpu/program/program.hpp"

namespace fastreward {

struct DivergenceRows {
  LogprobsRows student, teacher;  // no kept sets, no token ids; the labels and the mask are the student's
  // One pass over the tokens of a row, without groups.
  const ProgramCode* code = nullptr;
  int log_p = -1, log_q = -1, p = -1, q = -1;  // their numbers among the inputs, -1: not read
  const float* const* inputs = nullptr;  // the others per row: one per code.inputs, [rows]
  const double* scalars = nullptr;
};

// An output that one read gives: relative_p sum p (log p - log q) + relative_q sum q (log p - log q) + log_p sum p log p +
// log_q sum q log q + constant (fastreward/language/divergence_moments.py).
struct DivergenceMoments {
  double relative_p, relative_q, log_p, log_q, constant;
};

// A product per token of the vocabulary, and what it is multiplied by in a gradient: a number times inputs per row.
enum class DivergenceProduct : int { p, q, p_log_p, p_log_q, q_log_p, q_log_q };
constexpr int kDivergenceProducts = 6;
struct DivergenceTerm {
  DivergenceProduct product;
  double factor;
  Span<int> inputs;  // numbers of code.inputs
};

struct DivergenceForward {
  DivergenceRows in;  // all outputs per row
  const DivergenceMoments* moments = nullptr;  // one per output; null: they take more than moments
  int student_flags = 0, teacher_flags = 0;
  bool known = false;  // the values are given: the columns are a slice of the vocabulary, they are of all of it
  float* student_values = nullptr;   // [8, rows]; 0 where masked out, as all that follows
  float* teacher_values = nullptr;   // [8, rows]
  std::int64_t* student_indices = nullptr;  // [2, rows]
  std::int64_t* teacher_indices = nullptr;  // [2, rows]
  float* const* outputs = nullptr;   // one per code.outputs, [rows]
};

struct DivergenceBackward {
  DivergenceRows in;  // one output per token: the gradient for the logits of a row
  Span<DivergenceTerm> terms;  // the same as a sum of products; none: it is not one
  const float* student_values = nullptr, *teacher_values = nullptr;  // [8, rows], the forward's
  const float* label_gradients = nullptr;  // [rows]: what is added at the label, or null
  void* grad_logits = nullptr;             // [rows, columns], in the student's dtype; may be either side's logits
  std::int64_t grad_stride = 0;
};

struct DivergenceHeadShare {
  LogprobsRows student, teacher;
  const float* student_values = nullptr, *teacher_values = nullptr;  // [8, rows]
  double alpha = 0.5;       // what the teacher's tail has of its mass, at most
  float* shares = nullptr;  // [rows], 0 where masked out
};

}  // namespace fastreward

FASTREWARD_DECLARE(void divergence_forward(const ::fastreward::DivergenceForward& call);
                   void divergence_backward(const ::fastreward::DivergenceBackward& call);
                   void divergence_head_share(const ::fastreward::DivergenceHeadShare& call);)
