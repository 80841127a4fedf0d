// Programs of the loss language: the order of their parts, and what backward does with the gradients they saved.
//
// A program is a list of passes over the tokens (tokens.cpp, operators in operators.hpp), each followed by
// work per sequence (sequences.cpp). Everything that a pass needs of a sequence is known when it begins; the last pass
// stores the outputs, with the aggregation's weights already in them, so that backward with an upstream gradient of 1
// is free.
#include "cpu/program/program.hpp"

#include "cpu/program/registers.hpp"
#include "cpu/program/chunks.hpp"

namespace fastreward::FASTREWARD_ISA {
namespace {

using namespace program;
using namespace simd;

void place_inputs(const ProgramCall& call, const SequenceValues& values) {
  const ProgramCode& code = *call.code;
  for (const Constant& c : code.constants) values.numbers[c.number] = c.value;
  for (int k = 0; k < code.scalars.size; ++k) values.numbers[code.scalars[k]] = call.scalars[k];
  for (int k = 0; k < code.inputs.size; ++k) {
    const ProgramInput& input = code.inputs[k];
    const float* from = call.inputs[k];
    if (input.level == InputLevel::batch) values.numbers[input.place] = static_cast<double>(*from);
    if (input.level != InputLevel::sequence) continue;
    double* column = values.column(input.place);
    for (std::int64_t sequence = 0; sequence < values.sequences; ++sequence)
      column[sequence] = static_cast<double>(from[sequence]);
  }
}

void write_results(const ProgramCall& call, const SequenceValues& values) {
  const ProgramCode& code = *call.code;
  for (int k = 0; k < code.outputs.size; ++k) {
    if (code.outputs[k] == kTokenOutput) continue;
    for (std::int64_t sequence = 0; sequence < values.sequences; ++sequence)
      call.outputs[k][sequence] = static_cast<float>(values.at(code.outputs[k], sequence));
  }
  for (int k = 0; k < code.batch.size; ++k) call.batch[k] = static_cast<float>(values.numbers[code.batch[k]]);
}

// f(sequence, first token, tokens, mask bytes or nullptr, whether to write past the caches) for pieces of the
// sequences.
template <class F>
void for_pieces(const ProgramTokens& t, int threads, const F& f) {
  const ProgramTokens unmasked{t.sequences, t.columns, t.cu_seqlens, {}};
  const Chunks chunks(unmasked, threads);
  struct Worker {
    const ProgramTokens& tokens;
    const Chunks& chunks;
    const F& f;
    bool large;
    std::uint8_t bytes[kProgramChunk];
    void run(std::int64_t first, std::int64_t last) {
      std::int64_t sequence = chunks.sequence_of(first);
      for (std::int64_t i = first; i < last; ++i) {
        while (chunks.first(sequence + 1) <= i) ++sequence;
        const Chunk chunk = chunks.chunk(i, sequence);
        f(sequence, chunk.begin, chunk.tokens, mask_block(tokens.mask, chunk.begin, chunk.tokens, bytes), large);
      }
    }
  };
  const bool large = past_caches(t);
  for_chunk_ranges(chunks, threads, [&] { return Worker{t, chunks, f, large, {}}; });
}

// Vectors whole(i), and rest(i) for what is left. What goes past the caches, for_chunk_ranges fences.
template <class Whole, class Rest>
void write_piece(float* to, int n, bool large, const Whole& whole, const Rest& rest) {
  int i = 0;
  if (large && on_vectors(reinterpret_cast<const char*>(to)))
    for (; i + kF32 <= n; i += kF32) stream(to + i, whole(i));
  else
    for (; i + kF32 <= n; i += kF32) store(to + i, whole(i));
  if (i < n) store_n(to + i, rest(i), n - i);
}

}  // namespace

// -------------------------------------------------------------------------------------------------------- launchers
void program_run(const ProgramCall& call) {
  const ProgramCode& code = *call.code;
  const std::int64_t sequences = call.sides[0].sequences;
  const Buffer<double> numbers(code.numbers), columns(code.columns * sequences);
  const SequenceValues values{numbers.data(), columns.data(), sequences};
  const SequenceGroups groups{call.groups, call.group_count};
  const ProgramTokens none;
  const Chunks first(call.sides[0], call.threads), second(code.sides > 1 ? call.sides[1] : none, call.threads);
  place_inputs(call, values);
  run_sequences(code.prologue, values, groups);
  for (const ProgramStage& stage : code.stages) {
    for (const TokenStep& step : stage.tokens) run_tokens(call, step, step.side == 0 ? first : second, values);
    run_sequences(stage.sequences, values, groups);
  }
  write_results(call, values);
}

void program_scale(const ProgramTokens& t, const float* saved, const float* weight, float factor, float* out,
                   int threads) {
  for_pieces(t, threads, [&](std::int64_t sequence, std::int64_t begin, int n, const std::uint8_t*, bool large) {
    const F32 zero = f32(0.0f), by = f32(weight == nullptr ? factor : weight[sequence] * factor);
    const float* x = saved + begin;
    const auto scaled = [&](F32 v) { return select(v == zero, zero, v * by); };
    const auto whole = [&](int i) { return scaled(load(x + i)); };
    write_piece(out + begin, n, large, whole, [&](int i) { return scaled(load_n(x + i, n - i, 0.0f)); });
  });
}

void program_broadcast_to_tokens(const ProgramTokens& t, const float* values, float factor, float* out, int threads) {
  for_pieces(t, threads, [&](std::int64_t sequence, std::int64_t begin, int n, const std::uint8_t* bytes, bool large) {
    const F32 zero = f32(0.0f), value = f32(values[sequence] == 0.0f ? 0.0f : values[sequence] * factor);
    const auto whole = [&](int i) { return bytes == nullptr ? value : select(nonzero(bytes + i), value, zero); };
    write_piece(out + begin, n, large, whole, [&](int i) {
      return select(bytes == nullptr ? first32(n - i) : nonzero_n(bytes + i, n - i), value, zero);
    });
  });
}

}  // namespace fastreward::FASTREWARD_ISA
