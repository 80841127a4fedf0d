// How token arrays are cut: rows into items, the threads' unit of work, and items into tiles. For csrc/cpu/program*.cpp.
#pragma once

#include "cpu/program_internal.hpp"
#include "cpu/program_operators.hpp"

namespace fastreward::FASTREWARD_ISA::program {

inline std::int64_t begin_of(const ProgramTokens& t, std::int64_t row) {
  return t.cu_seqlens == nullptr ? row * t.columns : t.cu_seqlens[row];
}
inline std::int64_t length_of(const ProgramTokens& t, std::int64_t row) {
  return t.cu_seqlens == nullptr ? t.columns : t.cu_seqlens[row + 1] - t.cu_seqlens[row];
}
inline std::int64_t size_of(const ProgramTokens& t) { return t.rows == 0 ? 0 : begin_of(t, t.rows); }

// The items, numbered row by row.
class Items {
 public:
  explicit Items(const ProgramTokens& t)
      : per_row_((t.columns + kProgramItem - 1) / kProgramItem),
        rows_(t.rows),
        packed_(t.cu_seqlens != nullptr),
        first_(packed_ ? t.rows + 1 : 0) {
    if (packed_) {
      first_[0] = 0;
      for (std::int64_t row = 0; row < t.rows; ++row)
        first_[row + 1] = first_[row] + (length_of(t, row) + kProgramItem - 1) / kProgramItem;
    }
  }
  std::int64_t count() const { return first(rows_); }
  std::int64_t first(std::int64_t row) const { return packed_ ? first_[row] : row * per_row_; }
  std::int64_t row_of(std::int64_t item) const {
    if (!packed_) return item / per_row_;
    std::int64_t low = 0, high = rows_;  // first(low) <= item < first(high)
    while (high - low > 1) {
      const std::int64_t middle = low + (high - low) / 2;
      (first_[middle] <= item ? low : high) = middle;
    }
    return low;
  }

 private:
  std::int64_t per_row_, rows_;
  bool packed_;
  Buffer<std::int64_t> first_;
};

// One item and which of its tokens count.
struct Item {
  std::int64_t number, row, begin;  // begin: of its first token in the token arrays
  int tokens, tiles, counted;
  int end;  // one past the last tile with a counted token
  std::uint64_t some, every;  // a bit for each tile: some, all of its (kTile) tokens count
  alignas(64) simd::Word words[kItemVectors];
};

// The mask of the item after the next, of which nobody else knows that it will be read.
inline void fetch_mask(const ProgramTokens& t, const Item& next) {
  if (t.mask.kind != MaskKind::bytes) return;  // the others are so long that hardware sees to it
  const char* p = static_cast<const char*>(t.mask.data) + next.begin + next.tokens;
  for (std::int64_t i = 0; i < kProgramItem; i += 64) __builtin_prefetch(p + i, 0, 2);
}

// Fills an item of that row; `bytes`: room for its mask.
inline void fill(Item& item, const ProgramTokens& t, const Items& items, std::int64_t number, std::int64_t row,
                 std::uint8_t* bytes) {
  const std::int64_t column = (number - items.first(row)) * kProgramItem;
  const std::int64_t left = length_of(t, row) - column;
  item.number = number, item.row = row, item.begin = begin_of(t, row) + column;
  item.tokens = static_cast<int>(left < kProgramItem ? left : kProgramItem);
  item.tiles = (item.tokens + kTile - 1) / kTile;
  item.counted = 0;
  item.some = item.every = 0;
  const std::uint8_t* mask = mask_block(t.mask, item.begin, item.tokens, bytes);
  int k = 0;
  if (mask == nullptr) {  // whole tiles at once
    k = item.tokens / kTile;
    item.counted = k * kTile;
    item.some = item.every = k == 64 ? ~std::uint64_t{0} : (std::uint64_t{1} << k) - 1;
    for (int v = 0; v < k * kTileVectors; ++v) item.words[v] = simd::kAllLanes;
  }
  for (; k < item.tiles; ++k) {
    const int n = item.tokens - k * kTile < kTile ? item.tokens - k * kTile : kTile;
    simd::Word* words = item.words + k * kTileVectors;
    std::uint8_t last[kTile] = {};
    for (int j = 0; j < n && n < kTile; ++j) last[j] = mask == nullptr ? std::uint8_t{1} : mask[k * kTile + j];
    const int on = simd::to_words(n < kTile ? last : mask + k * kTile, words);
    item.counted += on;
    item.some |= static_cast<std::uint64_t>(on > 0) << k;
    item.every |= static_cast<std::uint64_t>(on == kTile) << k;
  }
  item.end = item.some == 0 ? 0 : 64 - __builtin_clzll(item.some);
}

// make().run(first, last) for chunks of consecutive items, spread over the threads; each makes one worker.
template <class Make>
void for_chunks(std::int64_t items, int threads, const Make& make) {
  std::int64_t chunk = items / (16 * static_cast<std::int64_t>(threads > 0 ? threads : 1));
  chunk = chunk < 8 ? 8 : chunk > 1024 ? 1024 : chunk;
  const std::int64_t chunks = (items + chunk - 1) / chunk;
#pragma omp parallel num_threads(threads) if (chunks > 1 && threads > 1)
  {
    auto worker = make();
#pragma omp for schedule(dynamic) nowait
    for (std::int64_t c = 0; c < chunks; ++c) worker.run(c * chunk, (c + 1) * chunk < items ? (c + 1) * chunk : items);
    simd::fence();  // of what this thread streamed, before the region's closing barrier
  }
}

}  // namespace fastreward::FASTREWARD_ISA::program
