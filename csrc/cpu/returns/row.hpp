// A row on its way through the kernel, block by block. For csrc/cpu/returns/ only, as the headers beside it.
#pragma once

#include <cstdint>

#include "cpu/returns/returns.hpp"
#include "cpu/simd/lanes8.hpp"

namespace fastreward::FASTREWARD_ISA::returns {

using namespace simd;

constexpr int kWidth = 512;  // tokens of a block: a multiple of eight
constexpr int kRoom = 16;    // floats around a buffer, for a vector beyond either end

// Outputs from this many bytes on are written past the caches: with what is read beside them they fit into none, and who
// reads them next finds the last of them at best.
constexpr std::int64_t kStreamBytes = std::int64_t{16} << 20;

// Tokens that a thread takes at a time, at least: some 5 us.
constexpr std::int64_t kTokens = 8192;

// Distance in floats of the prefetches: hardware stops at each 4 KiB page.
constexpr int kAhead = 512;

// The eighth power of a coefficient up to this is well within float32.
constexpr double kTame = 6e4;

constexpr float kInfinity = __builtin_inff();

// A row on its way: the block at hand, and what has been brought there.
struct Row {
  std::int64_t row = 0, begin = 0, end = 0;  // the tokens that are left: [begin, end)
  std::int64_t base = 0;                     // the block: [base, base + n)
  int n = 0;
  const std::uint8_t* mask = nullptr;  // of the block; nullptr: all valid
  bool started = false;                // the block is not the first
  bool after_valid = false;            // the token after the block is valid
  double y = 0.0;                      // of the recurrence, before the block
  double pending = 0.0;                // rewards that move on
  float value = 0.0f;                  // V of the token after the block
};

struct Buffer {
  alignas(64) float around[kRoom + kWidth + kRoom];
  float* at() { return around + kRoom; }
};

struct Buffers {
  Buffer x, c;           // x becomes y
  Buffer plain, factor;  // V-trace: the advantage without what the recurrence brings, and the factor of that
  Buffer rewards, next_values;
  std::uint8_t mask[kWidth];
};

// ------------------------------------------------------------------------------------------------------------- numbers
inline F32 load_some(const float* p, int n) { return n == kF32 ? load(p) : load_n(p, n, 0.0f); }
inline M32 nonzero_some(const std::uint8_t* p, int n) { return n == kF32 ? nonzero(p) : nonzero_n(p, n); }

// f(first token, tokens) for the vectors of a block, from its end: rows are read so, and memory likes one direction.
template <class F>
inline void for_vectors(int n, F&& f) {
  int i = n / kF32 * kF32;
  if (i < n) f(i, n - i);
  for (i -= kF32; i >= 0; i -= kF32) f(i, kF32);
}

// What `op` makes no difference with.
inline float identity(const ReturnsInput& in) {
  switch (in.op) {
    case ReturnsOp::sum:
      return 0.0f;
    case ReturnsOp::min:
      return kInfinity;
    case ReturnsOp::max:
      return -kInfinity;
    case ReturnsOp::logsumexp:
      return in.scale > 0.0 ? -kInfinity : kInfinity;
  }
  return 0.0f;
}

inline bool timed(const ReturnsInput& in) { return in.at_masked == AtMasked::decay || in.at_masked == AtMasked::zero; }

// A coefficient of a block's tokens.
class Factor {
 public:
  Factor(const Coefficient& c, const Row& row)
      : tokens_(c.values == nullptr || c.per_row ? nullptr : c.values + row.base),
        all_(c.values != nullptr && c.per_row ? static_cast<double>(c.values[row.row]) : c.number) {}
  bool constant() const { return tokens_ == nullptr; }
  double all() const { return all_; }
  F32 at(int i, int width) const {
    return tokens_ == nullptr ? f32(static_cast<float>(all_)) : load_some(tokens_ + i, width);
  }
  float at(int i) const { return tokens_ == nullptr ? static_cast<float>(all_) : tokens_[i]; }

 private:
  const float* tokens_;
  double all_;
};

}  // namespace fastreward::FASTREWARD_ISA::returns
