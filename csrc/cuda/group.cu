// Group-normalised advantages: component sum, centre and scale of every group, singletons and unscored rows, in one
// launch (two with the batch's standard deviation, which must be known first). Or the statistics alone, in one.
//
// Fused: a dozen torch launches and the host's loop over groups. Bytes per row: the rewards (4 or 8 each component) and,
// where labels name the groups, 16 for the sorted labels and their order; 4 written. Bound by launch latency, not bytes.
//
// One warp per group. Equal contiguous groups are where the host says; labelled ones come sorted (stably, by torch, on
// the device), a warp per row looks whether its row begins a segment, and leaves where it does not: the number of groups
// need not be known. f64 throughout, variance in two passes, sums over the members in their order in the batch.
#include "cuda/device/device.cuh"

namespace fastreward {

// ------------------------------------------------------------------------------------------------------------- kernels
constexpr int THREADS = 256;
constexpr int WHOLE = 1024;  // threads of the one block that looks at all rows

enum Center { CENTER_NONE, CENTER_MEAN, LEAVE_ONE_OUT, LENGTH_WEIGHTED, SECOND_MAX, CENTER_TENSOR };
enum Scale { SCALE_NONE, SCALE_STD, BATCH_STD, SCALE_MAX, SCALE_TENSOR };
enum Singleton { SINGLETON_ZERO, SINGLETON_RAW, SINGLETON_NAN, LIKE_OTHERS };

struct GroupArguments {
  const void* rewards;  // [rows, components], f32 or f64
  i64 wide;             // 1: f64
  i64 rows, components;
  const i64* keys;   // [rows], sorted group labels; or null: contiguous groups of group_size
  const i64* order;  // [rows], the row of each sorted label
  i64 group_size;
  const float *lengths, *component_weights, *center_values, *scale_values;  // [rows], [components], [rows], [rows]; or null
  i64 center, scale, ddof;
  double eps;
  const double* eps_on_device;  // instead of eps; or null
  i64 eps_inside, singleton;
  i64 separate;            // 1: normalize-then-sum
  double* batch_variance;  // [components], or [1] unless separate: batch-std only
  double* sums;            // [rows]: normalize-then-sum only
  float* out;              // [rows]
  double* statistics;      // [8, rows], layout.GROUP_STATISTICS, instead of out; components = 1, scale = SCALE_STD
  i64 exponentials;        // 1: also the last of them
};

__device__ __forceinline__ double component(const GroupArguments& a, i64 row, i64 k) {
  const i64 i = row * a.components + k;
  return a.wide ? static_cast<const double*>(a.rewards)[i] : double(static_cast<const float*>(a.rewards)[i]);
}

__device__ __forceinline__ double weight_of(const GroupArguments& a, i64 k) {
  return a.component_weights ? double(a.component_weights[k]) : 1.;
}

// Reward number `which` of a row: its component, or the weighted sum of the scored ones. NaN: not scored.
__device__ __forceinline__ double reward(const GroupArguments& a, i64 row, i64 which) {
  if (a.separate) return component(a, row, which);
  double sum = 0.;
  bool scored = false;
  for (i64 k = 0; k < a.components; ++k) {
    const double x = component(a, row, k);
    if (isnan(x)) continue;
    sum += weight_of(a, k) * x;
    scored = true;
  }
  return scored ? sum : double(not_a_number());
}

// Members of one group: sorted positions, or rows, begin .. end.
struct Members {
  const i64* order;
  i64 begin, end;
  __device__ __forceinline__ i64 row(i64 i) const { return order ? order[i] : i; }
};

struct GroupSums {
  double origin;                        // some scored member's reward: equal rewards are exactly their mean
  double count, sum, length, weighted;  // of the scored members; sum and weighted relative to origin
  double first, second;                 // the two largest rewards, equal ones counted apart
  double spread;                        // sum of squared deviations from the mean, or the largest |reward - centre|
};

__device__ __forceinline__ double lowest() { return double(negative_infinity()); }

__device__ __forceinline__ void two_largest(double& first, double& second, double x, double y) {
  const double next = fmin(first, x);
  first = fmax(first, x);
  second = fmax(fmax(second, y), next);
}

__device__ __forceinline__ double centred(const GroupArguments& a, const GroupSums& g, i64 row, double r) {
  const double shifted = r - g.origin;
  switch (a.center) {
    case CENTER_MEAN: return shifted - g.sum / g.count;
    case LEAVE_ONE_OUT: return shifted - (g.sum - shifted) / (g.count - 1.);
    case LENGTH_WEIGHTED: return g.length > 0. ? shifted - g.weighted / g.length : 0.;  // no tokens, no baseline
    case SECOND_MAX: return r - (r == g.first ? g.second : g.first);                    // the largest of the others
    case CENTER_TENSOR: return r - double(a.center_values[row]);
    default: return r;
  }
}

// The highest scored reward among a group's first members, 0 where these have none.
__device__ __forceinline__ double origin_of(const GroupArguments& a, const Members& m, i64 which, int lane) {
  const i64 i = m.begin + lane;
  const double r = i < m.end ? reward(a, m.row(i), which) : double(not_a_number());
  const double highest = warp_max(isnan(r) ? lowest() : r);
  return highest > lowest() ? highest : 0.;
}

__device__ __forceinline__ GroupSums group_sums(const GroupArguments& a, const Members& m, i64 which, int lane) {
  GroupSums g = {origin_of(a, m, which, lane), 0., 0., 0., 0., lowest(), lowest(), 0.};
  for (i64 i = m.begin + lane; i < m.end; i += WARP) {
    const i64 row = m.row(i);
    const double r = reward(a, row, which);
    if (isnan(r)) continue;
    const double length = a.lengths ? double(a.lengths[row]) : 0.;
    const double shifted = r - g.origin;
    g.count += 1., g.sum += shifted, g.length += length, g.weighted += length * shifted;
    two_largest(g.first, g.second, r, lowest());
  }
  g.count = warp_sum(g.count), g.sum = warp_sum(g.sum);
  g.length = warp_sum(g.length), g.weighted = warp_sum(g.weighted);
#pragma unroll
  for (int d = WARP / 2; d > 0; d /= 2) {
    const double x = __shfl_xor_sync(FULL, g.first, d), y = __shfl_xor_sync(FULL, g.second, d);
    two_largest(g.first, g.second, x, y);
  }
  const double mean = g.sum / g.count;
  for (i64 i = m.begin + lane; i < m.end; i += WARP) {
    const i64 row = m.row(i);
    const double r = reward(a, row, which);
    if (isnan(r)) continue;
    const double d = a.scale == SCALE_MAX ? centred(a, g, row, r) : (r - g.origin) - mean;
    g.spread = a.scale == SCALE_MAX ? fmax(g.spread, fabs(d)) : g.spread + d * d;
  }
  g.spread = a.scale == SCALE_MAX ? warp_max(g.spread) : warp_sum(g.spread);
  return g;
}

// Infinite without degrees of freedom.
__device__ __forceinline__ double variance_of(const GroupArguments& a, double squares, double count) {
  const double freedom = count - double(a.ddof);
  return freedom > 0. ? squares / freedom : -lowest();
}

__device__ __forceinline__ double eps_of(const GroupArguments& a) { return a.eps_on_device ? *a.eps_on_device : a.eps; }

__device__ __forceinline__ double scaled_by(const GroupArguments& a, const GroupSums& g, i64 row, i64 which) {
  if (a.scale == SCALE_NONE) return 1.;
  if (a.scale == SCALE_TENSOR) return a.scale_values[row];
  const double eps = eps_of(a);
  if (a.scale == SCALE_MAX) return g.spread + eps;
  const double variance = a.scale == BATCH_STD ? a.batch_variance[which] : variance_of(a, g.spread, g.count);
  return a.eps_inside ? sqrt(variance + eps) : sqrt(variance) + eps;
}

__device__ __forceinline__ double advantage(const GroupArguments& a, const GroupSums& g, i64 row, double r, i64 which) {
  if (g.count == 1. && a.singleton != LIKE_OTHERS)
    return a.singleton == SINGLETON_ZERO ? 0. : a.singleton == SINGLETON_RAW ? r : double(not_a_number());
  const double d = centred(a, g, row, r);
  return d == 0. ? 0. : d / scaled_by(a, g, row, which);  // 0 / 0 is 0
}

__device__ __forceinline__ void normalise_group(const GroupArguments& a, const Members& m, int lane) {
  const i64 many = a.separate ? a.components : 1;
  for (i64 which = 0; which < many; ++which) {
    const GroupSums g = group_sums(a, m, which, lane);
    for (i64 i = m.begin + lane; i < m.end; i += WARP) {
      const i64 row = m.row(i);
      const double r = reward(a, row, which);
      const double y = isnan(r) ? 0. : advantage(a, g, row, r, which);
      if (!a.separate) {
        a.out[row] = float(y);
      } else {  // this lane alone reads and writes this row's sum
        const double total = (which ? a.sums[row] : 0.) + weight_of(a, which) * y;
        a.sums[row] = total;
        if (which == many - 1) a.out[row] = float(total);
      }
    }
  }
}

// The members of the group that a warp works on: of its number (contiguous groups), or of the segment of sorted labels
// that begins at its number; none where no segment does.
__device__ __forceinline__ Members members_of(const GroupArguments& a, i64 warp, int lane) {
  Members m = {a.order, warp * a.group_size, min(a.rows, (warp + 1) * a.group_size)};
  if (!a.keys) return m;
  m.begin = m.end = warp;
  if (warp >= a.rows || (warp > 0 && a.keys[warp - 1] == a.keys[warp])) return m;
  const i64 key = a.keys[warp];
  for (bool same = true; same; m.end += same ? WARP : 0) {
    const i64 i = m.end + lane;
    const unsigned inside = __ballot_sync(FULL, i < a.rows && a.keys[i] == key);
    same = inside == FULL;
    if (!same) m.end += __popc(inside);
  }
  return m;
}

__device__ __forceinline__ void write_statistics(const GroupArguments& a, const Members& m, int lane) {
  const GroupSums g = group_sums(a, m, 0, lane);
  double smallest = -lowest(), rest = 0., ties = 0.;
  for (i64 i = m.begin + lane; i < m.end; i += WARP) {
    const double r = component(a, m.row(i), 0);
    if (isnan(r)) continue;
    smallest = fmin(smallest, r);
    if (r == g.first) ties += 1.;
    if (a.exponentials && r < g.first) rest += exp(r - g.second);
  }
  smallest = -warp_max(-smallest), rest = warp_sum(rest), ties = warp_sum(ties);
  const double weighted = g.length > 0. ? g.origin + g.weighted / g.length : double(not_a_number());
  const double found[] = {g.count, g.origin + g.sum / g.count, g.spread, weighted, g.first, g.second, smallest,
                          g.second + log(rest + fmax(ties - 1., 0.))};  // the other largest are exp(0) each
  for (i64 i = m.begin + lane; i < m.end; i += WARP) {
    const i64 row = m.row(i);
#pragma unroll
    for (int k = 0; k < 8; ++k) a.statistics[k * a.rows + row] = found[k];
  }
}

}  // namespace fastreward

// ---------------------------------------------------------------------------------------------------------- launchers
using namespace fastreward;

// A warp per group (contiguous groups) or per row (sorted labels: the first row of a segment works for all of it).
extern "C" __global__ void __launch_bounds__(THREADS, 2) group_normalise(const GroupArguments a) {
  const i64 warp = (i64(blockIdx.x) * THREADS + threadIdx.x) / WARP;
  const int lane = threadIdx.x % WARP;
  const Members m = members_of(a, warp, lane);
  if (m.begin < m.end) normalise_group(a, m, lane);
}

// The same warps.
extern "C" __global__ void __launch_bounds__(THREADS, 2) group_statistics(const GroupArguments a) {
  const i64 warp = (i64(blockIdx.x) * THREADS + threadIdx.x) / WARP;
  const int lane = threadIdx.x % WARP;
  const Members m = members_of(a, warp, lane);
  if (m.begin < m.end) write_statistics(a, m, lane);
}

// Variance over all scored rows, of the sum or of each component (one block each).
extern "C" __global__ void __launch_bounds__(WHOLE) group_batch_variance(const GroupArguments a) {
  __shared__ double shared[WHOLE / WARP];
  const i64 which = blockIdx.x;
  double count = 0., sum = 0., squares = 0.;
  for (i64 row = threadIdx.x; row < a.rows; row += WHOLE) {
    const double r = reward(a, row, which);
    if (!isnan(r)) count += 1., sum += r;
  }
  count = block_sum<WHOLE>(count, shared);
  const double mean = block_sum<WHOLE>(sum, shared) / count;
  for (i64 row = threadIdx.x; row < a.rows; row += WHOLE) {
    const double r = reward(a, row, which);
    if (!isnan(r)) squares += (r - mean) * (r - mean);
  }
  squares = block_sum<WHOLE>(squares, shared);
  if (threadIdx.x == 0) a.batch_variance[which] = variance_of(a, squares, count);
}

#ifndef __CUDACC_RTC__
fastreward::KernelTable fastreward::group_kernels() {
  static const Kernel kernels[] = {
      {"group_normalise", reinterpret_cast<const void*>(&group_normalise), sizeof(GroupArguments)},
      {"group_statistics", reinterpret_cast<const void*>(&group_statistics), sizeof(GroupArguments)},
      {"group_batch_variance", reinterpret_cast<const void*>(&group_batch_variance), sizeof(GroupArguments)}};
  return {kernels, sizeof(kernels) / sizeof(kernels[0])};
}
#endif
