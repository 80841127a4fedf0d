// Programs of the loss language on the CPU (fastreward/losses/_program.py): passes over the tokens in cache-sized blocks,
// and between them work on one value per sequence or per batch. fastreward/cpu/program.py makes the instructions.
#pragma once

#include <cstdint>

#include "common/isa.hpp"
#include "common/mask.hpp"

// Operators on the vectors of a block; their names are what the Python side says. Elementwise ones are explained in
// fastreward/losses/_ops.py; operands are named by the instruction's fields.
//   exp_bounded        exp where |a| <= 87 is known
//   fma, fms, fnma     a * b + c, a * b - c, c - a * b, rounded once
//   drop               0 where mask a, else b
//   mul_drop           0 where mask a, else b * c
//   *_store            the same written to an output instead of a slot, 0 where masked out
//   maximum_lt, minimum_gt   out = maximum(a, b), second = a < b;  out = minimum(a, b), second = a > b
//   clip_parts         out = clip(a, b, c), second = a < b, third = a > c
//   sub_clip           x = a - b; out = clip(x, c, d), second = outside(x, c, d)
//   reduce             adds a to the sums `out`, `second`, `third`: sum, minimum, maximum; any may be missing
//   count              adds the number of lanes of mask a to `out`
#define FASTREWARD_TOKEN_OPERATORS(X)                                                                               \
  X(neg) X(abs) X(sign) X(sqrt) X(exp) X(exp_bounded) X(expm1) X(log) X(log1p) X(tanh) X(sigmoid) X(logsigmoid)     \
  X(add) X(sub) X(mul) X(div) X(minimum) X(maximum) X(fma) X(fms) X(fnma) X(clip) X(where) X(drop) X(mul_drop)      \
  X(lt) X(le) X(eq) X(ne) X(outside) X(and) X(or) X(not)                                                            \
  X(maximum_lt) X(minimum_gt) X(clip_parts) X(sub_clip)                                                             \
  X(reduce) X(count) X(store) X(drop_store) X(mul_store) X(mul_drop_store)
// Operators on columns [rows] and on single numbers, float64; conditions are 0 and 1.
#define FASTREWARD_ROW_OPERATORS(X)                                                                                 \
  X(neg) X(abs) X(sign) X(sqrt) X(exp) X(expm1) X(log) X(log1p) X(tanh) X(sigmoid) X(logsigmoid)                    \
  X(add) X(sub) X(mul) X(div) X(minimum) X(maximum) X(clip) X(where)                                                \
  X(lt) X(le) X(gt) X(ge) X(eq) X(ne) X(and) X(or) X(not) X(outside)                                                \
  X(group_sum) X(group_max) X(group_min) X(group_sum_before) X(group_sum_after)                                     \
  X(batch_sum) X(batch_max) X(batch_min)

namespace fastreward {

#define FASTREWARD_ENUMERATOR(name) k_##name,
enum class TokenOp : int { FASTREWARD_TOKEN_OPERATORS(FASTREWARD_ENUMERATOR) };
enum class RowOp : int { FASTREWARD_ROW_OPERATORS(FASTREWARD_ENUMERATOR) };
#undef FASTREWARD_ENUMERATOR

// Tokens of a thread's unit of work and of the sums' structure: a sequence is cut into items of this many.
constexpr std::int64_t kProgramItem = 2048;

template <class T>
struct Span {
  const T* data = nullptr;
  int size = 0;

  const T& operator[](int i) const { return data[i]; }
  const T* begin() const { return data; }
  const T* end() const { return data + size; }
};

// Where a value per row or per batch lies: i >= 0: number i, i < 0: column ~i.
using RowPlace = int;

struct RowInstruction {
  RowOp op;
  RowPlace out, a, b, c;
};

// What an operand of a token instruction is. index: of the slot, mask slot, reduction, the call's inputs or outputs; or
// the RowPlace of a value that is the same for all tokens of a row.
enum class OperandKind : int { slot, mask_slot, row_value, row_mask, input, output, reduction };
struct TokenOperand {
  OperandKind kind;
  int index;
};

// Fields are positions in the step's operands, -1: none.
struct TokenInstruction {
  TokenOp op;
  int out, second, third, a, b, c, d;
};

// tokens: how many count, and no instruction adds to it.
enum class ReductionKind : int { sum, minimum, maximum, count, tokens };
struct Reduction {
  ReductionKind kind;
  RowPlace out;
};

struct TokenStep {
  int side = 0, slots = 0, mask_slots = 0;
  Span<TokenOperand> operands;
  Span<TokenInstruction> instructions;
  Span<Reduction> reductions;
};

struct ProgramStage {
  Span<TokenStep> tokens;
  Span<RowInstruction> rows;
};

enum class InputLevel : int { batch = 1, row = 2, token = 3 };
struct ProgramInput {
  InputLevel level;
  RowPlace place;  // of a row's or the batch's
};

struct Constant {
  int number;
  double value;
};

// outputs: the place of a value per row; kTokenOutput: the last passes write it.
constexpr RowPlace kTokenOutput = INT32_MAX;
struct ProgramCode {
  int numbers = 0, columns = 0;
  Span<Constant> constants;
  Span<int> scalars;  // the numbers that the call's scalars go to
  Span<ProgramInput> inputs;
  Span<RowInstruction> prologue;
  Span<ProgramStage> stages;
  Span<RowPlace> outputs;
  Span<RowPlace> batch;
};

// Token arrays are [rows, columns] (padded), or [cu_seqlens[rows]] (packed; columns is not used).
struct ProgramTokens {
  std::int64_t rows = 0;
  std::int64_t columns = 0;
  const std::int64_t* cu_seqlens = nullptr;  // [rows + 1]
  MaskView mask;
};

struct ProgramCall {
  const ProgramCode* code = nullptr;
  const ProgramTokens* sides = nullptr;
  const float* const* inputs = nullptr;   // one per code.inputs
  const double* scalars = nullptr;        // one per code.scalars
  const std::int64_t* groups = nullptr;   // [rows], numbers in [0, group_count)
  std::int64_t group_count = 0;
  float* const* outputs = nullptr;        // one per code.outputs
  float* batch = nullptr;                 // [code.batch]
  int threads = 1;
};

}  // namespace fastreward

FASTREWARD_DECLARE(
    void program_run(const ::fastreward::ProgramCall& call);
    // out = saved * row_weight[row] * factor; row_weight may be nullptr. A 0 in `saved` stays 0.
    void program_scale(const ::fastreward::ProgramTokens& tokens, const float* saved, const float* row_weight,
                       float factor, float* out, int threads);
    // out = row_values[row] * factor on counted tokens, 0 elsewhere
    void program_spread(const ::fastreward::ProgramTokens& tokens, const float* row_values, float factor, float* out,
                        int threads);)
