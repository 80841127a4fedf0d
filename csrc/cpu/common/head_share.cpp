// Where the tail of a row ends is found by the bits of its probabilities, which order as they do: one pass sums the mass
// of each of 4096 ranges (sixteen to a power of two), and only the range in which the tail ends is sorted.
#include "cpu/common/head_share.hpp"

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

namespace fastreward {
namespace {

constexpr int kShift = 19;  // what a range ignores of a float's 31 bits
constexpr std::uint32_t kRanges = 1u << (31 - kShift);

std::uint32_t bits_of(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits & 0x7fffffffu;
}

// Where the tail ends: all probabilities below these bits are in it, and the first so many of just these.
struct End {
  std::uint32_t bits;
  std::int64_t equal;
};

End end_of_tail(const float* q, float* scratch, std::int64_t n, double alpha) {
  std::vector<double> mass(kRanges, 0.0);
  for (std::int64_t i = 0; i < n; ++i) mass[bits_of(q[i]) >> kShift] += static_cast<double>(q[i]);
  double below = 0.0;
  std::uint32_t range = 0;
  while (range < kRanges && below + mass[range] <= alpha) below += mass[range++];
  std::int64_t count = 0, first = 0, i = 0;
  for (std::int64_t k = 0; k < n; ++k)
    if (bits_of(q[k]) >> kShift == range) scratch[count++] = q[k];
  std::sort(scratch, scratch + count);
  for (; i < count; ++i) {
    below += static_cast<double>(scratch[i]);
    if (scratch[i] != scratch[first]) first = i;
    if (below > alpha) break;
  }
  return i < count ? End{bits_of(scratch[i]), i - first} : End{(range << kShift) + (count > 0 ? 1u << kShift : 0u), 0};
}

}  // namespace

double head_share(const float* q, const float* differences, float* scratch, std::int64_t n, double alpha) {
  double total = 0.0;
  for (std::int64_t i = 0; i < n; ++i) total += static_cast<double>(q[i]);
  if (total != total) return std::numeric_limits<double>::quiet_NaN();
  End end = end_of_tail(q, scratch, n, alpha);
  double head = 0.0, tail = 0.0;
  for (std::int64_t i = 0; i < n; ++i) {
    const std::uint32_t bits = bits_of(q[i]);
    const bool below = bits < end.bits || (bits == end.bits && end.equal-- > 0);
    (below ? tail : head) += static_cast<double>(differences[i]);
  }
  return head + tail == 0.0 ? 0.5 : head / (head + tail);
}

}  // namespace fastreward
