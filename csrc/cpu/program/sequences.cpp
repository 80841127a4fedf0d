// The work of programs per sequence, per group and for the batch: float64, one column of rows after the other, each
// instruction a loop over the rows. Sums run in the order of the rows; groups cost time linear in the rows.
#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/program/internal.hpp"

namespace fastreward::FASTREWARD_ISA::program {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

// An operand of an instruction over n rows.
struct Operand {
  const double* p;
  bool column;

  double operator[](std::int64_t row) const { return p[column ? row : 0]; }
};

Operand operand(const RowValues& values, RowPlace p) {
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
void unary(const RowInstruction& i, const RowValues& values, const F& f) {
  const Operand a = operand(values, i.a);
  double* out = values.is_column(i.out) ? values.column(i.out) : values.numbers + i.out;
  const std::int64_t n = values.is_column(i.out) ? values.rows : 1;
  if (!a.column) {
    const double y = f(*a.p);
    for (std::int64_t row = 0; row < n; ++row) out[row] = y;
    return;
  }
  for (std::int64_t row = 0; row < n; ++row) out[row] = f(a.p[row]);
}

// Loops of their own for columns and numbers, so that the compiler makes vectors of them.
template <class F>
void binary(const RowInstruction& i, const RowValues& values, const F& f) {
  const Operand a = operand(values, i.a), b = operand(values, i.b);
  double* out = values.is_column(i.out) ? values.column(i.out) : values.numbers + i.out;
  const std::int64_t n = values.is_column(i.out) ? values.rows : 1;
  const double *x = a.p, *y = b.p;
  if (a.column && b.column) {
    for (std::int64_t row = 0; row < n; ++row) out[row] = f(x[row], y[row]);
  } else if (a.column) {
    const double number = *y;
    for (std::int64_t row = 0; row < n; ++row) out[row] = f(x[row], number);
  } else if (b.column) {
    const double number = *x;
    for (std::int64_t row = 0; row < n; ++row) out[row] = f(number, y[row]);
  } else {
    const double value = f(*x, *y);
    for (std::int64_t row = 0; row < n; ++row) out[row] = value;
  }
}

template <class F>
void ternary(const RowInstruction& i, const RowValues& values, const F& f) {
  const Operand a = operand(values, i.a), b = operand(values, i.b), c = operand(values, i.c);
  double* out = values.is_column(i.out) ? values.column(i.out) : values.numbers + i.out;
  const std::int64_t n = values.is_column(i.out) ? values.rows : 1;
  for (std::int64_t row = 0; row < n; ++row) out[row] = f(a[row], b[row], c[row]);
}

double truth(bool x) { return x ? 1.0 : 0.0; }

// ----------------------------------------------------------------------------------------------------- reductions
// A NaN goes through.
double larger(double x, double y) { return x > y || std::isnan(x) ? x : y; }
double smaller(double x, double y) { return x < y || std::isnan(x) ? x : y; }

// Lane = row modulo kLanes, then the lanes in order.
template <class F>
void over_batch(const RowInstruction& i, const RowValues& values, double neutral, const F& f) {
  constexpr int kLanes = 8;
  const Operand a = operand(values, i.a);
  double lanes[kLanes];
  for (double& x : lanes) x = neutral;
  std::int64_t row = 0;
  for (; row + kLanes <= values.rows; row += kLanes)
    for (int k = 0; k < kLanes; ++k) lanes[k] = f(a[row + k], lanes[k]);
  for (; row < values.rows; ++row) lanes[row % kLanes] = f(a[row], lanes[row % kLanes]);
  for (int k = 1; k < kLanes; ++k) lanes[0] = f(lanes[k], lanes[0]);
  values.numbers[i.out] = lanes[0];
}

template <class F>
void over_groups(const RowInstruction& i, const RowValues& values, const RowGroups& groups, double neutral,
                 const F& f) {
  const Operand a = operand(values, i.a);
  const Buffer<double> total(groups.count);
  for (std::int64_t g = 0; g < groups.count; ++g) total[g] = neutral;
  for (std::int64_t row = 0; row < values.rows; ++row) {
    double& of_group = total[groups.of_row[row]];
    of_group = f(a[row], of_group);
  }
  double* out = values.column(i.out);
  for (std::int64_t row = 0; row < values.rows; ++row) out[row] = total[groups.of_row[row]];
}

// Rows by group, then by falling key, then by number; those whose key is NaN come before nobody and after nobody: they
// are left out. Returns how many are in.
std::int64_t order_of(const Operand& key, const RowGroups& groups, std::int64_t rows, std::int64_t* order) {
  std::int64_t n = 0;
  for (std::int64_t row = 0; row < rows; ++row)
    if (!std::isnan(key[row])) order[n++] = row;
  std::sort(order, order + n, [&](std::int64_t x, std::int64_t y) {
    if (groups.of_row[x] != groups.of_row[y]) return groups.of_row[x] < groups.of_row[y];
    const double first = key[x], second = key[y];
    return first != second ? first > second : x < y;
  });
  return n;
}

// Running sums within the groups, from the front (before) or from the back (after).
void over_neighbours(const RowInstruction& i, const RowValues& values, const RowGroups& groups, bool before) {
  const Operand a = operand(values, i.a), key = operand(values, i.b);
  const Buffer<std::int64_t> order(values.rows);
  const Buffer<double> sums(values.rows);  // `out` may be one of the arguments
  const std::int64_t n = order_of(key, groups, values.rows, order.data());
  for (std::int64_t row = 0; row < values.rows; ++row) sums[row] = 0.0;
  double sum = 0.0;
  for (std::int64_t k = 0; k < n; ++k) {
    const std::int64_t row = order[before ? k : n - 1 - k];
    const bool same = k > 0 && groups.of_row[row] == groups.of_row[order[before ? k - 1 : n - k]];
    sum = same ? sum + a[row] : a[row];
    sums[row] = sum;
  }
  double* out = values.column(i.out);
  for (std::int64_t row = 0; row < values.rows; ++row) out[row] = sums[row];
}

// What comes before in the own group plus what comes after: no subtraction that could cancel.
void over_others(const RowInstruction& i, const RowValues& values, const RowGroups& groups) {
  const Operand a = operand(values, i.a);
  const Buffer<double> running(groups.count), sums(values.rows);  // `out` may be one of the arguments
  for (std::int64_t g = 0; g < groups.count; ++g) running[g] = 0.0;
  for (std::int64_t row = 0; row < values.rows; ++row) {
    double& before = running[groups.of_row[row]];
    sums[row] = before;
    before += a[row];
  }
  for (std::int64_t g = 0; g < groups.count; ++g) running[g] = 0.0;
  double* out = values.column(i.out);
  for (std::int64_t row = values.rows - 1; row >= 0; --row) {
    double& after = running[groups.of_row[row]];
    sums[row] += after;
    after += a[row];
  }
  for (std::int64_t row = 0; row < values.rows; ++row) out[row] = sums[row];
}

// Rows by rising key, then by number; NaN last, as torch sorts.
void sort_rows(const Operand& key, std::int64_t rows, std::int64_t* order) {
  for (std::int64_t row = 0; row < rows; ++row) order[row] = row;
  std::sort(order, order + rows, [&](std::int64_t x, std::int64_t y) {
    const double first = key[x], second = key[y];
    const bool first_nan = std::isnan(first), second_nan = std::isnan(second);
    if (first_nan != second_nan) return second_nan;
    return first_nan || first == second ? x < y : first < second;
  });
}

// Row j gets the a of the row whose b has the rank of j's c.
void permute(const RowInstruction& i, const RowValues& values) {
  const Operand a = operand(values, i.a), from = operand(values, i.b), to = operand(values, i.c);
  const Buffer<std::int64_t> source(values.rows), target(values.rows);
  const Buffer<double> moved(values.rows);  // `out` may be one of the arguments
  sort_rows(from, values.rows, source.data());
  sort_rows(to, values.rows, target.data());
  for (std::int64_t k = 0; k < values.rows; ++k) moved[target[k]] = a[source[k]];
  double* out = values.column(i.out);
  for (std::int64_t row = 0; row < values.rows; ++row) out[row] = moved[row];
}

void run(const RowInstruction& i, const RowValues& values, const RowGroups& groups) {
#define CASE(name, tile, number) \
  case RowOp::k_##name: return unary(i, values, [](double x) { return number; });
  switch (i.op) {
    FASTREWARD_UNARY(CASE)
    case RowOp::k_add: return binary(i, values, [](double x, double y) { return x + y; });
    case RowOp::k_sub: return binary(i, values, [](double x, double y) { return x - y; });
    case RowOp::k_mul: return binary(i, values, [](double x, double y) { return x * y; });
    case RowOp::k_div: return binary(i, values, [](double x, double y) { return x / y; });
    case RowOp::k_minimum: return binary(i, values, smaller);
    case RowOp::k_maximum: return binary(i, values, larger);
    case RowOp::k_lt: return binary(i, values, [](double x, double y) { return truth(x < y); });
    case RowOp::k_le: return binary(i, values, [](double x, double y) { return truth(x <= y); });
    case RowOp::k_gt: return binary(i, values, [](double x, double y) { return truth(x > y); });
    case RowOp::k_ge: return binary(i, values, [](double x, double y) { return truth(x >= y); });
    case RowOp::k_eq: return binary(i, values, [](double x, double y) { return truth(x == y); });
    case RowOp::k_ne: return binary(i, values, [](double x, double y) { return truth(x != y); });
    case RowOp::k_and: return binary(i, values, [](double x, double y) { return x * y; });
    case RowOp::k_or: return binary(i, values, [](double x, double y) { return truth(x + y != 0.0); });
    case RowOp::k_not: return unary(i, values, [](double x) { return 1.0 - x; });
    case RowOp::k_where: return ternary(i, values, [](double c, double x, double y) { return c != 0.0 ? x : y; });
    case RowOp::k_clip:
      return ternary(i, values, [](double x, double low, double high) { return x < low ? low : x > high ? high : x; });
    case RowOp::k_outside:
      return ternary(i, values, [](double x, double low, double high) { return truth(x < low || x > high); });
    case RowOp::k_group_sum: return over_groups(i, values, groups, 0.0, [](double x, double y) { return y + x; });
    case RowOp::k_group_max: return over_groups(i, values, groups, -kInf, larger);
    case RowOp::k_group_min: return over_groups(i, values, groups, kInf, smaller);
    case RowOp::k_group_sum_before: return over_neighbours(i, values, groups, true);
    case RowOp::k_group_sum_after: return over_neighbours(i, values, groups, false);
    case RowOp::k_group_sum_others: return over_others(i, values, groups);
    case RowOp::k_batch_permute: return permute(i, values);
    case RowOp::k_batch_sum: return over_batch(i, values, 0.0, [](double x, double y) { return y + x; });
    case RowOp::k_batch_max: return over_batch(i, values, -kInf, larger);
    case RowOp::k_batch_min: return over_batch(i, values, kInf, smaller);
  }
}

}  // namespace

void run_rows(const Span<RowInstruction>& instructions, const RowValues& values, const RowGroups& groups) {
  for (const RowInstruction& instruction : instructions) run(instruction, values, groups);
}

}  // namespace fastreward::FASTREWARD_ISA::program
