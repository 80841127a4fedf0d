// logprobs over a kept set that comes as ids (top-k / top-p replay): only those logits are read, so a row costs
// kept_count gathers instead of the vocabulary. One block per row. See logprobs.cu.
#pragma once

#include "cuda/logprobs_backward.cuh"

namespace fastreward {

// ------------------------------------------------------------------------------------------------------------- kernels
constexpr int KEPT_THREADS = 128;

__device__ __forceinline__ bool is_kept(const i64* kept, i64 count, i64 j) {
  for (i64 k = 0; k < count; ++k)
    if (kept[k] == j) return true;
  return false;
}

// Raw logit of column j: -inf where it is not kept, NaN where it is no column.
template <class T>
__device__ __forceinline__ float kept_logit(const typename T::Bits* row, const i64* kept, i64 count, i64 j, i64 vocab) {
  if (j < 0 || j >= vocab) return not_a_number();
  return is_kept(kept, count, j) ? T::decode(row[j]) : negative_infinity();
}

template <class T>
__device__ __forceinline__ void kept_forward_row(const ForwardArguments& a) {
  const i64 n = blockIdx.x;
  const RowOutput out = {a.values, a.indices, a.rows, n, int(a.flags)};
  if (a.mask && !a.mask[n]) {
    if (threadIdx.x == 0) write_zero_row(out);
    for (i64 k = threadIdx.x; k < a.ids_count; k += KEPT_THREADS) a.id_logprobs[n * a.ids_count + k] = 0.f;
    return;
  }
  const typename T::Bits* row = static_cast<const typename T::Bits*>(a.logits) + n * a.stride;
  const i64* kept = a.kept + n * a.kept_stride;
  const double inv_t = a.inv_temperature ? a.inv_temperature[n * a.inv_stride] : a.inv_value;
  const float scale = narrow(inv_t) * LOG2E;
  const float label_logit = kept_logit<T>(row, kept, a.kept_count, a.labels[n], a.vocab);
  Partial p = empty_partial();
  for (i64 k = threadIdx.x; k < a.kept_count; k += KEPT_THREADS) {
    const i64 j = kept[k];
    if (j < 0 || j >= a.vocab) continue;
    const float x = T::decode(row[j]);
    if (x > p.max || (x == p.max && x > negative_infinity() && unsigned(j) < p.at)) p.at = unsigned(j);
    const float top = fmaxf(p.max, x), base = finite_base(top);
    rescale<EVERYTHING>(p, base, scale);
    p.max = top;
    add_column<EVERYTHING>(p, x, base, scale);
    p.logits += x;
    p.rank += x > label_logit;
    ++p.kept;
  }
  __shared__ ReduceRoom<KEPT_THREADS> room;
  __shared__ double peak_and_log_sum[2];
  const RowState sum = reduce_row<EVERYTHING>(p, scale, room);
  if (threadIdx.x == 0) {
    const double argmax = sum.at == NOWHERE ? 0. : double(sum.at);
    const double state[STATES] = {sum.peak,   sum.sum,     sum.weighted, sum.squares,
                                  sum.logits, label_logit, argmax,       double(sum.rank)};
    write_row(out, state, inv_t, double(sum.kept));
    peak_and_log_sum[0] = sum.peak, peak_and_log_sum[1] = log(sum.sum);
  }
  __syncthreads();
  for (i64 k = threadIdx.x; k < a.ids_count; k += KEPT_THREADS) {
    const double x = kept_logit<T>(row, kept, a.kept_count, a.ids[n * a.ids_stride + k], a.vocab);
    a.id_logprobs[n * a.ids_count + k] = float((x - peak_and_log_sum[0]) * inv_t - peak_and_log_sum[1]);
  }
}

// Gradients of the kept logits wait in shared memory (one float per kept id) while the row is set to 0.
template <class T>
__device__ __forceinline__ void kept_backward_row(const BackwardArguments& a) {
  extern __shared__ float kept_gradient[];
  typedef typename T::Bits Bits;
  const i64 n = gridDim.x - 1 - blockIdx.x;
  const Bits* in = static_cast<const Bits*>(a.logits) + n * a.stride;
  Bits* out = static_cast<Bits*>(a.grad) + n * a.grad_stride;
  const i64* kept = a.kept + n * a.kept_stride;
  const bool counted = !a.mask || a.mask[n];
  if (counted) {
    const RowGradient r = row_gradient(a, n);
    for (i64 k = threadIdx.x; k < a.kept_count; k += KEPT_THREADS)
      if (kept[k] >= 0 && kept[k] < a.vocab)
        kept_gradient[k] = gradient_with_entries(a, r, n, kept[k], T::decode(in[kept[k]]));
    __syncthreads();
  }
  const Share s = share_of<T>(out, out, a.vocab, a.vocab, 0, 1);
  for (i64 j = threadIdx.x; j < s.head; j += KEPT_THREADS) out[j] = T::encode(0.f);
  zero_vectors<T>(out + s.head, s.first, s.last);
  for (i64 j = s.head + i64(s.last) * T::LANES + threadIdx.x; j < a.vocab; j += KEPT_THREADS) out[j] = T::encode(0.f);
  if (!counted) return;
  __syncthreads();
  for (i64 k = threadIdx.x; k < a.kept_count; k += KEPT_THREADS)
    if (kept[k] >= 0 && kept[k] < a.vocab) out[kept[k]] = T::encode(kept_gradient[k]);
}

}  // namespace fastreward
