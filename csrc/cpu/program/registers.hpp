// The operands of a pass in one thread's scratch, and its instructions with their addresses. For csrc/cpu/program/.
#pragma once

#include "cpu/program/internal.hpp"
#include "cpu/program/operators.hpp"

namespace fastreward::FASTREWARD_ISA::program {

inline bool is_tensor(OperandKind kind) { return kind == OperandKind::input || kind == OperandKind::output; }
inline bool stores(TokenOp op) { return op >= TokenOp::k_store && op <= TokenOp::k_drop3_store; }

// A tensor: its first element, and the tile that stands for it in a program of copies.
struct Tensor {
  char* base;
  float* copy;
  int index;  // of the call's inputs or outputs
};

class Registers {
 public:
  // inputs, outputs: the call's, in which the operands of a direct program lie; a program of copies does not touch
  // them.
  Registers(const TokenStep& step, const float* const* inputs, float* const* outputs);

  const TokenStep& step() const { return step_; }
  int size() const { return step_.operands.size; }
  OperandKind kind(int k) const { return step_.operands[k].kind; }
  int index(int k) const { return step_.operands[k].index; }

  Span<Tensor> inputs() const { return {tensors_.data(), sizes_.inputs}; }
  Span<Tensor> outputs() const { return {tensors_.data() + sizes_.inputs, sizes_.outputs}; }
  // Of an operand: its mask, of a chunk; its accumulator.
  simd::Word* mask(int k) const { return masks_.data() + mask_[k] * kChunkVectors; }
  Accumulator& accumulator(int k) const { return *reinterpret_cast<Accumulator*>(at_[k]); }
  simd::Word* valid() const { return masks_.data(); }  // mask 0: the tokens of a chunk that count

  // Gives the operands that are the same for the whole batch, or for all tokens of a sequence, their values.
  void set_numbers(const double* numbers);
  void set_sequence(const SequenceValues& values, std::int64_t sequence);
  // Scans start anew.
  void begin_sequence();

  // Instructions for tiles of which all tokens count (or not, masked), in the tensors themselves (or in copies).
  struct Program {
    Buffer<Instruction> code;
  };
  Program link(bool masked, bool copies) const;
  // Chooses whether a direct program's outputs go past the caches, for a chunk that begins at `place` (in bytes).
  void choose_stores(const Program& program, bool masked, std::int64_t place) const;
  // Runs a program on a tile: its number in the chunk, its place in the tensors, and that of the tile to fetch
  // meanwhile.
  void run(const Program& program, int tile, std::int64_t at, std::int64_t ahead) const {
    const Tile where{reinterpret_cast<char*>(masks_.data()) + tile * kTileWords, at, ahead};
    const Instruction* i = program.code.data();
    const simd::F32 a = simd::f32(0.0f);
    i->run(i, &where, a, a, a, a, a, a, a, a);
  }

 private:
  char* tensor(int k) const;
  char* field(int k, bool copies) const;
  Variant variant_of(const TokenInstruction& i, bool masked) const;
  void broadcast(int k, double value);

  struct Line {
    char bytes[64];
  };
  struct Sizes {
    std::int64_t lines = 0;
    int masks = 0, sequence_masks = 0, inputs = 0, outputs = 0;
    int sequence_values = 0;  // with masks, in columns
    explicit Sizes(const TokenStep& step);
  };
  static std::int64_t lines_of(OperandKind kind);

  const TokenStep& step_;
  const float* const* inputs_;
  float* const* outputs_;
  Sizes sizes_;
  Buffer<Line> lines_;
  Buffer<simd::Word> masks_;   // [masks, chunk]
  Buffer<char*> at_;           // the scratch of each operand
  Buffer<std::int64_t> mask_;  // the number of each operand's mask
  Buffer<Tensor> tensors_;     // inputs, outputs
  Buffer<int> of_sequence_;    // operands in columns
};

inline bool on_vectors(const char* p) { return reinterpret_cast<std::uintptr_t>(p) % (simd::kF32 * 4) == 0; }

}  // namespace fastreward::FASTREWARD_ISA::program
