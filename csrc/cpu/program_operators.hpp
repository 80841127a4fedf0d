// The token operators of programs as functions over a block of vectors. For csrc/cpu/program_*.cpp only.
#pragma once

#include "common/simd_functions.hpp"
#include "cpu/program.hpp"

namespace fastreward::FASTREWARD_ISA::program {

// Floats of a block: its slots stay in L1. Results do not depend on it.
constexpr int kBlock = 1024;
constexpr int kBlockVectors = kBlock / simd::kF32;
// Vectors whose terms are added in float before they go to the float64 sums; blocks start at multiples of it.
constexpr int kRun = 8;
static_assert(kProgramItem % kBlock == 0 && kBlockVectors % kRun == 0, "items are blocks, blocks are runs");

// What a reduction adds to, one per lane.
struct alignas(64) Accumulator {
  union {
    double sum[simd::kF32];
    float extreme[simd::kF32];
    std::int64_t count;
  };
  bool nan;  // an extreme has met one
};

// One block. at: the operands of the step: a slot (floats), a mask slot (words), a vector of equal floats, a block of
// equal words, the input's or output's first float in the block, or an Accumulator.
struct Frame {
  void* const* at;
  int vectors;                 // those that hold the tokens
  int tokens;
  const simd::Word* counted;   // nullptr: all of them, and they fill their vectors
  bool streamed;               // outputs go past the caches; only where all tokens count
};

using Kernel = void (*)(const TokenInstruction& instruction, const Frame& frame);

// variant: bit k set: operand a, b, c, d (k = 0 ... 3) is the same for all tokens; of reduce: result out, second, third
// (k = 0, 1, 2) is there.
Kernel kernel_of(TokenOp op, unsigned variant);

}  // namespace fastreward::FASTREWARD_ISA::program
