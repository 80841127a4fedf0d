// Between nodes, unique tokens and the tokens of the batch. Nothing is looked up per token: a sequence is a
// concatenation of whole edges, runs of memory, and a block's tokens mostly lie in one sequence and on few edges.
#pragma once

#include "cuda/prefix_tree_forest.cuh"

namespace fastreward {

enum TreePlace { EVERYWHERE, AT_START, AT_END };  // the tokens of an edge that have its node's value
enum TokenSource { FROM_UNIQUE = 3, NODE_NUMBER, UNIQUE_NUMBER };  // or a TreePlace
enum TokenOp { TOKEN_SUM, TOKEN_MEAN, TOKEN_FIRST };

struct ToTokensArguments {
  Forest forest;
  const i64* extents;  // [sequences + 1]
  const void* mask;    // [count]
  i64 mask_kind, count;
  i64 source;
  Floats values;      // [places] or, FROM_UNIQUE, [unique]
  i64 unique;
  Floats row_values;  // [sequences] or null
  void* out;          // [count]: as values; i32, i64 for numbers
};

struct FromTokensArguments {
  Forest forest;
  Floats tokens;     // [count]
  const void* mask;  // [count]
  i64 mask_kind, count;
  i64 op;
  i64 target;     // to_ends: AT_START or AT_END
  FloatsOut out;  // [size]: unique tokens, or nodes
  i64 size;
};

// -------------------------------------------------------------------------------------------------------- to tokens
// The sequence in whose row a position of flat memory lies.
__device__ __forceinline__ i64 sequence_at(const ToTokensArguments& a, i64 at) {
  const i64 last = a.forest.sequences - 1, guess = min(at * a.forest.sequences / a.count, last);
  if (a.extents[guess] <= at && at < a.extents[guess + 1]) return guess;  // all rows are as long as each other
  return last_up_to(a.extents, at, 0, last);
}

// What a token gets from its node n, its place on that node's edge, its sequence.
__device__ __forceinline__ double token_value(const ToTokensArguments& a, i64 n, i64 place, i64 row) {
  const Forest& f = a.forest;
  if (a.source == FROM_UNIQUE) {
    const i64 index = f.node(TOKEN_BEGIN, n) + place;
    return index < a.unique ? a.values[index] : 0.;
  }
  const bool has = a.source == EVERYWHERE || place == (a.source == AT_START ? 0 : f.node(EDGE_LENGTH, n) - 1);
  double value = has ? a.values[n] : 0.;
  if (isnan(value)) value = 0.;
  if (!a.row_values.data) return value;
  const double own = a.row_values[row];
  return isnan(own) ? 0. : value + own;
}

__device__ __forceinline__ void put_token(const ToTokensArguments& a, i64 at, bool inside, i64 n, i64 position, i64 row) {
  const i64 place = inside ? position - a.forest.node(EDGE_START, n) : 0;
  if (a.source == NODE_NUMBER)
    static_cast<int*>(a.out)[at] = inside ? int(n) : -1;
  else if (a.source == UNIQUE_NUMBER)
    static_cast<i64*>(a.out)[at] = inside ? a.forest.node(TOKEN_BEGIN, n) + place : -1;
  else
    FloatsOut{a.out, a.values.wide}.put(at, inside ? token_value(a, n, place, row) : 0.);
}

// -------------------------------------------------------------------------------------------------------- from tokens
// Where the sequence at a place of `order` begins in flat memory.
__device__ __forceinline__ i64 start_at(const FromTokensArguments& a, i64 place) {
  return a.forest.row(START, a.forest.row(ORDER, place));
}

__device__ __forceinline__ bool credited(const FromTokensArguments& a, i64 at) {
  return at < a.count && counts(a.mask, int(a.mask_kind), at);
}

// What the sequences through node n have at a position: their sum or mean, in the order of the tree.
__device__ __forceinline__ double added_up(const FromTokensArguments& a, i64 n, i64 position) {
  const i64 begin = a.forest.node(ROW_BEGIN, n), many = a.forest.node(COUNT, n);
  double total = 0., counted = 0.;
#pragma unroll 4
  for (i64 k = 0; k < many; ++k) {
    const i64 at = start_at(a, begin + k) + position;
    if (credited(a, at)) total += a.tokens[at], counted += 1.;
  }
  return a.op == TOKEN_MEAN ? total / fmax(counted, 1.) : total;
}

// The same of the first of them in the batch.
__device__ __forceinline__ double first_of(const FromTokensArguments& a, i64 n, i64 position) {
  const i64 begin = a.forest.node(ROW_BEGIN, n), many = a.forest.node(COUNT, n);
  i64 earliest = a.forest.sequences;
  double value = 0.;
  for (i64 k = 0; k < many; ++k) {
    const i64 row = a.forest.row(ORDER, begin + k), at = a.forest.row(START, row) + position;
    if (row < earliest && credited(a, at)) earliest = row, value = a.tokens[at];
  }
  return value;
}

// What becomes of a place on a node's edge; 0 where there is none.
__device__ __forceinline__ double reduced(const FromTokensArguments& a, i64 n, i64 place) {
  if (place >= a.forest.node(EDGE_LENGTH, n)) return 0.;
  const i64 position = a.forest.node(EDGE_START, n) + place;
  return a.op == TOKEN_FIRST ? first_of(a, n, position) : added_up(a, n, position);
}

// WIDTH threads, a warp or the block, add up all that the sequences through node n have on its edge: along the edge,
// or, where that is short, each its own sequences.
template <int WIDTH>
__device__ __forceinline__ void collect_edge(const FromTokensArguments& a, i64 n, double* shared) {
  const int lane = int(threadIdx.x) % WIDTH;
  const i64 begin = a.forest.node(ROW_BEGIN, n), many = a.forest.node(COUNT, n);
  const i64 from = a.forest.node(EDGE_START, n), length = a.forest.node(EDGE_LENGTH, n);
  const bool along = length >= WIDTH;
  double total = 0.;
  for (i64 k = along ? 0 : lane; k < many; k += along ? 1 : WIDTH) {
    const i64 at = start_at(a, begin + k) + from;
#pragma unroll 4
    for (i64 j = along ? lane : 0; j < length; j += along ? WIDTH : 1)
      if (credited(a, at + j)) total += a.tokens[at + j];
  }
  total = team_sum<WIDTH>(total, shared);
  if (lane == 0) a.out.put(n, total);
}

}  // namespace fastreward
