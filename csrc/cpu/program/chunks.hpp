// How token arrays are cut: sequences into chunks, the threads' unit of work, and chunks into tiles; and which tokens
// count, as bits. For csrc/cpu/program/.
#pragma once

#include "cpu/program/internal.hpp"
#include "cpu/program/operators.hpp"
#include "cpu/threads.hpp"

namespace fastreward::FASTREWARD_ISA::program {

inline std::int64_t begin_of(const ProgramTokens& t, std::int64_t sequence) {
  return t.cu_seqlens == nullptr ? sequence * t.columns : t.cu_seqlens[sequence];
}
inline std::int64_t length_of(const ProgramTokens& t, std::int64_t sequence) {
  return t.cu_seqlens == nullptr ? t.columns : t.cu_seqlens[sequence + 1] - t.cu_seqlens[sequence];
}
inline std::int64_t size_of(const ProgramTokens& t) { return t.sequences == 0 ? 0 : begin_of(t, t.sequences); }
// Outputs from 4 MiB on are written past the caches, which saves reading their old lines first.
inline bool past_caches(const ProgramTokens& t) { return size_of(t) * 4 >= std::int64_t{4} << 20; }
inline std::int64_t tiles_of(std::int64_t tokens) { return (tokens + kTile - 1) / kTile; }

// One chunk. words: of its tokens, nullptr: all of them count.
struct Chunk {
  std::int64_t number, sequence, begin;  // begin: of its first token in the token arrays
  int tokens, tiles;
  int end;                    // one past the last tile with a valid token
  std::uint64_t some, every;  // a bit for each tile: some, all of its (kTile) tokens count
  const simd::Word* words;

  bool full() const { return every == ~std::uint64_t{0} >> (64 - tiles); }
  int tokens_of(int tile) const { return tokens - tile * kTile < kTile ? tokens - tile * kTile : kTile; }
  std::int64_t place_of(int tile) const { return (begin + tile * kTile) * 4; }  // in the arrays, in bytes
};

// The chunks of a side, numbered sequence by sequence.
class Chunks {
 public:
  // Reads the mask, once for all passes.
  Chunks(const ProgramTokens& tokens, int threads);

  const ProgramTokens& tokens() const { return t_; }
  std::int64_t count() const { return first(t_.sequences); }
  std::int64_t first(std::int64_t sequence) const { return packed() ? first_[sequence] : sequence * per_sequence_; }
  std::int64_t sequence_of(std::int64_t chunk) const;
  Chunk chunk(std::int64_t number, std::int64_t sequence) const;
  // Valid tokens of a sequence.
  std::int64_t valid(std::int64_t sequence) const;

 private:
  struct Valid {
    std::uint64_t some, every;
    std::int64_t tokens;
  };

  bool packed() const { return t_.cu_seqlens != nullptr; }
  bool masked() const { return t_.mask.kind != MaskKind::none; }
  simd::Word* words(std::int64_t chunk, std::int64_t sequence) const {
    const std::int64_t before = packed() ? first_tile_[sequence] : sequence * tiles_of(t_.columns);
    return words_.data() + (before + (chunk - first(sequence)) * kChunkTiles) * kTileVectors;
  }
  void number_sequences();
  void read_mask(std::int64_t chunk, std::int64_t sequence, std::uint8_t* bytes);

  const ProgramTokens& t_;
  std::int64_t per_sequence_;
  Buffer<std::int64_t> first_, first_tile_;  // [sequences + 1] where packed
  Buffer<Valid> valid_;                      // [chunks] where masked
  Buffer<simd::Word> words_;                 // [tiles, kTileVectors] where masked
};

// run(first, last) of the worker that make() gives, for ranges of consecutive chunks, spread over the threads. whole:
// only of whole sequences.
template <class Make>
void for_chunk_ranges(const Chunks& chunks, int threads, const Make& make, bool whole = false) {
  constexpr std::int64_t kTokens = 4 * kChunk;  // a thread's share, at least
  const std::int64_t items = whole ? chunks.tokens().sequences : chunks.count();
  const std::int64_t least = kTokens * items / (size_of(chunks.tokens()) + 1);  // fewer of short ones
  const PerSlot workers(threads, make);
  parallel_ranges(threads, items, grain_of(items, least), [&](std::int64_t first, std::int64_t last, int slot) {
    if (whole) first = chunks.first(first), last = chunks.first(last);
    if (first < last) workers[slot].run(first, last);
    simd::fence();  // of what has been streamed
  });
}

}  // namespace fastreward::FASTREWARD_ISA::program
