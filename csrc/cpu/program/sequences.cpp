// The work of programs per sequence, per group and for the batch: float64, one column of sequences after the other,
// each instruction a loop over the sequences. Sums run in the order of the sequences; groups cost time linear in the
// sequences.
#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/program/internal.hpp"

namespace fastreward::FASTREWARD_ISA::program {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

// An operand of an instruction over n sequences.
struct Operand {
  const double* p;
  bool column;

  double operator[](std::int64_t sequence) const { return p[column ? sequence : 0]; }
};

Operand operand(const SequenceValues& values, SequencePlace p) {
  return values.is_column(p) ? Operand{values.column(p), true} : Operand{values.numbers + p, false};
}

// ---------------------------------------------------------------------------------------------------- elementwise
double sign_of(double x) { return std::isnan(x) ? x : static_cast<double>(x > 0.0) - static_cast<double>(x < 0.0); }
double sigmoid_of(double x) {
  const double e = std::exp(-std::fabs(x));
  return (x < 0.0 ? e : 1.0) / (1.0 + e);
}
double logsigmoid_of(double x) { return (x > 0.0 ? 0.0 : x) - std::log1p(std::exp(-std::fabs(x))); }
double log_of(double x) { return x < 0.0 ? std::numeric_limits<double>::quiet_NaN() : std::log(x); }

template <class F>
void unary(const SequenceInstruction& i, const SequenceValues& values, const F& f) {
  const Operand a = operand(values, i.a);
  double* out = values.is_column(i.out) ? values.column(i.out) : values.numbers + i.out;
  const std::int64_t n = values.is_column(i.out) ? values.sequences : 1;
  if (!a.column) {
    const double y = f(*a.p);
    for (std::int64_t sequence = 0; sequence < n; ++sequence) out[sequence] = y;
    return;
  }
  for (std::int64_t sequence = 0; sequence < n; ++sequence) out[sequence] = f(a.p[sequence]);
}

// Loops of their own for columns and numbers, so that the compiler makes vectors of them.
template <class F>
void binary(const SequenceInstruction& i, const SequenceValues& values, const F& f) {
  const Operand a = operand(values, i.a), b = operand(values, i.b);
  double* out = values.is_column(i.out) ? values.column(i.out) : values.numbers + i.out;
  const std::int64_t n = values.is_column(i.out) ? values.sequences : 1;
  const double *x = a.p, *y = b.p;
  if (a.column && b.column) {
    for (std::int64_t sequence = 0; sequence < n; ++sequence) out[sequence] = f(x[sequence], y[sequence]);
  } else if (a.column) {
    const double number = *y;
    for (std::int64_t sequence = 0; sequence < n; ++sequence) out[sequence] = f(x[sequence], number);
  } else if (b.column) {
    const double number = *x;
    for (std::int64_t sequence = 0; sequence < n; ++sequence) out[sequence] = f(number, y[sequence]);
  } else {
    const double value = f(*x, *y);
    for (std::int64_t sequence = 0; sequence < n; ++sequence) out[sequence] = value;
  }
}

template <class F>
void ternary(const SequenceInstruction& i, const SequenceValues& values, const F& f) {
  const Operand a = operand(values, i.a), b = operand(values, i.b), c = operand(values, i.c);
  double* out = values.is_column(i.out) ? values.column(i.out) : values.numbers + i.out;
  const std::int64_t n = values.is_column(i.out) ? values.sequences : 1;
  for (std::int64_t sequence = 0; sequence < n; ++sequence) out[sequence] = f(a[sequence], b[sequence], c[sequence]);
}

double truth(bool x) { return x ? 1.0 : 0.0; }

// ----------------------------------------------------------------------------------------------------- reductions
// A NaN goes through.
double larger(double x, double y) { return x > y || std::isnan(x) ? x : y; }
double smaller(double x, double y) { return x < y || std::isnan(x) ? x : y; }

// Lane = sequence modulo kLanes, then the lanes in order.
template <class F>
void over_batch(const SequenceInstruction& i, const SequenceValues& values, double neutral, const F& f) {
  constexpr int kLanes = 8;
  const Operand a = operand(values, i.a);
  double lanes[kLanes];
  for (double& x : lanes) x = neutral;
  std::int64_t sequence = 0;
  for (; sequence + kLanes <= values.sequences; sequence += kLanes)
    for (int k = 0; k < kLanes; ++k) lanes[k] = f(a[sequence + k], lanes[k]);
  for (; sequence < values.sequences; ++sequence) lanes[sequence % kLanes] = f(a[sequence], lanes[sequence % kLanes]);
  for (int k = 1; k < kLanes; ++k) lanes[0] = f(lanes[k], lanes[0]);
  values.numbers[i.out] = lanes[0];
}

template <class F>
void over_groups(const SequenceInstruction& i, const SequenceValues& values, const SequenceGroups& groups,
                 double neutral, const F& f) {
  const Operand a = operand(values, i.a);
  const Buffer<double> total(groups.count);
  for (std::int64_t g = 0; g < groups.count; ++g) total[g] = neutral;
  for (std::int64_t sequence = 0; sequence < values.sequences; ++sequence) {
    double& of_group = total[groups.of_sequence[sequence]];
    of_group = f(a[sequence], of_group);
  }
  double* out = values.column(i.out);
  for (std::int64_t sequence = 0; sequence < values.sequences; ++sequence)
    out[sequence] = total[groups.of_sequence[sequence]];
}

// Sequences by group, then by falling key, then by number; those whose key is NaN come before nobody and after nobody:
// they are left out. Returns how many are in.
std::int64_t order_of(const Operand& key, const SequenceGroups& groups, std::int64_t sequences, std::int64_t* order) {
  std::int64_t n = 0;
  for (std::int64_t sequence = 0; sequence < sequences; ++sequence)
    if (!std::isnan(key[sequence])) order[n++] = sequence;
  std::sort(order, order + n, [&](std::int64_t x, std::int64_t y) {
    if (groups.of_sequence[x] != groups.of_sequence[y]) return groups.of_sequence[x] < groups.of_sequence[y];
    const double first = key[x], second = key[y];
    return first != second ? first > second : x < y;
  });
  return n;
}

// Running sums within the groups, from the front (before) or from the back (after).
void over_neighbours(const SequenceInstruction& i, const SequenceValues& values, const SequenceGroups& groups,
                     bool before) {
  const Operand a = operand(values, i.a), key = operand(values, i.b);
  const Buffer<std::int64_t> order(values.sequences);
  const Buffer<double> sums(values.sequences);  // `out` may be one of the arguments
  const std::int64_t n = order_of(key, groups, values.sequences, order.data());
  for (std::int64_t sequence = 0; sequence < values.sequences; ++sequence) sums[sequence] = 0.0;
  double sum = 0.0;
  for (std::int64_t k = 0; k < n; ++k) {
    const std::int64_t sequence = order[before ? k : n - 1 - k];
    const bool same = k > 0 && groups.of_sequence[sequence] == groups.of_sequence[order[before ? k - 1 : n - k]];
    sum = same ? sum + a[sequence] : a[sequence];
    sums[sequence] = sum;
  }
  double* out = values.column(i.out);
  for (std::int64_t sequence = 0; sequence < values.sequences; ++sequence) out[sequence] = sums[sequence];
}

// What comes before in the same group plus what comes after: no subtraction that could cancel.
void over_others(const SequenceInstruction& i, const SequenceValues& values, const SequenceGroups& groups) {
  const Operand a = operand(values, i.a);
  const Buffer<double> running(groups.count), sums(values.sequences);  // `out` may be one of the arguments
  for (std::int64_t g = 0; g < groups.count; ++g) running[g] = 0.0;
  for (std::int64_t sequence = 0; sequence < values.sequences; ++sequence) {
    double& before = running[groups.of_sequence[sequence]];
    sums[sequence] = before;
    before += a[sequence];
  }
  for (std::int64_t g = 0; g < groups.count; ++g) running[g] = 0.0;
  double* out = values.column(i.out);
  for (std::int64_t sequence = values.sequences - 1; sequence >= 0; --sequence) {
    double& after = running[groups.of_sequence[sequence]];
    sums[sequence] += after;
    after += a[sequence];
  }
  for (std::int64_t sequence = 0; sequence < values.sequences; ++sequence) out[sequence] = sums[sequence];
}

// Sequences by rising key, then by number; NaN last, as torch sorts.
void sort_sequences(const Operand& key, std::int64_t sequences, std::int64_t* order) {
  for (std::int64_t sequence = 0; sequence < sequences; ++sequence) order[sequence] = sequence;
  std::sort(order, order + sequences, [&](std::int64_t x, std::int64_t y) {
    const double first = key[x], second = key[y];
    const bool first_nan = std::isnan(first), second_nan = std::isnan(second);
    if (first_nan != second_nan) return second_nan;
    return first_nan || first == second ? x < y : first < second;
  });
}

// Sequence j gets the a of the sequence whose b has the rank of j's c.
void permute(const SequenceInstruction& i, const SequenceValues& values) {
  const Operand a = operand(values, i.a), from = operand(values, i.b), to = operand(values, i.c);
  const Buffer<std::int64_t> source(values.sequences), target(values.sequences);
  const Buffer<double> moved(values.sequences);  // `out` may be one of the arguments
  sort_sequences(from, values.sequences, source.data());
  sort_sequences(to, values.sequences, target.data());
  for (std::int64_t k = 0; k < values.sequences; ++k) moved[target[k]] = a[source[k]];
  double* out = values.column(i.out);
  for (std::int64_t sequence = 0; sequence < values.sequences; ++sequence) out[sequence] = moved[sequence];
}

void run(const SequenceInstruction& i, const SequenceValues& values, const SequenceGroups& groups) {
#define CASE(name, tile, number) \
  case SequenceOp::k_##name: return unary(i, values, [](double x) { return number; });
  switch (i.op) {
    FASTREWARD_UNARY(CASE)
    case SequenceOp::k_add: return binary(i, values, [](double x, double y) { return x + y; });
    case SequenceOp::k_sub: return binary(i, values, [](double x, double y) { return x - y; });
    case SequenceOp::k_mul: return binary(i, values, [](double x, double y) { return x * y; });
    case SequenceOp::k_div: return binary(i, values, [](double x, double y) { return x / y; });
    case SequenceOp::k_minimum: return binary(i, values, smaller);
    case SequenceOp::k_maximum: return binary(i, values, larger);
    case SequenceOp::k_lt: return binary(i, values, [](double x, double y) { return truth(x < y); });
    case SequenceOp::k_le: return binary(i, values, [](double x, double y) { return truth(x <= y); });
    case SequenceOp::k_gt: return binary(i, values, [](double x, double y) { return truth(x > y); });
    case SequenceOp::k_ge: return binary(i, values, [](double x, double y) { return truth(x >= y); });
    case SequenceOp::k_eq: return binary(i, values, [](double x, double y) { return truth(x == y); });
    case SequenceOp::k_ne: return binary(i, values, [](double x, double y) { return truth(x != y); });
    case SequenceOp::k_and: return binary(i, values, [](double x, double y) { return x * y; });
    case SequenceOp::k_or: return binary(i, values, [](double x, double y) { return truth(x + y != 0.0); });
    case SequenceOp::k_not: return unary(i, values, [](double x) { return 1.0 - x; });
    case SequenceOp::k_where: return ternary(i, values, [](double c, double x, double y) { return c != 0.0 ? x : y; });
    case SequenceOp::k_clip:
      return ternary(i, values, [](double x, double low, double high) { return x < low ? low : x > high ? high : x; });
    case SequenceOp::k_outside:
      return ternary(i, values, [](double x, double low, double high) { return truth(x < low || x > high); });
    case SequenceOp::k_group_sum: return over_groups(i, values, groups, 0.0, [](double x, double y) { return y + x; });
    case SequenceOp::k_group_max: return over_groups(i, values, groups, -kInf, larger);
    case SequenceOp::k_group_min: return over_groups(i, values, groups, kInf, smaller);
    case SequenceOp::k_group_sum_before: return over_neighbours(i, values, groups, true);
    case SequenceOp::k_group_sum_after: return over_neighbours(i, values, groups, false);
    case SequenceOp::k_group_sum_others: return over_others(i, values, groups);
    case SequenceOp::k_batch_permute: return permute(i, values);
    case SequenceOp::k_batch_sum: return over_batch(i, values, 0.0, [](double x, double y) { return y + x; });
    case SequenceOp::k_batch_max: return over_batch(i, values, -kInf, larger);
    case SequenceOp::k_batch_min: return over_batch(i, values, kInf, smaller);
  }
}

}  // namespace

void run_sequences(const Span<SequenceInstruction>& instructions, const SequenceValues& values,
                   const SequenceGroups& groups) {
  for (const SequenceInstruction& instruction : instructions) run(instruction, values, groups);
}

}  // namespace fastreward::FASTREWARD_ISA::program
