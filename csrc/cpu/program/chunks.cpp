// The mask of a side's tokens, read once: bits for the passes, and how many tokens of a sequence count.
#include "cpu/program/chunks.hpp"

namespace fastreward::FASTREWARD_ISA::program {
namespace {

using namespace simd;

std::int64_t all_tiles(const ProgramTokens& t) {
  if (t.mask.kind == MaskKind::none) return 0;
  if (t.cu_seqlens == nullptr) return t.sequences * tiles_of(t.columns);
  std::int64_t tiles = 0;
  for (std::int64_t sequence = 0; sequence < t.sequences; ++sequence) tiles += tiles_of(length_of(t, sequence));
  return tiles;
}

}  // namespace

Chunks::Chunks(const ProgramTokens& tokens, int threads)
    : t_(tokens),
      per_sequence_((tokens.columns + kProgramChunk - 1) / kProgramChunk),
      first_(packed() ? tokens.sequences + 1 : 0),
      first_tile_(packed() ? tokens.sequences + 1 : 0),
      valid_((number_sequences(), masked() ? count() : 0)),
      words_(all_tiles(tokens) * kTileVectors) {
  if (!masked()) return;
  struct Reader {
    Chunks& chunks;
    std::uint8_t bytes[kProgramChunk];
    void run(std::int64_t first, std::int64_t last) {
      std::int64_t sequence = chunks.sequence_of(first);
      for (std::int64_t i = first; i < last; ++i) {
        while (chunks.first(sequence + 1) <= i) ++sequence;
        chunks.read_mask(i, sequence, bytes);
      }
    }
  };
  for_chunk_ranges(*this, threads, [&] { return Reader{*this, {}}; });
}

void Chunks::number_sequences() {
  if (!packed()) return;
  first_[0] = first_tile_[0] = 0;
  for (std::int64_t sequence = 0; sequence < t_.sequences; ++sequence) {
    first_[sequence + 1] = first_[sequence] + (length_of(t_, sequence) + kProgramChunk - 1) / kProgramChunk;
    first_tile_[sequence + 1] = first_tile_[sequence] + tiles_of(length_of(t_, sequence));
  }
}

std::int64_t Chunks::sequence_of(std::int64_t chunk) const {
  if (!packed()) return chunk / per_sequence_;
  std::int64_t low = 0, high = t_.sequences;  // first(low) <= chunk < first(high)
  while (high - low > 1) {
    const std::int64_t middle = low + (high - low) / 2;
    (first_[middle] <= chunk ? low : high) = middle;
  }
  return low;
}

Chunk Chunks::chunk(std::int64_t number, std::int64_t sequence) const {
  const std::int64_t column = (number - first(sequence)) * kProgramChunk;
  const std::int64_t left = length_of(t_, sequence) - column;
  Chunk chunk;
  chunk.number = number, chunk.sequence = sequence, chunk.begin = begin_of(t_, sequence) + column;
  chunk.tokens = static_cast<int>(left < kProgramChunk ? left : kProgramChunk);
  chunk.tiles = static_cast<int>(tiles_of(chunk.tokens));
  const std::uint64_t all = ~std::uint64_t{0} >> (64 - chunk.tiles);
  chunk.some = masked() ? valid_[number].some : all;
  chunk.every = masked() ? valid_[number].every : chunk.tokens % kTile == 0 ? all : all >> 1;
  chunk.words = masked() ? words(number, sequence) : nullptr;
  chunk.end = chunk.some == 0 ? 0 : 64 - __builtin_clzll(chunk.some);
  return chunk;
}

std::int64_t Chunks::valid(std::int64_t sequence) const {
  if (!masked()) return length_of(t_, sequence);
  std::int64_t tokens = 0;
  for (std::int64_t i = first(sequence); i < first(sequence + 1); ++i) tokens += valid_[i].tokens;
  return tokens;
}

void Chunks::read_mask(std::int64_t number, std::int64_t sequence, std::uint8_t* bytes) {
  const std::int64_t column = (number - first(sequence)) * kProgramChunk;
  const std::int64_t left = length_of(t_, sequence) - column;
  const int tokens = static_cast<int>(left < kProgramChunk ? left : kProgramChunk);
  const std::uint8_t* mask = mask_block(t_.mask, begin_of(t_, sequence) + column, tokens, bytes);
  Word* to = words(number, sequence);
  Valid& valid = valid_[number];
  valid = {0, 0, 0};
  const auto add = [&](int tile, const std::uint8_t* of_tile) {
    const int on = to_words(of_tile, to + tile * kTileVectors);
    valid.tokens += on;
    valid.some |= static_cast<std::uint64_t>(on > 0) << tile;
    valid.every |= static_cast<std::uint64_t>(on == kTile) << tile;
  };
  const int whole = tokens / kTile, rest = tokens % kTile;
  for (int tile = 0; tile < whole; ++tile) add(tile, mask + tile * kTile);
  if (rest == 0) return;
  std::uint8_t last[kTile] = {};
  for (int j = 0; j < rest; ++j) last[j] = mask[whole * kTile + j];
  add(whole, last);
}

}  // namespace fastreward::FASTREWARD_ISA::program
