// Group-normalised advantages on the CPU: one scalar reward per sequence, statistics per group in float64.
#pragma once

#include <cstdint>

#include "cpu/common/isa.hpp"

namespace fastreward {

// The numbers are those of fastreward/_arguments/options.py: GroupOptions.numbers, NORMALIZES. like_others: no rule for singletons.
enum class Center : int { none, mean, leave_one_out, length_weighted, second_max, tensor };
enum class Scale : int { none, std_dev, batch_std, max, tensor };
enum class Singleton : int { zero, raw, nan, like_others };
enum class Normalize : int { sum_then_normalize, normalize_then_sum };

struct GroupProblem {
  std::int64_t rows = 0;
  std::int64_t components = 0;
  const void* rewards = nullptr;  // [rows, components], NaN = not scored
  bool rewards_f64 = false;
  const std::int64_t* group_index = nullptr;  // [rows], 0 .. groups - 1; nullptr: contiguous groups of group_size
  std::int64_t group_size = 0;
  std::int64_t groups = 0;
  const float* lengths = nullptr;            // [rows], Center::length_weighted, or weights of a mean
  const float* component_weights = nullptr;  // [components], nullptr = all 1
  const float* center_values = nullptr;      // [rows], Center::tensor
  const float* scale_values = nullptr;       // [rows], Scale::tensor
  Center center = Center::mean;
  Scale scale = Scale::std_dev;
  Singleton singleton = Singleton::zero;
  Normalize normalize = Normalize::sum_then_normalize;
  int ddof = 1;
  double eps = 1e-6;
  bool eps_inside = false;
  float* advantages = nullptr;   // [rows]; or
  double* statistics = nullptr;  // [8, rows], layout.GROUP_STATISTICS
  int threads = 1;
};

// The caller's scratch memory.
struct GroupScratch {
  std::int64_t* order = nullptr;   // [rows]: rows sorted by group, in row order inside a group
  std::int64_t* starts = nullptr;  // [groups + 1]
  double* values = nullptr;        // [rows]
  double* totals = nullptr;        // [rows], advantages only
};

}  // namespace fastreward

FASTREWARD_DECLARE(void group_advantages(const GroupProblem& problem, const GroupScratch& scratch);)
// Of the first component; `exponentials`: also the one that needs exp.
FASTREWARD_DECLARE(void group_statistics(const GroupProblem& problem, const GroupScratch& scratch, bool exponentials);)
