// Programs of the loss language: the order of their parts, and what backward does with the gradients they saved.
//
// A program is a list of passes over the tokens (tokens.cpp, operators in operators.hpp), each followed by
// work per row (sequences.cpp). Everything that a pass needs of a row is known when it begins; the last pass stores the
// outputs, with the aggregation's weights already in them, so that backward with an upstream gradient of 1 is free.
#include "cpu/program/program.hpp"

#include "cpu/program/registers.hpp"
#include "cpu/program/chunks.hpp"

namespace fastreward::FASTREWARD_ISA {
namespace {

using namespace program;
using namespace simd;

void place_inputs(const ProgramCall& call, const RowValues& values) {
  const ProgramCode& code = *call.code;
  for (const Constant& c : code.constants) values.numbers[c.number] = c.value;
  for (int k = 0; k < code.scalars.size; ++k) values.numbers[code.scalars[k]] = call.scalars[k];
  for (int k = 0; k < code.inputs.size; ++k) {
    const ProgramInput& input = code.inputs[k];
    const float* from = call.inputs[k];
    if (input.level == InputLevel::batch) values.numbers[input.place] = static_cast<double>(*from);
    if (input.level != InputLevel::row) continue;
    double* column = values.column(input.place);
    for (std::int64_t row = 0; row < values.rows; ++row) column[row] = static_cast<double>(from[row]);
  }
}

void write_results(const ProgramCall& call, const RowValues& values) {
  const ProgramCode& code = *call.code;
  for (int k = 0; k < code.outputs.size; ++k) {
    if (code.outputs[k] == kTokenOutput) continue;
    for (std::int64_t row = 0; row < values.rows; ++row)
      call.outputs[k][row] = static_cast<float>(values.at(code.outputs[k], row));
  }
  for (int k = 0; k < code.batch.size; ++k) call.batch[k] = static_cast<float>(values.numbers[code.batch[k]]);
}

// f(row, first token, tokens, mask bytes or nullptr, whether to write past the caches) for pieces of the rows.
template <class F>
void for_pieces(const ProgramTokens& t, int threads, const F& f) {
  const ProgramTokens unmasked{t.rows, t.columns, t.cu_seqlens, {}};
  const Items items(unmasked, threads);
  struct Worker {
    const ProgramTokens& tokens;
    const Items& items;
    const F& f;
    bool large;
    std::uint8_t bytes[kProgramItem];
    void run(std::int64_t first, std::int64_t last) {
      std::int64_t row = items.row_of(first);
      for (std::int64_t i = first; i < last; ++i) {
        while (items.first(row + 1) <= i) ++row;
        const Item item = items.item(i, row);
        f(row, item.begin, item.tokens, mask_block(tokens.mask, item.begin, item.tokens, bytes), large);
      }
    }
  };
  const bool large = past_caches(t);
  for_chunks(items, threads, [&] { return Worker{t, items, f, large, {}}; });
}

// Vectors whole(i), and rest(i) for what is left. What goes past the caches, for_chunks fences.
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
  const std::int64_t rows = call.sides[0].rows;
  const Buffer<double> numbers(code.numbers), columns(code.columns * rows);
  const RowValues values{numbers.data(), columns.data(), rows};
  const RowGroups groups{call.groups, call.group_count};
  const ProgramTokens none;
  const Items first(call.sides[0], call.threads), second(code.sides > 1 ? call.sides[1] : none, call.threads);
  place_inputs(call, values);
  run_rows(code.prologue, values, groups);
  for (const ProgramStage& stage : code.stages) {
    for (const TokenStep& step : stage.tokens) run_tokens(call, step, step.side == 0 ? first : second, values);
    run_rows(stage.rows, values, groups);
  }
  write_results(call, values);
}

void program_scale(const ProgramTokens& t, const float* saved, const float* row_weight, float factor, float* out,
                   int threads) {
  for_pieces(t, threads, [&](std::int64_t row, std::int64_t begin, int n, const std::uint8_t*, bool large) {
    const F32 zero = f32(0.0f), by = f32(row_weight == nullptr ? factor : row_weight[row] * factor);
    const float* x = saved + begin;
    const auto scaled = [&](F32 v) { return select(v == zero, zero, v * by); };
    const auto whole = [&](int i) { return scaled(load(x + i)); };
    write_piece(out + begin, n, large, whole, [&](int i) { return scaled(load_n(x + i, n - i, 0.0f)); });
  });
}

void program_spread(const ProgramTokens& t, const float* row_values, float factor, float* out, int threads) {
  for_pieces(t, threads, [&](std::int64_t row, std::int64_t begin, int n, const std::uint8_t* bytes, bool large) {
    const F32 zero = f32(0.0f), value = f32(row_values[row] == 0.0f ? 0.0f : row_values[row] * factor);
    const auto whole = [&](int i) { return bytes == nullptr ? value : select(nonzero(bytes + i), value, zero); };
    write_piece(out + begin, n, large, whole, [&](int i) {
      return select(bytes == nullptr ? first32(n - i) : nonzero_n(bytes + i, n - i), value, zero);
    });
  });
}

}  // namespace fastreward::FASTREWARD_ISA
