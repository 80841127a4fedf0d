// What the parts of the program evaluator share. For csrc/cpu/program/ only.
#pragma once

#include <cstddef>
#include <new>

#include "cpu/program/program.hpp"

namespace fastreward::FASTREWARD_ISA::program {

// An uninitialised array on cache lines, for scratch of one call. (Not a standard container: their inline functions
// would be compiled for one instruction set and linked into all.)
template <class T>
class Buffer {
 public:
  explicit Buffer(std::int64_t size)
      : data_(static_cast<T*>(::operator new(static_cast<std::size_t>(size > 0 ? size : 1) * sizeof(T), kLine))) {}
  ~Buffer() { ::operator delete(data_, kLine); }
  Buffer(Buffer&& other) noexcept : data_(other.data_) { other.data_ = nullptr; }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* data() const { return data_; }
  T& operator[](std::int64_t i) const { return data_[i]; }

 private:
  static constexpr std::align_val_t kLine{64};
  T* data_;
};

// The values per sequence and for the batch, in float64.
struct SequenceValues {
  double* numbers;  // [code.numbers]
  double* columns;  // [code.columns, sequences]
  std::int64_t sequences;

  bool is_column(SequencePlace p) const { return p < 0; }
  double* column(SequencePlace p) const { return columns + static_cast<std::int64_t>(~p) * sequences; }
  double at(SequencePlace p, std::int64_t sequence) const { return p < 0 ? column(p)[sequence] : numbers[p]; }
};

// Groups of sequences: each one's number.
struct SequenceGroups {
  const std::int64_t* of_sequence;
  std::int64_t count;
};

// Runs the instructions in order.
void run_sequences(const Span<SequenceInstruction>& instructions, const SequenceValues& values,
                   const SequenceGroups& groups);

// Runs one pass over the tokens of a side; its reductions go to columns of `values`.
class Chunks;
void run_tokens(const ProgramCall& call, const TokenStep& step, const Chunks& chunks, const SequenceValues& values);

// A program of one pass without reductions and without values per sequence, run for one token at a time (by one
// thread). The numbers are those that the token would have had among others.
class TokenProgram {
 public:
  TokenProgram(const ProgramCode& code, const double* scalars);
  ~TokenProgram();
  TokenProgram(const TokenProgram&) = delete;
  TokenProgram& operator=(const TokenProgram&) = delete;

  void run(const float* const* inputs, float* outputs);

 private:
  struct Linked;
  const ProgramCode& code_;
  Buffer<double> numbers_;
  Linked* linked_;
};

// A program of one pass, without groups, run over the tokens of one sequence after the other by one thread, for callers
// that make the tokens block by block.
class BlockProgram {
 public:
  // inputs, outputs: one per code.inputs, code.outputs; those per token have room for kProgramChunk floats, which the
  // caller fills and reads block by block, those per sequence for one.
  BlockProgram(const ProgramCode& code, const double* scalars, const float* const* inputs, float* const* outputs);
  ~BlockProgram();
  BlockProgram(const BlockProgram&) = delete;
  BlockProgram& operator=(const BlockProgram&) = delete;

  void begin();       // a sequence: its inputs are in place
  void block(int n);  // its next n <= kProgramChunk tokens
  void end();         // writes the outputs per sequence

 private:
  struct Linked;
  Linked* linked_;
};

}  // namespace fastreward::FASTREWARD_ISA::program
