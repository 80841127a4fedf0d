// Segments: ids of tokens, one value for each segment of a row, and back to the tokens.
//
// Any ids are right, and no float is ever added atomically: `segments_spans` finds where each segment begins and ends in
// its row, through integer atomics at the ends of runs, whose order is of no consequence. Then one warp reduces one
// segment: it reads the tokens between those two, by lanes that count from the first, and leaves out what is not its own.
// Ids in runs, as they nearly always are, are read twice so, and x once. The adjoint takes what it needs of a segment
// (weight, position, exponents) from the same reduction, and `segments_adjoint` writes every token.
// Bytes per token: spans 4, reduction 8 + w, adjoint of a sum 8 + w; w = bytes of a weight.
#include "cuda/device/device.cuh"

namespace fastreward {

// ------------------------------------------------------------------------------------------------------------- kernels
constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;

enum Op { SUM, MEAN, MIN, MAX, FIRST, LAST, COUNT, LOGSUMEXP, MEAN_EXP, SOFTMIN };

struct SpansArguments {
  const void* ids;  // [tokens]
  i64 id_kind;      // 0: none, every token is in segment 0; 1: i32; 2: i64
  i64 columns;      // tokens of a row; or
  const i64* bounds;  // [rows + 1]
  i64 rows, segments, chunks;  // chunks: blocks of a row
  int* spans;  // [2, rows, segments], 0 before: from the first token to the row's end, from its begin to after the last
};

struct ReduceArguments {
  const float* x;  // [tokens]
  const void* ids;
  i64 id_kind;
  const void* weights;  // [tokens]
  i64 weight_kind;      // 0: none; 1: bytes, nonzero counts; 2: f32
  i64 columns;
  const i64* bounds;
  i64 rows, segments;
  const int* spans;
  i64 op;
  double temperature, empty;
  const double* given;  // [2]: instead of them; or null
  float* out;           // [rows, segments]; or
  double* state;        // [3, rows, segments]: weight, position or largest exponent; sum of exponentials; soft minimum
};

struct AdjointArguments {
  const float* values;  // [rows, segments]
  const float* x;
  const void* ids;
  i64 id_kind;
  const void* weights;
  i64 weight_kind;
  i64 columns;
  const i64* bounds;
  i64 rows, segments, chunks;
  const double* state;
  i64 op;
  double temperature;
  const double* given;
  float* out;  // [tokens]
};

struct IdsArguments {
  const unsigned char* mask;  // [tokens]; or null
  const void* labels;         // [tokens]; or null
  i64 label_kind;             // as id_kind
  const void* marks;          // [tokens]; or null
  i64 mark_kind;              // 1: bytes; 2: i32
  i64 tail;
  i64 columns;
  const i64* bounds;
  int* out;  // [tokens]
};

struct Row {
  i64 begin, end;
};

__device__ __forceinline__ Row row_of(const i64* bounds, i64 columns, i64 row) {
  if (bounds) return {bounds[row], bounds[row + 1]};
  return {row * columns, (row + 1) * columns};
}

__device__ __forceinline__ i64 integer(const void* ids, i64 kind, i64 t) {
  if (kind == 0) return 0;
  return kind == 1 ? i64(static_cast<const int*>(ids)[t]) : static_cast<const i64*>(ids)[t];
}

__device__ __forceinline__ float weight_of(const void* weights, i64 kind, i64 t) {
  if (kind == 0) return 1.f;
  if (kind == 1) return static_cast<const unsigned char*>(weights)[t] != 0 ? 1.f : 0.f;
  return static_cast<const float*>(weights)[t];
}

__device__ __forceinline__ double exponent(i64 op, double inverse, float x) {
  return op == SOFTMIN ? -double(x) * inverse : double(x);
}

// exp(y - top) of what has a place in the sum; the largest is 1, also where it is infinite.
__device__ __forceinline__ double part_of(double y, double top) {
  return y == -double(__int_as_float(0x7f800000)) ? 0. : y == top ? 1. : exp(y - top);
}

__device__ __forceinline__ i64 warp_min(i64 x) {
#pragma unroll
  for (int d = WARP / 2; d > 0; d /= 2) x = min(x, __shfl_xor_sync(FULL, x, d));
  return x;
}

// What one warp knows of its segment.
struct Segment {
  i64 begin, first, last, id;  // of the row; the segment's first token, and after its last
  double inverse;
};

__device__ __forceinline__ float own_weight(const ReduceArguments& a, const Segment& s, i64 t) {
  return integer(a.ids, a.id_kind, t) == s.id ? weight_of(a.weights, a.weight_kind, t) : 0.f;
}

__device__ __forceinline__ void sums(const ReduceArguments& a, const Segment& s, double& weight, double& total) {
  const bool values = a.op != COUNT && !a.state;  // the derivative needs the weight alone
  for (i64 t = s.first + int(threadIdx.x) % WARP; t < s.last; t += WARP) {
    const float w = own_weight(a, s, t);
    if (w == 0.f) continue;
    weight += w;
    if (values) total += double(w) * (a.op == MEAN_EXP ? exp(double(a.x[t])) : double(a.x[t]));
  }
  weight = warp_sum(weight);
  total = warp_sum(total);
}

// The first or last token of the segment, -1 = none.
__device__ __forceinline__ i64 place_of(const ReduceArguments& a, const Segment& s) {
  const i64 none = s.last + 1;
  i64 near = none;  // distance from the end where the search begins
  for (i64 k = int(threadIdx.x) % WARP; s.first + k < s.last && near == none; k += WARP) {
    const i64 t = a.op == FIRST ? s.first + k : s.last - 1 - k;
    if (own_weight(a, s, t) != 0.f) near = k;
  }
  near = warp_min(near);
  return near == none ? -1 : a.op == FIRST ? s.first + near : s.last - 1 - near;
}

// The largest exponent (of min: of -x) and the first token that has it; NaN where a value is.
__device__ __forceinline__ i64 extreme(const ReduceArguments& a, const Segment& s, double& top) {
  const i64 none = s.last + 1;
  i64 at = none;
  bool nan = false;
  for (i64 t = s.first + int(threadIdx.x) % WARP; t < s.last; t += WARP) {
    if (own_weight(a, s, t) == 0.f) continue;
    const float x = a.op == MIN ? -a.x[t] : a.x[t];
    const double y = exponent(a.op, s.inverse, x);
    nan = nan || isnan(y);
    if (at == none || y > top) top = y, at = t;
  }
  const double largest = warp_max(at == none ? -double(__int_as_float(0x7f800000)) : top);
  at = warp_min(at != none && (top == largest || isnan(top)) ? at : none);
  top = __ballot_sync(FULL, nan) ? double(not_a_number()) : largest;
  return at == none ? -1 : at;
}

__device__ __forceinline__ void exponentials(const ReduceArguments& a, const Segment& s, double top, double& total,
                                             double& soft) {
  double shifted = 0.;
  for (i64 t = s.first + int(threadIdx.x) % WARP; t < s.last; t += WARP) {
    const float w = own_weight(a, s, t);
    if (w == 0.f) continue;
    const double part = double(w) * part_of(exponent(a.op, s.inverse, a.x[t]), top);
    total += part;
    if (part != 0.) shifted += part * double(a.x[t]);
  }
  total = warp_sum(total);
  shifted = warp_sum(shifted);
  soft = total == 0. ? double(__int_as_float(0x7f800000)) : shifted / total;
}

__device__ __forceinline__ void reduce_segment(const ReduceArguments& a, i64 which) {
  const i64 count = a.rows * a.segments, row = which / a.segments;
  const Row r = row_of(a.bounds, a.columns, row);
  Segment s = {r.begin, r.begin, r.end, which % a.segments, 1. / (a.given ? a.given[0] : a.temperature)};
  if (a.spans) s.first = r.end - a.spans[which], s.last = r.begin + a.spans[count + which];
  double weight = 0., total = 0., top = 0., soft = 0.;
  i64 at = -1;
  const bool summed = a.op == SUM || a.op == MEAN || a.op == COUNT || a.op == MEAN_EXP;
  const bool exponential = a.op == LOGSUMEXP || a.op == SOFTMIN;
  if (summed)
    sums(a, s, weight, total);
  else if (a.op == FIRST || a.op == LAST)
    at = place_of(a, s);
  else
    at = extreme(a, s, top);
  if (exponential) exponentials(a, s, top, total, soft);
  if (threadIdx.x % WARP != 0) return;
  if (a.state) {
    a.state[which] = summed ? weight : exponential ? top : double(at - r.begin);
    if (exponential) a.state[count + which] = total, a.state[2 * count + which] = soft;
    return;
  }
  const bool there = at >= 0 || weight > 0.;
  double result = a.given ? a.given[1] : a.empty;
  if (a.op == SUM || a.op == COUNT)
    result = a.op == SUM ? total : weight;
  else if (there)
    result = summed ? total / weight
             : a.op == SOFTMIN ? soft
             : a.op == LOGSUMEXP ? (total == 0. ? top : top + log(total))
             : a.op == MIN ? -top
             : a.op == MAX ? top
                           : double(a.x[at]);
  a.out[which] = float(result);
}

// What a token of weight w gets of its segment's value g.
__device__ __forceinline__ float share_of(const AdjointArguments& a, i64 own, i64 t, i64 begin, float w, double inverse) {
  const double g = a.values[own];
  if (a.op == COUNT) return 0.f;
  if (a.op == SUM) return float(g * w);
  const double first = a.state[own];
  if (a.op == MEAN) return float(g * w / first);
  if (a.op == MEAN_EXP) return float(g * w * (exp(double(a.x[t])) / first));
  if (a.op != LOGSUMEXP && a.op != SOFTMIN) return i64(first) == t - begin ? float(g) : 0.f;
  const i64 count = a.rows * a.segments;
  const double total = a.state[count + own];
  const double part = total == 0. ? 0. : double(w) * part_of(exponent(a.op, inverse, a.x[t]), first) / total;
  if (a.op == LOGSUMEXP || part == 0.) return float(g * part);
  const double x = a.x[t], soft = a.state[2 * count + own];  // as infinite as the values that it is made of
  return float(g * part * (1. - (x == soft ? 0. : x - soft) * inverse));
}

// Sum over the block's threads before this one, of one more int each; `total`: over all of them.
__device__ __forceinline__ int exclusive_sum(int x, int* shared, int& total) {
  const int lane = int(threadIdx.x) % WARP, warp = int(threadIdx.x) / WARP;
  int sum = x;
#pragma unroll
  for (int d = 1; d < WARP; d *= 2) {
    const int left = __shfl_up_sync(FULL, sum, d);
    if (lane >= d) sum += left;
  }
  __syncthreads();
  if (lane == WARP - 1) shared[warp] = sum;
  __syncthreads();
  int before = 0;
  total = 0;
#pragma unroll
  for (int w = 0; w < WARPS; ++w) {
    if (w < warp) before += shared[w];
    total += shared[w];
  }
  return before + sum - x;
}

__device__ __forceinline__ int marks_at(const IdsArguments& a, i64 t) {
  return a.mark_kind == 1 ? int(static_cast<const unsigned char*>(a.marks)[t]) : static_cast<const int*>(a.marks)[t];
}

// The token after the last one that is marked; of the whole block.
__device__ __forceinline__ i64 after_last_mark(const IdsArguments& a, const Row& r, double* shared) {
  double last = 0.;
  for (i64 t = r.begin + int(threadIdx.x); t < r.end; t += THREADS)
    if (marks_at(a, t) != 0) last = double(t + 1 - r.begin);
  return r.begin + i64(block_max<THREADS>(last, shared));
}

// Whether token t may be in a segment, by mask and label.
__device__ __forceinline__ bool here(const IdsArguments& a, i64 t) {
  return (!a.mask || a.mask[t] != 0) && (!a.labels || integer(a.labels, a.label_kind, t) >= 0);
}

}  // namespace fastreward

// ---------------------------------------------------------------------------------------------------------- launchers
using namespace fastreward;

extern "C" __global__ void __launch_bounds__(THREADS) segments_spans(const SpansArguments a) {
  const i64 row = i64(blockIdx.x) / a.chunks, chunk = i64(blockIdx.x) % a.chunks;
  const Row r = row_of(a.bounds, a.columns, row);
  for (i64 t = r.begin + chunk * THREADS + int(threadIdx.x); t < r.end; t += a.chunks * THREADS) {
    const i64 own = integer(a.ids, a.id_kind, t);
    if (own < 0 || own >= a.segments) continue;
    int* const place = a.spans + row * a.segments + own;
    if (t == r.begin || integer(a.ids, a.id_kind, t - 1) != own) atomicMax(place, int(r.end - t));
    if (t + 1 == r.end || integer(a.ids, a.id_kind, t + 1) != own)
      atomicMax(place + a.rows * a.segments, int(t + 1 - r.begin));
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) segments_reduce(const ReduceArguments a) {
  const i64 which = i64(blockIdx.x) * WARPS + int(threadIdx.x) / WARP;
  if (which < a.rows * a.segments) reduce_segment(a, which);
}

extern "C" __global__ void __launch_bounds__(THREADS) segments_adjoint(const AdjointArguments a) {
  const i64 row = i64(blockIdx.x) / a.chunks, chunk = i64(blockIdx.x) % a.chunks;
  const Row r = row_of(a.bounds, a.columns, row);
  const double inverse = 1. / (a.given ? a.given[0] : a.temperature);
  for (i64 t = r.begin + chunk * THREADS + int(threadIdx.x); t < r.end; t += a.chunks * THREADS) {
    const i64 id = integer(a.ids, a.id_kind, t);
    const float w = id >= 0 && id < a.segments ? weight_of(a.weights, a.weight_kind, t) : 0.f;
    a.out[t] = w == 0.f ? 0.f : share_of(a, row * a.segments + id, t, r.begin, w, inverse);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) segments_ids(const IdsArguments a) {
  __shared__ int warps[WARPS];
  __shared__ double lasts[WARPS];
  const Row r = row_of(a.bounds, a.columns, i64(blockIdx.x));
  const i64 tail = a.marks && !a.tail ? after_last_mark(a, r, lasts) : r.end;
  int seen = 0;
  for (i64 start = r.begin; start < r.end; start += THREADS) {
    const i64 t = start + int(threadIdx.x);
    const bool own = t < r.end && here(a, t);
    bool begins = own && (t == r.begin || !here(a, t - 1));
    if (own && !begins && a.labels)
      begins = integer(a.labels, a.label_kind, t) != integer(a.labels, a.label_kind, t - 1);
    const int step = a.marks ? (t < r.end ? marks_at(a, t) : 0) : int(begins);
    int total;
    const int before = seen + exclusive_sum(step, warps, total);
    if (t < r.end) a.out[t] = own && t < tail ? (a.marks ? before : before + step - 1) : -1;
    seen += total;
  }
}

#ifndef __CUDACC_RTC__
fastreward::KernelTable fastreward::segments_kernels() {
  static const Kernel kernels[] = {
      {"segments_spans", reinterpret_cast<const void*>(&segments_spans), sizeof(SpansArguments)},
      {"segments_reduce", reinterpret_cast<const void*>(&segments_reduce), sizeof(ReduceArguments)},
      {"segments_adjoint", reinterpret_cast<const void*>(&segments_adjoint), sizeof(AdjointArguments)},
      {"segments_ids", reinterpret_cast<const void*>(&segments_ids), sizeof(IdsArguments)}};
  return {kernels, sizeof(kernels) / sizeof(kernels[0])};
}
#endif
