// Both sides' rows of logits in one pass: the softmax statistics of each, and moments of one over the other.
// For csrc/cpu/divergence/ only.
#pragma once

#include "cpu/divergence/divergence.hpp"
#include "cpu/logprobs/state.hpp"

namespace fastreward::FASTREWARD_ISA::divergence {

using namespace simd;
using namespace logprobs;

constexpr int kBlock = static_cast<int>(kProgramChunk);
// Log-probs below this count as this.
constexpr double kLowest = -1e4;

// What is summed besides the exponentials: sum p (log p - log q), sum q (log p - log q); sum p log p and sum q log q.
enum PairFlag : int { kOfP = 1, kOfQ = 2, kOfLogs = 4 };

// Sums over columns of e = exp(t) and f = exp(u), the exponents t and u of both sides relative to the largest logits so
// far; t and u are in units of the first side's logits here.
struct PairSums {
  double x = 0.0, y = 0.0;            // e, f
  double x_log = 0.0, y_log = 0.0;    // e t, f u (u in units of the second side's logits)
  double of_p = 0.0, of_q = 0.0;      // e (t - u), f (t - u), without the term of a logit that is -inf
  double gone_p = 0.0, gone_q = 0.0;  // e where u is -inf, f where t is
};

// A row of both.
struct Pair {
  PairSums sums;
  float x_max = -__builtin_inff(), y_max = -__builtin_inff();
  std::int64_t x_start = 0, y_start = 0;  // where the block begins that holds them
  bool far = false;                       // a token that counts has a finite log-prob below kLowest, or nearly: no moments
};

// Both sides' blocks as floats in L1, whole vectors of them.
struct PairBuffers {
  float* x;
  float* y;
};

// n columns as floats, those that make a whole vector of the last ones as -inf; the logits themselves where they are that.
inline const float* whole_vectors(const float* x, int n, float* buffer) {
  if (n % kF32 == 0) return x;
  __builtin_memcpy(buffer, x, static_cast<std::size_t>(n) * sizeof(float));
  for (int i = n; i % kF32 != 0; ++i) buffer[i] = -__builtin_inff();
  return buffer;
}
template <class T>
inline const float* whole_vectors(const T* x, int n, float* buffer) {
  int i = 0;
  for (; i + kF32 <= n; i += kF32) store(buffer + i, load(x + i));
  if (i < n) store(buffer + i, load_n(x + i, n - i, -__builtin_inff()));
  return buffer;
}

inline int block_size(std::int64_t columns, std::int64_t start) {
  return static_cast<int>(columns - start < kBlock ? columns - start : kBlock);
}

// How to take a block: the exponents' scales and the ratio of the second to the first in two floats.
struct PairScale {
  double x, y;
  ExpScale x_exp, y_exp;
  F32 ratio, ratio_rest;
  bool one;       // both scales are 1
  bool moderate;  // neither makes numbers that the moments could not hold
};
PairScale pair_scale(double x_inverse, double y_inverse);

// Adds a block of whole vectors, `start` its first column.
void add_block(const float* x, const float* y, int n, std::int64_t start, const PairScale& scale, int flags, Pair& pair);
// The largest logits' bases are those of the row from here on.
State state_of(double sum, double sum_log, double inverse, float max);
double by_moments(const DivergenceMoments& of, const Pair& pair, const PairScale& scale);

template <class S, class T>
Pair scan_pair(const S* x, const T* y, std::int64_t columns, const PairScale& scale, int flags, const PairBuffers& to) {
  Pair pair;
  pair.far = !scale.moderate;
  for (std::int64_t start = 0; start < columns; start += kBlock) {
    const int n = block_size(columns, start), whole = (n + kF32 - 1) / kF32 * kF32;
    add_block(whole_vectors(x + start, n, to.x), whole_vectors(y + start, n, to.y), whole, start, scale, flags, pair);
  }
  return pair;
}

}  // namespace fastreward::FASTREWARD_ISA::divergence
