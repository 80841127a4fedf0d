// How token arrays are cut: rows into items, the threads' unit of work, items into blocks with the counted tokens of
// each. For csrc/cpu/program*.cpp only.
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
      : per_row_((t.columns + kProgramItem - 1) / kProgramItem), first_(t.cu_seqlens == nullptr ? 0 : t.rows + 1) {
    packed_ = t.cu_seqlens != nullptr;
    if (packed_) {
      first_[0] = 0;
      for (std::int64_t row = 0; row < t.rows; ++row)
        first_[row + 1] = first_[row] + (length_of(t, row) + kProgramItem - 1) / kProgramItem;
    }
    rows_ = t.rows;
    count_ = first(t.rows);
  }
  std::int64_t count() const { return count_; }
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
  std::int64_t per_row_, rows_, count_;
  bool packed_;
  Buffer<std::int64_t> first_;
};

// Tokens from the first counted one's run to the last counted one's vector.
struct Block {
  std::int64_t item, row, begin;  // begin: of its first token in the token arrays
  int tokens, vectors;
  int counted;       // how many count
  bool every;        // all of them, in whole vectors
  simd::Word words[kBlockVectors];  // which ones, unless `every`
};

// The blocks of the items [first, last) that have a counted token. skipped(begin, n): tokens that are in none.
template <class Skipped>
class BlockCursor {
 public:
  BlockCursor(const ProgramTokens& t, const Items& items, std::int64_t first, std::int64_t last, const Skipped& skipped)
      : t_(t), items_(items), item_(first), last_(last), skipped_(skipped) {
    if (item_ < last_) open(items_.row_of(item_));
  }

  bool next(Block& block) {
    while (item_ < last_) {
      if (column_ == end_) {
        if (++item_ == last_) return false;
        std::int64_t row = row_;
        while (items_.first(row + 1) <= item_) ++row;
        open(row);
        continue;
      }
      const int n = end_ - column_ < kBlock ? static_cast<int>(end_ - column_) : kBlock;
      const std::int64_t column = column_;
      column_ += n;
      if (fill(block, column, n)) return true;
    }
    return false;
  }

 private:
  void open(std::int64_t row) {
    row_ = row;
    begin_ = begin_of(t_, row);
    column_ = (item_ - items_.first(row)) * kProgramItem;
    const std::int64_t left = length_of(t_, row) - column_;
    end_ = column_ + (left < kProgramItem ? left : kProgramItem);
    start_ = column_;
    bytes_ = mask_block(t_.mask, begin_ + column_, static_cast<int>(end_ - column_), buffer_);
  }

  bool fill(Block& block, std::int64_t column, int n) {
    block.item = item_;
    block.row = row_;
    int first = 0, end = (n + simd::kF32 - 1) / simd::kF32;
    block.counted = bytes_ == nullptr ? every(n, block.words) : words(bytes_ + (column - start_), n, block.words);
    if (block.counted == 0) {
      skipped_(begin_ + column, n);
      return false;
    }
    if (block.counted < n) {
      while (block.words[first] == 0) ++first;
      first -= first % kRun;
      while (block.words[end - 1] == 0) --end;
      const int after = end * simd::kF32;
      if (first > 0) skipped_(begin_ + column, first * simd::kF32);
      if (after < n) skipped_(begin_ + column + after, n - after);
      if (first > 0)
        for (int v = first; v < end; ++v) block.words[v - first] = block.words[v];
      n = (after < n ? after : n);
    }
    block.begin = begin_ + column + first * simd::kF32;
    block.tokens = n - first * simd::kF32;
    block.vectors = end - first;
    block.every = block.counted == block.vectors * simd::kF32;
    return true;
  }

  static int every(int n, simd::Word* words) {
    const int whole = n / simd::kF32;
    if (n % simd::kF32 == 0) return n;
    for (int v = 0; v < whole; ++v) words[v] = simd::kAllLanes;
    words[whole] = simd::word(simd::first32(n % simd::kF32));
    return n;
  }

  static int words(const std::uint8_t* bytes, int n, simd::Word* words) {
    const int whole = n / simd::kF32;
    for (int v = 0; v < whole; ++v) words[v] = simd::word(simd::nonzero(bytes + v * simd::kF32));
    int vectors = whole;
    if (n % simd::kF32 != 0)
      words[vectors++] = simd::word(simd::nonzero_n(bytes + whole * simd::kF32, n % simd::kF32));
    int counted = 0;
    for (int v = 0; v < vectors; ++v) counted += __builtin_popcount(words[v]);
    return counted;
  }

  const ProgramTokens& t_;
  const Items& items_;
  std::int64_t item_, last_;
  const Skipped& skipped_;
  std::int64_t row_ = 0, begin_ = 0, column_ = 0, start_ = 0, end_ = 0;
  const std::uint8_t* bytes_ = nullptr;
  std::uint8_t buffer_[kProgramItem];
};

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
