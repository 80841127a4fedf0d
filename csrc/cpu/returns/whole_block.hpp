// A full block without a masked token, in one loop.
#pragma once

#include "cpu/returns/output.hpp"
#include "cpu/returns/recurrence.hpp"

namespace fastreward::FASTREWARD_ISA::returns {

using namespace simd;

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

}  // namespace fastreward::FASTREWARD_ISA::returns
