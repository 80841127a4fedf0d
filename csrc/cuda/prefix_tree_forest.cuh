// A prefix tree's two tensors as kernels read them: fields, searches in sorted ones, steps from a leaf to the root; and
// values of either width. fastreward/_runtime/layout.py has the same fields.
#pragma once

#include "cuda/device/device.cuh"

namespace fastreward {

enum NodeField {
  PARENT, DEPTH, EDGE_START, EDGE_LENGTH, COUNT, FIRST_ROW, TOUT, TOKEN_BEGIN, TOKEN_TOUT, CHILDREN, ROW_BEGIN, ROOT
};
enum RowField { LEAF, ORDER, START, LENGTH };

// Behind the nodes there may be empty places: no parent, no tokens, no sequences.
struct Forest {
  const i64* nodes;  // [fields, stride]
  i64 stride, places;
  const i64* rows;  // [4, sequences]
  i64 sequences;
  __device__ __forceinline__ i64 node(NodeField f, i64 n) const { return nodes[f * stride + n]; }
  __device__ __forceinline__ i64 row(RowField f, i64 b) const { return rows[f * sequences + b]; }
  __device__ __forceinline__ i64 end(i64 n) const { return node(EDGE_START, n) + node(EDGE_LENGTH, n); }
};

// f32 or f64, and what is computed with them f64.
struct Floats {
  const void* data;  // or null
  i64 wide;          // 1: f64
  __device__ __forceinline__ double operator[](i64 i) const {
    return wide ? static_cast<const double*>(data)[i] : double(static_cast<const float*>(data)[i]);
  }
  __device__ __forceinline__ double or_one(i64 i) const { return data ? (*this)[i] : 1.; }
};

struct FloatsOut {
  void* data;
  i64 wide;
  __device__ __forceinline__ void put(i64 i, double x) const {
    if (wide) static_cast<double*>(data)[i] = x;
    else static_cast<float*>(data)[i] = float(x);
  }
};

// A number that the host knows, or has on the device.
struct Number {
  const double* on_device;  // or null
  double known;
  __device__ __forceinline__ double get() const { return on_device ? *on_device : known; }
};

__device__ __forceinline__ double nothing() { return double(not_a_number()); }  // the value of what is not there
__device__ __forceinline__ double lowest() { return double(negative_infinity()); }

// The last of the places low .. high of an ascending array whose value is <= x; low where there is none.
__device__ __forceinline__ i64 last_up_to(const i64* ascending, i64 x, i64 low, i64 high) {
  while (low < high) {
    const i64 middle = low + (high - low + 1) / 2;
    if (ascending[middle] <= x) low = middle;
    else high = middle - 1;
  }
  return low;
}

// The node at or above n whose edge holds a position of the sequence.
__device__ __forceinline__ i64 climb(const Forest& f, i64 n, i64 position) {
  while (f.node(EDGE_START, n) > position) n = f.node(PARENT, n);
  return n;
}

// Sum and maximum over WIDTH threads: a warp, or the block, whose `shared` holds WIDTH / WARP doubles.
template <int WIDTH>
__device__ __forceinline__ double team_sum(double x, double* shared) {
  if constexpr (WIDTH == WARP) return warp_sum(x);
  else return block_sum<WIDTH>(x, shared);
}
template <int WIDTH>
__device__ __forceinline__ double team_max(double x, double* shared) {
  if constexpr (WIDTH == WARP) return warp_max(x);
  else return block_max<WIDTH>(x, shared);
}

// Whether the caller is the last of `all` to arrive; then it sees what the others have written.
__device__ __forceinline__ bool arrives_last(unsigned* arrived, i64 all) {
  __threadfence();
  const bool last = i64(atomicAdd(arrived, 1u)) == all - 1;
  if (last) __threadfence();
  return last;
}

// join(n) for the leaf n and then for every node above, by the thread of the child that is ready last: no node waits,
// no level does, and a node's children are all there for whoever comes. Nothing where n is no leaf.
template <class Join>
__device__ __forceinline__ void up_from(const Forest& f, unsigned* arrived, i64 n, Join join) {
  if (n >= f.places || f.node(COUNT, n) == 0 || f.node(CHILDREN, n) > 0) return;
  join(n);
  for (i64 p = f.node(PARENT, n); p >= 0 && arrives_last(arrived + p, f.node(CHILDREN, p)); p = f.node(PARENT, p)) join(p);
}

}  // namespace fastreward
