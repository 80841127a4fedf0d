// The token operators of programs as functions on a tile in registers. For csrc/cpu/program/ only.
#pragma once

#include "cpu/simd/simd_functions.hpp"
#include "cpu/program/program.hpp"

namespace fastreward::FASTREWARD_ISA::program {

// Vectors and tokens of a tile; vectors and tiles of a chunk.
constexpr int kTileVectors = 8;
constexpr int kTile = kTileVectors * simd::kF32;
constexpr int kChunk = static_cast<int>(kProgramChunk);
constexpr int kChunkVectors = kChunk / simd::kF32;
constexpr int kChunkTiles = kChunk / kTile;
constexpr std::int64_t kTileBytes = kTile * 4;
constexpr std::int64_t kTileWords = kTileVectors * sizeof(simd::Word);  // bytes of a tile's mask
static_assert(kChunk % kTile == 0 && kChunkTiles <= 64, "a bit for each tile");
// Tiles whose terms are summed in float before they go to float64.
constexpr int kRun = 8;

// What a reduction adds to, one per lane.
struct alignas(64) Accumulator {
  float run[simd::kF32];     // of a sum since the last flush; of an extreme the extreme
  double total[simd::kF32];  // of a sum
  std::int64_t count;
  bool nan;  // an extreme has met one
};

// Where a tile lies. masks: its words of mask 0, in a chunk's masks; at: its place in the tensors, in bytes; ahead:
// that of the tile that is to be fetched meanwhile.
struct Tile {
  char* masks;
  std::int64_t at, ahead;
};

// An instruction with its operands: the address of a tile of floats (slot), a vector of equal floats (sequence value),
// or an Accumulator; for a tensor the address of its first element; for a mask its place in a chunk's masks, in bytes.
// run(instruction, tile, a0 ... a7) goes on to the next one by itself, so that the accumulator stays in registers from
// one instruction to the next; the last one is `finish`.
struct Instruction;
#define FASTREWARD_TILE                                                                                    \
  const Instruction *i, const Tile *t, simd::F32 a0, simd::F32 a1, simd::F32 a2, simd::F32 a3, simd::F32 a4, \
      simd::F32 a5, simd::F32 a6, simd::F32 a7
using Operator = void (*)(FASTREWARD_TILE);
struct Instruction {
  Operator run;
  char *w, *x, *y;
  std::int64_t z;  // a mask, or the address of a third accumulator
  char* k;
};

// How an operator is to be had: what its operands w, x and y are; whether it keeps its result in slot k; whether some
// tokens of the tile may not count (their mask is number 0); whether an output goes past the caches.
enum class Place { slot, sequence, tensor, none };
struct Variant {
  Place w = Place::none, x = Place::none, y = Place::none;
  bool keeps = false, masked = false, streamed = false;
};
Operator operator_of(TokenOp op, Variant variant);
void finish(FASTREWARD_TILE);
// Brings the tile of tensor x that lies at `ahead` into L1.
void fetch(FASTREWARD_TILE);

}  // namespace fastreward::FASTREWARD_ISA::program
