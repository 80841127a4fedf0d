// Where sequences begin and end inside of their rows: the first and the last valid position of a mask [rows].
//
// Only the ends of a row are read, up to the first valid position and down to the last.
#include <algorithm>

#include "cpu/prefix_tree/prefix_tree.hpp"
#include "cpu/threads.hpp"

namespace fastreward::FASTREWARD_ISA {
namespace {

constexpr std::int64_t kTokens = 1 << 13;  // a thread's share, at least

template <class T>
std::int64_t last_valid(const T* mask, std::int64_t begin, std::int64_t end) {
  constexpr std::int64_t kChunk = 64;
  for (; end - begin >= kChunk; end -= kChunk) {
    bool any = false;
    for (std::int64_t i = 1; i <= kChunk; ++i) any |= mask[end - i] != T(0);
    if (any) break;
  }
  while (end > begin && mask[end - 1] == T(0)) --end;
  return end;
}

template <class T>
std::int64_t first_valid(const T* mask, std::int64_t begin, std::int64_t end) {
  const T* const found = std::find_if(mask + begin, mask + end, [](T x) { return x != T(0); });
  return found == mask + end ? begin : found - mask;
}

// f(typed mask pointer)
template <class F>
std::int64_t with_mask(const MaskView& mask, F&& f) {
  switch (mask.kind) {
    case MaskKind::bytes: return f(static_cast<const std::uint8_t*>(mask.data));
    case MaskKind::i32: return f(static_cast<const std::int32_t*>(mask.data));
    case MaskKind::i64: return f(static_cast<const std::int64_t*>(mask.data));
    case MaskKind::f32: return f(static_cast<const float*>(mask.data));
    case MaskKind::none: break;
  }
  return 0;
}

// f(row) for all rows.
template <class F>
void for_rows(const std::int64_t* extents, std::int64_t rows, int threads, const F& f) {
  const std::int64_t least = kTokens * rows / (extents[rows] + 1);
  parallel_ranges(threads, rows, grain_of(rows, least), [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t row = begin; row < end; ++row) f(row);
  });
}

}  // namespace

// --------------------------------------------------------------------------------------------------------- launchers
void prefix_tree_lengths(const MaskView& mask, const std::int64_t* extents, const std::int64_t* starts,
                         std::int64_t rows, std::int64_t* lengths, int threads) {
  for_rows(extents, rows, threads, [&](std::int64_t b) {
    const std::int64_t begin = starts == nullptr ? extents[b] : starts[b];
    lengths[b] = with_mask(mask, [&](auto* m) { return last_valid(m, begin, extents[b + 1]); }) - begin;
  });
}

void prefix_tree_starts(const MaskView& mask, const std::int64_t* extents, std::int64_t rows, std::int64_t* starts,
                        int threads) {
  for_rows(extents, rows, threads, [&](std::int64_t b) {
    starts[b] = with_mask(mask, [&](auto* m) { return first_valid(m, extents[b], extents[b + 1]); });
  });
}

}  // namespace fastreward::FASTREWARD_ISA
