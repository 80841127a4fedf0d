// exp(d * s) for one scale s per row and d <= 0: the softmax's exponential, cheaper and more accurate than exp(d * s).
// s * log2(e) is kept in two floats, so that neither the product nor the scale is rounded; d is clamped where the result
// is 0, which keeps -inf out of the arithmetic (0 * -inf) and leaves a NaN in place. Include simd.hpp first.
#pragma once

#include "common/simd.hpp"

namespace fastreward::FASTREWARD_ISA::simd {

struct ExpScale {
  F32 high, low;  // s * log2(e)
  F32 lowest;     // the d at which 2^-160 = 0 is reached
};

inline ExpScale exp_scale(double s) {
  const double c = s * 1.44269504088896340736;
  const auto high = static_cast<float>(c);
  const double lowest = -160.0 / c;
  return {f32(high), f32(static_cast<float>(c - static_cast<double>(high))),
          f32(lowest > -3.0e38 ? static_cast<float>(lowest) : -3.0e38f)};
}

inline F32 clamp_exponent(F32 d, const ExpScale& s) { return max(s.lowest, d); }

#ifdef FASTREWARD_AVX512
// 2^(i/16) from a register, times a cubic for |f| <= 1/32, times a power of two: relative error below 2^-24 + 1 rounding.
inline F32 exp_scaled(F32 d, const ExpScale& s) {
  const __m512 powers = _mm512_setr_ps(1.0f, 1.0442737824f, 1.0905077327f, 1.1387886348f, 1.1892071150f, 1.2418578121f,
                                       1.2968395547f, 1.3542555469f, 1.4142135624f, 1.4768261459f, 1.5422108254f,
                                       1.6104903319f, 1.6817928305f, 1.7562521604f, 1.8340080864f, 1.9152065614f);
  const F32 magic = f32(786432.0f);  // 1.5 * 2^19: four fraction bits remain in the sum
  const F32 shifted = fma(d, s.high, magic);
  const F32 n = shifted - magic;
  const F32 f = fma(d, s.low, fms(d, s.high, n));
  F32 p = fma(f32(5.5502135307e-02f), f, f32(2.4023428559e-01f));
  p = fma(p, f, f32(6.9314718246e-01f));
  p = fma(p, f, f32(1.0f));
  const F32 power{_mm512_permutexvar_ps(_mm512_castps_si512(shifted.v), powers)};
  return scale2(power * p, n);  // scalef takes the floor of n
}
#else
inline F32 exp_scaled(F32 d, const ExpScale& s) {
  const F32 magic = f32(12582912.0f);  // 1.5 * 2^23
  const F32 n = fma(d, s.high, magic) - magic;
  const F32 f = fma(d, s.low, fms(d, s.high, n));
  F32 p = fma(f32(1.5353361960e-04f), f, f32(1.3398873853e-03f));
  p = fma(p, f, f32(9.6184369177e-03f));
  p = fma(p, f, f32(5.5503323674e-02f));
  p = fma(p, f, f32(2.4022647738e-01f));
  p = fma(p, f, f32(6.9314718246e-01f));
  p = fma(p, f, f32(1.0f));
  return (p * power2(n + f32(64.0f))) * f32(5.4210108624275222e-20f);  // 2^-64 last: underflow comes out right
}
#endif

}  // namespace fastreward::FASTREWARD_ISA::simd
