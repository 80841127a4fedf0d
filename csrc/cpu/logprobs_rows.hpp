// What forward and backward of logprobs share: scalar reads of a row and the loop over rows. For csrc/cpu only.
#pragma once

#include <omp.h>

#include "common/exp_scaled.hpp"
#include "common/simd.hpp"
#include "cpu/logprobs.hpp"

namespace fastreward::FASTREWARD_ISA::logprobs {

inline double inv_temperature_of(const LogprobsRows& in, std::int64_t row) {
  return in.inv_temperature != nullptr ? in.inv_temperature[row * in.inv_temperature_stride]
                                       : in.inv_temperature_scalar;
}

template <class T>
inline const T* row_of(const LogprobsRows& in, std::int64_t row) {
  return static_cast<const T*>(in.logits) + row * in.row_stride;
}

inline float read(const float* p) { return *p; }
template <class T>
inline float read(const T* p) {
  float lanes[simd::kF32];
  simd::store(lanes, simd::load_n(p, 1, 0.0f));
  return lanes[0];
}
inline void write(float* p, float x) { *p = x; }
template <class T>
inline void write(T* p, float x) {
  simd::store_n(p, simd::f32(x), 1);
}

inline bool row_counts(const LogprobsRows& in, std::int64_t row) { return in.mask == nullptr || in.mask[row] != 0; }

// Whether an id names a column: one comparison, negative ids are huge. Others are never read or written.
inline bool is_column(const LogprobsRows& in, std::int64_t id) {
  return static_cast<std::uint64_t>(id) < static_cast<std::uint64_t>(in.columns);
}

// Whether a column inside [0, columns) belongs to the row's kept set.
inline bool is_kept(const LogprobsRows& in, std::int64_t row, std::int64_t column) {
  if (in.keep_mask != nullptr) return in.keep_mask[row * in.keep_mask_stride + column] != 0;
  if (in.keep_ids == nullptr) return true;
  const std::int64_t* ids = in.keep_ids + row * in.keep_ids_stride;
  for (std::int64_t i = 0; i < in.keep_count; ++i)
    if (ids[i] == column) return true;
  return false;
}

// body(i, thread) for i in [0, n): whoever is free takes the next one, so masked rows cost nothing. Results may not
// depend on which thread ran what.
template <class Body>
inline void parallel_for(std::int64_t n, int threads, std::int64_t grain, const Body& body) {
  if (threads <= 1 || n <= 1) {
    const simd::FlushDenormals flush;
    for (std::int64_t i = 0; i < n; ++i) body(i, 0);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    const simd::FlushDenormals flush;
    const int thread = omp_get_thread_num();
#pragma omp for schedule(dynamic, grain)
    for (std::int64_t i = 0; i < n; ++i) body(i, thread);
  }
}

// Rows that a thread takes at a time: about a megabyte's worth, so that neighbours stay together.
inline std::int64_t row_grain(const LogprobsRows& in) {
  const std::int64_t grain = (std::int64_t{1} << 18) / (in.columns + 1);
  const std::int64_t fair = in.rows / (4 * (in.threads > 0 ? in.threads : 1));
  return grain < 1 || fair < 1 ? 1 : grain < fair ? grain : fair;
}

// Calls f(pointer of the element type) for the logits' dtype.
template <class F>
inline void by_dtype(DType dtype, const F& f) {
  if (dtype == DType::f32) f(static_cast<const float*>(nullptr));
  if (dtype == DType::bf16) f(static_cast<const Bf16*>(nullptr));
  if (dtype == DType::f16) f(static_cast<const F16*>(nullptr));
}

}  // namespace fastreward::FASTREWARD_ISA::logprobs
