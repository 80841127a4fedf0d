// Masked whitening: mean and variance over the valid positions, and their application.
//
// Fused: mask, mean and squared deviations in one sweep (two-pass within a chunk that stays in registers, Chan's merge
// between chunks: never E[x^2] - E[x]^2), and the last block turns them into the shift and scale that the second launch
// reads from device memory: no host sync between the two.
// Bytes per element: 4 + mask read by `statistics`, 4 + mask read and 4 written by `apply`.
//
// A chunk's moments go to its own place and are merged in a fixed order by the block that finishes last, in f64.
#include "cuda/device/device.cuh"

namespace fastreward {

// ------------------------------------------------------------------------------------------------------------- kernels
constexpr int THREADS = 256;
constexpr int PER_THREAD = 16;
constexpr int CHUNK = THREADS * PER_THREAD;

struct StatisticsArguments {
  const float* x;  // [count]
  i64 count;
  const void* mask;
  i64 mask_kind, chunks;
  double* moments;     // [chunks, 3]
  double* statistics;  // [3]: count, mean, sum of squared deviations
  double* affine;      // [3]: shift, scale, what is added back; or null
  i64 shift_mean, ddof;
  double eps;
  unsigned* counter;  // 0 before and after
};

struct ApplyArguments {
  const float* x;
  i64 count;
  const void* mask;
  i64 mask_kind;
  const double* affine;  // [3]
  float* out;            // may be x
};

struct Moments {
  double count, mean, squares;
};

__device__ __forceinline__ Moments merge(const Moments& a, const Moments& b) {
  const double count = a.count + b.count;
  if (b.count == 0.) return a;
  if (a.count == 0.) return b;
  const double d = b.mean - a.mean;
  return {count, a.mean + d * (b.count / count), a.squares + b.squares + d * d * (a.count * b.count / count)};
}

__device__ __forceinline__ void chunk_moments(const StatisticsArguments& a, i64 chunk, double* shared) {
  float x[PER_THREAD];
  unsigned valid = 0u;
  double n = 0., sum = 0.;
#pragma unroll
  for (int k = 0; k < PER_THREAD; ++k) {
    const i64 i = chunk * CHUNK + k * THREADS + int(threadIdx.x);
    const bool here = i < a.count && counts(a.mask, int(a.mask_kind), i);
    x[k] = here ? a.x[i] : 0.f;
    valid |= unsigned(here) << k;
    n += here;
    sum += x[k];
  }
  n = block_sum<THREADS>(n, shared);
  sum = block_sum<THREADS>(sum, shared);
  const double mean = n > 0. ? sum / n : 0.;
  double squares = 0.;
#pragma unroll
  for (int k = 0; k < PER_THREAD; ++k) {
    const double d = valid >> k & 1u ? x[k] - mean : 0.;
    squares += d * d;
  }
  squares = block_sum<THREADS>(squares, shared);
  if (threadIdx.x == 0) {
    double* out = a.moments + chunk * 3;
    out[0] = n, out[1] = mean, out[2] = squares;
  }
}

__device__ __forceinline__ void whiten_finish(const StatisticsArguments& a) {
  __shared__ Moments room[THREADS];
  Moments mine = {0., 0., 0.};
  for (i64 c = threadIdx.x; c < a.chunks; c += THREADS)
    mine = merge(mine, {a.moments[c * 3], a.moments[c * 3 + 1], a.moments[c * 3 + 2]});
  room[threadIdx.x] = mine;
  for (int d = THREADS / 2; d > 0; d /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < d) room[threadIdx.x] = merge(room[threadIdx.x], room[threadIdx.x + d]);
  }
  if (threadIdx.x != 0) return;
  const Moments all = room[0];
  a.statistics[0] = all.count, a.statistics[1] = all.mean, a.statistics[2] = all.squares;
  if (a.affine) {
    a.affine[0] = all.mean;
    const double freedom = all.count - double(a.ddof);
    const double variance = (freedom > 0. ? all.squares / freedom : -double(negative_infinity())) + a.eps;
    a.affine[1] = variance == 0. ? 0. : 1. / sqrt(variance);  // 0 / 0 is 0
    a.affine[2] = a.shift_mean ? 0. : all.mean;
  }
}

}  // namespace fastreward

// ---------------------------------------------------------------------------------------------------------- launchers
using namespace fastreward;

extern "C" __global__ void __launch_bounds__(THREADS) whiten_statistics(const StatisticsArguments a) {
  __shared__ double shared[THREADS / WARP];
  for (i64 c = blockIdx.x; c < a.chunks; c += gridDim.x) chunk_moments(a, c, shared);
  if (last_block(a.counter)) whiten_finish(a);
}

extern "C" __global__ void __launch_bounds__(THREADS) whiten_apply(const ApplyArguments a) {
  const double shift = a.affine[0], scale = a.affine[1], back = a.affine[2];
  const i64 begin = i64(blockIdx.x) * CHUNK + int(threadIdx.x);
#pragma unroll 4
  for (int k = 0; k < PER_THREAD; ++k) {
    const i64 i = begin + k * THREADS;
    if (i >= a.count) break;
    const bool valid = counts(a.mask, int(a.mask_kind), i);
    a.out[i] = valid ? float((a.x[i] - shift) * scale + back) : 0.f;
  }
}

#ifndef __CUDACC_RTC__
fastreward::KernelTable fastreward::whiten_kernels() {
  static const Kernel kernels[] = {
      {"whiten_statistics", reinterpret_cast<const void*>(&whiten_statistics), sizeof(StatisticsArguments)},
      {"whiten_apply", reinterpret_cast<const void*>(&whiten_apply), sizeof(ApplyArguments)}};
  return {kernels, sizeof(kernels) / sizeof(kernels[0])};
}
#endif
