// Balanced partitions on the host: sequences into parts of nearly equal sums, by the largest differencing method.
#pragma once

#include <cstdint>

#include "cpu/common/isa.hpp"

namespace fastreward {

struct BalanceProblem {
  std::int64_t count = 0;                 // sequences, at least 1
  const std::int64_t* lengths = nullptr;  // [count], at least 0; their sum fits
  std::int64_t parts = 1;                 // at least 1; with equal_size a divisor of count
  bool equal_size = false;
  std::int64_t* order = nullptr;   // [count], out: the indices, part by part
  std::int64_t* starts = nullptr;  // [parts + 1], out: where each part begins in `order`
};

}  // namespace fastreward

FASTREWARD_DECLARE(void balance(const BalanceProblem& problem);)
