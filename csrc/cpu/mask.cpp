// How many positions of a mask count, in its own dtype: a check of arguments must not wait for torch's threads.
#include "cpu/mask.hpp"

#include "cpu/threads.hpp"

namespace fastreward::FASTREWARD_ISA {

std::int64_t mask_count(const MaskView& mask, std::int64_t positions, int threads) {
  if (mask.kind == MaskKind::none) return positions;
  constexpr std::int64_t kShare = 1 << 16;  // positions that a thread takes at a time, at least
  constexpr std::int64_t kBlock = 4096;
  std::int64_t total = 0;
  parallel_ranges(threads, positions, grain_of(positions, kShare), [&](std::int64_t begin, std::int64_t end, int) {
    std::uint8_t buffer[kBlock];
    std::int64_t counted = 0;
    for (std::int64_t i = begin; i < end; i += kBlock) {
      const int n = static_cast<int>(end - i < kBlock ? end - i : kBlock);
      const std::uint8_t* const bytes = mask_block(mask, i, n, buffer);
      int on = 0;
      for (int k = 0; k < n; ++k) on += bytes[k] != 0 ? 1 : 0;
      counted += on;
    }
    __atomic_fetch_add(&total, counted, __ATOMIC_RELAXED);
  });
  return total;
}

}  // namespace fastreward::FASTREWARD_ISA
