// From values of nodes to others: advantages, and recurrences from the roots down with their gradients.
#pragma once

#include "cuda/prefix_tree_forest.cuh"

namespace fastreward {

enum TreeMode { TD, SIBLING, OF_ROOT, TD_ROOT, ALL_ANCESTORS, DEPTH_WEIGHTED };

struct AdvantageArguments {
  Forest forest;
  Floats values;  // [places]
  FloatsOut out;  // [places]
  i64 mode, scale_std, singleton_raw, ddof;
  Number eps;
};

struct PropagateArguments {
  Forest forest;
  Floats scale, shift;            // [places]
  Number initial, low, high;
  double* x;                      // [places]: the recurrence
  FloatsOut out;                  // [places]: the same
  Floats grad;                    // [places], backward
  double* passed;                 // [places], backward: what a node adds to its parent's gradient
  unsigned* arrived;              // [places], backward: how many children have done so
  FloatsOut grad_scale, grad_shift;  // [places], backward
};

// ----------------------------------------------------------------------------------------------------- advantages
// V - V(other), 0 where that one has no value.
__device__ __forceinline__ double against(const Floats& values, double v, i64 other) {
  const double above = values[other];
  return isnan(above) ? 0. : v - above;
}

// V against the weighted mean of the nodes from `above` to the root that have a value.
__device__ __forceinline__ double against_path(const AdvantageArguments& a, double v, i64 above) {
  double total = 0., weights = 0.;
  for (; above >= 0; above = a.forest.node(PARENT, above)) {
    const double value = a.values[above];
    if (isnan(value)) continue;
    const double weight = a.mode == DEPTH_WEIGHTED ? double(a.forest.node(COUNT, above)) : 1.;
    total += weight * value, weights += weight;
  }
  return weights > 0. ? v - total / weights : 0.;
}

// In every mode but SIBLING; 0 for a root, and for a node without a value.
__device__ __forceinline__ double advantage_of(const AdvantageArguments& a, i64 n) {
  const i64 parent = a.forest.node(PARENT, n);
  const double v = a.values[n];
  if (parent < 0 || isnan(v)) return 0.;
  switch (a.mode) {
    case TD: return against(a.values, v, parent);
    case OF_ROOT: return against(a.values, v, a.forest.node(ROOT, n));
    case TD_ROOT: return against(a.values, v, parent) + against(a.values, v, a.forest.node(ROOT, n));
    default: return against_path(a, v, a.mode == DEPTH_WEIGHTED ? n : parent);
  }
}

// f(child) for each child of a node, in their order.
template <class F>
__device__ __forceinline__ void for_children(const Forest& f, i64 n, F each) {
  i64 child = n + 1;
  for (i64 left = f.node(CHILDREN, n); left > 0; --left, child = f.node(TOUT, child)) each(child);
}

// The children of a node against each other; their mean first, then their variance, never E[x^2] - E[x]^2.
__device__ __forceinline__ void sibling_advantages(const AdvantageArguments& a, i64 n) {
  double count = 0., mean = 0., squares = 0.;
  for_children(a.forest, n, [&](i64 child) {
    const double v = a.values[child];
    if (!isnan(v)) count += 1., mean += v;
  });
  mean /= fmax(count, 1.);
  for_children(a.forest, n, [&](i64 child) {
    const double v = a.values[child];
    if (!isnan(v)) squares += (v - mean) * (v - mean);
  });
  const double by = a.scale_std ? sqrt(squares / fmax(count - double(a.ddof), 0.)) + a.eps.get() : 1.;
  for_children(a.forest, n, [&](i64 child) {
    const double v = a.values[child];
    const double alone = a.singleton_raw ? v : 0.;
    a.out.put(child, isnan(v) ? 0. : count == 1. ? alone : (v - mean) / by);
  });
}

// ------------------------------------------------------------------------------------------------------ propagate
// scale * x(parent) + shift, before it is clamped.
__device__ __forceinline__ double step(const PropagateArguments& a, i64 n, double above) {
  return a.scale[n] * above + a.shift[n];
}

__device__ __forceinline__ double clamped(double y, double low, double high) { return y < low ? low : y > high ? high : y; }

// One group, THREADS nodes at a time in pre-order. Each waits for its parent, if that is among them: as many rounds as
// the longest path through them has nodes, and never more than nodes.
template <int THREADS>
__device__ __forceinline__ void propagate_group(const PropagateArguments& a, i64 root, i64 end) {
  __shared__ double here[THREADS];
  __shared__ bool done[THREADS];
  const double initial = a.initial.get(), low = a.low.get(), high = a.high.get();
  for (i64 first = root; first < end; first += THREADS) {
    const i64 n = first + threadIdx.x;
    bool waiting = n < end;
    const i64 parent = waiting ? a.forest.node(PARENT, n) : -1;
    done[threadIdx.x] = false;
    __syncthreads();
    do {
      const bool ready = waiting && (parent < first || done[parent - first]);
      __syncthreads();  // all have looked: what is done now is the next round's
      if (ready) {
        const double above = parent < 0 ? 0. : parent < first ? a.x[parent] : here[parent - first];
        const double x = parent < 0 ? initial : clamped(step(a, n, above), low, high);
        here[threadIdx.x] = a.x[n] = x;
        a.out.put(n, x);
        if (a.arrived) a.arrived[n] = 0u;
        done[threadIdx.x] = true, waiting = false;
      }
    } while (__syncthreads_or(waiting));
  }
}

// A node's gradient and its children's, to what has made it. Nothing passes where a bound has cut, where x is NaN, nor
// from a root.
__device__ __forceinline__ void propagate_back(const PropagateArguments& a, i64 n) {
  double gradient = a.grad[n];
  for_children(a.forest, n, [&](i64 child) { gradient += a.passed[child]; });
  const i64 parent = a.forest.node(PARENT, n);
  const double above = parent < 0 ? 0. : a.x[parent], y = parent < 0 ? nothing() : step(a, n, above);
  const bool passes = y >= a.low.get() && y <= a.high.get();
  a.passed[n] = passes ? a.scale[n] * gradient : 0.;
  a.grad_scale.put(n, passes ? gradient * above : 0.);
  a.grad_shift.put(n, passes ? gradient : 0.);
}

}  // namespace fastreward
