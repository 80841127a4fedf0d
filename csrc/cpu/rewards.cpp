// Rewards per token: out = score on the sequence's last (or first) valid token, or on all, less kl_coef times an
// estimate of KL(policy || reference) at each valid token; 0 elsewhere.
//
// Fused: one read of log-probs, reference log-probs and mask, one write of the rewards. The penalty knows no sequences
// and takes ranges of flat tokens, so that few long sequences occupy the threads as many short ones do; log-probs under
// a run of zeros in the mask are not read at all. The scores follow, range by range: from a sequence's end the mask is
// read back to its last valid token, and one element is added to. Nothing is allocated.
#include "cpu/rewards.hpp"

#include <atomic>

#include "cpu/simd/simd.hpp"
#include "cpu/simd/simd_functions.hpp"
#include "cpu/threads.hpp"

namespace fastreward::FASTREWARD_ISA {
namespace {

using namespace simd;

constexpr int kBlock = 2048;                               // tokens whose mask is looked at together
constexpr std::int64_t kGrain = 4 * kBlock;                // tokens that a thread takes at a time, at least
constexpr std::int64_t kRows = 64;                         // sequences, likewise
constexpr std::int64_t kStreamBytes = std::int64_t{64} << 20;  // larger outputs are written past the caches
constexpr int kAhead = 512;                                // of the prefetches: hardware stops at each 4 KiB page

template <KlEstimate kKl>
inline F32 estimate(F32 x, F32 value_clamp) {
  F32 kl = x;
  if constexpr (kKl == KlEstimate::k1) kl = -x;
  if constexpr (kKl == KlEstimate::abs) kl = abs(x);
  if constexpr (kKl == KlEstimate::k2) kl = f32(0.5f) * x * x;
  if constexpr (kKl == KlEstimate::k3) kl = expm1(x) - x;
  return min(value_clamp, max(-value_clamp, kl));  // a NaN stays one
}

inline M32 lanes_of(const std::uint8_t* bytes, int n) {
  if (bytes == nullptr) return first32(n);
  return n == kF32 ? nonzero(bytes) : nonzero_n(bytes, n);
}

struct Out {
  float* data;
  bool streamed;

  void put(std::int64_t i, F32 value, int n) const {
    if (n != kF32)
      store_n(data + i, value, n);
    else if (streamed)
      stream(data + i, value);
    else
      store(data + i, value);
  }
};

// base - kl_coef * KL of n tokens from `begin` on, 0 where `bytes` are; returns the lanes with a NaN.
template <KlEstimate kKl>
M32 penalize(const TokenRewards& in, const std::uint8_t* bytes, std::int64_t begin, int n, float base, const Out& out) {
  const F32 zero = f32(0.0f), start = f32(base), coef = f32(in.kl_coef);
  const F32 clamp = f32(in.clamp), value_clamp = f32(in.value_clamp);
  M32 bad = first32(0);
  for (int i = 0; i < n; i += kF32) {
    const int width = n - i < kF32 ? n - i : kF32;
    const M32 counted = lanes_of(bytes == nullptr ? nullptr : bytes + i, width);
    F32 reward = zero;
    if (any(counted)) {
      reward = start;
      if constexpr (kKl != KlEstimate::none) {
        const float* const p = in.logprobs + begin + i;
        const float* const q = in.ref_logprobs + begin + i;
        __builtin_prefetch(p + kAhead);
        __builtin_prefetch(q + kAhead);
        const F32 gap = width == kF32 ? load(q) - load(p) : load_n(q, width, 0.0f) - load_n(p, width, 0.0f);
        const F32 kl = estimate<kKl>(min(clamp, max(-clamp, gap)), value_clamp);
        bad = bad | (is_nan(kl) & counted);
        reward = fnma(coef, kl, start);
      }
      reward = select(counted, reward, zero);
    }
    out.put(begin + i, reward, width);
  }
  return bad;
}

// The score as it is placed: within its bounds, 0 where there is none.
inline float placed(const TokenRewards& in, std::int64_t row) {
  const float s = in.scores[row];
  return s != s ? 0.0f : s < in.low ? in.low : s > in.high ? in.high : s;
}

// The sequence that token i belongs to: the last one that begins at or before it.
inline std::int64_t row_of(const TokenRewards& in, std::int64_t i) {
  if (in.cu_seqlens == nullptr) return i / in.columns;
  std::int64_t low = 0, high = in.sequences;
  while (high - low > 1) {
    const std::int64_t middle = low + (high - low) / 2;
    (in.cu_seqlens[middle] <= i ? low : high) = middle;
  }
  return low;
}

// f(begin, end, base) for the pieces of [first, last): as a whole, or by sequence where each token gets its score.
template <class F>
void for_pieces(const TokenRewards& in, std::int64_t first, std::int64_t last, const F& f) {
  if (in.place != ScorePlace::all) return f(first, last, 0.0f);
  for (std::int64_t row = row_of(in, first); first < last; ++row) {
    const std::int64_t next = in.begin(row + 1), end = next < last ? next : last;
    if (end > first) f(first, end, placed(in, row));
    first = end > first ? end : first;
  }
}

// The last (or first) position in [begin, end) that counts; -1: none does.
std::int64_t position(const TokenRewards& in, std::int64_t begin, std::int64_t end) {
  constexpr int kLook = 256;  // tokens at a time
  std::uint8_t buffer[kLook];
  const bool last = in.place == ScorePlace::end;
  for (std::int64_t left = end - begin; left > 0;) {
    const int n = static_cast<int>(left < kLook ? left : kLook);
    const std::int64_t at = last ? begin + left - n : end - left;
    const std::uint8_t* const bytes = mask_block(in.mask, at, n, buffer);
    if (bytes == nullptr) return last ? at + n - 1 : at;
    std::uint8_t some = 0;
    for (int i = 0; i < n; ++i) some |= bytes[i];
    if (some != 0) {
      int i = last ? n - 1 : 0;
      while (bytes[i] == 0) i += last ? -1 : 1;
      return at + i;
    }
    left -= n;
  }
  return -1;
}

void place_score(const TokenRewards& in, std::int64_t row, float* out) {
  const std::int64_t at = position(in, in.begin(row), in.begin(row + 1));
  if (at >= 0) out[at] += placed(in, row);
}

// The first sequence that begins at token i or later.
std::int64_t first_from(const TokenRewards& in, std::int64_t i) {
  if (in.cu_seqlens == nullptr) return in.columns > 0 ? (i + in.columns - 1) / in.columns : in.sequences;
  std::int64_t low = 0, high = in.sequences;
  while (low < high) {
    const std::int64_t middle = low + (high - low) / 2;
    if (in.cu_seqlens[middle] < i)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// The scores of sequences that lie across the end of a range: each belongs to the first end that it reaches beyond.
void place_across(const TokenRewards& in, std::int64_t tokens, std::int64_t grain, float* out, int threads) {
  const std::int64_t ends = (tokens - 1) / grain;
  parallel_ranges(threads, ends, grain_of(ends, kRows), [&](std::int64_t first, std::int64_t last, int) {
    for (std::int64_t k = first; k < last; ++k) {
      const std::int64_t end = (k + 1) * grain, row = row_of(in, end);
      if (in.begin(row) < end && in.begin(row) >= end - grain) place_score(in, row, out);
    }
  });
}

// Ranges of tokens; the scores of the sequences that lie in one are placed at once, while their mask is in cache, and
// those of the others when all is done.
template <KlEstimate kKl>
bool penalize_all(const TokenRewards& in, std::int64_t tokens, const Out& out, int threads) {
  std::atomic<bool> bad{false};
  const std::int64_t grain = (grain_of(tokens, kGrain) + kBlock - 1) / kBlock * kBlock;
  const bool placing = in.place != ScorePlace::all;
  parallel_ranges(threads, tokens, grain, [&](std::int64_t first, std::int64_t last, int) {
    std::uint8_t buffer[kBlock];
    M32 nan = first32(0);
    for_pieces(in, first, last, [&](std::int64_t begin, std::int64_t end, float base) {
      for (std::int64_t i = begin; i < end; i += kBlock) {
        const int n = static_cast<int>(end - i < kBlock ? end - i : kBlock);
        nan = nan | penalize<kKl>(in, mask_block(in.mask, i, n, buffer), i, n, base, out);
      }
    });
    if (out.streamed) fence();
    if (any(nan)) bad.store(true, std::memory_order_relaxed);
    if (placing)
      for (std::int64_t row = first_from(in, first); row < in.sequences && in.begin(row + 1) <= last; ++row)
        place_score(in, row, out.data);
  });
  if (placing) place_across(in, tokens, grain, out.data, threads);
  return bad.load(std::memory_order_relaxed);
}

}  // namespace

// ------------------------------------------------------------------------------------------------------- launchers
bool token_rewards(const TokenRewards& in, float* out, int threads) {
  const std::int64_t tokens = in.sequences > 0 ? in.begin(in.sequences) : 0;
  constexpr std::uintptr_t kAlign = static_cast<std::uintptr_t>(kF32) * sizeof(float);
  // A piece of a sequence begins anywhere, where a vector may not be streamed to.
  const bool streamed = in.place != ScorePlace::all && tokens * 4 >= kStreamBytes &&
                        reinterpret_cast<std::uintptr_t>(out) % kAlign == 0;
  const Out to{out, streamed};
  bool bad = false;
  switch (in.kl) {
    case KlEstimate::none: bad = penalize_all<KlEstimate::none>(in, tokens, to, threads); break;
    case KlEstimate::k1: bad = penalize_all<KlEstimate::k1>(in, tokens, to, threads); break;
    case KlEstimate::abs: bad = penalize_all<KlEstimate::abs>(in, tokens, to, threads); break;
    case KlEstimate::k2: bad = penalize_all<KlEstimate::k2>(in, tokens, to, threads); break;
    case KlEstimate::k3: bad = penalize_all<KlEstimate::k3>(in, tokens, to, threads); break;
  }
  return bad;
}

}  // namespace fastreward::FASTREWARD_ISA
