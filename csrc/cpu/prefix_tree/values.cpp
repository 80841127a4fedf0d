// Values on the nodes of prefix trees: aggregates of what lies below, recurrences from the root, and their gradients.
//
// Nodes are in pre-order, so a loop from a group's last node to its root meets children before parents, and the loop the
// other way parents before children: each operation is one or two such loops, with no recursion and no sort. All
// arithmetic is float64, in an order that a group alone decides: the bits depend neither on the other groups nor on the
// number of threads.
#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/prefix_tree/prefix_tree.hpp"
#include "cpu/threads.hpp"

namespace fastreward::FASTREWARD_ISA {
namespace {

constexpr std::int64_t kNodes = 1 << 12;  // a thread's share, at least
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNothing = std::numeric_limits<double>::quiet_NaN();  // the value of what is not there

// f(root, end of its nodes) for every group.
template <class F>
void for_groups(const PrefixForest& forest, int threads, F&& f) {
  const std::int64_t* const tout = forest.field(kNodeTout);
  const std::int64_t* const root = forest.field(kNodeRoot);
  // Ranges of nodes, each begun at the first root in it: no list of roots is needed.
  parallel_ranges(threads, forest.size, grain_of(forest.size, kNodes), [&](std::int64_t begin, std::int64_t end, int) {
    std::int64_t r = root[begin] == begin ? begin : tout[root[begin]];
    for (; r < end; r = tout[r]) f(r, tout[r]);
  });
}

double power(double base, std::int64_t exponent) {
  return base == 1.0 || exponent == 0 ? 1.0 : std::pow(base, static_cast<double>(exponent));
}

// The log of a part times its weight. (Not a product: without its weight, exp of a part may be infinite.)
double weighted(double log_part, double weight) { return weight == 1.0 ? log_part : log_part + std::log(weight); }

// ---------------------------------------------------------------------------------------------------------- aggregate
// Pairs (total, weight) of each node: the sum of what its parts add and of their weights; for logsumexp the log of the
// sum, for max, min and any the extreme. A part that is NaN is not there, and its weight counts as little; a node
// without parts has the weight NaN and is not there itself.
template <class T>
class Aggregate {
 public:
  Aggregate(const PrefixForest& forest, const AggregateOptions& options, const T* values, const T* weights,
            const T* child_weights, double* total, double* weight)
      : f_(forest), o_(options), values_(values), weights_(weights), child_weights_(child_weights), total_(total),
        weight_(weight) {}

  // Fills total and weight of one group.
  void up(std::int64_t root, std::int64_t end) const {
    std::fill(total_ + root, total_ + end, start());
    std::fill(weight_ + root, weight_ + end, kNothing);
    const std::int64_t* const order = f_.field(kRowOrder);
    const std::int64_t* const leaf = f_.field(kRowLeaf);
    const std::int64_t first = f_.field(kNodeRowBegin)[root], last = first + f_.field(kNodeCount)[root];
    for (std::int64_t i = first; i < last; ++i) {
      const std::int64_t row = order[i];
      if (there(row)) join(leaf[row], value_of(row), row_weight(row));
    }
    for (std::int64_t n = end - 1; n > root; --n) {
      const std::int64_t p = f_.field(kNodeParent)[n];
      const double decay = discount(n);
      if (!o_.over_children) {
        if (!std::isnan(weight_[n])) merge(p, o_.op == TreeOp::logsumexp ? total_[n] : total_[n] * decay, weight_[n]);
      } else if (const double x = result(n); !std::isnan(x)) {
        join(p, o_.op == TreeOp::logsumexp ? x * o_.scale : x * decay, child_weight(n));
      }
    }
  }

  double result(std::int64_t n) const {
    if (std::isnan(weight_[n])) return kNothing;
    switch (o_.op) {
      case TreeOp::mean: return total_[n] / weight_[n];
      case TreeOp::logsumexp: return log_total(n) / o_.scale;
      default: return total_[n];
    }
  }

  // What the result times scale is for logsumexp: log of the sum, or of the mean.
  double log_total(std::int64_t n) const { return o_.mean_form ? total_[n] - std::log(weight_[n]) : total_[n]; }

  bool there(std::int64_t row) const { return !std::isnan(values_[row]); }
  double value_of(std::int64_t row) const {
    const double v = static_cast<double>(values_[row]);
    if (o_.op == TreeOp::any) return v != 0.0 ? 1.0 : 0.0;
    return o_.op == TreeOp::logsumexp ? o_.scale * v : v;
  }
  double row_weight(std::int64_t row) const { return weights_ == nullptr ? 1.0 : static_cast<double>(weights_[row]); }
  double child_weight(std::int64_t n) const {
    return child_weights_ == nullptr ? 1.0 : static_cast<double>(child_weights_[n]);
  }
  double discount(std::int64_t n) const { return power(o_.discount, f_.field(kNodeEdgeLength)[n]); }

 private:
  double start() const {
    switch (o_.op) {
      case TreeOp::max: case TreeOp::logsumexp: return -kInfinity;
      case TreeOp::min: return kInfinity;
      default: return 0.0;
    }
  }

  // Adds one value with a weight.
  void join(std::int64_t n, double value, double w) const {
    switch (o_.op) {
      case TreeOp::mean: case TreeOp::sum: return merge(n, w * value, w);
      case TreeOp::logsumexp: return merge(n, weighted(value, w), w);
      default: return merge(n, value, w);
    }
  }

  void merge(std::int64_t n, double total, double w) const {
    weight_[n] = std::isnan(weight_[n]) ? w : weight_[n] + w;
    double& t = total_[n];
    switch (o_.op) {
      case TreeOp::mean: case TreeOp::sum: t += total; return;
      case TreeOp::max: case TreeOp::any: t = total > t ? total : t; return;
      case TreeOp::min: t = total < t ? total : t; return;
      case TreeOp::logsumexp: t = log_add(t, total); return;
    }
  }

  static double log_add(double a, double b) {
    const double high = std::max(a, b);
    if (std::isnan(a) || std::isnan(b)) return a + b;
    if (std::isinf(high)) return high;
    return high + std::log1p(std::exp(std::min(a, b) - high));
  }

  const PrefixForest& f_;
  const AggregateOptions& o_;
  const T *values_, *weights_, *child_weights_;
  double *total_, *weight_;
};

// exp(difference), where nothing minus nothing is nothing.
double share(double log_part, double log_whole) { return std::isinf(log_whole) ? 0.0 : std::exp(log_part - log_whole); }

// --------------------------------------------------------------------------------------------------------- advantages
// How many of a node's children have a value, their mean and the square root of their variance, kept at the parent.
template <class T>
void children_statistics(const PrefixForest& forest, int ddof, const T* values, double* count, double* mean,
                         double* deviation, std::int64_t root, std::int64_t end) {
  const std::int64_t* const parent = forest.field(kNodeParent);
  for (double* const x : {count, mean, deviation}) std::fill(x + root, x + end, 0.0);
  for (std::int64_t n = root + 1; n < end; ++n)
    if (!std::isnan(values[n])) mean[parent[n]] += static_cast<double>(values[n]), ++count[parent[n]];
  for (std::int64_t n = root; n < end; ++n) mean[n] /= std::max(count[n], 1.0);
  for (std::int64_t n = root + 1; n < end; ++n) {
    const double away = static_cast<double>(values[n]) - mean[parent[n]];
    if (!std::isnan(values[n])) deviation[parent[n]] += away * away;
  }
  for (std::int64_t n = root; n < end; ++n) deviation[n] = std::sqrt(deviation[n] / std::max(count[n] - ddof, 0.0));
}

// A node without a value (NaN) gets 0 and counts in nobody else's; so does a node with nothing to be compared with.
template <class T>
void advantages(const PrefixForest& forest, const AdvantageOptions& o, const T* values, double* scratch, T* out,
                std::int64_t root, std::int64_t end) {
  double* const first = scratch;
  double* const second = scratch + forest.size;
  double* const third = scratch + 2 * forest.size;
  const std::int64_t* const parent = forest.field(kNodeParent);
  const auto value = [&](std::int64_t n) { return static_cast<double>(values[n]); };
  const auto there = [&](std::int64_t n) { return !std::isnan(values[n]); };
  // first, second: sums of weight * value and of weight from the root down to a node, over those that are there.
  const auto add_path = [&](std::int64_t n, double above, double weight_above, double weight) {
    first[n] = there(n) ? above + weight * value(n) : above;
    second[n] = there(n) ? weight_above + weight : weight_above;
  };
  const auto against = [&](std::int64_t n, std::int64_t m) { return there(m) ? value(n) - value(m) : 0.0; };
  const bool by_count = o.mode == TreeMode::depth_weighted;
  const auto weight = [&](std::int64_t n) { return by_count ? static_cast<double>(forest.field(kNodeCount)[n]) : 1.0; };
  const bool along_path = by_count || o.mode == TreeMode::all_ancestors;
  if (o.mode == TreeMode::sibling) children_statistics(forest, o.ddof, values, first, second, third, root, end);
  if (along_path) add_path(root, 0.0, 0.0, weight(root));
  out[root] = T(0);
  for (std::int64_t n = root + 1; n < end; ++n) {
    const std::int64_t p = parent[n];
    double a = 0.0;
    if (along_path) add_path(n, first[p], second[p], weight(n));
    switch (o.mode) {
      case TreeMode::td: a = against(n, p); break;
      case TreeMode::root: a = against(n, root); break;
      case TreeMode::td_root: a = against(n, p) + against(n, root); break;
      case TreeMode::all_ancestors: a = second[p] > 0.0 ? value(n) - first[p] / second[p] : 0.0; break;
      case TreeMode::depth_weighted: a = value(n) - first[n] / second[n]; break;
      case TreeMode::sibling:
        if (first[p] == 1.0) a = o.singleton_raw ? value(n) : 0.0;
        else a = (value(n) - second[p]) / (o.scale_std ? third[p] + o.eps : 1.0);
        break;
    }
    out[n] = there(n) ? static_cast<T>(a) : T(0);
  }
}

// ---------------------------------------------------------------------------------------------------------- propagate
template <class T>
void propagate(const PrefixForest& forest, const T* scale, const T* shift, double initial, double low, double high,
               double* x, std::int64_t root, std::int64_t end) {
  const std::int64_t* const parent = forest.field(kNodeParent);
  x[root] = initial;
  for (std::int64_t n = root + 1; n < end; ++n) {
    const double y = static_cast<double>(scale[n]) * x[parent[n]] + static_cast<double>(shift[n]);
    x[n] = y < low ? low : y > high ? high : y;
  }
}

}  // namespace

// --------------------------------------------------------------------------------------------------------- launchers
template <class T>
void prefix_tree_aggregate(const PrefixForest& forest, const AggregateOptions& options, const T* values,
                           const T* weights, const T* child_weights, double* scratch, T* out, int threads) {
  const Aggregate<T> a(forest, options, values, weights, child_weights, scratch, scratch + forest.size);
  for_groups(forest, threads, [&](std::int64_t root, std::int64_t end) {
    a.up(root, end);
    for (std::int64_t n = root; n < end; ++n) out[n] = static_cast<T>(a.result(n));
  });
}

// H[n] = own[n] + part[n] * H[parent], grad of a row = part of the row * H[leaf]; none from a value that is NaN.
template <class T>
void prefix_tree_aggregate_backward(const PrefixForest& forest, const AggregateOptions& o, const T* values,
                                    const T* weights, const T* child_weights, const T* grad, double* scratch,
                                    T* grad_values, int threads) {
  double* const total = scratch;
  double* const weight = scratch + forest.size;
  double* const h = scratch + 2 * forest.size;
  const Aggregate<T> a(forest, o, values, weights, child_weights, total, weight);
  const std::int64_t* const parent = forest.field(kNodeParent);
  const bool mean = o.op == TreeOp::mean;
  const auto part = [&](std::int64_t n, std::int64_t p) {
    if (o.op == TreeOp::logsumexp && o.over_children) return share(weighted(a.log_total(n), a.child_weight(n)), total[p]);
    if (o.op == TreeOp::logsumexp) return share(total[n], total[p]);
    if (mean && o.over_children) return a.discount(n) * a.child_weight(n) / weight[p];
    return o.over_children ? a.discount(n) * a.child_weight(n) : a.discount(n);
  };
  // A sum and its weights pass a node whose mean is NaN (weights that cancel out), all else ends there.
  const bool passes_nan = !o.over_children && o.op != TreeOp::logsumexp;
  const auto has_value = [&](std::int64_t n) { return !std::isnan(a.result(n)); };
  const auto row_part = [&](std::int64_t row, std::int64_t n) {
    const double w = a.row_weight(row);
    if (o.op == TreeOp::logsumexp) return share(weighted(a.value_of(row), w), total[n]);
    return mean && o.over_children ? w / weight[n] : w;
  };
  const std::int64_t* const order = forest.field(kRowOrder);
  const std::int64_t* const leaf = forest.field(kRowLeaf);
  for_groups(forest, threads, [&](std::int64_t root, std::int64_t end) {
    a.up(root, end);
    for (std::int64_t n = root; n < end; ++n) {
      const bool there = has_value(n);
      const double own = there ? static_cast<double>(grad[n]) : 0.0;
      h[n] = there && mean && !o.over_children ? own / weight[n] : own;
      if (parent[n] < 0 || !(passes_nan || (there && has_value(parent[n])))) continue;
      h[n] += part(n, parent[n]) * h[parent[n]];
    }
    const std::int64_t first = forest.field(kNodeRowBegin)[root], last = first + forest.field(kNodeCount)[root];
    for (std::int64_t i = first; i < last; ++i) {
      const std::int64_t row = order[i];
      const bool through = a.there(row) && (passes_nan || has_value(leaf[row]));
      grad_values[row] = through ? static_cast<T>(row_part(row, leaf[row]) * h[leaf[row]]) : T(0);
    }
  });
}

template <class T>
void prefix_tree_propagate(const PrefixForest& forest, const T* scale, const T* shift, double initial, double low,
                           double high, double* x, T* out, int threads) {
  for_groups(forest, threads, [&](std::int64_t root, std::int64_t end) {
    propagate(forest, scale, shift, initial, low, high, x, root, end);
    for (std::int64_t n = root; n < end; ++n) out[n] = static_cast<T>(x[n]);
  });
}

template <class T>
void prefix_tree_propagate_backward(const PrefixForest& forest, const T* scale, const T* shift, double initial,
                                    double low, double high, const T* grad, double* scratch, T* grad_scale,
                                    T* grad_shift, int threads) {
  double* const x = scratch;
  double* const h = scratch + forest.size;
  const std::int64_t* const parent = forest.field(kNodeParent);
  for_groups(forest, threads, [&](std::int64_t root, std::int64_t end) {
    propagate(forest, scale, shift, initial, low, high, x, root, end);
    for (std::int64_t n = root; n < end; ++n) h[n] = static_cast<double>(grad[n]);
    for (std::int64_t n = end - 1; n > root; --n) {
      const double y = static_cast<double>(scale[n]) * x[parent[n]] + static_cast<double>(shift[n]);
      grad_scale[n] = grad_shift[n] = T(0);
      if (y < low || y > high || std::isnan(y)) continue;
      grad_scale[n] = static_cast<T>(h[n] * x[parent[n]]);
      grad_shift[n] = static_cast<T>(h[n]);
      h[parent[n]] += static_cast<double>(scale[n]) * h[n];
    }
    grad_scale[root] = grad_shift[root] = T(0);
  });
}

template <class T>
void prefix_tree_advantages(const PrefixForest& forest, const AdvantageOptions& options, const T* values,
                            double* scratch, T* out, int threads) {
  for_groups(forest, threads, [&](std::int64_t root, std::int64_t end) {
    advantages(forest, options, values, scratch, out, root, end);
  });
}

FASTREWARD_FOR_FLOATS(prefix_tree_aggregate)
FASTREWARD_FOR_FLOATS(prefix_tree_aggregate_backward)
FASTREWARD_FOR_FLOATS(prefix_tree_advantages)
FASTREWARD_FOR_FLOATS(prefix_tree_propagate)
FASTREWARD_FOR_FLOATS(prefix_tree_propagate_backward)

}  // namespace fastreward::FASTREWARD_ISA
