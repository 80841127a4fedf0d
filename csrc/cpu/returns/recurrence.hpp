// The recurrence through x and c of a block, in place.
#pragma once

#include <cmath>

#include "cpu/returns/row.hpp"

namespace fastreward::FASTREWARD_ISA::returns {

using namespace simd;

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

}  // namespace fastreward::FASTREWARD_ISA::returns
