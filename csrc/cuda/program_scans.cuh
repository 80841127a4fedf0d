// Passes with scans: y_t = x_t + c_t y_(t-1) along a row, and the neighbour's value, from either end.
//
// A block takes whole rows and goes along each one token per thread at a time, so that a scan is one of the block: in
// f64, within the warps by shuffles, across them through shared memory, and from one step to the next in registers.
// Tokens that do not count are the map y -> y. A row's steps begin where its units do, whatever else is in the batch.
#pragma once

#include "cuda/program.cuh"

namespace fastreward {

// What the warps of a block tell each other of a step.
struct ScanRoom {
  double c[WARPS], x[WARPS];
};

// y -> c y + x; a c of 0 starts anew, whatever y is.
struct Map {
  double c, x;
  __device__ __forceinline__ double at(double y) const { return c == 0. ? x : fma(c, y, x); }
};

template <bool REVERSE>
__device__ __forceinline__ float scan(float x, double c, bool counts, double& carry, ScanRoom& room) {
  const int lane = int(threadIdx.x) % WARP, warp = int(threadIdx.x) / WARP;
  Map m = counts ? Map{c, double(x)} : Map{1., 0.};
#pragma unroll
  for (int d = 1; d < WARP; d *= 2) {
    const bool there = REVERSE ? lane + d < WARP : lane >= d;
    const int from = there ? (REVERSE ? lane + d : lane - d) : lane;
    const Map first = {__shfl_sync(FULL, m.c, from), __shfl_sync(FULL, m.x, from)};
    if (there) m = {first.c * m.c, m.at(first.x)};
  }
  if (lane == (REVERSE ? 0 : WARP - 1)) room.c[warp] = m.c, room.x[warp] = m.x;
  __syncthreads();
  double before = carry;
#pragma unroll
  for (int n = 0; n < WARPS; ++n) {
    const int w = REVERSE ? WARPS - 1 - n : n;
    if (w == warp) before = carry;
    carry = Map{room.c[w], room.x[w]}.at(carry);
  }
  __syncthreads();
  return float(m.at(before));
}

template <bool REVERSE>
__device__ __forceinline__ float shift(float x, bool counts, float& carry, ScanRoom& room) {
  const int lane = int(threadIdx.x) % WARP, warp = int(threadIdx.x) / WARP;
  const unsigned all = __ballot_sync(FULL, counts), below = (1u << lane) - 1u;
  const unsigned passed = REVERSE ? all & ~below & ~(1u << lane) : all & below;
  const int nearest = REVERSE ? __ffs(int(passed)) - 1 : 31 - __clz(int(passed));
  const int last = REVERSE ? __ffs(int(all)) - 1 : 31 - __clz(int(all));
  const float of_warp = __shfl_sync(FULL, x, passed ? nearest : lane), to_next = __shfl_sync(FULL, x, all ? last : lane);
  if (lane == 0) room.c[warp] = double(all != 0u), room.x[warp] = double(to_next);
  __syncthreads();
  float before = carry;
#pragma unroll
  for (int n = 0; n < WARPS; ++n) {
    const int w = REVERSE ? WARPS - 1 - n : n;
    if (w == warp) before = carry;
    if (room.c[w] != 0.) carry = float(room.x[w]);
  }
  __syncthreads();
  return passed ? of_warp : before;
}

// As run_unit, for all units of a row in turn. `Pass` has also Carries (of its scans) and REVERSE; all threads call its
// token together, those whose token does not count too.
template <class Pass, class Arguments>
__device__ __forceinline__ void run_row(const Arguments& a, const Side& side, i64 number, double* sums, double* room,
                                        ScanRoom& scans) {
  const i64 start = side.cu_seqlens ? side.cu_seqlens[number] : number * side.width, length = row_length(side, number);
  const i64 first = first_unit(side, number), units = (length + CHUNK - 1) / CHUNK;
  const typename Pass::Row row = Pass::row(a, number);
  typename Pass::Carries carries = {};
  for (i64 n = 0; n < units; ++n) {
    const i64 u = Pass::REVERSE ? units - 1 - n : n;
    Unit unit;
    unit.row = number, unit.begin = start + u * CHUNK, unit.end = min(start + length, unit.begin + CHUNK);
    const unsigned valid = valid_tokens(side, unit);
    float mine[Pass::Reduced::ROOM];
    Pass::Reduced::start(mine);
#pragma unroll 1
    for (int step = 0; step < PER_THREAD; step += UNROLL) {
      const int k = Pass::REVERSE ? PER_THREAD - UNROLL - step : step;
      const i64 at = unit.begin + k * THREADS + int(threadIdx.x);
      typename Pass::Input x[UNROLL] = {};
#pragma unroll
      for (int v = 0; v < UNROLL; ++v)
        if (valid >> (k + v) & 1u) x[v] = Pass::load(a, at + v * THREADS);
#pragma unroll
      for (int o = 0; o < UNROLL; ++o) {
        const int v = Pass::REVERSE ? UNROLL - 1 - o : o;
        if (unit.begin + (k + v) * THREADS >= unit.end) continue;  // the same for the whole block
        const bool counts = valid >> (k + v) & 1u;
        const typename Pass::Output y = Pass::token(row, x[v], counts, carries, scans, mine);
        const i64 i = at + v * THREADS;
        if (i < unit.end) Pass::store(a, i, counts ? y : typename Pass::Output{});
      }
    }
    if (Pass::Reduced::COUNT > 0) Pass::Reduced::over_block(mine, room, sums + (first + u) * Pass::Reduced::COUNT);
  }
}

}  // namespace fastreward
