// What every CUDA kernel here uses: element types, 16-byte loads and stores, reductions in a fixed order. No header is
// included, neither the host's nor CUDA's, so that NVRTC compiles the same text.
#pragma once

#include "cuda/device/ptx.cuh"

namespace fastreward {

typedef long long i64;
typedef unsigned long long u64;

constexpr int WARP = 32;
constexpr unsigned FULL = 0xffffffffu;

__device__ __forceinline__ float negative_infinity() { return __int_as_float(int(0xff800000u)); }
__device__ __forceinline__ float not_a_number() { return __int_as_float(0x7fffffff); }

// ---------------------------------------------------------------------------------------------------- element types
// LANES elements fill 16 bytes. NEG_INF is -inf in each element of one 32-bit word.
struct F32 {
  typedef unsigned Bits;
  static constexpr int LANES = 4;
  static constexpr unsigned NEG_INF = 0xff800000u;
  static __device__ __forceinline__ float decode(Bits b) { return __uint_as_float(b); }
  static __device__ __forceinline__ Bits encode(float x) { return __float_as_uint(x); }
  static __device__ __forceinline__ void unpack(const uint4& v, float (&x)[LANES]) {
    x[0] = decode(v.x), x[1] = decode(v.y), x[2] = decode(v.z), x[3] = decode(v.w);
  }
  static __device__ __forceinline__ uint4 pack(const float (&x)[LANES]) {
    return make_uint4(encode(x[0]), encode(x[1]), encode(x[2]), encode(x[3]));
  }
};

struct BF16 {
  typedef unsigned short Bits;
  static constexpr int LANES = 8;
  static constexpr unsigned NEG_INF = 0xff80ff80u;
  static __device__ __forceinline__ float decode(Bits b) { return __uint_as_float(unsigned(b) << 16); }
  static __device__ __forceinline__ unsigned encode2(float low, float high) { return f32_to_bf16x2(low, high); }
  static __device__ __forceinline__ Bits encode(float x) { return Bits(encode2(x, 0.f)); }
  static __device__ __forceinline__ void decode2(unsigned v, float& low, float& high) {
    low = __uint_as_float(v << 16), high = __uint_as_float(v & 0xffff0000u);
  }
  static __device__ __forceinline__ void unpack(const uint4& v, float (&x)[LANES]) {
    decode2(v.x, x[0], x[1]), decode2(v.y, x[2], x[3]), decode2(v.z, x[4], x[5]), decode2(v.w, x[6], x[7]);
  }
  static __device__ __forceinline__ uint4 pack(const float (&x)[LANES]) {
    return make_uint4(encode2(x[0], x[1]), encode2(x[2], x[3]), encode2(x[4], x[5]), encode2(x[6], x[7]));
  }
};

struct F16 {
  typedef unsigned short Bits;
  static constexpr int LANES = 8;
  static constexpr unsigned NEG_INF = 0xfc00fc00u;
  static __device__ __forceinline__ float decode(Bits b) { return f16_to_f32(b); }
  static __device__ __forceinline__ unsigned encode2(float low, float high) { return f32_to_f16x2(low, high); }
  static __device__ __forceinline__ Bits encode(float x) { return Bits(encode2(x, 0.f)); }
  static __device__ __forceinline__ void decode2(unsigned v, float& low, float& high) {
    low = decode(Bits(v)), high = decode(Bits(v >> 16));
  }
  static __device__ __forceinline__ void unpack(const uint4& v, float (&x)[LANES]) {
    decode2(v.x, x[0], x[1]), decode2(v.y, x[2], x[3]), decode2(v.z, x[4], x[5]), decode2(v.w, x[6], x[7]);
  }
  static __device__ __forceinline__ uint4 pack(const float (&x)[LANES]) {
    return make_uint4(encode2(x[0], x[1]), encode2(x[2], x[3]), encode2(x[4], x[5]), encode2(x[6], x[7]));
  }
};

// ------------------------------------------------------------------------------------------------- loads and stores
__device__ __forceinline__ uint4 load16(const void* p) { return *static_cast<const uint4*>(p); }

// Written once and not read again by this kernel: evicted first.
__device__ __forceinline__ void store16_streaming(void* p, const uint4& v) { __stcs(static_cast<uint4*>(p), v); }

__device__ __forceinline__ unsigned misalignment(const void* p) { return unsigned(reinterpret_cast<u64>(p)) & 15u; }

// 16 bytes from an address that is a multiple of the element's size only, cut out of the two aligned 16-byte words
// that hold them: both must lie inside the row.
__device__ __forceinline__ uint4 load16_shifted(const char* p) {
  const unsigned off = misalignment(p);
  const uint4 low = load16_readonly(p - off), high = load16_readonly(p - off + 16);
  unsigned w[7] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z};
  const unsigned last = high.w;
  const bool by2 = off & 8u, by1 = off & 4u;
  unsigned a[6];
#pragma unroll
  for (int i = 0; i < 5; ++i) a[i] = by2 ? w[i + 2] : w[i];
  a[5] = by2 ? last : w[5];
  unsigned b[5];
#pragma unroll
  for (int i = 0; i < 5; ++i) b[i] = by1 ? a[i + 1] : a[i];
  const unsigned bits = (off & 3u) * 8u;
  return make_uint4(__funnelshift_r(b[0], b[1], bits), __funnelshift_r(b[1], b[2], bits),
                    __funnelshift_r(b[2], b[3], bits), __funnelshift_r(b[3], b[4], bits));
}

// ------------------------------------------------------------------------- reductions: a fixed tree, never an atomic
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int d = WARP / 2; d > 0; d /= 2) x = fmaxf(x, __shfl_xor_sync(FULL, x, d));
  return x;
}

__device__ __forceinline__ float warp_min(float x) {
#pragma unroll
  for (int d = WARP / 2; d > 0; d /= 2) x = fminf(x, __shfl_xor_sync(FULL, x, d));
  return x;
}

__device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
  for (int d = WARP / 2; d > 0; d /= 2) x += __shfl_xor_sync(FULL, x, d);
  return x;
}

__device__ __forceinline__ double warp_max(double x) {
#pragma unroll
  for (int d = WARP / 2; d > 0; d /= 2) x = fmax(x, __shfl_xor_sync(FULL, x, d));
  return x;
}

// Every thread gets the block's maximum; `shared` holds THREADS / WARP floats.
template <int THREADS>
__device__ __forceinline__ float block_max(float x, float* shared) {
  x = warp_max(x);
  if (threadIdx.x % WARP == 0) shared[threadIdx.x / WARP] = x;
  __syncthreads();
  float best = shared[0];
#pragma unroll
  for (int w = 1; w < THREADS / WARP; ++w) best = fmaxf(best, shared[w]);
  return best;
}

// Every thread gets the block's sum; `shared` holds THREADS / WARP doubles and may be used again at once.
template <int THREADS>
__device__ __forceinline__ double block_sum(double x, double* shared) {
  x = warp_sum(x);
  __syncthreads();
  if (threadIdx.x % WARP == 0) shared[threadIdx.x / WARP] = x;
  __syncthreads();
  double total = shared[0];
#pragma unroll
  for (int w = 1; w < THREADS / WARP; ++w) total += shared[w];
  return total;
}

template <int THREADS>
__device__ __forceinline__ double block_max(double x, double* shared) {
  x = warp_max(x);
  __syncthreads();
  if (threadIdx.x % WARP == 0) shared[threadIdx.x / WARP] = x;
  __syncthreads();
  double best = shared[0];
#pragma unroll
  for (int w = 1; w < THREADS / WARP; ++w) best = fmax(best, shared[w]);
  return best;
}

// True in every thread of the one block that arrives last; all others' writes are then visible to it. The counter
// starts at 0 and is 0 again afterwards.
__device__ __forceinline__ bool last_block(unsigned* counter) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicInc(counter, gridDim.x - 1) == gridDim.x - 1;
  __syncthreads();
  if (last) __threadfence();
  return last;
}

// ------------------------------------------------------------------------------------- masks of any type that counts
enum MaskKind { MASK_NONE = 0, MASK_BYTE = 1, MASK_I32 = 2, MASK_I64 = 3, MASK_F32 = 4 };

__device__ __forceinline__ bool counts(const void* mask, int kind, i64 i) {
  switch (kind) {
    case MASK_BYTE: return static_cast<const unsigned char*>(mask)[i] != 0;
    case MASK_I32: return static_cast<const int*>(mask)[i] != 0;
    case MASK_I64: return static_cast<const i64*>(mask)[i] != 0;
    case MASK_F32: return static_cast<const float*>(mask)[i] != 0.f;
    default: return true;
  }
}

}  // namespace fastreward

// ------------------------------------------------------------------------- the table of kernels that nvcc's build has
#ifndef __CUDACC_RTC__
#include "cuda/device/launch.hpp"
#endif
