// Rewards per token: a score on the sequence's last (or first) valid token, or on all, less kl_coef * KL on each; 0
// where the mask is.
//
// Fused: one launch, one read of log-probs, reference log-probs and mask, one write. A block takes tiles of a sequence.
// Whether its last valid token is the sequence's own last one it sees from the mask of the tiles behind: it looks until
// one of them has a valid token, which is the next but at the end of a sequence and before a hole, so that no mask is
// read more than twice. Bytes per token: 8 + mask read, 4 written (without a penalty: mask and 4).
#include "cuda/device/device.cuh"

namespace fastreward {

// ------------------------------------------------------------------------------------------------------------- kernels
constexpr int THREADS = 256;
constexpr int PER_THREAD = 4;
constexpr int TILE = THREADS * PER_THREAD;

// As in fastreward/_arguments/options.py: REWARD_KLS and PLACES.
enum KlEstimate { KL_NONE = -1, KL_K1 = 0, KL_ABS = 1, KL_K2 = 2, KL_K3 = 3 };
enum ScorePlace { PLACE_ALL = 0, PLACE_START = 1, PLACE_END = 2 };

struct TokenRewardsArguments {
  const float* scores;        // [sequences], NaN = not scored
  const float* logprobs;      // [tokens]; null: no penalty
  const float* ref_logprobs;  // [tokens]
  const void* mask;
  i64 mask_kind;
  const i64* cu_seqlens;  // [sequences + 1]; null: padded, `columns` each
  i64 columns, splits;    // blocks of a sequence
  i64 kl, place;
  double kl_coef, kl_clamp, kl_value_clamp, low, high;
  const double* given;  // [5]: in place of these; or null
  float* out;           // [tokens]
};

__device__ __forceinline__ float within(float x, float low, float high) {
  return x < low ? low : x > high ? high : x;  // a NaN stays one
}

__device__ __forceinline__ float estimate(float x, int kl) {
  switch (kl) {
    case KL_K1: return -x;
    case KL_ABS: return fabsf(x);
    case KL_K2: return 0.5f * x * x;
    default: return expm1f(x) - x;
  }
}

// Whether any token of the tile that begins at `start` counts; the same in every thread.
__device__ __forceinline__ bool any_valid(const TokenRewardsArguments& a, i64 first, i64 start, i64 length,
                                          double* shared) {
  bool mine = false;
#pragma unroll
  for (int k = 0; k < PER_THREAD; ++k) {
    const i64 i = start + k * THREADS + int(threadIdx.x);
    mine |= i < length && counts(a.mask, int(a.mask_kind), first + i);
  }
  return block_max<THREADS>(mine ? 1. : 0., shared) > 0.;
}

// Column of the sequence's last (or first) valid token if it is in the tile at `start`, else -1.
__device__ __forceinline__ i64 place_of(const TokenRewardsArguments& a, i64 first, i64 start, i64 length,
                                        unsigned valid, double* shared) {
  const bool last = a.place == PLACE_END;
  double mine = -1.;  // of the tile: the last column, or the first from the tile's end
#pragma unroll
  for (int k = 0; k < PER_THREAD; ++k) {
    const int at = k * THREADS + int(threadIdx.x);
    if (valid >> k & 1u) mine = fmax(mine, double(last ? at : TILE - 1 - at));
  }
  const double own = block_max<THREADS>(mine, shared);
  if (own < 0.) return -1;
  if (last)
    for (i64 s = start + TILE; s < length; s += TILE)
      if (any_valid(a, first, s, length, shared)) return -1;
  if (!last)
    for (i64 s = start - TILE; s >= 0; s -= TILE)
      if (any_valid(a, first, s, length, shared)) return -1;
  return start + (last ? i64(own) : TILE - 1 - i64(own));
}

}  // namespace fastreward

// ---------------------------------------------------------------------------------------------------------- launchers
using namespace fastreward;

extern "C" __global__ void __launch_bounds__(THREADS, 4) token_rewards(const TokenRewardsArguments a) {
  __shared__ double shared[THREADS / WARP];
  const i64 row = blockIdx.x / a.splits;
  const i64 first = a.cu_seqlens ? a.cu_seqlens[row] : row * a.columns;
  const i64 length = a.cu_seqlens ? a.cu_seqlens[row + 1] - first : a.columns;
  const float coef = float(a.given ? a.given[0] : a.kl_coef), clamp = float(a.given ? a.given[1] : a.kl_clamp);
  const float value_clamp = float(a.given ? a.given[2] : a.kl_value_clamp);
  const float low = float(a.given ? a.given[3] : a.low), high = float(a.given ? a.given[4] : a.high);
  const float raw = a.scores[row];
  const float score = raw == raw ? within(raw, low, high) : 0.f;
  for (i64 start = (blockIdx.x % a.splits) * TILE; start < length; start += a.splits * TILE) {
    unsigned valid = 0u;
#pragma unroll
    for (int k = 0; k < PER_THREAD; ++k) {
      const i64 i = start + k * THREADS + int(threadIdx.x);
      valid |= unsigned(i < length && counts(a.mask, int(a.mask_kind), first + i)) << k;
    }
    const i64 place = a.place == PLACE_ALL ? -1 : place_of(a, first, start, length, valid, shared);
#pragma unroll
    for (int k = 0; k < PER_THREAD; ++k) {
      const i64 i = start + k * THREADS + int(threadIdx.x);
      if (i >= length) break;
      float reward = 0.f;
      if (valid >> k & 1u) {
        if (a.place == PLACE_ALL || i == place) reward = score;
        if (a.logprobs) {
          const float gap = within(a.ref_logprobs[first + i] - a.logprobs[first + i], -clamp, clamp);
          reward -= coef * within(estimate(gap, int(a.kl)), -value_clamp, value_clamp);
        }
      }
      a.out[first + i] = reward;
    }
  }
}

#ifndef __CUDACC_RTC__
fastreward::KernelTable fastreward::rewards_kernels() {
  static const Kernel kernels[] = {
      {"token_rewards", reinterpret_cast<const void*>(&token_rewards), sizeof(TokenRewardsArguments)}};
  return {kernels, sizeof(kernels) / sizeof(kernels[0])};
}
#endif
