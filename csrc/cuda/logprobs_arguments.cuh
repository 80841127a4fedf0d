// The one argument of each logprobs kernel. Every member is 8 bytes wide: fastreward/cuda/logprobs.py packs them in
// this order, for nvcc's build and for CuPy's alike.
#pragma once

#include "cuda/device/device.cuh"

namespace fastreward {

struct ForwardArguments {
  const void* logits;  // [rows, vocab], `stride` elements from row to row
  i64 stride, rows, vocab;
  const i64* labels;             // [rows]
  const double* inv_temperature;  // [rows] with stride inv_stride, or null: then inv_value
  i64 inv_stride;
  double inv_value;
  const unsigned char* mask;  // [rows] or null
  const unsigned char* keep;  // [rows, vocab] or null
  i64 keep_stride;
  const i64* kept;  // kept ids [rows, kept_count], kept_stride from row to row; negative = padding; or null
  i64 kept_stride, kept_count;
  const i64* ids;  // [rows, ids_count], ids_stride from row to row, or null
  i64 ids_stride, ids_count;
  float* values;              // [VALUES, rows]
  i64* indices;               // [2, rows]
  float* id_logprobs;         // [rows, ids_count]
  double* state;              // [rows, STATES]: accumulate into it instead of writing outputs; or null
  i64 vocab_start;            // full column of this tile's first one (with `state`)
  const float* label_logits;  // [rows] or null: what `rank` compares with (with `state`)
  i64 flags;
  i64 sweeps;  // of a slice, a multiple of UNROLL
};

struct FinishArguments {
  const double* state;  // [rows, STATES]
  i64 rows, vocab;
  const double* inv_temperature;
  i64 inv_stride;
  double inv_value;
  float* values;
  i64* indices;
  i64 flags;
};

struct BackwardArguments {
  const void* logits;
  i64 stride, rows, vocab;
  const i64* labels;
  const double* inv_temperature;
  i64 inv_stride;
  double inv_value;
  const unsigned char* mask;
  const unsigned char* keep;
  i64 keep_stride;
  const i64* kept;
  i64 kept_stride, kept_count;
  const i64* ids;
  i64 ids_stride, ids_count;
  const float* values;       // [VALUES, rows], as the forward wrote them
  const float* grad_values;  // [VALUES, rows]
  const float* grad_ids;     // [rows, ids_count]
  void* grad;                // [rows, vocab], the logits' type; may be `logits`
  i64 grad_stride;
  double inv_softcap;  // 0: none
  i64 chunk, chunks;   // vectors in a block's share of a row, shares in a row
};

}  // namespace fastreward
