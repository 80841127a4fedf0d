// Values on prefix trees: aggregates of the sequences below each node, advantages, recurrences from the root, and the way
// between nodes, unique tokens and the tokens of the batch; with the gradients. Trees are built by Triton's kernels.
//
// Fused: all that becomes of a value on its way, in one launch. torch has a launch for each level of the trees, an index
// and a gather over [B, T] for each look-up; here a token's node is found by the few edges between it and its leaf.
// Bytes per token of to_tokens: the mask's and 4 written, and as much read by from_tokens; of a node 12 fields of 8 at
// most. Values of nodes are bound by the latency of a step from node to node, times the depth of the trees.
//
// No float is added atomically. Sums over sequences: in the order of the tree, by one warp, or by the block where they
// are many, which the node alone decides. Over children: in their order, by the thread that finds all of them ready. All
// in f64. So the bits depend neither on scheduling nor on the other groups.
#include "cuda/prefix_tree_aggregate.cuh"
#include "cuda/prefix_tree_tokens.cuh"
#include "cuda/prefix_tree_values.cuh"

namespace fastreward {

// ------------------------------------------------------------------------------------------------------------- kernels
constexpr int THREADS = 128;
constexpr int NODES = THREADS / WARP;  // nodes of a block, one for each warp
constexpr i64 MANY = 512;              // parts of a node that are more than this: all of the block works on it
constexpr int PER_THREAD = 8;          // tokens
constexpr int CHUNK = THREADS * PER_THREAD;

// small(n) by a warp for each of the block's nodes that have few parts, large(n) by the block for each that has many.
template <class Parts, class Small, class Large>
__device__ __forceinline__ void for_nodes(i64 places, Parts parts, Small small, Large large) {
  const i64 first = i64(blockIdx.x) * NODES, own = first + threadIdx.x / WARP;
  if (own < places && parts(own) <= MANY) small(own);
  for (i64 n = first; n < min(places, first + NODES); ++n)
    if (parts(n) > MANY) large(n);
}

// Sequences that are parts of a node: those below it, or, over children, those that end there, which come first.
__device__ __forceinline__ i64 own_parts(const AggregateArguments& a, i64 n) {
  const bool inner = a.children && a.forest.node(CHILDREN, n) > 0;
  return inner ? a.forest.node(ROW_BEGIN, n + 1) - a.forest.node(ROW_BEGIN, n) : a.forest.node(COUNT, n);
}

__device__ __forceinline__ i64 thread_index() { return i64(blockIdx.x) * THREADS + threadIdx.x; }

}  // namespace fastreward

// ---------------------------------------------------------------------------------------------------------- launchers
using namespace fastreward;

// Over children: only what ends at each node, for prefix_tree_children to go on with.
extern "C" __global__ void __launch_bounds__(THREADS) prefix_tree_sequences(const AggregateArguments a) {
  __shared__ double shared[NODES];
  for_nodes(
      a.forest.places, [&](i64 n) { return own_parts(a, n); },
      [&](i64 n) { aggregate_node<WARP>(a, n, a.forest.node(ROW_BEGIN, n), own_parts(a, n), shared); },
      [&](i64 n) { aggregate_node<THREADS>(a, n, a.forest.node(ROW_BEGIN, n), own_parts(a, n), shared); });
}

extern "C" __global__ void __launch_bounds__(THREADS) prefix_tree_children(const AggregateArguments a) {
  const i64 n = thread_index();
  if (n < a.forest.places && a.forest.node(COUNT, n) == 0) a.out.put(n, 0.);
  up_from(a.forest, a.arrived, n, [&](i64 m) { join_children(a, m); });
}

extern "C" __global__ void __launch_bounds__(THREADS) prefix_tree_aggregate_backward(const AggregateArguments a) {
  const i64 row = thread_index();
  if (row < a.forest.sequences) a.grad_values.put(row, gradient_of(a, row));
}

extern "C" __global__ void __launch_bounds__(THREADS) prefix_tree_advantages(const AdvantageArguments a) {
  const i64 n = thread_index();
  if (n < a.forest.places) a.out.put(n, advantage_of(a, n));
}

// Each thread the children of its node; roots and empty places are nobody's.
extern "C" __global__ void __launch_bounds__(THREADS) prefix_tree_siblings(const AdvantageArguments a) {
  const i64 n = thread_index();
  if (n >= a.forest.places) return;
  if (a.forest.node(PARENT, n) < 0) a.out.put(n, 0.);
  sibling_advantages(a, n);
}

// A block for each place of `order`: it takes the group whose sequences begin there, so that nobody has to know how many
// groups there are. `out` is zero before, for the empty places.
extern "C" __global__ void __launch_bounds__(THREADS) prefix_tree_propagate(const PropagateArguments a) {
  const i64 root = a.forest.node(ROOT, a.forest.row(LEAF, a.forest.row(ORDER, blockIdx.x)));
  if (a.forest.node(ROW_BEGIN, root) == i64(blockIdx.x)) propagate_group<THREADS>(a, root, a.forest.node(TOUT, root));
}

extern "C" __global__ void __launch_bounds__(THREADS) prefix_tree_propagate_backward(const PropagateArguments a) {
  const i64 n = thread_index();
  if (n < a.forest.places && a.forest.node(COUNT, n) == 0) a.grad_scale.put(n, 0.), a.grad_shift.put(n, 0.);
  up_from(a.forest, a.arrived, n, [&](i64 m) { propagate_back(a, m); });
}

extern "C" __global__ void __launch_bounds__(THREADS) prefix_tree_to_tokens(const ToTokensArguments a) {
  const Forest& f = a.forest;
  const i64 first = i64(blockIdx.x) * CHUNK, last = min(first + CHUNK, a.count) - 1;
  const i64 low = sequence_at(a, first), high = sequence_at(a, last);
  i64 below = f.row(LEAF, low);  // of a block in one sequence: the node of its furthest token
  const i64 furthest = min(last - f.row(START, low), f.row(LENGTH, low) - 1);
  if (low == high && furthest >= 0) below = climb(f, below, furthest);
  for (i64 at = first + threadIdx.x; at <= last; at += THREADS) {
    const i64 row = low == high ? low : last_up_to(a.extents, at, low, high);
    const i64 position = at - f.row(START, row);
    const bool inside = position >= 0 && position < f.row(LENGTH, row) && counts(a.mask, int(a.mask_kind), at);
    const i64 n = inside ? climb(f, low == high ? below : f.row(LEAF, row), position) : 0;
    put_token(a, at, inside, n, position, row);
  }
}

// A block's unique tokens mostly lie on few edges, which a search of the first and the last finds.
extern "C" __global__ void __launch_bounds__(THREADS) prefix_tree_to_unique(const FromTokensArguments a) {
  const Forest& f = a.forest;
  const i64* const begins = f.nodes + TOKEN_BEGIN * f.stride;
  const i64 first = i64(blockIdx.x) * CHUNK, last = min(first + CHUNK, a.size) - 1;
  const i64 low = last_up_to(begins, first, 0, f.places - 1), high = last_up_to(begins, last, low, f.places - 1);
  for (i64 u = first + threadIdx.x; u <= last; u += THREADS) {
    const i64 n = last_up_to(begins, u, low, high);
    a.out.put(u, reduced(a, n, u - begins[n]));
  }
}

// The first or last token of each node.
extern "C" __global__ void __launch_bounds__(THREADS) prefix_tree_to_ends(const FromTokensArguments a) {
  const i64 n = thread_index();
  if (n < a.size) a.out.put(n, reduced(a, n, a.target == AT_END ? max(a.forest.node(EDGE_LENGTH, n) - 1, i64(0)) : 0));
}

extern "C" __global__ void __launch_bounds__(THREADS, 8) prefix_tree_collect(const FromTokensArguments a) {
  __shared__ double shared[NODES];
  for_nodes(
      a.forest.places, [&](i64 n) { return a.forest.node(COUNT, n) * a.forest.node(EDGE_LENGTH, n); },
      [&](i64 n) { collect_edge<WARP>(a, n, shared); }, [&](i64 n) { collect_edge<THREADS>(a, n, shared); });
}

#ifndef __CUDACC_RTC__
fastreward::KernelTable fastreward::prefix_tree_kernels() {
  static const Kernel kernels[] = {
      {"prefix_tree_sequences", reinterpret_cast<const void*>(&prefix_tree_sequences), sizeof(AggregateArguments)},
      {"prefix_tree_children", reinterpret_cast<const void*>(&prefix_tree_children), sizeof(AggregateArguments)},
      {"prefix_tree_aggregate_backward", reinterpret_cast<const void*>(&prefix_tree_aggregate_backward),
       sizeof(AggregateArguments)},
      {"prefix_tree_advantages", reinterpret_cast<const void*>(&prefix_tree_advantages), sizeof(AdvantageArguments)},
      {"prefix_tree_siblings", reinterpret_cast<const void*>(&prefix_tree_siblings), sizeof(AdvantageArguments)},
      {"prefix_tree_propagate", reinterpret_cast<const void*>(&prefix_tree_propagate), sizeof(PropagateArguments)},
      {"prefix_tree_propagate_backward", reinterpret_cast<const void*>(&prefix_tree_propagate_backward),
       sizeof(PropagateArguments)},
      {"prefix_tree_to_tokens", reinterpret_cast<const void*>(&prefix_tree_to_tokens), sizeof(ToTokensArguments)},
      {"prefix_tree_to_unique", reinterpret_cast<const void*>(&prefix_tree_to_unique), sizeof(FromTokensArguments)},
      {"prefix_tree_to_ends", reinterpret_cast<const void*>(&prefix_tree_to_ends), sizeof(FromTokensArguments)},
      {"prefix_tree_collect", reinterpret_cast<const void*>(&prefix_tree_collect), sizeof(FromTokensArguments)}};
  return {kernels, sizeof(kernels) / sizeof(kernels[0])};
}
#endif
