// One pass of a program over the tokens of a side.
//
// Threads take items of 2048 tokens; an item goes through the instructions in blocks that stay in L1. A block whose tokens
// all count reads the inputs where they are; of others a copy is made, with 0 for what does not count, so that NaN or inf
// there leaks nowhere; blocks without a counted token are not read at all. While a block is computed the next one is
// fetched. Sums have a fixed structure: lane = position in the row modulo the vector, float over kRun vectors, float64
// above that, items in order. Padding on the right adds exact zeros, and the number of threads changes nothing.
#include <limits>

#include "cpu/program_items.hpp"

namespace fastreward::FASTREWARD_ISA::program {
namespace {

using namespace simd;

constexpr double kInf = std::numeric_limits<double>::infinity();
// Outputs of this size are written past the caches, which saves reading their old lines first.
constexpr std::int64_t kStreamBytes = std::int64_t{4} << 20;

std::int64_t on_lines(std::int64_t bytes) { return (bytes + 63) / 64 * 64; }

bool writes(const TokenStep& step) {
  for (const TokenOperand& o : step.operands)
    if (o.kind == OperandKind::output) return true;
  return false;
}

// ------------------------------------------------------------------------------------------------------ the frame
// Where the operands of a step lie in a thread's scratch.
std::int64_t bytes_of(const TokenOperand& o) {
  switch (o.kind) {
    case OperandKind::row_value: return on_lines(kF32 * 4);
    case OperandKind::row_mask: return on_lines(kBlockVectors * static_cast<std::int64_t>(sizeof(Word)));
    case OperandKind::input: return kBlock * 4;  // the copy
    case OperandKind::reduction: return sizeof(Accumulator);
    default: return 0;
  }
}

constexpr std::int64_t kMaskSlotBytes = (kBlockVectors * static_cast<std::int64_t>(sizeof(Word)) + 63) / 64 * 64;

std::int64_t frame_bytes(const TokenStep& step) {
  std::int64_t bytes = step.slots * kBlock * 4 + step.mask_slots * kMaskSlotBytes;
  for (const TokenOperand& o : step.operands) bytes += bytes_of(o);
  return bytes;
}

struct Bound {
  Kernel kernel;
  const TokenInstruction* instruction;
};

Kernel bind(const TokenStep& step, const TokenInstruction& i) {
  const auto fixed = [&](int operand, unsigned bit) {
    return operand >= 0 && step.operands[operand].kind == OperandKind::row_value ? bit : 0u;
  };
  if (i.op == TokenOp::k_reduce)
    return kernel_of(i.op, (i.out >= 0 ? 1u : 0u) | (i.second >= 0 ? 2u : 0u) | (i.third >= 0 ? 4u : 0u));
  return kernel_of(i.op, fixed(i.a, 1) | fixed(i.b, 2) | fixed(i.c, 4) | fixed(i.d, 8));
}

void reset(Accumulator& into, ReductionKind kind) {
  into.nan = false;
  const float neutral = static_cast<float>(kind == ReductionKind::minimum ? kInf : -kInf);
  if (kind == ReductionKind::sum)
    for (double& x : into.sum) x = 0.0;
  else if (kind == ReductionKind::minimum || kind == ReductionKind::maximum)
    for (float& x : into.extreme) x = neutral;
  else
    into.count = 0;
}

double value_of(const Accumulator& from, ReductionKind kind) {
  if (from.nan) return std::numeric_limits<double>::quiet_NaN();
  switch (kind) {
    case ReductionKind::sum: return sum(load(from.sum) + load(from.sum + kF64));
    case ReductionKind::minimum: return static_cast<double>(minimum(load(from.extreme)));
    case ReductionKind::maximum: return static_cast<double>(maximum(load(from.extreme)));
    default: return static_cast<double>(from.count);
  }
}

// ---------------------------------------------------------------------------------------------------------- a pass
// Everything that the threads share.
struct Pass {
  const ProgramCall& call;
  const TokenStep& step;
  const ProgramTokens& tokens;
  const RowValues& values;
  const Items& items;
  const Bound* instructions;
  double* sums;  // [items, reductions]
  bool large;
};

// Fetches the inputs of the next block, a few lines after each instruction.
class Ahead {
 public:
  Ahead(const char* const* inputs, int count, const Block* block, int steps) : inputs_(inputs), count_(count) {
    if (block == nullptr) return;
    offset_ = block->begin * 4;
    bytes_ = block->tokens * 4;
    const std::int64_t lines = (bytes_ + 63) / 64 * count_;
    quota_ = static_cast<int>((lines + steps - 1) / steps);
  }
  void some() {
    for (int k = 0; k < quota_; ++k) {
      if (input_ == count_) return;
      __builtin_prefetch(inputs_[input_] + offset_ + at_);
      at_ += 64;
      if (at_ >= bytes_) at_ = 0, ++input_;
    }
  }

 private:
  const char* const* inputs_;
  int count_, input_ = 0, quota_ = 0;
  std::int64_t offset_ = 0, bytes_ = 0, at_ = 0;
};

class Worker {
 public:
  explicit Worker(const Pass& pass)
      : p_(pass),
        frame_(frame_bytes(pass.step) / 64 + 1),
        at_(pass.step.operands.size),
        copies_(pass.step.operands.size),
        inputs_(pass.step.operands.size),
        outputs_(pass.step.operands.size) {
    lay_out();
  }

  void run(std::int64_t first, std::int64_t last) {
    const auto skipped = [this](std::int64_t begin, std::int64_t n) { write_zeros(begin, n); };
    BlockCursor<decltype(skipped)> cursor(p_.tokens, p_.items, first, last, skipped);
    std::int64_t open = first;
    reset_sums();
    Block* block = &blocks_[0];
    Block* next = &blocks_[1];
    for (bool more = cursor.next(*block); more;) {
      more = cursor.next(*next);
      for (; open < block->item; ++open) close(open);
      enter(block->row);
      run(*block, more ? next : nullptr);
      Block* const done = block;
      block = next;
      next = done;
    }
    for (; open < last; ++open) close(open);
  }

 private:
  struct Line {
    char bytes[64];
  };

  void lay_out() {
    const TokenStep& step = p_.step;
    char* slots = frame_.data()->bytes;
    char* masks = slots + static_cast<std::int64_t>(step.slots) * kBlock * 4;
    char* rest = masks + step.mask_slots * kMaskSlotBytes;
    for (int k = 0; k < step.operands.size; ++k) {
      const TokenOperand& o = step.operands[k];
      char* own = rest;
      rest += bytes_of(o);
      copies_[k] = at_[k] = own;
      if (o.kind == OperandKind::slot) at_[k] = slots + static_cast<std::int64_t>(o.index) * kBlock * 4;
      if (o.kind == OperandKind::mask_slot) at_[k] = masks + o.index * kMaskSlotBytes;
      if (o.kind == OperandKind::input) inputs_[input_count_++] = reinterpret_cast<const char*>(p_.call.inputs[o.index]);
      if (o.kind == OperandKind::output) outputs_[output_count_++] = p_.call.outputs[o.index];
      if (o.kind == OperandKind::row_value || o.kind == OperandKind::row_mask) {
        if (o.index >= 0) broadcast(k, p_.values.numbers[o.index]);
      }
    }
  }

  void broadcast(int operand, double value) {
    if (p_.step.operands[operand].kind == OperandKind::row_value) {
      store(static_cast<float*>(at_[operand]), f32(static_cast<float>(value)));
      return;
    }
    Word* words = static_cast<Word*>(at_[operand]);
    for (int v = 0; v < kBlockVectors; ++v) words[v] = value != 0.0 ? kAllLanes : Word{0};
  }

  void enter(std::int64_t row) {
    if (row == row_) return;
    row_ = row;
    for (int k = 0; k < p_.step.operands.size; ++k) {
      const TokenOperand& o = p_.step.operands[k];
      if ((o.kind == OperandKind::row_value || o.kind == OperandKind::row_mask) && o.index < 0)
        broadcast(k, p_.values.at(o.index, row));
    }
  }

  void run(const Block& block, const Block* next) {
    const TokenStep& step = p_.step;
    Frame frame{at_.data(), block.vectors, block.tokens, block.every ? nullptr : block.words, false};
    for (int k = 0, in = 0, out = 0; k < step.operands.size; ++k) {
      const OperandKind kind = step.operands[k].kind;
      if (kind == OperandKind::input) {
        float* const from = const_cast<float*>(reinterpret_cast<const float*>(inputs_[in++])) + block.begin;
        at_[k] = from;
        if (!block.every) at_[k] = copies_[k], copy(block, from, static_cast<float*>(copies_[k]));
      } else if (kind == OperandKind::output) {
        float* const to = outputs_[out++] + block.begin;
        at_[k] = to;
        frame.streamed = p_.large && block.every && aligned(to);
      }
    }
    counted_ += block.counted;
    Ahead ahead(inputs_.data(), input_count_, next, step.instructions.size);
    for (int k = 0; k < step.instructions.size; ++k) {
      p_.instructions[k].kernel(*p_.instructions[k].instruction, frame);
      ahead.some();
    }
  }

  static bool aligned(const float* p) {
    return reinterpret_cast<std::uintptr_t>(p) % (static_cast<std::uintptr_t>(kF32) * sizeof(float)) == 0;
  }

  static void copy(const Block& block, const float* from, float* to) {
    const F32 zero = f32(0.0f);
    const int whole = block.tokens / kF32;
    for (int v = 0; v < whole; ++v) store(to + v * kF32, select(lanes(block.words[v]), load(from + v * kF32), zero));
    if (whole == block.vectors) return;
    const F32 tail = load_n(from + whole * kF32, block.tokens - whole * kF32, 0.0f);
    store(to + whole * kF32, select(lanes(block.words[whole]), tail, zero));
  }

  void write_zeros(std::int64_t begin, std::int64_t n) {
    for (int k = 0; k < output_count_; ++k) {
      float* to = outputs_[k] + begin;
      std::int64_t i = 0;
      if (p_.large && aligned(to))
        for (; i + kF32 <= n; i += kF32) stream(to + i, f32(0.0f));
      for (; i + kF32 <= n; i += kF32) store(to + i, f32(0.0f));
      if (i < n) store_n(to + i, f32(0.0f), static_cast<int>(n - i));
    }
  }

  void reset_sums() {
    counted_ = 0;
    for (int k = 0; k < p_.step.operands.size; ++k) {
      const TokenOperand& o = p_.step.operands[k];
      if (o.kind == OperandKind::reduction)
        reset(*static_cast<Accumulator*>(at_[k]), p_.step.reductions[o.index].kind);
    }
  }

  // Puts the sums of an item away.
  void close(std::int64_t item) {
    const Span<Reduction>& reductions = p_.step.reductions;
    double* sums = p_.sums + item * reductions.size;
    for (int k = 0; k < reductions.size; ++k)
      if (reductions[k].kind == ReductionKind::tokens) sums[k] = static_cast<double>(counted_);
    for (int k = 0; k < p_.step.operands.size; ++k) {
      const TokenOperand& o = p_.step.operands[k];
      if (o.kind == OperandKind::reduction)
        sums[o.index] = value_of(*static_cast<Accumulator*>(at_[k]), reductions[o.index].kind);
    }
    reset_sums();
  }

  const Pass& p_;
  Buffer<Line> frame_;
  Buffer<void*> at_, copies_;
  Buffer<const char*> inputs_;
  Buffer<float*> outputs_;
  int input_count_ = 0, output_count_ = 0;
  std::int64_t row_ = -1, counted_ = 0;
  Block blocks_[2];
};

double together(double x, double y, ReductionKind kind) {
  if (kind == ReductionKind::minimum) return y < x || y != y ? y : x;
  if (kind == ReductionKind::maximum) return y > x || y != y ? y : x;
  return x + y;
}

// From items to rows, in order.
void fold(const Pass& pass) {
  const Span<Reduction>& reductions = pass.step.reductions;
  for (int k = 0; k < reductions.size; ++k) {
    const ReductionKind kind = reductions[k].kind;
    double* column = pass.values.column(reductions[k].out);
    const double neutral = kind == ReductionKind::minimum ? kInf : kind == ReductionKind::maximum ? -kInf : 0.0;
    for (std::int64_t row = 0; row < pass.values.rows; ++row) {
      double x = neutral;
      for (std::int64_t i = pass.items.first(row); i < pass.items.first(row + 1); ++i)
        x = together(x, pass.sums[i * reductions.size + k], kind);
      column[row] = x;
    }
  }
}

// ------------------------------------------------------------------------------------------------------- counting
int count_bytes(const std::uint8_t* bytes, int n) {
  constexpr int kStep = 128;  // so short that a byte can count it: the compiler then adds bytes, not integers
  int counted = 0, i = 0;
  for (; i + kStep <= n; i += kStep) {
    std::uint8_t step = 0;
    for (int j = 0; j < kStep; ++j) step = static_cast<std::uint8_t>(step + (bytes[i + j] != 0));
    counted += step;
  }
  for (; i < n; ++i) counted += bytes[i] != 0;
  return counted;
}

void count_rows(const ProgramTokens& t, double* lengths, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1 && size_of(t) > 32 * kProgramItem)
  {
    std::uint8_t buffer[kProgramItem];
#pragma omp for schedule(static)
    for (std::int64_t row = 0; row < t.rows; ++row) {
      const std::int64_t length = length_of(t, row);
      std::int64_t counted = t.mask.kind == MaskKind::none ? length : 0;
      for (std::int64_t c = 0; c < length && t.mask.kind != MaskKind::none; c += kProgramItem) {
        const int n = static_cast<int>(length - c < kProgramItem ? length - c : kProgramItem);
        counted += count_bytes(mask_block(t.mask, begin_of(t, row) + c, n, buffer), n);
      }
      lengths[row] = static_cast<double>(counted);
    }
  }
}

}  // namespace

void run_tokens(const ProgramCall& call, const TokenStep& step, const RowValues& values) {
  const ProgramTokens& t = call.sides[step.side];
  if (step.instructions.size == 0) {  // nothing but the number of counted tokens
    for (const Reduction& r : step.reductions) count_rows(t, values.column(r.out), call.threads);
    return;
  }
  const Items items(t);
  const Buffer<Bound> instructions(step.instructions.size);
  for (int k = 0; k < step.instructions.size; ++k)
    instructions[k] = {bind(step, step.instructions[k]), &step.instructions[k]};
  const Buffer<double> sums(items.count() * step.reductions.size);
  const bool large = writes(step) && size_of(t) * 4 >= kStreamBytes;
  const Pass pass{call, step, t, values, items, instructions.data(), sums.data(), large};
  for_chunks(items.count(), call.threads, [&] { return Worker(pass); });
  fold(pass);
}

}  // namespace fastreward::FASTREWARD_ISA::program
