// The kernels of gradient.hpp: per column a load of each side, one exponential for each side whose probability is read,
// and a handful of multiply-adds.
#include "cpu/divergence/gradient.hpp"

namespace fastreward::FASTREWARD_ISA::divergence {
namespace {

template <bool kOne>
F32 probability(F32 below, const Distribution& d) {
  const F32 least = kOne ? f32(kLeastOfOne) : d.exponent.lowest;
  const F32 near = max(least, below);
  const F32 e = kOne ? exp_of_one(near) : exp_scaled(near, d.exponent);
  return select(below <= least, f32(0.0f), e) * d.peak;
}

F32 log_probability(F32 below, const Distribution& d) {
  return max(f32(static_cast<float>(kLowest)), fma(below, d.scale, d.top));
}

template <bool kOne, bool kP, bool kQ, bool kLogs>
void gradient(const float* x, const float* y, int n, const Distribution& student, const Distribution& teacher,
              const Gradient& of, float* out) {
  const Distribution s = student, t = teacher;
  const F32 p_scale = f32(of.p.scale), p_self = f32(of.p.self), p_log = f32(of.p.log), p_apart = f32(of.p.apart);
  const F32 q_scale = f32(of.q.scale), q_self = f32(of.q.self), q_log = f32(of.q.log), q_apart = f32(of.q.apart);
  for (int i = 0; i < n; i += kF32) {
    const F32 a = load(x + i) - s.middle, b = load(y + i) - t.middle;
    F32 by_p = p_self, by_q = q_self;
    if (kLogs) {
      const F32 log_p = log_probability(a, s), log_q = log_probability(b, t), apart = log_p - log_q;
      if (kP) by_p = fma(apart, p_apart, fma(log_p, p_log, by_p));
      if (kQ) by_q = fma(apart, q_apart, fma(log_q, q_log, by_q));
    }
    F32 g = f32(0.0f);
    if (kP) g = probability<kOne>(a, s) * (by_p * p_scale);
    if (kQ) g = g + probability<kOne>(b, t) * (by_q * q_scale);
    store(out + i, g);
  }
}

template <bool kOne, bool kLog, bool kExp>
void probabilities_of(const float* x, int n, const Distribution& of, float* log, float* exp) {
  const Distribution d = of;
  for (int i = 0; i < n; i += kF32) {
    const F32 below = load(x + i) - d.middle;
    if (kLog) store(log + i, log_probability(below, d));
    if (kExp) store(exp + i, probability<kOne>(below, d));
  }
}

Factor factor(double self, double log, double apart) {
  const double scale = apart != 0.0 ? apart : log != 0.0 ? log : self;
  if (scale == 0.0) return {0.0f, 0.0f, 0.0f, 0.0f};
  return {static_cast<float>(scale), static_cast<float>(self / scale), static_cast<float>(log / scale),
          static_cast<float>(apart / scale)};
}

template <bool kOne, bool kP, bool kQ>
GradientKernel kernel_of(bool logs) {
  return logs ? &gradient<kOne, kP, kQ, true> : &gradient<kOne, kP, kQ, false>;
}
template <bool kOne>
GradientKernel kernel_of(bool p, bool q, bool logs) {
  if (p && q) return kernel_of<kOne, true, true>(logs);
  return p ? kernel_of<kOne, true, false>(logs) : kernel_of<kOne, false, true>(logs);
}

}  // namespace

void probabilities(const float* x, int n, const Distribution& d, float* log, float* exp) {
  if (exp == nullptr) {
    if (log != nullptr) probabilities_of<true, true, false>(x, n, d, log, exp);
  } else if (d.one) {
    log != nullptr ? probabilities_of<true, true, true>(x, n, d, log, exp)
                   : probabilities_of<true, false, true>(x, n, d, log, exp);
  } else {
    log != nullptr ? probabilities_of<false, true, true>(x, n, d, log, exp)
                   : probabilities_of<false, false, true>(x, n, d, log, exp);
  }
}

Gradient gradient_of(const DivergenceBackward& call, std::int64_t row) {
  double products[kDivergenceProducts] = {};
  for (const DivergenceTerm& term : call.terms) {
    double amount = term.factor;
    for (const int k : term.inputs) amount *= static_cast<double>(call.in.inputs[k][row]);
    products[static_cast<int>(term.product)] += amount;
  }
  const auto of = [&](DivergenceProduct product) { return products[static_cast<int>(product)]; };
  using P = DivergenceProduct;
  return {factor(of(P::p), of(P::p_log_p) + of(P::p_log_q), -of(P::p_log_q)),
          factor(of(P::q), of(P::q_log_p) + of(P::q_log_q), of(P::q_log_p))};
}

GradientKernel gradient_kernel(const Gradient& of, bool one) {
  const auto reads_logs = [](const Factor& f) { return f.log != 0.0f || f.apart != 0.0f; };
  const bool q = of.q.scale != 0.0f, p = of.p.scale != 0.0f || !q, logs = reads_logs(of.p) || reads_logs(of.q);
  return one ? kernel_of<true>(p, q, logs) : kernel_of<false>(p, q, logs);
}

}  // namespace fastreward::FASTREWARD_ISA::divergence
