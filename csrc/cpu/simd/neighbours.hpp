// Lanes from beside: for recurrences along a vector. Include it after simd.hpp, from csrc/cpu/*.cpp only.
//
//   moved<kUp, k>(v, fill)   lane i gets lane i - k (kUp) or lane i + k; lanes that get none get `fill`; k = 1, 2, 4, 8,
//                            less than the lanes
//   last<kUp>(F64)           all lanes the last one (kUp), or the first
//   last<kUp>(F32)           that lane
#pragma once

#include "cpu/simd/simd.hpp"

namespace fastreward::FASTREWARD_ISA::simd {

#if defined(FASTREWARD_AVX512)

template <bool kUp, int k>
inline F64 moved(F64 a, F64 fill) {
  const __m512i x = _mm512_castpd_si512(a.v), y = _mm512_castpd_si512(fill.v);
  return {_mm512_castsi512_pd(kUp ? _mm512_alignr_epi64(x, y, 8 - k) : _mm512_alignr_epi64(y, x, k))};
}
template <bool kUp>
inline F64 last(F64 a) {
  return {kUp ? _mm512_permutexvar_pd(_mm512_set1_epi64(7), a.v) : _mm512_broadcastsd_pd(_mm512_castpd512_pd128(a.v))};
}

template <bool kUp, int k>
inline F32 moved(F32 a, F32 fill) {
  const __m512i x = _mm512_castps_si512(a.v), y = _mm512_castps_si512(fill.v);
  return {_mm512_castsi512_ps(kUp ? _mm512_alignr_epi32(x, y, 16 - k) : _mm512_alignr_epi32(y, x, k))};
}
template <bool kUp>
inline float last(F32 a) {
  return _mm512_cvtss_f32(kUp ? _mm512_permutexvar_ps(_mm512_set1_epi32(15), a.v) : a.v);
}

#elif defined(__AVX2__)

template <bool kUp, int k>
inline F64 moved(F64 a, F64 fill) {
  if (k == 1) {
    return {kUp ? _mm256_blend_pd(_mm256_permute4x64_pd(a.v, _MM_SHUFFLE(2, 1, 0, 0)), fill.v, 1)
                : _mm256_blend_pd(_mm256_permute4x64_pd(a.v, _MM_SHUFFLE(3, 3, 2, 1)), fill.v, 8)};
  }
  return {kUp ? _mm256_permute2f128_pd(a.v, fill.v, 0x02) : _mm256_permute2f128_pd(a.v, fill.v, 0x21)};
}
template <bool kUp>
inline F64 last(F64 a) {
  return {kUp ? _mm256_permute4x64_pd(a.v, 0xff) : _mm256_permute4x64_pd(a.v, 0)};
}

template <bool kUp, int k>
inline F32 moved(F32 a, F32 fill) {
  constexpr int s = kUp ? 8 - k : k;  // lane i gets lane (i + s) mod 8
  const __m256i from = _mm256_setr_epi32(s & 7, (s + 1) & 7, (s + 2) & 7, (s + 3) & 7, (s + 4) & 7, (s + 5) & 7,
                                         (s + 6) & 7, (s + 7) & 7);
  constexpr int kFilled = kUp ? (1 << k) - 1 : 0xff & ~((1 << (8 - k)) - 1);
  return {_mm256_blend_ps(_mm256_permutevar8x32_ps(a.v, from), fill.v, kFilled)};
}
template <bool kUp>
inline float last(F32 a) {
  const __m128 half = kUp ? _mm256_extractf128_ps(a.v, 1) : _mm256_castps256_ps128(a.v);
  return _mm_cvtss_f32(kUp ? _mm_shuffle_ps(half, half, 3) : half);
}

#else

template <bool kUp, int k>
inline F32 moved(F32 a, F32 fill) {
  float x[3 * kF32];
  store(x, fill), store(x + kF32, a), store(x + 2 * kF32, fill);
  return load(x + kF32 + (kUp ? -k : k));
}
template <bool kUp>
inline float last(F32 a) {
  return a.v[kUp ? kF32 - 1 : 0];
}

template <bool kUp, int k>
inline F64 moved(F64 a, F64 fill) {
  return {kUp ? V2d{fill.v[0], a.v[0]} : V2d{a.v[1], fill.v[1]}};
}
template <bool kUp>
inline F64 last(F64 a) {
  return f64(a.v[kUp ? 1 : 0]);
}

#endif

}  // namespace fastreward::FASTREWARD_ISA::simd
