// The kernels of pair.hpp: a block's extremes, then its sums while it lies in L1.
//
// With both rows at hand a token costs two exponentials and an addition or two for each sum: p (log p - log q) needs no
// normaliser, e (t - u) relative to any base of either is that but for numbers of the row. What is -inf has terms of its
// own, so that a padded vocabulary and a teacher that forbids tokens take no second read; blocks without are spared them.
#include "cpu/divergence/pair.hpp"

#include <cmath>

namespace fastreward::FASTREWARD_ISA::divergence {
namespace {

constexpr float kInf = __builtin_inff();
// Nats below the largest, from which on a log-prob may be below kLowest.
constexpr double kFar = -9000.0;
// Columns that a float lane sums before it goes on in another one.
constexpr int kRun = 64 * kF32;

struct Extremes {
  float x_max, y_max, x_min, y_min;
};

Extremes extremes(const float* x, const float* y, int n) {
  F32 x_max[2], y_max[2], x_min[2], y_min[2];
  for (int u = 0; u < 2; ++u) x_max[u] = y_max[u] = f32(-kInf), x_min[u] = y_min[u] = f32(kInf);
  const auto take = [&](int i, int u) {
    const F32 a = load(x + i), b = load(y + i);
    x_max[u] = max(a, x_max[u]), y_max[u] = max(b, y_max[u]);
    x_min[u] = min(a, x_min[u]), y_min[u] = min(b, y_min[u]);
  };
  int i = 0;
  for (; i + 2 * kF32 <= n; i += 2 * kF32) take(i, 0), take(i + kF32, 1);
  if (i < n) take(i, 0);
  return {maximum(max(x_max[0], x_max[1])), maximum(max(y_max[0], y_max[1])), minimum(min(x_min[0], x_min[1])),
          minimum(min(y_min[0], y_min[1]))};
}

// What the exponents of a block are relative to, and from where on a finite one is far.
struct Bases {
  float x, y, x_far, y_far;
};

template <bool kOne>
F32 exponential(F32 d, const ExpScale& s) {
  return kOne ? exp_of_one(d) : exp_scaled(d, s);
}

// kCareful: there are logits of -inf, or far ones, on a side whose log-probs count.
template <int kFlags, bool kOne, bool kCareful>
bool sums(const float* x, const float* y, int n, const Bases& bases, const PairScale& scale, PairSums& out) {
  constexpr bool kP = (kFlags & kOfP) != 0, kQ = (kFlags & kOfQ) != 0, kLogs = (kFlags & kOfLogs) != 0;
  const F32 zero = f32(0.0f), x_base = f32(bases.x), y_base = f32(bases.y);
  const ExpScale x_exp = scale.x_exp, y_exp = scale.y_exp;
  const F32 x_least = kOne ? f32(kLeastOfOne) : x_exp.lowest, y_least = kOne ? f32(kLeastOfOne) : y_exp.lowest;
  const F32 ratio = scale.ratio, ratio_rest = scale.ratio_rest;
  const auto apart = [&](F32 t, F32 u) { return kOne ? t - u : fnma(u, ratio_rest, fnma(u, ratio, t)); };
  F32 far = zero;
  F32 all_x = zero, all_y = zero, all_x_log = zero, all_y_log = zero, all_p = zero, all_q = zero;
  F32 gone_p = zero, gone_q = zero;
  for (int start = 0; start < n; start += kRun) {
    const int end = n - start < kRun ? n : start + kRun;
    F32 sum_x = zero, sum_y = zero, x_log = zero, y_log = zero, of_p = zero, of_q = zero;
    for (int i = start; i < end; i += kF32) {
      __builtin_prefetch(x + n + i), __builtin_prefetch(y + n + i);  // the next block's; never faults
      const F32 a = load(x + i), b = load(y + i);
      const F32 t = a - x_base, u = b - y_base;
      const F32 t_near = max(x_least, t), u_near = max(y_least, u);
      const F32 e = exponential<kOne>(t_near, x_exp), f = exponential<kOne>(u_near, y_exp);
      sum_x = sum_x + e, sum_y = sum_y + f;
      if (kLogs) x_log = fma(e, t_near, x_log), y_log = fma(f, u_near, y_log);
      if (!kCareful && (kP || kQ)) {
        const F32 between = apart(kQ ? t : t_near, kP ? u : u_near);
        if (kP) of_p = fma(e, between, of_p);
        if (kQ) of_q = fma(f, between, of_q);
      }
      if (kCareful && kP) {
        const M32 gone = b == f32(-kInf);
        of_p = fma(e, apart(t_near, select(gone, zero, u)), of_p);
        gone_p = gone_p + select(gone, e, zero);
        far = select((u < f32(bases.y_far)) & (t > x_least) & ~gone, f32(1.0f), far);
      }
      if (kCareful && kQ) {
        const M32 gone = a == f32(-kInf);
        of_q = fma(f, apart(select(gone, zero, t), u_near), of_q);
        gone_q = gone_q + select(gone, f, zero);
        far = select((t < f32(bases.x_far)) & (u > y_least) & ~gone, f32(1.0f), far);
      }
    }
    all_x = all_x + sum_x, all_y = all_y + sum_y;
    if (kLogs) all_x_log = all_x_log + x_log, all_y_log = all_y_log + y_log;
    if (kP) all_p = all_p + of_p;
    if (kQ) all_q = all_q + of_q;
  }
  out.x = sum_f64(all_x), out.y = sum_f64(all_y);
  if (kLogs) out.x_log = sum_f64(all_x_log), out.y_log = sum_f64(all_y_log);
  if (kP) out.of_p = sum_f64(all_p), out.gone_p = sum_f64(gone_p);
  if (kQ) out.of_q = sum_f64(all_q), out.gone_q = sum_f64(gone_q);
  return kCareful && any(far > zero);
}

using Sums = bool (*)(const float*, const float*, int, const Bases&, const PairScale&, PairSums&);
template <int kFlags>
Sums sums_of(bool one, bool careful) {
  if (one) return careful ? &sums<kFlags, true, true> : &sums<kFlags, true, false>;
  return careful ? &sums<kFlags, false, true> : &sums<kFlags, false, false>;
}
Sums sums_of(int flags, bool one, bool careful) {
  switch (flags) {
    case kOfP: return sums_of<kOfP>(one, careful);
    case kOfQ: return sums_of<kOfQ>(one, careful);
    case kOfP | kOfQ: return sums_of<kOfP | kOfQ>(one, careful);
    case kOfLogs: return sums_of<kOfLogs>(one, false);
    case kOfP | kOfLogs: return sums_of<kOfP | kOfLogs>(one, careful);
    case kOfQ | kOfLogs: return sums_of<kOfQ | kOfLogs>(one, careful);
    case kOfP | kOfQ | kOfLogs: return sums_of<kOfP | kOfQ | kOfLogs>(one, careful);
    default: return sums_of<0>(one, false);
  }
}

// Relative to a larger logit of the first side, then of the second; `moved` is by how much, in its own logits.
void move_x(PairSums& s, double moved, const PairScale& scale) {
  const double r = std::exp(-moved * scale.x);
  s.x_log = r * (s.x_log - moved * s.x);
  s.of_p = r * (s.of_p - moved * s.x);
  s.of_q -= moved * (s.y - s.gone_q);
  s.x *= r;
  s.gone_p *= r;
}
void move_y(PairSums& s, double moved, const PairScale& scale) {
  const double r = std::exp(-moved * scale.y), by = moved * scale.y / scale.x;
  s.y_log = r * (s.y_log - moved * s.y);
  s.of_q = r * (s.of_q + by * s.y);
  s.of_p += by * (s.x - s.gone_p);
  s.y *= r;
  s.gone_q *= r;
}

}  // namespace

PairScale pair_scale(double x_inverse, double y_inverse) {
  const double ratio = y_inverse / x_inverse;
  const auto high = static_cast<float>(ratio);
  const auto moderate = [](double s) { return s > 1e-12 && s < 1e12; };
  return {x_inverse,
          y_inverse,
          exp_scale(x_inverse),
          exp_scale(y_inverse),
          f32(high),
          f32(static_cast<float>(ratio - static_cast<double>(high))),
          x_inverse == 1.0 && y_inverse == 1.0,
          moderate(x_inverse) && moderate(y_inverse)};
}

void add_block(const float* x, const float* y, int n, std::int64_t start, const PairScale& scale, int flags,
               Pair& pair) {
  const auto f64_of = [](float v) { return static_cast<double>(v); };
  const Extremes of = extremes(x, y, n);
  if (of.x_max > pair.x_max) {
    if (pair.x_max != -kInf) move_x(pair.sums, f64_of(of.x_max) - f64_of(pair.x_max), scale);
    pair.x_max = of.x_max, pair.x_start = start;
  }
  if (of.y_max > pair.y_max) {
    if (pair.y_max != -kInf) move_y(pair.sums, f64_of(of.y_max) - f64_of(pair.y_max), scale);
    pair.y_max = of.y_max, pair.y_start = start;
  }
  const bool no_x = pair.x_max == -kInf, no_y = pair.y_max == -kInf;  // or only NaN
  const Bases bases{no_x ? 0.0f : pair.x_max, no_y ? 0.0f : pair.y_max, static_cast<float>(kFar / scale.x),
                    static_cast<float>(kFar / scale.y)};
  const bool careful = ((flags & kOfQ) != 0 && (f64_of(of.x_min) - f64_of(bases.x)) * scale.x < kFar) ||
                       ((flags & kOfP) != 0 && (f64_of(of.y_min) - f64_of(bases.y)) * scale.y < kFar);
  PairSums block;
  if (sums_of(flags, scale.one, careful)(x, y, n, bases, scale, block)) pair.far = true;
  if (no_x && !std::isnan(block.x)) block.x = block.x_log = block.of_p = block.gone_p = 0.0;
  if (no_y && !std::isnan(block.y)) block.y = block.y_log = block.of_q = block.gone_q = 0.0;
  PairSums& s = pair.sums;
  s.x += block.x, s.y += block.y;
  s.x_log += block.x_log, s.y_log += block.y_log;
  s.of_p += block.of_p, s.of_q += block.of_q;
  s.gone_p += block.gone_p, s.gone_q += block.gone_q;
}

State state_of(double sum, double sum_log, double inverse, float max) {
  State state = empty_state();
  state.s[kStateMax] = static_cast<double>(max);
  state.s[kStateSum] = sum;
  state.s[kStateSumT] = sum_log * inverse;
  return state;
}

double by_moments(const DivergenceMoments& of, const Pair& pair, const PairScale& scale) {
  const PairSums& s = pair.sums;
  if (!(s.x > 0.0 && s.y > 0.0)) return std::nan("");  // one side has no distribution
  const double x_log = std::log(s.x), y_log = std::log(s.y);
  double sum = of.constant;
  if (of.relative_p != 0.0)
    sum += of.relative_p *
           (scale.x * s.of_p + (s.x - s.gone_p) * (y_log - x_log) - s.gone_p * (kLowest + x_log)) / s.x;
  if (of.relative_q != 0.0)
    sum += of.relative_q *
           (scale.x * s.of_q + (s.y - s.gone_q) * (y_log - x_log) + s.gone_q * (kLowest + y_log)) / s.y;
  if (of.log_p != 0.0) sum += of.log_p * (scale.x * s.x_log / s.x - x_log);
  if (of.log_q != 0.0) sum += of.log_q * (scale.y * s.y_log / s.y - y_log);
  return sum;
}

}  // namespace fastreward::FASTREWARD_ISA::divergence
