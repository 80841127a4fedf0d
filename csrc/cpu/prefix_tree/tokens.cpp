// Values between the nodes, the unique tokens and the tokens of prefix trees.
//
// A sequence is a concatenation of whole edges, so nothing here looks a token's node up: a row is walked from its leaf to
// the root, and each edge is one run of contiguous memory that is filled, copied or summed. Sums over the rows of a node
// run in pre-order of their ends, in float64, a block of tokens at a time, so that a token's bits depend on its group
// alone. Large outputs are written past the caches, which saves reading what is overwritten.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "cpu/simd/simd.hpp"
#include "cpu/prefix_tree/prefix_tree.hpp"
#include "cpu/threads.hpp"

namespace fastreward::FASTREWARD_ISA {
namespace {

using namespace simd;

constexpr std::int64_t kTokens = 1 << 15;  // a thread's share, at least
constexpr std::int64_t kStreamBytes = std::int64_t{8} << 20;  // larger outputs are written past the caches
constexpr int kBlock = 1024;  // tokens whose sums and mask bytes lie in cache together

// f(i) for i in [0, n), which share the tokens of all rows.
template <class F>
void for_shares(std::int64_t n, const PrefixForest& forest, const TokenSpan& span, int threads, F&& f) {
  const std::int64_t least = kTokens * n / (span.extents[forest.rows] + 1);
  parallel_ranges(threads, n, grain_of(n, least), [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t i = begin; i < end; ++i) f(i);
    fence();  // of what has been streamed
  });
}

// f(node, flat index of the first token of its run, end of the run) for the nodes of a row, from its leaf up.
template <class F>
void for_runs(const PrefixForest& forest, std::int64_t row, F&& f) {
  const std::int64_t* const parent = forest.field(kNodeParent);
  const std::int64_t* const edge_start = forest.field(kNodeEdgeStart);
  const std::int64_t* const edge_length = forest.field(kNodeEdgeLength);
  const std::int64_t start = forest.field(kRowStart)[row];
  for (std::int64_t n = forest.field(kRowLeaf)[row]; parent[n] >= 0; n = parent[n])
    f(n, start + edge_start[n], start + edge_start[n] + edge_length[n]);
}

// f(begin, end, bytes) for the blocks of a run; `bytes` nullptr: all positions count.
template <class F>
void for_blocks(const MaskView& mask, std::int64_t begin, std::int64_t end, F&& f) {
  std::uint8_t block[kBlock];
  for (std::int64_t i = begin; i < end; i += kBlock) {
    const int n = static_cast<int>(std::min<std::int64_t>(kBlock, end - i));
    f(i, i + n, mask_block(mask, i, n, block));
  }
}

// What a run of tokens gets: one value, another one at its start or end, or a run of unique tokens.
template <class T>
struct Everywhere {
  T value;
  T operator()(std::int64_t) const { return value; }
};
template <class T>
struct At {
  T value;
  T elsewhere;
  std::int64_t place;
  T operator()(std::int64_t k) const { return k == place ? value : elsewhere; }
};
template <class T>
struct Copy {
  const T* from;
  T operator()(std::int64_t k) const { return from[k]; }
};
struct Count {
  std::int64_t begin;
  std::int64_t operator()(std::int64_t k) const { return begin + k; }
};
inline Everywhere<float> advanced(const Everywhere<float>& get, std::int64_t) { return get; }
inline At<float> advanced(const At<float>& get, std::int64_t k) { return {get.value, get.elsewhere, get.place - k}; }
inline Copy<float> advanced(const Copy<float>& get, std::int64_t k) { return {get.from + k}; }
inline F32 vector_of(const Everywhere<float>& get, std::int64_t) { return f32(get.value); }
inline F32 vector_of(const At<float>& get, std::int64_t k) {
  const F32 elsewhere = f32(get.elsewhere);
  if (get.place < k || get.place >= k + kF32) return elsewhere;
  float lanes[kF32];
  store(lanes, elsewhere);
  lanes[get.place - k] = get.value;
  return load(lanes);
}
inline F32 vector_of(const Copy<float>& get, std::int64_t k) { return load(get.from + k); }
template <class Get>
constexpr bool kHasVector =
    std::is_same_v<Get, Everywhere<float>> || std::is_same_v<Get, At<float>> || std::is_same_v<Get, Copy<float>>;

// out[k] = get(k) for k in [begin, end), 0 where a byte (of position k) is 0.
template <class Out, class Get>
void write_scalars(const Get& get, const std::uint8_t* bytes, std::int64_t begin, std::int64_t end, Out* out) {
  for (std::int64_t k = begin; k < end; ++k) out[k] = bytes == nullptr || bytes[k] != 0 ? get(k) : Out(0);
}

// The same in vectors of floats, whole cache lines at a time; kPast: past the caches.
template <bool kPast, class Get>
void write_lines(const Get& get, const std::uint8_t* bytes, std::int64_t end, float* out) {
  constexpr std::int64_t kLine = 64 / static_cast<std::int64_t>(sizeof(float));
  const auto misplaced = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(out) / sizeof(float)) % kLine;
  std::int64_t k = std::min(end, (kLine - misplaced) % kLine);
  write_scalars(get, bytes, 0, k, out);
  for (; k + kLine <= end; k += kLine)
    for (std::int64_t i = k; i < k + kLine; i += kF32) {
      const F32 x = vector_of(get, i);
      const F32 y = bytes == nullptr ? x : select(nonzero(bytes + i), x, f32(0.0f));
      if constexpr (kPast) stream(out + i, y);
      else store(out + i, y);
    }
  write_scalars(get, bytes, k, end, out);
}

// make(node, row) gives what a run gets; `none` for what lies outside of a row's sequence.
template <class Out, class Make>
void write_tokens(const PrefixForest& forest, const TokenSpan& span, Out none, Out* out, int threads, Make&& make) {
  const bool past = span.extents[forest.rows] * static_cast<std::int64_t>(sizeof(Out)) >= kStreamBytes;
  for_shares(forest.rows, forest, span, threads, [&](std::int64_t row) {
    const std::int64_t start = forest.field(kRowStart)[row], end = start + forest.field(kRowLength)[row];
    std::fill(out + span.extents[row], out + start, none);
    std::fill(out + end, out + span.extents[row + 1], none);
    for_runs(forest, row, [&](std::int64_t node, std::int64_t from, std::int64_t to) {
      const auto get = make(node, row);
      for_blocks(span.mask, from, to, [&](std::int64_t i, std::int64_t stop, const std::uint8_t* bytes) {
        if constexpr (kHasVector<std::decay_t<decltype(get)>>) {
          const auto here = advanced(get, i - from);
          if (past) write_lines<true>(here, bytes, stop - i, out + i);
          else write_lines<false>(here, bytes, stop - i, out + i);
        } else {
          write_scalars([&](std::int64_t k) { return get(i - from + k); }, bytes, 0, stop - i, out + i);
        }
      });
    });
  });
}

// Sums, or means over the sequences that count a token, of n tokens of a node's edge.
template <class T>
void reduce_block(const PrefixForest& forest, const TokenSpan& span, TokenOp op, const T* tokens, std::int64_t node,
                  std::int64_t offset, int n, T* unique) {
  const std::int64_t* const order = forest.field(kRowOrder) + forest.field(kNodeRowBegin)[node];
  const std::int64_t* const starts = forest.field(kRowStart);
  const std::int64_t position = forest.field(kNodeEdgeStart)[node] + offset;
  double sums[kBlock] = {};
  std::int32_t counted[kBlock] = {};
  std::uint8_t buffer[kBlock];
  for (std::int64_t i = 0; i < forest.field(kNodeCount)[node]; ++i) {
    const std::int64_t at = starts[order[i]] + position;
    const std::uint8_t* const bytes = mask_block(span.mask, at, n, buffer);
    for (int k = 0; k < n; ++k) {
      if (bytes != nullptr && bytes[k] == 0) continue;
      sums[k] += static_cast<double>(tokens[at + k]);
      ++counted[k];
    }
  }
  for (int k = 0; k < n; ++k)
    unique[k] = static_cast<T>(op == TokenOp::mean && counted[k] > 1 ? sums[k] / counted[k] : sums[k]);
}

// The value of the first row that counts a token. `order` is no order of rows: one that ends here comes before others.
template <class T>
void reduce_first(const PrefixForest& forest, const TokenSpan& span, const T* tokens, std::int64_t node,
                  std::int64_t offset, int n, T* unique) {
  const std::int64_t* const order = forest.field(kRowOrder) + forest.field(kNodeRowBegin)[node];
  const std::int64_t position = forest.field(kNodeEdgeStart)[node] + offset;
  std::int64_t first[kBlock];
  std::uint8_t buffer[kBlock];
  std::fill_n(first, n, forest.rows);
  std::fill_n(unique, n, T(0));
  for (std::int64_t i = 0; i < forest.field(kNodeCount)[node]; ++i) {
    const std::int64_t row = order[i], at = forest.field(kRowStart)[row] + position;
    const std::uint8_t* const bytes = mask_block(span.mask, at, n, buffer);
    for (int k = 0; k < n; ++k)
      if ((bytes == nullptr || bytes[k] != 0) && row < first[k]) first[k] = row, unique[k] = tokens[at + k];
  }
}

// Where the first of its sequences alone decides.
template <class T>
void reduce_copy(const TokenSpan& span, const T* tokens, std::int64_t begin, int n, T* unique) {
  std::uint8_t buffer[kBlock];
  const std::uint8_t* const bytes = mask_block(span.mask, begin, n, buffer);
  if (bytes == nullptr)
    std::copy_n(tokens + begin, n, unique);
  else
    for (int k = 0; k < n; ++k) unique[k] = bytes[k] != 0 ? tokens[begin + k] : T(0);
}

}  // namespace

// --------------------------------------------------------------------------------------------------------- launchers
void prefix_tree_node_of_token(const PrefixForest& forest, const TokenSpan& span, std::int32_t* out, int threads) {
  // Numbers as the bits of floats, which are only moved: the vectors are those.
  const auto bits = [](std::int32_t number) {
    float x;
    std::memcpy(&x, &number, sizeof x);
    return x;
  };
  write_tokens(forest, {span.extents, {}}, bits(-1), reinterpret_cast<float*>(out), threads,
               [&](std::int64_t node, std::int64_t) { return Everywhere<float>{bits(static_cast<std::int32_t>(node))}; });
}

void prefix_tree_unique_of_token(const PrefixForest& forest, const TokenSpan& span, std::int64_t* out, int threads) {
  write_tokens(forest, {span.extents, {}}, std::int64_t{-1}, out, threads,
               [&](std::int64_t node, std::int64_t) { return Count{forest.field(kNodeTokenBegin)[node]}; });
}

// A node's value and the row's own on every token, or the node's on one of them alone. NaN is what is not there: a node
// adds nothing, a row gets nothing.
template <class T>
void prefix_tree_broadcast_to_tokens(const PrefixForest& forest, const TokenSpan& span, TreePlace place,
                                     const T* values, const T* row_values, T* tokens, int threads) {
  const auto own = [&](std::int64_t row) {
    return row_values == nullptr || std::isnan(row_values[row]) ? T(0) : row_values[row];
  };
  const auto value = [&](std::int64_t node, std::int64_t row) {
    return std::isnan(values[node]) || (row_values != nullptr && std::isnan(row_values[row])) ? T(0) : values[node];
  };
  if (place == TreePlace::broadcast)
    return write_tokens(forest, span, T(0), tokens, threads, [&](std::int64_t node, std::int64_t row) {
      return Everywhere<T>{value(node, row) + own(row)};
    });
  write_tokens(forest, span, T(0), tokens, threads, [&](std::int64_t node, std::int64_t row) {
    const std::int64_t last = forest.field(kNodeEdgeLength)[node] - 1;
    return At<T>{value(node, row) + own(row), own(row), place == TreePlace::start ? 0 : last};
  });
}

// Sum over the credited tokens of every row that passes through a node.
template <class T>
void prefix_tree_collect(const PrefixForest& forest, const TokenSpan& span, TreePlace place, const T* tokens, T* values,
                         int threads) {
  const std::int64_t* const order = forest.field(kRowOrder);
  const std::int64_t* const starts = forest.field(kRowStart);
  for_shares(forest.size, forest, span, threads, [&](std::int64_t n) {
    double total = 0.0;
    const std::int64_t first = forest.field(kNodeRowBegin)[n], last = first + forest.field(kNodeCount)[n];
    const std::int64_t length = forest.field(kNodeEdgeLength)[n];
    if (length > 0)
      for (std::int64_t i = first; i < last; ++i) {
        const std::int64_t run = starts[order[i]] + forest.field(kNodeEdgeStart)[n];
        const std::int64_t begin = place == TreePlace::end ? run + length - 1 : run;
        for_blocks(span.mask, begin, place == TreePlace::start ? run + 1 : run + length,
                   [&](std::int64_t from, std::int64_t to, const std::uint8_t* bytes) {
                     double lanes[8] = {};
                     for (std::int64_t k = 0; k < to - from; ++k)
                       if (bytes == nullptr || bytes[k] != 0) lanes[k % 8] += static_cast<double>(tokens[from + k]);
                     for (const double lane : lanes) total += lane;
                   });
      }
    values[n] = static_cast<T>(total);
  });
}

template <class T>
void prefix_tree_gather(const PrefixForest& forest, const TokenSpan& span, const T* unique, T* tokens, int threads) {
  write_tokens(forest, span, T(0), tokens, threads,
               [&](std::int64_t node, std::int64_t) { return Copy<T>{unique + forest.field(kNodeTokenBegin)[node]}; });
}

template <class T>
void prefix_tree_scatter_reduce(const PrefixForest& forest, const TokenSpan& span, TokenOp op, const T* tokens,
                                T* unique, int threads) {
  for_shares(forest.size, forest, span, threads, [&](std::int64_t node) {
    const std::int64_t length = forest.field(kNodeEdgeLength)[node];
    T* const out = unique + forest.field(kNodeTokenBegin)[node];
    const std::int64_t begin = forest.field(kRowStart)[forest.field(kNodeFirstRow)[node]] + forest.field(kNodeEdgeStart)[node];
    const bool one = forest.field(kNodeCount)[node] == 1 || (op == TokenOp::first && span.mask.kind == MaskKind::none);
    for (std::int64_t offset = 0; offset < length; offset += kBlock) {
      const int n = static_cast<int>(std::min<std::int64_t>(kBlock, length - offset));
      if (one)
        reduce_copy(span, tokens, begin + offset, n, out + offset);
      else if (op == TokenOp::first)
        reduce_first(forest, span, tokens, node, offset, n, out + offset);
      else
        reduce_block(forest, span, op, tokens, node, offset, n, out + offset);
    }
  });
}

FASTREWARD_FOR_FLOATS(prefix_tree_broadcast_to_tokens)
FASTREWARD_FOR_FLOATS(prefix_tree_collect)
FASTREWARD_FOR_FLOATS(prefix_tree_gather)
FASTREWARD_FOR_FLOATS(prefix_tree_scatter_reduce)

}  // namespace fastreward::FASTREWARD_ISA
