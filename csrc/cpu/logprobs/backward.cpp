// Gradient of logprobs, entropy, logsumexp, log_sum_sq_probs and id_logprobs for the logits, in one pass: each logit is
// read once and its gradient written once, into a fresh array or over the logits themselves.
//
// With e_j = exp((x_j - m) * inv_temperature), m the largest logit of the row, and everything that is constant in a row
// folded into a, b, c, a column costs e * (a + b * (x - m) + c * e). The few columns with an upstream
// gradient of their own (the label, token_ids) are then written over in float64, so that nothing is rounded twice.
// Large fresh gradients are written past the caches: reading them in first would cost a third of the traffic.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "cpu/logprobs/rows.hpp"

namespace fastreward::FASTREWARD_ISA {
namespace {

using namespace simd;
using namespace logprobs;

// What an extreme temperature makes of a gradient stays finite, in bfloat16 too: an infinite factor of a 0 is a NaN.
inline double bounded(double x) {
  const double most = 3.3e38;
  return x > most ? most : x < -most ? -most : x;
}

// A row's gradient in float64: dz = p (c0 + c1 log p + c2 p) + amount, dx = dz * inv_temperature * softcap's factor.
struct RowGradient {
  double inv_temperature, max_logit, max_logprob, c0, c1, c2, inv_softcap;

  double at(double x, double amount) const {
    const double logp = (x - max_logit) * inv_temperature + max_logprob;
    const double p = std::exp(logp);
    const double dz = p == 0.0 ? 0.0 : p * (c0 + c1 * logp + c2 * p);
    const double u = inv_softcap == 0.0 || std::isinf(x) ? 0.0 : x * inv_softcap;
    return bounded((dz + amount) * inv_temperature * (1.0 - u * u));
  }
};

// The same in floats, for every column at once.
struct RowKernel {
  ExpScale scale;
  F32 middle, a, b, c, inv_softcap, floor;
};

enum Mode { kFlat, kCurved, kCapped };  // b = c = 0; all of them; and the softcap's factor

RowKernel row_kernel(const RowGradient& g) {
  const double k = g.max_logprob;
  const double scale = std::exp(k) * g.inv_temperature;
  RowKernel r;
  r.scale = exp_scale(g.inv_temperature);
  r.middle = f32(static_cast<float>(g.max_logit));
  r.a = f32(static_cast<float>(bounded(scale * (g.c0 + g.c1 * k))));
  r.b = f32(static_cast<float>(bounded(scale * g.c1 * g.inv_temperature)));
  r.c = f32(static_cast<float>(bounded(scale * std::exp(k) * g.c2)));
  r.inv_softcap = f32(static_cast<float>(g.inv_softcap));
  r.floor = f32(g.inv_softcap == 0.0 ? -3.0e38f : static_cast<float>(-1.0 / g.inv_softcap));
  return r;
}

// -------------------------------------------------------------------------------------------------------- kernels
template <int kMode>
inline F32 gradient(F32 x, const RowKernel& r) {
  const F32 d = clamp_exponent(x - r.middle, r.scale);
  const F32 e = exp_scaled_or_zero(d, r.scale);
  if (kMode == kFlat) return e * r.a;
  const F32 y = e * fma(e, r.c, fma(d, r.b, r.a));
  if (kMode == kCurved) return y;
  const F32 u = max(r.floor, x) * r.inv_softcap;  // -inf is taken as -cap: its factor is 0
  return y * fnma(u, u, f32(1.0f));
}

template <class T, int kMode>
inline void gradient_vector(const T* x, T* out, int n, const RowKernel& r) {
  if (n == kF32) store(out, gradient<kMode>(load(x), r));
  else store_n(out, gradient<kMode>(load_n(x, n, 0.0f), r), n);
}

template <class T, int kMode, bool kStream>
void gradient_columns(const T* x, T* out, std::int64_t n, const RowKernel& row) {
  const RowKernel r = row;
  std::int64_t i = 0;
  if (kStream) {  // up to the first whole cache line
    const std::uintptr_t past = reinterpret_cast<std::uintptr_t>(out) % 64;
    const auto head = static_cast<std::int64_t>((64 - past) % 64 / sizeof(T));
    for (const std::int64_t end = head < n ? head : n; i < end;) {
      const int left = end - i < kF32 ? static_cast<int>(end - i) : kF32;
      gradient_vector<T, kMode>(x + i, out + i, left, r);
      i += left;
    }
  }
  for (; i + 4 * kF32 <= n; i += 4 * kF32) {
    F32 v[4];
    load2(x + i, v[0], v[1]);
    load2(x + i + 2 * kF32, v[2], v[3]);
    for (F32& u : v) u = gradient<kMode>(u, r);
    if (kStream) {
      stream2(out + i, v[0], v[1]);
      stream2(out + i + 2 * kF32, v[2], v[3]);
    } else {
      store2(out + i, v[0], v[1]);
      store2(out + i + 2 * kF32, v[2], v[3]);
    }
  }
  for (; i < n; i += kF32)
    gradient_vector<T, kMode>(x + i, out + i, n - i < kF32 ? static_cast<int>(n - i) : kF32, r);
  if (kStream) fence();
}

template <class T, int kMode>
void gradient_columns(const T* x, T* out, std::int64_t n, const RowKernel& r, bool streaming) {
  if (streaming) gradient_columns<T, kMode, true>(x, out, n, r);
  else gradient_columns<T, kMode, false>(x, out, n, r);
}

template <class T>
void gradient_columns(const T* x, T* out, std::int64_t n, const RowGradient& g, const RowKernel& r, bool streaming) {
  if (g.inv_softcap != 0.0) gradient_columns<T, kCapped>(x, out, n, r, streaming);
  else if (g.c1 != 0.0 || g.c2 != 0.0) gradient_columns<T, kCurved>(x, out, n, r, streaming);
  else gradient_columns<T, kFlat>(x, out, n, r, streaming);
}

// A block of the forward's exponentials times one number: whole steps of four vectors in load2's order, the rest as it is.
template <class T, bool kStream>
void scaled_columns(const float* e, T* out, int n, F32 by) {
  const F32 least = f32(2.5e-38f);  // what the forward's clamp stands for is 0
  const auto gradient = [&](F32 x) { return select(x < least, f32(0.0f), x * by); };
  int i = 0;
  for (; i + 4 * kF32 <= n; i += 4 * kF32) {
    F32 v[4];
    for (int u = 0; u < 4; ++u) v[u] = gradient(load(e + i + u * kF32));
    if (kStream) {
      stream2(out + i, v[0], v[1]);
      stream2(out + i + 2 * kF32, v[2], v[3]);
    } else {
      store2(out + i, v[0], v[1]);
      store2(out + i + 2 * kF32, v[2], v[3]);
    }
  }
  for (; i < n; i += kF32) {
    const int left = n - i < kF32 ? n - i : kF32;
    if (left == kF32) store(out + i, gradient(load(e + i)));
    else store_n(out + i, gradient(load_n(e + i, left, 0.0f)), left);
  }
  if (kStream) fence();
}

// The gradient of a row of which the forward has kept the exponentials, where it is p times one number.
template <class T>
void scaled_row(const LogprobsBackward& call, const RowGradient& g, T* out, bool streaming) {
  const std::int64_t columns = call.in.columns;
  for (std::int64_t start = 0; start < columns; start += kLogprobsBlock) {
    const int n = static_cast<int>(columns - start < kLogprobsBlock ? columns - start : kLogprobsBlock);
    const double logp = (call.block_maxima[start / kLogprobsBlock] - g.max_logit) * g.inv_temperature + g.max_logprob;
    const F32 by = f32(static_cast<float>(bounded(std::exp(logp) * g.c0 * g.inv_temperature)));
    if (streaming && reinterpret_cast<std::uintptr_t>(out + start) % 64 == 0)
      scaled_columns<T, true>(call.exponentials + start, out + start, n, by);
    else
      scaled_columns<T, false>(call.exponentials + start, out + start, n, by);
  }
}

// ------------------------------------------------------------------------------------------------------ one row
RowGradient row_gradient(const LogprobsBackward& call, std::int64_t index) {
  const LogprobsRows& in = call.in;
  const auto value = [&](int name) { return static_cast<double>(call.values[name * in.rows + index]); };
  const auto upstream = [&](int name) { return static_cast<double>(call.grad_values[name * in.rows + index]); };
  RowGradient g;
  g.inv_temperature = inv_temperature_of(in, index);
  g.inv_softcap = call.inv_softcap;
  g.max_logit = value(kValueMaxLogit);
  g.max_logprob = value(kValueMaxLogprob);
  const double entropy = upstream(kValueEntropy), squares = upstream(kValueLogSumSq);
  g.c0 = upstream(kValueLogsumexp) - upstream(kValueLogprob) - 2.0 * squares;
  if (entropy != 0.0) g.c0 -= entropy * value(kValueEntropy);
  if (call.grad_ids != nullptr)
    for (std::int64_t j = 0; j < in.token_count; ++j)
      g.c0 -= static_cast<double>(call.grad_ids[index * in.token_count + j]);
  g.c1 = -entropy;
  g.c2 = squares != 0.0 ? 2.0 * squares * std::exp(-value(kValueLogSumSq)) : 0.0;
  return g;
}

// The kept columns with an upstream gradient of their own, each once, with its logit; returns how many.
template <class T>
std::int64_t own_columns(const LogprobsBackward& call, std::int64_t index, ColumnGradient* out) {
  const LogprobsRows& in = call.in;
  std::int64_t n = 0;
  const auto add = [&](std::int64_t column, float amount) {
    if (!is_column(in, column) || amount == 0.0f || !is_kept(in, index, column)) return;
    out[n++] = {column, static_cast<double>(amount), static_cast<double>(read(row_of<T>(in, index) + column))};
  };
  add(in.labels[index], call.grad_values[kValueLogprob * in.rows + index]);
  if (call.grad_ids != nullptr)
    for (std::int64_t j = 0; j < in.token_count; ++j)
      add(in.token_ids[index * in.token_ids_stride + j], call.grad_ids[index * in.token_count + j]);
  if (n < 2) return n;
  std::sort(out, out + n, [](const ColumnGradient& a, const ColumnGradient& b) {
    return a.column != b.column ? a.column < b.column : a.amount < b.amount;  // a fixed order of summation
  });
  std::int64_t last = 0;
  for (std::int64_t i = 1; i < n; ++i) {
    if (out[i].column == out[last].column) out[last].amount += out[i].amount;
    else out[++last] = out[i];
  }
  return last + 1;
}

template <class T>
void zero_columns(T* out, std::int64_t n) {
  __builtin_memset(static_cast<void*>(out), 0, static_cast<std::size_t>(n) * sizeof(T));
}

template <class T>
void keep_ids_row(const LogprobsRows& in, std::int64_t index, const RowGradient& g, T* out, float* logits) {
  const std::int64_t* ids = in.keep_ids + index * in.keep_ids_stride;
  const T* x = row_of<T>(in, index);
  for (std::int64_t i = 0; i < in.keep_count; ++i) logits[i] = is_column(in, ids[i]) ? read(x + ids[i]) : 0.0f;
  zero_columns(out, in.columns);
  for (std::int64_t i = 0; i < in.keep_count; ++i)
    if (is_column(in, ids[i])) write(out + ids[i], static_cast<float>(g.at(static_cast<double>(logits[i]), 0.0)));
}

// Zeros by masking the bits, without a branch per column.
template <class T>
void drop_columns(T* out, const std::uint8_t* __restrict keep, std::int64_t n) {
  using Bits = std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint16_t>;
  typedef Bits Aliased __attribute__((may_alias));
  Aliased* __restrict bits_of = reinterpret_cast<Aliased*>(out);
  for (std::int64_t i = 0; i < n; ++i)
    bits_of[i] = static_cast<Bits>(bits_of[i] & static_cast<Bits>(keep[i] != 0 ? ~Bits{0} : Bits{0}));
}

template <class T>
void dense_row(const LogprobsRows& in, std::int64_t index, const RowGradient& g, T* out, bool streaming, bool split) {
  const RowKernel kernel = row_kernel(g);
  const T* x = row_of<T>(in, index);
  const std::uint8_t* keep = in.keep_mask != nullptr ? in.keep_mask + index * in.keep_mask_stride : nullptr;
  const auto columns = [&](std::int64_t start, std::int64_t n) {
    gradient_columns(x + start, out + start, n, g, kernel, streaming && keep == nullptr);
    if (keep != nullptr) drop_columns(out + start, keep + start, n);
  };
  if (!split && keep == nullptr) return columns(0, in.columns);
  parallel_for(logprobs_blocks(in.columns), split ? in.threads : 1, 1, [&](std::int64_t block, int) {
    const std::int64_t start = block * kLogprobsBlock;
    columns(start, in.columns - start < kLogprobsBlock ? in.columns - start : kLogprobsBlock);
  });
}

template <class T>
void backward_row(const LogprobsBackward& call, std::int64_t index, int slot, bool streaming, bool split) {
  const LogprobsRows& in = call.in;
  T* out = static_cast<T*>(call.grad_logits) + index * call.grad_stride;
  if (!row_counts(in, index)) return zero_columns(out, in.columns);
  const RowGradient g = row_gradient(call, index);
  ColumnGradient* own = call.columns + slot * (in.token_count + 1);
  const std::int64_t owned = own_columns<T>(call, index, own);
  const bool flat = g.c0 == 0.0 && g.c1 == 0.0 && g.c2 == 0.0 && owned == 0;
  if (flat && std::isfinite(g.max_logprob)) return zero_columns(out, in.columns);  // no gradient came: nothing to read
  const bool scaled = call.exponentials != nullptr && g.c1 == 0.0 && g.c2 == 0.0 && g.inv_softcap == 0.0;
  if (scaled && std::isfinite(g.max_logprob)) scaled_row(call, g, out, streaming);
  else if (in.keep_ids != nullptr) keep_ids_row(in, index, g, out, call.kept_logits + slot * in.keep_count);
  else dense_row(in, index, g, out, streaming, split);
  for (std::int64_t i = 0; i < owned; ++i)
    write(out + own[i].column, static_cast<float>(g.at(own[i].logit, own[i].amount)));
}

}  // namespace

// ------------------------------------------------------------------------------------------------------ launcher
void logprobs_backward(const LogprobsBackward& call) {
  constexpr std::int64_t kCached = std::int64_t{8} << 20;  // bytes: smaller gradients may still be in cache when used
  const LogprobsRows& in = call.in;
  const bool split = in.keep_ids == nullptr && logprobs_splits_rows(in.rows, in.columns, in.threads);
  by_dtype(in.dtype, [&](auto type) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(type)>>;
    const auto here = in.rows * in.columns * static_cast<std::int64_t>(sizeof(T));
    const auto bytes = call.total_bytes > 0 ? call.total_bytes : here;
    const bool streaming = call.grad_logits != in.logits && bytes >= kCached;
    parallel_for(in.rows, split ? 1 : in.threads, row_grain(in),
                 [&](std::int64_t index, int slot) { backward_row<T>(call, index, slot, streaming, split); });
  });
}

}  // namespace fastreward::FASTREWARD_ISA
