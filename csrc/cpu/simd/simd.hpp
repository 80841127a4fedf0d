// SIMD vectors for the CPU kernels: one vocabulary, three instruction sets, chosen at compile time by FASTREWARD_ISA.
// Include it from csrc/cpu/*.cpp only (never from bindings): everything lies in namespace fastreward::<isa>, so that
// no AVX-512 copy of an inline function can be linked into the baseline. A kernel writes
//
//     namespace fastreward::FASTREWARD_ISA { void f(...) { using namespace simd; F32 x = load(p); ... } }
//
//   F32, F64             vectors of kF32 floats, kF64 = kF32 / 2 doubles;  M32, M64  their lane masks
//   f32(x), f64(x)       all lanes x
//   load(p), store(p, v) unaligned; p: float, double, Bf16, F16 (Bf16/F16 <-> F32, to nearest even, NaN stays NaN)
//   load_n(p, n, fill), store_n(p, v, n)    the first n lanes, 0 <= n < lanes; nothing else is touched
//   load2, store2, stream2    two vectors in an order that is cheapest for the type (elementwise work, sums)
//   stream(p, v)         non-temporal, p aligned to the vector; fence() before anyone else reads
//   + - * / fma(a,b,c)=a*b+c  fms=a*b-c  fnma=c-a*b  abs sqrt
//   max(a, b), min(a, b) b when a lane of either is NaN: max(bound, x) keeps a NaN x, max(x, running) drops it
//   > >= < <= ==, is_nan, unordered (either NaN), differ (neither NaN, not equal), & | ~, select(m, a, b) = m ? a : b, first32(n), first64(n), bits(M32), count(M32), any(M32)
//   lower_f64(v), upper_f64(v), to_f32(lower, upper)
//   exp(F32) <= 1.2 ulp, denormals, 0 below -104, inf above 88.73, NaN kept;  log(F32) <= 2 ulp
//   sum(F32) -> float, sum(F64) -> double, sum_f64(F32) -> double, maximum, minimum: lanes folded in one fixed order
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 13
// GCC bug 105593: its own AVX-512 header passes undefined vectors around and then warns of them wherever it is inlined.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "cpu/common/dtypes.hpp"

#ifndef FASTREWARD_ISA
#error "FASTREWARD_ISA names the namespace of the instruction set: baseline, avx2 or avx512"
#endif

namespace fastreward::FASTREWARD_ISA::simd {

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define FASTREWARD_AVX512 1
#include "cpu/simd/simd_avx512.hpp"
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "cpu/simd/simd_avx2.hpp"
#else
#include "cpu/simd/simd_baseline.hpp"
#endif

inline int count(M32 m) { return __builtin_popcount(bits(m)); }
inline bool any(M32 m) { return bits(m) != 0; }

// ------------------------------------------------------------------------------------- folds of lanes, fixed order
inline double sum(F64 a) {
  double lanes[kF64];
  store(lanes, a);
  for (int half = kF64 / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}
inline double sum_f64(F32 a) { return sum(lower_f64(a) + upper_f64(a)); }
inline float sum(F32 a) {
  float lanes[kF32];
  store(lanes, a);
  for (int half = kF32 / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}
inline float maximum(F32 a) {
  float lanes[kF32];
  store(lanes, a);
  for (int half = kF32 / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
  return lanes[0];
}
inline float minimum(F32 a) { return -maximum(-a); }

// ------------------------------------------------------------------------------------------------------- exp, log
// x rounded to an integer, |x| < 2^22: the sum with 1.5 * 2^23 keeps no fraction bits.
inline F32 round_small(F32 x) {
  const F32 magic = f32(12582912.0f);
  return (x + magic) - magic;
}

#ifndef FASTREWARD_AVX512
// x * 2^n for an integral n in [-200, 200], in two steps so that denormals, 0 and infinity come out right.
inline F32 scale2(F32 x, F32 n) {
  const F32 half = round_small(n * f32(0.5f));
  return (x * power2(half)) * power2(n - half);
}
#endif

// e^r for |r| <= ln(2)/2, the polynomial of exp(): relative error below 2^-26 before rounding.
inline F32 exp_poly(F32 r) {
  F32 p = f32(1.9875691500e-4f);
  p = fma(p, r, f32(1.3981999507e-3f));
  p = fma(p, r, f32(8.3334519073e-3f));
  p = fma(p, r, f32(4.1665795894e-2f));
  p = fma(p, r, f32(1.6666665459e-1f));
  p = fma(p, r, f32(5.0000001201e-1f));
  return fma(p, r * r, r) + f32(1.0f);
}

inline F32 exp(F32 x) {
  x = max(f32(-110.0f), min(f32(90.0f), x));
  const F32 n = round_small(x * f32(1.44269504088896341f));
  F32 r = fnma(n, f32(0.693359375f), x);  // ln 2 in two parts, the first with few bits: n times it is exact
  r = fnma(n, f32(-2.12194440e-4f), r);
  return scale2(exp_poly(r), n);
}

inline F32 log(F32 x) {
  const F32 m = mantissa(x);
  const F32 e = exponent(x, m);
  // log m = 2 atanh(s), s = (m - 1) / (m + 1), |s| <= 0.2
  const F32 s = (m - f32(1.0f)) / (m + f32(1.0f));
  const F32 q = s * s;
  F32 p = f32(2.0f / 9.0f);
  p = fma(p, q, f32(2.0f / 7.0f));
  p = fma(p, q, f32(2.0f / 5.0f));
  p = fma(p, q, f32(2.0f / 3.0f));
  F32 y = fma(s * q, p, s + s);
  y = y + e * f32(-2.12194440e-4f);
  y = fma(e, f32(0.693359375f), y);
  const float inf = __builtin_inff();
  y = select(x == f32(inf), x, y);
  y = select(x == f32(0.0f), f32(-inf), y);
  return select((x < f32(0.0f)) | is_nan(x), f32(__builtin_nanf("")), y);
}

}  // namespace fastreward::FASTREWARD_ISA::simd
