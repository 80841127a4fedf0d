// Packing of prefix trees for training: what each unique token is, which bin a sequence goes to, and which blocks of the
// attention matrix have to be computed. Unique tokens are in pre-order, so a token may look at those tokens k for which
// k <= q < tout[k]; no N x N mask is ever made.
#include <algorithm>
#include <vector>

#include "cpu/prefix_tree/prefix_tree.hpp"
#include "cpu/threads.hpp"

namespace fastreward::FASTREWARD_ISA {
namespace {

constexpr std::int64_t kTokens = 1 << 14;  // a thread's share, at least

template <class T>
void token_ids_of(const PrefixForest& forest, const T* tokens, std::int64_t node, std::int64_t source,
                  std::int64_t* token_ids) {
  const std::int64_t begin = forest.field(kNodeTokenBegin)[node], length = forest.field(kNodeEdgeLength)[node];
  for (std::int64_t i = 0; i < length; ++i) token_ids[begin + i] = static_cast<std::int64_t>(tokens[source + i]);
}

// -------------------------------------------------------------------------------------------------------------- bins
// The first bin with room, else a new one.
class Bins {
 public:
  explicit Bins(std::int64_t capacity) : capacity_(capacity) {}
  std::int64_t place(std::int64_t tokens) {
    std::size_t bin = full_;
    while (bin < used_.size() && used_[bin] + tokens > capacity_) ++bin;
    if (bin == used_.size()) used_.push_back(0);
    used_[bin] += tokens;
    while (full_ < used_.size() && used_[full_] == capacity_) ++full_;
    return static_cast<std::int64_t>(bin);
  }
  std::int64_t count() const { return static_cast<std::int64_t>(used_.size()); }

 private:
  std::int64_t capacity_;
  std::vector<std::int64_t> used_;
  std::size_t full_ = 0;  // all bins before this one are full to the last token
};

// Tokens that a row shares with the one before it in pre-order of leaves: those above their lowest common ancestor.
std::int64_t shared_with(const PrefixForest& forest, std::int64_t before, std::int64_t row) {
  const std::int64_t* const leaf = forest.field(kRowLeaf);
  const std::int64_t* const tout = forest.field(kNodeTout);
  std::int64_t n = leaf[before];
  while (!(n <= leaf[row] && leaf[row] < tout[n])) n = forest.field(kNodeParent)[n];
  return forest.field(kNodeEdgeStart)[n] + forest.field(kNodeEdgeLength)[n];
}

// Whole groups; a group that is too long is cut into pieces of neighbouring sequences, each with its own prefix.
std::int64_t bins_of_groups(const PrefixForest& forest, std::int64_t max_tokens, std::int64_t* bins) {
  const std::int64_t* const order = forest.field(kRowOrder);
  const std::int64_t* const length = forest.field(kRowLength);
  Bins places(max_tokens);
  for (std::int64_t root = 0; root < forest.size; root = forest.field(kNodeTout)[root]) {
    const std::int64_t first = forest.field(kNodeRowBegin)[root], end = first + forest.field(kNodeCount)[root];
    std::int64_t begin = first, tokens = 0;
    const auto close = [&](std::int64_t last) {
      const std::int64_t bin = places.place(tokens);
      for (std::int64_t i = begin; i < last; ++i) bins[order[i]] = bin;
      begin = last, tokens = 0;
    };
    for (std::int64_t i = first; i < end; ++i) {
      const std::int64_t row = order[i];
      if (length[row] > max_tokens) return -1 - row;
      const std::int64_t shared = i == begin ? 0 : shared_with(forest, order[i - 1], row);
      if (tokens + length[row] - shared > max_tokens) {
        close(i);
        tokens = length[row];
      } else {
        tokens += length[row] - shared;
      }
    }
    close(end);
  }
  return places.count();
}

// Row by row, each into the first bin that has room for what is new of it (areal's greedy order).
class RowBins {
 public:
  RowBins(const PrefixForest& forest, std::int64_t max_tokens)
      : forest_(forest), max_tokens_(max_tokens), head_(static_cast<std::size_t>(forest.size), -1) {}

  std::int64_t place(std::int64_t row) {
    std::fill(shared_.begin(), shared_.end(), 0);
    const std::int64_t leaf = forest_.field(kRowLeaf)[row], length = forest_.field(kRowLength)[row];
    for (std::int64_t n = leaf; n >= 0; n = forest_.field(kNodeParent)[n]) {
      const std::int64_t end = forest_.field(kNodeEdgeStart)[n] + forest_.field(kNodeEdgeLength)[n];
      for (std::int64_t e = head_[static_cast<std::size_t>(n)]; e >= 0; e = entries_[static_cast<std::size_t>(e)].next) {
        auto& shared = shared_[static_cast<std::size_t>(entries_[static_cast<std::size_t>(e)].bin)];
        shared = std::max(shared, end);
      }
    }
    std::size_t bin = 0;
    while (bin < used_.size() && used_[bin] + length - shared_[bin] > max_tokens_) ++bin;
    if (bin == used_.size()) used_.push_back(0), shared_.push_back(0);
    used_[bin] += length - shared_[bin];
    // The row's nodes below what is shared are new in this bin.
    for (std::int64_t n = leaf; n >= 0 && forest_.field(kNodeEdgeStart)[n] + forest_.field(kNodeEdgeLength)[n] > shared_[bin];
         n = forest_.field(kNodeParent)[n]) {
      entries_.push_back({static_cast<std::int64_t>(bin), head_[static_cast<std::size_t>(n)]});
      head_[static_cast<std::size_t>(n)] = static_cast<std::int64_t>(entries_.size()) - 1;
    }
    return static_cast<std::int64_t>(bin);
  }
  std::int64_t count() const { return static_cast<std::int64_t>(used_.size()); }

 private:
  struct Entry {
    std::int64_t bin, next;
  };
  const PrefixForest& forest_;
  std::int64_t max_tokens_;
  std::vector<std::int64_t> head_;     // per node: its newest entry, one for each bin that holds it
  std::vector<Entry> entries_;
  std::vector<std::int64_t> used_;
  std::vector<std::int64_t> shared_;   // per bin, of the row in hand
};

std::int64_t bins_of_rows(const PrefixForest& forest, std::int64_t max_tokens, std::int64_t* bins) {
  RowBins places(forest, max_tokens);
  for (std::int64_t row = 0; row < forest.rows; ++row) {
    if (forest.field(kRowLength)[row] > max_tokens) return -1 - row;
    bins[row] = places.place(row);
  }
  return places.count();
}

}  // namespace

// --------------------------------------------------------------------------------------------------------- launchers
void prefix_tree_layout(const PrefixForest& forest, const void* tokens, bool tokens_i64, std::int64_t* token_ids,
                        std::int64_t* position_ids, std::int64_t* parent, std::int64_t* tout,
                        std::int64_t* multiplicity, std::int64_t* source, int threads) {
  const auto lay_out = [&](std::int64_t n) {
    const std::int64_t above = forest.field(kNodeParent)[n];
    const std::int64_t length = forest.field(kNodeEdgeLength)[n];
    if (length == 0) return;
    const std::int64_t begin = forest.field(kNodeTokenBegin)[n], position = forest.field(kNodeEdgeStart)[n];
    const std::int64_t from = forest.field(kRowStart)[forest.field(kNodeFirstRow)[n]] + position;
    if (tokens_i64)
      token_ids_of(forest, static_cast<const std::int64_t*>(tokens), n, from, token_ids);
    else
      token_ids_of(forest, static_cast<const std::int32_t*>(tokens), n, from, token_ids);
    const bool first = forest.field(kNodeEdgeLength)[above] == 0;  // below the root
    for (std::int64_t i = 0; i < length; ++i) {
      position_ids[begin + i] = position + i;
      parent[begin + i] = begin + i - 1;
      source[begin + i] = from + i;
    }
    parent[begin] = first ? -1 : forest.field(kNodeTokenBegin)[above] + forest.field(kNodeEdgeLength)[above] - 1;
    std::fill_n(tout + begin, length, forest.field(kNodeTokenTout)[n]);
    std::fill_n(multiplicity + begin, length, forest.field(kNodeCount)[n]);
  };
  const std::int64_t least = kTokens * forest.size / (forest.tokens + 1);
  parallel_ranges(threads, forest.size, grain_of(forest.size, least), [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t n = begin; n < end; ++n) lay_out(n);
  });
}

std::int64_t prefix_tree_bins(const PrefixForest& forest, std::int64_t max_tokens, bool by_rows, std::int64_t* bins) {
  return by_rows ? bins_of_rows(forest, max_tokens, bins) : bins_of_groups(forest, max_tokens, bins);
}

void prefix_tree_blocks(const std::int64_t* tout, std::int64_t tokens, std::int64_t block, const BlockLists& lists) {
  const std::int64_t blocks = (tokens + block - 1) / block;
  std::fill_n(lists.counts, blocks, 0);
  std::fill_n(lists.full_counts, blocks, 0);
  for (std::int64_t kv = 0; kv < blocks; ++kv) {
    const std::int64_t begin = kv * block, end = std::min(begin + block, tokens);
    const auto [shortest, longest] = std::minmax_element(tout + begin, tout + end);
    // Token k is seen from its own block to that of tout[k] - 1 without a gap, so all blocks up to the longest's see one.
    for (std::int64_t q = kv; q <= (*longest - 1) / block; ++q) {
      const bool full = q > kv && (q + 1) * block <= *shortest;
      std::int32_t& count = full ? lists.full_counts[q] : lists.counts[q];
      (full ? lists.full_indices : lists.indices)[q * blocks + count++] = static_cast<std::int32_t>(kv);
    }
  }
}

}  // namespace fastreward::FASTREWARD_ISA
