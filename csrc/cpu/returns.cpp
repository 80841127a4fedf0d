// Returns, GAE, lambda-returns and V-trace: y_t = x_t + c_t y_{t+1} along each row.
//
// Fused: masks, moved rewards, next values, episode ends, the recurrence and both results in one pass. A row is read in
// blocks from its end. A vectorised step makes x and c of a block in the first-level cache, the recurrence runs through
// them in place, and a vectorised step writes the results, past the caches where they are large.
//
// The recurrence takes eight tokens at a time: three steps of shifts join them (x and c of 1, 2, 4 and 8 neighbours),
// and one multiply-add each brings in what lies behind. So the chain in which each waits for the last has one link for
// eight tokens; it is kept in float64, with the powers of a constant coefficient as they are, so that long discounts
// forget nothing. The eights are counted from the row's last valid token (running from the left: its first), wherever
// it lies: padding, place, packing and threads change no bit.
#include "cpu/returns.hpp"

#include <atomic>
#include <cmath>
#include <cstring>

#include "cpu/simd/lanes8.hpp"
#include "cpu/simd/simd.hpp"
#include "cpu/threads.hpp"

namespace fastreward::FASTREWARD_ISA {
namespace {

using namespace simd;

constexpr int kWidth = 512;  // tokens of a block: a multiple of eight
constexpr int kRoom = 16;    // floats around a buffer, for a vector beyond either end

// Outputs beyond this many bytes are written past the caches: nobody finds them there anyway.
constexpr std::int64_t kStreamBytes = std::int64_t{64} << 20;

// Tokens that a thread takes at a time, at least: some 5 us.
constexpr std::int64_t kTokens = 8192;

// Distance in floats of the prefetches: hardware stops at each 4 KiB page.
constexpr int kAhead = 512;

// The eighth power of a coefficient up to this is well within float32.
constexpr double kTame = 6e4;

constexpr float kInfinity = __builtin_inff();

// A row on its way: the block at hand, and what has been brought there.
struct Row {
  std::int64_t row = 0, begin = 0, end = 0;  // the tokens that are left: [begin, end)
  std::int64_t base = 0;                     // the block: [base, base + n)
  int n = 0;
  const std::uint8_t* mask = nullptr;  // of the block; nullptr: all valid
  bool started = false;                // the block is not the first
  bool after_valid = false;            // the token after the block is valid
  double y = 0.0;                      // of the recurrence, before the block
  double pending = 0.0;                // rewards that move on
  float value = 0.0f;                  // V of the token after the block
};

struct Buffer {
  alignas(64) float around[kRoom + kWidth + kRoom];
  float* at() { return around + kRoom; }
};

struct Buffers {
  Buffer x, c;           // x becomes y
  Buffer plain, factor;  // V-trace: the advantage without what the recurrence brings, and the factor of that
  Buffer rewards, next_values;
  std::uint8_t mask[kWidth];
};

// ------------------------------------------------------------------------------------------------------------- numbers
inline F32 load_some(const float* p, int n) { return n == kF32 ? load(p) : load_n(p, n, 0.0f); }
inline M32 nonzero_some(const std::uint8_t* p, int n) { return n == kF32 ? nonzero(p) : nonzero_n(p, n); }

// f(first token, tokens) for the vectors of a block, from its end: rows are read so, and memory likes one direction.
template <class F>
inline void for_vectors(int n, F&& f) {
  int i = n / kF32 * kF32;
  if (i < n) f(i, n - i);
  for (i -= kF32; i >= 0; i -= kF32) f(i, kF32);
}

// What `op` makes no difference with.
float identity(const ReturnsInput& in) {
  switch (in.op) {
    case ReturnsOp::sum:
      return 0.0f;
    case ReturnsOp::min:
      return kInfinity;
    case ReturnsOp::max:
      return -kInfinity;
    case ReturnsOp::logsumexp:
      return in.scale > 0.0 ? -kInfinity : kInfinity;
  }
  return 0.0f;
}

bool timed(const ReturnsInput& in) { return in.at_masked == AtMasked::decay || in.at_masked == AtMasked::zero; }

// A coefficient of a block's tokens.
class Factor {
 public:
  Factor(const Coefficient& c, const Row& row)
      : tokens_(c.values == nullptr || c.per_row ? nullptr : c.values + row.base),
        all_(c.values != nullptr && c.per_row ? static_cast<double>(c.values[row.row]) : c.number) {}
  bool constant() const { return tokens_ == nullptr; }
  double all() const { return all_; }
  F32 at(int i, int width) const {
    return tokens_ == nullptr ? f32(static_cast<float>(all_)) : load_some(tokens_ + i, width);
  }
  float at(int i) const { return tokens_ == nullptr ? static_cast<float>(all_) : tokens_[i]; }

 private:
  const float* tokens_;
  double all_;
};

// ------------------------------------------------------------------------------------------------- a block, made ready
// Whether a reward other than 0 lies on a masked token of [base, base + n); mask nullptr: all are masked.
bool some_masked_reward(const float* rewards, const std::uint8_t* mask, int n) {
  M32 some = first32(0);
  for_vectors(n, [&](int i, int width) {
    __builtin_prefetch(rewards + i - kAhead);
    const M32 nonzero_reward = ~(load_some(rewards + i, width) == f32(0.0f)) & first32(width);
    some = some | (mask == nullptr ? nonzero_reward : nonzero_reward & ~nonzero_some(mask + i, width));
  });
  return any(some);
}

// Adds the rewards of masked tokens from the last on; one that is not finite is none.
void collect(const float* rewards, int n, double& pending) {
  if (some_masked_reward(rewards, nullptr, n))
    for (int i = n - 1; i >= 0; --i)
      if (std::isfinite(rewards[i])) pending += static_cast<double>(rewards[i]);
}

// The block's rewards, those of masked tokens moved to the valid token before them.
const float* moved_rewards(const ReturnsInput& in, Row& row, float* room) {
  const float* given = in.rewards + row.base;
  if (row.pending == 0.0 && (row.mask == nullptr || !some_masked_reward(given, row.mask, row.n))) return given;
  for (int i = row.n - 1; i >= 0; --i) {
    if (row.mask == nullptr || row.mask[i] != 0) {
      room[i] = static_cast<float>(static_cast<double>(given[i]) + row.pending);
      row.pending = 0.0;
    } else {
      room[i] = 0.0f;
      if (std::isfinite(given[i])) row.pending += static_cast<double>(given[i]);
    }
  }
  return room;
}

// Values of the states that follow each token; row.value for the block before.
const float* next_values(const ReturnsInput& in, Row& row, float* room) {
  const float* own = in.values == nullptr ? nullptr : in.values + row.base;
  const float* given = in.next_values == nullptr ? nullptr : in.next_values + row.base;
  const auto value = [&](int i) { return own != nullptr && (row.mask == nullptr || row.mask[i] != 0) ? own[i] : 0.0f; };
  const float after = row.value;
  if (in.at_masked != AtMasked::carry || row.mask == nullptr) row.value = value(0);
  if (given != nullptr && (row.mask == nullptr || !timed(in))) return given;
  if (row.mask == nullptr) {
    std::memcpy(room, own + 1, static_cast<std::size_t>(row.n - 1) * sizeof(float));
    room[row.n - 1] = after;
  } else if (in.at_masked == AtMasked::carry) {
    float next = after;
    for (int i = row.n - 1; i >= 0; --i) {
      room[i] = next;
      next = row.mask[i] != 0 ? own[i] : next;
    }
    row.value = next;
  } else {
    for (int i = 0; i + 1 < row.n; ++i) room[i] = value(i + 1);
    room[row.n - 1] = after;
  }
  if (given != nullptr)
    for (int i = 0; i < row.n; ++i)
      if (row.mask[i] != 0) room[i] = given[i];
  return room;
}

// Where all tokens have one coefficient, that; in float64, as a number or the product of two.
template <ReturnsKind kKind>
bool one_coefficient(const ReturnsInput& in, const Row& row, double& coefficient) {
  const Factor gamma(in.gamma, row), lam(in.lam, row);
  const bool both = kKind != ReturnsKind::returns;
  coefficient = both ? gamma.all() * lam.all() : gamma.all();
  return kKind != ReturnsKind::vtrace && gamma.constant() && (!both || lam.constant());
}

// The values that follow those of a block's last vector, which begins at i; the very last is `after`.
inline F32 last_following(const float* values, int i, int n, float after) {
  float next[kF32] = {};
  for (int k = i + 1; k < n; ++k) next[k - i - 1] = values[k];
  next[n - 1 - i] = after;
  return load(next);
}

// x of a block in which every token is valid and has the same coefficient; what is not finite shows in `wrong`.
template <ReturnsKind kKind>
void prepare_plain(const ReturnsInput& in, Row& row, Buffers& room, F32& wrong) {
  const float* rewards = in.move ? moved_rewards(in, row, room.rewards.at()) : in.rewards + row.base;
  const float* values = in.values + row.base;
  const float* given = in.next_values == nullptr ? nullptr : in.next_values + row.base;
  const float after = row.value;
  if (kKind == ReturnsKind::gae) row.value = values[0];
  const double gamma = Factor(in.gamma, row).all(), lam = Factor(in.lam, row).all();
  const F32 discount = f32(static_cast<float>(kKind == ReturnsKind::lambda ? gamma * (1.0 - lam) : gamma));
  const int n = row.n;
  float* xs = room.x.at();
  F32 bad = f32(0.0f);
  for_vectors(n, [&](int i, int width) {
    __builtin_prefetch(rewards + i - kAhead);
    F32 x = load_some(rewards + i, width);
    if constexpr (kKind != ReturnsKind::returns) {
      if (given == nullptr) __builtin_prefetch(values + i - kAhead);
      const F32 following = given != nullptr     ? load_some(given + i, width)
                            : i + kF32 < n ? load(values + i + 1)
                                           : last_following(values, i, n, after);
      x = fma(discount, following, x);
    }
    if constexpr (kKind == ReturnsKind::gae) x = x - load_some(values + i, width);
    bad = fma(x, f32(0.0f), bad);
    store(xs + i, x);
  });
  wrong = wrong + bad;
}

// x and c of any block.
template <ReturnsKind kKind>
void prepare(const ReturnsInput& in, Row& row, Buffers& room, F32& wrong) {
  const float* rewards = in.move ? moved_rewards(in, row, room.rewards.at()) : in.rewards + row.base;
  const float* following = kKind == ReturnsKind::returns ? nullptr : next_values(in, row, room.next_values.at());
  const float* values = in.values + row.base;
  const std::uint8_t* terminated = in.terminated == nullptr ? nullptr : in.terminated + row.base;
  const std::uint8_t* done = in.done == nullptr ? nullptr : in.done + row.base;
  const Factor gamma(in.gamma, row), lam(in.lam, row);
  double coefficient;
  const bool one = one_coefficient<kKind>(in, row, coefficient);
  const F32 all = f32(static_cast<float>(coefficient)), nothing = f32(0.0f), unit = f32(1.0f);
  const F32 neutral = f32(identity(in));
  const bool masked = row.mask != nullptr, carried = in.at_masked == AtMasked::carry;
  const bool reset = in.at_masked == AtMasked::reset;
  // What a masked token does with what follows it: passes it on, or ends it. NaN times whatever came is NaN, which min,
  // max and logsumexp take for nothing.
  const F32 across = carried ? unit : in.op == ReturnsOp::sum ? nothing : f32(__builtin_nanf(""));
  const double lambda_discount = gamma.all() * (1.0 - lam.all());
  float *xs = room.x.at(), *cs = room.c.at();
  for_vectors(row.n, [&](int i, int width) {
    __builtin_prefetch(rewards + i - kAhead);
    if (kKind == ReturnsKind::gae || kKind == ReturnsKind::vtrace) __builtin_prefetch(values + i - kAhead);
    const M32 valid = masked ? nonzero_some(row.mask + i, width) : first32(width);
    const auto counted = [&](F32 v) { return masked ? select(valid, v, nothing) : v; };
    const auto flagged = [&](const std::uint8_t* flags) {
      return counted(select(nonzero_some(flags + i, width), unit, nothing));
    };
    const F32 r = counted(load_some(rewards + i, width)), g = gamma.at(i, width);
    F32 x = r, c = one ? all : g;
    if constexpr (kKind != ReturnsKind::returns) {
      const F32 bootstrapped = terminated == nullptr ? unit : unit - flagged(terminated);
      const F32 going_on = done == nullptr ? bootstrapped : bootstrapped * (unit - flagged(done));
      const F32 discount = g * bootstrapped, next = counted(load_some(following + i, width));
      c = one ? all * going_on : g * lam.at(i, width) * going_on;
      if constexpr (kKind == ReturnsKind::lambda) {
        const F32 traced = lam.at(i, width) * going_on;
        // As prepare_plain has it where nothing ends, to the bit.
        F32 looked = discount * (unit - traced);
        if (one) looked = select(going_on == unit, f32(static_cast<float>(lambda_discount)), looked);
        x = fma(looked, next, r);
      } else {
        const F32 after = carried || reset ? next : load_some(following + i, width);
        x = fma(discount, after, r) - counted(load_some(values + i, width));
      }
      if constexpr (kKind == ReturnsKind::vtrace) {
        const F32 ratio = exp(counted(load_some(in.log_ratios + row.base + i, width)));
        const F32 rho = min(f32(in.rho_bar), ratio);
        x = rho * x;
        c = c * min(f32(in.c_bar), ratio);
        store(room.plain.at() + i, x);
        store(room.factor.at() + i, rho * discount * going_on);
      }
    }
    wrong = fma(masked && (carried || reset) ? counted(x) : select(first32(width), x, nothing), nothing, wrong);
    if (masked && kKind == ReturnsKind::returns) x = select(valid, x, neutral);
    if (masked && kKind != ReturnsKind::returns && (carried || reset)) x = counted(x);
    if (masked && (carried || reset)) c = select(valid, c, across);
    store(xs + i, x);
    store(cs + i, c);
  });
  if (kKind == ReturnsKind::lambda) {
    const auto valid = [&](int i) { return !masked || row.mask[i] != 0; };
    // The last token of a sequence: there is nothing beyond the next value for lambda to look at.
    const auto close = [&](int i) {
      const float discount = terminated != nullptr && terminated[i] != 0 ? 0.0f : gamma.at(i);
      xs[i] = discount * following[i] + rewards[i];
      cs[i] = 0.0f;
    };
    if (reset)
      for (int i = 0; i < row.n; ++i)
        if (valid(i) && !(i + 1 < row.n ? valid(i + 1) : row.after_valid)) close(i);
    if (!reset && !row.started) close(row.n - 1);
  }
}

// ------------------------------------------------------------------------------------------------------ the recurrence
// Powers of a coefficient: what n tokens make of what lies behind them.
struct Powers {
  double of[9];
  explicit Powers(double c) {
    of[0] = 1.0;
    for (int n = 1; n < 9; ++n) of[n] = of[n - 1] * c;
  }
};

inline double fused(double a, double b, double c) { return kHasFma ? __builtin_fma(a, b, c) : a * b + c; }

// The eights of a block, in the order in which the recurrence meets them: f(first token).
template <bool kReverse, class F>
inline void for_eights(int n, F&& f) {
  if (kReverse)
    for (int i = n - 8; i > -8; i -= 8) f(i);
  else
    for (int i = 0; i < n; i += 8) f(i);
}

// y = f(c, y, x) token by token.
template <bool kReverse, class F>
void chain(float* xs, const float* cs, int n, bool one, double coefficient, double& y, const F& f) {
  const float all = static_cast<float>(coefficient);
  for (int k = 0; k < n; ++k) {
    const int i = kReverse ? n - 1 - k : k;
    y = f(one && cs[i] == all ? coefficient : static_cast<double>(cs[i]), y, static_cast<double>(xs[i]));
    xs[i] = static_cast<float>(y);
  }
}

// Sums with the coefficients of each token. one: all are `coefficient`, 1 or 0.
template <bool kReverse>
void sum_any(float* xs, const float* cs, int n, bool one, double coefficient, double& carried) {
  constexpr bool kUp = !kReverse;
  const Powers powers(coefficient);
  const F8 all = f8(static_cast<float>(coefficient)), nothing = f8(0.0f), unit = f8(1.0f);
  double y = carried;
  for_eights<kReverse>(n, [&](int i) {
    const F8 given = load8(cs + i);
    F8 x = load8(xs + i), c = given;
    x = fma(c, moved<kUp, 1>(x, nothing), x), c = mul(c, moved<kUp, 1>(c, unit));
    x = fma(c, moved<kUp, 2>(x, nothing), x), c = mul(c, moved<kUp, 2>(c, unit));
    x = fma(c, moved<kUp, 4>(x, nothing), x), c = mul(c, moved<kUp, 4>(c, unit));
    if (equal(mul(c, nothing), nothing) != 0xffu) {  // a product beyond float32, whose y need not be
      chain<kReverse>(xs + i, cs + i, 8, one, coefficient, y, fused);
      return;
    }
    store8(xs + i, fma(c, f8(static_cast<float>(y)), x));
    double product = static_cast<double>(kReverse ? first(c) : last(c));
    if (one && product != 0.0) product = powers.of[__builtin_popcount(equal(given, all))];
    y = fused(product, y, static_cast<double>(kReverse ? first(x) : last(x)));
  });
  carried = y;
}

// The same where every token has `coefficient`, to the bit: eight tokens, of which the nearest to y is last.
struct EightSteps {
  F8 c1, c2, c4;
  double eighth;
  explicit EightSteps(double coefficient)
      : c1(f8(static_cast<float>(coefficient))), c2(mul(c1, c1)), c4(mul(c2, c2)), eighth(Powers(coefficient).of[8]) {}

  // What lies `0, 1, ..., 7` tokens away from y is multiplied with these.
  template <bool kReverse>
  F8 product() const {
    constexpr bool kUp = !kReverse;
    const F8 unit = f8(1.0f);
    F8 p = mul(c1, moved<kUp, 1>(c1, unit));
    p = mul(p, moved<kUp, 2>(p, unit));
    return mul(p, moved<kUp, 4>(p, unit));
  }
  template <bool kReverse>
  F8 sum(F8 x, F8 products, double& y) const {
    constexpr bool kUp = !kReverse;
    const F8 nothing = f8(0.0f);
    x = fma(c1, moved<kUp, 1>(x, nothing), x);
    x = fma(c2, moved<kUp, 2>(x, nothing), x);
    x = fma(c4, moved<kUp, 4>(x, nothing), x);
    const F8 sums = fma(products, f8(static_cast<float>(y)), x);
    y = fused(eighth, y, static_cast<double>(kReverse ? first(x) : last(x)));
    return sums;
  }
};

template <bool kReverse>
void sum_one(float* xs, int n, double coefficient, double& carried) {
  const EightSteps steps(coefficient);
  const F8 products = steps.product<kReverse>();
  double y = carried;
  for_eights<kReverse>(n, [&](int i) { store8(xs + i, steps.sum<kReverse>(load8(xs + i), products, y)); });
  carried = y;
}

// The least or the greatest so far, without a discount.
template <bool kReverse, class F>
void extreme(float* xs, int n, float neutral, double& y, const F& f) {
  constexpr bool kUp = !kReverse;
  const F8 none = f8(neutral);
  F8 so_far = f8(static_cast<float>(y));
  for_eights<kReverse>(n, [&](int i) {
    F8 x = load8(xs + i);
    x = f(moved<kUp, 1>(x, none), x);
    x = f(moved<kUp, 2>(x, none), x);
    x = f(moved<kUp, 4>(x, none), x);
    x = f(so_far, x);
    store8(xs + i, x);
    so_far = f8(kReverse ? first(x) : last(x));
  });
  y = static_cast<double>(first(so_far));
}

template <bool kReverse>
void recur(const ReturnsInput& in, Row& row, Buffers& room, bool plain, bool one, double coefficient) {
  float* xs = room.x.at();
  const float* cs = room.c.at();
  const int n = row.n;
  const double scale = in.scale;
  const bool undiscounted = one && coefficient == 1.0 && in.at_masked != AtMasked::reset;
  if (in.op == ReturnsOp::sum) {
    plain ? sum_one<kReverse>(xs, n, coefficient, row.y) : sum_any<kReverse>(xs, cs, n, one, coefficient, row.y);
  } else if (in.op == ReturnsOp::min && undiscounted) {
    extreme<kReverse>(xs, n, kInfinity, row.y, [](F8 a, F8 b) { return min(a, b); });
  } else if (in.op == ReturnsOp::max && undiscounted) {
    extreme<kReverse>(xs, n, -kInfinity, row.y, [](F8 a, F8 b) { return max(a, b); });
  } else if (in.op == ReturnsOp::min || in.op == ReturnsOp::max) {
    // An infinite y is an empty past, whatever the sign of c; c is NaN where the past ends.
    const bool least = in.op == ReturnsOp::min;
    chain<kReverse>(xs, cs, n, one, coefficient, row.y, [least](double c, double y, double x) {
      const double b = c * y;
      return !std::isinf(y) && (least ? b < x : b > x) ? b : x;
    });
  } else {
    chain<kReverse>(xs, cs, n, one, coefficient, row.y, [scale](double c, double y, double x) {
      const double b = c * y;
      if (std::isinf(y) || std::isnan(b)) return x;
      if (std::isinf(x)) return b;
      const double best = (scale > 0.0) == (x > b) ? x : b;
      return best + scale * std::log1p(std::exp(-std::fabs(x - b) / std::fabs(scale)));
    });
  }
}

// --------------------------------------------------------------------------------------------------------- the results
// Where a row's results go, block after block.
//
// Large ones go past the caches, whole lines at a time: a line that is written in two parts costs two ways to memory.
// Blocks are counted from the last valid token and lines are not, so what a block leaves of its first line waits for
// the block before it.
class Output {
 public:
  Output(float* p, bool large) : p_(p), large_(large) {}

  // f(first token, tokens) -> F32 for the tokens [0, n) from p + base on, right before those of the last call.
  template <class F>
  void put(std::int64_t base, int n, F&& f) {
    if (p_ == nullptr) return;
    float* p = p_ + base;
    if (!large_) return put_vectors(p, n, f, [](float* to, F32 v) { store(to, v); });
    const int first = before_line(p);
    if (first == 0 && waiting_ == 0) return put_vectors(p, n, f, [](float* to, F32 v) { stream(to, v); });
    float* results = results_.at();
    std::memmove(results + n, results, static_cast<std::size_t>(waiting_) * sizeof(float));
    put_vectors(results, n, f, [](float* to, F32 v) { store(to, v); });
    const int there = n + waiting_;
    waiting_ = first < there ? first : there;
    put_vectors(
        p + waiting_, there - waiting_, [&](int i, int width) { return load_some(results + waiting_ + i, width); },
        [](float* to, F32 v) { stream(to, v); });
  }
  void zero(std::int64_t base, int n) {
    put(base, n, [](int, int) { return f32(0.0f); });
  }
  // What waits, for a block that is made in one go.
  bool large() const { return large_; }
  float* begin(std::int64_t base) const { return p_ + base; }
  int waiting() const { return waiting_; }
  float* results() { return results_.at(); }

  // The row begins at p + base: nothing more will come.
  void finish(std::int64_t base) {
    for (int i = 0; i < waiting_; ++i) p_[base + i] = results_.at()[i];
    waiting_ = 0;
  }

 private:
  static int before_line(const float* p) {
    return static_cast<int>(-(reinterpret_cast<std::intptr_t>(p) / std::intptr_t{sizeof(float)})) & 15;
  }
  // A function of its own for each way to store, as this is the innermost loop.
  template <class F, class Store>
  static void put_vectors(float* p, int n, const F& f, const Store& whole) {
    for_vectors(n, [&](int i, int width) {
      if (width == kF32)
        whole(p + i, f(i, width));
      else
        store_n(p + i, f(i, width), width);
    });
  }

  float* p_;
  bool large_;
  int waiting_ = 0;
  Buffer results_;
};

template <ReturnsKind kKind>
void write(const ReturnsInput& in, const Row& row, Buffers& room, Output& out, Output& second) {
  const float* ys = room.x.at();
  const bool masked = row.mask != nullptr && in.at_masked != AtMasked::decay;
  const auto shown = [&](int i, int width, F32 v) {
    return masked ? select(nonzero_some(row.mask + i, width), v, f32(0.0f)) : v;
  };
  const auto result = [&](int i, int width) { return shown(i, width, load(ys + i)); };
  const auto with_value = [&](int i, int width) {
    const F32 value = load_some(in.values + row.base + i, width);
    const F32 counted = row.mask == nullptr ? value : select(nonzero_some(row.mask + i, width), value, f32(0.0f));
    return shown(i, width, load(ys + i) + counted);
  };
  if constexpr (kKind == ReturnsKind::gae) {
    out.put(row.base, row.n, result);
    second.put(row.base, row.n, with_value);
  } else if constexpr (kKind == ReturnsKind::vtrace) {
    out.put(row.base, row.n, with_value);
    second.put(row.base, row.n, [&](int i, int width) {
      return shown(i, width, fma(load(room.factor.at() + i), load(ys + i + 1), load(room.plain.at() + i)));
    });
  } else {
    out.put(row.base, row.n, result);
  }
}

// ---------------------------------------------------------------------------------------------- a block in one go
// An Output while a block of whole sixteens goes by, from its end. Its lines are joined in registers, and written one
// for each sixteen: a burst of them waits for memory, and has nothing to do meanwhile.
template <bool kLarge>
class Passing {
 public:
  Passing(Output& out, std::int64_t base)
      : out_(out),
        to_(out.begin(base)),
        waiting_(out.waiting()),
        late_(waiting_ >= 8),
        turn_(waiting_ & 7),
        above_(turned(load8(out.results()), turn_)),
        whole_(load8(out.results() + (waiting_ & 7))) {}

  // The results of [i, i + 16), which lie before those of the last call.
  void put(int i, F8 low, F8 high) {
    if (!kLarge) {
      store8(to_ + i, low), store8(to_ + i + 8, high);
      return;
    }
    low_ = low;
    const F8 upper = turned(high, turn_), lower = turned(low, turn_);
    const F8 second = joined(upper, above_, turn_), first = joined(lower, upper, turn_);
    above_ = lower;
    if (late_)
      stream16(to_ + i + waiting_, second, whole_);
    else
      stream16(to_ + i + waiting_, first, second);
    whole_ = first;
  }
  // After the block.
  void finish() {
    if (!kLarge) return;
    store8(out_.results(), low_);
    if (late_) store8(out_.results() + (waiting_ & 7), whole_);
  }

 private:
  Output& out_;
  float* to_;
  int waiting_;
  bool late_;  // the upper half of a line waits for the lower one
  Turn8 turn_;
  F8 above_, whole_, low_ = f8(0.0f);
};

// prepare_plain, sum_one and write of a full block from its end, to the bit: loads, recurrence and stores side by side,
// as the memory works while the recurrence does.
template <ReturnsKind kKind, bool kLarge>
void pass(const ReturnsInput& in, Row& row, double coefficient, Output& out, Output& second, F32& wrong) {
  const float* rewards = in.rewards + row.base;
  const float* values = in.values + row.base;
  const float* given = in.next_values == nullptr ? nullptr : in.next_values + row.base;
  const double gamma = Factor(in.gamma, row).all(), lam = Factor(in.lam, row).all();
  const F8 discount = f8(static_cast<float>(kKind == ReturnsKind::lambda ? gamma * (1.0 - lam) : gamma));
  const F8 after = f8(row.value), nothing = f8(0.0f);
  const EightSteps steps(coefficient);
  const F8 products = steps.product<true>();
  Passing<kLarge> first_out(out, row.base), second_out(kKind == ReturnsKind::gae ? second : out, row.base);
  F8 bad = nothing;
  double y = row.y;
  const auto eight = [&](int i) {
    F8 x = load8(rewards + i);
    if constexpr (kKind != ReturnsKind::returns) {
      const F8 following = given != nullptr    ? load8(given + i)
                           : i + 8 < kWidth ? load8(values + i + 1)
                                               : moved<false, 1>(load8(values + i), after);
      x = fma(discount, following, x);
    }
    if constexpr (kKind == ReturnsKind::gae) x = sub(x, load8(values + i));
    bad = fma(x, nothing, bad);
    return steps.sum<true>(x, products, y);
  };
  for (int i = kWidth - 16; i >= 0; i -= 16) {
    __builtin_prefetch(rewards + i - kAhead);
    if (kKind != ReturnsKind::returns) __builtin_prefetch((given != nullptr ? given : values) + i - kAhead);
    if (kKind == ReturnsKind::gae && given != nullptr) __builtin_prefetch(values + i - kAhead);
    const F8 high = eight(i + 8), low = eight(i);
    first_out.put(i, low, high);
    if (kKind == ReturnsKind::gae) second_out.put(i, add(low, load8(values + i)), add(high, load8(values + i + 8)));
  }
  first_out.finish();
  if (kKind == ReturnsKind::gae) second_out.finish(), row.value = values[0];
  row.y = y;
  if (equal(bad, nothing) != 0xffu) wrong = f32(__builtin_nanf(""));
}

// --------------------------------------------------------------------------------------------------------------- a row
Row start(const ReturnsInput& in, std::int64_t index) {
  const float beyond = in.beyond == nullptr ? identity(in) : in.beyond[index];
  const bool of_recurrence = in.kind == ReturnsKind::returns;
  Row row;
  row.row = index;
  row.begin = in.begin(index);
  row.end = in.begin(index + 1);
  row.y = of_recurrence ? static_cast<double>(beyond) : 0.0;
  row.value = of_recurrence ? 0.0f : beyond;
  return row;
}

// The next block of the row, from its end or from its beginning.
void advance(const ReturnsInput& in, Row& row) {
  const std::int64_t left = row.end - row.begin;
  row.n = left < kWidth ? static_cast<int>(left) : kWidth;
  row.base = in.reverse ? row.end - row.n : row.begin;
  if (in.reverse)
    row.end = row.base;
  else
    row.begin = row.base + row.n;
}

// Looks at the block's mask; false: all of it is masked.
bool look(const ReturnsInput& in, Row& row, std::uint8_t* bytes) {
  row.mask = mask_block(in.mask, row.base, row.n, bytes);
  if (row.mask == nullptr) return true;
  if (in.mask.kind == MaskKind::bytes)  // the block after the next
    for (int i = 0; i < kWidth; i += 64) __builtin_prefetch(row.mask + i - 2 * kWidth);
  std::uint8_t some = 0, none = 0;
  for (int i = 0; i < row.n; ++i) some |= row.mask[i], none |= static_cast<std::uint8_t>(row.mask[i] == 0);
  if (none == 0) row.mask = nullptr;
  return some != 0;
}

// Leaves out what lies beyond the outermost valid token: no recurrence has begun there. Its rewards may move.
void skip(const ReturnsInput& in, Row& row, std::uint8_t* bytes, Output& out, Output& second) {
  while (in.mask.kind != MaskKind::none && row.begin < row.end) {
    advance(in, row);
    int outer = row.n;
    if (look(in, row, bytes)) {
      outer = 0;
      if (row.mask != nullptr)
        while (row.mask[in.reverse ? row.n - 1 - outer : outer] == 0) ++outer;
    }
    const std::int64_t from = in.reverse ? row.base + row.n - outer : row.base;
    if (in.move) collect(in.rewards + from, outer, row.pending);
    out.zero(from, outer);
    second.zero(from, outer);
    if (outer == row.n) continue;
    (in.reverse ? row.end : row.begin) = in.reverse ? from : row.base + outer;
    return;
  }
}

template <ReturnsKind kKind>
void run_row(const ReturnsInput& in, std::int64_t index, Buffers& room, Output& out, Output& second, F32& wrong) {
  Row row = start(in, index);
  skip(in, row, room.mask, out, second);
  while (row.begin < row.end) {
    advance(in, row);
    const bool some = look(in, row, room.mask);
    if (!some && in.at_masked == AtMasked::carry) {  // nothing but rewards to move
      if (in.move) collect(in.rewards + row.base, row.n, row.pending);
      out.zero(row.base, row.n);
      second.zero(row.base, row.n);
      row.after_valid = false;
      continue;
    }
    double coefficient;
    const bool one = one_coefficient<kKind>(in, row, coefficient);
    const bool opened = kKind == ReturnsKind::lambda && !row.after_valid;  // by a token that has to be closed
    const bool plain = one && !opened && row.mask == nullptr && in.terminated == nullptr && in.done == nullptr &&
                       in.op == ReturnsOp::sum && std::fabs(coefficient) <= kTame;
    if (plain && in.reverse && row.n == kWidth && row.pending == 0.0) {
      out.large() ? pass<kKind, true>(in, row, coefficient, out, second, wrong)
                  : pass<kKind, false>(in, row, coefficient, out, second, wrong);
      row.started = row.after_valid = true;
      continue;
    }
    float *xs = room.x.at(), *cs = room.c.at();
    plain ? prepare_plain<kKind>(in, row, room, wrong) : prepare<kKind>(in, row, room, wrong);
    for (int i = 0; i < 8; ++i) {  // what an eight has too many
      const int beyond = in.reverse ? -1 - i : row.n + i;
      xs[beyond] = identity(in), cs[beyond] = 1.0f;
    }
    if (in.reverse) xs[row.n] = static_cast<float>(row.y);  // V-trace looks one token ahead
    in.reverse ? recur<true>(in, row, room, plain, one, coefficient)
               : recur<false>(in, row, room, plain, one, coefficient);
    write<kKind>(in, row, room, out, second);
    row.started = true;
    row.after_valid = row.mask == nullptr || row.mask[0] != 0;
  }
  out.finish(in.begin(index));
  second.finish(in.begin(index));
}

template <ReturnsKind kKind>
bool run(const ReturnsInput& in, float* out, float* second, int threads) {
  const std::int64_t tokens = in.bounds == nullptr ? in.rows * in.columns : in.bounds[in.rows];
  const bool large = in.reverse && tokens * 4 >= kStreamBytes;
  const std::int64_t least = kTokens * in.rows / (tokens + 1) + 1;
  std::atomic<bool> good{true};
  parallel_ranges(threads, in.rows, grain_of(in.rows, least), [&](std::int64_t first_row, std::int64_t last_row, int) {
    Buffers room;
    Output results(out, large), others(second, large);
    F32 wrong = f32(0.0f);
    // From the last token of the last row to the first of the first: one stream of memory that the prefetches run ahead in.
    for (std::int64_t b = last_row - 1; b >= first_row; --b) run_row<kKind>(in, b, room, results, others, wrong);
    if (large) fence();
    if (!(sum(wrong) == 0.0f)) good = false;
  });
  return good;
}

}  // namespace

// ------------------------------------------------------------------------------------------------------------ launcher
bool returns_scan(const ReturnsInput& in, float* out, float* second, int threads) {
  switch (in.kind) {
    case ReturnsKind::returns:
      return run<ReturnsKind::returns>(in, out, second, threads);
    case ReturnsKind::gae:
      return run<ReturnsKind::gae>(in, out, second, threads);
    case ReturnsKind::lambda:
      return run<ReturnsKind::lambda>(in, out, second, threads);
    case ReturnsKind::vtrace:
      return run<ReturnsKind::vtrace>(in, out, second, threads);
  }
  return false;
}

}  // namespace fastreward::FASTREWARD_ISA
