// How many positions of a mask count, in its own dtype: a check of arguments must not wait for torch's threads.
//
// Fused in mask_flags: an i64 mask, as trainers have them, is read once for all that is asked of it: its bytes (an eighth
// of what every later pass would read), the lengths of its rows, and whether it is a mask at all or has weights.
#include "cpu/mask.hpp"

#include <atomic>

#include "cpu/threads.hpp"

namespace fastreward::FASTREWARD_ISA {
namespace {

constexpr std::int64_t kShare = 1 << 16;  // positions that a thread takes at a time, at least
constexpr std::int64_t kBlock = 4096;

// Writes n values as bytes of 0 and 1; false: there are others, and the bytes mean nothing.
template <class T>
bool to_flags(const T* values, int n, std::uint8_t* flags) {
  T bits = 0;
  for (int i = 0; i < n; ++i) {
    bits = static_cast<T>(bits | values[i]);
    flags[i] = static_cast<std::uint8_t>(values[i]);
  }
  return (bits & ~T(1)) == 0;
}

bool to_flags(const float* values, int n, std::uint8_t* flags) {
  int others = 0;
  for (int i = 0; i < n; ++i) {
    others |= (values[i] != 0.0f) & (values[i] != 1.0f) ? 1 : 0;  // a NaN is neither
    flags[i] = values[i] != 0.0f ? 1 : 0;
  }
  return others == 0;
}

bool to_flags(const MaskView& mask, std::int64_t begin, int n, std::uint8_t* flags) {
  switch (mask.kind) {
    case MaskKind::none: return false;  // there is nothing to look at
    case MaskKind::bytes: return to_flags(static_cast<const std::uint8_t*>(mask.data) + begin, n, flags);
    case MaskKind::i32: return to_flags(static_cast<const std::int32_t*>(mask.data) + begin, n, flags);
    case MaskKind::i64: return to_flags(static_cast<const std::int64_t*>(mask.data) + begin, n, flags);
    case MaskKind::f32: return to_flags(static_cast<const float*>(mask.data) + begin, n, flags);
  }
  return false;
}

int count_on(const std::uint8_t* bytes, int n) {
  constexpr int kFew = 128;  // that a byte can count
  int on = 0;
  for (int i = 0; i < n; i += kFew) {
    const int end = n - i < kFew ? n : i + kFew;
    std::uint8_t few = 0;
    for (int k = i; k < end; ++k) few = static_cast<std::uint8_t>(few + (bytes[k] != 0 ? 1 : 0));
    on += few;
  }
  return on;
}

}  // namespace

std::int64_t mask_count(const MaskView& mask, std::int64_t positions, int threads) {
  if (mask.kind == MaskKind::none) return positions;
  std::int64_t total = 0;
  parallel_ranges(threads, positions, grain_of(positions, kShare), [&](std::int64_t begin, std::int64_t end, int) {
    std::uint8_t buffer[kBlock];
    std::int64_t counted = 0;
    for (std::int64_t i = begin; i < end; i += kBlock) {
      const int n = static_cast<int>(end - i < kBlock ? end - i : kBlock);
      counted += count_on(mask_block(mask, i, n, buffer), n);
    }
    __atomic_fetch_add(&total, counted, __ATOMIC_RELAXED);
  });
  return total;
}

bool mask_flags(const MaskView& mask, std::int64_t rows, std::int64_t columns, std::uint8_t* flags, float* counts,
                int threads) {
  std::atomic<bool> good{true};
  const std::int64_t least = kShare / (columns + 1);
  parallel_ranges(threads, rows, grain_of(rows, least), [&](std::int64_t first, std::int64_t last, int) {
    std::uint8_t buffer[kBlock];
    bool fine = true;
    for (std::int64_t row = first; row < last; ++row) {
      std::int64_t counted = 0;
      for (std::int64_t i = row * columns, end = i + columns; i < end; i += kBlock) {
        const int n = static_cast<int>(end - i < kBlock ? end - i : kBlock);
        std::uint8_t* const bytes = flags == nullptr ? buffer : flags + i;
        fine = to_flags(mask, i, n, bytes) && fine;
        if (counts != nullptr) counted += count_on(bytes, n);
      }
      if (counts != nullptr) counts[row] = static_cast<float>(counted);
    }
    if (!fine) good.store(false, std::memory_order_relaxed);
  });
  return good.load(std::memory_order_relaxed);
}

}  // namespace fastreward::FASTREWARD_ISA
