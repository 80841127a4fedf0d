// The fixed part of the kernels that run a loss: what fastreward/cuda/program/source.py generates stands on this.
//
// A program reads the tokens in one or more passes. A pass is one launch: it computes every valid token's values in
// registers, stores what the program gives per token and adds up what it reduces over sequences; the block that
// finishes last then does all work per sequence, per group and for the batch. No host sync, no order left to chance.
//
// A unit is CHUNK tokens of one row, from the row's start on: its sums depend on that row alone. Blocks take units in
// turn and write a unit's sums to its own place; the last block joins them row by row. A thread adds up its own
// PER_THREAD tokens in f32, everything across threads is f64. Packed rows are found by a search in cu_seqlens on the
// device. A token that does not count is not read: what lies there can leak nowhere.
#pragma once

#include "cuda/device/device.cuh"

namespace fastreward {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;
constexpr int PER_THREAD = 8;
constexpr int UNROLL = 4;  // tokens of a thread whose loads are under way together
constexpr int CHUNK = THREADS * PER_THREAD;

// ------------------------------------------------------------------------------------------- operators, in f32 and f64
// NaN goes through all of them, and comparisons with it are false.
__device__ __forceinline__ float infinity() { return -negative_infinity(); }

template <class X>
__device__ __forceinline__ X minimum(X x, X y) {
  return x < y || x != x ? x : y;
}

template <class X>
__device__ __forceinline__ X maximum(X x, X y) {
  return x > y || x != x ? x : y;
}

template <class X>
__device__ __forceinline__ X clip(X x, X low, X high) {
  return x < low ? low : x > high ? high : x;
}

template <class X>
__device__ __forceinline__ bool outside(X x, X low, X high) {
  return x < low || x > high;
}

template <class X>
__device__ __forceinline__ X sign(X x) {
  return x > X(0) ? X(1) : x < X(0) ? X(-1) : x;
}

__device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }
__device__ __forceinline__ double sigmoid(double x) { return 1. / (1. + exp(-x)); }
__device__ __forceinline__ float logsigmoid(float x) { return fminf(x, 0.f) - log1pf(expf(-fabsf(x))); }
__device__ __forceinline__ double logsigmoid(double x) { return fmin(x, 0.) - log1p(exp(-fabs(x))); }

// ----------------------------------------------------------------------------------------------- tokens and their rows
// Tokens of one side: [rows, width], or packed: row b is tokens cu_seqlens[b] .. cu_seqlens[b + 1].
struct Side {
  const void* mask;  // one per token, or null: all count
  i64 mask_kind;
  const i64* cu_seqlens;  // [rows + 1] or null
  i64 rows, width, units, units_per_row;
};

struct Unit {
  i64 row, begin, end;
};

// a / b for numbers that are not negative; 64-bit division takes a hundred instructions.
__device__ __forceinline__ i64 quotient(i64 a, i64 b) {
  return (a | b) >> 32 ? a / b : i64(unsigned(a) / unsigned(b));
}

__device__ __forceinline__ i64 first_unit(const Side& s, i64 row) {
  return s.cu_seqlens ? s.cu_seqlens[row] / CHUNK + row : row * s.units_per_row;
}

__device__ __forceinline__ i64 row_length(const Side& s, i64 row) {
  return s.cu_seqlens ? s.cu_seqlens[row + 1] - s.cu_seqlens[row] : s.width;
}

// A packed row starts at unit cu_seqlens[row] / CHUNK + row: that leaves room for all its chunks, whatever the lengths,
// and the number of units is known to the host. Some units are empty.
__device__ __forceinline__ Unit unit_of(const Side& s, i64 u) {
  Unit unit;
  i64 start, stop;
  if (s.cu_seqlens) {
    i64 low = 0, high = s.rows - 1;
    while (low < high) {
      const i64 middle = (low + high + 1) / 2;
      if (first_unit(s, middle) <= u)
        low = middle;
      else
        high = middle - 1;
    }
    unit.row = low;
    start = s.cu_seqlens[low], stop = s.cu_seqlens[low + 1];
  } else {
    unit.row = quotient(u, s.units_per_row);
    start = unit.row * s.width, stop = start + s.width;
  }
  unit.begin = start + (u - first_unit(s, unit.row)) * CHUNK;
  unit.end = min(stop, unit.begin + CHUNK);
  return unit;
}

// Bit k: whether this thread's token k, at unit.begin + k * THREADS + threadIdx.x, is there and `mask` is not 0 for it.
template <class X>
__device__ __forceinline__ unsigned nonzero_tokens(const Unit& unit, const void* mask) {
  X x[PER_THREAD];
#pragma unroll
  for (int k = 0; k < PER_THREAD; ++k) {
    const i64 i = unit.begin + k * THREADS + int(threadIdx.x);
    x[k] = i < unit.end ? static_cast<const X*>(mask)[i] : X(0);
  }
  unsigned bits = 0u;
#pragma unroll
  for (int k = 0; k < PER_THREAD; ++k) bits |= unsigned(x[k] != X(0)) << k;
  return bits;
}

// The same for the tokens that count.
__device__ __forceinline__ unsigned valid_tokens(const Side& s, const Unit& unit) {
  switch (int(s.mask_kind)) {
    case MASK_BYTE: return nonzero_tokens<unsigned char>(unit, s.mask);
    case MASK_I32: return nonzero_tokens<int>(unit, s.mask);
    case MASK_I64: return nonzero_tokens<i64>(unit, s.mask);
    case MASK_F32: return nonzero_tokens<float>(unit, s.mask);
    default: break;
  }
  const i64 mine = unit.end - unit.begin - int(threadIdx.x);  // tokens from this thread's first one on
  const int count = mine <= 0 ? 0 : int((mine + THREADS - 1) / THREADS);
  return (1u << count) - 1u;
}

// ----------------------------------------------------------------------------------------- reductions in a fixed order
// What is reduced together: first SUMS sums, then maxima, then minima.
template <int SUMS, int MAXIMA, int MINIMA>
struct Reductions {
  static constexpr int COUNT = SUMS + MAXIMA + MINIMA;
  static constexpr int ROOM = COUNT > 0 ? COUNT : 1;  // an array has at least one element

  template <class X>
  static __device__ __forceinline__ X join(int which, X a, X b) {
    return which < SUMS ? a + b : which < SUMS + MAXIMA ? maximum(a, b) : minimum(a, b);
  }

  template <class X>
  static __device__ __forceinline__ void start(X (&x)[ROOM]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
      x[i] = i < SUMS ? X(0) : X(i < SUMS + MAXIMA ? negative_infinity() : infinity());
  }

  // Each one over the block, in the order of the warps, to out[COUNT]; `room` holds WARPS * COUNT doubles.
  template <class X>
  static __device__ __forceinline__ void over_block(const X (&x)[ROOM], double* room, double* out) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      double y = double(x[i]);
#pragma unroll
      for (int d = WARP / 2; d > 0; d /= 2) y = join(i, y, __shfl_xor_sync(FULL, y, d));
      if (threadIdx.x % WARP == 0) room[threadIdx.x / WARP * COUNT + i] = y;
    }
    __syncthreads();
    for (int i = int(threadIdx.x); i < COUNT; i += THREADS) {
      double y = room[i];
#pragma unroll
      for (int w = 1; w < WARPS; ++w) y = join(i, y, room[w * COUNT + i]);
      out[i] = y;
    }
  }

  // Those of row `row` from its units' (`sums`, [units, COUNT]), in their order.
  static __device__ __forceinline__ void over_units(const Side& s, const double* sums, i64 row, double (&x)[ROOM]) {
    start(x);
    const i64 first = first_unit(s, row), last = first + (row_length(s, row) + CHUNK - 1) / CHUNK;
    for (i64 u = first; u < last; ++u)
#pragma unroll
      for (int i = 0; i < COUNT; ++i) x[i] = join(i, x[i], sums[u * COUNT + i]);
  }
};

// ---------------------------------------------------------------------------------------------- a pass over the tokens
// `Pass` is generated. Its types: Reduced (a Reductions), Row (what a token reads that is the row's), Input (what it
// reads of its own), Output; its functions: row, load, token (values of one valid token, joined to `sums`), store.
template <class Pass, class Arguments>
__device__ __forceinline__ void run_unit(const Arguments& a, const Side& side, i64 u, double* sums, double* room) {
  const Unit unit = unit_of(side, u);
  if (unit.begin >= unit.end) return;  // nobody asks for its sums
  const unsigned valid = valid_tokens(side, unit);
  const typename Pass::Row row = Pass::row(a, unit.row);
  float mine[Pass::Reduced::ROOM];
  Pass::Reduced::start(mine);
#pragma unroll 1
  for (int k = 0; k < PER_THREAD; k += UNROLL) {
    const i64 first = unit.begin + k * THREADS + int(threadIdx.x);
    typename Pass::Input x[UNROLL];
#pragma unroll
    for (int v = 0; v < UNROLL; ++v)
      if (valid >> (k + v) & 1u) x[v] = Pass::load(a, first + v * THREADS);
#pragma unroll
    for (int v = 0; v < UNROLL; ++v) {
      const i64 i = first + v * THREADS;
      if (i >= unit.end) break;
      typename Pass::Output y = {};
      if (valid >> (k + v) & 1u) y = Pass::token(row, x[v], mine);
      Pass::store(a, i, y);
    }
  }
  if (Pass::Reduced::COUNT > 0) Pass::Reduced::over_block(mine, room, sums + u * Pass::Reduced::COUNT);
}

// ---------------------------------------------------------------------------------------------- sequences of one group
// Rows sorted by group, rows of a group in their order: order[begin[g]] .. order[begin[g + 1]] are group g's.
struct Groups {
  const i64* keys;   // [rows], sorted labels
  const i64* order;  // [rows], the row of each
  i64 *begin, *of;   // [rows + 1]; [rows], the group of each sorted place
  i64 rows, count;
};

// Numbers the groups in the order of their labels, which may be any.
__device__ __forceinline__ void find_groups(Groups& g) {
  __shared__ int heads_of[WARPS];
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  g.count = 0;
  for (i64 first = 0; first < g.rows; first += THREADS) {
    const i64 p = first + int(threadIdx.x);
    const bool head = p < g.rows && (p == 0 || g.keys[p] != g.keys[p - 1]);
    const unsigned heads = __ballot_sync(FULL, head);
    __syncthreads();
    if (lane == 0) heads_of[warp] = __popc(heads);
    __syncthreads();
    i64 before = g.count;
    for (int w = 0; w < WARPS; ++w) {
      if (w < warp) before += heads_of[w];
      g.count += heads_of[w];
    }
    before += __popc(heads & (FULL >> (WARP - 1 - lane)));  // heads up to here, this one included
    if (head) g.begin[before - 1] = p;
    if (p < g.rows) g.of[p] = before - 1;
  }
  if (threadIdx.x == 0) g.begin[g.count] = g.rows;
  __syncthreads();
}

// To every row of `out` the reduction of x over the row's group, whose members eight lanes share. The order is theirs.
template <class Kind>
__device__ __forceinline__ void over_groups(const Groups& g, const double* x, double* out) {
  constexpr int TEAM = 8;
  const int lane = threadIdx.x % TEAM;
  for (i64 first = 0; first < g.count; first += THREADS / TEAM) {
    const i64 group = first + int(threadIdx.x) / TEAM;
    const i64 begin = group < g.count ? g.begin[group] : 0, end = group < g.count ? g.begin[group + 1] : 0;
    double mine[1];
    Kind::start(mine);
    for (i64 p = begin + lane; p < end; p += TEAM) mine[0] = Kind::join(0, mine[0], x[g.order[p]]);
#pragma unroll
    for (int d = TEAM / 2; d > 0; d /= 2) mine[0] = Kind::join(0, mine[0], __shfl_xor_sync(FULL, mine[0], d));
    for (i64 p = begin + lane; p < end; p += TEAM) out[g.order[p]] = mine[0];
  }
}

enum Members { OTHERS, BEFORE, AFTER };

// To every row the sum of x over members of its group: all but itself; itself and those before it by key, larger ones
// first; itself and those after it. Equal keys are in the order of the rows. `key` is null for OTHERS.
template <Members WHICH>
__device__ __forceinline__ void add_members(const Groups& g, const double* x, const double* key, double* out) {
  for (i64 p = threadIdx.x; p < g.rows; p += THREADS) {
    const double own = WHICH == OTHERS ? 0. : key[g.order[p]];
    double sum = 0.;
    for (i64 q = g.begin[g.of[p]]; q < g.begin[g.of[p] + 1]; ++q) {
      const i64 row = g.order[q];
      const double other = WHICH == OTHERS ? 0. : key[row];
      const bool taken = WHICH == OTHERS   ? q != p
                         : WHICH == BEFORE ? other > own || (other == own && q <= p)
                                           : other < own || (other == own && q >= p);
      if (taken) sum += x[row];
    }
    out[g.order[p]] = sum;
  }
}

// -------------------------------------------------------------------------------------------------- ranks in the batch
// Place of row `row` when all are sorted by key, ascending; equal ones in their order, NaN last.
__device__ __forceinline__ i64 rank_of(const double* key, i64 row, i64 rows) {
  const double own = key[row];
  const bool unordered = own != own;
  i64 rank = 0;
  for (i64 q = 0; q < rows; ++q) {
    const double other = key[q];
    const bool less = unordered ? other == other : other < own;
    const bool equal = unordered ? other != other : other == own;
    rank += less || (equal && q < row);
  }
  return rank;
}

// To every row the x of the row whose `from` has the rank that its own `to` has. place: [rows], row numbers.
__device__ __forceinline__ void permute_rows(i64 rows, const double* x, const double* from, const double* to,
                                             double* out, double* place) {
  for (i64 row = threadIdx.x; row < rows; row += THREADS) place[rank_of(from, row, rows)] = double(row);
  __syncthreads();
  for (i64 row = threadIdx.x; row < rows; row += THREADS) out[row] = x[i64(place[rank_of(to, row, rows)])];
  __syncthreads();
}

}  // namespace fastreward
