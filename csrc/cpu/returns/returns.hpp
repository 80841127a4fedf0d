// Returns, GAE, lambda-returns and V-trace on the CPU: a linear recurrence along each row.
#pragma once

#include <cstdint>

#include "cpu/common/isa.hpp"
#include "cpu/common/mask.hpp"

namespace fastreward {

// As fastreward/_arguments/options.py numbers them.
enum class ReturnsKind : int { returns = 0, gae = 1, lambda = 2, vtrace = 3 };
enum class AtMasked : int { carry = 0, decay = 1, reset = 2, zero = 3 };
enum class ReturnsOp : int { sum = 0, min = 1, max = 2, logsumexp = 3 };

// A coefficient: one number, one per row, or one per token.
struct Coefficient {
  double number = 1.0;
  const float* values = nullptr;
  bool per_row = false;
};

struct ReturnsInput {
  const float* rewards = nullptr;
  const float* values = nullptr;
  const float* log_ratios = nullptr;
  const float* next_values = nullptr;
  Coefficient gamma, lam;
  const std::uint8_t* terminated = nullptr;
  const std::uint8_t* done = nullptr;
  const float* beyond = nullptr;  // [rows]
  MaskView mask;
  const std::int64_t* bounds = nullptr;  // [rows + 1]; nullptr: rows of `columns` tokens
  std::int64_t rows = 0;
  std::int64_t columns = 0;
  double scale = 1.0;
  float rho_bar = 1.0f, c_bar = 1.0f;
  ReturnsKind kind = ReturnsKind::returns;
  AtMasked at_masked = AtMasked::carry;
  ReturnsOp op = ReturnsOp::sum;
  bool reverse = true, move = false;

  std::int64_t begin(std::int64_t row) const { return bounds ? bounds[row] : row * columns; }
};

}  // namespace fastreward

FASTREWARD_DECLARE(
    // Writes every token of out, and of second where the kind has two results. False: something that counts was not
    // finite. A result beyond float32 is an infinity, and no error.
    bool returns_scan(const ReturnsInput& input, float* out, float* second, int threads);)
