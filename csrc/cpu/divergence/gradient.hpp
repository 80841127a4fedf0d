// Rows of both sides by the forward's statistics: log-probs and probabilities, and gradients that are sums of products.
// For csrc/cpu/divergence/ only.
#pragma once

#include <cmath>

#include "cpu/divergence/pair.hpp"

namespace fastreward::FASTREWARD_ISA::divergence {

// A row's log-probs, (x - middle) * scale + top, and probabilities, exp((x - middle) * temperature's inverse) * peak.
struct Distribution {
  F32 middle, scale, top, peak;
  ExpScale exponent;
  bool one;  // the scale
};

// From values [8, rows] at `row`.
inline Distribution distribution(const LogprobsRows& in, std::int64_t row, const float* values, std::int64_t stride) {
  const double least = 1e-37, most = 1e37, inverse = inv_temperature_of(in, row);
  const double scale = inverse < least ? least : inverse > most ? most : inverse;  // neither 0 * -inf nor 0 * inf
  const float top = values[kValueMaxLogprob * stride];
  return {f32(values[kValueMaxLogit * stride]),
          f32(static_cast<float>(scale)),
          f32(top),
          f32(static_cast<float>(std::exp(static_cast<double>(top)))),
          exp_scale(inverse),
          inverse == 1.0};
}

// scale (self + log log p + apart (log p - log q)), by which p is multiplied, or with log q instead q. The scale is apart
// from the rest, so that log p - log q may cancel with what it is compared with before it is scaled.
struct Factor {
  float scale, self, log, apart;
};
struct Gradient {
  Factor p, q;
};
Gradient gradient_of(const DivergenceBackward& call, std::int64_t row);

// Writes a block's gradient, whole vectors of it, from whole vectors.
using GradientKernel = void (*)(const float* x, const float* y, int n, const Distribution& student,
                                const Distribution& teacher, const Gradient& of, float* out);
GradientKernel gradient_kernel(const Gradient& of, bool one);

// Log-probs of whole vectors of n columns at `log`, which may be where they lie, and probabilities at `exp`; null: not
// wanted.
void probabilities(const float* x, int n, const Distribution& d, float* log, float* exp);

}  // namespace fastreward::FASTREWARD_ISA::divergence
