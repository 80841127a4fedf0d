// One row's running statistics: what a thread holds while it streams logits, how two such partial results merge, and
// how the merged result becomes the outputs. Every merge happens in an order that depends on the vocabulary alone.
#pragma once

#include "cuda/device/device.cuh"

namespace fastreward {

constexpr float LOG2E = 1.4426950408889634f;
constexpr double LN2 = 0.6931471805599453;
constexpr float FAR_BELOW = -1e30f;  // stands in for -inf where it is multiplied by 0

// Bits of `flags` and rows of the exchanged tensors, as in fastreward/_runtime/layout.py.
enum Flag { FLAG_ENTROPY = 1, FLAG_LOG_SUM_SQ = 2, FLAG_MEAN = 4, FLAG_ARGMAX = 8, FLAG_RANK = 16 };
enum Value { LOGPROB, ENTROPY, LOGSUMEXP, LABEL_LOGIT, MEAN_LOGIT, LOG_SUM_SQ, MAX_LOGPROB, MAX_LOGIT, VALUES };
enum StateEntry { PEAK, SUM, WEIGHTED, SQUARES, LOGITS, LABEL, ARGMAX, RANK, STATES };

// How much is computed: the log-prob only; entropy and argmax too; everything.
enum Level { LEAN = 0, WITH_ENTROPY = 1, EVERYTHING = 2 };

constexpr unsigned NOWHERE = 0xffffffffu;

// Sums over some columns x: t = (x - max) * inv_temperature * log2(e), so that exp2(t) is the unnormalised
// probability. `at` says where the first maximum was met. Members above the level are never touched.
struct Partial {
  float max, sum, weighted, squares, logits;
  unsigned rank, at, kept;
};
constexpr int PARTIAL_WORDS = 8;

__device__ __forceinline__ Partial empty_partial() {
  Partial p;
  p.max = negative_infinity();
  p.sum = p.weighted = p.squares = p.logits = 0.f;
  p.rank = p.kept = 0u;
  p.at = NOWHERE;
  return p;
}

// Rescales the sums from maximum p.max to maximum `base` (finite, or +inf or NaN, which turn the sums into NaN later).
template <int LEVEL>
__device__ __forceinline__ void rescale(Partial& p, float base, float scale) {
  const float shift = (p.max - base) * scale;
  const float r = exp2_fast(shift);
  if (LEVEL >= WITH_ENTROPY) p.weighted = r * fmaf(fmaxf(shift, FAR_BELOW), p.sum, p.weighted);
  if (LEVEL >= EVERYTHING) p.squares *= r * r;
  p.sum *= r;
}

__device__ __forceinline__ float finite_base(float max) { return max == negative_infinity() ? 0.f : max; }

// a then b; an empty b leaves a's bits as they are.
template <int LEVEL>
__device__ __forceinline__ Partial merge(Partial a, Partial b, float scale) {
  const float max = fmaxf(a.max, b.max), base = finite_base(max);
  if (LEVEL >= WITH_ENTROPY && b.max > a.max) a.at = b.at;
  rescale<LEVEL>(a, base, scale);
  rescale<LEVEL>(b, base, scale);
  a.max = max;
  a.sum += b.sum;
  if (LEVEL >= WITH_ENTROPY) a.weighted += b.weighted;
  if (LEVEL >= EVERYTHING) {
    a.squares += b.squares;
    a.logits += b.logits;
    a.rank += b.rank;
    a.kept += b.kept;
  }
  return a;
}

// 1 / temperature in float: finite, so that 0 times it is 0, and large enough that -inf times it is no NaN.
__device__ __forceinline__ float narrow(double inv_t) { return float(fmin(fmax(inv_t, 7.6e-37), 1.6e38)); }

// x joins p.
template <int LEVEL>
__device__ __forceinline__ void add_column(Partial& p, float x, float base, float scale) {
  const float t = (x - base) * scale, e = exp2_fast(t);
  p.sum += e;
  if (LEVEL >= WITH_ENTROPY) p.weighted = fmaf(fmaxf(t, FAR_BELOW), e, p.weighted);  // 0 * -inf must be 0
  if (LEVEL >= EVERYTHING) p.squares = fmaf(e, e, p.squares);
}

// What a row, or a slice of one, comes to. t is in nats here.
struct RowState {
  double peak, sum, weighted, squares, logits;
  unsigned rank, at, kept;
};

template <int THREADS>
struct ReduceRoom {
  float max[THREADS / WARP];
  double sums[THREADS / WARP][4];
  unsigned counts[THREADS / WARP][3];
};

__device__ __forceinline__ unsigned warp_sum(unsigned x) { return __reduce_add_sync(FULL, x); }
__device__ __forceinline__ unsigned warp_min(unsigned x) { return __reduce_min_sync(FULL, x); }

// Merges the block's partials; the result is thread 0's. The f32 partials become f64 here.
template <int LEVEL, int THREADS>
__device__ __forceinline__ RowState reduce_row(Partial p, float scale, ReduceRoom<THREADS>& room) {
  const int warp = threadIdx.x / WARP;
  const float max = block_max<THREADS>(p.max, room.max);
  if (p.max != max) p.at = NOWHERE;
  rescale<LEVEL>(p, finite_base(max), scale);
  const double sum = warp_sum(double(p.sum));
  double weighted = 0., squares = 0., logits = 0.;
  unsigned rank = 0u, at = NOWHERE, kept = 0u;
  if (LEVEL >= WITH_ENTROPY) {
    weighted = warp_sum(double(p.weighted));
    at = warp_min(p.at);
  }
  if (LEVEL >= EVERYTHING) {
    squares = warp_sum(double(p.squares));
    logits = warp_sum(double(p.logits));
    rank = warp_sum(p.rank);
    kept = warp_sum(p.kept);
  }
  if (threadIdx.x % WARP == 0) {
    double* s = room.sums[warp];
    s[0] = sum, s[1] = weighted, s[2] = squares, s[3] = logits;
    unsigned* c = room.counts[warp];
    c[0] = rank, c[1] = at, c[2] = kept;
  }
  __syncthreads();
  RowState row;
  row.peak = max, row.sum = row.weighted = row.squares = row.logits = 0.;
  row.rank = row.kept = 0u, row.at = NOWHERE;
  if (threadIdx.x == 0) {
#pragma unroll 4
    for (int w = 0; w < THREADS / WARP; ++w) {
      row.sum += room.sums[w][0];
      row.weighted += room.sums[w][1];
      row.squares += room.sums[w][2];
      row.logits += room.sums[w][3];
      row.rank += room.counts[w][0];
      row.at = row.at < room.counts[w][1] ? row.at : room.counts[w][1];
      row.kept += room.counts[w][2];
    }
    row.weighted *= LN2;
  }
  return row;
}

// Raw logit of column j: -inf where it is not kept, NaN where it is no column of this row.
template <class T>
__device__ __forceinline__ float logit_at(const typename T::Bits* row, const unsigned char* keep, i64 j, i64 vocab) {
  if (j < 0 || j >= vocab) return not_a_number();
  return keep && !keep[j] ? negative_infinity() : T::decode(row[j]);
}

// Outputs of one row, written at column n of values [VALUES, rows] and indices [2, rows]; what was not asked for is 0.
struct RowOutput {
  float* values;
  i64* indices;
  i64 rows, n;
  int flags;
};

__device__ __forceinline__ void write_row(const RowOutput& out, const double (&state)[STATES], double inv_t,
                                          double columns) {
  const double peak = state[PEAK], sum = state[SUM], log_sum = log(sum), nan = double(not_a_number());
  const bool nothing = sum == 0.;  // every logit is -inf
  float value[VALUES];
  value[LOGPROB] = float(nothing ? nan : (state[LABEL] - peak) * inv_t - log_sum);
  value[ENTROPY] = float(nothing ? nan : log_sum - state[WEIGHTED] / sum);
  value[LOGSUMEXP] = float(isinf(peak) ? peak : peak * inv_t + log_sum);
  value[LABEL_LOGIT] = float(state[LABEL] * inv_t);
  value[MEAN_LOGIT] = float(state[LOGITS] * inv_t / columns);
  value[LOG_SUM_SQ] = float(nothing ? nan : log(state[SQUARES]) - 2. * log_sum);
  value[MAX_LOGPROB] = float(nothing ? nan : -log_sum);
  value[MAX_LOGIT] = float(peak);
  if (!(out.flags & FLAG_ENTROPY)) value[ENTROPY] = 0.f;
  if (!(out.flags & FLAG_MEAN)) value[MEAN_LOGIT] = 0.f;
  if (!(out.flags & FLAG_LOG_SUM_SQ)) value[LOG_SUM_SQ] = 0.f;
#pragma unroll
  for (int i = 0; i < VALUES; ++i) out.values[i * out.rows + out.n] = value[i];
  out.indices[out.n] = out.flags & FLAG_ARGMAX ? i64(state[ARGMAX]) : 0;
  out.indices[out.rows + out.n] = out.flags & FLAG_RANK ? i64(state[RANK]) : 0;
}

__device__ __forceinline__ void write_zero_row(const RowOutput& out) {
#pragma unroll
  for (int i = 0; i < VALUES; ++i) out.values[i * out.rows + out.n] = 0.f;
  out.indices[out.n] = out.indices[out.rows + out.n] = 0;
}

// `slice` follows what `state` (global memory) already holds.
__device__ __forceinline__ void merge_into(double* state, const double (&slice)[STATES], double inv_t, int flags) {
  const double old_peak = state[PEAK], peak = fmax(old_peak, slice[PEAK]);
  const double base = isinf(peak) && peak < 0. ? 0. : peak;
  const double d_old = fmax((old_peak - base) * inv_t, -1e30), d_new = fmax((slice[PEAK] - base) * inv_t, -1e30);
  const double r_old = exp(d_old), r_new = exp(d_new), old_sum = state[SUM];
  state[PEAK] = peak;
  state[SUM] = r_old * old_sum + r_new * slice[SUM];
  if (flags & FLAG_ENTROPY)
    state[WEIGHTED] =
        r_old * (state[WEIGHTED] + d_old * old_sum) + r_new * (slice[WEIGHTED] + d_new * slice[SUM]);
  if (flags & FLAG_LOG_SUM_SQ) state[SQUARES] = r_old * r_old * state[SQUARES] + r_new * r_new * slice[SQUARES];
  if (flags & FLAG_MEAN) state[LOGITS] += slice[LOGITS];
  if (!isnan(slice[LABEL])) state[LABEL] = slice[LABEL];
  if (slice[PEAK] > old_peak) state[ARGMAX] = slice[ARGMAX];
  if (flags & FLAG_RANK) state[RANK] += slice[RANK];
}

}  // namespace fastreward
