// Programs over the tokens of one sequence at a time, which a caller makes block by block; sums have the structure that
// tokens.cpp gives them.
#include "cpu/program/totals.hpp"

namespace fastreward::FASTREWARD_ISA::program {

using namespace simd;

struct BlockProgram::Linked {
  Linked(const ProgramCode& of, const double* scalars, const float* const* from, float* const* to)
      : code(of),
        inputs(from),
        outputs(to),
        step(of.stages[0].tokens[0]),
        registers(step, from, to),
        totals(registers),
        direct(registers.link(false, false)),
        masked(registers.link(true, false)),
        numbers(code.numbers),
        columns(code.columns),
        sums(step.reductions.size),
        chunk(step.reductions.size),
        values{numbers.data(), columns.data(), 1} {
    for (const Constant& c : code.constants) numbers[c.number] = c.value;
    for (int k = 0; k < code.scalars.size; ++k) numbers[code.scalars[k]] = scalars[k];
    registers.set_numbers(numbers.data());
  }

  const ProgramCode& code;
  const float* const* inputs;
  float* const* outputs;
  const TokenStep& step;
  Registers registers;
  Totals totals;
  Registers::Program direct, masked;
  Buffer<double> numbers, columns, sums, chunk;
  SequenceValues values;
  std::int64_t tokens = 0;
};

BlockProgram::BlockProgram(const ProgramCode& code, const double* scalars, const float* const* inputs,
                           float* const* outputs)
    : linked_(new Linked(code, scalars, inputs, outputs)) {}

BlockProgram::~BlockProgram() { delete linked_; }

void BlockProgram::begin() {
  Linked& l = *linked_;
  for (int k = 0; k < l.code.inputs.size; ++k)
    if (l.code.inputs[k].level == InputLevel::sequence)
      *l.values.column(l.code.inputs[k].place) = static_cast<double>(*l.inputs[k]);
  run_sequences(l.code.prologue, l.values, {nullptr, 0});
  l.registers.set_sequence(l.values, 0);
  for (int k = 0; k < l.step.reductions.size; ++k) l.sums[k] = neutral_of(l.step.reductions[k].kind);
  l.tokens = 0;
}

void BlockProgram::block(int n) {
  Linked& l = *linked_;
  l.totals.reset();
  const int tiles = (n + kTile - 1) / kTile;
  for (int tile = 0; tile < tiles; ++tile) {
    const int left = n - tile * kTile;
    const std::int64_t at = tile * kTileBytes;
    if (left >= kTile) {
      for (int v = 0; v < kTileVectors; ++v) l.registers.valid()[tile * kTileVectors + v] = kAllLanes;
      l.registers.run(l.direct, tile, at, at);
    } else {
      for (int v = 0; v < kTileVectors; ++v) {
        const int of = left - v * kF32;
        l.registers.valid()[tile * kTileVectors + v] =
            of >= kF32 ? kAllLanes : of > 0 ? word(first32(of)) : Word{0};
      }
      l.registers.run(l.masked, tile, at, at);
    }
    if (tile % kRun == kRun - 1) l.totals.flush();
  }
  l.totals.flush();
  run_masks(l.registers, tiles, false);
  l.totals.write(l.chunk.data());
  for (int k = 0; k < l.step.reductions.size; ++k) {
    const ReductionKind kind = l.step.reductions[k].kind;
    if (kind != ReductionKind::tokens) l.sums[k] = together(l.sums[k], l.chunk[k], kind);
  }
  l.tokens += n;
}

void BlockProgram::end() {
  Linked& l = *linked_;
  for (int k = 0; k < l.step.reductions.size; ++k) {
    const Reduction& r = l.step.reductions[k];
    *l.values.column(r.out) = r.kind == ReductionKind::tokens ? static_cast<double>(l.tokens) : l.sums[k];
  }
  run_sequences(l.code.stages[0].sequences, l.values, {nullptr, 0});
  for (int k = 0; k < l.code.outputs.size; ++k)
    if (l.code.outputs[k] != kTokenOutput)
      l.outputs[k][0] = static_cast<float>(l.values.at(l.code.outputs[k], 0));
}

}  // namespace fastreward::FASTREWARD_ISA::program
