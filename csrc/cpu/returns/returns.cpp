// Returns, GAE, lambda-returns and V-trace: y_t = x_t + c_t y_{t+1} along each row.
//
// Fused: masks, moved rewards, next values, episode ends, the recurrence and both results in one pass. A row is read in
// blocks from its end. A vectorised step makes x and c of a block in the first-level cache, the recurrence runs through
// them in place, and a vectorised step writes the results, past the caches where they are large. A full block without a
// masked token, and with one coefficient, takes one loop for all three (whole_block.hpp): then loads and stores go on
// beside the recurrence, and the call takes the time of the memory alone.
//
// The recurrence takes eight tokens at a time: three steps of shifts join them (x and c of 1, 2, 4 and 8 neighbours),
// and one multiply-add each brings in what lies behind. So the chain in which each waits for the last has one link for
// eight tokens; it is kept in float64, with the powers of a constant coefficient as they are, so that long discounts
// forget nothing. The eights are counted from the row's last valid token (running from the left: its first), wherever
// it lies: padding, place, packing and threads change no bit.
#include "cpu/returns/returns.hpp"

#include <atomic>
#include <cmath>
#include <cstdint>

#include "cpu/returns/output.hpp"
#include "cpu/returns/prepare.hpp"
#include "cpu/returns/recurrence.hpp"
#include "cpu/returns/row.hpp"
#include "cpu/returns/whole_block.hpp"
#include "cpu/threads.hpp"

namespace fastreward::FASTREWARD_ISA {
namespace {

using namespace returns;

// --------------------------------------------------------------------------------------------------------------- a row
Row start(const ReturnsInput& in, std::int64_t index) {
  const float beyond = in.beyond == nullptr ? identity(in) : in.beyond[index];
  const bool of_recurrence = in.kind == ReturnsKind::returns;
  Row row;
  row.row = index;
  row.begin = in.begin(index);
  row.end = in.begin(index + 1);
  row.y = of_recurrence ? static_cast<double>(beyond) : 0.0;
  row.value = of_recurrence ? 0.0f : beyond;
  return row;
}

// The next block of the row, from its end or from its beginning.
void advance(const ReturnsInput& in, Row& row) {
  const std::int64_t left = row.end - row.begin;
  row.n = left < kWidth ? static_cast<int>(left) : kWidth;
  row.base = in.reverse ? row.end - row.n : row.begin;
  if (in.reverse)
    row.end = row.base;
  else
    row.begin = row.base + row.n;
}

// Looks at the block's mask; false: all of it is masked.
bool look(const ReturnsInput& in, Row& row, std::uint8_t* bytes) {
  row.mask = mask_block(in.mask, row.base, row.n, bytes);
  if (row.mask == nullptr) return true;
  if (in.mask.kind == MaskKind::bytes)  // the block after the next
    for (int i = 0; i < kWidth; i += 64) __builtin_prefetch(row.mask + i - 2 * kWidth);
  std::uint8_t some = 0, none = 0;
  for (int i = 0; i < row.n; ++i) some |= row.mask[i], none |= static_cast<std::uint8_t>(row.mask[i] == 0);
  if (none == 0) row.mask = nullptr;
  return some != 0;
}

// Leaves out what lies beyond the outermost valid token: no recurrence has begun there. Its rewards may move.
void skip(const ReturnsInput& in, Row& row, std::uint8_t* bytes, Output& out, Output& second) {
  while (in.mask.kind != MaskKind::none && row.begin < row.end) {
    advance(in, row);
    int outer = row.n;
    if (look(in, row, bytes)) {
      outer = 0;
      if (row.mask != nullptr)
        while (row.mask[in.reverse ? row.n - 1 - outer : outer] == 0) ++outer;
    }
    const std::int64_t from = in.reverse ? row.base + row.n - outer : row.base;
    if (in.move) collect(in.rewards + from, outer, row.pending);
    out.zero(from, outer);
    second.zero(from, outer);
    if (outer == row.n) continue;
    (in.reverse ? row.end : row.begin) = in.reverse ? from : row.base + outer;
    return;
  }
}

template <ReturnsKind kKind>
void run_row(const ReturnsInput& in, std::int64_t index, Buffers& room, Output& out, Output& second, F32& wrong) {
  Row row = start(in, index);
  skip(in, row, room.mask, out, second);
  while (row.begin < row.end) {
    advance(in, row);
    const bool some = look(in, row, room.mask);
    if (!some && in.at_masked == AtMasked::carry) {  // nothing but rewards to move
      if (in.move) collect(in.rewards + row.base, row.n, row.pending);
      out.zero(row.base, row.n);
      second.zero(row.base, row.n);
      row.after_valid = false;
      continue;
    }
    double coefficient;
    const bool one = one_coefficient<kKind>(in, row, coefficient);
    const bool opened = kKind == ReturnsKind::lambda && !row.after_valid;  // by a token that has to be closed
    const bool plain = one && !opened && row.mask == nullptr && in.terminated == nullptr && in.done == nullptr &&
                       in.op == ReturnsOp::sum && std::fabs(coefficient) <= kTame;
    if (plain && in.reverse && row.n == kWidth && row.pending == 0.0 && out.whole_lines(row.base + kWidth) &&
        second.whole_lines(row.base + kWidth)) {
      out.large() ? pass<kKind, true>(in, row, coefficient, out, second, wrong)
                  : pass<kKind, false>(in, row, coefficient, out, second, wrong);
      row.started = row.after_valid = true;
      continue;
    }
    float *xs = room.x.at(), *cs = room.c.at();
    plain ? prepare_plain<kKind>(in, row, room, wrong) : prepare<kKind>(in, row, room, wrong);
    for (int i = 0; i < 8; ++i) {  // what an eight has too many
      const int beyond = in.reverse ? -1 - i : row.n + i;
      xs[beyond] = identity(in), cs[beyond] = 1.0f;
    }
    if (in.reverse) xs[row.n] = static_cast<float>(row.y);  // V-trace looks one token ahead
    in.reverse ? recur<true>(in, row, room, plain, one, coefficient)
               : recur<false>(in, row, room, plain, one, coefficient);
    write<kKind>(in, row, room, out, second);
    row.started = true;
    row.after_valid = row.mask == nullptr || row.mask[0] != 0;
  }
  out.finish(in.begin(index));
  second.finish(in.begin(index));
}

// Whether two outputs may go past the caches side by side. With AVX2 a line is two stores, and on Zen 3 those to one
// place of two pages drive each other out half-written, which takes five times as long: there they go through the caches.
bool apart([[maybe_unused]] const float* out, [[maybe_unused]] const float* second) {
#ifdef FASTREWARD_AVX512
  return true;
#else
  const auto between = reinterpret_cast<std::uintptr_t>(out) - reinterpret_cast<std::uintptr_t>(second);
  return second == nullptr || (between + 63) % 4096 > 126;
#endif
}

template <ReturnsKind kKind>
bool run(const ReturnsInput& in, float* out, float* second, int threads) {
  const std::int64_t tokens = in.bounds == nullptr ? in.rows * in.columns : in.bounds[in.rows];
  const bool large = in.reverse && tokens * 4 >= kStreamBytes && apart(out, second);
  const std::int64_t least = kTokens * in.rows / (tokens + 1) + 1;
  std::atomic<bool> good{true};
  parallel_ranges(threads, in.rows, grain_of(in.rows, least), [&](std::int64_t first_row, std::int64_t last_row, int) {
    Buffers room;
    Output results(out, large), others(second, large);
    F32 wrong = f32(0.0f);
    // From the last token of the last row to the first of the first: one stream of memory that the prefetches run ahead in.
    for (std::int64_t b = last_row - 1; b >= first_row; --b) run_row<kKind>(in, b, room, results, others, wrong);
    if (large) fence();
    if (!(sum(wrong) == 0.0f)) good = false;
  });
  return good;
}

}  // namespace

// ------------------------------------------------------------------------------------------------------------ launcher
bool returns_scan(const ReturnsInput& in, float* out, float* second, int threads) {
  switch (in.kind) {
    case ReturnsKind::returns:
      return run<ReturnsKind::returns>(in, out, second, threads);
    case ReturnsKind::gae:
      return run<ReturnsKind::gae>(in, out, second, threads);
    case ReturnsKind::lambda:
      return run<ReturnsKind::lambda>(in, out, second, threads);
    case ReturnsKind::vtrace:
      return run<ReturnsKind::vtrace>(in, out, second, threads);
  }
  return false;
}

}  // namespace fastreward::FASTREWARD_ISA
