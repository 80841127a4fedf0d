// Masked whitening on the CPU: statistics of the counted positions, then an affine map.
#pragma once

#include <cstdint>

#include "cpu/common/isa.hpp"
#include "cpu/common/mask.hpp"

namespace fastreward {

// A row is cut into blocks of this many positions; a block's statistics are taken from cache, memory is read once.
constexpr std::int64_t kWhitenBlock = 4096;

struct Moments {
  double count = 0.0;
  double mean = 0.0;
  double m2 = 0.0;  // sum of (x - mean)^2
};

struct WhitenInput {
  const float* x = nullptr;  // [rows, columns]
  MaskView mask;             // [rows, columns]
  std::int64_t rows = 0;
  std::int64_t columns = 0;
  std::int64_t blocks_per_row() const { return (columns + kWhitenBlock - 1) / kWhitenBlock; }
};

// y = (x - shift) * scale + offset
struct Affine {
  double shift = 0.0;
  double scale = 1.0;
  double offset = 0.0;
};

}  // namespace fastreward

FASTREWARD_DECLARE(
    // scratch: rows * blocks_per_row() entries
    Moments whiten_statistics(const WhitenInput& input, Moments* scratch, int threads);
    // out [rows, columns] may be x itself; 0 where masked
    void whiten_apply(const WhitenInput& input, const Affine& affine, float* out, int threads);)
