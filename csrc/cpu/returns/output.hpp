// Where results go.
#pragma once

#include <cstring>

#include "cpu/returns/row.hpp"

namespace fastreward::FASTREWARD_ISA::returns {

using namespace simd;

// Where a row's results go, block after block.
//
// Large ones go past the caches, whole lines at a time: a line that is written in two parts costs two ways to memory.
// Blocks are counted from the last valid token and lines are not, so what a block leaves of its first line waits for
// the block before it.
class Output {
 public:
  Output(float* p, bool large) : p_(p), large_(large) {}

  // f(first token, tokens) -> F32 for the tokens [0, n) from p + base on, right before those of the last call.
  template <class F>
  void put(std::int64_t base, int n, F&& f) {
    if (p_ == nullptr) return;
    float* p = p_ + base;
    if (!large_) return put_vectors(p, n, f, [](float* to, F32 v) { store(to, v); });
    const int first = before_line(p);
    if (first == 0 && waiting_ == 0) return put_vectors(p, n, f, [](float* to, F32 v) { stream(to, v); });
    float* results = results_.at();
    std::memmove(results + n, results, static_cast<std::size_t>(waiting_) * sizeof(float));
    put_vectors(results, n, f, [](float* to, F32 v) { store(to, v); });
    const int there = n + waiting_;
    waiting_ = first < there ? first : there;
    put_vectors(
        p + waiting_, there - waiting_, [&](int i, int width) { return load_some(results + waiting_ + i, width); },
        [](float* to, F32 v) { stream(to, v); });
  }
  void zero(std::int64_t base, int n) {
    put(base, n, [](int, int) { return f32(0.0f); });
  }
  // Whether what waits reaches to the end of its line, as at the end of a row that ends inside of one it does not.
  bool whole_lines(std::int64_t end) const {
    return p_ == nullptr || !large_ || waiting_ == before_line(p_ + end);
  }
  // What waits, for a block that is made in one go.
  bool large() const { return large_; }
  float* begin(std::int64_t base) const { return p_ + base; }
  int waiting() const { return waiting_; }
  float* results() { return results_.at(); }

  // The row begins at p + base: nothing more will come.
  void finish(std::int64_t base) {
    for (int i = 0; i < waiting_; ++i) p_[base + i] = results_.at()[i];
    waiting_ = 0;
  }

 private:
  static int before_line(const float* p) {
    return static_cast<int>(-(reinterpret_cast<std::intptr_t>(p) / std::intptr_t{sizeof(float)})) & 15;
  }
  // A function of its own for each way to store, as this is the innermost loop.
  template <class F, class Store>
  static void put_vectors(float* p, int n, const F& f, const Store& whole) {
    for_vectors(n, [&](int i, int width) {
      if (width == kF32)
        whole(p + i, f(i, width));
      else
        store_n(p + i, f(i, width), width);
    });
  }

  float* p_;
  bool large_;
  int waiting_ = 0;
  Buffer results_;
};

template <ReturnsKind kKind>
void write(const ReturnsInput& in, const Row& row, Buffers& room, Output& out, Output& second) {
  const float* ys = room.x.at();
  const bool masked = row.mask != nullptr && in.at_masked != AtMasked::decay;
  const auto shown = [&](int i, int width, F32 v) {
    return masked ? select(nonzero_some(row.mask + i, width), v, f32(0.0f)) : v;
  };
  const auto result = [&](int i, int width) { return shown(i, width, load(ys + i)); };
  const auto with_value = [&](int i, int width) {
    const F32 value = load_some(in.values + row.base + i, width);
    const F32 counted = row.mask == nullptr ? value : select(nonzero_some(row.mask + i, width), value, f32(0.0f));
    return shown(i, width, load(ys + i) + counted);
  };
  if constexpr (kKind == ReturnsKind::gae) {
    out.put(row.base, row.n, result);
    second.put(row.base, row.n, with_value);
  } else if constexpr (kKind == ReturnsKind::vtrace) {
    out.put(row.base, row.n, with_value);
    second.put(row.base, row.n, [&](int i, int width) {
      return shown(i, width, fma(load(room.factor.at() + i), load(ys + i + 1), load(room.plain.at() + i)));
    });
  } else {
    out.put(row.base, row.n, result);
  }
}

}  // namespace fastreward::FASTREWARD_ISA::returns
