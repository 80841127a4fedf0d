// Divergences of two distributions over the vocabulary: what fastreward/cuda/program/divergence_source.py generates
// stands on this.
//
// Fused: both softmaxes, their statistics, the divergence and the sums that its gradient needs (generated from its
// definition); then the gradient for either side's logits. A block has a row of both sides; a thread takes 8 columns of
// both at a time, which depends on V alone.
// A divergence of moments (the KLs: sums of p and q times log p - log q) is known after one read: they are kept beside
// the softmax's sums, relative to the largest logits so far. In a row where log-probs below -10,000 may be among them,
// which they do not cut, and for all other divergences, there is a second read, from the L2 cache as far as the rows
// under way fit there; it goes backwards, from what was read last.
// Bytes a row, e = bytes per logit of a side: forward 2 e V (4 e V with a second read), gradient 3 e V; rows that do not
// count are not read.
#pragma once

#include "cuda/logits_policy_loss.cuh"

namespace fastreward {

struct SideArguments {
  const void* logits;  // [rows, vocab], `stride` elements from row to row
  i64 stride;
  const double* inv_temperature;  // [rows] with stride inv_stride, or null: then inv_value
  i64 inv_stride;
  double inv_value;
  float* values;  // [VALUES, rows]: out of the forward, given to the others
};

struct DivergenceArguments {
  SideArguments student, teacher;
  i64 rows, vocab;
  const i64* labels;          // [rows]
  const unsigned char* mask;  // [rows] or null
  float *outputs, *agreement;  // forward: [COUNT, rows], [rows]
  double* sums;                // of a slice of the vocabulary: [COUNT, rows]
  const float* label_gradients;  // gradient: [rows], what is added at the label, or null
  void* grad;                    // [rows, vocab]; may be either side's logits
  i64 grad_stride;
};

// ------------------------------------------------------------------------------------------------------------- kernels
constexpr int PAIR_THREADS = 256;
constexpr int PAIR_COLUMNS = 8;  // of either side that a thread takes together
constexpr int PAIR_UNROLL = 2;   // such units that are loaded together
constexpr float LOWEST = -1e4f;  // log-probs below count as this
constexpr float APART = 9000.f;  // exponents so far apart, in bits, may be of log-probs below LOWEST

// Moments of a divergence's sums, as language.divergence_moments.Moments.
enum Moment { OF_P, OF_Q, LOG_P, LOG_Q, CONSTANT, MOMENTS };

// 8 columns from 8 * unit on; -inf past the end.
template <class T, bool ALIGNED>
__device__ __forceinline__ void read_unit(const typename T::Bits* row, int unit, int vocab, float (&x)[PAIR_COLUMNS]) {
  constexpr int VECTORS = PAIR_COLUMNS / T::LANES;
#pragma unroll
  for (int i = 0; i < VECTORS; ++i) {
    float y[T::LANES];
    T::unpack(logits_vector<T, ALIGNED>(row, unit * VECTORS + i, vocab), y);
#pragma unroll
    for (int j = 0; j < T::LANES; ++j) x[i * T::LANES + j] = y[j];
  }
}

// The same of a row that is written to meanwhile, by each thread its own columns.
template <class T, bool ALIGNED>
__device__ __forceinline__ void read_own(const typename T::Bits* row, int unit, int vocab, float (&x)[PAIR_COLUMNS]) {
  const int begin = unit * PAIR_COLUMNS;
  if (ALIGNED && begin + PAIR_COLUMNS <= vocab) {
#pragma unroll
    for (int i = 0; i < PAIR_COLUMNS / T::LANES; ++i) {
      float y[T::LANES];
      T::unpack(load16(row + begin + i * T::LANES), y);
#pragma unroll
      for (int j = 0; j < T::LANES; ++j) x[i * T::LANES + j] = y[j];
    }
  } else {
#pragma unroll
    for (int j = 0; j < PAIR_COLUMNS; ++j)
      x[j] = begin + j < vocab ? T::decode(row[begin + j]) : negative_infinity();
  }
}

__device__ __forceinline__ double inverse_of(const SideArguments& s, i64 n) {
  return s.inv_temperature ? s.inv_temperature[n * s.inv_stride] : s.inv_value;
}

template <class T>
__device__ __forceinline__ const typename T::Bits* row_of(const SideArguments& s, i64 n) {
  return static_cast<const typename T::Bits*>(s.logits) + n * s.stride;
}

// A thread's share of both rows. sum, weighted of x and y, and the moments: relative to their maxima, in bits.
struct Pair {
  Partial x, y;
  float of_p, of_q;
  float above, below;  // largest t - u, largest u - t
};

// What of a pair is computed.
template <bool OF_P_, bool OF_Q_, bool LOG_P_, bool LOG_Q_, bool STATISTICS_>
struct Wanted {
  static constexpr bool OF_P = OF_P_, OF_Q = OF_Q_, LOG_P = LOG_P_, LOG_Q = LOG_Q_, STATISTICS = STATISTICS_;
};

// Moves one side's maximum to `max`; the shift of its exponents, in bits.
template <int LEVEL>
__device__ __forceinline__ float move_side(Partial& p, float max, float scale) {
  const float base = finite_base(max), shift = fmaxf((p.max - base) * scale, LOWEST);
  const float r = exp2_fast(shift);
  if (LEVEL >= WITH_ENTROPY) p.weighted = r * fmaf(shift, p.sum, p.weighted);
  p.sum *= r;
  p.max = max;
  return shift;
}

template <class W>
__device__ __forceinline__ void move_pair(Pair& p, float x_max, float y_max, float x_scale, float y_scale) {
  const float x_sum = p.x.sum, y_sum = p.y.sum;
  const float x_shift = move_side<W::LOG_P ? WITH_ENTROPY : LEAN>(p.x, x_max, x_scale);
  const float y_shift = move_side<W::LOG_Q ? WITH_ENTROPY : LEAN>(p.y, y_max, y_scale);
  const float moved = x_shift - y_shift;
  if (W::OF_P) {
    p.of_p = exp2_fast(x_shift) * fmaf(moved, x_sum, p.of_p);
    p.above += moved;
  }
  if (W::OF_Q) {
    p.of_q = exp2_fast(y_shift) * fmaf(moved, y_sum, p.of_q);
    p.below -= moved;
  }
}

// x and y join. An infinite distance is far apart, and at e = 0 any finite one does.
template <class W>
__device__ __forceinline__ void add_pair(Pair& p, float x, float y, float x_base, float y_base, float x_scale,
                                         float y_scale) {
  const float t = (x - x_base) * x_scale, u = (y - y_base) * y_scale, e = exp2_fast(t), f = exp2_fast(u);
  p.x.sum += e;
  p.y.sum += f;
  if (W::LOG_P) p.x.weighted = fmaf(fmaxf(t, LOWEST), e, p.x.weighted);
  if (W::LOG_Q) p.y.weighted = fmaf(fmaxf(u, LOWEST), f, p.y.weighted);
  if (W::OF_P) {
    const float apart = fmaxf(t - u, LOWEST);
    p.of_p = fmaf(e, apart, p.of_p);
    p.above = fmaxf(p.above, apart);
  }
  if (W::OF_Q) {
    const float apart = fmaxf(u - t, LOWEST);
    p.of_q = fmaf(-f, apart, p.of_q);
    p.below = fmaxf(p.below, apart);
  }
}

__device__ __forceinline__ void first_of(Partial& p, const float (&x)[PAIR_COLUMNS], float& top, int unit) {
  float max = x[0];
#pragma unroll
  for (int j = 1; j < PAIR_COLUMNS; ++j) max = fmaxf(max, x[j]);
  if (max > top) p.at = unsigned(unit);
  top = fmaxf(top, max);
}

template <class S, class T, bool ALIGNED, class W>
__device__ __forceinline__ Pair scan_pair(const typename S::Bits* x_row, const typename T::Bits* y_row, int vocab,
                                          float x_scale, float y_scale) {
  Pair p = {empty_partial(), empty_partial(), 0.f, 0.f, negative_infinity(), negative_infinity()};
  const int units = (vocab + PAIR_COLUMNS - 1) / PAIR_COLUMNS;
#pragma unroll 1
  for (int k = int(threadIdx.x); k < units; k += PAIR_THREADS * PAIR_UNROLL) {
    float x[PAIR_UNROLL][PAIR_COLUMNS], y[PAIR_UNROLL][PAIR_COLUMNS];
#pragma unroll
    for (int i = 0; i < PAIR_UNROLL; ++i) {
      read_unit<S, ALIGNED>(x_row, k + i * PAIR_THREADS, vocab, x[i]);
      read_unit<T, ALIGNED>(y_row, k + i * PAIR_THREADS, vocab, y[i]);
    }
    float x_top = p.x.max, y_top = p.y.max;
#pragma unroll
    for (int i = 0; i < PAIR_UNROLL; ++i) {
      first_of(p.x, x[i], x_top, k + i * PAIR_THREADS);
      first_of(p.y, y[i], y_top, k + i * PAIR_THREADS);
    }
    move_pair<W>(p, x_top, y_top, x_scale, y_scale);
    const float x_base = finite_base(x_top), y_base = finite_base(y_top);
    Pair part = {empty_partial(), empty_partial(), 0.f, 0.f, p.above, p.below};  // fewer roundings than one by one
#pragma unroll
    for (int i = 0; i < PAIR_UNROLL; ++i)
#pragma unroll
      for (int j = 0; j < PAIR_COLUMNS; ++j)
        add_pair<W>(part, x[i][j], y[i][j], x_base, y_base, x_scale, y_scale);
    p.x.sum += part.x.sum, p.y.sum += part.y.sum;
    p.x.weighted += part.x.weighted, p.y.weighted += part.y.weighted;
    p.of_p += part.of_p, p.of_q += part.of_q;
    p.above = part.above, p.below = part.below;
  }
  return p;
}

// Both rows' states, in nats relative to their maxima; every thread has them.
struct PairState {
  double x_peak, x_sum, x_weighted, y_peak, y_sum, y_weighted, of_p, of_q;
  unsigned x_at, y_at;  // units of 8 columns that hold the first maxima
  bool far;
};

template <class W>
__device__ __forceinline__ PairState reduce_pair(Pair p, float x_scale, float y_scale) {
  __shared__ float floats[4][PAIR_THREADS / WARP];
  __shared__ double doubles[PAIR_THREADS / WARP];
  const float x_max = block_max<PAIR_THREADS>(p.x.max, floats[0]), y_max = block_max<PAIR_THREADS>(p.y.max, floats[1]);
  PairState s = {};
  s.x_peak = x_max, s.y_peak = y_max;
  if (W::STATISTICS) {
    const double none = double(NOWHERE);
    s.x_at = unsigned(-block_max<PAIR_THREADS>(p.x.max == x_max ? -double(p.x.at) : -none, doubles));
    s.y_at = unsigned(-block_max<PAIR_THREADS>(p.y.max == y_max ? -double(p.y.at) : -none, doubles));
  }
  move_pair<W>(p, x_max, y_max, x_scale, y_scale);
  s.x_sum = block_sum<PAIR_THREADS>(p.x.sum, doubles);
  s.y_sum = block_sum<PAIR_THREADS>(p.y.sum, doubles);
  if (W::LOG_P) s.x_weighted = LN2 * block_sum<PAIR_THREADS>(p.x.weighted, doubles);
  if (W::LOG_Q) s.y_weighted = LN2 * block_sum<PAIR_THREADS>(p.y.weighted, doubles);
  if (W::OF_P) s.of_p = LN2 * block_sum<PAIR_THREADS>(p.of_p, doubles);
  if (W::OF_Q) s.of_q = LN2 * block_sum<PAIR_THREADS>(p.of_q, doubles);
  const float above = block_max<PAIR_THREADS>(p.above, floats[2]), below = block_max<PAIR_THREADS>(p.below, floats[3]);
  s.far = above > APART || below > APART;
  return s;
}

// The language's exp and log of what is weighted by a probability: logf and expf take ten times the instructions.
__device__ __forceinline__ float quick_exp(float x) { return exp2_fast(x * LOG2E); }
__device__ __forceinline__ float quick_log(float x) { return log2_fast(x) * float(LN2); }

// What a log-prob is made of: (x - top) * inverse + top_logprob.
struct RowShape {
  float top, inverse, top_logprob;
};

struct Probability {
  float log, p;
};

__device__ __forceinline__ Probability probability(const RowShape& s, float x) {
  const float log = fmaf(x - s.top, s.inverse, s.top_logprob);
  return {log < LOWEST ? LOWEST : log, exp2_fast(log * LOG2E)};
}

__device__ __forceinline__ RowShape shape_of(const SideArguments& s, i64 rows, i64 n) {
  return {s.values[MAX_LOGIT * rows + n], narrow(inverse_of(s, n)), s.values[MAX_LOGPROB * rows + n]};
}

__device__ __forceinline__ void write_side(float* values, i64 rows, i64 n, double peak, double sum, double weighted,
                                           double label, double inv_t, bool entropy) {
  const double log_sum = log(sum), nan = double(not_a_number());
  const bool nothing = sum == 0.;  // every logit is -inf
  const float value[VALUES] = {float(nothing ? nan : (label - peak) * inv_t - log_sum),
                               entropy ? float(nothing ? nan : log_sum - weighted / sum) : 0.f,
                               float(isinf(peak) ? peak : peak * inv_t + log_sum),
                               float(label * inv_t),
                               0.f,
                               0.f,
                               float(nothing ? nan : -log_sum),
                               float(peak)};
#pragma unroll
  for (int i = 0; i < VALUES; ++i) values[i * rows + n] = value[i];
}

// The first column of the unit that holds the maximum; 0 in a row of NaN.
template <class T>
__device__ __forceinline__ i64 first_column(const typename T::Bits* row, unsigned unit, float max, int vocab) {
  for (int j = 0; unit != NOWHERE && j < PAIR_COLUMNS; ++j) {
    const int column = int(unit) * PAIR_COLUMNS + j;
    if (column < vocab && T::decode(row[column]) == max) return column;
  }
  return 0;
}

// The sums of a row's columns, in every thread; generated: Divergence::COUNT, and add(), a column joins `sums`.
template <class S, class T, bool ALIGNED, class Divergence, class Row>
__device__ __forceinline__ void sum_columns(const typename S::Bits* x_row, const typename T::Bits* y_row, int vocab,
                                            const RowShape& x_shape, const RowShape& y_shape, const Row& row,
                                            double (&totals)[Divergence::COUNT]) {
  __shared__ double room[PAIR_THREADS / WARP];
  float sums[Divergence::ROOM] = {};
  const int units = (vocab + PAIR_COLUMNS - 1) / PAIR_COLUMNS;
#pragma unroll 1
  for (int k = int(threadIdx.x); k < units; k += PAIR_THREADS) {
    const int unit = units - 1 - k;
    float x[PAIR_COLUMNS], y[PAIR_COLUMNS], part[Divergence::ROOM] = {};
    read_unit<S, ALIGNED>(x_row, unit, vocab, x);
    read_unit<T, ALIGNED>(y_row, unit, vocab, y);
#pragma unroll
    for (int j = 0; j < PAIR_COLUMNS; ++j) {
      if (unit * PAIR_COLUMNS + j < vocab)
        Divergence::add(row, probability(x_shape, x[j]), probability(y_shape, y[j]), part);
    }
#pragma unroll
    for (int i = 0; i < Divergence::ROOM; ++i) sums[i] += part[i];
  }
  double added[Divergence::ROOM];
#pragma unroll
  for (int i = 0; i < Divergence::ROOM; ++i) added[i] = block_sum<PAIR_THREADS>(sums[i], room);
#pragma unroll
  for (int i = 0; i < Divergence::COUNT; ++i) totals[i] = added[Divergence::place(i)];
}

template <class S, class T, class Divergence, class Arguments>
__device__ __forceinline__ void sum_row(const Arguments& a, i64 n, const RowShape& x_shape, const RowShape& y_shape,
                                        double (&totals)[Divergence::COUNT]) {
  const typename S::Bits* x_row = row_of<S>(a.call.student, n);
  const typename T::Bits* y_row = row_of<T>(a.call.teacher, n);
  const auto row = Divergence::row(a, n);
  if (misalignment(x_row) == 0 && misalignment(y_row) == 0)
    sum_columns<S, T, true, Divergence>(x_row, y_row, int(a.call.vocab), x_shape, y_shape, row, totals);
  else
    sum_columns<S, T, false, Divergence>(x_row, y_row, int(a.call.vocab), x_shape, y_shape, row, totals);
}

// ------------------------------------------------------------------------------------------------- one row of each
// BY_MOMENTS: a.moments [COUNT][MOMENTS] say what the sums are made of, where log-probs are not cut.
template <class S, class T, class W, bool BY_MOMENTS, class Divergence, class Arguments>
__device__ __forceinline__ void forward_row(const Arguments& a) {
  const DivergenceArguments& c = a.call;
  const i64 n = blockIdx.x, rows = c.rows;
  const int vocab = int(c.vocab);
  const bool first = threadIdx.x == 0;
  if (c.mask && !c.mask[n]) {
    if (first) {
      for (int i = 0; i < VALUES; ++i) c.student.values[i * rows + n] = c.teacher.values[i * rows + n] = 0.f;
      for (int i = 0; i < Divergence::COUNT; ++i) c.outputs[i * rows + n] = 0.f;
      c.agreement[n] = 0.f;
    }
    return;
  }
  const double x_inverse = inverse_of(c.student, n), y_inverse = inverse_of(c.teacher, n);
  const float x_scale = narrow(x_inverse) * LOG2E, y_scale = narrow(y_inverse) * LOG2E;
  const typename S::Bits* x_row = row_of<S>(c.student, n);
  const typename T::Bits* y_row = row_of<T>(c.teacher, n);
  const Pair p = misalignment(x_row) == 0 && misalignment(y_row) == 0
                     ? scan_pair<S, T, true, W>(x_row, y_row, vocab, x_scale, y_scale)
                     : scan_pair<S, T, false, W>(x_row, y_row, vocab, x_scale, y_scale);
  const PairState s = reduce_pair<W>(p, x_scale, y_scale);
  const double x_log = log(s.x_sum), y_log = log(s.y_sum), nan = double(not_a_number());
  if (first) {
    const double x_label = logit_at<S>(x_row, nullptr, c.labels[n], vocab);
    const double y_label = logit_at<T>(y_row, nullptr, c.labels[n], vocab);
    write_side(c.student.values, rows, n, s.x_peak, s.x_sum, s.x_weighted, x_label, x_inverse, W::STATISTICS);
    write_side(c.teacher.values, rows, n, s.y_peak, s.y_sum, s.y_weighted, y_label, y_inverse, W::STATISTICS);
    c.agreement[n] = W::STATISTICS && first_column<S>(x_row, s.x_at, float(s.x_peak), vocab) ==
                                          first_column<T>(y_row, s.y_at, float(s.y_peak), vocab);
  }
  double totals[Divergence::COUNT];
  if (BY_MOMENTS && !s.far) {
    const double known[MOMENTS] = {W::OF_P ? s.of_p / s.x_sum + (y_log - x_log) : 0.,
                                   W::OF_Q ? s.of_q / s.y_sum + (y_log - x_log) : 0.,
                                   W::LOG_P ? s.x_weighted / s.x_sum - x_log : 0.,
                                   W::LOG_Q ? s.y_weighted / s.y_sum - y_log : 0., 1.};
#pragma unroll
    for (int i = 0; i < Divergence::COUNT; ++i) {
      totals[i] = s.x_sum == 0. || s.y_sum == 0. ? nan : 0.;
#pragma unroll
      for (int m = 0; m < MOMENTS; ++m) totals[i] += a.moments[i * MOMENTS + m] * known[m];
    }
  } else {
    const RowShape x_shape = {float(s.x_peak), narrow(x_inverse), float(s.x_sum == 0. ? nan : -x_log)};
    const RowShape y_shape = {float(s.y_peak), narrow(y_inverse), float(s.y_sum == 0. ? nan : -y_log)};
    sum_row<S, T, Divergence>(a, n, x_shape, y_shape, totals);
  }
  if (first)
    for (int i = 0; i < Divergence::COUNT; ++i) c.outputs[i * rows + n] = float(totals[i]);
}

template <class S, class T, class Divergence, class Arguments>
__device__ __forceinline__ void slice_row(const Arguments& a) {
  const DivergenceArguments& c = a.call;
  const i64 n = blockIdx.x;
  double totals[Divergence::COUNT] = {};
  if (!c.mask || c.mask[n])
    sum_row<S, T, Divergence>(a, n, shape_of(c.student, c.rows, n), shape_of(c.teacher, c.rows, n), totals);
  if (threadIdx.x == 0)
    for (int i = 0; i < Divergence::COUNT; ++i) c.sums[i * c.rows + n] = totals[i];
}

// Generated: Divergence::row(a, n), and gradient() of a column. G: the gradient's type, that of its side's logits.
template <class S, class T, class G, bool ALIGNED, class Divergence, class Arguments>
__device__ __forceinline__ void write_gradient(const Arguments& a, i64 n) {
  const DivergenceArguments& c = a.call;
  typedef typename G::Bits Bits;
  const int vocab = int(c.vocab), units = (vocab + PAIR_COLUMNS - 1) / PAIR_COLUMNS;
  Bits* out = static_cast<Bits*>(c.grad) + n * c.grad_stride;
  const bool vectors = misalignment(out) == 0;
  const RowShape x_shape = shape_of(c.student, c.rows, n), y_shape = shape_of(c.teacher, c.rows, n);
  const auto row = Divergence::row(a, n);
  const i64 label = c.label_gradients ? c.labels[n] : -1;
  const float at_label = c.label_gradients ? c.label_gradients[n] : 0.f;
#pragma unroll 1
  for (int k = int(threadIdx.x); k < units; k += PAIR_THREADS) {
    float x[PAIR_COLUMNS], y[PAIR_COLUMNS];
    read_own<S, ALIGNED>(row_of<S>(c.student, n), k, vocab, x);
    read_own<T, ALIGNED>(row_of<T>(c.teacher, n), k, vocab, y);
    const int begin = k * PAIR_COLUMNS;
#pragma unroll
    for (int j = 0; j < PAIR_COLUMNS; ++j) {
      x[j] = Divergence::gradient(row, probability(x_shape, x[j]), probability(y_shape, y[j]));
      if (begin + j == label) x[j] += at_label;
    }
    if (vectors && begin + PAIR_COLUMNS <= vocab) {
#pragma unroll
      for (int i = 0; i < PAIR_COLUMNS / G::LANES; ++i) {
        float g[G::LANES];
#pragma unroll
        for (int j = 0; j < G::LANES; ++j) g[j] = x[i * G::LANES + j];
        store16_streaming(out + begin + i * G::LANES, G::pack(g));
      }
    } else {
#pragma unroll
      for (int j = 0; j < PAIR_COLUMNS; ++j)
        if (begin + j < vocab) out[begin + j] = G::encode(x[j]);
    }
  }
}

template <class S, class T, class G, class Divergence, class Arguments>
__device__ __forceinline__ void gradient_row(const Arguments& a) {
  const DivergenceArguments& c = a.call;
  const i64 n = blockIdx.x;
  if (c.mask && !c.mask[n]) {
    typename G::Bits* out = static_cast<typename G::Bits*>(c.grad) + n * c.grad_stride;
    zero_columns<G, PAIR_THREADS>(out, columns_of<G>(out, 0, int(c.vocab)));
    return;
  }
  if (misalignment(row_of<S>(c.student, n)) == 0 && misalignment(row_of<T>(c.teacher, n)) == 0)
    write_gradient<S, T, G, true, Divergence>(a, n);
  else
    write_gradient<S, T, G, false, Divergence>(a, n);
}

}  // namespace fastreward
