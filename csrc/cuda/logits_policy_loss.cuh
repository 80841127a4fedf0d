// Logits straight to the loss's gradient for them: what fastreward/cuda/program/logits_source.py generates stands on this.
//
// Fused: temperature, log-softmax, log-prob of the label and entropy, the loss's derivative for that token (generated
// from its definition), and the derivative of the softmax. A row is one token: it is read, stays on chip while its
// statistics and then its gradient's two coefficients become known, and is written.
// Bytes: N * V * size read and as much written; all else is O(N).
//
// BLOCKS thread blocks share a row: 1, or a cluster of 2, 4 or 8 (sm_90 and later) where a row is more than a block's
// shared memory. Each keeps its slice of the row there as raw 16-byte vectors, f64 states of the slices cross the
// cluster once, and every block then does the same small arithmetic. A row that fits no cluster is read a second time,
// with one block of twice as many threads per multiprocessor, so that the rows under way fit in L2. How a row is cut
// depends on V alone, never on its address: rows that are not 16-byte aligned are funnel-shifted on the way in and
// gathered from shared memory on the way out. In place, every logit of a row is read before the block's (the cluster's)
// barrier and its gradient written after it; where a row is read again, the thread that reads a column is the one that
// then writes it. Rows that do not count are set to 0 and not read.
#pragma once

#include "cuda/device/row_statistics.cuh"
#include "cuda/logprobs_backward.cuh"
#include "cuda/program.cuh"

namespace fastreward {

struct LogitsArguments {
  const void* logits;  // [rows, vocab], `stride` elements from row to row
  i64 stride, vocab;
  const i64* labels;              // [rows]
  const double* inv_temperature;  // [rows] with stride inv_stride, or null: then inv_value
  i64 inv_stride;
  double inv_value;
  const i64* sequences;  // [rows], the sequence of each token; or null: the tokens are padded
  const float* scale;    // []: the gradient is multiplied with it
  void* grad;            // [rows, vocab], the logits' type; may be `logits`
  i64 grad_stride;
  float *logprobs, *entropy;  // [rows]; or null
};

// What the generated function gives: derivatives of the loss for a token's log-prob and entropy.
struct TokenGradient {
  float logprob, entropy;
};

// ------------------------------------------------------------------------------------------------------------- kernels
constexpr int READ_UNROLL = 4;  // vectors of a thread that are loaded together, from memory
constexpr int WRITE_UNROLL = 2;  // and from where the row is kept

// Vector `index` of the row; columns past the end are -inf.
template <class T, bool ALIGNED>
__device__ __forceinline__ uint4 logits_vector(const typename T::Bits* row, int index, int vocab) {
  const int full = vocab / T::LANES;
  const char* p = reinterpret_cast<const char*>(row) + i64(index) * 16;
  if (ALIGNED ? index < full : index > 0 && index < full - 1) return ALIGNED ? load16_readonly(p) : load16_shifted(p);
  float x[T::LANES];
#pragma unroll
  for (int j = 0; j < T::LANES; ++j) {
    const int column = index * T::LANES + j;
    x[j] = column < vocab ? T::decode(row[column]) : negative_infinity();
  }
  return T::pack(x);
}

// One thread's share of vectors [first, last), kept on chip where wanted.
template <class T, int LEVEL, bool ON_CHIP, bool ALIGNED, int BLOCK>
__device__ __forceinline__ Partial read_slice(const typename T::Bits* row, int vocab, int first, int last, float scale,
                                              uint4* on_chip) {
  constexpr int TOGETHER = ALIGNED ? READ_UNROLL : READ_UNROLL / 2;  // shifting takes registers
  Partial p = empty_partial();
#pragma unroll 1
  for (int k = first + int(threadIdx.x); k < last; k += BLOCK * TOGETHER) {
    uint4 v[TOGETHER];
#pragma unroll
    for (int u = 0; u < TOGETHER; ++u) {
      const int index = k + u * BLOCK;
      v[u] = make_uint4(T::NEG_INF, T::NEG_INF, T::NEG_INF, T::NEG_INF);
      if (index < last) v[u] = logits_vector<T, ALIGNED>(row, index, vocab);
    }
    float top = p.max, x[T::LANES];
#pragma unroll
    for (int u = 0; u < TOGETHER; ++u) {
      const int index = k + u * BLOCK;
      if (ON_CHIP && index < last) on_chip[index - first] = v[u];
      T::unpack(v[u], x);
#pragma unroll
      for (int j = 0; j < T::LANES; ++j) top = fmaxf(top, x[j]);
    }
    const float base = finite_base(top);
    fastreward::rescale<LEVEL>(p, base, scale);
    p.max = top;
#pragma unroll
    for (int u = 0; u < TOGETHER; ++u) {
      T::unpack(v[u], x);
#pragma unroll
      for (int j = 0; j < T::LANES; ++j) add_column<LEVEL>(p, x[j], base, scale);
    }
  }
  return p;
}

// The whole row's state, in every lane of each block's first warp, from the slices' states (thread 0's of each block).
template <int BLOCKS>
__device__ __forceinline__ RowState merge_slices(const RowState& mine, double inv_t) {
  __shared__ unsigned words[6];
  if (threadIdx.x == 0) {
    const double state[3] = {mine.peak, mine.sum, mine.weighted};
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      const u64 bits = u64(__double_as_longlong(state[i]));
      words[2 * i] = unsigned(bits), words[2 * i + 1] = unsigned(bits >> 32);
    }
  }
  __syncwarp(FULL);
  cluster_barrier();
  RowState row = mine;
  if (threadIdx.x < WARP) {
    double state[3] = {double(negative_infinity()), 0., 0.};
    if (threadIdx.x < BLOCKS)
#pragma unroll
      for (int i = 0; i < 3; ++i) {
        const u64 low = load_from_rank(words + 2 * i, threadIdx.x);
        const u64 high = load_from_rank(words + 2 * i + 1, threadIdx.x);
        state[i] = __longlong_as_double(i64(low | high << 32));
      }
    row.peak = warp_max(state[0]);
    const double base = isinf(row.peak) && row.peak < 0. ? 0. : row.peak;
    const double shift = fmax((state[0] - base) * inv_t, -1e30), grown = exp(shift);
    row.sum = warp_sum(grown * state[1]);
    row.weighted = warp_sum(grown * (state[2] + shift * state[1]));
  }
  __syncwarp(FULL);
  return row;
}

// Columns [begin, end) of `out`, cut at 16-byte boundaries: single ones up to `head`, `vectors` from there, the rest.
struct Columns {
  int begin, end, head, vectors;
};

template <class T>
__device__ __forceinline__ Columns columns_of(const typename T::Bits* out, int begin, int end) {
  constexpr int SIZE = 16 / T::LANES;
  const int skip = int((16u - misalignment(out + begin)) % 16u) / SIZE;
  Columns c = {begin, end, min(end, begin + skip), 0};
  c.vectors = (end - c.head) / T::LANES;
  return c;
}

template <class T, int BLOCK>
__device__ __forceinline__ void zero_columns(typename T::Bits* out, const Columns& c) {
  for (int j = c.begin + int(threadIdx.x); j < c.head; j += BLOCK) out[j] = T::encode(0.f);
  zero_vectors<T>(out + c.head, 0, c.vectors);
  for (int j = c.head + c.vectors * T::LANES + int(threadIdx.x); j < c.end; j += BLOCK) out[j] = T::encode(0.f);
}

template <class T, bool FULL>
__device__ __forceinline__ float logit_gradient(const RowGradient& r, float x) {
  return to_logit<FULL>(r, x, softmax_gradient<FULL>(r, x));
}

// The gradient of columns c before what the label adds; x[j - c.begin] is logit j, on chip or in memory.
template <class T, bool FULL, int BLOCK>
__device__ __forceinline__ void write_columns(typename T::Bits* out, const typename T::Bits* x, const Columns& c,
                                              const RowGradient& r) {
  for (int j = c.begin + int(threadIdx.x); j < c.head; j += BLOCK)
    out[j] = T::encode(logit_gradient<T, FULL>(r, T::decode(x[j - c.begin])));
  const typename T::Bits* in = x + (c.head - c.begin);
  const bool alike = misalignment(in) == 0;
#pragma unroll 1
  for (int k = int(threadIdx.x); k < c.vectors; k += BLOCK * WRITE_UNROLL) {
    uint4 v[WRITE_UNROLL];
#pragma unroll
    for (int u = 0; u < WRITE_UNROLL; ++u) {
      const int index = k + u * BLOCK;
      if (index >= c.vectors) break;
      if (alike) {
        v[u] = load16(in + i64(index) * T::LANES);
      } else {
        float y[T::LANES];
#pragma unroll
        for (int j = 0; j < T::LANES; ++j) y[j] = T::decode(in[index * T::LANES + j]);
        v[u] = T::pack(y);
      }
    }
#pragma unroll
    for (int u = 0; u < WRITE_UNROLL; ++u) {
      const int index = k + u * BLOCK;
      if (index >= c.vectors) break;
      float y[T::LANES];
      T::unpack(v[u], y);
#pragma unroll
      for (int j = 0; j < T::LANES; ++j) y[j] = logit_gradient<T, FULL>(r, y[j]);
      store16_streaming(out + c.head + i64(index) * T::LANES, T::pack(y));
    }
  }
  for (int j = c.head + c.vectors * T::LANES + int(threadIdx.x); j < c.end; j += BLOCK)
    out[j] = T::encode(logit_gradient<T, FULL>(r, T::decode(x[j - c.begin])));
}

// From the row's state to its log-prob, its entropy and what its gradient is made of.
template <class Loss, class Arguments>
__device__ __forceinline__ RowGradient finish_row(const Arguments& arguments, i64 n, const RowState& s, double inv_t,
                                                  float label_logit, bool write) {
  const LogitsArguments& a = arguments.logits;
  const double log_sum = log(s.sum);
  const bool nothing = s.sum == 0.;  // every logit is -inf
  const float logprob = nothing ? not_a_number() : float((label_logit - s.peak) * inv_t - log_sum);
  float entropy = 0.f;
  if (Loss::ENTROPY) entropy = nothing ? not_a_number() : float(log_sum - s.weighted / s.sum);
  if (write) {
    a.logprobs[n] = logprob;
    if (a.entropy) a.entropy[n] = entropy;
  }
  const i64 sequence = a.sequences ? a.sequences[n] : quotient(n, arguments.side0.width);
  TokenGradient g = Loss::gradient(arguments, n, sequence, logprob, entropy);
  g.logprob *= a.scale[0], g.entropy *= a.scale[0];
  RowGradient r = {};
  r.inv_t = narrow(inv_t), r.peak = float(s.peak), r.peak_logprob = float(-log_sum);
  r.at_label = g.logprob, r.label = a.labels[n];
  r.c0 = g.entropy != 0.f ? float(-double(g.logprob) - double(g.entropy) * entropy) : -g.logprob;
  r.c1 = -g.entropy;
  return r;
}

// One row, or a block's slice of one. `Loss` is generated: ENTROPY (whether the entropy is needed) and gradient().
template <class T, int BLOCKS, bool ON_CHIP, int BLOCK, class Loss, class Arguments>
__device__ __forceinline__ void logits_row(const Arguments& arguments) {
  extern __shared__ uint4 on_chip[];
  typedef typename T::Bits Bits;
  constexpr int LEVEL = Loss::ENTROPY ? WITH_ENTROPY : LEAN;
  const LogitsArguments& a = arguments.logits;
  const i64 n = blockIdx.x / BLOCKS;
  const int part = int(blockIdx.x % BLOCKS), vocab = int(a.vocab);
  const Bits* row = static_cast<const Bits*>(a.logits) + n * a.stride;
  const int vectors = (vocab + T::LANES - 1) / T::LANES, each = (vectors + BLOCKS - 1) / BLOCKS;
  const int first = min(vectors, part * each), last = min(vectors, first + each);
  if (!counts(arguments.side0.mask, int(arguments.side0.mask_kind), n)) {  // the same for the whole cluster
    Bits* out = static_cast<Bits*>(a.grad) + n * a.grad_stride;
    zero_columns<T, BLOCK>(out, columns_of<T>(out, first * T::LANES, min(vocab, last * T::LANES)));
    if (part == 0 && threadIdx.x == 0) {
      a.logprobs[n] = 0.f;
      if (a.entropy) a.entropy[n] = 0.f;
    }
    return;
  }
  const double inv_t = a.inv_temperature ? a.inv_temperature[n * a.inv_stride] : a.inv_value;
  const float scale = narrow(inv_t) * LOG2E, label_logit = logit_at<T>(row, nullptr, a.labels[n], vocab);
  const Partial p = misalignment(row) == 0
                        ? read_slice<T, LEVEL, ON_CHIP, true, BLOCK>(row, vocab, first, last, scale, on_chip)
                        : read_slice<T, LEVEL, ON_CHIP, false, BLOCK>(row, vocab, first, last, scale, on_chip);
  __shared__ ReduceRoom<BLOCK> room;
  __shared__ RowGradient shared_gradient;
  RowState state = reduce_row<LEVEL>(p, scale, room);
  if (BLOCKS > 1) state = merge_slices<BLOCKS>(state, inv_t);
  if (threadIdx.x == 0) shared_gradient = finish_row<Loss>(arguments, n, state, inv_t, label_logit, part == 0);
  if (BLOCKS > 1) {
    __syncwarp(FULL);
    cluster_barrier();  // all have read all: no block leaves, or overwrites the row, before
  } else {
    __syncthreads();
  }
  const RowGradient r = shared_gradient;
  Bits* out = static_cast<Bits*>(a.grad) + n * a.grad_stride;
  const Columns c = columns_of<T>(out, first * T::LANES, min(vocab, last * T::LANES));
  const Bits* in = ON_CHIP ? reinterpret_cast<const Bits*>(on_chip) : row + c.begin;
  if (r.c1 == 0.f)
    write_columns<T, false, BLOCK>(out, in, c, r);
  else
    write_columns<T, true, BLOCK>(out, in, c, r);
  if (r.label < c.begin || r.label >= c.end) return;
  __syncthreads();
  if (threadIdx.x == 0)
    out[r.label] = T::encode(to_logit<true>(r, label_logit, softmax_gradient<true>(r, label_logit) + r.at_label));
}

}  // namespace fastreward
