// One pass of a program over the tokens of a side.
//
// Threads take items of 2048 tokens; an item goes through the instructions tile by tile, in registers (see
// program_operators.cpp). Lanes that do not count may hold anything: they are left out of sums and become 0 in outputs,
// and tiles without a counted token are not even read. Conditions that are only counted are kept as bits until the end of
// the item. Sums have a fixed structure: lane = position in the row
// modulo the vector, float over a few tiles, float64 above that, items in order. Padding on the right adds exact zeros, and
// the number of threads changes nothing.
#include <cstring>
#include <initializer_list>
#include <limits>

#include "cpu/program_items.hpp"

namespace fastreward::FASTREWARD_ISA::program {
namespace {

using namespace simd;

constexpr double kInf = std::numeric_limits<double>::infinity();
// Outputs of this size are written past the caches, which saves reading their old lines first.
constexpr std::int64_t kStreamBytes = std::int64_t{4} << 20;
// Inputs are fetched this many tiles ahead: hardware stops at each 4 KiB page of several streams.
constexpr int kAhead = 512 / kTile;

struct Line {
  char bytes[64];
};

// Lines of scratch for an operand that is not a mask.
std::int64_t lines_of(OperandKind kind) {
  switch (kind) {
    case OperandKind::slot:
    case OperandKind::input:
    case OperandKind::output: return kTileBytes / static_cast<std::int64_t>(sizeof(Line));  // a tensor's: at a row's end
    case OperandKind::reduction: return sizeof(Accumulator) / sizeof(Line);
    case OperandKind::row_value: return 1;
    case OperandKind::mask:
    case OperandKind::row_mask: return 0;
  }
  return 0;
}

bool is_mask(OperandKind kind) { return kind == OperandKind::mask || kind == OperandKind::row_mask; }
bool is_row(OperandKind kind) { return kind == OperandKind::row_value || kind == OperandKind::row_mask; }
bool is_tensor(OperandKind kind) { return kind == OperandKind::input || kind == OperandKind::output; }

bool stores(TokenOp op) { return op >= TokenOp::k_store && op <= TokenOp::k_drop3_store; }

struct Sizes {
  std::int64_t lines = 0;
  int masks = 0, row_masks = 0, inputs = 0;
};

Sizes sizes_of(const TokenStep& step) {
  Sizes sizes;
  for (const TokenOperand& o : step.operands) {
    sizes.lines += lines_of(o.kind);
    if (o.kind == OperandKind::mask && o.index >= sizes.masks) sizes.masks = o.index + 1;
    sizes.row_masks += o.kind == OperandKind::row_mask;
    sizes.inputs += o.kind == OperandKind::input;
  }
  return sizes;
}

// An accumulator and the reduction that it is for.
struct Total {
  Accumulator* at;
  ReductionKind kind;
  int index;
};

// Everything that the threads share.
struct Pass {
  const ProgramCall& call;
  const TokenStep& step;
  const RowValues& values;
  const Items& items;
  Sizes sizes;
  double* sums;  // [items, reductions]
  bool large;    // the outputs
};

// ------------------------------------------------------------------------------------------------ a thread's part
class Worker {
 public:
  explicit Worker(const Pass& pass)
      : p_(pass),
        operands_(pass.step.operands),
        lines_(pass.sizes.lines),
        masks_((1 + pass.sizes.masks + pass.sizes.row_masks) * kItemVectors),
        at_(operands_.size),
        mask_(operands_.size),
        totals_(operands_.size),
        with_extremes_(pass.step.tile.size),
        direct_(pass.step.tile.size + pass.sizes.inputs + 1),
        masked_(pass.step.tile.size + pass.sizes.inputs + 1),
        last_(pass.step.tile.size + 1) {
    lay_out();
    find_sums_with_extremes();
    link(direct_.data(), false, false);
    link(masked_.data(), true, false);
    link(last_.data(), true, true);
  }

  void run(std::int64_t first, std::int64_t last) {
    std::int64_t row = p_.items.row_of(first);
    Item item = p_.items.item(first, row), next = item;
    for (std::int64_t i = first; i < last; ++i, item = next) {
      next.end = 0;
      if (i + 1 < last) {
        while (p_.items.first(row + 1) <= i + 1) ++row;
        next = p_.items.item(i + 1, row);
      }
      run(item, next);
    }
  }

 private:
  // ------------------------------------------------------------------------------------------------------ set-up
  void lay_out() {
    Line* line = lines_.data();
    int row_masks = 0;
    for (int k = 0; k < operands_.size; ++k) {
      at_[k] = line->bytes;
      line += lines_of(operands_[k].kind);
      mask_[k] = 1 + operands_[k].index;  // mask 0: the tokens that count
      if (operands_[k].kind == OperandKind::row_mask) mask_[k] = 1 + p_.sizes.masks + row_masks++;
      if (is_row(operands_[k].kind) && operands_[k].index >= 0) broadcast(k, p_.values.numbers[operands_[k].index]);
      if (is_sum(k)) totals_[sum_count_++] = total_of(k);
    }
    total_count_ = sum_count_;
    for (int k = 0; k < operands_.size; ++k)
      if (operands_[k].kind == OperandKind::reduction && !is_sum(k)) totals_[total_count_++] = total_of(k);
  }

  void find_sums_with_extremes() {
    for (const TokenInstruction& i : p_.step.tile)
      if (i.op == TokenOp::k_sum_extremes) with_extremes_[with_extremes_count_++] = &i;
  }

  bool is_sum(int k) const { return operands_[k].kind == OperandKind::reduction && kind_of(k) == ReductionKind::sum; }
  Total total_of(int k) const { return {&accumulator(k), kind_of(k), operands_[k].index}; }

  char* tensor(int k) const {
    if (operands_[k].kind == OperandKind::output) return reinterpret_cast<char*>(p_.call.outputs[operands_[k].index]);
    return const_cast<char*>(reinterpret_cast<const char*>(p_.call.inputs[operands_[k].index]));
  }
  Word* mask(int k) const { return masks_.data() + mask_[k] * kItemVectors; }
  Accumulator& accumulator(int k) const { return *reinterpret_cast<Accumulator*>(at_[k]); }
  ReductionKind kind_of(int k) const { return p_.step.reductions[operands_[k].index].kind; }

  // Makes the instructions; masked: for tiles in which some tokens do not count; copies: of copies of the tensors.
  void link(Instruction* out, bool masked, bool copies) {
    const int wanted = copies ? 0 : p_.sizes.inputs, size = p_.step.tile.size;
    int fetched = 0, input = 0;
    for (int k = 0; k < size; ++k) {
      for (; fetched * size < k * wanted; ++fetched) {  // evenly among the others
        while (operands_[input].kind != OperandKind::input) ++input;
        *out++ = {&fetch, nullptr, tensor(input++), nullptr, 0, nullptr};
      }
      const TokenInstruction& i = p_.step.tile[k];
      *out++ = {operator_of(i.op, variant_of(i, masked)),
                field(i.w, copies),
                field(i.x, copies),
                field(i.y, copies),
                reinterpret_cast<std::int64_t>(field(i.z, copies)),
                field(i.k, copies)};
    }
    *out = {&finish, nullptr, nullptr, nullptr, 0, nullptr};
  }

  char* field(int k, bool copies) const {
    if (k < 0) return nullptr;
    if (is_tensor(operands_[k].kind)) return copies ? at_[k] : tensor(k);
    if (!is_mask(operands_[k].kind)) return at_[k];
    return reinterpret_cast<char*>(mask_[k] * kItemVectors * static_cast<std::int64_t>(sizeof(Word)));
  }

  Variant variant_of(const TokenInstruction& i, bool masked) const {
    const auto place = [&](int k) {
      if (k < 0) return Place::none;
      if (operands_[k].kind == OperandKind::row_value) return Place::row;
      return is_tensor(operands_[k].kind) ? Place::tensor : Place::slot;
    };
    Variant variant;
    variant.w = place(i.w), variant.x = place(i.x), variant.y = place(i.y);
    variant.keeps = i.k >= 0;
    variant.masked = masked;
    return variant;
  }

  void broadcast(int k, double value) {
    if (operands_[k].kind == OperandKind::row_value) {
      store(reinterpret_cast<float*>(at_[k]), f32(static_cast<float>(value)));
      return;
    }
    for (int v = 0; v < kItemVectors; ++v) mask(k)[v] = value != 0.0 ? kAllLanes : Word{0};
  }

  // ---------------------------------------------------------------------------------------------------- an item
  void run(const Item& item, const Item& next) {
    reset_sums();
    if (item.some == 0) write_zeros(item.begin, item.tokens);
    else run_tiles(item, next);
    close(item);
  }

  void run_tiles(const Item& item, const Item& next) {
    if (item.row != row_) enter(item.row);
    if (p_.large && phase_ != item.begin % kF32) choose_stores(item);
    if (!item.full()) place_words(item);
    for (int tile = 0; tile < item.end; ++tile) {
      if ((item.every >> tile & 1) != 0) start(direct_, tile, item.place_of(tile), ahead_of(item, next, tile));
      else if ((item.some >> tile & 1) == 0) write_zeros(item.begin + tile * kTile, kTile);
      else if (item.tokens_of(tile) < kTile) run_last(item, tile);
      else start(masked_, tile, item.place_of(tile), ahead_of(item, next, tile));
      if (tile % kRun == kRun - 1) flush_sums();
    }
    flush_sums();
    const int done = item.end * kTile;
    if (done < item.tokens) write_zeros(item.begin + done, item.tokens - done);
    for (const MaskInstruction& i : p_.step.item) run_masks(i, item);
  }

  // Mask 0: which tokens count.
  void place_words(const Item& item) {
    Word* words = masks_.data();
    const int n = item.tiles * kTileVectors;
    if (item.words != nullptr) {
      std::memcpy(words, item.words, static_cast<std::size_t>(n) * sizeof(Word));
      return;
    }
    for (int v = 0; v < n; ++v) {
      const int left = item.tokens - v * kF32;
      words[v] = left >= kF32 ? kAllLanes : left > 0 ? word(first32(left)) : Word{0};
    }
  }

  // Where the tile lies that will be read kAhead from now; this one where that will not be read.
  static std::int64_t ahead_of(const Item& item, const Item& next, int tile) {
    const int at = tile + kAhead;
    if (at < item.end) return item.place_of(at);
    const int later = at - item.tiles;
    return later >= 0 && later < next.end ? next.place_of(later) : item.place_of(tile);
  }

  void start(const Buffer<Instruction>& code, int tile, std::int64_t at, std::int64_t ahead) const {
    const Tile where{reinterpret_cast<char*>(masks_.data()) + tile * kTileWords, at, ahead};
    const Instruction* i = code.data();
    const F32 a = f32(0.0f);
    i->run(i, &where, a, a, a, a, a, a, a, a);
  }

  void enter(std::int64_t row) {
    row_ = row;
    for (int k = 0; k < operands_.size; ++k)
      if (is_row(operands_[k].kind) && operands_[k].index < 0) broadcast(k, p_.values.at(operands_[k].index, row));
  }

  // Outputs go past the caches where an item's lie on whole vectors, which its place modulo the vector decides.
  void choose_stores(const Item& item) {
    phase_ = item.begin % kF32;
    for (const bool masked : {false, true}) {
      Instruction* i = masked ? masked_.data() : direct_.data();
      for (int k = 0; k < p_.step.tile.size; ++k, ++i) {
        while (i->run == &fetch) ++i;
        if (!stores(p_.step.tile[k].op)) continue;
        Variant variant = variant_of(p_.step.tile[k], masked);
        variant.streamed = aligned(i->x + item.begin * 4);
        i->run = operator_of(p_.step.tile[k].op, variant);
      }
    }
  }

  static bool aligned(const char* p) { return reinterpret_cast<std::uintptr_t>(p) % (kF32 * 4) == 0; }

  // The tile at the end of a row: on copies, as nothing behind the row may be touched.
  void run_last(const Item& item, int tile) {
    const std::int64_t at = item.place_of(tile);
    const auto bytes = static_cast<std::size_t>(item.tokens_of(tile)) * 4;
    for (int k = 0; k < operands_.size; ++k) {
      if (operands_[k].kind != OperandKind::input) continue;
      std::memset(at_[k] + bytes, 0, kTileBytes - bytes);
      std::memcpy(at_[k], tensor(k) + at, bytes);
    }
    start(last_, tile, 0, 0);
    for (int k = 0; k < operands_.size; ++k)
      if (operands_[k].kind == OperandKind::output) std::memcpy(tensor(k) + at, at_[k], bytes);
  }

  void write_zeros(std::int64_t begin, std::int64_t n) const {
    for (int k = 0; k < operands_.size; ++k) {
      if (operands_[k].kind != OperandKind::output) continue;
      float* to = reinterpret_cast<float*>(tensor(k)) + begin;
      std::int64_t i = 0;
      if (p_.large && aligned(reinterpret_cast<const char*>(to)))
        for (; i + kF32 <= n; i += kF32) stream(to + i, f32(0.0f));
      for (; i + kF32 <= n; i += kF32) store(to + i, f32(0.0f));
      if (i < n) store_n(to + i, f32(0.0f), static_cast<int>(n - i));
    }
  }

  void run_masks(const MaskInstruction& i, const Item& item) {
    const int n = item.tiles * kTileVectors;
    const Word *x = mask(i.x), *y = i.y < 0 ? nullptr : mask(i.y);
    Word* z = mask(i.z);
    switch (i.op) {
      case MaskOp::k_and:
        for (int v = 0; v < n; ++v) z[v] = static_cast<Word>(x[v] & y[v]);
        return;
      case MaskOp::k_or:
        for (int v = 0; v < n; ++v) z[v] = static_cast<Word>(x[v] | y[v]);
        return;
      case MaskOp::k_not:
        for (int v = 0; v < n; ++v) z[v] = static_cast<Word>(x[v] ^ kAllLanes);
        return;
      case MaskOp::k_count:
        accumulator(i.z).count += count_lanes(x, item.full() ? x : masks_.data(), n);
    }
  }

  // -------------------------------------------------------------------------------------------------- reductions
  void reset_sums() {
    for (int k = 0; k < total_count_; ++k) {
      Accumulator& a = *totals_[k].at;
      const ReductionKind kind = totals_[k].kind;
      const double first = kind == ReductionKind::minimum ? kInf : kind == ReductionKind::maximum ? -kInf : 0.0;
      store(a.run, f32(static_cast<float>(first)));
      store(a.total, f64(0.0)), store(a.total + kF64, f64(0.0));
      a.count = 0;
      a.nan = false;
    }
  }

  void flush_sums() {
    for (int k = 0; k < sum_count_; ++k) {
      Accumulator& a = *totals_[k].at;
      const F32 run = load(a.run);
      store(a.total, load(a.total) + lower_f64(run));
      store(a.total + kF64, load(a.total + kF64) + upper_f64(run));
      store(a.run, f32(0.0f));
    }
  }

  // Puts the sums of an item away.
  void close(const Item& item) {
    const Span<Reduction>& reductions = p_.step.reductions;
    double* sums = p_.sums + item.number * reductions.size;
    for (int k = 0; k < total_count_; ++k) sums[totals_[k].index] = value_of(*totals_[k].at, totals_[k].kind);
    // Where extremes are taken along with a sum, the sum alone has met a NaN.
    for (int k = 0; k < with_extremes_count_; ++k) {
      const TokenInstruction& i = *with_extremes_[k];
      const double sum = sums[operands_[i.x].index];
      if (sum != sum) sums[operands_[i.y].index] = sums[operands_[i.z].index] = sum;
    }
  }

  static double value_of(const Accumulator& a, ReductionKind kind) {
    if (a.nan) return std::numeric_limits<double>::quiet_NaN();
    switch (kind) {
      case ReductionKind::sum: return sum(load(a.total) + load(a.total + kF64));
      case ReductionKind::minimum: return static_cast<double>(minimum(load(a.run)));
      case ReductionKind::maximum: return static_cast<double>(maximum(load(a.run)));
      default: return static_cast<double>(a.count);
    }
  }

  const Pass& p_;
  const Span<TokenOperand>& operands_;
  Buffer<Line> lines_;
  Buffer<Word> masks_;          // [masks, item]
  Buffer<char*> at_;            // the scratch of each operand
  Buffer<std::int64_t> mask_;   // the number of each operand's mask
  Buffer<Total> totals_;        // sums first
  Buffer<const TokenInstruction*> with_extremes_;
  Buffer<Instruction> direct_, masked_, last_;
  int sum_count_ = 0, total_count_ = 0, with_extremes_count_ = 0;
  std::int64_t row_ = -1, phase_ = -1;
};

double together(double x, double y, ReductionKind kind) {
  if (kind == ReductionKind::minimum) return y < x || y != y ? y : x;
  if (kind == ReductionKind::maximum) return y > x || y != y ? y : x;
  return x + y;
}

// From items to rows, in order.
void fold(const Items& items, const TokenStep& step, const double* sums, const RowValues& values) {
  for (int k = 0; k < step.reductions.size; ++k) {
    const ReductionKind kind = step.reductions[k].kind;
    double* column = values.column(step.reductions[k].out);
    const double neutral = kind == ReductionKind::minimum ? kInf : kind == ReductionKind::maximum ? -kInf : 0.0;
    for (std::int64_t row = 0; row < values.rows; ++row) {
      double x = kind == ReductionKind::tokens ? static_cast<double>(items.counted(row)) : neutral;
      for (std::int64_t i = items.first(row); i < items.first(row + 1) && kind != ReductionKind::tokens; ++i)
        x = together(x, sums[i * step.reductions.size + k], kind);
      column[row] = x;
    }
  }
}

bool writes(const TokenStep& step) {
  for (const TokenOperand& o : step.operands)
    if (o.kind == OperandKind::output) return true;
  return false;
}

}  // namespace

void run_tokens(const ProgramCall& call, const TokenStep& step, const Items& items, const RowValues& values) {
  const Buffer<double> sums(step.tile.size == 0 ? 0 : items.count() * step.reductions.size);
  if (step.tile.size > 0) {
    const bool large = writes(step) && size_of(items.tokens()) * 4 >= kStreamBytes;
    const Pass pass{call, step, values, items, sizes_of(step), sums.data(), large};
    for_chunks(items.count(), call.threads, [&] { return Worker(pass); });
  }
  fold(items, step, sums.data(), values);
}

}  // namespace fastreward::FASTREWARD_ISA::program
