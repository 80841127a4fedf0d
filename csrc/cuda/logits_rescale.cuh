// A stored gradient of the logits, made for one upstream gradient, brought to another that arrived later: multiplied by
// their ratio, in place. Both are read on the device; where they are equal, which is the rule, nothing is touched.
// Bytes: 0, or N * V * size read and as much written.
#pragma once

#include "cuda/logprobs_backward.cuh"

namespace fastreward {

// ------------------------------------------------------------------------------------------------------------- kernels
struct RescaleArguments {
  void* grad;  // [rows, vocab], `stride` elements from row to row
  i64 stride, rows, vocab;
  const float *upstream, *applied;  // []
  i64 chunk, chunks;                // vectors in a share of a row, shares in a row
};

// What is 0 stays 0, whatever the factor: masked rows if the upstream gradient has overflowed, all if `applied` was 0.
__device__ __forceinline__ float rescaled(float x, float factor) { return x == 0.f ? 0.f : x * factor; }

template <class T>
__device__ __forceinline__ void rescale_columns(typename T::Bits* grad, i64 begin, i64 end, float factor) {
  for (i64 j = begin + threadIdx.x; j < end; j += BACKWARD_THREADS)
    grad[j] = T::encode(rescaled(T::decode(grad[j]), factor));
}

template <class T>
__device__ __forceinline__ void rescale_share(typename T::Bits* grad, const Share& s, float factor) {
  const i64 first = s.head + i64(s.first) * T::LANES, last = s.head + i64(s.last) * T::LANES;
  rescale_columns<T>(grad, s.begin, min(s.end, first), factor);
#pragma unroll 1
  for (int k = s.first + int(threadIdx.x); k < s.last; k += BACKWARD_THREADS * BACKWARD_UNROLL) {
    uint4 v[BACKWARD_UNROLL];
#pragma unroll
    for (int u = 0; u < BACKWARD_UNROLL; ++u) {
      const int index = k + u * BACKWARD_THREADS;
      if (index < s.last) v[u] = load16(grad + s.head + i64(index) * T::LANES);
    }
#pragma unroll
    for (int u = 0; u < BACKWARD_UNROLL; ++u) {
      const int index = k + u * BACKWARD_THREADS;
      if (index >= s.last) break;
      float x[T::LANES];
      T::unpack(v[u], x);
#pragma unroll
      for (int j = 0; j < T::LANES; ++j) x[j] = rescaled(x[j], factor);
      store16_streaming(grad + s.head + i64(index) * T::LANES, T::pack(x));
    }
  }
  rescale_columns<T>(grad, max(s.begin, last), s.end, factor);
}

template <class T>
__device__ __forceinline__ void rescale_rows(const RescaleArguments& a) {
  const float upstream = a.upstream[0], applied = a.applied[0];
  if (upstream == applied) return;
  const float factor = upstream / applied;
  for (i64 block = blockIdx.x; block < a.rows * a.chunks; block += gridDim.x) {
    typename T::Bits* grad = static_cast<typename T::Bits*>(a.grad) + block / a.chunks * a.stride;
    rescale_share<T>(grad, share_of<T>(grad, grad, a.vocab, a.chunk, block % a.chunks, a.chunks), factor);
  }
}

}  // namespace fastreward

// ---------------------------------------------------------------------------------------------------------- launchers
using namespace fastreward;

extern "C" __global__ void __launch_bounds__(BACKWARD_THREADS) logits_rescale_f32(const RescaleArguments a) {
  rescale_rows<F32>(a);
}
extern "C" __global__ void __launch_bounds__(BACKWARD_THREADS) logits_rescale_bf16(const RescaleArguments a) {
  rescale_rows<BF16>(a);
}
extern "C" __global__ void __launch_bounds__(BACKWARD_THREADS) logits_rescale_f16(const RescaleArguments a) {
  rescale_rows<F16>(a);
}
