// Element types of arrays: plain 16-bit holders without arithmetic (simd.hpp converts), shared by all ISAs.
#pragma once

#include <cstdint>

namespace fastreward {

struct Bf16 {
  std::uint16_t bits;
};
struct F16 {
  std::uint16_t bits;
};

// Numbers that the Python layer passes for a tensor's dtype.
enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

}  // namespace fastreward
