// The largest value up to which the mean of the tokens' values stays below a bound, or the smallest of a share of the
// largest, without sorting them: its digits one after the other, each from a histogram of the tokens that share the
// digits before.
//
// A bin counts its values and adds them up as integers: those of one bin have the same exponent, and so their sum is
// exact, whatever the order and the number of threads.
#include <cmath>
#include <cstring>

#include "cpu/program/chunks.hpp"

namespace fastreward::FASTREWARD_ISA {
namespace {

using namespace program;

constexpr int kBins = 2048, kLevels = 3;
constexpr int kShift[kLevels] = {21, 10, 0};  // the first digit: sign, exponent and two bits of the mantissa
constexpr int kDigit[kLevels] = {2047, 2047, 1023};

struct Bin {
  std::int64_t count, mantissas;
  std::uint32_t largest;
};

// Floats as unsigned numbers in the same order.
std::uint32_t key_of(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits ^ ((bits >> 31) != 0 ? 0xffffffffu : 0x80000000u);
}
std::uint32_t bits_of(std::uint32_t key) { return key ^ ((key >> 31) != 0 ? 0x80000000u : 0xffffffffu); }
float value_of(std::uint32_t key) {
  const std::uint32_t bits = bits_of(key);
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// A value as mantissa * 2^exponent_of(its bits).
int exponent_of(std::uint32_t bits) {
  const int exponent = static_cast<int>(bits >> 23 & 0xffu);
  return (exponent == 0 ? 1 : exponent) - 150;
}
std::int64_t mantissa_of(std::uint32_t bits) {
  const std::int64_t m = (bits & 0x7fffffu) | ((bits >> 23 & 0xffu) == 0 ? 0u : 0x800000u);
  return (bits >> 31) != 0 ? -m : m;
}

// A thread's histogram of one digit, of the valid tokens whose digits before are `prefix`.
struct Histogram {
  const ProgramTokens& tokens;
  const float* x;
  int level;
  std::uint32_t prefix;
  Buffer<Bin> bins{kBins};
  std::uint8_t bytes[kProgramChunk];

  Histogram(const ProgramTokens& t, const float* values, int of, std::uint32_t before)
      : tokens(t), x(values), level(of), prefix(before) {
    std::memset(bins.data(), 0, kBins * sizeof(Bin));
  }

  void add(std::int64_t begin, int n) {
    const std::uint8_t* mask = mask_block(tokens.mask, begin, n, bytes);
    for (int i = 0; i < n; ++i) {
      const float value = x[begin + i] + 0.0f;  // one zero
      if ((mask != nullptr && mask[i] == 0) || value != value) continue;
      const std::uint32_t key = key_of(value);
      if (level > 0 && key >> kShift[level - 1] != prefix) continue;
      Bin& bin = bins[key >> kShift[level] & static_cast<std::uint32_t>(kDigit[level])];
      ++bin.count;
      bin.mantissas += mantissa_of(bits_of(key));
      bin.largest = key > bin.largest ? key : bin.largest;
    }
  }
};

// The valid tokens' values up to a place in their order.
struct Below {
  double sum = 0.0;
  std::int64_t count = 0;
  std::uint32_t largest = 0;

  Below with(const Bin& bin) const {
    const std::uint32_t bits = bits_of(bin.largest);
    const bool infinite = (bits >> 23 & 0xffu) == 0xffu;
    const double more = infinite ? static_cast<double>(value_of(bin.largest)) * static_cast<double>(bin.count)
                                 : std::ldexp(static_cast<double>(bin.mantissas), exponent_of(bits));
    return {sum + more, count + bin.count, bin.largest};
  }
  bool keeps(double bound) const { return sum / static_cast<double>(count) < bound; }
};

}  // namespace

float program_threshold(const ProgramTokens& tokens, const float* x, double bound, bool share, int threads) {
  constexpr std::int64_t kPiece = kProgramChunk;
  const std::int64_t size = size_of(tokens), pieces = (size + kPiece - 1) / kPiece;
  Below below;
  std::uint32_t prefix = 0;
  std::int64_t smaller = 0;  // than the share of the largest
  for (int level = 0; level < kLevels; ++level) {
    const auto make = [&] { return Histogram(tokens, x, level, prefix); };
    const PerSlot workers(threads, make);
    parallel_ranges(threads, pieces, grain_of(pieces, 4), [&](std::int64_t first, std::int64_t last, int slot) {
      for (std::int64_t k = first; k < last; ++k)
        workers[slot].add(k * kPiece, static_cast<int>(size - k * kPiece < kPiece ? size - k * kPiece : kPiece));
    });
    const auto keeps = [&](const Below& more) { return share ? more.count <= smaller : more.keeps(bound); };
    if (level == 0 && share) {
      std::int64_t all = 0;
      workers.for_each([&](const Histogram& h) {
        for (int k = 0; k < kBins; ++k) all += h.bins[k].count;
      });
      const double largest = std::floor(bound * static_cast<double>(all));
      smaller = all - (largest < 1.0 ? 1 : largest > static_cast<double>(all) ? all : static_cast<std::int64_t>(largest));
    }
    Bin first_beyond{};
    int digit = 0;
    for (; digit < kBins; ++digit) {
      Bin bin{};
      workers.for_each([&](const Histogram& h) {
        const Bin& own = h.bins[digit];
        bin.count += own.count, bin.mantissas += own.mantissas;
        bin.largest = own.largest > bin.largest ? own.largest : bin.largest;
      });
      if (bin.count == 0) continue;
      const Below more = below.with(bin);
      if (!keeps(more)) {
        first_beyond = bin;
        break;
      }
      below = more;
    }
    if (first_beyond.count == 0) break;  // all of them
    // Of the mean the smallest value stays anyway.
    if (level == kLevels - 1 && (share || below.count == 0)) return value_of(first_beyond.largest);
    prefix = prefix << (level == kLevels - 1 ? 10 : 11) | static_cast<std::uint32_t>(digit);
  }
  return below.count == 0 ? __builtin_inff() : value_of(below.largest);
}

}  // namespace fastreward::FASTREWARD_ISA
