// Rewards per token on the CPU: a score per sequence on one of its valid tokens or on all, less a KL penalty per token.
#pragma once

#include <cstdint>

#include "cpu/common/isa.hpp"
#include "cpu/common/mask.hpp"

namespace fastreward {

// Numbers that the Python layer passes (fastreward/_runtime/layout.py: KL_ESTIMATES, fastreward/_arguments/options.py:
// PLACES).
enum class KlEstimate : int { none = -1, k1 = 0, abs = 1, k2 = 2, k3 = 3 };
enum class ScorePlace : int { all = 0, start = 1, end = 2 };

struct TokenRewards {
  const float* scores = nullptr;            // [sequences], NaN: not scored, nothing is placed
  const float* logprobs = nullptr;          // [tokens], as ref_logprobs: read where the mask is set; not for `none`
  const float* ref_logprobs = nullptr;
  MaskView mask;                            // [tokens]
  std::int64_t sequences = 0;
  std::int64_t columns = 0;                 // of padded tokens [sequences, columns]; or
  const std::int64_t* cu_seqlens = nullptr; // [sequences + 1], bounds of packed ones
  KlEstimate kl = KlEstimate::none;
  ScorePlace place = ScorePlace::end;
  float kl_coef = 0.0f, clamp = 0.0f, value_clamp = 0.0f;  // of the log-ratio, and of the estimate: +- these
  float low = 0.0f, high = 0.0f;                           // bounds of the scores

  std::int64_t begin(std::int64_t row) const { return cu_seqlens == nullptr ? row * columns : cu_seqlens[row]; }
};

}  // namespace fastreward

FASTREWARD_DECLARE(
    // out [tokens], 0 where masked. Returns whether a log-prob was NaN where the mask is set.
    bool token_rewards(const TokenRewards& input, float* out, int threads);)
