// Whitening: y = (x - mean) * rsqrt(var + eps) over the counted positions, 0 elsewhere.
//
// Fused: the statistics read memory once, not twice: each block of a row is summed, then its squared deviations are
// taken while it lies in the first-level cache, and the blocks are merged in order (Chan's update, float64). Blocks
// start at a row's first position, so that neither padding on the right nor the number of threads changes a bit of the
// statistics. The second pass maps x to y, in place or not. No temporaries but three doubles for each block.
#include "cpu/whiten.hpp"

#include "cpu/simd/simd.hpp"
#include "cpu/threads.hpp"

namespace fastreward::FASTREWARD_ISA {
namespace {

using namespace simd;

// Outputs beyond this many bytes are written past the caches: nobody finds them there anyway.
constexpr std::int64_t kStreamBytes = std::int64_t{64} << 20;

// Blocks that a thread takes at a time, at least.
constexpr std::int64_t kBlocks = 4;

// Distance in floats of the prefetches: hardware stops at each 4 KiB page.
constexpr int kAhead = 512;

// f(first column, lane mask, columns in it) for the vectors of one block; `bytes` nullptr: all lanes count.
template <bool kMasked, class F>
inline void for_vectors(const std::uint8_t* bytes, int n, F&& f) {
  int i = 0;
  for (; i + kF32 <= n; i += kF32) {
    if constexpr (kMasked)
      f(i, nonzero(bytes + i), kF32);
    else
      f(i, first32(kF32), kF32);
  }
  if (i < n) {
    if constexpr (kMasked)
      f(i, nonzero_n(bytes + i, n - i), n - i);
    else
      f(i, first32(n - i), n - i);
  }
}

inline F32 load_some(const float* p, int n) { return n == kF32 ? load(p) : load_n(p, n, 0.0f); }

template <bool kMasked>
Moments block_moments(const float* x, const std::uint8_t* bytes, int n) {
  F64 lower = f64(0.0), upper = f64(0.0);
  std::int64_t counted = 0;
  for_vectors<kMasked>(bytes, n, [&](int i, M32 lanes, int width) {
    __builtin_prefetch(x + i + kAhead);
    const F32 v = load_some(x + i, width);
    const F32 kept = kMasked ? select(lanes, v, f32(0.0f)) : v;
    lower = lower + lower_f64(kept);
    upper = upper + upper_f64(kept);
    if (kMasked) counted += count(lanes);
  });
  if (!kMasked) counted = n;
  if (counted == 0) return {};
  Moments m;
  m.count = static_cast<double>(counted);
  m.mean = sum(lower + upper) / m.count;
  // Deviations from the float nearest the mean, so that uncounted lanes can be set to exactly that; then corrected.
  const float pivot = static_cast<float>(m.mean);
  const F64 from = f64(static_cast<double>(pivot));
  lower = f64(0.0), upper = f64(0.0);
  for_vectors<kMasked>(bytes, n, [&](int i, M32 lanes, int width) {
    const F32 kept = select(lanes, load_some(x + i, width), f32(pivot));
    const F64 a = lower_f64(kept) - from;
    const F64 b = upper_f64(kept) - from;
    lower = fma(a, a, lower);
    upper = fma(b, b, upper);
  });
  const double off = m.mean - static_cast<double>(pivot);
  const double m2 = sum(lower + upper) - m.count * off * off;
  m.m2 = m2 < 0.0 ? 0.0 : m2;
  return m;
}

void merge(Moments& into, const Moments& block) {
  if (block.count == 0.0) return;
  const double total = into.count + block.count;
  const double delta = block.mean - into.mean;
  into.mean += delta * (block.count / total);
  into.m2 += block.m2 + delta * delta * (into.count * block.count / total);
  into.count = total;
}

template <bool kMasked, bool kStream>
void map_block(const float* x, const std::uint8_t* bytes, int n, const Affine& affine, float* out) {
  const F64 shift = f64(affine.shift), scale = f64(affine.scale), offset = f64(affine.offset);
  for_vectors<kMasked>(bytes, n, [&](int i, M32 lanes, int width) {
    __builtin_prefetch(x + i + kAhead);
    const F32 v = load_some(x + i, width);
    const F32 y = to_f32(fma(lower_f64(v) - shift, scale, offset), fma(upper_f64(v) - shift, scale, offset));
    const F32 kept = kMasked ? select(lanes, y, f32(0.0f)) : y;
    if (width != kF32)
      store_n(out + i, kept, width);
    else if (kStream)
      stream(out + i, kept);
    else
      store(out + i, kept);
  });
}

// Blocks of the flat array: elementwise work knows no rows.
template <bool kMasked, bool kStream>
void map_all(const WhitenInput& in, const Affine& affine, float* out, int threads) {
  const std::int64_t total = in.rows * in.columns;
  const std::int64_t blocks = (total + kWhitenBlock - 1) / kWhitenBlock;
  parallel_ranges(threads, blocks, grain_of(blocks, kBlocks), [&](std::int64_t first, std::int64_t last, int) {
    std::uint8_t buffer[kWhitenBlock];
    for (std::int64_t b = first; b < last; ++b) {
      const std::int64_t begin = b * kWhitenBlock;
      const int n = static_cast<int>(total - begin < kWhitenBlock ? total - begin : kWhitenBlock);
      map_block<kMasked, kStream>(in.x + begin, mask_block(in.mask, begin, n, buffer), n, affine, out + begin);
    }
    if (kStream) fence();
  });
}

}  // namespace

// ------------------------------------------------------------------------------------------------------- launchers
Moments whiten_statistics(const WhitenInput& in, Moments* scratch, int threads) {
  const std::int64_t per_row = in.blocks_per_row();
  const std::int64_t blocks = in.rows * per_row;
  const std::int64_t least = kBlocks * kWhitenBlock * per_row / (in.columns + 1);  // blocks of short rows are short
  parallel_ranges(threads, blocks, grain_of(blocks, least), [&](std::int64_t first, std::int64_t last, int) {
    std::uint8_t buffer[kWhitenBlock];
    for (std::int64_t b = first; b < last; ++b) {
      const std::int64_t column = b % per_row * kWhitenBlock;
      const std::int64_t begin = b / per_row * in.columns + column;
      const int n = static_cast<int>(in.columns - column < kWhitenBlock ? in.columns - column : kWhitenBlock);
      const std::uint8_t* bytes = mask_block(in.mask, begin, n, buffer);
      scratch[b] =
          bytes == nullptr ? block_moments<false>(in.x + begin, bytes, n) : block_moments<true>(in.x + begin, bytes, n);
    }
  });
  Moments all;
  for (std::int64_t b = 0; b < blocks; ++b) merge(all, scratch[b]);
  return all;
}

void whiten_apply(const WhitenInput& in, const Affine& affine, float* out, int threads) {
  constexpr std::uintptr_t kAlign = static_cast<std::uintptr_t>(kF32) * sizeof(float);
  const bool masked = in.mask.kind != MaskKind::none;
  const bool streamed = out != in.x && in.rows * in.columns * 4 >= kStreamBytes &&
                        reinterpret_cast<std::uintptr_t>(out) % kAlign == 0;
  if (masked)
    streamed ? map_all<true, true>(in, affine, out, threads) : map_all<true, false>(in, affine, out, threads);
  else
    streamed ? map_all<false, true>(in, affine, out, threads) : map_all<false, false>(in, affine, out, threads);
}

}  // namespace fastreward::FASTREWARD_ISA
