// Backward of every loss: what its forward kept per token, or per sequence, times the upstream gradient. One launch.
// Bytes per token: scale reads the kept gradient (4) and writes one (4); broadcast_to_tokens reads the mask, writes 4.
#pragma once

#include "cuda/program.cuh"

namespace fastreward {

// ------------------------------------------------------------------------------------------------------------- kernels
struct ScaleArguments {
  const float* saved;       // one per token
  const float* sequence_weight;  // [rows] or null
  const float* grad_loss;   // []
  Side side;
  float* out;  // one per token
};

struct BroadcastArguments {
  const float* sequence_values;  // [rows]
  const float* grad_loss;   // []
  Side side;
  float* out;  // one per token
};

}  // namespace fastreward

// ---------------------------------------------------------------------------------------------------------- launchers
using namespace fastreward;

extern "C" __global__ void __launch_bounds__(THREADS) program_scale(const ScaleArguments a) {
  const float grad = a.grad_loss[0];
  for (i64 u = blockIdx.x; u < a.side.units; u += gridDim.x) {
    const Unit unit = unit_of(a.side, u);
    if (unit.begin >= unit.end) continue;
    const float weight = a.sequence_weight ? a.sequence_weight[unit.row] * grad : grad;
    float x[PER_THREAD];
#pragma unroll
    for (int k = 0; k < PER_THREAD; ++k) {
      const i64 i = unit.begin + k * THREADS + int(threadIdx.x);
      x[k] = i < unit.end ? a.saved[i] : 0.f;
    }
#pragma unroll
    for (int k = 0; k < PER_THREAD; ++k) {
      const i64 i = unit.begin + k * THREADS + int(threadIdx.x);
      if (i < unit.end) a.out[i] = x[k] == 0.f ? 0.f : x[k] * weight;  // nothing stays nothing, whatever the weight
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) program_broadcast_to_tokens(const BroadcastArguments a) {
  const float grad = a.grad_loss[0];
  for (i64 u = blockIdx.x; u < a.side.units; u += gridDim.x) {
    const Unit unit = unit_of(a.side, u);
    if (unit.begin >= unit.end) continue;
    const float kept = a.sequence_values[unit.row], value = kept == 0.f ? 0.f : kept * grad;
    const unsigned valid = valid_tokens(a.side, unit);
#pragma unroll
    for (int k = 0; k < PER_THREAD; ++k) {
      const i64 i = unit.begin + k * THREADS + int(threadIdx.x);
      if (i < unit.end) a.out[i] = valid >> k & 1u ? value : 0.f;
    }
  }
}
