// AVX2 + FMA + F16C primitives; included by simd.hpp inside namespace fastreward::<isa>, where they are explained.
#pragma once

constexpr int kF32 = 8;
constexpr int kF64 = 4;
constexpr bool kHasFma = true;

struct F32 {
  __m256 v;
};
struct F64 {
  __m256d v;
};
struct M32 {
  __m256 k;
};
struct M64 {
  __m256d k;
};

inline F32 f32(float x) { return {_mm256_set1_ps(x)}; }
inline F32 load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline void store(float* p, F32 a) { _mm256_storeu_ps(p, a.v); }
inline void stream(float* p, F32 a) { _mm256_stream_ps(p, a.v); }
inline __m256i first_lanes32(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline M32 first32(int n) { return {_mm256_castsi256_ps(first_lanes32(n))}; }
inline F32 select(M32 m, F32 a, F32 b) { return {_mm256_blendv_ps(b.v, a.v, m.k)}; }
inline F32 load_n(const float* p, int n, float fill) {
  return select(first32(n), F32{_mm256_maskload_ps(p, first_lanes32(n))}, f32(fill));
}
inline void store_n(float* p, F32 a, int n) { _mm256_maskstore_ps(p, first_lanes32(n), a.v); }

inline F32 operator+(F32 a, F32 b) { return {_mm256_add_ps(a.v, b.v)}; }
inline F32 operator-(F32 a, F32 b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline F32 operator*(F32 a, F32 b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline F32 operator/(F32 a, F32 b) { return {_mm256_div_ps(a.v, b.v)}; }
inline F32 operator-(F32 a) { return {_mm256_xor_ps(a.v, _mm256_set1_ps(-0.0f))}; }
inline F32 fma(F32 a, F32 b, F32 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline F32 fms(F32 a, F32 b, F32 c) { return {_mm256_fmsub_ps(a.v, b.v, c.v)}; }
inline F32 fnma(F32 a, F32 b, F32 c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }
inline F32 max(F32 a, F32 b) { return {_mm256_max_ps(a.v, b.v)}; }
inline F32 min(F32 a, F32 b) { return {_mm256_min_ps(a.v, b.v)}; }
inline F32 abs(F32 a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
inline F32 sqrt(F32 a) { return {_mm256_sqrt_ps(a.v)}; }

inline M32 operator>(F32 a, F32 b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)}; }
inline M32 operator>=(F32 a, F32 b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GE_OQ)}; }
inline M32 operator<(F32 a, F32 b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
inline M32 operator<=(F32 a, F32 b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LE_OQ)}; }
inline M32 operator==(F32 a, F32 b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)}; }
inline M32 is_nan(F32 a) { return {_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q)}; }
inline M32 unordered(F32 a, F32 b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_UNORD_Q)}; }
inline M32 differ(F32 a, F32 b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_NEQ_OQ)}; }
inline M32 operator&(M32 a, M32 b) { return {_mm256_and_ps(a.k, b.k)}; }
inline M32 operator|(M32 a, M32 b) { return {_mm256_or_ps(a.k, b.k)}; }
inline M32 operator~(M32 a) { return {_mm256_xor_ps(a.k, _mm256_castsi256_ps(_mm256_set1_epi32(-1)))}; }
inline unsigned bits(M32 m) { return static_cast<unsigned>(_mm256_movemask_ps(m.k)); }

inline F64 f64(double x) { return {_mm256_set1_pd(x)}; }
inline F64 load(const double* p) { return {_mm256_loadu_pd(p)}; }
inline void store(double* p, F64 a) { _mm256_storeu_pd(p, a.v); }
inline __m256i first_lanes64(int n) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
}
inline M64 first64(int n) { return {_mm256_castsi256_pd(first_lanes64(n))}; }
inline F64 select(M64 m, F64 a, F64 b) { return {_mm256_blendv_pd(b.v, a.v, m.k)}; }
inline F64 load_n(const double* p, int n, double fill) {
  return select(first64(n), F64{_mm256_maskload_pd(p, first_lanes64(n))}, f64(fill));
}
inline void store_n(double* p, F64 a, int n) { _mm256_maskstore_pd(p, first_lanes64(n), a.v); }
inline F64 operator+(F64 a, F64 b) { return {_mm256_add_pd(a.v, b.v)}; }
inline F64 operator-(F64 a, F64 b) { return {_mm256_sub_pd(a.v, b.v)}; }
inline F64 operator*(F64 a, F64 b) { return {_mm256_mul_pd(a.v, b.v)}; }
inline F64 operator/(F64 a, F64 b) { return {_mm256_div_pd(a.v, b.v)}; }
inline F64 fma(F64 a, F64 b, F64 c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
inline F64 max(F64 a, F64 b) { return {_mm256_max_pd(a.v, b.v)}; }
inline F64 min(F64 a, F64 b) { return {_mm256_min_pd(a.v, b.v)}; }
inline F64 sqrt(F64 a) { return {_mm256_sqrt_pd(a.v)}; }
inline M64 operator>(F64 a, F64 b) { return {_mm256_cmp_pd(a.v, b.v, _CMP_GT_OQ)}; }
inline M64 operator==(F64 a, F64 b) { return {_mm256_cmp_pd(a.v, b.v, _CMP_EQ_OQ)}; }
inline M64 is_nan(F64 a) { return {_mm256_cmp_pd(a.v, a.v, _CMP_UNORD_Q)}; }
inline F64 lower_f64(F32 a) { return {_mm256_cvtps_pd(_mm256_castps256_ps128(a.v))}; }
inline F64 upper_f64(F32 a) { return {_mm256_cvtps_pd(_mm256_extractf128_ps(a.v, 1))}; }
inline F32 to_f32(F64 lower, F64 upper) {
  return {_mm256_set_m128(_mm256_cvtpd_ps(upper.v), _mm256_cvtpd_ps(lower.v))};
}

// 2^n for an integral n in [-126, 127].
inline F32 power2(F32 n) {
  const __m256i i = _mm256_cvtps_epi32(n.v);
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(i, _mm256_set1_epi32(127)), 23))};
}
// x * 2^n for the integer n in the low bits of `shifted`, the sum with 1.5 * 2^23; x and the result are normal.
inline F32 times_power2(F32 x, F32 shifted) {
  const __m256i n = _mm256_slli_epi32(_mm256_castps_si256(shifted.v), 23);
  return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x.v), n))};
}
inline F32 mantissa(F32 x) {
  const M32 tiny = x < f32(1.17549435e-38f);
  const __m256i u = _mm256_castps_si256(select(tiny, x * f32(16777216.0f), x).v);
  const __m256i m = _mm256_or_si256(_mm256_and_si256(u, _mm256_set1_epi32(0x7fffff)), _mm256_set1_epi32(0x3f800000));
  const F32 one_two{_mm256_castsi256_ps(m)};
  return select(one_two >= f32(1.5f), one_two * f32(0.5f), one_two);
}
inline F32 exponent(F32 x, F32 m) {
  const M32 tiny = x < f32(1.17549435e-38f);
  const __m256i u = _mm256_castps_si256(select(tiny, x * f32(16777216.0f), x).v);
  const F32 e{_mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_srli_epi32(u, 23), _mm256_set1_epi32(127)))};
  return select(tiny, e - f32(24.0f), e) + select(m < f32(1.0f), f32(1.0f), f32(0.0f));
}

inline __m128i load_16bits(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline __m128i load_16bits_n(const void* p, int n) {
  alignas(16) unsigned short buffer[8] = {};
  __builtin_memcpy(buffer, p, static_cast<unsigned>(n) * 2u);
  return load_16bits(buffer);
}
inline void store_16bits_n(void* p, __m128i h, int n) {
  alignas(16) unsigned short buffer[8];
  _mm_store_si128(reinterpret_cast<__m128i*>(buffer), h);
  __builtin_memcpy(p, buffer, static_cast<unsigned>(n) * 2u);
}
inline F32 widen_bf16(__m128i h) { return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))}; }
inline F32 load(const Bf16* p) { return widen_bf16(load_16bits(p)); }
inline F32 load(const F16* p) { return {_mm256_cvtph_ps(load_16bits(p))}; }
inline F32 load_n(const Bf16* p, int n, float fill) {
  return select(first32(n), widen_bf16(load_16bits_n(p, n)), f32(fill));
}
inline F32 load_n(const F16* p, int n, float fill) {
  return select(first32(n), F32{_mm256_cvtph_ps(load_16bits_n(p, n))}, f32(fill));
}
// Upper 16 bits hold the bf16, rounded to nearest even; NaN becomes the quiet NaN.
inline __m256i round_bf16(F32 a) {
  const __m256i u = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i r = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
  return _mm256_castps_si256(
      select(is_nan(a), F32{_mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000))}, F32{_mm256_castsi256_ps(r)}).v);
}
inline __m128i narrow_bf16(F32 a) {
  const __m256i r = _mm256_srli_epi32(round_bf16(a), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
}
inline __m128i narrow_f16(F32 a) { return _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline void store(Bf16* p, F32 a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_bf16(a)); }
inline void store(F16* p, F32 a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_f16(a)); }
inline void store_n(Bf16* p, F32 a, int n) { store_16bits_n(p, narrow_bf16(a), n); }
inline void store_n(F16* p, F32 a, int n) { store_16bits_n(p, narrow_f16(a), n); }

// Two vectors at once, in an order of their own (the same in load2, store2 and stream2): bf16 as even and odd columns.
inline void load2(const float* p, F32& a, F32& b) { a = load(p), b = load(p + kF32); }
inline void load2(const Bf16* p, F32& a, F32& b) {
  const __m256i u = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  a.v = _mm256_castsi256_ps(_mm256_slli_epi32(u, 16));
  b.v = _mm256_castsi256_ps(_mm256_and_si256(u, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}
inline void load2(const F16* p, F32& a, F32& b) { a = load(p), b = load(p + kF32); }
inline __m256i join_bf16(F32 a, F32 b) {
  return _mm256_blend_epi16(_mm256_srli_epi32(round_bf16(a), 16), round_bf16(b), 0xaa);
}
inline __m256i join_f16(F32 a, F32 b) { return _mm256_set_m128i(narrow_f16(b), narrow_f16(a)); }
inline void store2(float* p, F32 a, F32 b) { store(p, a), store(p + kF32, b); }
inline void store2(Bf16* p, F32 a, F32 b) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), join_bf16(a, b)); }
inline void store2(F16* p, F32 a, F32 b) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), join_f16(a, b)); }
inline void stream2(float* p, F32 a, F32 b) { stream(p, a), stream(p + kF32, b); }
inline void stream2(Bf16* p, F32 a, F32 b) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), join_bf16(a, b)); }
inline void stream2(F16* p, F32 a, F32 b) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), join_f16(a, b)); }
inline void fence() { _mm_sfence(); }
