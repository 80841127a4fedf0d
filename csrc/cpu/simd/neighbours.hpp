// Lanes from beside: for recurrences along a vector. Include it after simd.hpp, from csrc/cpu/*.cpp only.
//
//   taken<kUp, s>(v), taken<kUp, s>(v, fill)
//                            what a lane takes up in step s = 0, 1, ... of a scan of log2(lanes) steps; lanes that take
//                            nothing get 0, or `fill`. Lane i takes lane i - 2^s (kUp) or i + 2^s. With AVX2 the last
//                            step takes the end of the other half instead, and the ones before stay within halves: a
//                            shift there takes one cycle, across halves six.
//   last<kUp>(F64)           all lanes the last one (kUp), or the first
//   last<kUp>(F32)           that lane
#pragma once

#include "cpu/simd/simd.hpp"

namespace fastreward::FASTREWARD_ISA::simd {

#if defined(FASTREWARD_AVX512)

// lane i gets lane i - k (kUp) or lane i + k
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

// The end of the other half, in the half that is met later; 0 in the one that is met first.
template <bool kUp>
inline __m256i end_of_half(__m256i a) {
  return kUp ? _mm256_permute2x128_si256(a, a, 0x08) : _mm256_permute2x128_si256(a, a, 0x81);
}

template <bool kUp, int s>
inline F64 taken(F64 a) {
  const __m256i x = _mm256_castpd_si256(a.v);
  if (s == 0) return {_mm256_castsi256_pd(kUp ? _mm256_slli_si256(x, 8) : _mm256_srli_si256(x, 8))};
  return {_mm256_permute_pd(_mm256_castsi256_pd(end_of_half<kUp>(x)), kUp ? 0xf : 0)};
}
template <bool kUp, int s>
inline F64 taken(F64 a, F64 fill) {
  constexpr int kFirst[] = {0x5, 0x3}, kLast[] = {0xa, 0xc};
  constexpr int kFilled = kUp ? kFirst[s] : kLast[s];
  const F64 rest = taken<kUp, s>(a);  // outside: without optimisation the intrinsic is a macro, which splits at commas
  return {_mm256_blend_pd(rest.v, fill.v, kFilled)};
}
template <bool kUp>
inline F64 last(F64 a) {
  return {kUp ? _mm256_permute4x64_pd(a.v, 0xff) : _mm256_permute4x64_pd(a.v, 0)};
}

template <bool kUp, int s>
inline F32 taken(F32 a) {
  const __m256i x = _mm256_castps_si256(a.v);
  if (s == 0) return {_mm256_castsi256_ps(kUp ? _mm256_slli_si256(x, 4) : _mm256_srli_si256(x, 4))};
  if (s == 1) return {_mm256_castsi256_ps(kUp ? _mm256_slli_si256(x, 8) : _mm256_srli_si256(x, 8))};
  return {_mm256_permute_ps(_mm256_castsi256_ps(end_of_half<kUp>(x)), kUp ? 0xff : 0)};
}
template <bool kUp, int s>
inline F32 taken(F32 a, F32 fill) {
  constexpr int kFirst[] = {0x11, 0x33, 0x0f}, kLast[] = {0x88, 0xcc, 0xf0};
  constexpr int kFilled = kUp ? kFirst[s] : kLast[s];
  const F32 rest = taken<kUp, s>(a);
  return {_mm256_blend_ps(rest.v, fill.v, kFilled)};
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

#if defined(FASTREWARD_AVX512) || !defined(__AVX2__)
template <bool kUp, int s>
inline F64 taken(F64 a, F64 fill) { return moved<kUp, 1 << s>(a, fill); }
template <bool kUp, int s>
inline F64 taken(F64 a) { return taken<kUp, s>(a, f64(0.0)); }
template <bool kUp, int s>
inline F32 taken(F32 a, F32 fill) { return moved<kUp, 1 << s>(a, fill); }
template <bool kUp, int s>
inline F32 taken(F32 a) { return taken<kUp, s>(a, f32(0.0f)); }
#endif

}  // namespace fastreward::FASTREWARD_ISA::simd
