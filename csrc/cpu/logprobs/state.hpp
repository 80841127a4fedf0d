// The running statistics of a row of logits, and what is made of them in the end. For csrc/cpu only.
#pragma once

#include <cmath>

#include "cpu/logprobs/rows.hpp"

namespace fastreward::FASTREWARD_ISA::logprobs {

// The running statistics of a row (fastreward/_runtime/layout.py: STATE) and the block that holds its maximum.
struct State {
  double s[kStateSize];
  std::int64_t best_block = -1;
};

inline State empty_state() {
  State state{};
  state.s[kStateMax] = -static_cast<double>(__builtin_inff());
  state.s[kStateLabel] = std::nan("");
  return state;
}

// The difference of two maxima in nats; what is that far below vanishes, also where it is multiplied by the distance.
inline double shift_of(double below, double above, double inv_temperature) {
  const double shift = (below - above) * inv_temperature;
  return shift < -1e4 ? -1e4 : shift;
}

// Columns: what mean_logit divides by.
inline void write_row(const State& state, double inv_temperature, double columns, int flags, float* values,
                      std::int64_t* indices, std::int64_t stride) {
  const double* s = state.s;
  const double log_sum = std::log(s[kStateSum]);
  const auto put = [&](int name, double x) { values[name * stride] = static_cast<float>(x); };
  const bool nothing = s[kStateSum] == 0.0;  // every logit is -inf
  // A logit is +inf: no probabilities, but a logsumexp.
  const bool certain = s[kStateMax] == static_cast<double>(__builtin_inff());
  put(kValueLogprob, (s[kStateLabel] - s[kStateMax]) * inv_temperature - log_sum);
  put(kValueLogsumexp, nothing || certain ? s[kStateMax] : s[kStateMax] * inv_temperature + log_sum);
  put(kValueLabelLogit, s[kStateLabel] * inv_temperature);
  put(kValueMaxLogprob, nothing ? std::nan("") : -log_sum);
  put(kValueMaxLogit, s[kStateMax]);
  put(kValueEntropy, (flags & kEntropy) != 0 ? log_sum - s[kStateSumT] / s[kStateSum] : 0.0);
  put(kValueMeanLogit, (flags & kMeanLogit) != 0 ? s[kStateSumLogit] * inv_temperature / columns : 0.0);
  const double squares = nothing ? std::nan("") : std::log(s[kStateSumSq]) - 2.0 * log_sum;
  put(kValueLogSumSq, (flags & kLogSumSq) != 0 ? squares : 0.0);
  indices[0] = (flags & kArgmax) != 0 ? static_cast<std::int64_t>(s[kStateArgmax]) : 0;
  indices[stride] = (flags & kRank) != 0 ? static_cast<std::int64_t>(s[kStateRank]) : 0;
}

// The first column at or behind `start` that holds x; `columns` where there is none.
template <class T>
inline std::int64_t first_of(const T* row, std::int64_t start, std::int64_t columns, float x) {
  for (std::int64_t i = start; i < columns; i += simd::kF32) {
    const int left = columns - i < simd::kF32 ? static_cast<int>(columns - i) : simd::kF32;
    const simd::F32 v = left == simd::kF32 ? simd::load(row + i) : simd::load_n(row + i, left, 0.0f);
    const unsigned hits = bits((v == simd::f32(x)) & simd::first32(left));
    if (hits != 0) return i + __builtin_ctz(hits);
  }
  return columns;
}

}  // namespace fastreward::FASTREWARD_ISA::logprobs
