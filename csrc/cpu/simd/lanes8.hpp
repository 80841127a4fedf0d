// Eight floats on every instruction set: for recurrences, whose order of operations must not depend on how wide the
// machine's vectors are. Include it after simd.hpp, from csrc/cpu/*.cpp only.
//
//   f8(x), load8(p), store8(p, v)      all lanes x; unaligned
//   add sub mul min max fma(a,b,c)=a*b+c   as in simd.hpp
//   moved<kUp, k>(v, fill)             lane i gets lane i - k (kUp) or lane i + k; lanes that get none get `fill`
//   equal(a, b)                        a bit for each lane
//   first(a), last(a)                  a lane
//   Turn8(k); turned(v, turn)          lane i gets lane (i + k) mod 8
//   joined(low, high, turn)            lane i of low where i < 8 - k, of high elsewhere: of what has been turned, the
//                                      eight that begin k lanes behind low's beginning
//   stream16(p, low, high)             past the caches, to a whole line
#pragma once

#include "cpu/simd/simd.hpp"

namespace fastreward::FASTREWARD_ISA::simd {

#if defined(__AVX2__)

struct F8 {
  __m256 v;
};

inline F8 f8(float x) { return {_mm256_set1_ps(x)}; }
inline F8 load8(const float* p) { return {_mm256_loadu_ps(p)}; }
inline void store8(float* p, F8 a) { _mm256_storeu_ps(p, a.v); }
inline F8 add(F8 a, F8 b) { return {_mm256_add_ps(a.v, b.v)}; }
inline F8 sub(F8 a, F8 b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline F8 mul(F8 a, F8 b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline F8 min(F8 a, F8 b) { return {_mm256_min_ps(a.v, b.v)}; }
inline F8 max(F8 a, F8 b) { return {_mm256_max_ps(a.v, b.v)}; }
inline F8 fma(F8 a, F8 b, F8 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline unsigned equal(F8 a, F8 b) {
  return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)));
}

inline float first(F8 a) { return _mm256_cvtss_f32(a.v); }
inline float last(F8 a) {
  const __m128 upper = _mm256_extractf128_ps(a.v, 1);
  return _mm_cvtss_f32(_mm_shuffle_ps(upper, upper, 3));
}

template <bool kUp, int k>
inline F8 moved(F8 a, F8 fill) {
  constexpr int s = kUp ? 8 - k : k;  // lane i gets lane (i + s) mod 8
  const __m256i from = _mm256_setr_epi32(s & 7, (s + 1) & 7, (s + 2) & 7, (s + 3) & 7, (s + 4) & 7, (s + 5) & 7,
                                         (s + 6) & 7, (s + 7) & 7);
  constexpr int kFilled = kUp ? (1 << k) - 1 : 0xff & ~((1 << (8 - k)) - 1);
  return {_mm256_blend_ps(_mm256_permutevar8x32_ps(a.v, from), fill.v, kFilled)};
}

struct Turn8 {
  __m256i from;
  __m256 high;
  explicit Turn8(int k) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    from = _mm256_and_si256(_mm256_add_epi32(lane, _mm256_set1_epi32(k)), _mm256_set1_epi32(7));
    high = _mm256_castsi256_ps(_mm256_cmpgt_epi32(lane, _mm256_set1_epi32(7 - k)));
  }
};
inline F8 turned(F8 a, const Turn8& turn) { return {_mm256_permutevar8x32_ps(a.v, turn.from)}; }
inline F8 joined(F8 low, F8 high, const Turn8& turn) { return {_mm256_blendv_ps(low.v, high.v, turn.high)}; }

#if defined(FASTREWARD_AVX512)
inline void stream16(float* p, F8 low, F8 high) {
  _mm512_stream_ps(p, _mm512_insertf32x8(_mm512_castps256_ps512(low.v), high.v, 1));
}
#else
inline void stream16(float* p, F8 low, F8 high) { _mm256_stream_ps(p + 8, high.v), _mm256_stream_ps(p, low.v); }
#endif

#else

struct F8 {
  float v[8];
};

template <class F>
inline F8 each(F&& f) {
  F8 r;
  for (int i = 0; i < 8; ++i) r.v[i] = f(i);
  return r;
}

inline F8 f8(float x) {
  return each([&](int) { return x; });
}
inline F8 load8(const float* p) {
  return each([&](int i) { return p[i]; });
}
inline void store8(float* p, F8 a) { __builtin_memcpy(p, a.v, sizeof a.v); }
inline F8 add(F8 a, F8 b) {
  return each([&](int i) { return a.v[i] + b.v[i]; });
}
inline F8 sub(F8 a, F8 b) {
  return each([&](int i) { return a.v[i] - b.v[i]; });
}
inline F8 mul(F8 a, F8 b) {
  return each([&](int i) { return a.v[i] * b.v[i]; });
}
inline F8 min(F8 a, F8 b) {
  return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline F8 max(F8 a, F8 b) {
  return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline F8 fma(F8 a, F8 b, F8 c) {
  return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
inline unsigned equal(F8 a, F8 b) {
  unsigned bits = 0;
  for (int i = 0; i < 8; ++i) bits |= static_cast<unsigned>(a.v[i] == b.v[i]) << i;
  return bits;
}

inline float first(F8 a) { return a.v[0]; }
inline float last(F8 a) { return a.v[7]; }

template <bool kUp, int k>
inline F8 moved(F8 a, F8 fill) {
  return each([&](int i) {
    const int from = kUp ? i - k : i + k;
    return from >= 0 && from < 8 ? a.v[from] : fill.v[i];
  });
}

struct Turn8 {
  int k;
  explicit Turn8(int lanes) : k(lanes) {}
};
inline F8 turned(F8 a, const Turn8& turn) {
  return each([&](int i) { return a.v[(i + turn.k) & 7]; });
}
inline F8 joined(F8 low, F8 high, const Turn8& turn) {
  return each([&](int i) { return i < 8 - turn.k ? low.v[i] : high.v[i]; });
}
inline void stream16(float* p, F8 low, F8 high) { store8(p + 8, high), store8(p, low); }

#endif

}  // namespace fastreward::FASTREWARD_ISA::simd
