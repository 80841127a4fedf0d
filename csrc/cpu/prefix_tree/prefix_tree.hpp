// Prefix trees: a batch of token sequences as one compressed radix forest in flat arrays.
//
// Nodes are numbered in pre-order, group by group, children in the order in which their first sequence comes in the
// batch: a node's number is its `tin`, its parent's number is smaller, and its subtree is an interval. The root of a
// group has no tokens. Every sequence ends at the end of a node, so that it is a concatenation of whole edges.
#pragma once

#include <cstdint>

#include "cpu/common/isa.hpp"
#include "cpu/common/mask.hpp"

namespace fastreward {

// Fields of a node, i64 each; field f of node n lies at nodes[f * capacity + n]. fastreward/_runtime/layout.py has the
// same names.
enum NodeField : int {
  kNodeParent = 0,      // -1 for a root
  kNodeDepth,           // nodes above it, 0 for a root
  kNodeEdgeStart,       // tokens of a sequence before this node's own
  kNodeEdgeLength,      // its own tokens, 0 for a root
  kNodeCount,           // sequences that pass through or end here
  kNodeFirstRow,        // the first of them
  kNodeTout,            // end of its subtree's numbers; the subtree begins with the node itself
  kNodeTokenBegin,      // unique tokens of the forest before this node's own
  kNodeTokenTout,       // the same at the end of its subtree
  kNodeChildren,        // child nodes
  kNodeRowBegin,        // its sequences are order[row_begin .. row_begin + count)
  kNodeRoot,            // root of its group
  kNodeFields
};

// Fields of a sequence, i64 each; field f of row b lies at rows[f * rows + b].
enum RowField : int {
  kRowLeaf = 0,   // the node where it ends
  kRowOrder,      // not of row b: the row at place b of the pre-order of leaves, ties in row order
  kRowStart,      // flat index of its first token
  kRowLength,     // its tokens
  kRowFields
};

struct PrefixForest {
  std::int64_t* nodes = nullptr;  // [kNodeFields, capacity]
  std::int64_t capacity = 0;
  std::int64_t* rows_data = nullptr;  // [kRowFields, rows]
  std::int64_t rows = 0;
  std::int64_t size = 0;    // nodes
  std::int64_t groups = 0;
  std::int64_t tokens = 0;  // unique ones

  std::int64_t* field(NodeField f) const { return nodes + static_cast<std::int64_t>(f) * capacity; }
  std::int64_t* field(RowField f) const { return rows_data + static_cast<std::int64_t>(f) * rows; }
};

// What to build from: tokens, or (parent_row, branch_position) of each row. Row starts and lengths are in the forest.
struct PrefixTreeInput {
  const void* tokens = nullptr;  // flat, i64 or i32
  bool tokens_i64 = true;
  const std::int64_t* parent_row = nullptr;       // [rows], -1 = hangs off the root
  const std::int64_t* branch_position = nullptr;  // [rows], tokens shared with that row
  const std::int64_t* group = nullptr;            // [rows], 0 .. groups - 1, each of them there
  bool compress = true;                           // false: one node for each token of an edge
  int threads = 1;
};

// While a group is built; the parent is a working number of the same group.
struct WorkNode {
  std::int64_t first_token;
  std::int64_t start, end;  // positions of its edge in a sequence
  std::int32_t parent, first_child, last_child, previous, next;
  std::int32_t first_row, count, ends;
};

// The caller's scratch memory.
struct PrefixTreeScratch {
  std::int64_t* group_start = nullptr;  // [groups + 1] rows of each group in `members`
  std::int64_t* members = nullptr;      // [rows] rows sorted by group, in row order inside a group
  std::int64_t* sizes = nullptr;        // [groups + 1] nodes, then their prefix sums
  std::int64_t* token_sizes = nullptr;  // [groups + 1] the same of unique tokens
  std::int64_t* leaves = nullptr;       // [rows] working number of the node where a row ends
  WorkNode* nodes = nullptr;            // [2 * rows + groups]
  std::int32_t* slots = nullptr;        // [prefix_tree_slots(...)] hash tables of children, group by group
  std::int64_t* numbers = nullptr;      // [2 * rows + groups] working number -> final number
};

// Where the tokens of the rows lie in a tensor: row b has [extents[b], extents[b + 1]), its sequence a part of that.
struct TokenSpan {
  const std::int64_t* extents = nullptr;  // [rows + 1]
  MaskView mask;                          // flat; positions that get credit
};

// Values per node.
enum class TreeOp : int { mean = 0, sum = 1, max = 2, min = 3, logsumexp = 4, any = 5 };

struct AggregateOptions {
  TreeOp op = TreeOp::mean;
  bool over_children = false;  // a node's children count alike, instead of the sequences below it
  bool mean_form = false;      // logsumexp: minus the log of the total weight
  double scale = 1.0;          // logsumexp: log(sum(exp(scale * v))) / scale
  double discount = 1.0;       // factor per token between a sequence's end and the node's
};

enum class TreeMode : int { td = 0, sibling = 1, root = 2, td_root = 3, all_ancestors = 4, depth_weighted = 5 };

struct AdvantageOptions {
  TreeMode mode = TreeMode::td;
  bool scale_std = true;       // sibling: divide by the siblings' standard deviation + eps
  bool singleton_raw = false;  // sibling: an only child keeps its value, instead of 0
  int ddof = 1;
  double eps = 1e-6;
};

// Which tokens of a node's edge have its value.
enum class TreePlace : int { broadcast = 0, start = 1, end = 2 };

enum class TokenOp : int { sum = 0, mean = 1, first = 2 };

// For each q block the kv blocks that it may look at, in ascending order.
struct BlockLists {
  std::int32_t* counts = nullptr;        // [blocks] blocks that need the mask
  std::int32_t* indices = nullptr;       // [blocks, blocks]
  std::int32_t* full_counts = nullptr;   // [blocks] blocks that are allowed whole
  std::int32_t* full_indices = nullptr;  // [blocks, blocks]
};

// A group's hash table: a power of two, at least twice its nodes.
inline std::int64_t prefix_tree_slots(std::int64_t rows_of_group) {
  std::int64_t slots = 4;
  while (slots < 4 * rows_of_group) slots *= 2;
  return slots;
}

}  // namespace fastreward

FASTREWARD_DECLARE(
    // lengths[b] = last valid position of row b + 1 - starts[b]; starts nullptr: rows begin at their extents
    void prefix_tree_lengths(const MaskView& mask, const std::int64_t* extents, const std::int64_t* starts,
                             std::int64_t rows, std::int64_t* lengths, int threads);
    // starts[b] = first valid position of row b (its extent's begin where there is none)
    void prefix_tree_starts(const MaskView& mask, const std::int64_t* extents, std::int64_t rows, std::int64_t* starts,
                            int threads);
    // Builds into scratch and counts: forest.size and forest.tokens. False: parent_row has a cycle.
    bool prefix_tree_grow(const PrefixTreeInput& input, PrefixForest& forest, const PrefixTreeScratch& scratch);
    // Numbers what has grown and writes every field; capacity is at least size.
    void prefix_tree_number(const PrefixTreeInput& input, const PrefixForest& forest, const PrefixTreeScratch& scratch);

    // Here NaN is the value of a sequence or a node that is not there.
    // values [rows], weights [rows] or nullptr, child_weights [size] or nullptr -> out [size]; scratch [2 * size]
    template <class T>
    void prefix_tree_aggregate(const PrefixForest& forest, const AggregateOptions& options, const T* values,
                               const T* weights, const T* child_weights, double* scratch, T* out, int threads);
    // grad [size] -> grad_values [rows]; scratch [3 * size]
    template <class T>
    void prefix_tree_aggregate_backward(const PrefixForest& forest, const AggregateOptions& options, const T* values,
                                        const T* weights, const T* child_weights, const T* grad, double* scratch,
                                        T* grad_values, int threads);
    // What a node is worth against its parent, siblings, root or ancestors; 0 for a root. scratch [3 * size]
    template <class T>
    void prefix_tree_advantages(const PrefixForest& forest, const AdvantageOptions& options, const T* values,
                                double* scratch, T* out, int threads);
    // x[root] = initial, x[n] = clamp(scale[n] * x[parent] + shift[n], low, high); scratch [size]
    template <class T>
    void prefix_tree_propagate(const PrefixForest& forest, const T* scale, const T* shift, double initial, double low,
                               double high, double* scratch, T* out, int threads);
    // scratch [2 * size]
    template <class T>
    void prefix_tree_propagate_backward(const PrefixForest& forest, const T* scale, const T* shift, double initial,
                                        double low, double high, const T* grad, double* scratch, T* grad_scale,
                                        T* grad_shift, int threads);

    // values [size] (plus row_values [rows], or nullptr) -> tokens, 0 where there is no credit; and its transpose.
    // A node that is NaN adds nothing, a row that is NaN gets 0.
    template <class T>
    void prefix_tree_broadcast_to_tokens(const PrefixForest& forest, const TokenSpan& span, TreePlace place,
                                         const T* values, const T* row_values, T* tokens, int threads);
    template <class T>
    void prefix_tree_collect(const PrefixForest& forest, const TokenSpan& span, TreePlace place, const T* tokens,
                             T* values, int threads);
    // unique [forest.tokens] -> tokens, 0 where there is no credit; and its transpose (or mean, or first)
    template <class T>
    void prefix_tree_gather(const PrefixForest& forest, const TokenSpan& span, const T* unique, T* tokens,
                            int threads);
    template <class T>
    void prefix_tree_scatter_reduce(const PrefixForest& forest, const TokenSpan& span, TokenOp op, const T* tokens,
                                    T* unique, int threads);
    // Node of each token, -1 outside of the sequences; and each token's unique token, the same.
    void prefix_tree_node_of_token(const PrefixForest& forest, const TokenSpan& span, std::int32_t* out, int threads);
    void prefix_tree_unique_of_token(const PrefixForest& forest, const TokenSpan& span, std::int64_t* out, int threads);

    // Per unique token, in pre-order: id, position, parent (-1: none), end of its subtree, sequences, row, flat index.
    void prefix_tree_layout(const PrefixForest& forest, const void* tokens, bool tokens_i64, std::int64_t* token_ids,
                            std::int64_t* position_ids, std::int64_t* parent, std::int64_t* tout,
                            std::int64_t* multiplicity, std::int64_t* source, int threads);
    // bin[b] for each row, at most max_tokens unique tokens in a bin; returns the bins, or -1 - b where row b is longer.
    std::int64_t prefix_tree_bins(const PrefixForest& forest, std::int64_t max_tokens, bool by_rows, std::int64_t* bins);
    // tout [tokens] of one pre-order; blocks = ceil(tokens / block)
    void prefix_tree_blocks(const std::int64_t* tout, std::int64_t tokens, std::int64_t block, const BlockLists& lists);)

// Instantiates one of the templates; decltype spells its signature.
#define FASTREWARD_FOR_FLOATS(f) template decltype(f<float>) f<float>; template decltype(f<double>) f<double>;
