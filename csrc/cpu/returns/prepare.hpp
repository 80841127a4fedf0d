// x and c of a block: masks, moved rewards, next values and episode ends are in them.
#pragma once

#include <cmath>
#include <cstring>

#include "cpu/returns/row.hpp"

namespace fastreward::FASTREWARD_ISA::returns {

using namespace simd;

// Whether a reward other than 0 lies on a masked token of [base, base + n); mask nullptr: all are masked.
inline bool some_masked_reward(const float* rewards, const std::uint8_t* mask, int n) {
  M32 some = first32(0);
  for_vectors(n, [&](int i, int width) {
    __builtin_prefetch(rewards + i - kAhead);
    const M32 nonzero_reward = ~(load_some(rewards + i, width) == f32(0.0f)) & first32(width);
    some = some | (mask == nullptr ? nonzero_reward : nonzero_reward & ~nonzero_some(mask + i, width));
  });
  return any(some);
}

// Adds the rewards of masked tokens from the last on; one that is not finite is none.
inline void collect(const float* rewards, int n, double& pending) {
  if (some_masked_reward(rewards, nullptr, n))
    for (int i = n - 1; i >= 0; --i)
      if (std::isfinite(rewards[i])) pending += static_cast<double>(rewards[i]);
}

// The block's rewards, those of masked tokens moved to the valid token before them.
inline const float* moved_rewards(const ReturnsInput& in, Row& row, float* room) {
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
inline const float* next_values(const ReturnsInput& in, Row& row, float* room) {
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

}  // namespace fastreward::FASTREWARD_ISA::returns
