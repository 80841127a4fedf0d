// The mask of a side's tokens, read once: bits for the passes, and how many tokens of a row count.
#include "cpu/program/chunks.hpp"

namespace fastreward::FASTREWARD_ISA::program {
namespace {

using namespace simd;

std::int64_t all_tiles(const ProgramTokens& t) {
  if (t.mask.kind == MaskKind::none) return 0;
  if (t.cu_seqlens == nullptr) return t.rows * tiles_of(t.columns);
  std::int64_t tiles = 0;
  for (std::int64_t row = 0; row < t.rows; ++row) tiles += tiles_of(length_of(t, row));
  return tiles;
}

}  // namespace

Items::Items(const ProgramTokens& tokens, int threads)
    : t_(tokens),
      per_row_((tokens.columns + kProgramItem - 1) / kProgramItem),
      first_(packed() ? tokens.rows + 1 : 0),
      first_tile_(packed() ? tokens.rows + 1 : 0),
      counted_((number_rows(), masked() ? count() : 0)),
      words_(all_tiles(tokens) * kTileVectors) {
  if (!masked()) return;
  struct Reader {
    Items& items;
    std::uint8_t bytes[kProgramItem];
    void run(std::int64_t first, std::int64_t last) {
      std::int64_t row = items.row_of(first);
      for (std::int64_t i = first; i < last; ++i) {
        while (items.first(row + 1) <= i) ++row;
        items.read_mask(i, row, bytes);
      }
    }
  };
  for_chunks(*this, threads, [&] { return Reader{*this, {}}; });
}

void Items::number_rows() {
  if (!packed()) return;
  first_[0] = first_tile_[0] = 0;
  for (std::int64_t row = 0; row < t_.rows; ++row) {
    first_[row + 1] = first_[row] + (length_of(t_, row) + kProgramItem - 1) / kProgramItem;
    first_tile_[row + 1] = first_tile_[row] + tiles_of(length_of(t_, row));
  }
}

std::int64_t Items::row_of(std::int64_t item) const {
  if (!packed()) return item / per_row_;
  std::int64_t low = 0, high = t_.rows;  // first(low) <= item < first(high)
  while (high - low > 1) {
    const std::int64_t middle = low + (high - low) / 2;
    (first_[middle] <= item ? low : high) = middle;
  }
  return low;
}

Item Items::item(std::int64_t number, std::int64_t row) const {
  const std::int64_t column = (number - first(row)) * kProgramItem;
  const std::int64_t left = length_of(t_, row) - column;
  Item item;
  item.number = number, item.row = row, item.begin = begin_of(t_, row) + column;
  item.tokens = static_cast<int>(left < kProgramItem ? left : kProgramItem);
  item.tiles = static_cast<int>(tiles_of(item.tokens));
  const std::uint64_t all = ~std::uint64_t{0} >> (64 - item.tiles);
  item.some = masked() ? counted_[number].some : all;
  item.every = masked() ? counted_[number].every : item.tokens % kTile == 0 ? all : all >> 1;
  item.words = masked() ? words(number, row) : nullptr;
  item.end = item.some == 0 ? 0 : 64 - __builtin_clzll(item.some);
  return item;
}

std::int64_t Items::counted(std::int64_t row) const {
  if (!masked()) return length_of(t_, row);
  std::int64_t tokens = 0;
  for (std::int64_t i = first(row); i < first(row + 1); ++i) tokens += counted_[i].tokens;
  return tokens;
}

void Items::read_mask(std::int64_t number, std::int64_t row, std::uint8_t* bytes) {
  const std::int64_t column = (number - first(row)) * kProgramItem;
  const std::int64_t left = length_of(t_, row) - column;
  const int tokens = static_cast<int>(left < kProgramItem ? left : kProgramItem);
  const std::uint8_t* mask = mask_block(t_.mask, begin_of(t_, row) + column, tokens, bytes);
  Word* to = words(number, row);
  Counted& counted = counted_[number];
  counted = {0, 0, 0};
  const auto add = [&](int tile, const std::uint8_t* of_tile) {
    const int on = to_words(of_tile, to + tile * kTileVectors);
    counted.tokens += on;
    counted.some |= static_cast<std::uint64_t>(on > 0) << tile;
    counted.every |= static_cast<std::uint64_t>(on == kTile) << tile;
  };
  const int whole = tokens / kTile, rest = tokens % kTile;
  for (int tile = 0; tile < whole; ++tile) add(tile, mask + tile * kTile);
  if (rest == 0) return;
  std::uint8_t last[kTile] = {};
  for (int j = 0; j < rest; ++j) last[j] = mask[whole * kTile + j];
  add(whole, last);
}

}  // namespace fastreward::FASTREWARD_ISA::program
