// Elementary functions on F32 for the loss language, beyond exp and log of simd.hpp: at most about 2 ulp, infinities and
// NaN as in C (the sign of a zero is not kept).
#pragma once

#include "cpu/simd/simd.hpp"

namespace fastreward::FASTREWARD_ISA::simd {

// e^r - 1 for |r| <= ln(2)/2; relative error below 2^-26 before rounding.
inline F32 expm1_poly(F32 r) {
  F32 p = f32(1.9875691500e-4f);
  p = fma(p, r, f32(1.3981999507e-3f));
  p = fma(p, r, f32(8.3334519073e-3f));
  p = fma(p, r, f32(4.1665795894e-2f));
  p = fma(p, r, f32(1.6666665459e-1f));
  p = fma(p, r, f32(5.0000001201e-1f));
  return fma(p, r * r, r);
}

// exp(x) for |x| <= 87, and NaN: neither clamps nor steps in the scaling.
inline F32 exp_bounded(F32 x) {
#ifdef FASTREWARD_AVX512
  // 2^(i/16) from a register times a cubic, as in exp_scaled.hpp
  const F32 magic = f32(786432.0f);  // 1.5 * 2^19: four fraction bits remain in the sum
  const F32 high = f32(1.44269502162933349609f), low = f32(1.92596299112661746887e-8f);  // log2(e) in two parts
  const F32 shifted = fma(x, high, magic);
  const F32 f = fma(x, low, fms(x, high, shifted - magic));
  F32 p = fma(f32(5.5502135307e-02f), f, f32(2.4023428559e-01f));
  p = fma(p, f, f32(6.9314718246e-01f));
  p = fma(p, f, f32(1.0f));
  const __m512i powers = _mm512_setr_epi32(
      0x3f800000, 0x3f7daac3, 0x3f7b95c2, 0x3f79c3d3, 0x3f7837f0, 0x3f76f532, 0x3f75fed7, 0x3f75583f, 0x3f7504f3,
      0x3f7508a4, 0x3f75672a, 0x3f76248c, 0x3f7744fd, 0x3f78ccdf, 0x3f7ac0c7, 0x3f7d257d);
  const __m512i bits = _mm512_castps_si512(shifted.v);
  const __m512i power = _mm512_add_epi32(_mm512_permutexvar_epi32(bits, powers), _mm512_slli_epi32(bits, 19));
  return F32{_mm512_castsi512_ps(power)} * p;
#else
  const F32 n = round_small(x * f32(1.44269504088896341f));
  F32 r = fnma(n, f32(0.693359375f), x);
  r = fnma(n, f32(-2.12194440e-4f), r);
  return exp_poly(r) * power2(n);
#endif
}

inline F32 expm1(F32 x) {
  const F32 c = max(f32(-30.0f), min(f32(89.0f), x));
  const F32 n = round_small(c * f32(1.44269504088896341f));
  F32 r = fnma(n, f32(0.693359375f), c);
  r = fnma(n, f32(-2.12194440e-4f), r);
  const F32 half = power2(n - f32(1.0f));  // 2^n (1 + q) - 1 in halves, so that 2^128 does not appear
  return fma(half, expm1_poly(r), half - f32(0.5f)) * f32(2.0f);
}

// log(1 + x) for finite x > -1.
inline F32 log1p_finite(F32 x) {
  const F32 one = f32(1.0f);
  const F32 u = one + x;
  const F32 back = u - one;
  const F32 rest = (one - (u - back)) + (x - back);  // what u has been rounded by, exactly
  const F32 m = mantissa(u);
  const F32 e = exponent(u, m);
  const F32 f = fma(rest, power2(-min(f32(60.0f), e)), m - one);  // far out the rest does not show
  const F32 s = f / (f + f32(2.0f));
  const F32 q = s * s;
  F32 p = f32(2.0f / 9.0f);
  p = fma(p, q, f32(2.0f / 7.0f));
  p = fma(p, q, f32(2.0f / 5.0f));
  p = fma(p, q, f32(2.0f / 3.0f));
  F32 y = fma(s * q, p, s + s);
  y = y + e * f32(-2.12194440e-4f);
  return fma(e, f32(0.693359375f), y);
}

inline F32 log1p(F32 x) {
  const float inf = __builtin_inff();
  F32 y = log1p_finite(x);
  y = select(x == f32(inf), x, y);
  y = select(x == f32(-1.0f), f32(-inf), y);
  return select((x < f32(-1.0f)) | is_nan(x), f32(__builtin_nanf("")), y);
}

inline F32 tanh(F32 x) {
  const F32 t = expm1(abs(x) * f32(-2.0f));
  const F32 y = t / (t + f32(2.0f));
  return select(x < f32(0.0f), y, -y);
}

inline F32 sigmoid(F32 x) {
  const F32 e = exp(-abs(x));
  return select(x < f32(0.0f), e, f32(1.0f)) / (e + f32(1.0f));
}

inline F32 logsigmoid(F32 x) { return min(f32(0.0f), x) - log1p_finite(exp(-abs(x))); }

inline F32 sign(F32 x) {
  const F32 zero = f32(0.0f), one = f32(1.0f);
  return select(is_nan(x), x, select(x > zero, one, zero) - select(x < zero, one, zero));
}

// Lanes folded in the order of simd.hpp's sum, maximum and minimum (of numbers), fast where the instruction set has it.
inline double fold_sum(F64 a) {
#ifdef FASTREWARD_AVX512
  return _mm512_reduce_add_pd(a.v);
#else
  return sum(a);
#endif
}
inline float fold_maximum(F32 a) {
#ifdef FASTREWARD_AVX512
  return _mm512_reduce_max_ps(a.v);
#else
  return maximum(a);
#endif
}

// A NaN of either argument goes through; ties are equal anyway.
inline F32 maximum_of(F32 a, F32 b) {
#ifdef FASTREWARD_AVX512
  return {_mm512_mask_max_ps(a.v, _mm512_cmp_ps_mask(a.v, a.v, _CMP_ORD_Q), a.v, b.v)};
#else
  return select(is_nan(a), a, max(a, b));
#endif
}
inline F32 minimum_of(F32 a, F32 b) {
#ifdef FASTREWARD_AVX512
  return {_mm512_mask_min_ps(a.v, _mm512_cmp_ps_mask(a.v, a.v, _CMP_ORD_Q), a.v, b.v)};
#else
  return select(is_nan(a), a, min(a, b));
#endif
}

// ------------------------------------------------------------------------------------------------- masks in memory
// The lanes of one vector as bits.
#ifdef FASTREWARD_AVX512
using Word = std::uint16_t;
inline M32 lanes(Word w) { return {w}; }
inline M32 load_mask(const Word* p) {  // compilers go through a general register
  M32 m;
  asm("kmovw %1, %0" : "=k"(m.k) : "m"(*p));
  return m;
}
#elif defined(__AVX2__)
using Word = std::uint8_t;
inline M32 lanes(Word w) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(w), bit), bit))};
}
#else
using Word = std::uint8_t;
inline M32 lanes(Word w) {
  const V4i bit{1, 2, 4, 8};
  return {(V4i{w, w, w, w} & bit) == bit};
}
#endif
#ifndef FASTREWARD_AVX512
inline M32 load_mask(const Word* p) { return lanes(*p); }
#endif
constexpr Word kAllLanes = static_cast<Word>((1u << kF32) - 1u);

inline Word word(M32 m) { return static_cast<Word>(bits(m)); }

// How many lanes are on in both of n words (n a multiple of 8).
inline std::int64_t count_lanes(const Word* a, const Word* b, int n) {
  std::int64_t on = 0;
  int i = 0;
#ifdef FASTREWARD_AVX512
  const __m512i low = _mm512_set1_epi8(15);
  const __m512i bits_of = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
  __m512i total = _mm512_setzero_si512();
  for (; i + 32 <= n; i += 32) {
    const __m512i both = _mm512_and_si512(_mm512_loadu_si512(a + i), _mm512_loadu_si512(b + i));
    const __m512i first = _mm512_shuffle_epi8(bits_of, _mm512_and_si512(both, low));
    const __m512i second = _mm512_shuffle_epi8(bits_of, _mm512_and_si512(_mm512_srli_epi16(both, 4), low));
    total = _mm512_add_epi64(total, _mm512_sad_epu8(_mm512_add_epi8(first, second), _mm512_setzero_si512()));
  }
  on = _mm512_reduce_add_epi64(total);
#endif
  for (; i < n; i += static_cast<int>(8 / sizeof(Word))) {
    std::uint64_t x, y;
    __builtin_memcpy(&x, a + i, 8);
    __builtin_memcpy(&y, b + i, 8);
    on += __builtin_popcountll(x & y);
  }
  return on;
}

// The words of 8 vectors' worth of mask bytes (nonzero counts); returns how many lanes are on.
inline int to_words(const std::uint8_t* bytes, Word* words) {
#ifdef FASTREWARD_AVX512
  const __m512i low = _mm512_loadu_si512(bytes), high = _mm512_loadu_si512(bytes + 64);
  const std::uint64_t bits[2] = {_mm512_test_epi8_mask(low, low), _mm512_test_epi8_mask(high, high)};
  __builtin_memcpy(words, bits, sizeof bits);
  return __builtin_popcountll(bits[0]) + __builtin_popcountll(bits[1]);
#elif defined(__AVX2__)
  const __m256i zero = _mm256_setzero_si256();
  const auto bits_of = [&](const std::uint8_t* p) {
    const __m256i off = _mm256_cmpeq_epi8(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), zero);
    return ~static_cast<std::uint32_t>(_mm256_movemask_epi8(off));
  };
  const std::uint32_t bits[2] = {bits_of(bytes), bits_of(bytes + 32)};
  __builtin_memcpy(words, bits, sizeof bits);
  return __builtin_popcount(bits[0]) + __builtin_popcount(bits[1]);
#else
  int on = 0;
  for (int v = 0; v < 8; ++v) {
    unsigned w = 0;
    for (unsigned k = 0; k < kF32; ++k) w |= bytes[4 * v + static_cast<int>(k)] != 0 ? 1u << k : 0u;
    words[v] = static_cast<Word>(w);
    on += __builtin_popcount(w);
  }
  return on;
#endif
}

}  // namespace fastreward::FASTREWARD_ISA::simd
