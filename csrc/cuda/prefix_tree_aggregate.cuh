// Aggregates: each node from the sequences below it, or from its children; and their gradients for the sequences.
//
// A part that is NaN is not there; a node without parts has the weight NaN and the value NaN.
#pragma once

#include "cuda/prefix_tree_forest.cuh"

namespace fastreward {

enum TreeOp { OP_MEAN, OP_SUM, OP_MAX, OP_MIN, OP_LOGSUMEXP, OP_ANY };

struct AggregateArguments {
  Forest forest;
  Floats values, weights, child_weights;  // [sequences], [sequences] or null, [places] or null
  i64 op, normalized;
  i64 children;  // 1: a node's children count alike, instead of the sequences below it
  Number scale, discount;
  double *total, *weight;  // [places]: what the parts add up to (logsumexp: its log), and their weights
  double* result;          // [places], over children
  unsigned* arrived;       // [places], over children: how many are ready
  FloatsOut out;           // [places]
  Floats grad;             // [places], backward
  FloatsOut grad_values;   // [sequences], backward
};

__device__ __forceinline__ double power(double base, i64 exponent) {
  return base == 1. || exponent == 0 ? 1. : pow(base, double(exponent));
}

// The log of a part times its weight. (Not a product: without its weight, exp of a part may be infinite.)
__device__ __forceinline__ double weighted(double log_part, double weight) {
  return weight == 1. ? log_part : log_part + log(weight);
}

// exp(difference), where nothing minus nothing is nothing.
__device__ __forceinline__ double share(double log_part, double log_whole) {
  return isinf(log_whole) ? 0. : exp(log_part - log_whole);
}

__device__ __forceinline__ double log_add(double a, double b) {
  if (isnan(a) || isnan(b)) return a + b;
  const double high = fmax(a, b);
  return isinf(high) ? high : high + log1p(exp(fmin(a, b) - high));
}

// What the result times scale is for logsumexp: log of the sum, or of the mean.
__device__ __forceinline__ double log_of(const AggregateArguments& a, double total, double weight) {
  return a.normalized ? total - log(weight) : total;
}

__device__ __forceinline__ double result_of(const AggregateArguments& a, double total, double weight, double scale) {
  if (isnan(weight)) return nothing();
  if (a.op == OP_MEAN) return total / weight;
  return a.op == OP_LOGSUMEXP ? log_of(a, total, weight) / scale : total;
}

// ------------------------------------------------------------------------------------------------- over sequences
struct Part {
  double x, weight;
  bool there;
};

// What the sequence at a place of `order` adds to a node that ends at a position.
__device__ __forceinline__ Part part_at(const AggregateArguments& a, i64 place, i64 end, double scale, double discount) {
  const i64 row = a.forest.row(ORDER, place);
  const double x = a.values[row], w = a.weights.or_one(row);
  if (isnan(x)) return {0., 0., false};
  switch (a.op) {
    case OP_MEAN: case OP_SUM: return {w * (discount == 1. ? x : x * power(discount, a.forest.row(LENGTH, row) - end)), w, true};
    case OP_LOGSUMEXP: return {weighted(scale * x, w), w, true};
    case OP_MIN: return {-x, w, true};
    case OP_ANY: return {x != 0. ? 1. : 0., w, true};
    default: return {x, w, true};
  }
}

// WIDTH threads, a warp or the block, reduce the sequences begin .. begin + many of `order` into node n.
template <int WIDTH>
__device__ __forceinline__ void aggregate_node(const AggregateArguments& a, i64 n, i64 begin, i64 many, double* shared) {
  const int lane = int(threadIdx.x) % WIDTH;
  const bool added = a.op == OP_MEAN || a.op == OP_SUM;
  const double scale = a.scale.get(), discount = a.children ? 1. : a.discount.get();
  const i64 end = a.forest.end(n);
  double sum = 0., weight = 0., parts = 0., top = lowest();
  for (i64 k = lane; k < many; k += WIDTH) {
    const Part part = part_at(a, begin + k, end, scale, discount);
    if (!part.there) continue;
    weight += part.weight, parts += 1.;
    if (added) sum += part.x;
    else top = fmax(top, part.x);
  }
  weight = team_sum<WIDTH>(weight, shared), parts = team_sum<WIDTH>(parts, shared);
  top = team_max<WIDTH>(top, shared);
  if (a.op == OP_LOGSUMEXP) {
    const double high = isinf(top) ? 0. : top;
    for (i64 k = lane; k < many; k += WIDTH) {
      const Part part = part_at(a, begin + k, end, scale, discount);
      if (part.there) sum += exp(part.x - high);
    }
    sum = high + log(team_sum<WIDTH>(sum, shared));
  } else {
    sum = added ? team_sum<WIDTH>(sum, shared) : a.op == OP_MIN ? -top : a.op == OP_ANY ? fmax(top, 0.) : top;
  }
  if (lane != 0) return;
  weight = parts > 0. ? weight : nothing();
  a.total[n] = sum, a.weight[n] = weight;
  if (a.children) a.arrived[n] = 0u;
  else a.out.put(n, many > 0 ? result_of(a, sum, weight, scale) : 0.);  // 0 on empty places
}

// -------------------------------------------------------------------------------------------------- over children
// Adds a node's children, in their order, to the sequences that end there.
__device__ __forceinline__ void join_children(const AggregateArguments& a, i64 n) {
  const Forest& f = a.forest;
  const double scale = a.scale.get(), discount = a.discount.get();
  double total = a.total[n], weight = a.weight[n];
  i64 child = n + 1;
  for (i64 left = f.node(CHILDREN, n); left > 0; --left, child = f.node(TOUT, child)) {
    const double x = a.result[child];
    if (isnan(x)) continue;
    const double w = a.child_weights.or_one(child);
    if (a.op == OP_LOGSUMEXP) total = log_add(total, weighted(scale * x, w));
    else total += w * (discount == 1. ? x : x * power(discount, f.node(EDGE_LENGTH, child)));
    weight = isnan(weight) ? w : weight + w;
  }
  const double result = result_of(a, total, weight, scale);
  a.total[n] = total, a.weight[n] = weight, a.result[n] = result;
  a.out.put(n, result);
}

// ------------------------------------------------------------------------------------------------------- backward
// A sequence's part of every node on its path, times that node's gradient; none of a value that is NaN.
__device__ __forceinline__ double gradient_of(const AggregateArguments& a, i64 row) {
  const Forest& f = a.forest;
  const double value = a.values[row], scale = a.scale.get(), discount = a.discount.get();
  const bool logs = a.op == OP_LOGSUMEXP;
  if (isnan(value)) return 0.;
  double w = a.weights.or_one(row), gradient = 0.;
  double part = logs ? 1. : w;                     // of the node in hand
  double x = logs ? weighted(scale * value, w) : 0.;  // log of the part, before it is divided by the whole
  for (i64 n = f.row(LEAF, row); n >= 0; n = f.node(PARENT, n)) {
    const double whole = a.total[n], counted = a.weight[n];
    const bool there = !isnan(result_of(a, whole, counted, scale));
    double here = logs ? part * share(x, whole) : a.op == OP_MEAN ? part / counted : part;
    if (!a.children && discount != 1.) here *= power(discount, f.row(LENGTH, row) - f.end(n));
    if (there) gradient += here * a.grad[n];
    if (!a.children) continue;
    if (!there) break;
    w = a.child_weights.or_one(n);  // now the node is a part of its parent
    part = here;
    if (logs) x = weighted(log_of(a, whole, counted), w);
    else part *= discount == 1. ? w : w * power(discount, f.node(EDGE_LENGTH, n));
  }
  return gradient;
}

}  // namespace fastreward
