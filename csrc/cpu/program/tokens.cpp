// One pass of a program over the tokens of a side.
//
// Threads take chunks of 2048 tokens; a chunk goes through the instructions tile by tile, in registers (see
// tile.hpp). Lanes that do not count may hold anything: they are left out of sums and become 0 in outputs,
// and tiles without a valid token are not even read. Conditions that are only counted are kept as bits until the end of
// the chunk. A pass with scans takes a sequence's chunks and tiles in order, on one thread. Sums have a fixed structure: lane = position in the sequence
// modulo the vector, float over a few tiles, float64 above that, chunks in order. Padding on the right adds exact
// zeros, and the number of threads changes nothing.
#include <cstring>
#include <initializer_list>

#include "cpu/program/registers.hpp"
#include "cpu/program/chunks.hpp"
#include "cpu/program/totals.hpp"

namespace fastreward::FASTREWARD_ISA::program {
namespace {

using namespace simd;

// Inputs are fetched this many tiles ahead: hardware stops at each 4 KiB page of several streams.
constexpr int kAhead = 512 / kTile;

// Everything that the threads share.
struct Pass {
  const ProgramCall& call;
  const TokenStep& step;
  const SequenceValues& values;
  const Chunks& chunks;
  double* sums;  // [chunks, reductions]
  bool large;    // the outputs
};

// ------------------------------------------------------------------------------------------------ a thread's part
class Worker {
 public:
  explicit Worker(const Pass& pass)
      : p_(pass),
        registers_(pass.step, pass.call.inputs, pass.call.outputs),
        totals_(registers_),
        direct_(registers_.link(false, false)),
        masked_(registers_.link(true, false)),
        last_(registers_.link(true, true)) {
    registers_.set_numbers(pass.values.numbers);
  }

  void run(std::int64_t first, std::int64_t last) {
    if (p_.step.reverse) run_chunks<false>(last - 1, first - 1);
    else run_chunks<true>(first, last);
  }

 private:
  // Chunks from `first` on, upwards or downwards, up to `end`.
  template <bool kUp>
  void run_chunks(std::int64_t first, std::int64_t end) {
    constexpr std::int64_t kStep = kUp ? 1 : -1;
    std::int64_t sequence = p_.chunks.sequence_of(first);
    Chunk chunk = p_.chunks.chunk(first, sequence), next = chunk;
    for (std::int64_t i = first; i != end; i += kStep, chunk = next) {
      next.end = 0;
      if (i + kStep != end) {
        while (kUp ? p_.chunks.first(sequence + 1) <= i + 1 : p_.chunks.first(sequence) > i - 1) sequence += kStep;
        next = p_.chunks.chunk(i + kStep, sequence);
      }
      if (chunk.sequence != entered_ && p_.step.scans) registers_.begin_sequence();
      entered_ = chunk.sequence;
      totals_.reset();
      if (chunk.some == 0) write_zeros(chunk.begin, chunk.tokens);
      else run_tiles<kUp>(chunk, next);
      totals_.write(p_.sums + chunk.number * p_.step.reductions.size);
    }
  }

  template <bool kUp>
  void run_tiles(const Chunk& chunk, const Chunk& next) {
    if (chunk.sequence != sequence_) registers_.set_sequence(p_.values, sequence_ = chunk.sequence);
    if (p_.large && phase_ != chunk.begin % kF32) choose_stores(chunk);
    if (!chunk.full()) place_words(chunk);
    for (int n = 0; n < chunk.end; ++n) {
      const int tile = kUp ? n : chunk.end - 1 - n;
      const std::int64_t at = chunk.place_of(tile), ahead = ahead_of<kUp>(chunk, next, tile);
      if ((chunk.every >> tile & 1) != 0) registers_.run(direct_, tile, at, ahead);
      else if ((chunk.some >> tile & 1) == 0) write_zeros(chunk.begin + tile * kTile, kTile);
      else if (chunk.tokens_of(tile) < kTile) run_last(chunk, tile);
      else registers_.run(masked_, tile, at, ahead);
      if (tile % kRun == (kUp ? kRun - 1 : 0)) totals_.flush();
    }
    totals_.flush();
    const int done = chunk.end * kTile;
    if (done < chunk.tokens) write_zeros(chunk.begin + done, chunk.tokens - done);
    run_masks(registers_, chunk.tiles, chunk.full());
  }

  // Mask 0: which tokens count.
  void place_words(const Chunk& chunk) const {
    Word* words = registers_.valid();
    const int n = chunk.tiles * kTileVectors;
    if (chunk.words != nullptr) {
      std::memcpy(words, chunk.words, static_cast<std::size_t>(n) * sizeof(Word));
      return;
    }
    for (int v = 0; v < n; ++v) {
      const int left = chunk.tokens - v * kF32;
      words[v] = left >= kF32 ? kAllLanes : left > 0 ? word(first32(left)) : Word{0};
    }
  }

  // Where the tile lies that will be read kAhead from now; this one where that will not be read.
  template <bool kUp>
  static std::int64_t ahead_of(const Chunk& chunk, const Chunk& next, int tile) {
    const int at = kUp ? tile + kAhead : tile - kAhead;
    if (at >= 0 && at < chunk.end) return chunk.place_of(at);
    const int later = kUp ? at - chunk.tiles : at + next.end;
    return later >= 0 && later < next.end ? next.place_of(later) : chunk.place_of(tile);
  }

  // Outputs go past the caches where a chunk's lie on whole vectors, which its place modulo the vector decides.
  void choose_stores(const Chunk& chunk) {
    phase_ = chunk.begin % kF32;
    registers_.choose_stores(direct_, false, chunk.begin * 4);
    registers_.choose_stores(masked_, true, chunk.begin * 4);
  }

  // The tile at the end of a sequence: on copies, as nothing behind the sequence may be touched.
  void run_last(const Chunk& chunk, int tile) const {
    const std::int64_t at = chunk.place_of(tile);
    const int tokens = chunk.tokens_of(tile);
    for (const Tensor& x : registers_.inputs()) copy(reinterpret_cast<const float*>(x.base + at), tokens, x.copy);
    registers_.run(last_, tile, 0, 0);
    for (const Tensor& x : registers_.outputs()) copy(x.copy, tokens, reinterpret_cast<float*>(x.base + at));
  }

  static void copy(const float* from, int n, float* to) {
    int i = 0;
    for (; i + kF32 <= n; i += kF32) store(to + i, load(from + i));
    if (i < n) store_n(to + i, load_n(from + i, n - i, 0.0f), n - i);
  }

  void write_zeros(std::int64_t begin, std::int64_t n) const {
    for (const Tensor& x : registers_.outputs()) {
      float* to = reinterpret_cast<float*>(x.base) + begin;
      std::int64_t i = 0;
      if (p_.large && on_vectors(reinterpret_cast<const char*>(to)))
        for (; i + kF32 <= n; i += kF32) stream(to + i, f32(0.0f));
      for (; i + kF32 <= n; i += kF32) store(to + i, f32(0.0f));
      if (i < n) store_n(to + i, f32(0.0f), static_cast<int>(n - i));
    }
  }

  const Pass& p_;
  Registers registers_;
  Totals totals_;
  Registers::Program direct_, masked_, last_;
  std::int64_t sequence_ = -1, entered_ = -1, phase_ = -1;
};

// From chunks to sequences, in order.
void fold(const Chunks& chunks, const TokenStep& step, const double* sums, const SequenceValues& values) {
  for (int k = 0; k < step.reductions.size; ++k) {
    const ReductionKind kind = step.reductions[k].kind;
    double* column = values.column(step.reductions[k].out);
    const double neutral = neutral_of(kind);
    for (std::int64_t sequence = 0; sequence < values.sequences; ++sequence) {
      double x = kind == ReductionKind::tokens ? static_cast<double>(chunks.valid(sequence)) : neutral;
      const std::int64_t end = kind == ReductionKind::tokens ? 0 : chunks.first(sequence + 1);
      for (std::int64_t i = chunks.first(sequence); i < end; ++i)
        x = together(x, sums[i * step.reductions.size + k], kind);
      column[sequence] = x;
    }
  }
}

bool writes(const TokenStep& step) {
  for (const TokenOperand& o : step.operands)
    if (o.kind == OperandKind::output) return true;
  return false;
}

}  // namespace

void run_tokens(const ProgramCall& call, const TokenStep& step, const Chunks& chunks, const SequenceValues& values) {
  const Buffer<double> sums(step.tile.size == 0 ? 0 : chunks.count() * step.reductions.size);
  if (step.tile.size > 0) {
    const bool large = writes(step) && past_caches(chunks.tokens());
    const Pass pass{call, step, values, chunks, sums.data(), large};
    for_chunk_ranges(chunks, call.threads, [&] { return Worker(pass); }, step.scans);
  }
  fold(chunks, step, sums.data(), values);
}

}  // namespace fastreward::FASTREWARD_ISA::program
