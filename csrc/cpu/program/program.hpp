// Programs of the loss language on the CPU (fastreward/language/program.py): passes over the tokens, tile by tile, and
// between them work on one value per sequence or per batch. fastreward/cpu/program/encode.py makes the instructions.
#pragma once

#include <cstdint>

#include "cpu/common/isa.hpp"
#include "cpu/common/mask.hpp"

// Operators of one number: name, value of a vector `a` of f32 (cpu/simd/), value of a double `x` (sequences.cpp).
#define FASTREWARD_UNARY(X)             \
  X(neg, -a, -x)                        \
  X(abs, abs(a), std::fabs(x))          \
  X(sign, sign(a), sign_of(x))          \
  X(sqrt, sqrt(a), std::sqrt(x))        \
  X(exp, exp(a), std::exp(x))           \
  X(expm1, expm1(a), std::expm1(x))     \
  X(log, log(a), log_of(x))             \
  X(log1p, log1p(a), std::log1p(x))     \
  X(tanh, tanh(a), std::tanh(x))        \
  X(log1mexp, select(a > f32(-0.5f), log(-expm1(a)), log1p(-exp(a))),            \
    x > -0.5 ? log_of(-std::expm1(x)) : std::log1p(-std::exp(x)))                \
  X(sigmoid, sigmoid(a), sigmoid_of(x)) \
  X(logsigmoid, logsigmoid(a), logsigmoid_of(x))

// Operators of a machine whose accumulator a is a tile of tokens (eight vectors, in registers). Their names are what
// the Python side says. x, y, z are the instruction's operands; what an elementwise name means is in
// fastreward/language/ops.py. Those up to `maximum` may start from operand w instead of a (of two arguments: not from a
// sequence's value), those up to `maximum_where` may keep their result in slot k.
//   load                       a = w
//   keep, store                slot k = a; output x = a
//   exp_bounded                exp where |a| <= 87 is known
//   from, over                 x - a, x / a
//   fma, fms, fnma             a * x + y, a * x - y, y - a * x, rounded once
//   add_product, sub_product   a + x * y, a - x * y, rounded once
//   clip_outside               mask z = outside(a, x, y); a = clip(a, x, y)
//   lt ... ne, outside         mask z; lt_and ... also & mask y
//   sides                      mask z = a < x, the mask after it = a > y
//   where, where_not           a where mask z, else x; x where mask z, else a
//   minimum_where, maximum_where   that of a and x where mask z, else a
//   drop, drop2, drop3         0 where mask z (or y, or w), else a; drop_store ...: the same, and output x = a
//   and, or, not               mask z of masks x, y
//   scan, shift                a + x * scan at the token before (carry y has it); a of the token before; _reverse: after
//   (from here on reductions)
//   sum, least, most           adds a to sum, minimum, maximum x; extremes: to minimum x and maximum y
//   sum_extremes               the same to sum x, minimum y, maximum z, for an a that is never -inf
#define FASTREWARD_TOKEN_OPERATORS(X)                                                                            \
  X(load) X(exp_bounded) FASTREWARD_UNARY(X)                                                                     \
  X(add) X(sub) X(from) X(mul) X(div) X(over) X(minimum) X(maximum)                                              \
  X(fma) X(fms) X(fnma) X(add_product) X(sub_product) X(clip) X(where) X(where_not)                              \
  X(minimum_where) X(maximum_where)                                                                              \
  X(clip_outside) X(drop) X(drop2) X(drop3) X(keep) X(store) X(drop_store) X(drop2_store) X(drop3_store)         \
  X(lt) X(le) X(gt) X(ge) X(eq) X(ne) X(lt_and) X(le_and) X(gt_and) X(ge_and) X(eq_and) X(ne_and)                \
  X(outside) X(sides) X(and) X(or) X(not)                                                                        \
  X(scan) X(scan_reverse) X(shift) X(shift_reverse)                                                              \
  X(sum) X(least) X(most) X(extremes) X(sum_extremes)
// Operators on the masks of a whole chunk, after its tiles: mask z of masks x, y; count adds the lanes of mask x that
// count to sum z.
#define FASTREWARD_MASK_OPERATORS(X) X(and) X(or) X(not) X(count)
// Operators on columns [sequences] and on single numbers, float64; conditions are 0 and 1.
#define FASTREWARD_SEQUENCE_OPERATORS(X)                                                         \
  FASTREWARD_UNARY(X)                                                                            \
  X(add) X(sub) X(mul) X(div) X(minimum) X(maximum) X(clip) X(where)                             \
  X(lt) X(le) X(gt) X(ge) X(eq) X(ne) X(and) X(or) X(not) X(outside)                             \
  X(group_sum) X(group_max) X(group_min) X(group_sum_before) X(group_sum_after)                  \
  X(group_sum_others) X(batch_sum) X(batch_max) X(batch_min) X(batch_permute)

namespace fastreward {

#define FASTREWARD_ENUMERATOR(name, ...) k_##name,
enum class TokenOp : int { FASTREWARD_TOKEN_OPERATORS(FASTREWARD_ENUMERATOR) };
enum class MaskOp : int { FASTREWARD_MASK_OPERATORS(FASTREWARD_ENUMERATOR) };
enum class SequenceOp : int { FASTREWARD_SEQUENCE_OPERATORS(FASTREWARD_ENUMERATOR) };
#undef FASTREWARD_ENUMERATOR

// Tokens of a thread's unit of work and of the sums' structure: a sequence is cut into chunks of this many.
constexpr std::int64_t kProgramChunk = 2048;

template <class T>
struct Span {
  const T* data = nullptr;
  int size = 0;

  const T& operator[](int i) const { return data[i]; }
  const T* begin() const { return data; }
  const T* end() const { return data + size; }
};

// Where a value per sequence or per batch lies: i >= 0: number i, i < 0: column ~i.
using SequencePlace = int;

struct SequenceInstruction {
  SequenceOp op;
  SequencePlace out, a, b, c;
};

// What an operand of a token instruction is. index: of the slot, mask, reduction, the call's inputs or outputs; or the
// SequencePlace of a value that is the same for all tokens of a sequence (coefficient: in f64). carry: what a scan hands
// on from tile to tile.
enum class OperandKind : int {
  slot, mask, sequence_value, sequence_mask, input, output, reduction, coefficient, carry
};
struct TokenOperand {
  OperandKind kind;
  int index;
};

// Fields are positions in the step's operands, -1: none.
struct TokenInstruction {
  TokenOp op;
  int w, x, y, z, k;
};
struct MaskInstruction {
  MaskOp op;
  int x, y, z;
};

// tokens: how many count, and no instruction adds to it.
enum class ReductionKind : int { sum, minimum, maximum, count, tokens };
struct Reduction {
  ReductionKind kind;
  SequencePlace out;
};

// scans: with instructions that take a sequence's tokens in order; reverse: from its end.
struct TokenStep {
  int side = 0;
  bool scans = false, reverse = false;
  Span<TokenOperand> operands;
  Span<TokenInstruction> tile;
  Span<MaskInstruction> chunk;
  Span<Reduction> reductions;
};

struct ProgramStage {
  Span<TokenStep> tokens;
  Span<SequenceInstruction> sequences;
};

enum class InputLevel : int { batch = 1, sequence = 2, token = 3 };
struct ProgramInput {
  InputLevel level;
  SequencePlace place;  // of a sequence's or the batch's
};

struct Constant {
  int number;
  double value;
};

// outputs: the place of a value per sequence; kTokenOutput: the last passes write it.
constexpr SequencePlace kTokenOutput = INT32_MAX;
struct ProgramCode {
  int sides = 1;
  int numbers = 0, columns = 0;
  Span<Constant> constants;
  Span<int> scalars;  // the numbers that the call's scalars go to
  Span<ProgramInput> inputs;
  Span<SequenceInstruction> prologue;
  Span<ProgramStage> stages;
  Span<SequencePlace> outputs;
  Span<SequencePlace> batch;
};

// Token arrays are [sequences, columns] (padded), or [cu_seqlens[sequences]] (packed; columns is not used).
struct ProgramTokens {
  std::int64_t sequences = 0;
  std::int64_t columns = 0;
  const std::int64_t* cu_seqlens = nullptr;  // [sequences + 1]
  MaskView mask;
};

struct ProgramCall {
  const ProgramCode* code = nullptr;
  const ProgramTokens* sides = nullptr;
  const float* const* inputs = nullptr;   // one per code.inputs
  const double* scalars = nullptr;        // one per code.scalars
  const std::int64_t* groups = nullptr;   // [sequences], numbers in [0, group_count)
  std::int64_t group_count = 0;
  float* const* outputs = nullptr;        // one per code.outputs
  float* batch = nullptr;                 // [code.batch]
  int threads = 1;
};

}  // namespace fastreward

FASTREWARD_DECLARE(
    void program_run(const ::fastreward::ProgramCall& call);
    // The largest of the valid tokens' x up to which their mean is below `bound`; the smallest where that of none is.
    // share: the smallest of the floor(bound * count) largest, at least of one. inf where there are none.
    float program_threshold(const ::fastreward::ProgramTokens& tokens, const float* x, double bound, bool share,
                            int threads);
    // out = saved * weight[sequence] * factor; weight may be nullptr. A 0 in `saved` stays 0.
    void program_scale(const ::fastreward::ProgramTokens& tokens, const float* saved, const float* weight,
                       float factor, float* out, int threads);
    // out = values[sequence] * factor on valid tokens, 0 elsewhere
    void program_broadcast_to_tokens(const ::fastreward::ProgramTokens& tokens, const float* values, float factor,
                                     float* out, int threads);)
