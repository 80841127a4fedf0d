// Backward of logprobs: dx = inv_t * (p * (c0 + c1 * log p + c2 * p) + upstream at the label and at the ids), written
// once per logit, in place where grad is logits. See logprobs.cu.
#pragma once

#include "cuda/device/row_statistics.cuh"
#include "cuda/logprobs_arguments.cuh"

namespace fastreward {

// ------------------------------------------------------------------------------------------------------------- kernels
constexpr int BACKWARD_THREADS = 256;
constexpr int BACKWARD_UNROLL = 4;

struct RowGradient {
  float inv_t, peak, peak_logprob, c0, c1, c2, inv_softcap;
  float at_label;  // upstream gradient of the label's log-prob
  i64 label;
};

__device__ __forceinline__ RowGradient row_gradient(const BackwardArguments& a, i64 n) {
  const float* g = a.grad_values + n;
  const float* v = a.values + n;
  const i64 rows = a.rows;
  RowGradient r;
  r.inv_t = narrow(a.inv_temperature ? a.inv_temperature[n * a.inv_stride] : a.inv_value);
  r.peak = v[MAX_LOGIT * rows];
  r.peak_logprob = v[MAX_LOGPROB * rows];
  r.inv_softcap = float(a.inv_softcap);
  r.at_label = g[LOGPROB * rows];
  r.label = a.labels[n];
  const float g_entropy = g[ENTROPY * rows], g_squares = g[LOG_SUM_SQ * rows];
  double c0 = double(g[LOGSUMEXP * rows]) - r.at_label - 2. * g_squares;
  if (g_entropy != 0.f) c0 -= double(g_entropy) * v[ENTROPY * rows];
  if (a.grad_ids)
    for (i64 k = 0; k < a.ids_count; ++k) c0 -= a.grad_ids[n * a.ids_count + k];
  r.c0 = float(c0);
  r.c1 = -g_entropy;
  r.c2 = g_squares != 0.f ? 2.f * g_squares * expf(-v[LOG_SUM_SQ * rows]) : 0.f;
  return r;
}

// Gradient of one logit before the terms at the label and at ids; FULL has the entropy's and the squares' terms.
template <bool FULL>
__device__ __forceinline__ float softmax_gradient(const RowGradient& r, float x) {
  const float logp = fmaf(x - r.peak, r.inv_t, r.peak_logprob), p = exp2_fast(logp * LOG2E);
  if (!FULL) return p * r.c0;
  return p * fmaf(r.c2, p, fmaf(r.c1, fmaxf(logp, FAR_BELOW), r.c0));  // 0 * -inf must be 0
}

template <bool FULL>
__device__ __forceinline__ float to_logit(const RowGradient& r, float x, float dz) {
  if (!FULL || r.inv_softcap == 0.f) return dz * r.inv_t;
  const float tanh_x = x * r.inv_softcap;
  return dz * r.inv_t * fmaf(-tanh_x, tanh_x, 1.f);
}

// Entry 0 is the label, entry k + 1 is ids[k].
__device__ __forceinline__ i64 entry_column(const BackwardArguments& a, const RowGradient& r, i64 n, i64 entry) {
  return entry == 0 ? r.label : a.ids[n * a.ids_stride + entry - 1];
}

__device__ __forceinline__ i64 entries_of(const BackwardArguments& a) { return 1 + (a.grad_ids ? a.ids_count : 0); }

// The whole gradient of column j, duplicates among label and ids added up.
__device__ __forceinline__ float gradient_with_entries(const BackwardArguments& a, const RowGradient& r, i64 n, i64 j,
                                                       float x) {
  double dz = softmax_gradient<true>(r, x);
  for (i64 e = 0; e < entries_of(a); ++e)
    if (entry_column(a, r, n, e) == j) dz += e == 0 ? r.at_label : a.grad_ids[n * a.ids_count + e - 1];
  return to_logit<true>(r, x, float(dz));
}

template <class T, bool FULL>
__device__ __forceinline__ void store_gradient(typename T::Bits* out, const typename T::Bits* in, i64 j,
                                               const RowGradient& r, bool zero) {
  const float x = zero ? 0.f : T::decode(in[j]);
  out[j] = T::encode(zero ? 0.f : to_logit<FULL>(r, x, softmax_gradient<FULL>(r, x)));
}

// Vectors [begin, end) of a row whose logits and gradient are 16-byte aligned from `in` and `out` on.
template <class T, bool FULL>
__device__ __forceinline__ void store_vectors(typename T::Bits* out, const typename T::Bits* in, int begin, int end,
                                              const RowGradient& r) {
  for (int first = begin + int(threadIdx.x); first < end; first += BACKWARD_THREADS * BACKWARD_UNROLL) {
    uint4 v[BACKWARD_UNROLL];
#pragma unroll
    for (int u = 0; u < BACKWARD_UNROLL; ++u) {
      const int index = first + u * BACKWARD_THREADS;
      if (index < end) v[u] = load16(in + i64(index) * T::LANES);
    }
#pragma unroll
    for (int u = 0; u < BACKWARD_UNROLL; ++u) {
      const int index = first + u * BACKWARD_THREADS;
      if (index < end) {
        float x[T::LANES];
        T::unpack(v[u], x);
#pragma unroll
        for (int j = 0; j < T::LANES; ++j) x[j] = to_logit<FULL>(r, x[j], softmax_gradient<FULL>(r, x[j]));
        store16_streaming(out + i64(index) * T::LANES, T::pack(x));
      }
    }
  }
}

template <class T>
__device__ __forceinline__ void zero_vectors(typename T::Bits* out, int begin, int end) {
  for (int index = begin + int(threadIdx.x); index < end; index += int(blockDim.x))
    store16_streaming(out + i64(index) * T::LANES, make_uint4(0u, 0u, 0u, 0u));
}

// Columns [begin, end) of one row, of which those from `head` on come as `vectors`-counted 16-byte vectors.
struct Share {
  i64 begin, end;     // columns
  i64 head;           // first column of vector 0
  int first, last;    // vectors; none where logits and gradient are aligned differently
};

template <class T>
__device__ __forceinline__ Share share_of(const void* in, const void* out, i64 vocab, i64 chunk, i64 index, i64 chunks) {
  constexpr int SIZE = 16 / T::LANES;
  const bool alike = misalignment(in) == misalignment(out);
  Share s;
  s.head = alike ? min(i64((16u - misalignment(in)) % 16u) / SIZE, vocab) : 0;
  const i64 vectors = (vocab - s.head) / T::LANES, last = index == chunks - 1 ? vectors : min(vectors, (index + 1) * chunk);
  s.begin = index == 0 ? 0 : min(vocab, s.head + index * chunk * T::LANES);
  s.end = index == chunks - 1 ? vocab : s.head + last * T::LANES;
  s.first = alike ? int(min(vectors, index * chunk)) : 0;
  s.last = alike ? int(last) : 0;
  return s;
}

// A block's share of a row. What the label and the ids add is computed before anything of this share is overwritten,
// kept in shared memory (one float per entry) and written last.
template <class T>
__device__ __forceinline__ void backward_chunk(const BackwardArguments& a) {
  extern __shared__ float entry_gradient[];
  typedef typename T::Bits Bits;
  const i64 block = gridDim.x - 1 - blockIdx.x, n = block / a.chunks;
  const Bits* in = static_cast<const Bits*>(a.logits) + n * a.stride;
  Bits* out = static_cast<Bits*>(a.grad) + n * a.grad_stride;
  const Share s = share_of<T>(in, out, a.vocab, a.chunk, block % a.chunks, a.chunks);
  const i64 head = s.last > s.first ? s.head + i64(s.first) * T::LANES : s.end;  // first column of a vector
  const i64 tail = s.last > s.first ? s.head + i64(s.last) * T::LANES : s.end;   // first one after the vectors
  if (a.mask && !a.mask[n]) {
    const RowGradient none = {};
    for (i64 j = s.begin + threadIdx.x; j < head; j += BACKWARD_THREADS) store_gradient<T, false>(out, in, j, none, true);
    zero_vectors<T>(out + s.head, s.first, s.last);
    for (i64 j = tail + threadIdx.x; j < s.end; j += BACKWARD_THREADS) store_gradient<T, false>(out, in, j, none, true);
    return;
  }
  const RowGradient r = row_gradient(a, n);
  const unsigned char* keep = a.keep ? a.keep + n * a.keep_stride : nullptr;
  const i64 entries = entries_of(a);
  const bool fix = entries > 1 || (r.label >= s.begin && r.label < s.end);
  if (fix) {
    for (i64 e = threadIdx.x; e < entries; e += BACKWARD_THREADS) {
      const i64 j = entry_column(a, r, n, e);
      if (j >= s.begin && j < s.end && (!keep || keep[j]))
        entry_gradient[e] = gradient_with_entries(a, r, n, j, T::decode(in[j]));
    }
    __syncthreads();
  }
  if (keep) {
    for (i64 j = s.begin + threadIdx.x; j < s.end; j += BACKWARD_THREADS)
      store_gradient<T, true>(out, in, j, r, !keep[j]);
  } else {
    for (i64 j = s.begin + threadIdx.x; j < head; j += BACKWARD_THREADS) store_gradient<T, true>(out, in, j, r, false);
    if (r.c1 == 0.f && r.c2 == 0.f && r.inv_softcap == 0.f)
      store_vectors<T, false>(out + s.head, in + s.head, s.first, s.last, r);
    else
      store_vectors<T, true>(out + s.head, in + s.head, s.first, s.last, r);
    for (i64 j = tail + threadIdx.x; j < s.end; j += BACKWARD_THREADS) store_gradient<T, true>(out, in, j, r, false);
  }
  if (!fix) return;
  __syncthreads();
  for (i64 e = threadIdx.x; e < entries; e += BACKWARD_THREADS) {
    const i64 j = entry_column(a, r, n, e);
    if (j >= s.begin && j < s.end && (!keep || keep[j])) out[j] = T::encode(entry_gradient[e]);
  }
}

}  // namespace fastreward
