// One pass of a program over the tokens of a side.
//
// Threads take items of 2048 tokens; an item goes through the instructions tile by tile, in registers (see
// operators.hpp). Lanes that do not count may hold anything: they are left out of sums and become 0 in outputs,
// and tiles without a counted token are not even read. Conditions that are only counted are kept as bits until the end of
// the item. Sums have a fixed structure: lane = position in the row
// modulo the vector, float over a few tiles, float64 above that, items in order. Padding on the right adds exact zeros, and
// the number of threads changes nothing.
#include <cstring>
#include <initializer_list>
#include <limits>

#include "cpu/program/registers.hpp"
#include "cpu/program/chunks.hpp"

namespace fastreward::FASTREWARD_ISA::program {
namespace {

using namespace simd;

constexpr double kInf = std::numeric_limits<double>::infinity();
// Inputs are fetched this many tiles ahead: hardware stops at each 4 KiB page of several streams.
constexpr int kAhead = 512 / kTile;

// Everything that the threads share.
struct Pass {
  const ProgramCall& call;
  const TokenStep& step;
  const RowValues& values;
  const Items& items;
  double* sums;  // [items, reductions]
  bool large;    // the outputs
};

// -------------------------------------------------------------------------------------------- a thread's reductions
class Totals {
 public:
  explicit Totals(const Frame& frame) : totals_(frame.size()), pairs_(frame.step().tile.size) {
    for (const bool sums : {true, false}) {
      for (int k = 0; k < frame.size(); ++k) {
        if (frame.kind(k) != OperandKind::reduction) continue;
        const ReductionKind kind = frame.step().reductions[frame.index(k)].kind;
        if ((kind == ReductionKind::sum) == sums) totals_[count_++] = {&frame.accumulator(k), kind, frame.index(k)};
      }
      if (sums) sum_count_ = count_;
    }
    for (const TokenInstruction& i : frame.step().tile)
      if (i.op == TokenOp::k_sum_extremes) pairs_[pair_count_++] = {frame.index(i.x), frame.index(i.y), frame.index(i.z)};
  }

  void reset() {
    for (int k = 0; k < count_; ++k) {
      const ReductionKind kind = totals_[k].kind;
      const double first = kind == ReductionKind::minimum ? kInf : kind == ReductionKind::maximum ? -kInf : 0.0;
      Accumulator& a = *totals_[k].at;
      store(a.run, f32(static_cast<float>(first)));
      store(a.total, f64(0.0)), store(a.total + kF64, f64(0.0));
      a.count = 0;
      a.nan = false;
    }
  }

  // From float to float64.
  void flush() {
    for (int k = 0; k < sum_count_; ++k) {
      Accumulator& a = *totals_[k].at;
      const F32 run = load(a.run);
      store(a.total, load(a.total) + lower_f64(run));
      store(a.total + kF64, load(a.total + kF64) + upper_f64(run));
      store(a.run, f32(0.0f));
    }
  }

  void write(double* sums) const {
    for (int k = 0; k < count_; ++k) sums[totals_[k].index] = value_of(*totals_[k].at, totals_[k].kind);
    for (int k = 0; k < pair_count_; ++k) {  // where extremes are taken along with a sum, the sum alone has met a NaN
      const double sum = sums[pairs_[k].sum];
      if (sum != sum) sums[pairs_[k].least] = sums[pairs_[k].most] = sum;
    }
  }

 private:
  struct Total {
    Accumulator* at;
    ReductionKind kind;
    int index;  // of the reduction
  };
  struct Together {
    int sum, least, most;
  };

  static double value_of(const Accumulator& a, ReductionKind kind) {
    if (a.nan) return std::numeric_limits<double>::quiet_NaN();
    switch (kind) {
      case ReductionKind::sum: return fold_sum(load(a.total) + load(a.total + kF64));
      case ReductionKind::minimum: return -static_cast<double>(fold_maximum(-load(a.run)));
      case ReductionKind::maximum: return static_cast<double>(fold_maximum(load(a.run)));
      default: return static_cast<double>(a.count);
    }
  }

  Buffer<Total> totals_;  // sums first
  Buffer<Together> pairs_;
  int sum_count_ = 0, count_ = 0, pair_count_ = 0;
};

// ------------------------------------------------------------------------------------------------ a thread's part
class Worker {
 public:
  explicit Worker(const Pass& pass)
      : p_(pass),
        frame_(pass.step, pass.call.inputs, pass.call.outputs),
        totals_(frame_),
        direct_(frame_.link(false, false)),
        masked_(frame_.link(true, false)),
        last_(frame_.link(true, true)) {
    frame_.set_numbers(pass.values.numbers);
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
      totals_.reset();
      if (item.some == 0) write_zeros(item.begin, item.tokens);
      else run_tiles(item, next);
      totals_.write(p_.sums + item.number * p_.step.reductions.size);
    }
  }

 private:
  void run_tiles(const Item& item, const Item& next) {
    if (item.row != row_) frame_.set_row(p_.values, row_ = item.row);
    if (p_.large && phase_ != item.begin % kF32) choose_stores(item);
    if (!item.full()) place_words(item);
    for (int tile = 0; tile < item.end; ++tile) {
      const std::int64_t at = item.place_of(tile);
      if ((item.every >> tile & 1) != 0) frame_.run(direct_, tile, at, ahead_of(item, next, tile));
      else if ((item.some >> tile & 1) == 0) write_zeros(item.begin + tile * kTile, kTile);
      else if (item.tokens_of(tile) < kTile) run_last(item, tile);
      else frame_.run(masked_, tile, at, ahead_of(item, next, tile));
      if (tile % kRun == kRun - 1) totals_.flush();
    }
    totals_.flush();
    const int done = item.end * kTile;
    if (done < item.tokens) write_zeros(item.begin + done, item.tokens - done);
    for (const MaskInstruction& i : p_.step.item) run_masks(i, item);
  }

  // Mask 0: which tokens count.
  void place_words(const Item& item) const {
    Word* words = frame_.counted();
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

  // Outputs go past the caches where an item's lie on whole vectors, which its place modulo the vector decides.
  void choose_stores(const Item& item) {
    phase_ = item.begin % kF32;
    frame_.choose_stores(direct_, false, item.begin * 4);
    frame_.choose_stores(masked_, true, item.begin * 4);
  }

  // The tile at the end of a row: on copies, as nothing behind the row may be touched.
  void run_last(const Item& item, int tile) const {
    const std::int64_t at = item.place_of(tile);
    const int tokens = item.tokens_of(tile);
    for (const Tensor& x : frame_.inputs()) copy(reinterpret_cast<const float*>(x.base + at), tokens, x.copy);
    frame_.run(last_, tile, 0, 0);
    for (const Tensor& x : frame_.outputs()) copy(x.copy, tokens, reinterpret_cast<float*>(x.base + at));
  }

  static void copy(const float* from, int n, float* to) {
    int i = 0;
    for (; i + kF32 <= n; i += kF32) store(to + i, load(from + i));
    if (i < n) store_n(to + i, load_n(from + i, n - i, 0.0f), n - i);
  }

  void write_zeros(std::int64_t begin, std::int64_t n) const {
    for (const Tensor& x : frame_.outputs()) {
      float* to = reinterpret_cast<float*>(x.base) + begin;
      std::int64_t i = 0;
      if (p_.large && on_vectors(reinterpret_cast<const char*>(to)))
        for (; i + kF32 <= n; i += kF32) stream(to + i, f32(0.0f));
      for (; i + kF32 <= n; i += kF32) store(to + i, f32(0.0f));
      if (i < n) store_n(to + i, f32(0.0f), static_cast<int>(n - i));
    }
  }

  void run_masks(const MaskInstruction& i, const Item& item) const {
    const int n = item.tiles * kTileVectors;
    const Word* x = frame_.mask(i.x);
    if (i.op == MaskOp::k_count) {
      frame_.accumulator(i.z).count += count_lanes(x, item.full() ? x : frame_.counted(), n);
      return;
    }
    Word* z = frame_.mask(i.z);
    if (i.op == MaskOp::k_not) {
      for (int v = 0; v < n; ++v) z[v] = static_cast<Word>(x[v] ^ kAllLanes);
      return;
    }
    const Word* y = frame_.mask(i.y);
    const bool both = i.op == MaskOp::k_and;
    for (int v = 0; v < n; ++v) z[v] = static_cast<Word>(both ? x[v] & y[v] : x[v] | y[v]);
  }

  const Pass& p_;
  Frame frame_;
  Totals totals_;
  Frame::Program direct_, masked_, last_;
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
    const bool large = writes(step) && past_caches(items.tokens());
    const Pass pass{call, step, values, items, sums.data(), large};
    for_chunks(items, call.threads, [&] { return Worker(pass); });
  }
  fold(items, step, sums.data(), values);
}

}  // namespace fastreward::FASTREWARD_ISA::program
