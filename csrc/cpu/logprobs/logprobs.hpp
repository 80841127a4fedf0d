// Log-probs and the other per-token statistics of logits rows, and their gradient: parameters shared by all ISAs.
#pragma once

#include <cstdint>

#include "cpu/common/dtypes.hpp"
#include "cpu/common/isa.hpp"

namespace fastreward {

// What to compute besides logprobs, logsumexp and label_logit (fastreward/_runtime/layout.py: FLAG).
enum LogprobsFlag : int { kEntropy = 1, kLogSumSq = 2, kMeanLogit = 4, kArgmax = 8, kRank = 16 };
// Rows of `values` (VALUES) and columns of `state` (STATE).
enum {
  kValueLogprob,
  kValueEntropy,
  kValueLogsumexp,
  kValueLabelLogit,
  kValueMeanLogit,
  kValueLogSumSq,
  kValueMaxLogprob,
  kValueMaxLogit
};
enum {
  kStateMax,
  kStateSum,
  kStateSumT,
  kStateSumSq,
  kStateSumLogit,
  kStateLabel,
  kStateArgmax,
  kStateRank,
  kStateSize
};

// Columns of one block: a block of floats fits L1, a row's blocks depend on its length only.
constexpr std::int64_t kLogprobsBlock = 4096;
// Doubles of one block's statistics in `scratch`.
constexpr std::int64_t kLogprobsPartial = 6;

// Scratch of the backward: an upstream gradient that goes to one column.
struct ColumnGradient {
  std::int64_t column;
  double amount;
  double logit;
};

struct LogprobsRows {
  const void* logits = nullptr;  // [rows, columns], unit column stride
  DType dtype = DType::f32;
  std::int64_t rows = 0, columns = 0, row_stride = 0;
  const std::int64_t* labels = nullptr;  // [rows]
  const double* inv_temperature = nullptr;  // [rows] with stride 0 or 1; null: inv_temperature_scalar
  std::int64_t inv_temperature_stride = 0;
  double inv_temperature_scalar = 1.0;
  const std::uint8_t* mask = nullptr;       // [rows] or null
  const std::uint8_t* keep_mask = nullptr;  // [rows, columns] or null
  std::int64_t keep_mask_stride = 0;
  const std::int64_t* keep_ids = nullptr;  // [rows, keep_count], outside [0, columns) = padding, or null
  std::int64_t keep_count = 0, keep_ids_stride = 0;
  const std::int64_t* token_ids = nullptr;  // [rows, token_count] or null
  std::int64_t token_count = 0, token_ids_stride = 0;
  int threads = 1;
};

struct LogprobsForward {
  LogprobsRows in;
  int flags = 0;
  float* values = nullptr;           // [8, rows]
  std::int64_t* indices = nullptr;   // [2, rows]
  float* id_logprobs = nullptr;      // [rows, token_count]
  double* scratch = nullptr;         // logprobs_scratch() doubles
  // Of one row: exp((x - block's maximum) * inv_temperature) of every column, in an order of the backward's knowledge,
  // and each block's maximum. Not for kept sets. Null: not wanted.
  float* exponentials = nullptr;     // [columns]
  double* block_maxima = nullptr;    // [logprobs_blocks(columns)]
};

struct LogprobsAccumulate {
  LogprobsRows in;  // a slice of the vocabulary; labels count from its full start
  std::int64_t vocab_start = 0;
  int flags = 0;
  const float* label_logits = nullptr;  // [rows] or null
  double* state = nullptr;              // [rows, kStateSize]
  double* scratch = nullptr;
};

struct LogprobsFinish {
  const double* state = nullptr;
  const double* inv_temperature = nullptr;
  std::int64_t inv_temperature_stride = 0;
  double inv_temperature_scalar = 1.0;
  std::int64_t rows = 0, vocab_size = 0;
  int flags = 0;
  float* values = nullptr;
  std::int64_t* indices = nullptr;
};

struct LogprobsBackward {
  LogprobsRows in;
  const float* values = nullptr;       // [8, rows], the forward's
  const float* grad_values = nullptr;  // [8, rows]
  const float* grad_ids = nullptr;     // [rows, token_count] or null
  void* grad_logits = nullptr;         // [rows, columns], may be `logits`
  std::int64_t grad_stride = 0;
  double inv_softcap = 0.0;
  const float* exponentials = nullptr;  // the forward's, of one row: a gradient of logprobs alone needs no others
  const double* block_maxima = nullptr;
  std::int64_t total_bytes = 0;  // of a gradient that is written in parts; 0: this is all of it
  // Per slot of the threads: token_count + 1 and keep_count entries.
  ColumnGradient* columns = nullptr;
  float* kept_logits = nullptr;
};

// Few long rows: threads share a row's blocks instead of taking whole rows. The arithmetic is the same either way.
inline bool logprobs_splits_rows(std::int64_t rows, std::int64_t columns, int threads) {
  return threads > 1 && rows < 4 * threads && columns > kLogprobsBlock;
}
inline std::int64_t logprobs_blocks(std::int64_t columns) { return (columns + kLogprobsBlock - 1) / kLogprobsBlock; }

}  // namespace fastreward

FASTREWARD_DECLARE(void logprobs_forward(const ::fastreward::LogprobsForward& call);
                   void logprobs_accumulate(const ::fastreward::LogprobsAccumulate& call);
                   void logprobs_finish(const ::fastreward::LogprobsFinish& call);
                   void logprobs_backward(const ::fastreward::LogprobsBackward& call);)
