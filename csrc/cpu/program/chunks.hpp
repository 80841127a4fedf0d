// How token arrays are cut: rows into items, the threads' unit of work, and items into tiles; and which tokens count, as
// bits. For csrc/cpu/program/.
#pragma once

#include "cpu/program/internal.hpp"
#include "cpu/program/operators.hpp"
#include "cpu/threads.hpp"

namespace fastreward::FASTREWARD_ISA::program {

inline std::int64_t begin_of(const ProgramTokens& t, std::int64_t row) {
  return t.cu_seqlens == nullptr ? row * t.columns : t.cu_seqlens[row];
}
inline std::int64_t length_of(const ProgramTokens& t, std::int64_t row) {
  return t.cu_seqlens == nullptr ? t.columns : t.cu_seqlens[row + 1] - t.cu_seqlens[row];
}
inline std::int64_t size_of(const ProgramTokens& t) { return t.rows == 0 ? 0 : begin_of(t, t.rows); }
// Outputs from 4 MiB on are written past the caches, which saves reading their old lines first.
inline bool past_caches(const ProgramTokens& t) { return size_of(t) * 4 >= std::int64_t{4} << 20; }
inline std::int64_t tiles_of(std::int64_t tokens) { return (tokens + kTile - 1) / kTile; }

// One item. words: of its tokens, nullptr: all of them count.
struct Item {
  std::int64_t number, row, begin;  // begin: of its first token in the token arrays
  int tokens, tiles;
  int end;                    // one past the last tile with a counted token
  std::uint64_t some, every;  // a bit for each tile: some, all of its (kTile) tokens count
  const simd::Word* words;

  bool full() const { return every == ~std::uint64_t{0} >> (64 - tiles); }
  int tokens_of(int tile) const { return tokens - tile * kTile < kTile ? tokens - tile * kTile : kTile; }
  std::int64_t place_of(int tile) const { return (begin + tile * kTile) * 4; }  // in the arrays, in bytes
};

// The items of a side, numbered row by row.
class Items {
 public:
  // Reads the mask, once for all passes.
  Items(const ProgramTokens& tokens, int threads);

  const ProgramTokens& tokens() const { return t_; }
  std::int64_t count() const { return first(t_.rows); }
  std::int64_t first(std::int64_t row) const { return packed() ? first_[row] : row * per_row_; }
  std::int64_t row_of(std::int64_t item) const;
  Item item(std::int64_t number, std::int64_t row) const;
  // Counted tokens of a row.
  std::int64_t counted(std::int64_t row) const;

 private:
  struct Counted {
    std::uint64_t some, every;
    std::int64_t tokens;
  };

  bool packed() const { return t_.cu_seqlens != nullptr; }
  bool masked() const { return t_.mask.kind != MaskKind::none; }
  simd::Word* words(std::int64_t item, std::int64_t row) const {
    const std::int64_t before = packed() ? first_tile_[row] : row * tiles_of(t_.columns);
    return words_.data() + (before + (item - first(row)) * kItemTiles) * kTileVectors;
  }
  void number_rows();
  void read_mask(std::int64_t item, std::int64_t row, std::uint8_t* bytes);

  const ProgramTokens& t_;
  std::int64_t per_row_;
  Buffer<std::int64_t> first_, first_tile_;  // [rows + 1] where packed
  Buffer<Counted> counted_;                  // [items] where masked
  Buffer<simd::Word> words_;                 // [tiles, kTileVectors] where masked
};

// run(first, last) of the worker that make() gives, for ranges of consecutive items, spread over the threads.
template <class Make>
void for_chunks(const Items& items, int threads, const Make& make) {
  constexpr std::int64_t kTokens = 4 * kItem;  // a thread's share, at least
  const std::int64_t least = kTokens * items.count() / (size_of(items.tokens()) + 1);  // items of short rows are short
  const PerSlot workers(threads, make);
  parallel_ranges(threads, items.count(), grain_of(items.count(), least),
                  [&](std::int64_t first, std::int64_t last, int slot) {
                    workers[slot].run(first, last);
                    simd::fence();  // of what has been streamed
                  });
}

}  // namespace fastreward::FASTREWARD_ISA::program
