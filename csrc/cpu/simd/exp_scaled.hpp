// exp(d * s) for one scale s per row and d <= 0: the softmax's exponential, cheaper and more accurate than exp(d * s).
// s * log2(e) is kept in two floats, so that neither the product nor the scale is rounded; d is clamped at 2^-126: that
// keeps -inf out of the arithmetic (0 * -inf) and denormals out of the hardware, and leaves a NaN in place.
#pragma once

#include "cpu/simd/simd.hpp"

namespace fastreward::FASTREWARD_ISA::simd {

struct ExpScale {
  F32 high, low;  // s * log2(e)
  F32 lowest;     // the d of 2^-126
};

// Beyond 2^120 or below 2^-120 the scale could not tell -inf from 0: distinct logits that are told apart by anything
// are far apart there, and all but the largest ones alike.
inline ExpScale exp_scale(double s) {
  const double wanted = s * 1.44269504088896340736;
  const double least = 7.52316384526264e-37, most = 1.329227995784916e+36;
  const double c = wanted < least ? least : wanted > most ? most : wanted;  // a NaN stays one
  const auto high = static_cast<float>(c);
  const double lowest = -126.0 / c;
  return {f32(high), f32(static_cast<float>(c - static_cast<double>(high))),
          f32(lowest > -3.0e38 ? static_cast<float>(lowest) : -3.0e38f)};
}

inline F32 clamp_exponent(F32 d, const ExpScale& s) { return max(s.lowest, d); }

// exp(d * s) = power * rest, a power of two and a number near 1: sum + exp(d * s) is one fma of the two.
struct ExpFactors {
  F32 power, rest;
};

// For a clamped d: the clamped ones give 2^-126 or so, which no sum that holds a 1 can see.
#ifdef FASTREWARD_AVX512
// 2^x for a multiple x of 1/16, of which `shifted` is the sum with 1.5 * 2^19: four fraction bits remain in the sum.
inline F32 power16(F32 shifted) {
  // bits of 2^(i/16) less i << 19, because the fraction bits i are shifted in below the exponent
  const __m512i powers = _mm512_setr_epi32(
      0x3f800000, 0x3f7daac3, 0x3f7b95c2, 0x3f79c3d3, 0x3f7837f0, 0x3f76f532, 0x3f75fed7, 0x3f75583f, 0x3f7504f3,
      0x3f7508a4, 0x3f75672a, 0x3f76248c, 0x3f7744fd, 0x3f78ccdf, 0x3f7ac0c7, 0x3f7d257d);
  const __m512i bits = _mm512_castps_si512(shifted.v);
  return {_mm512_castsi512_ps(
      _mm512_add_epi32(_mm512_permutexvar_epi32(bits, powers), _mm512_slli_epi32(bits, 19)))};
}

// 2^(i/16) from a register, times a cubic for |f| <= 1/32; the power of two goes straight into the exponent (scalef
// would cost as much as all the rest). Relative error below 2^-28 before the last two roundings.
inline ExpFactors exp_factors(F32 d, const ExpScale& s) {
  const F32 magic = f32(786432.0f);
  const F32 shifted = fma(d, s.high, magic);
  const F32 n = shifted - magic;
  const F32 f = fma(d, s.low, fms(d, s.high, n));
  F32 p = fma(f32(5.5502135307e-02f), f, f32(2.4023428559e-01f));
  p = fma(p, f, f32(6.9314718246e-01f));
  p = fma(p, f, f32(1.0f));
  return {power16(shifted), p};
}
#else
// a * b - n without the rounding of a * b, also where there is no fused multiply-add (products of halves are exact).
inline F32 multiply_subtract(F32 a, F32 b, F32 n) {
  if (kHasFma) return fms(a, b, n);
  const F32 split = f32(4097.0f);
  const F32 a_high = a * split - (a * split - a), b_high = b * split - (b * split - b);
  const F32 a_low = a - a_high, b_low = b - b_high;
  const F32 product = a * b;
  const F32 rest = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low;
  return (product - n) + rest;
}

inline ExpFactors exp_factors(F32 d, const ExpScale& s) {
  const F32 magic = f32(12582912.0f);  // 1.5 * 2^23
  const F32 n = fma(d, s.high, magic) - magic;
  const F32 f = fma(d, s.low, multiply_subtract(d, s.high, n));
  F32 p = fma(f32(1.5353361960e-04f), f, f32(1.3398873853e-03f));
  p = fma(p, f, f32(9.6184369177e-03f));
  p = fma(p, f, f32(5.5503323674e-02f));
  p = fma(p, f, f32(2.4022647738e-01f));
  p = fma(p, f, f32(6.9314718246e-01f));
  p = fma(p, f, f32(1.0f));
  return {power2(n), p};
}
#endif

inline F32 exp_scaled(F32 d, const ExpScale& s) {
  const ExpFactors e = exp_factors(d, s);
  return e.power * e.rest;
}

// exp(d) for kLeastOfOne <= d <= 0: of the scale 1, which most calls have, at a third less. Relative error below 2^-22.2
// for d > -20, 2^-21.3 at the end; exact at 0.
constexpr float kLeastOfOne = -86.5f;  // its result is normal
inline F32 exp_of_one(F32 d) {
  const F32 log2e = f32(1.44269504088896341f), ln2 = f32(0.693147180559945309f);  // 2^-28 from the number itself
#ifdef FASTREWARD_AVX512
  const F32 shifted = fma(d, log2e, f32(786432.0f));
  const F32 r = fnma(shifted - f32(786432.0f), ln2, d);
  F32 p = fma(f32(1.6666074097e-01f), r, f32(5.0001621246e-01f));
  p = fma(p, r, f32(1.0f));
  p = fma(p, r, f32(1.0f));
  return power16(shifted) * p;
#else
  const F32 shifted = fma(d, log2e, f32(12582912.0f));
  const F32 n = shifted - f32(12582912.0f);
  const F32 r = kHasFma ? fnma(n, ln2, d) : (d - n * f32(0.693359375f)) + n * f32(2.12194440e-4f);
  F32 p = fma(f32(8.2903066650e-03f), r, f32(4.1897974908e-02f));
  p = fma(p, r, f32(1.6667637229e-01f));
  p = fma(p, r, f32(4.9999150634e-01f));
  p = fma(p, r, f32(9.9999970198e-01f));
  p = fma(p, r, f32(1.0f));
  return times_power2(p, shifted);
#endif
}

// The same with a true 0 where d was clamped, for results that are looked at one by one.
inline F32 exp_scaled_or_zero(F32 d, const ExpScale& s) { return select(d <= s.lowest, f32(0.0f), exp_scaled(d, s)); }

// Denormal results are flushed to 0 while this lives: some processors need a hundred cycles for each.
class FlushDenormals {
 public:
#if defined(__SSE2__)
  FlushDenormals() : saved_(__builtin_ia32_stmxcsr()) { __builtin_ia32_ldmxcsr(saved_ | 0x8000u); }
  ~FlushDenormals() { __builtin_ia32_ldmxcsr(saved_); }

 private:
  unsigned saved_;
#else
  FlushDenormals() {}
  ~FlushDenormals() {}
#endif
 public:
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;
};

}  // namespace fastreward::FASTREWARD_ISA::simd
