// What forward and backward of logprobs share: scalar reads of a row and the loop over rows. For csrc/cpu only.
#pragma once

#include "cpu/simd/exp_scaled.hpp"
#include "cpu/simd/simd.hpp"
#include "cpu/logprobs/logprobs.hpp"
#include "cpu/threads.hpp"

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

// body(i, slot) for i in [0, n), `grain` at a time: whoever is free takes the next ones, so masked rows cost nothing.
template <class Body>
inline void parallel_for(std::int64_t n, int threads, std::int64_t grain, const Body& body) {
  parallel_ranges(threads, n, grain, [&](std::int64_t begin, std::int64_t end, int slot) {
    const simd::FlushDenormals flush;
    for (std::int64_t i = begin; i < end; ++i) body(i, slot);
  });
}

// Rows that a thread takes at a time: a quarter of a megabyte's worth, so that neighbours stay together.
inline std::int64_t row_grain(const LogprobsRows& in) {
  const std::int64_t grain = (std::int64_t{1} << 16) / (in.columns + 1);
  return grain < 1 ? 1 : grain;
}

// Calls f(pointer of the element type) for the logits' dtype.
template <class F>
inline void by_dtype(DType dtype, const F& f) {
  if (dtype == DType::f32) f(static_cast<const float*>(nullptr));
  if (dtype == DType::bf16) f(static_cast<const Bf16*>(nullptr));
  if (dtype == DType::f16) f(static_cast<const F16*>(nullptr));
}

}  // namespace fastreward::FASTREWARD_ISA::logprobs
