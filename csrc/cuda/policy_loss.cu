// The PPO family's token loss: ratio, asymmetric clip, dual clip, delta, log-ratio clamp, weights, KL to a reference,
// entropy bonus, aggregation over tokens and sequences, and every metric.
//
// Fused: one launch forward gives loss, metrics, each row's weight in the loss and every token's unscaled gradient; one
// launch backward scales it. torch needs dozens of launches and as many temporaries for the same.
// Bytes per token: forward reads logprobs and old_logprobs (8), the mask (1 to 8), what else is given (4 each), writes the
// gradient (4); backward reads it and the mask and writes 4 (8 with the entropy's).
//
// A unit is CHUNK tokens of one row, from the row's start on: its sums depend on that row alone. Blocks take units in
// turn and write a unit's sums to its own place; the block that finishes last adds them up, row by row and then over the
// rows in a fixed order, and turns them into loss, metrics and row weights. No host sync, no order left to chance, and
// packed rows are found by a search in cu_seqlens on the device.
#include "common/device.cuh"

namespace fastreward {

// ------------------------------------------------------------------------------------------------------------- kernels
constexpr int THREADS = 256;
constexpr int PER_THREAD = 8;
constexpr int CHUNK = THREADS * PER_THREAD;
constexpr double KL_CLAMP = 20.;

// A unit's sums, all f64; MINIMUM and MAXIMUM are of the ratio.
enum Sum { COUNT, LOSS, CLIP_LOW, CLIP_HIGH, CLIP_DUAL, OLD_K1, OLD_K3, REF_K1, REF_K3, RATIO, ENTROPY, MINIMUM, MAXIMUM, SUMS };
constexpr int ROOM = 16;  // doubles per unit
enum Aggregation { TOKEN_MEAN, SEQ_MEAN_TOKEN_MEAN, SEQ_MEAN_TOKEN_SUM, SEQ_MEAN_TOKEN_SUM_NORM };

// Rows of `tokens` [rows, width], or packed: row b is tokens cu_seqlens[b] .. cu_seqlens[b + 1].
struct Rows {
  const i64* cu_seqlens;  // [rows + 1] or null
  i64 rows, width, units, units_per_row;
};

struct PolicyArguments {
  const float *logprobs, *old_logprobs, *advantages;
  i64 advantage_per_row;  // 1: advantages [rows], 0: one per token
  const void* mask;
  i64 mask_kind;
  const float *ref_logprobs, *entropy, *weights;  // per token, or null
  Rows layout;
  double ratio_low, ratio_high, dual_clip, delta, log_ratio_clamp;  // +inf: off
  i64 kl;  // 0 none, 1 to 3: k1 to k3
  double kl_coef, entropy_coef;
  i64 aggregation;
  const float* normalizer;  // [] or null
  float *loss, *metrics, *saved, *row_weight, *token_loss;  // [], [12], per token, [rows], per token or null
  double* sums;       // [units, ROOM]
  unsigned* counter;  // 0 before and after
};

struct PolicyBackwardArguments {
  const float* saved;
  const void* mask;
  i64 mask_kind;
  const float *row_weight, *grad_loss;
  Rows layout;
  double entropy_coef;
  float *grad_logprobs, *grad_entropy;  // per token; or null
};

struct Unit {
  i64 row, begin, end;
};

__device__ __forceinline__ i64 first_unit(const Rows& r, i64 row) {
  return r.cu_seqlens ? r.cu_seqlens[row] / CHUNK + row : row * r.units_per_row;
}

__device__ __forceinline__ i64 row_length(const Rows& r, i64 row) {
  return r.cu_seqlens ? r.cu_seqlens[row + 1] - r.cu_seqlens[row] : r.width;
}

// A packed row starts at unit cu_seqlens[row] / CHUNK + row: that leaves room for all its chunks, whatever the lengths,
// and the number of units is known to the host. Some units are empty.
__device__ __forceinline__ Unit unit_of(const Rows& r, i64 u) {
  Unit unit;
  i64 start, stop;
  if (r.cu_seqlens) {
    i64 low = 0, high = r.rows - 1;
    while (low < high) {
      const i64 middle = (low + high + 1) / 2;
      if (first_unit(r, middle) <= u)
        low = middle;
      else
        high = middle - 1;
    }
    unit.row = low;
    start = r.cu_seqlens[low], stop = r.cu_seqlens[low + 1];
  } else {
    unit.row = u / r.units_per_row;
    start = unit.row * r.width, stop = start + r.width;
  }
  unit.begin = start + (u - first_unit(r, unit.row)) * CHUNK;
  unit.end = min(stop, unit.begin + CHUNK);
  return unit;
}

// What one thread adds up over its PER_THREAD tokens.
struct TokenSums {
  double loss;
  float value[SUMS];
};

struct Token {
  float loss, gradient;
};

__device__ __forceinline__ float read(const float* x, i64 i) { return x ? x[i] : 0.f; }

__device__ __forceinline__ Token token_loss(const PolicyArguments& a, i64 i, i64 row, TokenSums& sums) {
  const float lp = a.logprobs[i], adv = a.advantages[a.advantage_per_row ? row : i];
  const float raw = lp - a.old_logprobs[i], bound = float(a.log_ratio_clamp);
  const float d = raw > bound ? bound : raw < -bound ? -bound : raw;  // keeps NaN
  const float ratio = expf(d), low = float(a.ratio_low), high = float(a.ratio_high), delta = float(a.delta);
  const float unclipped = -adv * (ratio > delta ? delta : ratio);
  const float clipped = -adv * (ratio < low ? low : ratio > high ? high : ratio);
  const bool first = unclipped >= clipped;  // a tie goes to the unclipped one
  float loss = first ? unclipped : clipped;
  const bool moves = first ? ratio <= delta : ratio >= low && ratio <= high;
  float gradient = moves && fabsf(raw) <= bound ? -adv * ratio : 0.f;
  const float cap = -adv * float(a.dual_clip);
  const bool dual = adv < 0.f && loss > cap;
  if (dual) loss = cap, gradient = 0.f;
  if (a.weights) loss *= a.weights[i], gradient *= a.weights[i];

  if (a.ref_logprobs) {
    const float far = float(KL_CLAMP), wide = a.ref_logprobs[i] - lp;
    const float gap = wide > far ? far : wide < -far ? -far : wide;
    const float k3 = expm1f(gap) - gap, slope = fabsf(wide) <= far ? float(a.kl_coef) : 0.f;
    const float coef = float(a.kl_coef);
    if (a.kl == 1) loss -= coef * gap, gradient += slope;
    if (a.kl == 2) loss += coef * 0.5f * gap * gap, gradient -= slope * gap;
    if (a.kl == 3) loss += coef * k3, gradient -= slope * expm1f(gap);
    sums.value[REF_K1] -= gap;
    sums.value[REF_K3] += k3;
  }
  const float entropy = read(a.entropy, i);
  loss -= float(a.entropy_coef) * entropy;

  sums.loss += loss;
  sums.value[COUNT] += 1.f;
  sums.value[CLIP_LOW] += ratio < low && adv < 0.f;
  sums.value[CLIP_HIGH] += ratio > high && adv > 0.f;
  sums.value[CLIP_DUAL] += dual;
  sums.value[OLD_K1] -= d;
  sums.value[OLD_K3] += expm1f(d) - d;
  sums.value[RATIO] += ratio;
  sums.value[ENTROPY] += entropy;
  sums.value[MINIMUM] = fminf(sums.value[MINIMUM], ratio);
  sums.value[MAXIMUM] = fmaxf(sums.value[MAXIMUM], ratio);
  return {loss, gradient};
}

__device__ __forceinline__ double join(int which, double a, double b) {
  return which == MINIMUM ? fmin(a, b) : which == MAXIMUM ? fmax(a, b) : a + b;
}

__device__ __forceinline__ double nothing(int which) {
  return which == MINIMUM ? -double(negative_infinity()) : which == MAXIMUM ? double(negative_infinity()) : 0.;
}

template <int N>
__device__ __forceinline__ void warp_join(double (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i)
#pragma unroll
    for (int d = WARP / 2; d > 0; d /= 2) x[i] = join(i, x[i], __shfl_xor_sync(FULL, x[i], d));
}

// Each sum over the block, in the order of the warps; thread i < SUMS returns sum i, to write to `out`.
__device__ __forceinline__ void block_join(double (&x)[SUMS], double (*room)[SUMS], double* out) {
  warp_join(x);
  __syncthreads();
  if (threadIdx.x % WARP == 0)
#pragma unroll
    for (int i = 0; i < SUMS; ++i) room[threadIdx.x / WARP][i] = x[i];
  __syncthreads();
  if (threadIdx.x < SUMS) {
    double total = room[0][threadIdx.x];
#pragma unroll
    for (int w = 1; w < THREADS / WARP; ++w) total = join(int(threadIdx.x), total, room[w][threadIdx.x]);
    out[threadIdx.x] = total;
  }
}

__device__ __forceinline__ void policy_unit(const PolicyArguments& a, i64 u, double (*room)[SUMS]) {
  const Unit unit = unit_of(a.layout, u);
  TokenSums sums = {};
  sums.value[MINIMUM] = -negative_infinity(), sums.value[MAXIMUM] = negative_infinity();
#pragma unroll 1
  for (int k = 0; k < PER_THREAD; ++k) {
    const i64 i = unit.begin + k * THREADS + int(threadIdx.x);
    if (i >= unit.end) break;
    const bool counted = counts(a.mask, int(a.mask_kind), i);
    Token token = {0.f, 0.f};
    if (counted) token = token_loss(a, i, unit.row, sums);
    a.saved[i] = token.gradient;
    if (a.token_loss) a.token_loss[i] = token.loss;
  }
  double x[SUMS];
#pragma unroll
  for (int i = 0; i < SUMS; ++i) x[i] = i == LOSS ? sums.loss : double(sums.value[i]);
  block_join(x, room, a.sums + u * ROOM);
}

// From all units' sums to the outputs: rows in threads' turns, then threads in order.
__device__ __forceinline__ void policy_finish(const PolicyArguments& a, double (*room)[SUMS]) {
  __shared__ double total[SUMS];
  __shared__ double shared[THREADS / WARP];
  double x[SUMS], sequences = 0., longest = 0., row_means = 0.;
#pragma unroll
  for (int i = 0; i < SUMS; ++i) x[i] = nothing(i);
  for (i64 row = threadIdx.x; row < a.layout.rows; row += THREADS) {
    const i64 length = row_length(a.layout, row), begin = first_unit(a.layout, row);
    double count = 0., loss = 0.;
    for (i64 u = begin; u < begin + (length + CHUNK - 1) / CHUNK; ++u) {
#pragma unroll
      for (int i = 0; i < SUMS; ++i) x[i] = join(i, x[i], a.sums[u * ROOM + i]);
      count += a.sums[u * ROOM + COUNT];
      loss += a.sums[u * ROOM + LOSS];
    }
    sequences += count > 0.;
    row_means += count > 0. ? loss / count : 0.;
    longest = fmax(longest, double(length));
    a.row_weight[row] = float(count);  // tokens of the row, for the weights below
  }
  block_join(x, room, total);
  sequences = block_sum<THREADS>(sequences, shared);
  row_means = block_sum<THREADS>(row_means, shared);
  longest = block_max<THREADS>(longest, shared);
  const bool by_length = a.aggregation == SEQ_MEAN_TOKEN_MEAN;
  const double sum = by_length ? row_means : total[LOSS];
  double denominator = a.aggregation == TOKEN_MEAN ? total[COUNT] : sequences;
  if (a.aggregation == SEQ_MEAN_TOKEN_SUM_NORM) denominator *= a.layout.cu_seqlens ? longest : double(a.layout.width);
  denominator = a.normalizer ? double(a.normalizer[0]) : fmax(denominator, 1.);
  for (i64 row = threadIdx.x; row < a.layout.rows; row += THREADS) {
    const double count = a.row_weight[row];
    a.row_weight[row] = count == 0. ? 0.f : float(1. / (by_length ? denominator * count : denominator));
  }
  if (threadIdx.x != 0) return;
  const double tokens = 1. / fmax(total[COUNT], 1.);
  const bool any = total[COUNT] > 0.;
  a.loss[0] = any ? float(sum / denominator) : 0.f;
  float* m = a.metrics;  // in the order of fastreward/_layout.py's METRICS
  m[0] = float(total[CLIP_LOW] * tokens), m[1] = float(total[CLIP_HIGH] * tokens), m[2] = float(total[CLIP_DUAL] * tokens);
  m[3] = float(total[OLD_K1] * tokens), m[4] = float(total[OLD_K3] * tokens);
  m[5] = float(total[REF_K1] * tokens), m[6] = float(total[REF_K3] * tokens);
  m[7] = float(total[RATIO] * tokens);
  m[8] = any ? float(total[MINIMUM]) : 0.f, m[9] = any ? float(total[MAXIMUM]) : 0.f;
  m[10] = float(total[ENTROPY] * tokens), m[11] = float(total[COUNT]);
}

}  // namespace fastreward

// ---------------------------------------------------------------------------------------------------------- launchers
using namespace fastreward;

extern "C" __global__ void __launch_bounds__(THREADS, 4) policy_loss_forward(const PolicyArguments a) {
  __shared__ double room[THREADS / WARP][SUMS];
  for (i64 u = blockIdx.x; u < a.layout.units; u += gridDim.x) policy_unit(a, u, room);
  if (last_block(a.counter)) policy_finish(a, room);
}

extern "C" __global__ void __launch_bounds__(THREADS) policy_loss_backward(const PolicyBackwardArguments a) {
  const float scale = a.grad_loss[0];
  for (i64 u = blockIdx.x; u < a.layout.units; u += gridDim.x) {
    const Unit unit = unit_of(a.layout, u);
    if (unit.begin >= unit.end) continue;
    const float weight = a.row_weight[unit.row] * scale, bonus = -float(a.entropy_coef) * weight;
#pragma unroll 4
    for (int k = 0; k < PER_THREAD; ++k) {
      const i64 i = unit.begin + k * THREADS + int(threadIdx.x);
      if (i >= unit.end) break;
      const bool counted = counts(a.mask, int(a.mask_kind), i);
      a.grad_logprobs[i] = counted ? a.saved[i] * weight : 0.f;
      if (a.grad_entropy) a.grad_entropy[i] = counted ? bonus : 0.f;
    }
  }
}

#ifndef __CUDACC_RTC__
fastreward::KernelTable fastreward::policy_loss_kernels() {
  static const Kernel kernels[] = {
      {"policy_loss_forward", reinterpret_cast<const void*>(&policy_loss_forward), sizeof(PolicyArguments)},
      {"policy_loss_backward", reinterpret_cast<const void*>(&policy_loss_backward), sizeof(PolicyBackwardArguments)}};
  return {kernels, sizeof(kernels) / sizeof(kernels[0])};
}
#endif
