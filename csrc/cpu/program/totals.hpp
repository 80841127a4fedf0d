// A thread's reductions of a pass over tokens: from tiles to chunks. For csrc/cpu/program/ only.
#pragma once

#include <initializer_list>
#include <limits>

#include "cpu/program/registers.hpp"

namespace fastreward::FASTREWARD_ISA::program {

using namespace simd;

inline double neutral_of(ReductionKind kind) {
  constexpr double kInf = std::numeric_limits<double>::infinity();
  return kind == ReductionKind::minimum ? kInf : kind == ReductionKind::maximum ? -kInf : 0.0;
}

inline double together(double x, double y, ReductionKind kind) {
  if (kind == ReductionKind::minimum) return y < x || y != y ? y : x;
  if (kind == ReductionKind::maximum) return y > x || y != y ? y : x;
  return x + y;
}

// The instructions on the masks of a chunk of so many tiles; full: all its tokens count.
inline void run_masks(const Registers& registers, int tiles, bool full) {
  const int n = tiles * kTileVectors;
  for (const MaskInstruction& i : registers.step().chunk) {
    const Word* x = registers.mask(i.x);
    if (i.op == MaskOp::k_count) {
      registers.accumulator(i.z).count += count_lanes(x, full ? x : registers.valid(), n);
      continue;
    }
    Word* z = registers.mask(i.z);
    if (i.op == MaskOp::k_not) {
      for (int v = 0; v < n; ++v) z[v] = static_cast<Word>(x[v] ^ kAllLanes);
      continue;
    }
    const Word* y = registers.mask(i.y);
    const bool both = i.op == MaskOp::k_and;
    for (int v = 0; v < n; ++v) z[v] = static_cast<Word>(both ? x[v] & y[v] : x[v] | y[v]);
  }
}

class Totals {
 public:
  explicit Totals(const Registers& registers) : totals_(registers.size()), pairs_(registers.step().tile.size) {
    for (const bool sums : {true, false}) {
      for (int k = 0; k < registers.size(); ++k) {
        if (registers.kind(k) != OperandKind::reduction) continue;
        const ReductionKind kind = registers.step().reductions[registers.index(k)].kind;
        if ((kind == ReductionKind::sum) == sums)
          totals_[count_++] = {&registers.accumulator(k), kind, registers.index(k)};
      }
      if (sums) sum_count_ = count_;
    }
    for (const TokenInstruction& i : registers.step().tile)
      if (i.op == TokenOp::k_sum_extremes)
        pairs_[pair_count_++] = {registers.index(i.x), registers.index(i.y), registers.index(i.z)};
  }

  void reset() {
    for (int k = 0; k < count_; ++k) {
      const ReductionKind kind = totals_[k].kind;
      const double first = neutral_of(kind);
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

}  // namespace fastreward::FASTREWARD_ISA::program
