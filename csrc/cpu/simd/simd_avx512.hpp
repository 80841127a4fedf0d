// AVX-512 primitives; included by simd.hpp inside namespace fastreward::<isa>. Semantics are documented there.
#pragma once

constexpr int kF32 = 16;
constexpr int kF64 = 8;
constexpr bool kHasFma = true;

struct F32 {
  __m512 v;
};
struct F64 {
  __m512d v;
};
struct M32 {
  __mmask16 k;
};
struct M64 {
  __mmask8 k;
};

inline F32 f32(float x) { return {_mm512_set1_ps(x)}; }
inline F32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, F32 a) { _mm512_storeu_ps(p, a.v); }
inline void stream(float* p, F32 a) { _mm512_stream_ps(p, a.v); }
inline M32 first32(int n) { return {static_cast<__mmask16>((1u << n) - 1u)}; }
inline F32 load_n(const float* p, int n, float fill) {
  return {_mm512_mask_loadu_ps(_mm512_set1_ps(fill), first32(n).k, p)};
}
inline void store_n(float* p, F32 a, int n) { _mm512_mask_storeu_ps(p, first32(n).k, a.v); }

inline F32 operator+(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F32 operator-(F32 a, F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F32 operator*(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F32 operator/(F32 a, F32 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F32 operator-(F32 a) { return {_mm512_xor_ps(a.v, _mm512_set1_ps(-0.0f))}; }
inline F32 fma(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F32 fms(F32 a, F32 b, F32 c) { return {_mm512_fmsub_ps(a.v, b.v, c.v)}; }
inline F32 fnma(F32 a, F32 b, F32 c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
inline F32 max(F32 a, F32 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F32 min(F32 a, F32 b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F32 abs(F32 a) { return {_mm512_abs_ps(a.v)}; }
inline F32 sqrt(F32 a) { return {_mm512_sqrt_ps(a.v)}; }

inline M32 operator>(F32 a, F32 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)}; }
inline M32 operator>=(F32 a, F32 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ)}; }
inline M32 operator<(F32 a, F32 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
inline M32 operator<=(F32 a, F32 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ)}; }
inline M32 operator==(F32 a, F32 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
inline M32 is_nan(F32 a) { return {_mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q)}; }
inline M32 unordered(F32 a, F32 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_UNORD_Q)}; }
inline M32 differ(F32 a, F32 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_NEQ_OQ)}; }
inline M32 operator&(M32 a, M32 b) { return {static_cast<__mmask16>(a.k & b.k)}; }
inline M32 operator|(M32 a, M32 b) { return {static_cast<__mmask16>(a.k | b.k)}; }
inline M32 operator~(M32 a) { return {static_cast<__mmask16>(~a.k)}; }
inline F32 select(M32 m, F32 a, F32 b) { return {_mm512_mask_blend_ps(m.k, b.v, a.v)}; }
inline unsigned bits(M32 m) { return m.k; }

inline F64 f64(double x) { return {_mm512_set1_pd(x)}; }
inline F64 load(const double* p) { return {_mm512_loadu_pd(p)}; }
inline void store(double* p, F64 a) { _mm512_storeu_pd(p, a.v); }
inline M64 first64(int n) { return {static_cast<__mmask8>((1u << n) - 1u)}; }
inline F64 load_n(const double* p, int n, double fill) {
  return {_mm512_mask_loadu_pd(_mm512_set1_pd(fill), first64(n).k, p)};
}
inline void store_n(double* p, F64 a, int n) { _mm512_mask_storeu_pd(p, first64(n).k, a.v); }
inline F64 operator+(F64 a, F64 b) { return {_mm512_add_pd(a.v, b.v)}; }
inline F64 operator-(F64 a, F64 b) { return {_mm512_sub_pd(a.v, b.v)}; }
inline F64 operator*(F64 a, F64 b) { return {_mm512_mul_pd(a.v, b.v)}; }
inline F64 operator/(F64 a, F64 b) { return {_mm512_div_pd(a.v, b.v)}; }
inline F64 fma(F64 a, F64 b, F64 c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
inline F64 max(F64 a, F64 b) { return {_mm512_max_pd(a.v, b.v)}; }
inline F64 min(F64 a, F64 b) { return {_mm512_min_pd(a.v, b.v)}; }
inline F64 sqrt(F64 a) { return {_mm512_sqrt_pd(a.v)}; }
inline M64 operator>(F64 a, F64 b) { return {_mm512_cmp_pd_mask(a.v, b.v, _CMP_GT_OQ)}; }
inline M64 operator==(F64 a, F64 b) { return {_mm512_cmp_pd_mask(a.v, b.v, _CMP_EQ_OQ)}; }
inline M64 is_nan(F64 a) { return {_mm512_cmp_pd_mask(a.v, a.v, _CMP_UNORD_Q)}; }
inline F64 select(M64 m, F64 a, F64 b) { return {_mm512_mask_blend_pd(m.k, b.v, a.v)}; }
inline F64 lower_f64(F32 a) { return {_mm512_cvtps_pd(_mm512_castps512_ps256(a.v))}; }
inline F64 upper_f64(F32 a) { return {_mm512_cvtps_pd(_mm512_extractf32x8_ps(a.v, 1))}; }
inline F32 to_f32(F64 lower, F64 upper) {
  return {_mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(lower.v)), _mm512_cvtpd_ps(upper.v), 1)};
}

// x * 2^n for an integral n; denormals, zero and infinity come out right.
inline F32 scale2(F32 x, F32 n) { return {_mm512_scalef_ps(x.v, n.v)}; }
// 2^n for an integral n in [-126, 127].
inline F32 power2(F32 n) {
  const __m512i i = _mm512_cvtps_epi32(n.v);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(i, _mm512_set1_epi32(127)), 23))};
}
// mantissa in [0.75, 1.5) and its exponent, for log; x positive and finite (denormals too).
inline F32 mantissa(F32 x) { return {_mm512_getmant_ps(x.v, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_src)}; }
inline F32 exponent(F32 x, F32 m) {
  const __m512 e = _mm512_getexp_ps(x.v);
  return {_mm512_mask_add_ps(e, _mm512_cmp_ps_mask(m.v, _mm512_set1_ps(1.0f), _CMP_LT_OQ), e, _mm512_set1_ps(1.0f))};
}

inline __m256i load_16bits(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline __m256i load_16bits_n(const void* p, int n) { return _mm256_maskz_loadu_epi16(first32(n).k, p); }
inline F32 widen_bf16(__m256i h) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))}; }
inline F32 load(const Bf16* p) { return widen_bf16(load_16bits(p)); }
inline F32 load(const F16* p) { return {_mm512_cvtph_ps(load_16bits(p))}; }
inline F32 load_n(const Bf16* p, int n, float fill) {
  return {_mm512_mask_mov_ps(_mm512_set1_ps(fill), first32(n).k, widen_bf16(load_16bits_n(p, n)).v)};
}
inline F32 load_n(const F16* p, int n, float fill) {
  return {_mm512_mask_cvtph_ps(_mm512_set1_ps(fill), first32(n).k, load_16bits_n(p, n))};
}
// Upper 16 bits hold the bf16, rounded to nearest even; NaN becomes the quiet NaN.
inline __m512i round_bf16(F32 a) {
  const __m512i u = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i r = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
  return _mm512_mask_mov_epi32(r, is_nan(a).k, _mm512_set1_epi32(0x7fc00000));
}
inline __m256i narrow_bf16(F32 a) { return _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_bf16(a), 16)); }
inline __m256i narrow_f16(F32 a) { return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline void store(Bf16* p, F32 a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(a)); }
inline void store(F16* p, F32 a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_f16(a)); }
inline void store_n(Bf16* p, F32 a, int n) { _mm256_mask_storeu_epi16(p, first32(n).k, narrow_bf16(a)); }
inline void store_n(F16* p, F32 a, int n) { _mm256_mask_storeu_epi16(p, first32(n).k, narrow_f16(a)); }

// Two vectors at once, in an order of their own (the same in load2, store2 and stream2): bf16 as even and odd columns.
inline void load2(const float* p, F32& a, F32& b) { a = load(p), b = load(p + kF32); }
inline void load2(const Bf16* p, F32& a, F32& b) {
  const __m512i u = _mm512_loadu_si512(p);
  a.v = _mm512_castsi512_ps(_mm512_slli_epi32(u, 16));
  b.v = _mm512_castsi512_ps(_mm512_and_si512(u, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}
inline void load2(const F16* p, F32& a, F32& b) { a = load(p), b = load(p + kF32); }
inline __m512i join_bf16(F32 a, F32 b) {
  return _mm512_mask_mov_epi16(_mm512_srli_epi32(round_bf16(a), 16), 0xaaaaaaaau, round_bf16(b));
}
inline __m512i join_f16(F32 a, F32 b) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(narrow_f16(a)), narrow_f16(b), 1);
}
inline void store2(float* p, F32 a, F32 b) { store(p, a), store(p + kF32, b); }
inline void store2(Bf16* p, F32 a, F32 b) { _mm512_storeu_si512(p, join_bf16(a, b)); }
inline void store2(F16* p, F32 a, F32 b) { _mm512_storeu_si512(p, join_f16(a, b)); }
inline void stream2(float* p, F32 a, F32 b) { stream(p, a), stream(p + kF32, b); }
inline void stream2(Bf16* p, F32 a, F32 b) { _mm512_stream_si512(reinterpret_cast<__m512i*>(p), join_bf16(a, b)); }
inline void stream2(F16* p, F32 a, F32 b) { _mm512_stream_si512(reinterpret_cast<__m512i*>(p), join_f16(a, b)); }
inline void fence() { _mm_sfence(); }
