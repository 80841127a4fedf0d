// Group advantages: rewards [B, K] -> advantages [B].
//
// Fused: component sum, group statistics and normalisation, with no [groups, size] copy. Members of a group need not be
// neighbours: a stable counting sort lists them, and is skipped where the rows already lie group by group. All
// arithmetic is float64 with two-pass variances. Sums are taken relative to the group's first reward, so that equal
// rewards give an advantage of exactly 0, whatever their rounding. A group's sum runs over its rows in order: the bits
// depend neither on the number of threads nor on the other groups.
#include "cpu/group.hpp"

#include <cmath>
#include <limits>

#include "cpu/threads.hpp"

namespace fastreward::FASTREWARD_ISA {
namespace {

constexpr std::int64_t kRows = 1 << 12;  // a thread's share, at least
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// The rows of one group.
struct Members {
  const std::int64_t* order;  // nullptr: the rows begin .. end - 1 themselves
  std::int64_t begin, end;
  std::int64_t row(std::int64_t i) const { return order == nullptr ? i : order[i]; }
};

// Calls f(row, value) for the scored members, in row order.
template <class F>
void for_scored(const Members& members, const double* values, F&& f) {
  for (std::int64_t i = members.begin; i < members.end; ++i) {
    const std::int64_t row = members.row(i);
    if (!std::isnan(values[row])) f(row, values[row]);
  }
}

// ------------------------------------------------------------------------------------------------------- grouping
// Fills scratch.starts; returns the rows' order, or nullptr where the rows already lie group by group.
const std::int64_t* sort_rows(const GroupProblem& p, const GroupScratch& s) {
  for (std::int64_t g = 0; g <= p.groups; ++g) s.starts[g] = 0;
  bool sorted = true;
  for (std::int64_t b = 0; b < p.rows; ++b) {
    ++s.starts[p.group_index[b] + 1];
    sorted = sorted && (b == 0 || p.group_index[b - 1] <= p.group_index[b]);
  }
  for (std::int64_t g = 0; g < p.groups; ++g) s.starts[g + 1] += s.starts[g];
  if (sorted) return nullptr;
  // starts[g] serves as the write position of group g and is put back by one shift afterwards.
  for (std::int64_t b = 0; b < p.rows; ++b) s.order[s.starts[p.group_index[b]]++] = b;
  for (std::int64_t g = p.groups; g > 0; --g) s.starts[g] = s.starts[g - 1];
  s.starts[0] = 0;
  return s.order;
}

Members members_of(const GroupProblem& p, const GroupScratch& s, const std::int64_t* order, std::int64_t group) {
  if (p.group_index != nullptr) return {order, s.starts[group], s.starts[group + 1]};
  const std::int64_t begin = group * p.group_size;
  const std::int64_t end = begin + p.group_size;
  return {nullptr, begin, end < p.rows ? end : p.rows};
}

// --------------------------------------------------------------------------------------------------------- values
double weight_of(const GroupProblem& p, std::int64_t component) {
  return p.component_weights == nullptr ? 1.0 : static_cast<double>(p.component_weights[component]);
}

// values[b] = weighted sum of the scored components of row b; NaN where there is none.
template <class T>
void sum_components(const GroupProblem& p, double* values) {
  const T* rewards = static_cast<const T*>(p.rewards);
  parallel_ranges(p.threads, p.rows, grain_of(p.rows, kRows), [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t b = begin; b < end; ++b) {
      double total = 0.0;
      bool scored = false;
      for (std::int64_t k = 0; k < p.components; ++k) {
        const double reward = static_cast<double>(rewards[b * p.components + k]);
        if (std::isnan(reward)) continue;
        total += weight_of(p, k) * reward;
        scored = true;
      }
      values[b] = scored ? total : std::numeric_limits<double>::quiet_NaN();
    }
  });
}

template <class T>
void take_component(const GroupProblem& p, std::int64_t component, double* values) {
  const T* rewards = static_cast<const T*>(p.rewards) + component;
  for (std::int64_t b = 0; b < p.rows; ++b) values[b] = static_cast<double>(rewards[b * p.components]);
}

// ----------------------------------------------------------------------------------------------------- statistics
// What centring and scaling need of one population; sums are of (value - origin), origin = the first scored value.
struct Statistics {
  std::int64_t count = 0;
  double origin = 0.0;
  double sum = 0.0;
  double weight = 0.0, weighted_sum = 0.0;           // by length
  double largest = -kInfinity, second = -kInfinity;  // as they are, not relative
  std::int64_t largest_row = -1;
  double mean = 0.0;  // relative, as sum
};

Statistics statistics_of(const GroupProblem& p, const Members& members, const double* values) {
  Statistics s;
  for_scored(members, values, [&](std::int64_t row, double value) {
    if (s.count++ == 0) s.origin = value;
    const double shifted = value - s.origin;
    s.sum += shifted;
    if (p.lengths != nullptr) {
      const double length = static_cast<double>(p.lengths[row]);
      s.weight += length;
      s.weighted_sum += length * shifted;
    }
    if (value > s.largest || s.largest_row < 0) {
      s.second = s.largest;
      s.largest = value;
      s.largest_row = row;
    } else if (value > s.second) {
      s.second = value;
    }
  });
  s.mean = s.sum / static_cast<double>(s.count);
  return s;
}

double centred(const GroupProblem& p, const Statistics& s, std::int64_t row, double value) {
  const double shifted = value - s.origin;
  switch (p.center) {
    case Center::none:
      return value;
    case Center::mean:
      return shifted - s.mean;
    case Center::leave_one_out:
      return shifted - (s.sum - shifted) / static_cast<double>(s.count - 1);
    case Center::length_weighted:
      return s.weight > 0.0 ? shifted - s.weighted_sum / s.weight : 0.0;  // no tokens, no baseline
    case Center::second_max:
      return value - (row == s.largest_row ? s.second : s.largest);
    case Center::tensor:
      return value - static_cast<double>(p.center_values[row]);
  }
  return value;
}

// Standard deviation of a population with eps put where the options say.
double deviation(const GroupProblem& p, const Members& members, const double* values, const Statistics& s) {
  double squares = 0.0;
  for_scored(members, values, [&](std::int64_t, double value) {
    const double d = (value - s.origin) - s.mean;
    squares += d * d;
  });
  const double freedom = static_cast<double>(s.count - p.ddof);
  const double variance = freedom > 0.0 ? squares / freedom : kInfinity;
  return p.eps_inside ? std::sqrt(variance + p.eps) : std::sqrt(variance) + p.eps;
}

// The divisor of one group's rows (Scale::tensor has one for each row and is applied by the caller).
double divisor_of(const GroupProblem& p, const Members& members, const double* values, const Statistics& s,
                  double batch_deviation) {
  if (p.scale == Scale::std_dev) return deviation(p, members, values, s);
  if (p.scale == Scale::batch_std) return batch_deviation;
  if (p.scale != Scale::max) return 1.0;
  double largest = 0.0;
  for_scored(members, values, [&](std::int64_t row, double value) {
    const double size = std::fabs(centred(p, s, row, value));
    if (size > largest || std::isnan(size)) largest = size;
  });
  return largest + p.eps;
}

// 0 / 0 is 0: where nothing is left after centring, no divisor makes something of it; all else is infinite as f32.
double not_zero(double divisor) { return divisor == 0.0 ? std::numeric_limits<double>::min() : divisor; }

double singleton_value(Singleton rule, double value) {
  if (rule == Singleton::raw) return value;
  return rule == Singleton::zero ? 0.0 : std::numeric_limits<double>::quiet_NaN();
}

// totals += weight * advantage, for the scored rows of one group.
void normalise_group(const GroupProblem& p, const Members& members, const double* values, double batch_deviation,
                     double weight, double* totals) {
  const Statistics s = statistics_of(p, members, values);
  if (s.count == 1 && p.singleton != Singleton::like_others) {
    for_scored(members, values, [&](std::int64_t row, double value) {
      totals[row] += weight * singleton_value(p.singleton, value);
    });
    return;
  }
  if (s.count == 0) return;
  const double divisor = not_zero(divisor_of(p, members, values, s, batch_deviation));
  for_scored(members, values, [&](std::int64_t row, double value) {
    const double by = p.scale == Scale::tensor ? not_zero(static_cast<double>(p.scale_values[row])) : divisor;
    totals[row] += weight * (centred(p, s, row, value) / by);
  });
}

void normalise(const GroupProblem& p, const GroupScratch& s, const std::int64_t* order, double weight) {
  double batch_deviation = 1.0;
  if (p.scale == Scale::batch_std) {
    const Members everyone{nullptr, 0, p.rows};
    batch_deviation = deviation(p, everyone, s.values, statistics_of(p, everyone, s.values));
  }
  const std::int64_t least = kRows * p.groups / (p.rows + 1);
  parallel_ranges(p.threads, p.groups, grain_of(p.groups, least), [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t g = begin; g < end; ++g)
      normalise_group(p, members_of(p, s, order, g), s.values, batch_deviation, weight, s.totals);
  });
}

// ------------------------------------------------------------------------------------------------ statistics alone
// What layout.GROUP_STATISTICS names, for every member of one group, scored or not.
void write_statistics(const GroupProblem& p, const Members& members, const double* values, bool exponentials) {
  const Statistics s = statistics_of(p, members, values);
  double squares = 0.0, smallest = kInfinity, rest = 0.0;
  for_scored(members, values, [&](std::int64_t row, double value) {
    const double d = (value - s.origin) - s.mean;
    squares += d * d;
    smallest = value < smallest ? value : smallest;
    if (exponentials && row != s.largest_row) rest += std::exp(value - s.second);
  });
  const double weighted_mean = s.weight > 0.0 ? s.origin + s.weighted_sum / s.weight : std::nan("");
  const double found[] = {static_cast<double>(s.count), s.origin + s.mean, squares, weighted_mean,
                          s.largest, s.second, smallest, s.second + std::log(rest)};
  for (std::int64_t i = members.begin; i < members.end; ++i) {
    double* out = p.statistics + members.row(i);
    for (const double x : found) *out = x, out += p.rows;
  }
}

template <class T>
void run_statistics(const GroupProblem& p, const GroupScratch& s, bool exponentials) {
  const std::int64_t* order = p.group_index == nullptr ? nullptr : sort_rows(p, s);
  take_component<T>(p, 0, s.values);
  const std::int64_t least = kRows * p.groups / (p.rows + 1);
  parallel_ranges(p.threads, p.groups, grain_of(p.groups, least), [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t g = begin; g < end; ++g)
      write_statistics(p, members_of(p, s, order, g), s.values, exponentials);
  });
}

template <class T>
void run(const GroupProblem& p, const GroupScratch& s) {
  const std::int64_t* order = p.group_index == nullptr ? nullptr : sort_rows(p, s);
  for (std::int64_t b = 0; b < p.rows; ++b) s.totals[b] = 0.0;
  if (p.normalize == Normalize::sum_then_normalize) {
    sum_components<T>(p, s.values);
    normalise(p, s, order, 1.0);
  } else {
    for (std::int64_t k = 0; k < p.components; ++k) {
      take_component<T>(p, k, s.values);
      normalise(p, s, order, weight_of(p, k));
    }
  }
  for (std::int64_t b = 0; b < p.rows; ++b) p.advantages[b] = static_cast<float>(s.totals[b]);
}

}  // namespace

// -------------------------------------------------------------------------------------------------------- launcher
void group_advantages(const GroupProblem& problem, const GroupScratch& scratch) {
  if (problem.rewards_f64)
    run<double>(problem, scratch);
  else
    run<float>(problem, scratch);
}

void group_statistics(const GroupProblem& problem, const GroupScratch& scratch, bool exponentials) {
  if (problem.rewards_f64)
    run_statistics<double>(problem, scratch, exponentials);
  else
    run_statistics<float>(problem, scratch, exponentials);
}

}  // namespace fastreward::FASTREWARD_ISA
