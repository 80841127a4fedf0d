// Segments: tokens -> one number for each segment of a row, and back.
//
// Fused: one pass over the tokens, whatever the op; nothing of [tokens, segments] is ever there. Ids come in runs nearly
// always, so the loop is over runs: a run's state stays in registers, and a segment that goes on later is taken up where
// it was left. So any ids are right, and a segment's float64 sum runs over its own tokens in order: its bits depend on
// nothing else. The adjoint takes the same pass for what it needs of a segment (weights, positions, exponents) and a
// second one, over a row that lies in the cache, which writes every token: it is the gradient of the reduction, and for
// sum, mean, first and last it is also the scatter of values to tokens, whose own gradient is the reduction.
#include "cpu/segments.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

#include "cpu/threads.hpp"

namespace fastreward::FASTREWARD_ISA {
namespace {

constexpr std::int64_t kTokens = 1 << 13;  // a thread's share, at least
constexpr double kInfinity = std::numeric_limits<double>::infinity();

std::int64_t grain(const TokenRows& tokens) {
  return grain_of(tokens.rows, 1 + kTokens * tokens.rows / (tokens.count() + 1));
}

// ------------------------------------------------------------------------------------------------- ids and weights
struct OneSegment {
  explicit OneSegment(const void*) {}
  std::int64_t id(std::int64_t) const { return 0; }
  std::int64_t run_end(std::int64_t, std::int64_t end) const { return end; }
};

template <class T>
struct Ids {
  explicit Ids(const void* p) : ids(static_cast<const T*>(p)) {}
  std::int64_t id(std::int64_t t) const { return ids[t]; }
  std::int64_t run_end(std::int64_t t, std::int64_t end) const {
    constexpr int kBlock = 16;
    const T own = ids[t];
    for (; t + kBlock <= end; t += kBlock) {  // a fixed count, so that it becomes vector instructions
      T differs = 0;
      for (int i = 0; i < kBlock; ++i) differs |= ids[t + i] ^ own;
      if (differs != 0) break;
    }
    while (t < end && ids[t] == own) ++t;
    return t;
  }
  const T* ids;
};

// kUnit: weights are 0 or 1, so that a value needs no multiplication. all: whether the next four tokens of a run that
// ends at `end` are there with weight 1.
struct Ones {
  static constexpr bool kUnit = true;
  explicit Ones(const void*) {}
  double of(std::int64_t) const { return 1.0; }
  bool all(std::int64_t t, std::int64_t end) const { return t + kSegmentLanes <= end; }
};

struct Bytes {
  static constexpr bool kUnit = true;
  explicit Bytes(const void* p) : bytes(static_cast<const std::uint8_t*>(p)) {}
  double of(std::int64_t t) const { return bytes[t] != 0 ? 1.0 : 0.0; }
  bool all(std::int64_t t, std::int64_t end) const {
    return t + kSegmentLanes <= end && (bytes[t] & bytes[t + 1] & bytes[t + 2] & bytes[t + 3]) != 0;
  }
  const std::uint8_t* bytes;
};

struct Floats {
  static constexpr bool kUnit = false;
  explicit Floats(const void* p) : weights(static_cast<const float*>(p)) {}
  double of(std::int64_t t) const { return static_cast<double>(weights[t]); }
  bool all(std::int64_t, std::int64_t) const { return false; }
  const float* weights;
};

// each(id, begin, end) for every run of a legal id; whether all others are -1.
template <class I, class Each>
bool for_runs(const I& ids, std::int64_t begin, std::int64_t end, std::int64_t segments, const Each& each) {
  bool legal = true;
  while (begin < end) {
    const std::int64_t id = ids.id(begin);
    const std::int64_t stop = ids.run_end(begin, end);
    if (id >= 0 && id < segments)
      each(id, begin, stop);
    else
      legal = legal && id == -1;
    begin = stop;
  }
  return legal;
}

// ------------------------------------------------------------------------------------------- what an op collects
// add: a run of tokens into the state of its segment; result: its value, or p.empty.
template <bool kValues>
struct Sums {
  template <class W>
  static void add(const SegmentProblem& p, const W& weights, std::int64_t t, std::int64_t end, SegmentState& s) {
    if constexpr (!kValues) {
      for (double weight = s.weight; t < end; s.weight = weight) weight += weights.of(t++);
      return;
    }
    while (t < end) {
      if (s.count % kSegmentLanes == 0 && weights.all(t, end)) {
        t = add_whole(p.x, weights, t, end, s);
        if (t == end) return;
      }
      const double w = weights.of(t);
      if (w != 0.0) s.total[s.count++ % kSegmentLanes] += w * static_cast<double>(p.x[t]);
      s.weight += w;
      ++t;
    }
  }
  // Tokens of weight 1 by fours, as many as there are in a row; where it has stopped.
  template <class W>
  static std::int64_t add_whole(const float* x, const W& weights, std::int64_t t, std::int64_t end, SegmentState& s) {
    const std::int64_t begin = t;
    double total[kSegmentLanes];
    std::copy(s.total, s.total + kSegmentLanes, total);
    do {
      for (int k = 0; k < kSegmentLanes; ++k) total[k] += static_cast<double>(x[t + k]);
      t += kSegmentLanes;
    } while (weights.all(t, end));
    std::copy(total, total + kSegmentLanes, s.total);
    s.count += t - begin;
    s.weight += static_cast<double>(t - begin);
    return t;
  }
  static bool there(const SegmentState& s) { return s.weight != 0.0; }
  static double result(const SegmentProblem& p, const SegmentState& s) {
    if (p.op == SegmentOp::count) return s.weight;
    const double total = (s.total[0] + s.total[1]) + (s.total[2] + s.total[3]);
    return p.op == SegmentOp::mean ? total / s.weight : total;
  }
};

struct Firsts {
  template <class W>
  static void add(const SegmentProblem&, const W& weights, std::int64_t t, std::int64_t end, SegmentState& s) {
    for (; s.at < 0 && t < end; ++t)
      if (weights.of(t) != 0.0) s.at = t;
  }
  static bool there(const SegmentState& s) { return s.at >= 0; }
  static double result(const SegmentProblem& p, const SegmentState& s) { return static_cast<double>(p.x[s.at]); }
};

struct Lasts : Firsts {
  template <class W>
  static void add(const SegmentProblem&, const W& weights, std::int64_t begin, std::int64_t t, SegmentState& s) {
    while (t > begin)
      if (weights.of(--t) != 0.0) {
        s.at = t;
        return;
      }
  }
};

template <bool kMin>
struct Extremes : Firsts {
  template <class W>
  static void add(const SegmentProblem& p, const W& weights, std::int64_t t, std::int64_t end, SegmentState& s) {
    float best = static_cast<float>(s.top);
    std::int64_t at = s.at;
    for (; t < end; ++t) {
      const float x = p.x[t];
      if (weights.of(t) != 0.0 && (at < 0 || (kMin ? x < best : x > best) || (std::isnan(x) && !std::isnan(best)))) {
        best = x;
        at = t;
      }
    }
    s.top = static_cast<double>(best);
    s.at = at;
  }
};

struct Exponentials {
  static double exponent(const SegmentProblem& p, double x) { return p.op == SegmentOp::softmin ? -x / p.temperature : x; }

  template <class W>
  static void add(const SegmentProblem& p, const W& weights, std::int64_t t, std::int64_t end, SegmentState& s) {
    for (; t < end; ++t) {
      const double w = weights.of(t);
      if (w == 0.0) continue;
      const double x = static_cast<double>(p.x[t]), y = exponent(p, x);
      s.weight += w;
      if (p.op == SegmentOp::mean_exp) {
        s.total[0] += w * std::exp(y);
        continue;
      }
      if (y == -kInfinity) continue;
      if (s.at < 0 || y > s.top) {
        const double scale = s.at < 0 ? 0.0 : std::exp(s.top - y);
        s.total[0] *= scale;
        s.shifted = scale == 0.0 ? 0.0 : s.shifted * scale;
        s.top = y;
        s.at = t;
      }
      const double part = y == s.top ? w : w * std::exp(y - s.top);
      s.total[0] += part;
      s.shifted += part == 0.0 ? 0.0 : part * x;
    }
  }
  static bool there(const SegmentState& s) { return s.weight != 0.0; }
  static double result(const SegmentProblem& p, const SegmentState& s) {
    if (p.op == SegmentOp::mean_exp) return s.total[0] / s.weight;
    if (p.op == SegmentOp::logsumexp) return s.at < 0 ? -kInfinity : s.top + std::log(s.total[0]);
    return s.at < 0 ? kInfinity : s.shifted / s.total[0];
  }
};

template <class Op, class I, class W>
bool collect(const SegmentProblem& p, const I& ids, const W& weights, std::int64_t row, SegmentState* states) {
  std::fill(states, states + p.segments, SegmentState{});
  return for_runs(ids, p.tokens.begin(row), p.tokens.end(row), p.segments,
                  [&](std::int64_t id, std::int64_t begin, std::int64_t end) {
                    Op::add(p, weights, begin, end, states[id]);
                  });
}

// ------------------------------------------------------------------------------------------------------ reductions
template <class Op, class I, class W>
int reduce(const SegmentProblem& p, SegmentState* scratch, float* out) {
  const I ids(p.ids);
  const W weights(p.weights);
  const bool additive = p.op == SegmentOp::sum || p.op == SegmentOp::count;
  const float empty = additive ? 0.0f : static_cast<float>(p.empty);
  std::atomic<int> faults{0};
  parallel_ranges(p.threads, p.tokens.rows, grain(p.tokens), [&](std::int64_t first, std::int64_t last, int slot) {
    SegmentState* states = scratch + slot * p.segments;
    int found = 0;
    for (std::int64_t b = first; b < last; ++b) {
      if (!collect<Op>(p, ids, weights, b, states)) found |= kIllegalId;
      for (std::int64_t s = 0; s < p.segments; ++s) {
        const bool there = Op::there(states[s]);
        const float value = there ? static_cast<float>(Op::result(p, states[s])) : empty;
        if (there && std::isnan(value)) found |= kNan;
        out[b * p.segments + s] = value;
      }
    }
    if (found != 0) faults |= found;
  });
  return faults;
}

// --------------------------------------------------------------------------------------------------------- adjoint
// What a token of a segment gets from the segment's value g.
struct LinearShare {
  double factor;
  template <class W>
  void write(const SegmentProblem&, const W& weights, std::int64_t t, std::int64_t end, float* out) const {
    const float whole = static_cast<float>(factor);
    for (; t < end; ++t) {
      const double w = weights.of(t);
      out[t] = w == 0.0 ? 0.0f : W::kUnit ? whole : static_cast<float>(factor * w);
    }
  }
  static LinearShare of(const SegmentProblem& p, const SegmentState& s, double g) {
    if (p.op == SegmentOp::count) return {0.0};
    return {p.op == SegmentOp::mean ? g / s.weight : g};
  }
};

struct ExponentialShare {
  SegmentState s;
  double g;
  template <class W>
  void write(const SegmentProblem& p, const W& weights, std::int64_t t, std::int64_t end, float* out) const {
    for (; t < end; ++t) {
      const double w = weights.of(t);
      out[t] = w == 0.0 ? 0.0f : static_cast<float>(share(p, w, static_cast<double>(p.x[t])));
    }
  }
  double share(const SegmentProblem& p, double w, double x) const {
    const double y = Exponentials::exponent(p, x);
    if (p.op == SegmentOp::mean_exp) return g * (w * std::exp(y) / s.weight);
    if (s.at < 0 || y == -kInfinity) return 0.0;
    const double part = (y == s.top ? w : w * std::exp(y - s.top)) / s.total[0];
    if (p.op == SegmentOp::logsumexp || part == 0.0) return g * part;
    const double soft = s.shifted / s.total[0];  // as infinite as the values that it is made of
    return g * part * (1.0 - (x == soft ? 0.0 : x - soft) / p.temperature);
  }
  static ExponentialShare of(const SegmentProblem&, const SegmentState& s, double g) { return {s, g}; }
};

// Whether all ids are legal: looked at before anything is written.
template <class I>
bool legal(const SegmentProblem& p, const I& ids) {
  std::atomic<bool> all{true};
  parallel_ranges(p.threads, p.tokens.rows, grain(p.tokens), [&](std::int64_t first, std::int64_t last, int) {
    for (std::int64_t b = first; b < last; ++b)
      if (!for_runs(ids, p.tokens.begin(b), p.tokens.end(b), p.segments, [](auto, auto, auto) {})) all = false;
  });
  return all;
}

template <class Op, class Share, class I, class W>
void adjoint(const SegmentProblem& p, const float* values, SegmentState* scratch, float* out) {
  const I ids(p.ids);
  const W weights(p.weights);
  const bool one_pass = p.op == SegmentOp::sum || p.op == SegmentOp::count;
  parallel_ranges(p.threads, p.tokens.rows, grain(p.tokens), [&](std::int64_t first, std::int64_t last, int slot) {
    SegmentState* states = scratch + slot * p.segments;
    for (std::int64_t b = first; b < last; ++b) {
      if (!one_pass) collect<Op>(p, ids, weights, b, states);
      std::int64_t done = p.tokens.begin(b);
      const std::int64_t end = p.tokens.end(b);
      for_runs(ids, done, end, p.segments, [&](std::int64_t id, std::int64_t begin, std::int64_t stop) {
        std::fill(out + done, out + begin, 0.0f);
        const double g = static_cast<double>(values[b * p.segments + id]);
        Share::of(p, one_pass ? SegmentState{} : states[id], g).write(p, weights, begin, stop, out);
        done = stop;
      });
      std::fill(out + done, out + end, 0.0f);
    }
  });
}

// The same for ops that choose one token of a segment.
template <class Op, class I, class W>
void adjoint_of_one(const SegmentProblem& p, const float* values, SegmentState* scratch, float* out) {
  const I ids(p.ids);
  const W weights(p.weights);
  parallel_ranges(p.threads, p.tokens.rows, grain(p.tokens), [&](std::int64_t first, std::int64_t last, int slot) {
    SegmentState* states = scratch + slot * p.segments;
    for (std::int64_t b = first; b < last; ++b) {
      collect<Op>(p, ids, weights, b, states);
      std::fill(out + p.tokens.begin(b), out + p.tokens.end(b), 0.0f);
      for (std::int64_t s = 0; s < p.segments; ++s)
        if (states[s].at >= 0) out[states[s].at] = values[b * p.segments + s];
    }
  });
}

// -------------------------------------------------------------------------------------------- types to templates
template <class F>
int with_ids(const SegmentProblem& p, const F& f) {
  const auto with_weights = [&](auto ids) {
    using I = decltype(ids);
    if (p.weight_kind == WeightKind::none) return f(I(p.ids), Ones(nullptr));
    if (p.weight_kind == WeightKind::bytes) return f(I(p.ids), Bytes(p.weights));
    return f(I(p.ids), Floats(p.weights));
  };
  if (p.id_kind == IdKind::none) return with_weights(OneSegment(nullptr));
  if (p.id_kind == IdKind::i32) return with_weights(Ids<std::int32_t>(p.ids));
  return with_weights(Ids<std::int64_t>(p.ids));
}

// ------------------------------------------------------------------------------------------------------------- ids
template <class T>
void runs_of_row(const SegmentMarks& m, std::int64_t begin, std::int64_t end, std::int32_t* out) {
  const T* const labels = static_cast<const T*>(m.labels);
  std::int32_t segment = -1;
  bool before = false;
  for (std::int64_t t = begin; t < end; ++t) {
    const bool here = (m.mask == nullptr || m.mask[t] != 0) && (labels == nullptr || labels[t] >= 0);
    segment += here && (!before || (labels != nullptr && labels[t] != labels[t - 1])) ? 1 : 0;
    out[t] = here ? segment : -1;
    before = here;
  }
}

template <class T>
void ends_of_row(const SegmentMarks& m, std::int64_t begin, std::int64_t end, std::int32_t* out) {
  const T* const marks = static_cast<const T*>(m.marks);
  std::int32_t segment = 0;
  std::int64_t tail = begin;
  for (std::int64_t t = begin; t < end; ++t) {
    out[t] = m.mask == nullptr || m.mask[t] != 0 ? segment : -1;
    segment += static_cast<std::int32_t>(marks[t]);
    tail = marks[t] != 0 ? t + 1 : tail;
  }
  if (!m.tail) std::fill(out + tail, out + end, -1);
}

}  // namespace

// ------------------------------------------------------------------------------------------------------- launchers
int segment_reduce(const SegmentProblem& p, SegmentState* scratch, float* out) {
  return with_ids(p, [&](auto ids, auto weights) {
    using I = decltype(ids);
    using W = decltype(weights);
    switch (p.op) {
      case SegmentOp::sum:
      case SegmentOp::mean:
        return reduce<Sums<true>, I, W>(p, scratch, out);
      case SegmentOp::count:
        return reduce<Sums<false>, I, W>(p, scratch, out);
      case SegmentOp::min:
        return reduce<Extremes<true>, I, W>(p, scratch, out);
      case SegmentOp::max:
        return reduce<Extremes<false>, I, W>(p, scratch, out);
      case SegmentOp::first:
        return reduce<Firsts, I, W>(p, scratch, out);
      case SegmentOp::last:
        return reduce<Lasts, I, W>(p, scratch, out);
      default:
        return reduce<Exponentials, I, W>(p, scratch, out);
    }
  });
}

int segment_adjoint(const SegmentProblem& p, const float* values, SegmentState* scratch, float* out) {
  return with_ids(p, [&](auto ids, auto weights) {
    using I = decltype(ids);
    using W = decltype(weights);
    if (!legal(p, ids)) return static_cast<int>(kIllegalId);
    switch (p.op) {
      case SegmentOp::sum:
      case SegmentOp::mean:
      case SegmentOp::count:
        adjoint<Sums<false>, LinearShare, I, W>(p, values, scratch, out);
        break;
      case SegmentOp::min:
        adjoint_of_one<Extremes<true>, I, W>(p, values, scratch, out);
        break;
      case SegmentOp::max:
        adjoint_of_one<Extremes<false>, I, W>(p, values, scratch, out);
        break;
      case SegmentOp::first:
        adjoint_of_one<Firsts, I, W>(p, values, scratch, out);
        break;
      case SegmentOp::last:
        adjoint_of_one<Lasts, I, W>(p, values, scratch, out);
        break;
      default:
        adjoint<Exponentials, ExponentialShare, I, W>(p, values, scratch, out);
    }
    return 0;
  });
}

void segment_ids(const SegmentMarks& m, std::int32_t* out) {
  parallel_ranges(m.threads, m.tokens.rows, grain(m.tokens), [&](std::int64_t first, std::int64_t last, int) {
    for (std::int64_t b = first; b < last; ++b) {
      const std::int64_t begin = m.tokens.begin(b), end = m.tokens.end(b);
      if (m.mark_kind == MarkKind::bytes)
        ends_of_row<std::uint8_t>(m, begin, end, out);
      else if (m.mark_kind == MarkKind::i32)
        ends_of_row<std::int32_t>(m, begin, end, out);
      else if (m.label_kind == LabelKind::i64)
        runs_of_row<std::int64_t>(m, begin, end, out);
      else
        runs_of_row<std::int32_t>(m, begin, end, out);
    }
  });
}

}  // namespace fastreward::FASTREWARD_ISA
