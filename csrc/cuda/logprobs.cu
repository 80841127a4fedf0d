// Per-token statistics of a row of logits, forward and backward.
//
// Fused: temperature, kept set, log-softmax, gather at the label and at further ids, entropy, sum of squared
// probabilities, mean, argmax and rank, in one sweep over the row; no [N, V] temporary exists. Backward: the gradient of
// all of them together, in one sweep, in place where the caller likes.
// Bytes: forward N * V * size, read once; backward N * V * size read and as much written. All else is O(N).
//
// One thread block per row. A thread owns 16-byte vectors of columns, fixed by V alone and never by the row's address
// (rows that are not 16-byte aligned are funnel-shifted together from aligned loads), holds the online maximum and sums
// in registers, and the block merges its threads in a fixed order: a row's bits do not depend on the batch, nor on the
// row's place in it. The row is cut into slices of whole sweeps (a sweep is one vector per thread), again by V alone; a
// thread starts every slice afresh and merges the slices in their order. With few rows, a cluster of SLICES blocks
// (sm_90 and later) takes one slice each and its first block merges them through distributed shared memory in the very
// same order: same bits, a SLICES-th of the time. Backward is elementwise and cut freely; its blocks run in reverse
// order, because the last rows that the forward read are the ones that the L2 cache still holds.
//
// FASTREWARD_ONLY_F32, _BF16 or _F16 builds one element type only (the CuPy route compiles what is called).
#include "cuda/device/row_statistics.cuh"
#include "cuda/logprobs_arguments.cuh"
#include "cuda/logprobs_backward.cuh"
#include "cuda/logprobs_kept_ids.cuh"

namespace fastreward {

// ------------------------------------------------------------------------------------------------------------- kernels
constexpr int FORWARD_THREADS = 512;
constexpr int SLICES = 8;
constexpr int UNROLL = 2;  // vectors of a thread that are loaded together, while the two before them are summed

template <class T>
struct Vectors {
  uint4 v[UNROLL];
};

// Vector `index` of the row; columns past the end are -inf.
template <class T, bool ALIGNED>
__device__ __forceinline__ uint4 load_vector(const typename T::Bits* row, int index, int vocab) {
  const int full = vocab / T::LANES;
  const char* p = reinterpret_cast<const char*>(row) + i64(index) * 16;
  if (ALIGNED ? index < full : index > 0 && index < full - 1) return ALIGNED ? load16_readonly(p) : load16_shifted(p);
  uint4 v = make_uint4(T::NEG_INF, T::NEG_INF, T::NEG_INF, T::NEG_INF);
  const int begin = index * T::LANES;
  if (begin < vocab) {
    float x[T::LANES];
#pragma unroll
    for (int j = 0; j < T::LANES; ++j) x[j] = begin + j < vocab ? T::decode(row[begin + j]) : negative_infinity();
    v = T::pack(x);
  }
  return v;
}

template <class T, bool ALIGNED>
__device__ __forceinline__ Vectors<T> load_batch(const typename T::Bits* row, int sweep, int vocab) {
  Vectors<T> batch;
#pragma unroll
  for (int u = 0; u < UNROLL; ++u)
    batch.v[u] = load_vector<T, ALIGNED>(row, (sweep + u) * FORWARD_THREADS + int(threadIdx.x), vocab);
  return batch;
}

// Adds UNROLL vectors to p.
template <class T, int LEVEL, bool KEEP>
__device__ __forceinline__ void accumulate(Partial& p, const Vectors<T>& batch, int sweep, int vocab, float scale,
                                           float label_logit, const unsigned char* keep) {
  float x[UNROLL][T::LANES], top = p.max;
#pragma unroll
  for (int u = 0; u < UNROLL; ++u) {
    T::unpack(batch.v[u], x[u]);
    const int index = (sweep + u) * FORWARD_THREADS + int(threadIdx.x), begin = index * T::LANES;
    if (LEVEL >= EVERYTHING) {
#pragma unroll
      for (int j = 0; j < T::LANES; ++j) {
        bool counted = begin + j < vocab;
        if (KEEP) {
          counted = counted && keep[begin + j];
          p.kept += counted;
          x[u][j] = counted ? x[u][j] : negative_infinity();
        }
        p.logits += counted ? x[u][j] : 0.f;
        p.rank += x[u][j] > label_logit;
      }
    }
    float peak = x[u][0];
#pragma unroll
    for (int j = 1; j < T::LANES; ++j) peak = fmaxf(peak, x[u][j]);
    if (LEVEL >= WITH_ENTROPY && peak > top) p.at = unsigned(index);
    top = fmaxf(top, peak);
  }
  const float base = finite_base(top);
  rescale<LEVEL>(p, base, scale);
  p.max = top;
#pragma unroll
  for (int u = 0; u < UNROLL; ++u)
#pragma unroll
    for (int j = 0; j < T::LANES; ++j) add_column<LEVEL>(p, x[u][j], base, scale);
}

// Sweeps [first, last) of the row; slices that end inside are merged into the result in order.
template <class T, int LEVEL, bool KEEP, bool ALIGNED>
__device__ __forceinline__ Partial stream(const typename T::Bits* row, const unsigned char* keep, int vocab, int first,
                                          int last, int sweeps, float scale, float label_logit) {
  Partial total = empty_partial(), slice = empty_partial();
  Vectors<T> next = load_batch<T, ALIGNED>(row, first, vocab);
  int left = sweeps;
  for (int k = first; k < last; k += UNROLL) {
    const Vectors<T> batch = next;
    if (k + UNROLL < last) next = load_batch<T, ALIGNED>(row, k + UNROLL, vocab);
    accumulate<T, LEVEL, KEEP>(slice, batch, k, vocab, scale, label_logit, keep);
    left -= UNROLL;
    if (left == 0 || k + UNROLL >= last) {
      total = merge<LEVEL>(total, slice, scale);
      slice = empty_partial();
      left = sweeps;
    }
  }
  return total;
}

// The first block of the cluster merges all blocks' partials, thread by thread, in the order of the slices.
template <int LEVEL>
__device__ __forceinline__ Partial merge_cluster(const Partial& mine, unsigned block, float scale) {
  __shared__ unsigned room[PARTIAL_WORDS][FORWARD_THREADS];
  const int t = threadIdx.x;
  room[0][t] = __float_as_uint(mine.max), room[1][t] = __float_as_uint(mine.sum);
  room[2][t] = __float_as_uint(mine.weighted), room[3][t] = __float_as_uint(mine.squares);
  room[4][t] = __float_as_uint(mine.logits), room[5][t] = mine.rank, room[6][t] = mine.at, room[7][t] = mine.kept;
  cluster_barrier();
  Partial total = empty_partial();
  if (block == 0) {
    for (unsigned from = 0; from < SLICES; ++from) {
      unsigned word[PARTIAL_WORDS];
#pragma unroll
      for (int i = 0; i < PARTIAL_WORDS; ++i) word[i] = load_from_rank(&room[i][t], from);
      Partial slice;
      slice.max = __uint_as_float(word[0]), slice.sum = __uint_as_float(word[1]);
      slice.weighted = __uint_as_float(word[2]), slice.squares = __uint_as_float(word[3]);
      slice.logits = __uint_as_float(word[4]), slice.rank = word[5], slice.at = word[6], slice.kept = word[7];
      total = merge<LEVEL>(total, slice, scale);
    }
  }
  cluster_barrier();  // no block leaves while its shared memory is read
  return total;
}

// The first column in vector `index` that holds `peak`.
template <class T>
__device__ __forceinline__ i64 column_of_peak(const typename T::Bits* row, const unsigned char* keep, unsigned index,
                                              float peak, i64 vocab) {
  if (index == NOWHERE) return 0;  // nothing but -inf, or NaN
  i64 j = i64(index) * T::LANES;
  while (j + 1 < vocab && logit_at<T>(row, keep, j, vocab) != peak) ++j;
  return j;
}

template <class T, int LEVEL, bool KEEP, int CLUSTER>
__device__ __forceinline__ void forward_row(const ForwardArguments& a) {
  const i64 n = blockIdx.x / CLUSTER;
  const unsigned part = blockIdx.x % CLUSTER;
  const int vocab = int(a.vocab);
  const RowOutput out = {a.values, a.indices, a.rows, n, int(a.flags)};
  if (a.mask && !a.mask[n]) {  // the same for the whole cluster
    if (part == 0) {
      if (threadIdx.x == 0) write_zero_row(out);
      for (int k = threadIdx.x; k < int(a.ids_count); k += FORWARD_THREADS) a.id_logprobs[n * a.ids_count + k] = 0.f;
    }
    return;
  }
  const typename T::Bits* row = static_cast<const typename T::Bits*>(a.logits) + n * a.stride;
  const unsigned char* keep = KEEP ? a.keep + n * a.keep_stride : nullptr;
  const double inv_t = a.inv_temperature ? a.inv_temperature[n * a.inv_stride] : a.inv_value;
  const float scale = narrow(inv_t) * LOG2E;
  const i64 label = a.labels[n] - a.vocab_start;
  float threshold = not_a_number();
  if (LEVEL >= EVERYTHING) threshold = a.label_logits ? a.label_logits[n] : logit_at<T>(row, keep, label, vocab);

  constexpr int PER_SWEEP = FORWARD_THREADS * T::LANES;
  const int all = (vocab + PER_SWEEP - 1) / PER_SWEEP, sweeps = int(a.sweeps);
  const int first = CLUSTER > 1 ? int(part) * sweeps : 0;
  const int last = CLUSTER > 1 ? min(first + sweeps, all) : all;
  Partial p = misalignment(row) == 0
                  ? stream<T, LEVEL, KEEP, true>(row, keep, vocab, first, last, sweeps, scale, threshold)
                  : stream<T, LEVEL, KEEP, false>(row, keep, vocab, first, last, sweeps, scale, threshold);
  if (CLUSTER > 1) {
    p = merge_cluster<LEVEL>(p, part, scale);
    if (part != 0) return;
  }
  __shared__ ReduceRoom<FORWARD_THREADS> room;
  __shared__ double peak_and_log_sum[2];
  const RowState sum = reduce_row<LEVEL>(p, scale, room);
  if (threadIdx.x == 0) {
    double state[STATES] = {sum.peak, sum.sum, sum.weighted, sum.squares, sum.logits, 0., 0., double(sum.rank)};
    state[LABEL] = logit_at<T>(row, keep, label, vocab);
    if (LEVEL >= WITH_ENTROPY)
      state[ARGMAX] = double(column_of_peak<T>(row, keep, sum.at, float(sum.peak), vocab) + a.vocab_start);
    if (a.state)
      merge_into(a.state + n * STATES, state, inv_t, int(a.flags));
    else
      write_row(out, state, inv_t, KEEP ? double(sum.kept) : double(a.vocab));
    peak_and_log_sum[0] = sum.peak, peak_and_log_sum[1] = log(sum.sum);
  }
  if (a.ids_count == 0) return;
  __syncthreads();
  const double peak = peak_and_log_sum[0], log_sum = peak_and_log_sum[1];
  for (int k = threadIdx.x; k < int(a.ids_count); k += FORWARD_THREADS) {
    const double x = logit_at<T>(row, keep, a.ids[n * a.ids_stride + k], vocab);
    a.id_logprobs[n * a.ids_count + k] = float((x - peak) * inv_t - log_sum);
  }
}

}  // namespace fastreward

// ---------------------------------------------------------------------------------------------------------- launchers
// One entry per variant: logprobs_forward_<type>_<what>[_cluster]. Grid: rows, times SLICES with a cluster.
using namespace fastreward;

// state [rows, STATES] to outputs, one thread per row.
extern "C" __global__ void __launch_bounds__(256) logprobs_finish(const FinishArguments a) {
  const i64 n = i64(blockIdx.x) * blockDim.x + threadIdx.x;
  if (n >= a.rows) return;
  double state[STATES];
#pragma unroll
  for (int i = 0; i < STATES; ++i) state[i] = a.state[n * STATES + i];
  const double inv_t = a.inv_temperature ? a.inv_temperature[n * a.inv_stride] : a.inv_value;
  write_row({a.values, a.indices, a.rows, n, int(a.flags)}, state, inv_t, double(a.vocab));
}

// Two blocks of 512 threads on a multiprocessor leave 64 registers to a thread; the kept-mask kernels need a few more.
#define FASTREWARD_FORWARD(type, T, what, level, keep)                                                          \
  extern "C" __global__ void __launch_bounds__(FORWARD_THREADS, keep ? 1 : 2)                                   \
      logprobs_forward_##type##_##what(const ForwardArguments a) {                                              \
    forward_row<T, level, keep, 1>(a);                                                                          \
  }                                                                                                             \
  extern "C" __global__ void __launch_bounds__(FORWARD_THREADS, keep ? 1 : 2) FASTREWARD_CLUSTER(8)             \
      logprobs_forward_##type##_##what##_cluster(const ForwardArguments a) {                                    \
    forward_row<T, level, keep, SLICES>(a);                                                                     \
  }

#define FASTREWARD_TYPE(type, T)                                                                                \
  FASTREWARD_FORWARD(type, T, lean, LEAN, false)                                                                \
  FASTREWARD_FORWARD(type, T, entropy, WITH_ENTROPY, false)                                                     \
  FASTREWARD_FORWARD(type, T, everything, EVERYTHING, false)                                                    \
  FASTREWARD_FORWARD(type, T, keep, EVERYTHING, true)                                                           \
  extern "C" __global__ void __launch_bounds__(KEPT_THREADS) logprobs_forward_##type##_ids(                     \
      const ForwardArguments a) {                                                                           \
    kept_forward_row<T>(a);                                                                                     \
  }                                                                                                             \
  extern "C" __global__ void __launch_bounds__(BACKWARD_THREADS, 4) logprobs_backward_##type(                   \
      const BackwardArguments a) {                                                                              \
    backward_chunk<T>(a);                                                                                       \
  }                                                                                                             \
  extern "C" __global__ void __launch_bounds__(KEPT_THREADS, 8) logprobs_backward_##type##_ids(                 \
      const BackwardArguments a) {                                                                              \
    kept_backward_row<T>(a);                                                                                    \
  }

#if !defined(FASTREWARD_ONLY_BF16) && !defined(FASTREWARD_ONLY_F16)
FASTREWARD_TYPE(f32, F32)
#endif
#if !defined(FASTREWARD_ONLY_F32) && !defined(FASTREWARD_ONLY_F16)
FASTREWARD_TYPE(bf16, BF16)
#endif
#if !defined(FASTREWARD_ONLY_F32) && !defined(FASTREWARD_ONLY_BF16)
FASTREWARD_TYPE(f16, F16)
#endif

#ifndef __CUDACC_RTC__
#define FASTREWARD_ENTRY(name, Arguments) {#name, reinterpret_cast<const void*>(&name), sizeof(Arguments)}
#define FASTREWARD_PAIR(name) \
  FASTREWARD_ENTRY(name, ForwardArguments), FASTREWARD_ENTRY(name##_cluster, ForwardArguments)
#define FASTREWARD_ENTRIES(type)                                                                                \
  FASTREWARD_PAIR(logprobs_forward_##type##_lean), FASTREWARD_PAIR(logprobs_forward_##type##_entropy),          \
      FASTREWARD_PAIR(logprobs_forward_##type##_everything), FASTREWARD_PAIR(logprobs_forward_##type##_keep),   \
      FASTREWARD_ENTRY(logprobs_forward_##type##_ids, ForwardArguments),                                    \
      FASTREWARD_ENTRY(logprobs_backward_##type, BackwardArguments),                                            \
      FASTREWARD_ENTRY(logprobs_backward_##type##_ids, BackwardArguments)

fastreward::KernelTable fastreward::logprobs_kernels() {
  static const Kernel kernels[] = {FASTREWARD_ENTRIES(f32), FASTREWARD_ENTRIES(bf16), FASTREWARD_ENTRIES(f16),
                                   FASTREWARD_ENTRY(logprobs_finish, FinishArguments)};
  return {kernels, sizeof(kernels) / sizeof(kernels[0])};
}
#endif
