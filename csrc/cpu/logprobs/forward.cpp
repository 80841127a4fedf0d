// Log-probs, entropy, logsumexp and the other statistics of every row of logits in one pass over memory.
//
// A row is taken in blocks of 4096 columns. The first pass over a block comes from memory (its maximum, the sum of its
// logits, how many lie above the label's); the second one, the exponentials, comes out of L1 while the next block is
// being prefetched. Blocks are summed in float lanes and merged in float64, always in the order of the columns, whoever
// computed them: bits depend on the row alone. A kept set fills a block-sized buffer (-inf where dropped) first.
#include <cmath>
#include <type_traits>

#include "cpu/logprobs/rows.hpp"
#include "cpu/logprobs/state.hpp"

namespace fastreward::FASTREWARD_ISA {
namespace {

using namespace simd;
using namespace logprobs;

constexpr float kInf = __builtin_inff();
constexpr int kBlock = static_cast<int>(kLogprobsBlock);

// Statistics of one block, relative to its own maximum; stored as kLogprobsPartial doubles.
struct Partial {
  double max;        // -inf where nothing is kept
  double sum;        // of exp(t)
  double sum_d;      // of (x - max) exp(t)
  double sum_sq;     // of exp(t)^2
  double sum_logit;  // of x over counted columns
  double above;      // columns above the label's logit
};
static_assert(sizeof(Partial) == kLogprobsPartial * sizeof(double), "scratch holds Partials");

// What a row's blocks need to know.
struct Row {
  ExpScale scale;
  double inv_temperature;
  float threshold;  // rank counts logits above it
  int flags;
  float* exponentials = nullptr;  // LogprobsForward's
  double* block_maxima = nullptr;
};

// -------------------------------------------------------------------------------------------------------- kernels
template <class T, bool kAbove, bool kTotal>
void first_pass(const T* x, int n, const Row& row, Partial& out) {
  constexpr int kStep = 4 * kF32;
  const F32 threshold = f32(row.threshold);
  F32 top[4], total[4];
  for (int u = 0; u < 4; ++u) top[u] = f32(-kInf), total[u] = f32(0.0f);
  int above = 0;
  int i = 0;
  for (; i + kStep <= n; i += kStep) {
    F32 v[4];
    load2(x + i, v[0], v[1]);
    load2(x + i + 2 * kF32, v[2], v[3]);
    for (int u = 0; u < 4; ++u) {
      top[u] = max(v[u], top[u]);
      if (kTotal) total[u] = total[u] + v[u];
      if (kAbove) above += count(v[u] > threshold);
    }
  }
  for (; i < n; i += kF32) {
    const int left = n - i < kF32 ? n - i : kF32;
    const F32 v = left == kF32 ? load(x + i) : load_n(x + i, left, -kInf);
    top[0] = max(v, top[0]);
    if (kTotal) total[0] = total[0] + (left == kF32 ? v : select(first32(left), v, f32(0.0f)));
    if (kAbove) above += count(v > threshold);
  }
  out.max = maximum(max(max(top[0], top[1]), max(top[2], top[3])));
  out.sum_logit = kTotal ? sum_f64((total[0] + total[1]) + (total[2] + total[3])) : 0.0;
  out.above = above;
}

// At most kChunk columns: a float lane takes 64 additions per accumulator, then it goes on in float64.
constexpr int kChunk = 256 * kF32;
static_assert(kBlock % kChunk == 0, "whole chunks make a block");

template <class T, bool kMoment, bool kSquares, bool kKeep>
void second_pass(const T* x, int n, const char* next, const Row& row, float* kept, Partial& out) {
  constexpr int kStep = 4 * kF32;
  constexpr int kLine = 64 / static_cast<int>(sizeof(T));
  const ExpScale scale = row.scale;
  const bool nothing = out.max == -static_cast<double>(kInf);  // or only NaN, which must come through
  const F32 top = f32(nothing ? 0.0f : static_cast<float>(out.max));
  F32 total[4], moment[4], squares[4];
  for (int u = 0; u < 4; ++u) total[u] = moment[u] = squares[u] = f32(0.0f);
  int i = 0;
  for (; i + kStep <= n; i += kStep) {
    for (int line = 0; line < kStep; line += kLine)
      __builtin_prefetch(next + sizeof(T) * static_cast<unsigned>(i + line), 0, 1);  // never faults
    F32 v[4];
    load2(x + i, v[0], v[1]);
    load2(x + i + 2 * kF32, v[2], v[3]);
    for (int u = 0; u < 4; ++u) {
      const F32 d = clamp_exponent(v[u] - top, scale);
      const ExpFactors factors = exp_factors(d, scale);
      total[u] = fma(factors.power, factors.rest, total[u]);
      const F32 e = factors.power * factors.rest;
      if (kKeep) store(kept + i + u * kF32, e);
      if (kMoment) moment[u] = fma(e, d, moment[u]);
      if (kSquares) squares[u] = fma(e, e, squares[u]);
    }
  }
  for (; i < n; i += kF32) {
    const int left = n - i < kF32 ? n - i : kF32;
    const F32 d = clamp_exponent((left == kF32 ? load(x + i) : load_n(x + i, left, -kInf)) - top, scale);
    const ExpFactors factors = exp_factors(d, scale);  // nothing to speak of in the lanes past the end
    total[0] = fma(factors.power, factors.rest, total[0]);
    const F32 e = factors.power * factors.rest;
    if (kKeep) store_n(kept + i, e, left);
    if (kMoment) moment[0] = fma(e, d, moment[0]);
    if (kSquares) squares[0] = fma(e, e, squares[0]);
  }
  const double sum_e = sum_f64((total[0] + total[1]) + (total[2] + total[3]));
  if (nothing && !std::isnan(sum_e)) return;
  out.sum += sum_e;
  if (kMoment) out.sum_d += sum_f64((moment[0] + moment[1]) + (moment[2] + moment[3]));
  if (kSquares) out.sum_sq += sum_f64((squares[0] + squares[1]) + (squares[2] + squares[3]));
}

// The second pass over a whole block; meanwhile the columns behind it are fetched into L2.
template <class T, bool kMoment, bool kSquares, bool kKeep = false>
void second_passes(const T* x, int n, const Row& row, Partial& out) {
  out.sum = out.sum_d = out.sum_sq = 0.0;
  for (int start = 0; start < n; start += kChunk) {
    const auto* next = reinterpret_cast<const char*>(x + start + n);
    const int size = n - start < kChunk ? n - start : kChunk;
    second_pass<T, kMoment, kSquares, kKeep>(x + start, size, next, row, kKeep ? row.exponentials + start : nullptr, out);
  }
}

template <class T>
Partial block_statistics(const T* x, int n, const Row& row) {
  Partial out;
  const bool above = (row.flags & kRank) != 0, mean = (row.flags & kMeanLogit) != 0;
  if (above && mean) first_pass<T, true, true>(x, n, row, out);
  else if (above) first_pass<T, true, false>(x, n, row, out);
  else if (mean) first_pass<T, false, true>(x, n, row, out);
  else first_pass<T, false, false>(x, n, row, out);
  const bool moment = (row.flags & kEntropy) != 0, squares = (row.flags & kLogSumSq) != 0;
  if (row.exponentials != nullptr && moment) second_passes<T, true, false, true>(x, n, row, out);
  else if (row.exponentials != nullptr) second_passes<T, false, false, true>(x, n, row, out);
  else if (moment && squares) second_passes<T, true, true>(x, n, row, out);
  else if (moment) second_passes<T, true, false>(x, n, row, out);
  else if (squares) second_passes<T, false, true>(x, n, row, out);
  else second_passes<T, false, false>(x, n, row, out);
  return out;
}

// ------------------------------------------------------------------------------------------------------- the parts
// Sum in float64 over 16 lanes.
double total_of(const float* x, int n) {
  constexpr int kLanes = 16;
  double lanes[kLanes] = {};
  int i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int k = 0; k < kLanes; ++k) lanes[k] += static_cast<double>(x[i + k]);
  for (; i < n; ++i) lanes[0] += static_cast<double>(x[i]);
  for (int k = 1; k < kLanes; ++k) lanes[0] += lanes[k];
  return lanes[0];
}

// The block with dropped columns as 0 for its sum, then as -inf; bits instead of branches, masks are anything.
template <class T>
Partial masked_block(const T* x, const std::uint8_t* __restrict keep, int n, const Row& row) {
  typedef std::uint32_t Bits __attribute__((may_alias));
  alignas(64) float buffer[kBlock];
  Bits* __restrict bits_of = reinterpret_cast<Bits*>(buffer);
  int i = 0;
  for (; i + kF32 <= n; i += kF32) store(buffer + i, load(x + i));
  if (i < n) store_n(buffer + i, load_n(x + i, n - i, 0.0f), n - i);
  for (i = 0; i < n; ++i) bits_of[i] &= keep[i] != 0 ? 0xffffffffu : 0u;
  const double total = (row.flags & kMeanLogit) != 0 ? total_of(buffer, n) : 0.0;
  for (i = 0; i < n; ++i) bits_of[i] |= keep[i] != 0 ? 0u : 0xff800000u;
  Partial out = block_statistics(static_cast<const float*>(buffer), n, row);
  out.sum_logit = total;
  return out;
}

template <class T>
Partial gathered_block(const LogprobsRows& in, const T* x, const std::int64_t* ids, int n, const Row& row) {
  alignas(64) float buffer[kBlock];
  double total = 0.0;
  for (int i = 0; i < n; ++i) {
    const bool column = is_column(in, ids[i]);
    buffer[i] = column ? read(x + ids[i]) : -kInf;
    total += column ? static_cast<double>(buffer[i]) : 0.0;
  }
  Partial out = block_statistics(static_cast<const float*>(buffer), n, row);
  out.sum_logit = total;
  return out;
}

// Columns (or kept ids) that the blocks of a row run over.
std::int64_t length_of(const LogprobsRows& in) { return in.keep_ids != nullptr ? in.keep_count : in.columns; }

template <class T>
Partial compute_block(const LogprobsRows& in, std::int64_t index, std::int64_t block, const Row& row) {
  const std::int64_t start = block * kLogprobsBlock;
  const std::int64_t rest = length_of(in) - start;
  const int n = rest < kLogprobsBlock ? static_cast<int>(rest) : kBlock;
  const T* x = row_of<T>(in, index);
  if (in.keep_ids != nullptr) return gathered_block(in, x, in.keep_ids + index * in.keep_ids_stride + start, n, row);
  if (in.keep_mask != nullptr)
    return masked_block(x + start, in.keep_mask + index * in.keep_mask_stride + start, n, row);
  if (row.exponentials == nullptr) return block_statistics(x + start, n, row);
  Row own = row;
  own.exponentials += start;
  const Partial out = block_statistics(x + start, n, own);
  row.block_maxima[block] = out.max;
  return out;
}

void merge(State& state, const Partial& part, double inv_temperature, std::int64_t block) {
  const double infinity = static_cast<double>(kInf);
  double* s = state.s;
  double sum = part.sum, sum_t = part.sum_d * inv_temperature, sum_sq = part.sum_sq;
  if (part.max > s[kStateMax]) {
    if (s[kStateMax] != -infinity) {
      const double shift = shift_of(s[kStateMax], part.max, inv_temperature);
      const double r = std::exp(shift);
      s[kStateSumT] = r * (s[kStateSumT] + shift * s[kStateSum]);
      s[kStateSum] *= r;
      s[kStateSumSq] *= r * r;
    }
    s[kStateMax] = part.max;
    state.best_block = block;
  } else if (part.max < s[kStateMax] && part.max != -infinity) {
    const double shift = shift_of(part.max, s[kStateMax], inv_temperature);
    const double r = std::exp(shift);
    sum_t = r * (sum_t + shift * sum);
    sum *= r;
    sum_sq *= r * r;
  }
  s[kStateSum] += sum;
  s[kStateSumT] += sum_t;
  s[kStateSumSq] += sum_sq;
  s[kStateSumLogit] += part.sum_logit;
  s[kStateRank] += part.above;
}

// First column (of the full vocabulary) that holds the maximum; only its block is read again.
template <class T>
std::int64_t find_maximum(const LogprobsRows& in, std::int64_t index, std::int64_t block, double maximum_logit) {
  const T* x = row_of<T>(in, index);
  const auto top = static_cast<float>(maximum_logit);
  if (in.keep_ids != nullptr) {  // the smallest id, whatever the order of the list
    const std::int64_t* ids = in.keep_ids + index * in.keep_ids_stride;
    std::int64_t first = -1;
    for (std::int64_t i = 0; i < in.keep_count; ++i)
      if (is_column(in, ids[i]) && read(x + ids[i]) == top && (first < 0 || ids[i] < first)) first = ids[i];
    return first;
  }
  const std::uint8_t* keep = in.keep_mask != nullptr ? in.keep_mask + index * in.keep_mask_stride : nullptr;
  for (std::int64_t i = block * kLogprobsBlock; i < in.columns; ++i) {
    i = first_of(x, i, in.columns, top);
    if (i < in.columns && (keep == nullptr || keep[i] != 0)) return i;
  }
  return 0;
}

// The label's logit (-inf where it is not kept) and what rank compares with.
template <class T>
Row open_row(const LogprobsRows& in, std::int64_t index, std::int64_t label, const float* given, int flags,
             State& state) {
  Row row{};
  row.inv_temperature = inv_temperature_of(in, index);
  row.scale = exp_scale(row.inv_temperature);
  row.flags = flags;
  row.threshold = kInf;  // nothing lies above: a label outside this slice
  if (is_column(in, label)) {
    const float x = is_kept(in, index, label) ? read(row_of<T>(in, index) + label) : -kInf;
    state.s[kStateLabel] = static_cast<double>(x);
    row.threshold = x;
  }
  if (given != nullptr) row.threshold = given[index];
  return row;
}

template <class T>
void close_row(const LogprobsRows& in, std::int64_t index, std::int64_t vocab_start, int flags, State& state) {
  if ((flags & kArgmax) != 0 && state.best_block >= 0)
    state.s[kStateArgmax] =
        static_cast<double>(vocab_start + find_maximum<T>(in, index, state.best_block, state.s[kStateMax]));
}

// Columns that mean_logit divides by.
double counted_columns(const LogprobsRows& in, std::int64_t index) {
  std::int64_t n = 0;
  if (in.keep_mask != nullptr) {
    const std::uint8_t* keep = in.keep_mask + index * in.keep_mask_stride;
    for (std::int64_t i = 0; i < in.columns; ++i) n += keep[i] != 0;
  } else if (in.keep_ids != nullptr) {
    const std::int64_t* ids = in.keep_ids + index * in.keep_ids_stride;
    for (std::int64_t i = 0; i < in.keep_count; ++i) n += is_column(in, ids[i]);
  } else {
    n = in.columns;
  }
  return static_cast<double>(n);
}

template <class T>
void write_ids(const LogprobsForward& call, std::int64_t index, const State& state, double inv_temperature) {
  const LogprobsRows& in = call.in;
  const double log_sum = std::log(state.s[kStateSum]);
  for (std::int64_t j = 0; j < in.token_count; ++j) {
    const std::int64_t id = in.token_ids[index * in.token_ids_stride + j];
    double x = std::nan("");
    if (is_column(in, id))
      x = is_kept(in, index, id) ? static_cast<double>(read(row_of<T>(in, index) + id)) : -static_cast<double>(kInf);
    call.id_logprobs[index * in.token_count + j] =
        static_cast<float>((x - state.s[kStateMax]) * inv_temperature - log_sum);
  }
}

void write_zeros(const LogprobsForward& call, std::int64_t index) {
  const LogprobsRows& in = call.in;
  for (int k = 0; k <= kValueMaxLogit; ++k) call.values[k * in.rows + index] = 0.0f;
  call.indices[index] = call.indices[in.rows + index] = 0;
  for (std::int64_t j = 0; j < in.token_count; ++j) call.id_logprobs[index * in.token_count + j] = 0.0f;
}

// Where a row's exponentials go, if anywhere.
struct Keep {
  float* exponentials = nullptr;
  double* maxima = nullptr;
};

// Runs every counted row: open, its blocks in order, close. Few long rows: blocks go to threads first, into scratch.
template <class T, class Begin, class End>
void run_rows(const LogprobsRows& in, std::int64_t vocab_start, int flags, const float* label_logits, double* scratch,
              const Keep& keep, const Begin& begin, const End& end) {
  const std::int64_t blocks = logprobs_blocks(length_of(in));
  auto* partials = reinterpret_cast<Partial*>(scratch);
  const bool split = scratch != nullptr && logprobs_splits_rows(in.rows, length_of(in), in.threads);
  if (split) {
    parallel_for(in.rows * blocks, in.threads, 1, [&](std::int64_t unit, int) {
      const std::int64_t index = unit / blocks;
      State unused;
      if (!row_counts(in, index)) return;
      const Row row = open_row<T>(in, index, in.labels[index] - vocab_start, label_logits, flags, unused);
      partials[unit] = compute_block<T>(in, index, unit % blocks, row);
    });
  }
  parallel_for(in.rows, split ? 1 : in.threads, row_grain(in), [&](std::int64_t index, int) {
    if (!row_counts(in, index)) return end(index, nullptr, 0.0);
    State state;
    begin(index, state);
    Row row = open_row<T>(in, index, in.labels[index] - vocab_start, label_logits, flags, state);
    row.exponentials = keep.exponentials;
    row.block_maxima = keep.maxima;
    for (std::int64_t block = 0; block < blocks; ++block)
      merge(state, split ? partials[index * blocks + block] : compute_block<T>(in, index, block, row),
            row.inv_temperature, block);
    close_row<T>(in, index, vocab_start, flags, state);
    end(index, &state, row.inv_temperature);
  });
}

void initial_state(std::int64_t, State& state) { state = empty_state(); }

}  // namespace

// ------------------------------------------------------------------------------------------------------ launchers
void logprobs_forward(const LogprobsForward& call) {
  by_dtype(call.in.dtype, [&](auto type) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(type)>>;
    const Keep keep{call.exponentials, call.block_maxima};
    run_rows<T>(call.in, 0, call.flags, nullptr, call.scratch, keep, initial_state,
                [&](std::int64_t index, const State* state, double inv_temperature) {
                  if (state == nullptr) return write_zeros(call, index);
                  const double columns = (call.flags & kMeanLogit) != 0 ? counted_columns(call.in, index) : 1.0;
                  write_row(*state, inv_temperature, columns, call.flags, call.values + index, call.indices + index,
                            call.in.rows);
                  write_ids<T>(call, index, *state, inv_temperature);
                });
  });
}

void logprobs_accumulate(const LogprobsAccumulate& call) {
  by_dtype(call.in.dtype, [&](auto type) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(type)>>;
    const auto begin = [&](std::int64_t index, State& state) {
      for (int k = 0; k < kStateSize; ++k) state.s[k] = call.state[index * kStateSize + k];
    };
    const auto end = [&](std::int64_t index, const State* state, double) {
      if (state == nullptr) return;
      for (int k = 0; k < kStateSize; ++k) call.state[index * kStateSize + k] = state->s[k];
    };
    run_rows<T>(call.in, call.vocab_start, call.flags, call.label_logits, call.scratch, Keep(), begin, end);
  });
}

void logprobs_finish(const LogprobsFinish& call) {
  for (std::int64_t index = 0; index < call.rows; ++index) {
    State state;
    for (int k = 0; k < kStateSize; ++k) state.s[k] = call.state[index * kStateSize + k];
    const double inv_temperature = call.inv_temperature != nullptr
                                       ? call.inv_temperature[index * call.inv_temperature_stride]
                                       : call.inv_temperature_scalar;
    write_row(state, inv_temperature, static_cast<double>(call.vocab_size), call.flags, call.values + index,
              call.indices + index, call.rows);
  }
}

}  // namespace fastreward::FASTREWARD_ISA
