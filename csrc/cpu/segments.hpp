// Segments of token rows on the CPU: ids from masks and ends, reductions [tokens] -> [rows, segments], and their adjoint.
#pragma once

#include <cstdint>

#include "cpu/common/isa.hpp"

namespace fastreward {

// In the order of SEGMENT_OPS in fastreward/_arguments/options.py.
enum class SegmentOp : int { sum, mean, min, max, first, last, count, logsumexp, mean_exp, softmin };
enum class IdKind : int { none, i32, i64 };            // none: every token is in segment 0
enum class WeightKind : int { none, bytes, f32 };      // bytes: nonzero counts, as 1
enum class MarkKind : int { none, bytes, i32 };
enum class LabelKind : int { none, i32, i64 };
// Bits of what a call has found wrong.
enum SegmentFault : int { kIllegalId = 1, kNan = 2 };

struct TokenRows {
  std::int64_t rows = 0;
  std::int64_t columns = 0;              // padded; or
  const std::int64_t* bounds = nullptr;  // [rows + 1], packed
  std::int64_t begin(std::int64_t b) const { return bounds == nullptr ? b * columns : bounds[b]; }
  std::int64_t end(std::int64_t b) const { return begin(b + 1); }
  std::int64_t count() const { return begin(rows); }
};

struct SegmentProblem {
  TokenRows tokens;
  std::int64_t segments = 0;      // of a row
  const float* x = nullptr;       // [tokens]; not read for the adjoints of sum, mean, count, first, last
  const void* ids = nullptr;      // [tokens], -1 = none
  IdKind id_kind = IdKind::none;
  const void* weights = nullptr;  // [tokens]; a token of weight 0 is not there
  WeightKind weight_kind = WeightKind::none;
  SegmentOp op = SegmentOp::sum;
  double temperature = 1.0;  // softmin
  double empty = 0.0;        // of a segment without a token, but for sum and count
  int threads = 1;
};

// A segment's tokens are summed in so many lanes by their number in it: one addition need not wait for the one before.
constexpr int kSegmentLanes = 4;

// What is known of a segment, and which fields an op uses.
struct SegmentState {
  double total[kSegmentLanes] = {};  // sums of w x, of every fourth token that counts; exponentials, [0]: of w exp(y - top)
  double weight = 0.0;   // sum of w
  double top = 0.0;      // extremes: the extreme so far; exponentials: the largest exponent y so far
  double shifted = 0.0;  // softmin: sum of w exp(y - top) x
  std::int64_t at = -1;  // extremes, first, last: its token; exponentials: whether there was a finite exponent
  std::int64_t count = 0;  // sums: tokens so far
};

struct SegmentMarks {
  TokenRows tokens;
  const std::uint8_t* mask = nullptr;  // [tokens], nonzero = may be in a segment; nullptr: all
  const void* labels = nullptr;        // [tokens], below 0 = none: a segment is a run of one label; or
  LabelKind label_kind = LabelKind::none;
  const void* marks = nullptr;         // [tokens]: how many segments end at this token
  MarkKind mark_kind = MarkKind::none;
  bool tail = true;                    // whether what comes after the last end is a segment
  int threads = 1;
};

}  // namespace fastreward

// scratch: segments states for each thread. Returns SegmentFault's bits.
FASTREWARD_DECLARE(
    int segment_reduce(const SegmentProblem& problem, SegmentState* scratch, float* out);
    int segment_adjoint(const SegmentProblem& problem, const float* values, SegmentState* scratch, float* out);
    void segment_ids(const SegmentMarks& marks, std::int32_t* out);)
