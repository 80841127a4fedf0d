// The PPO family's policy loss on the CPU: loss, metrics and the scaled gradient in one sweep over the tokens.
#pragma once

#include <cstdint>

#include "common/isa.hpp"
#include "common/mask.hpp"

namespace fastreward {

// The numbers are the positions in fastreward/_options.py: AGGREGATIONS, and KLS with 0 for none.
enum class Aggregation : int { token_mean, seq_mean_token_mean, seq_mean_token_sum, seq_mean_token_sum_norm };
enum class KlTerm : int { none, k1, k2, k3 };

// A sequence is cut into items of this many tokens, the unit of work of a thread and of the sums' structure.
constexpr std::int64_t kPolicyBlock = 2048;

// Options that are switched off hold infinity.
struct PolicySettings {
  double clip_low = 0.2;
  double clip_high = 0.2;
  double dual_clip = 0.0;
  double delta = 0.0;
  double log_ratio_clamp = 0.0;
  Aggregation aggregation = Aggregation::token_mean;
  KlTerm kl = KlTerm::none;
  double kl_coef = 0.0;
  double entropy_coef = 0.0;
};

// Token arrays are [rows, columns] (padded), or [cu_seqlens[rows]] (packed; columns is not used).
struct PolicyTokens {
  std::int64_t rows = 0;
  std::int64_t columns = 0;
  const std::int64_t* cu_seqlens = nullptr;  // [rows + 1]
  MaskView mask;
  const std::int64_t* first_item = nullptr;  // [rows + 1], from policy_items

  std::int64_t begin(std::int64_t row) const { return cu_seqlens == nullptr ? row * columns : cu_seqlens[row]; }
  std::int64_t length(std::int64_t row) const {
    return cu_seqlens == nullptr ? columns : cu_seqlens[row + 1] - cu_seqlens[row];
  }
};

struct PolicyInput {
  const float* logprobs = nullptr;
  const float* old_logprobs = nullptr;
  const float* advantages = nullptr;
  bool advantage_per_row = false;  // advantages [rows]
  const float* ref_logprobs = nullptr;
  const float* entropy = nullptr;
  const float* weights = nullptr;
  const float* normalizer = nullptr;  // one float; nullptr: counted from the mask
};

// Sums over the counted tokens of one item.
struct PolicySums {
  double loss, log_ratio, ratio, ref_k1, ref_k3, entropy;
  float ratio_min, ratio_max;
  std::int32_t low, high, dual;
  bool nan_advantage;
};

struct PolicyOutput {
  float* loss = nullptr;        // [1]
  float* metrics = nullptr;     // [12], order of fastreward._layout.METRICS
  float* gradient = nullptr;    // for logprobs, scaled by the aggregation
  float* row_weight = nullptr;  // [rows]: what the aggregation multiplies a row's token losses by
  float* token_loss = nullptr;  // before aggregation; nullptr: not wanted
  // First counted NaN advantage in row order, -1 when there is none (the other outputs mean nothing then).
  std::int64_t nan_row = -1;
  std::int64_t nan_column = -1;
};

}  // namespace fastreward

FASTREWARD_DECLARE(
    // Fills first_item [rows + 1] (items are numbered row by row); returns their number.
    std::int64_t policy_items(const PolicyTokens& tokens, std::int64_t* first_item);
    // lengths: scratch [rows]; items: scratch [number of items].
    void policy_forward(const PolicyTokens& tokens, const PolicyInput& input, const PolicySettings& settings,
                        std::int64_t* lengths, PolicySums* items, PolicyOutput& output, int threads);
    // out[i] = x[i] * factor
    void policy_scale(const float* x, float factor, std::int64_t n, float* out, int threads);
    // out = factor * row_weight on counted tokens, 0 elsewhere
    void policy_spread(const PolicyTokens& tokens, const float* row_weight, float factor, float* out, int threads);)
