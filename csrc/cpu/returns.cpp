// Returns, GAE, lambda-returns and V-trace: y_t = x_t + c_t y_{t+1} along each row.
//
// Fused: masks, moved rewards, next values, episode ends, the recurrence and both results in one pass. A row is read in
// blocks of kWidth tokens from its end. A vectorised step makes x and c of a block in the first-level cache; a scalar
// chain runs through them; a vectorised step writes the results, past the caches where they are large.
//
// The chain is one fma after the other, each waiting for the last: kLanes rows run through it side by side, which hides
// that; it runs in float64, as long discounts forget nothing then. A lane that has finished its row takes the next one, so that unequal rows leave none idle. A row's numbers are
// those of the plain loop over its valid tokens, whatever is beside it: padding, place and threads change no bit.
#include "cpu/returns.hpp"

#include <atomic>
#include <cmath>
#include <cstring>

#include "cpu/simd/simd.hpp"
#include "cpu/threads.hpp"

namespace fastreward::FASTREWARD_ISA {
namespace {

using namespace simd;

constexpr int kLanes = 8;
constexpr int kWidth = 256;
constexpr int kStride = kWidth + 16;  // a row of a buffer, with room for a vector beyond its end

// Outputs beyond this many bytes are written past the caches: nobody finds them there anyway.
constexpr std::int64_t kStreamBytes = std::int64_t{64} << 20;

// Tokens that a thread takes at a time, at least: some 5 us.
constexpr std::int64_t kTokens = 8192;

// How many lanes ahead memory is asked for.
constexpr int kAhead = 1;

constexpr float kInfinity = __builtin_inff();

// The block of a row that a lane is at, and what the recurrence has brought there.
struct Lane {
  std::int64_t row = -1, begin = 0, end = 0;  // the tokens that are left: [begin, end)
  std::int64_t base = 0;                      // the block: [base, base + n)
  int n = 0;
  int low = 0, high = 0;               // where the recurrence runs in the block: not beyond the outermost valid token
  const std::uint8_t* mask = nullptr;  // of the block; nullptr: all valid
  bool started = false;                // a valid token has been seen
  bool after_valid = false;            // the token after the block is valid
  double y = 0.0;                      // of the recurrence, before the block
  float value = 0.0f, pending = 0.0f;  // of the token after the block: V, rewards that move on
};

struct Buffers {
  alignas(64) float x[kLanes][kStride];  // then y
  alignas(64) double c[kLanes][kStride];
  alignas(64) float plain[kLanes][kStride];   // V-trace: the advantage without what the recurrence brings,
  alignas(64) float factor[kLanes][kStride];  // and the factor of that
  alignas(64) float rewards[kStride], next_values[kStride];
  std::uint8_t mask[kLanes][kWidth];
};

// ------------------------------------------------------------------------------------------------------------- numbers
inline double fused(double a, double b, double c) { return kHasFma ? __builtin_fma(a, b, c) : a * b + c; }

inline F32 load_some(const float* p, int n) { return n == kF32 ? load(p) : load_n(p, n, 0.0f); }
inline M32 nonzero_some(const std::uint8_t* p, int n) { return n == kF32 ? nonzero(p) : nonzero_n(p, n); }

// f(first token, tokens) for the vectors of a block.
template <class F>
inline void for_vectors(int n, F&& f) {
  int i = 0;
  for (; i + kF32 <= n; i += kF32) f(i, kF32);
  if (i < n) f(i, n - i);
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
      return in.scale > 0.0f ? -kInfinity : kInfinity;
  }
  return 0.0f;
}

// A coefficient of a block's tokens.
class Factor {
 public:
  Factor(const Coefficient& c, const Lane& lane)
      : tokens_(c.values == nullptr || c.per_row ? nullptr : c.values + lane.base),
        all_(c.values != nullptr && c.per_row ? c.values[lane.row] : static_cast<float>(c.number)) {}
  F32 at(int i, int width) const { return tokens_ == nullptr ? f32(all_) : load_some(tokens_ + i, width); }
  float at(int i) const { return tokens_ == nullptr ? all_ : tokens_[i]; }

 private:
  const float* tokens_;
  float all_;
};

// ------------------------------------------------------------------------------------------------- a block, made ready
bool timed(const ReturnsInput& in) { return in.at_masked == AtMasked::decay || in.at_masked == AtMasked::zero; }

// Rewards of masked tokens go to the valid token before them. nullptr: there are none.
const float* moved_rewards(const ReturnsInput& in, Lane& lane, float* room) {
  const float* given = in.rewards + lane.base;
  bool some = lane.pending != 0.0f;
  if (lane.mask != nullptr)
    for_vectors(lane.n, [&](int i, int width) {
      const M32 zero = load_some(given + i, width) == f32(0.0f);
      some |= any(~(nonzero_some(lane.mask + i, width) | zero));
    });
  if (!some) return given;
  for (int i = lane.n - 1; i >= 0; --i) {
    if (lane.mask == nullptr || lane.mask[i] != 0) {
      room[i] = given[i] + lane.pending;
      lane.pending = 0.0f;
    } else {
      room[i] = 0.0f;
      if (std::isfinite(given[i])) lane.pending += given[i];
    }
  }
  return room;
}

// Values of the states that follow each token; lane.value for the block before.
const float* next_values(const ReturnsInput& in, Lane& lane, float* room) {
  const float* own = in.values == nullptr ? nullptr : in.values + lane.base;
  const float* given = in.next_values == nullptr ? nullptr : in.next_values + lane.base;
  const auto value = [&](int i) { return own != nullptr && (lane.mask == nullptr || lane.mask[i] != 0) ? own[i] : 0.0f; };
  const float after = lane.value;
  if (in.at_masked != AtMasked::carry || lane.mask == nullptr) lane.value = value(0);
  if (given != nullptr && (lane.mask == nullptr || !timed(in))) return given;
  if (lane.mask == nullptr) {
    std::memcpy(room, own + 1, static_cast<std::size_t>(lane.n - 1) * sizeof(float));
    room[lane.n - 1] = after;
  } else if (in.at_masked == AtMasked::carry) {
    float next = after;
    for (int i = lane.n - 1; i >= 0; --i) {
      room[i] = next;
      next = lane.mask[i] != 0 ? own[i] : next;
    }
    lane.value = next;
  } else {
    for (int i = 0; i + 1 < lane.high; ++i) room[i] = value(i + 1);
    for (int i = lane.high - 1; i < lane.n; ++i) room[i] = after;
  }
  if (given != nullptr)
    for (int i = 0; i < lane.n; ++i)
      if (lane.mask[i] != 0) room[i] = given[i];
  return room;
}

// x and c of a block into lane l of the buffers; what is not finite shows in `wrong`.
template <ReturnsKind kKind>
void prepare(const ReturnsInput& in, Lane& lane, int l, Buffers& room, F32& wrong) {
  const float* rewards = in.move ? moved_rewards(in, lane, room.rewards) : in.rewards + lane.base;
  const float* following = kKind == ReturnsKind::returns ? nullptr : next_values(in, lane, room.next_values);
  const float* values = in.values + lane.base;
  const std::uint8_t* terminated = in.terminated == nullptr ? nullptr : in.terminated + lane.base;
  const std::uint8_t* done = in.done == nullptr ? nullptr : in.done + lane.base;
  const Factor gamma(in.gamma, lane), lam(in.lam, lane);
  // Numbers are factors in float64; coefficients per row or token are multiplied in as they are.
  const bool plain = in.gamma.values == nullptr && (kKind == ReturnsKind::returns || in.lam.values == nullptr);
  const double number = !plain ? 1.0 : kKind == ReturnsKind::returns ? in.gamma.number : in.gamma.number * in.lam.number;
  const F64 scale = f64(number);
  const F32 zero = f32(0.0f), one = f32(1.0f), neutral = f32(identity(in));
  const bool carried = in.at_masked == AtMasked::carry, reset = in.at_masked == AtMasked::reset;
  // NaN times whatever came is NaN, which min, max and logsumexp take for nothing.
  const double ending = in.op == ReturnsOp::sum ? 0.0 : static_cast<double>(__builtin_nanf(""));
  float* xs = room.x[l];
  double* cs = room.c[l];
  for_vectors(lane.n, [&](int i, int width) {
    const bool masked = lane.mask != nullptr;
    const M32 valid = masked ? nonzero_some(lane.mask + i, width) : first32(width);
    const auto counted = [&](F32 v) { return masked ? select(valid, v, zero) : v; };
    const F32 r = counted(load_some(rewards + i, width)), g = gamma.at(i, width);
    F32 x = r, c = plain ? one : g;
    if constexpr (kKind != ReturnsKind::returns) {
      F32 discount = g, going_on = one;
      if (terminated != nullptr) {
        const F32 ends = counted(select(nonzero_some(terminated + i, width), one, zero));
        going_on = one - ends;
        discount = g * going_on;
      }
      if (done != nullptr) going_on = going_on * (one - counted(select(nonzero_some(done + i, width), one, zero)));
      const F32 next = load_some(following + i, width);
      if constexpr (kKind == ReturnsKind::lambda) {
        const F32 traced = lam.at(i, width) * going_on;
        x = fma(discount * (one - traced), masked ? select(valid, next, zero) : next, r);
        c = plain ? going_on : g * traced;
      } else {
        const F32 v = counted(load_some(values + i, width));
        x = fma(discount, next, r) - v;
        c = plain ? going_on : g * lam.at(i, width) * going_on;
      }
      if constexpr (kKind == ReturnsKind::vtrace) {
        const F32 ratio = exp(counted(load_some(in.log_ratios + lane.base + i, width)));
        const F32 rho = min(f32(in.rho_bar), ratio);
        x = rho * x;
        c = c * min(f32(in.c_bar), ratio);
        store(room.plain[l] + i, x);
        store(room.factor[l] + i, rho * discount * going_on);
      }
    }
    if (masked && !carried && !reset) {
      wrong = fma(select(first32(width), x, zero), zero, wrong);
    } else {
      wrong = fma(counted(x), zero, wrong);
    }
    if (masked) {
      if (kKind == ReturnsKind::returns) x = select(valid, x, neutral);
      if (kKind != ReturnsKind::returns && (carried || reset)) x = counted(x);
    }
    store(xs + i, x);
    store(cs + i, lower_f64(c) * scale);
    store(cs + i + kF64, upper_f64(c) * scale);
  });
  if (lane.mask != nullptr && (carried || reset))
    for (int i = 0; i < lane.n; ++i) cs[i] = lane.mask[i] != 0 ? cs[i] : carried ? 1.0 : ending;
  const auto close = [&](int i) {  // the last token of a sequence: lambda has nothing to look at beyond the next value
    const float discount = terminated != nullptr && terminated[i] != 0 ? 0.0f : gamma.at(i);
    xs[i] = discount * following[i] + rewards[i];
    cs[i] = 0.0;
  };
  const auto valid = [&](int i) { return lane.mask == nullptr || lane.mask[i] != 0; };
  if (kKind == ReturnsKind::lambda) {
    if (reset)
      for (int i = 0; i < lane.n; ++i)
        if (valid(i) && !(i + 1 < lane.n ? valid(i + 1) : lane.after_valid)) close(i);
    if (!reset && !lane.after_valid && valid(lane.high - 1) && !lane.started) close(lane.high - 1);
  }
  lane.after_valid = valid(0);
  lane.started = true;
  for (int i = 0; i < lane.low; ++i) xs[i] = identity(in), cs[i] = 1.0;
  for (int i = lane.high; i < kWidth; ++i) xs[i] = identity(in), cs[i] = 1.0;
  xs[kWidth] = static_cast<float>(lane.y);
}

// ----------------------------------------------------------------------------------------------------------- the chain
// y = f(c, y, x) along all lanes, in place of x.
template <bool kReverse, class F>
void chain(Buffers& room, double (&y)[kLanes], const F& f) {
  for (int k = 0; k < kWidth; ++k) {
    const int i = kReverse ? kWidth - 1 - k : k;
    for (int l = 0; l < kLanes; ++l) {
      y[l] = f(room.c[l][i], y[l], static_cast<double>(room.x[l][i]));
      room.x[l][i] = static_cast<float>(y[l]);
    }
  }
}

template <bool kReverse>
void chain(const ReturnsInput& in, Buffers& room, double (&carried)[kLanes]) {
  const double scale = static_cast<double>(in.scale);
  switch (in.op) {
    case ReturnsOp::sum:
      return chain<kReverse>(room, carried, [](double c, double y, double x) { return fused(c, y, x); });
    case ReturnsOp::min:  // c * y is NaN where the past ends, and where it is empty and c is 0: x then
      return chain<kReverse>(room, carried, [](double c, double y, double x) { return c * y < x ? c * y : x; });
    case ReturnsOp::max:
      return chain<kReverse>(room, carried, [](double c, double y, double x) { return c * y > x ? c * y : x; });
    case ReturnsOp::logsumexp:
      return chain<kReverse>(room, carried, [scale](double c, double y, double x) {
        const double b = c * y;
        if (std::isinf(y) || std::isnan(b)) return x;
        if (std::isinf(x)) return b;
        const double best = (scale > 0.0) == (x > b) ? x : b;
        return best + scale * std::log1p(std::exp(-std::fabs(x - b) / std::fabs(scale)));
      });
  }
}

// ---------------------------------------------------------------------------------------------------------- the results
template <ReturnsKind kKind>
void write(const ReturnsInput& in, const Lane& lane, int l, Buffers& room, float* out, float* second, bool large) {
  float* ys = room.x[l];
  for (int i = 0; i < lane.low; ++i) ys[i] = room.plain[l][i] = room.factor[l][i] = 0.0f;
  for (int i = lane.high; i < lane.n; ++i) ys[i] = room.plain[l][i] = room.factor[l][i] = 0.0f;
  const bool keep = in.at_masked == AtMasked::decay;
  const bool streamed = large && lane.base % kF32 == 0;
  const auto put = [&](float* p, F32 v, int width) {
    if (width != kF32)
      store_n(p, v, width);
    else if (streamed)
      stream(p, v);
    else
      store(p, v);
  };
  for_vectors(lane.n, [&](int i, int width) {
    const bool masked = lane.mask != nullptr;
    const M32 valid = masked ? nonzero_some(lane.mask + i, width) : first32(width);
    const auto shown = [&](F32 v) { return masked && !keep ? select(valid, v, f32(0.0f)) : v; };
    const F32 y = load(ys + i);
    if constexpr (kKind == ReturnsKind::returns || kKind == ReturnsKind::lambda) {
      put(out + lane.base + i, shown(y), width);
    } else {
      const F32 given = load_some(in.values + lane.base + i, width);
      const F32 sum = y + (masked ? select(valid, given, f32(0.0f)) : given);
      const bool gae = kKind == ReturnsKind::gae;
      const F32 other = gae ? y : fma(load(room.factor[l] + i), load(ys + i + 1), load(room.plain[l] + i));
      put((gae ? second : out) + lane.base + i, shown(sum), width);
      put((gae ? out : second) + lane.base + i, shown(other), width);
    }
  });
}

void write_nothing(const Lane& lane, float* out, float* second) {
  std::memset(out + lane.base, 0, static_cast<std::size_t>(lane.n) * sizeof(float));
  if (second != nullptr) std::memset(second + lane.base, 0, static_cast<std::size_t>(lane.n) * sizeof(float));
}

// ------------------------------------------------------------------------------------------------------------ the lanes
void start(const ReturnsInput& in, Lane& lane, std::int64_t row) {
  const float beyond = in.beyond == nullptr ? identity(in) : in.beyond[row];
  const bool of_recurrence = in.kind == ReturnsKind::returns;
  lane = Lane();
  lane.row = row;
  lane.begin = in.begin(row);
  lane.end = in.begin(row + 1);
  lane.y = of_recurrence ? static_cast<double>(beyond) : 0.0;
  lane.value = of_recurrence ? 0.0f : beyond;
}

// The next block of the lane's row, from its end or from its beginning. Blocks end at multiples of kWidth in memory.
void advance(const ReturnsInput& in, Lane& lane) {
  if (in.reverse) {
    const std::int64_t edge = (lane.end - 1) / kWidth * kWidth;
    lane.base = edge > lane.begin ? edge : lane.begin;
    lane.n = static_cast<int>(lane.end - lane.base);
    lane.end = lane.base;
  } else {
    const std::int64_t edge = (lane.begin / kWidth + 1) * kWidth;
    lane.base = lane.begin;
    lane.n = static_cast<int>((edge < lane.end ? edge : lane.end) - lane.base);
    lane.begin = lane.base + lane.n;
  }
}

// Looks at the block's mask; false: there is nothing to compute yet.
bool look(const ReturnsInput& in, Lane& lane, std::uint8_t* bytes) {
  lane.low = 0, lane.high = lane.n;
  lane.mask = mask_block(in.mask, lane.base, lane.n, bytes);
  if (lane.mask == nullptr) return true;
  std::uint8_t any = 0, none = 0;
  for (int i = 0; i < lane.n; ++i) any |= lane.mask[i], none |= static_cast<std::uint8_t>(lane.mask[i] == 0);
  if (none == 0) lane.mask = nullptr;
  if (lane.started) return true;
  if (any == 0) return false;
  if (lane.mask == nullptr) return true;
  if (in.reverse)
    while (lane.mask[lane.high - 1] == 0) --lane.high;
  else
    while (lane.mask[lane.low] == 0) ++lane.low;
  return true;
}

// The lane's block, soon to be read. Not long before: rows a power of two apart fall into the same few lines of a cache.
void prefetch(const ReturnsInput& in, const Lane& lane) {
  for (int i = 0; i < lane.n; i += 16) {
    __builtin_prefetch(in.rewards + lane.base + i);
    if (in.values != nullptr) __builtin_prefetch(in.values + lane.base + i);
  }
}

// Rows [first, last) through the lanes; false: something was not finite.
template <ReturnsKind kKind>
bool run_rows(const ReturnsInput& in, std::int64_t first, std::int64_t last, float* out, float* second, bool large) {
  Buffers room;
  Lane lanes[kLanes];
  F32 wrong = f32(0.0f);
  for (int l = 0; l < kLanes; ++l)
    for (int i = 0; i < kStride; ++i) room.x[l][i] = 0.0f, room.c[l][i] = 1.0;
  // The next block with something to compute, in the lane's row or in the next one.
  const auto step = [&](Lane& lane, int l) {
    while (true) {
      while (lane.begin == lane.end) {
        if (first == last) return false;
        start(in, lane, first++);
      }
      advance(in, lane);
      if (look(in, lane, room.mask[l])) return true;
      if (in.move) moved_rewards(in, lane, room.rewards);
      write_nothing(lane, out, second);
    }
  };
  while (true) {
    bool active[kLanes], any = false;
    double y[kLanes];
    for (int l = 0; l < kLanes; ++l) {
      any |= active[l] = step(lanes[l], l);
      y[l] = lanes[l].y;
    }
    if (!any) break;
    prefetch(in, lanes[0]);
    for (int l = 0; l < kLanes; ++l) {
      if (l + kAhead < kLanes) prefetch(in, lanes[l + kAhead]);
      if (active[l]) prepare<kKind>(in, lanes[l], l, room, wrong);
    }
    in.reverse ? chain<true>(in, room, y) : chain<false>(in, room, y);
    for (int l = 0; l < kLanes; ++l) {
      if (!active[l]) continue;
      lanes[l].y = y[l];
      write<kKind>(in, lanes[l], l, room, out, second, large);
    }
  }
  if (large) fence();
  return sum(wrong) == 0.0f;
}

template <ReturnsKind kKind>
bool run(const ReturnsInput& in, float* out, float* second, int threads) {
  const auto aligned = [](const float* p) { return reinterpret_cast<std::uintptr_t>(p) % (kF32 * sizeof(float)) == 0; };
  const std::int64_t tokens = in.bounds == nullptr ? in.rows * in.columns : in.bounds[in.rows];
  const bool large = tokens * 4 >= kStreamBytes && aligned(out) && aligned(second);
  const std::int64_t least = kTokens * in.rows / (tokens + 1) + 1;
  const std::int64_t full = in.rows >= 2 * kLanes ? kLanes : (in.rows + 1) / 2;  // few rows: half of them each
  std::atomic<bool> good{true};
  parallel_ranges(threads, in.rows, grain_of(in.rows, least > full ? least : full),
                  [&](std::int64_t first, std::int64_t last, int) {
                    if (!run_rows<kKind>(in, first, last, out, second, large)) good = false;
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
