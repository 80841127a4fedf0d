// Policy loss (PPO clip, asymmetric and dual clip, delta, KL to a reference, entropy bonus) with its gradient.
//
// Fused: a count of the mask fixes each row's weight in the aggregation; then one sweep reads every token once and
// gives the loss, all metrics and the gradient with that weight already in it. Backward with an upstream gradient of 1
// is then free, and one scaling pass otherwise. The only large output is the gradient.
//
// Masked tokens are replaced by harmless numbers before any arithmetic, so that NaN or inf there leaks nowhere; vectors
// without a counted token are not read at all. Sums have a fixed structure: lane = position in the row modulo the vector,
// float over kRun vectors, float64 above that, items of kPolicyBlock tokens in order, rows in order. Padding on the
// right adds exact zeros, and the number of threads changes nothing.
#include "cpu/policy_loss.hpp"

#include <cmath>
#include <limits>

#include "common/simd.hpp"

namespace fastreward::FASTREWARD_ISA {
namespace {

using namespace simd;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kRefClamp = 20.0f;
constexpr int kBlock = static_cast<int>(kPolicyBlock);
// A gradient of this size is written past the caches, which saves reading its old lines first. With kAhead, the
// distance in floats of the prefetches (hardware stops at each 4 KiB page of several streams), worth a quarter.
constexpr std::int64_t kStreamBytes = std::int64_t{4} << 20;
constexpr int kAhead = 512;

// ------------------------------------------------------------------------------------------------------ bookkeeping
struct Item {
  std::int64_t row, column, begin;  // begin: position of its first token in the token arrays
  int size;
};

Item item_at(const PolicyTokens& t, std::int64_t index) {
  std::int64_t low = 0, high = t.rows;  // first_item[low] <= index < first_item[high]
  while (high - low > 1) {
    const std::int64_t middle = low + (high - low) / 2;
    (t.first_item[middle] <= index ? low : high) = middle;
  }
  const std::int64_t column = (index - t.first_item[low]) * kPolicyBlock;
  const std::int64_t left = t.length(low) - column;
  return {low, column, t.begin(low) + column, left < kPolicyBlock ? static_cast<int>(left) : kBlock};
}

// f(item index, item, mask bytes or nullptr) for every item, spread over the threads.
template <class F>
void for_items(const PolicyTokens& t, int threads, F&& f) {
  const std::int64_t items = t.first_item[t.rows];
#pragma omp parallel num_threads(threads) if (items > 4)
  {
    std::uint8_t buffer[kPolicyBlock];
#pragma omp for schedule(dynamic, 8) nowait
    for (std::int64_t i = 0; i < items; ++i) {
      const Item item = item_at(t, i);
      f(i, item, mask_block(t.mask, item.begin, item.size, buffer));
    }
    fence();  // of what this thread streamed, before the region's closing barrier
  }
}

int count_bytes(const std::uint8_t* bytes, int n) {
  constexpr int kRun = 128;  // so short that a byte can count it: the compiler then adds bytes, not integers
  int counted = 0, i = 0;
  for (; i + kRun <= n; i += kRun) {
    std::uint8_t run = 0;
    for (int j = 0; j < kRun; ++j) run = static_cast<std::uint8_t>(run + (bytes[i + j] != 0));
    counted += run;
  }
  for (; i < n; ++i) counted += bytes[i] != 0;
  return counted;
}

void count_rows(const PolicyTokens& t, std::int64_t* lengths, int threads) {
#pragma omp parallel num_threads(threads) if (t.first_item[t.rows] > 16)
  {
    std::uint8_t buffer[kPolicyBlock];
#pragma omp for schedule(static)
    for (std::int64_t row = 0; row < t.rows; ++row) {
      const std::int64_t length = t.length(row);
      std::int64_t counted = t.mask.kind == MaskKind::none ? length : 0;
      for (std::int64_t c = 0; c < length && t.mask.kind != MaskKind::none; c += kPolicyBlock) {
        const int n = length - c < kPolicyBlock ? static_cast<int>(length - c) : kBlock;
        counted += count_bytes(mask_block(t.mask, t.begin(row) + c, n, buffer), n);
      }
      lengths[row] = counted;
    }
  }
}

struct Totals {
  std::int64_t tokens = 0, sequences = 0, longest = 0;
};

Totals totals_of(const PolicyTokens& t, const std::int64_t* lengths) {
  Totals total;
  for (std::int64_t row = 0; row < t.rows; ++row) {
    total.tokens += lengths[row];
    total.sequences += lengths[row] > 0;
    if (t.length(row) > total.longest) total.longest = t.length(row);
  }
  return total;
}

// What the aggregation divides by, besides a sequence's own length.
double denominator_of(const Totals& total, Aggregation aggregation, const float* normalizer) {
  if (normalizer != nullptr) return static_cast<double>(*normalizer);
  double d = static_cast<double>(aggregation == Aggregation::token_mean ? total.tokens : total.sequences);
  if (aggregation == Aggregation::seq_mean_token_sum_norm) d *= static_cast<double>(total.longest);
  return d < 1.0 ? 1.0 : d;
}

double weight_of(Aggregation aggregation, double denominator, std::int64_t length) {
  const bool mean = aggregation == Aggregation::seq_mean_token_mean && length > 1;
  return 1.0 / (mean ? denominator * static_cast<double>(length) : denominator);
}

// ------------------------------------------------------------------------------------------------------------ sweep
// What a sweep computes besides ratio and clips; fixed at compile time where that pays.
struct Constants {
  float clip_lower, clip_upper, dual_clip, delta, log_ratio_clamp, kl_coef, entropy_coef;
  KlTerm kl;
  bool unbounded;  // no log-ratio clamp that keeps the ratio finite
};

enum Sum { kLoss, kLogRatio, kRatio, kRefK1, kRefK3, kEntropy, kSums };
constexpr int kRun = 8;  // vectors whose terms are added in float before they go to the float64 sums

template <int kUsed>
struct Accumulators {
  F32 run[kUsed];
  F64 total[kUsed][2];
  F32 ratio_min = f32(kInf), ratio_max = f32(-kInf);
  F32 low = f32(0.0f), high = f32(0.0f), dual = f32(0.0f);  // counts: exact, an item is far shorter than 2^24
  M32 nan_advantage = first32(0);

  Accumulators() {
    for (int k = 0; k < kUsed; ++k) run[k] = f32(0.0f), total[k][0] = total[k][1] = f64(0.0);
  }
  void flush() {
    for (int k = 0; k < kUsed; ++k) {
      total[k][0] = total[k][0] + lower_f64(run[k]);
      total[k][1] = total[k][1] + upper_f64(run[k]);
      run[k] = f32(0.0f);
    }
  }
  double sum_of(int k) const { return k < kUsed ? sum(total[k][0] + total[k][1]) : 0.0; }
};

Constants constants_of(const PolicySettings& settings) {
  Constants c;
  c.clip_lower = static_cast<float>(1.0 - settings.clip_low);
  c.clip_upper = static_cast<float>(1.0 + settings.clip_high);
  c.dual_clip = static_cast<float>(settings.dual_clip);
  c.delta = static_cast<float>(settings.delta);
  c.log_ratio_clamp = static_cast<float>(settings.log_ratio_clamp);
  c.kl_coef = static_cast<float>(settings.kl_coef);
  c.entropy_coef = static_cast<float>(settings.entropy_coef);
  c.kl = settings.kl;
  c.unbounded = settings.log_ratio_clamp > 80.0;  // exp overflows a float above 88.7
  return c;
}

// Pointers to the item's first token.
struct Sources {
  const float *logprobs, *old_logprobs, *advantages, *ref_logprobs, *entropy, *weights;
  float row_advantage;  // where advantages is nullptr
  float weight;
  float *gradient, *token_loss;
  bool streamed;  // the gradient goes past the caches, see kStreamBytes
};

inline void write(float* p, F32 x, int width, bool streamed) {
  if (width != kF32)
    store_n(p, x, width);
  else if (streamed)
    stream(p, x);
  else
    store(p, x);
}

inline void count_if(F32& counter, M32 m) { counter = select(m, counter + f32(1.0f), counter); }

// Adds the KL term's value to `loss` and its derivative to `slope`; sums its metrics. Lanes off the mask are garbage.
template <int kUsed>
inline void add_reference(const Constants& c, F32 gap, M32 counted, F32& loss, F32& slope, Accumulators<kUsed>& acc) {
  const F32 x = max(f32(-kRefClamp), min(f32(kRefClamp), gap));
  const M32 bound = abs(gap) > f32(kRefClamp);
  const F32 grown = exp(x);
  const F32 k3 = grown - x - f32(1.0f);
  acc.run[kRefK1] = select(counted, acc.run[kRefK1] - x, acc.run[kRefK1]);
  acc.run[kRefK3] = select(counted, acc.run[kRefK3] + k3, acc.run[kRefK3]);
  if (c.kl == KlTerm::none) return;
  F32 value = -x, derivative = f32(1.0f);
  if (c.kl == KlTerm::k2) value = x * x * f32(0.5f), derivative = -x;
  if (c.kl == KlTerm::k3) value = k3, derivative = f32(1.0f) - grown;
  loss = fma(f32(c.kl_coef), value, loss);
  slope = slope + f32(c.kl_coef) * select(bound, f32(0.0f), derivative);
}

// One vector of tokens. kPlain: nothing but ratio, clips and dual clip. kFull: every lane counts.
// `width` < kF32 at the end of a row.
template <bool kPlain, bool kFull, int kUsed>
inline void sweep_vector(const Constants& c, const Sources& s, int i, int width, M32 counted, Accumulators<kUsed>& acc) {
  const F32 zero = f32(0.0f);
  const bool whole = kFull || width == kF32;
  const auto read = [&](const float* p) {
    __builtin_prefetch(p + i + kAhead);
    return whole ? load(p + i) : load_n(p + i, width, 0.0f);
  };
  const auto keep = [&](F32 x, F32 otherwise) { return kFull ? x : select(counted, x, otherwise); };

  const F32 lp = read(s.logprobs);
  const F32 gap = keep(lp - read(s.old_logprobs), zero);
  const F32 advantage = s.advantages == nullptr ? f32(s.row_advantage) : read(s.advantages);
  const F32 cost = keep(zero - advantage, zero);
  acc.nan_advantage = acc.nan_advantage | is_nan(cost);
  const M32 dearer = cost > zero, cheaper = cost < zero;  // negative and positive advantage

  const F32 bound = f32(c.log_ratio_clamp);
  const F32 d = max(-bound, min(bound, gap));  // a NaN gap stays
  const M32 clamped = abs(gap) > bound;
  const F32 r = exp(d);
  const F32 lower = f32(c.clip_lower), upper = f32(c.clip_upper);
  const M32 low = (r < lower) & dearer, high = (r > upper) & cheaper;
  F32 slope = cost * r;
  // 0 times an infinite ratio is 0: such a token has no surrogate.
  if (c.unbounded) slope = select(cost == zero, zero, slope);
  const F32 clipped = cost * max(lower, min(upper, r));
  M32 flat = low | high;
  F32 loss = select(flat, clipped, slope);
  if (!kPlain) {  // with delta, either branch may be the one whose bound does not bind
    const M32 over = r > f32(c.delta);
    const F32 unclipped = select(over, cost * f32(c.delta), slope);
    const M32 cut = unclipped < clipped;
    loss = select(cut, clipped, unclipped);
    flat = (cut & ((r < lower) | (r > upper))) | (~cut & over);
  }
  const F32 cap = cost * f32(c.dual_clip);  // infinite without a dual clip
  const M32 capped = (loss > cap) & dearer;
  loss = select(capped, cap, loss);
  slope = select(flat | capped | clamped, zero, slope);

  acc.run[kLogRatio] = acc.run[kLogRatio] + d;
  acc.run[kRatio] = keep(acc.run[kRatio] + r, acc.run[kRatio]);
  acc.ratio_min = keep(min(r, acc.ratio_min), acc.ratio_min);
  acc.ratio_max = keep(max(r, acc.ratio_max), acc.ratio_max);
  count_if(acc.low, low);
  count_if(acc.high, high);
  count_if(acc.dual, capped);

  if constexpr (!kPlain) {
    if (s.weights != nullptr) {
      const F32 w = read(s.weights);
      loss = loss * w, slope = slope * w;
    }
    if (s.ref_logprobs != nullptr) add_reference(c, read(s.ref_logprobs) - lp, counted, loss, slope, acc);
    if (s.entropy != nullptr) {
      const F32 h = keep(read(s.entropy), zero);
      acc.run[kEntropy] = acc.run[kEntropy] + h;
      if (c.entropy_coef != 0.0f) loss = fnma(f32(c.entropy_coef), h, loss);
    }
    loss = keep(loss, zero);
    slope = keep(slope, zero);
    if (s.token_loss != nullptr) write(s.token_loss + i, loss, width, false);
  }
  acc.run[kLoss] = acc.run[kLoss] + loss;
  write(s.gradient + i, slope * f32(s.weight), width, s.streamed);
}

template <bool kPlain, int kUsed>
inline void sweep_some(const Constants& c, const Sources& s, const std::uint8_t* bytes, int i, int width,
                       Accumulators<kUsed>& acc) {
  const bool whole = width == kF32;
  const M32 counted = bytes == nullptr ? first32(width) : whole ? nonzero(bytes + i) : nonzero_n(bytes + i, width);
  const unsigned lanes = bits(counted);
  if (lanes == (1u << kF32) - 1u) {
    sweep_vector<kPlain, true>(c, s, i, width, counted, acc);
  } else if (lanes != 0) {
    sweep_vector<kPlain, false>(c, s, i, width, counted, acc);
  } else {  // nothing here counts: not even read
    write(s.gradient + i, f32(0.0f), width, s.streamed);
    if (s.token_loss != nullptr) write(s.token_loss + i, f32(0.0f), width, false);
  }
}

template <bool kPlain>
PolicySums sweep_item(const Constants& c, const Sources& s, const std::uint8_t* bytes, int n) {
  Accumulators<kPlain ? 3 : static_cast<int>(kSums)> acc;
  int i = 0;
  for (; i + kRun * kF32 <= n; i += kRun * kF32) {
    for (int j = 0; j < kRun; ++j) sweep_some<kPlain>(c, s, bytes, i + j * kF32, kF32, acc);
    acc.flush();
  }
  for (; i + kF32 <= n; i += kF32) sweep_some<kPlain>(c, s, bytes, i, kF32, acc);
  if (i < n) sweep_some<kPlain>(c, s, bytes, i, n - i, acc);
  acc.flush();
  const auto whole = [](F32 x) { return static_cast<std::int32_t>(sum(x)); };
  return {acc.sum_of(kLoss),      acc.sum_of(kLogRatio),  acc.sum_of(kRatio),  acc.sum_of(kRefK1),
          acc.sum_of(kRefK3),     acc.sum_of(kEntropy),   minimum(acc.ratio_min), maximum(acc.ratio_max),
          whole(acc.low),         whole(acc.high),        whole(acc.dual),     any(acc.nan_advantage)};
}

// ------------------------------------------------------------------------------------------------------------- fold
void find_nan(const PolicyTokens& t, const PolicyInput& in, std::int64_t index, PolicyOutput& out) {
  std::uint8_t buffer[kPolicyBlock];
  const Item item = item_at(t, index);
  const std::uint8_t* bytes = mask_block(t.mask, item.begin, item.size, buffer);
  for (int i = 0; i < item.size; ++i) {
    if (bytes != nullptr && bytes[i] == 0) continue;
    if (!in.advantage_per_row && !std::isnan(in.advantages[item.begin + i])) continue;
    out.nan_row = item.row;
    out.nan_column = item.column + i;
    return;
  }
}

void add_sums(PolicySums& into, const PolicySums& x) {
  into.loss += x.loss;
  into.log_ratio += x.log_ratio;
  into.ratio += x.ratio;
  into.ref_k1 += x.ref_k1;
  into.ref_k3 += x.ref_k3;
  into.entropy += x.entropy;
  into.ratio_min = x.ratio_min < into.ratio_min ? x.ratio_min : into.ratio_min;
  into.ratio_max = x.ratio_max > into.ratio_max ? x.ratio_max : into.ratio_max;
}

struct Counts {
  std::int64_t low = 0, high = 0, dual = 0;
};

void write_metrics(const PolicySums& s, const Counts& counts, std::int64_t tokens, float* metrics) {
  const double n = static_cast<double>(tokens);
  const double by = tokens > 0 ? n : 1.0;
  const bool extremes = tokens > 0;
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const double values[10] = {static_cast<double>(counts.low) / by,
                             static_cast<double>(counts.high) / by,
                             static_cast<double>(counts.dual) / by,
                             -s.log_ratio / by,
                             (s.ratio - s.log_ratio - n) / by,
                             s.ref_k1 / by,
                             s.ref_k3 / by,
                             s.ratio / by,
                             extremes ? static_cast<double>(s.ratio_min) : 0.0,
                             extremes ? static_cast<double>(s.ratio_max) : 0.0};
  for (int i = 0; i < 10; ++i) metrics[i] = static_cast<float>(values[i]);
  if (std::isnan(s.ratio)) metrics[8] = metrics[9] = nan;  // the vectors' extremes pass over a NaN
  metrics[10] = static_cast<float>(s.entropy / by);
  metrics[11] = static_cast<float>(n);
}

// Items in order within a row, rows in order.
void fold(const PolicyTokens& t, const PolicyInput& in, const std::int64_t* lengths, Aggregation aggregation,
          double denominator, const PolicySums* items, PolicyOutput& out, std::int64_t tokens) {
  const PolicySums empty{0.0, 0.0, 0.0, 0.0, 0.0, 0.0, kInf, -kInf, 0, 0, 0, false};
  PolicySums all = empty;
  Counts counts;
  double loss = 0.0;
  for (std::int64_t row = 0; row < t.rows; ++row) {
    PolicySums sums = empty;
    for (std::int64_t i = t.first_item[row]; i < t.first_item[row + 1]; ++i) {
      if (items[i].nan_advantage) {
        find_nan(t, in, i, out);
        return;
      }
      add_sums(sums, items[i]);
      counts.low += items[i].low;
      counts.high += items[i].high;
      counts.dual += items[i].dual;
    }
    if (lengths[row] > 0) loss += sums.loss * weight_of(aggregation, denominator, lengths[row]);
    add_sums(all, sums);
  }
  *out.loss = static_cast<float>(loss);
  write_metrics(all, counts, tokens, out.metrics);
}

}  // namespace

// -------------------------------------------------------------------------------------------------------- launchers
std::int64_t policy_items(const PolicyTokens& t, std::int64_t* first_item) {
  first_item[0] = 0;
  for (std::int64_t row = 0; row < t.rows; ++row)
    first_item[row + 1] = first_item[row] + (t.length(row) + kPolicyBlock - 1) / kPolicyBlock;
  return first_item[t.rows];
}

void policy_forward(const PolicyTokens& t, const PolicyInput& in, const PolicySettings& settings,
                    std::int64_t* lengths, PolicySums* items, PolicyOutput& out, int threads) {
  count_rows(t, lengths, threads);
  const Totals total = totals_of(t, lengths);
  const double denominator = denominator_of(total, settings.aggregation, in.normalizer);
  for (std::int64_t row = 0; row < t.rows; ++row)
    out.row_weight[row] = static_cast<float>(weight_of(settings.aggregation, denominator, lengths[row]));

  const Constants c = constants_of(settings);
  const bool plain = in.ref_logprobs == nullptr && in.entropy == nullptr && in.weights == nullptr &&
                     out.token_loss == nullptr && std::isinf(settings.delta);
  const bool large = t.rows > 0 && t.begin(t.rows - 1) + t.length(t.rows - 1) >= kStreamBytes / 4;
  const auto aligned = [](const float* p) {
    return reinterpret_cast<std::uintptr_t>(p) % (static_cast<std::uintptr_t>(kF32) * sizeof(float)) == 0;
  };
  const auto at = [](auto* p, std::int64_t offset) { return p == nullptr ? nullptr : p + offset; };
  for_items(t, threads, [&](std::int64_t i, const Item& item, const std::uint8_t* bytes) {
    const std::int64_t b = item.begin;
    const Sources s{in.logprobs + b,
                    in.old_logprobs + b,
                    in.advantage_per_row ? nullptr : in.advantages + b,
                    at(in.ref_logprobs, b),
                    at(in.entropy, b),
                    at(in.weights, b),
                    in.advantage_per_row ? in.advantages[item.row] : 0.0f,
                    out.row_weight[item.row],
                    out.gradient + b,
                    at(out.token_loss, b),
                    large && aligned(out.gradient + b)};
    items[i] = plain ? sweep_item<true>(c, s, bytes, item.size) : sweep_item<false>(c, s, bytes, item.size);
  });
  fold(t, in, lengths, settings.aggregation, denominator, items, out, total.tokens);
}

void policy_scale(const float* x, float factor, std::int64_t n, float* out, int threads) {
  constexpr std::int64_t kPiece = 1 << 14;
  const std::int64_t pieces = (n + kPiece - 1) / kPiece;
  const F32 by = f32(factor);
#pragma omp parallel for num_threads(threads) if (pieces > 4) schedule(static)
  for (std::int64_t piece = 0; piece < pieces; ++piece) {
    std::int64_t i = piece * kPiece;
    const std::int64_t end = i + kPiece < n ? i + kPiece : n;
    for (; i + kF32 <= end; i += kF32) store(out + i, load(x + i) * by);
    if (i < end) store_n(out + i, load_n(x + i, static_cast<int>(end - i), 0.0f) * by, static_cast<int>(end - i));
  }
}

void policy_spread(const PolicyTokens& t, const float* row_weight, float factor, float* out, int threads) {
  for_items(t, threads, [&](std::int64_t, const Item& item, const std::uint8_t* bytes) {
    const float value = row_weight[item.row] * factor;
    float* to = out + item.begin;
    for (int i = 0; i < item.size; ++i) to[i] = bytes == nullptr || bytes[i] != 0 ? value : 0.0f;
  });
}

}  // namespace fastreward::FASTREWARD_ISA
