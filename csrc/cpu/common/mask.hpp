// Token masks as they come (bool, uint8, int32, int64, float32; nonzero counts), read a cache block at a time: no kernel
// ever holds a converted copy of a whole mask.
#pragma once

#include <cstdint>

namespace fastreward {

// Numbers that the Python layer passes (fastreward/cpu/_pointers.py).
enum class MaskKind : int { none = 0, bytes = 1, i32 = 2, i64 = 3, f32 = 4 };

struct MaskView {
  const void* data = nullptr;
  MaskKind kind = MaskKind::none;
};

}  // namespace fastreward

#ifdef FASTREWARD_ISA
#include "cpu/simd/simd.hpp"

namespace fastreward::FASTREWARD_ISA {

template <class T>
inline void mask_to_bytes(const T* values, int n, std::uint8_t* bytes) {
  for (int i = 0; i < n; ++i) bytes[i] = values[i] != T(0);
}

// Bytes (nonzero counts) of mask positions [begin, begin + n): the mask itself where it has bytes, else `block`.
// nullptr: every position counts.
inline const std::uint8_t* mask_block(MaskView mask, std::int64_t begin, int n, std::uint8_t* block) {
  switch (mask.kind) {
    case MaskKind::none:
      return nullptr;
    case MaskKind::bytes:
      return static_cast<const std::uint8_t*>(mask.data) + begin;
    case MaskKind::i32:
      mask_to_bytes(static_cast<const std::int32_t*>(mask.data) + begin, n, block);
      return block;
    case MaskKind::i64:
      mask_to_bytes(static_cast<const std::int64_t*>(mask.data) + begin, n, block);
      return block;
    case MaskKind::f32:
      mask_to_bytes(static_cast<const float*>(mask.data) + begin, n, block);
      return block;
  }
  return nullptr;
}

namespace simd {

// Lanes whose byte is not zero.
inline M32 nonzero(const std::uint8_t* bytes) {
#if defined(FASTREWARD_AVX512)
  const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
  return {_mm_test_epi8_mask(b, b)};
#elif defined(__AVX2__)
  const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
  return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(wide, _mm256_setzero_si256()))};
#else
  float lanes[kF32];
  for (int i = 0; i < kF32; ++i) lanes[i] = bytes[i] != 0 ? 1.0f : 0.0f;
  return load(lanes) > f32(0.0f);
#endif
}

// The same for the first n lanes; the others are off and their bytes are not read.
inline M32 nonzero_n(const std::uint8_t* bytes, int n) {
  std::uint8_t lanes[kF32] = {};
  for (int i = 0; i < n; ++i) lanes[i] = bytes[i];
  return nonzero(lanes);
}

}  // namespace simd
}  // namespace fastreward::FASTREWARD_ISA
#endif
