// Doubles from lanes beside: for recurrences along a vector. Include it after simd.hpp, from csrc/cpu/*.cpp only.
//
//   moved<kUp, k>(v, fill)   lane i gets lane i - k (kUp) or lane i + k; lanes that get none get `fill`; k = 1, 2, 4
//   last<kUp>(v)             all lanes the last one (kUp), or the first
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

#else

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
