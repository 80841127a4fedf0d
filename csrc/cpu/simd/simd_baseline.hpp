// Portable primitives (GCC/Clang vector extensions, 128 bits); included by simd.hpp inside namespace fastreward::<isa>.
#pragma once

constexpr int kF32 = 4;
constexpr int kF64 = 2;
#ifdef __ARM_FEATURE_FMA
constexpr bool kHasFma = true;
#else
constexpr bool kHasFma = false;  // fma() below rounds twice
#endif

typedef float V4f __attribute__((vector_size(16)));
typedef std::int32_t V4i __attribute__((vector_size(16)));
typedef std::uint32_t V4u __attribute__((vector_size(16)));
typedef double V2d __attribute__((vector_size(16)));
typedef std::int64_t V2l __attribute__((vector_size(16)));

struct F32 {
  V4f v;
};
struct F64 {
  V2d v;
};
struct M32 {
  V4i k;
};
struct M64 {
  V2l k;
};

inline F32 f32(float x) { return {V4f{x, x, x, x}}; }
inline F32 load(const float* p) {
  F32 r;
  __builtin_memcpy(&r.v, p, sizeof r.v);
  return r;
}
inline void store(float* p, F32 a) { __builtin_memcpy(p, &a.v, sizeof a.v); }
inline void stream(float* p, F32 a) { store(p, a); }
inline M32 first32(int n) { return {V4i{n, n, n, n} > V4i{0, 1, 2, 3}}; }
inline F32 select(M32 m, F32 a, F32 b) { return {m.k ? a.v : b.v}; }
inline F32 load_n(const float* p, int n, float fill) {
  float buffer[4] = {fill, fill, fill, fill};
  for (int i = 0; i < n; ++i) buffer[i] = p[i];
  return load(buffer);
}
inline void store_n(float* p, F32 a, int n) {
  for (int i = 0; i < n; ++i) p[i] = a.v[i];
}

inline F32 operator+(F32 a, F32 b) { return {a.v + b.v}; }
inline F32 operator-(F32 a, F32 b) { return {a.v - b.v}; }
inline F32 operator*(F32 a, F32 b) { return {a.v * b.v}; }
inline F32 operator/(F32 a, F32 b) { return {a.v / b.v}; }
inline F32 operator-(F32 a) { return {-a.v}; }
inline F32 fma(F32 a, F32 b, F32 c) {
  if (!kHasFma) return {a.v * b.v + c.v};
  for (int i = 0; i < kF32; ++i) c.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]);  // one instruction
  return c;
}
inline F32 fms(F32 a, F32 b, F32 c) { return fma(a, b, {-c.v}); }
inline F32 fnma(F32 a, F32 b, F32 c) { return fma({-a.v}, b, c); }
inline F32 max(F32 a, F32 b) { return {a.v > b.v ? a.v : b.v}; }
inline F32 min(F32 a, F32 b) { return {a.v < b.v ? a.v : b.v}; }
inline F32 abs(F32 a) { return {reinterpret_cast<V4f>(reinterpret_cast<V4i>(a.v) & 0x7fffffff)}; }
inline F32 sqrt(F32 a) {
  for (int i = 0; i < 4; ++i) a.v[i] = __builtin_sqrtf(a.v[i]);
  return a;
}

inline M32 operator>(F32 a, F32 b) { return {a.v > b.v}; }
inline M32 operator>=(F32 a, F32 b) { return {a.v >= b.v}; }
inline M32 operator<(F32 a, F32 b) { return {a.v < b.v}; }
inline M32 operator<=(F32 a, F32 b) { return {a.v <= b.v}; }
inline M32 operator==(F32 a, F32 b) { return {a.v == b.v}; }
inline M32 is_nan(F32 a) { return {a.v != a.v}; }
inline M32 unordered(F32 a, F32 b) { return {(a.v != a.v) | (b.v != b.v)}; }
inline M32 differ(F32 a, F32 b) { return {(a.v < b.v) | (a.v > b.v)}; }
inline M32 operator&(M32 a, M32 b) { return {a.k & b.k}; }
inline M32 operator|(M32 a, M32 b) { return {a.k | b.k}; }
inline M32 operator~(M32 a) { return {~a.k}; }
inline unsigned bits(M32 m) {
  return (m.k[0] & 1u) | (m.k[1] & 2u) | (m.k[2] & 4u) | (m.k[3] & 8u);
}

inline F64 f64(double x) { return {V2d{x, x}}; }
inline F64 load(const double* p) {
  F64 r;
  __builtin_memcpy(&r.v, p, sizeof r.v);
  return r;
}
inline void store(double* p, F64 a) { __builtin_memcpy(p, &a.v, sizeof a.v); }
inline M64 first64(int n) { return {V2l{n, n} > V2l{0, 1}}; }
inline F64 select(M64 m, F64 a, F64 b) { return {m.k ? a.v : b.v}; }
inline F64 load_n(const double* p, int n, double fill) {
  double buffer[2] = {fill, fill};
  for (int i = 0; i < n; ++i) buffer[i] = p[i];
  return load(buffer);
}
inline void store_n(double* p, F64 a, int n) {
  for (int i = 0; i < n; ++i) p[i] = a.v[i];
}
inline F64 operator+(F64 a, F64 b) { return {a.v + b.v}; }
inline F64 operator-(F64 a, F64 b) { return {a.v - b.v}; }
inline F64 operator*(F64 a, F64 b) { return {a.v * b.v}; }
inline F64 operator/(F64 a, F64 b) { return {a.v / b.v}; }
inline F64 fma(F64 a, F64 b, F64 c) {
  if (!kHasFma) return {a.v * b.v + c.v};
  for (int i = 0; i < kF64; ++i) c.v[i] = __builtin_fma(a.v[i], b.v[i], c.v[i]);
  return c;
}
inline F64 max(F64 a, F64 b) { return {a.v > b.v ? a.v : b.v}; }
inline F64 min(F64 a, F64 b) { return {a.v < b.v ? a.v : b.v}; }
inline F64 sqrt(F64 a) { return {V2d{__builtin_sqrt(a.v[0]), __builtin_sqrt(a.v[1])}}; }
inline M64 operator>(F64 a, F64 b) { return {a.v > b.v}; }
inline M64 operator==(F64 a, F64 b) { return {a.v == b.v}; }
inline M64 is_nan(F64 a) { return {a.v != a.v}; }
inline F64 lower_f64(F32 a) { return {V2d{a.v[0], a.v[1]}}; }
inline F64 upper_f64(F32 a) { return {V2d{a.v[2], a.v[3]}}; }
inline F32 to_f32(F64 lower, F64 upper) {
  return {V4f{static_cast<float>(lower.v[0]), static_cast<float>(lower.v[1]), static_cast<float>(upper.v[0]),
              static_cast<float>(upper.v[1])}};
}

// 2^n for an integral n in [-126, 127].
inline F32 power2(F32 n) { return {reinterpret_cast<V4f>((__builtin_convertvector(n.v, V4i) + 127) << 23)}; }
// x * 2^n for the integer n in the low bits of `shifted`, the sum with 1.5 * 2^23; x and the result are normal.
inline F32 times_power2(F32 x, F32 shifted) {
  return {reinterpret_cast<V4f>(reinterpret_cast<V4u>(x.v) + (reinterpret_cast<V4u>(shifted.v) << 23))};
}
inline F32 mantissa(F32 x) {
  const M32 tiny = x < f32(1.17549435e-38f);
  const V4i u = reinterpret_cast<V4i>(select(tiny, x * f32(16777216.0f), x).v);
  const F32 one_two{reinterpret_cast<V4f>((u & 0x7fffff) | 0x3f800000)};
  return select(one_two >= f32(1.5f), one_two * f32(0.5f), one_two);
}
inline F32 exponent(F32 x, F32 m) {
  const M32 tiny = x < f32(1.17549435e-38f);
  const V4i u = reinterpret_cast<V4i>(select(tiny, x * f32(16777216.0f), x).v);
  const F32 e{__builtin_convertvector((u >> 23) - 127, V4f)};
  return select(tiny, e - f32(24.0f), e) + select(m < f32(1.0f), f32(1.0f), f32(0.0f));
}

inline F32 load(const Bf16* p) {
  return {reinterpret_cast<V4f>(V4u{p[0].bits, p[1].bits, p[2].bits, p[3].bits} << 16)};
}
inline F32 load_n(const Bf16* p, int n, float fill) {
  float buffer[4] = {fill, fill, fill, fill};
  for (int i = 0; i < n; ++i) {
    const std::uint32_t u = static_cast<std::uint32_t>(p[i].bits) << 16;
    __builtin_memcpy(buffer + i, &u, 4);
  }
  return load(buffer);
}
inline std::uint16_t narrow_bf16(float x) {
  std::uint32_t u;
  __builtin_memcpy(&u, &x, 4);
  if (x != x) return 0x7fc0;  // the quiet NaN
  return static_cast<std::uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
// A half widened exactly: the exponent is moved by a multiplication, which normalises denormals for free.
inline float widen_f16(std::uint16_t h) {
  const std::uint32_t magnitude = static_cast<std::uint32_t>(h & 0x7fff) << 13;
  std::uint32_t u = magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : magnitude;
  float x;
  __builtin_memcpy(&x, &u, 4);
  if (magnitude < 0x0f800000u) x *= 5.192296858534828e33f;  // 2^112
  __builtin_memcpy(&u, &x, 4);
  u |= static_cast<std::uint32_t>(h & 0x8000) << 16;
  __builtin_memcpy(&x, &u, 4);
  return x;
}
inline std::uint16_t narrow_f16(float x) {
  std::uint32_t u;
  __builtin_memcpy(&u, &x, 4);
  const auto sign = static_cast<std::uint16_t>((u >> 16) & 0x8000u);
  const std::uint32_t magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<std::uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);  // rounds beyond 65504
  if (magnitude < 0x38800000u) {  // a denormal half: adding 0.5 rounds at 2^-24, to nearest even
    float small;
    __builtin_memcpy(&small, &magnitude, 4);
    small += 0.5f;
    __builtin_memcpy(&u, &small, 4);
    return static_cast<std::uint16_t>(sign | (u - 0x3f000000u));
  }
  const std::uint32_t rounded = magnitude + 0x0fffu + ((magnitude >> 13) & 1u);
  return static_cast<std::uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}
inline F32 load(const F16* p) {
  return {V4f{widen_f16(p[0].bits), widen_f16(p[1].bits), widen_f16(p[2].bits), widen_f16(p[3].bits)}};
}
inline F32 load_n(const F16* p, int n, float fill) {
  float buffer[4] = {fill, fill, fill, fill};
  for (int i = 0; i < n; ++i) buffer[i] = widen_f16(p[i].bits);
  return load(buffer);
}
inline void store_n(Bf16* p, F32 a, int n) {
  for (int i = 0; i < n; ++i) p[i].bits = narrow_bf16(a.v[i]);
}
inline void store_n(F16* p, F32 a, int n) {
  for (int i = 0; i < n; ++i) p[i].bits = narrow_f16(a.v[i]);
}
inline void store(Bf16* p, F32 a) { store_n(p, a, 4); }
inline void store(F16* p, F32 a) { store_n(p, a, 4); }

// Two vectors at once, in an order of their own (the same in load2, store2 and stream2).
template <class T>
inline void load2(const T* p, F32& a, F32& b) {
  a = load(p), b = load(p + kF32);
}
template <class T>
inline void store2(T* p, F32 a, F32 b) {
  store(p, a), store(p + kF32, b);
}
template <class T>
inline void stream2(T* p, F32 a, F32 b) {
  store2(p, a, b);
}
inline void fence() {}
