// Returns, GAE, lambda-returns and V-trace: y_t = x_t + c_t y_{t+1} along each row.
//
// Fused: masks, moved rewards, next values, episode ends, the recurrence and both results in one launch. A block has a
// row and goes through it in tiles, from its last valid token to the left (from its first one to the right where the
// recurrence does). A thread has PER_THREAD neighbours; two scans over the threads bring it what masked tokens hand on
// (rewards that move, the value of the next valid token), and the map y -> c y + x of the tokens before. Tiles are
// counted from that first token, so that no padding, on whichever side, changes a bit. Bytes per token: 4 for each
// array that is read, 4 for each that is written, and the mask, twice where a row ends in masked tokens.
//
// Recurrences that are no sums have no associative form under a discount: a thread has a row there.
#include "cuda/device/device.cuh"

namespace fastreward {

// ------------------------------------------------------------------------------------------------------------- kernels
constexpr int THREADS = 256;
constexpr int PER_THREAD = 4;
constexpr int TILE = THREADS * PER_THREAD;
constexpr int LOOP_THREADS = 64;

// As in fastreward/_arguments/options.py: RETURNS_KINDS, AT_MASKED, RETURNS_OPS.
enum Kind { KIND_RETURNS = 0, KIND_GAE = 1, KIND_LAMBDA = 2, KIND_VTRACE = 3 };
enum AtMasked { AT_CARRY = 0, AT_DECAY = 1, AT_RESET = 2, AT_ZERO = 3 };
enum Op { OP_SUM = 0, OP_MIN = 1, OP_MAX = 2, OP_LOGSUMEXP = 3 };

struct ReturnsArguments {
  const float* rewards;      // [tokens], as all that follow
  const float* values;       // or null
  const float* log_ratios;   // or null
  const float* next_values;  // or null
  const float* gammas;       // [tokens], [rows] or null
  const float* lams;
  const unsigned char* terminated;  // or null
  const unsigned char* done;        // or null
  const float* beyond;              // [rows] or null
  const void* mask;
  i64 mask_kind;
  const i64* cu_seqlens;  // [rows + 1]; null: padded, `columns` each
  i64 rows, columns, gamma_per_row, lam_per_row;
  i64 kind, at_masked, op, reverse, move;
  double gamma, lam, scale, rho_bar, c_bar;
  const double* given;  // [5], in place of these
  float* out;
  float* second;  // or null
};

__device__ __forceinline__ bool finite(float x) { return fabsf(x) < -negative_infinity(); }

// The numbers of a call.
struct Numbers {
  float gamma, lam, product, scale, rho_bar, c_bar;
};

__device__ __forceinline__ Numbers numbers_of(const ReturnsArguments& a) {
  const double gamma = a.given ? a.given[0] : a.gamma, lam = a.given ? a.given[1] : a.lam;
  return {float(gamma), float(lam), float(gamma * lam), float(a.given ? a.given[2] : a.scale),
          float(a.given ? a.given[3] : a.rho_bar), float(a.given ? a.given[4] : a.c_bar)};
}

// What tokens hand on to the next one of the recurrence.
struct Passed {
  int valid;      // some token was valid
  float pending;  // rewards since the last valid one
  int valued;     // `value` is theirs
  float value;
  int last;  // the last token was valid
};

__device__ __forceinline__ Passed join(const Passed& a, const Passed& b) {
  return {a.valid | b.valid, b.valid ? b.pending : a.pending + b.pending, a.valued | b.valued,
          b.valued ? b.value : a.value, b.last};
}

__device__ __forceinline__ Passed shuffled(const Passed& p, int d) {
  return {__shfl_up_sync(FULL, p.valid, d), __shfl_up_sync(FULL, p.pending, d), __shfl_up_sync(FULL, p.valued, d),
          __shfl_up_sync(FULL, p.value, d), __shfl_up_sync(FULL, p.last, d)};
}

// y -> c y + x.
struct Map {
  float c, x;
};

__device__ __forceinline__ Map join(const Map& a, const Map& b) { return {a.c * b.c, fmaf(b.c, a.x, b.x)}; }

__device__ __forceinline__ Map shuffled(const Map& m, int d) {
  return {__shfl_up_sync(FULL, m.c, d), __shfl_up_sync(FULL, m.x, d)};
}

// What the threads before this one make together with `before`; `all` becomes what all of them make.
template <class T>
__device__ __forceinline__ T scan_threads(T mine, T before, T& all, T* shared) {
  const int lane = int(threadIdx.x) % WARP, warp = int(threadIdx.x) / WARP;
#pragma unroll
  for (int d = 1; d < WARP; d *= 2) {
    const T other = shuffled(mine, d);
    if (lane >= d) mine = join(other, mine);
  }
  __syncthreads();
  if (lane == WARP - 1) shared[warp] = mine;
  const T left = shuffled(mine, 1);
  __syncthreads();
  T so_far = before;
#pragma unroll
  for (int w = 0; w < THREADS / WARP; ++w) {
    if (w == warp) before = so_far;
    so_far = join(so_far, shared[w]);
  }
  all = so_far;
  return lane == 0 ? before : join(before, left);
}

// How far the recurrence's first valid token is from the row's end that it begins at; `length` where there is none.
__device__ __forceinline__ i64 masked_in_front(const ReturnsArguments& a, i64 first, i64 length, double* shared) {
  if (a.mask_kind == MASK_NONE) return 0;
  for (i64 start = 0; start < length; start += THREADS) {
    const i64 k = start + int(threadIdx.x);
    const i64 at = a.reverse ? first + length - 1 - k : first + k;
    const bool valid = k < length && counts(a.mask, int(a.mask_kind), at);
    const double nearest = block_max<THREADS>(valid ? double(THREADS - int(threadIdx.x)) : 0., shared);
    if (nearest > 0.) return start + THREADS - i64(nearest);
  }
  return length;
}

__device__ __forceinline__ float coefficient(const float* values, bool per_row, float number, i64 row, i64 at) {
  return values == nullptr ? number : values[per_row ? row : at];
}

// A token of the recurrence, made ready.
struct Token {
  bool inside, valid;
  float reward, value;
};

// x, c, and the factor of what came in V-trace's advantage.
struct Step {
  float c, x, factor;
};

__device__ __forceinline__ Step step_of(const ReturnsArguments& a, const Numbers& n, i64 row, i64 at, bool first,
                                        const Token& t, const Passed& before) {
  const bool timed = a.at_masked == AT_DECAY || a.at_masked == AT_ZERO;
  if (!t.inside || (!t.valid && !timed)) return {t.inside && a.at_masked == AT_RESET ? 0.f : 1.f, 0.f, 0.f};
  const float g = coefficient(a.gammas, a.gamma_per_row, n.gamma, row, at);
  const float r = t.valid ? t.reward + (a.move ? before.pending : 0.f) : 0.f;
  if (a.kind == KIND_RETURNS) return {g, r, 0.f};
  const bool ends = a.terminated && t.valid && a.terminated[at];
  const bool cut = ends || (a.done && t.valid && a.done[at]);
  const float discount = ends ? 0.f : g;
  const float next = a.next_values && t.valid ? a.next_values[at] : a.kind == KIND_LAMBDA ? 0.f : before.value;
  const float l = coefficient(a.lams, a.lam_per_row, n.lam, row, at);
  if (a.kind == KIND_LAMBDA) {
    const bool closed = cut || first || (a.at_masked == AT_RESET && !before.last);
    const float traced = closed ? 0.f : l;
    return {g * traced, fmaf(discount * (1.f - traced), next, r), 0.f};
  }
  const float delta = fmaf(discount, next, r) - t.value;
  const float c = cut ? 0.f : a.gammas || a.lams ? g * l : n.product;
  if (a.kind == KIND_GAE) return {c, delta, 0.f};
  const float ratio = expf(t.valid ? a.log_ratios[at] : 0.f);
  const float rho = ratio > n.rho_bar ? n.rho_bar : ratio;
  return {c * (ratio > n.c_bar ? n.c_bar : ratio), rho * delta, cut ? 0.f : rho * discount};
}

__device__ __forceinline__ void put(const ReturnsArguments& a, i64 at, const Token& t, float y, float advantage) {
  const bool shown = t.valid || a.at_masked == AT_DECAY;
  const float sum = shown ? y + t.value : 0.f;
  if (a.kind == KIND_GAE) {
    a.out[at] = shown ? y : 0.f;
    a.second[at] = sum;
  } else if (a.kind == KIND_VTRACE) {
    a.out[at] = sum;
    a.second[at] = shown ? advantage : 0.f;
  } else {
    a.out[at] = shown ? y : 0.f;
  }
}

// Rewards of the tokens in front of the recurrence, which get 0.
__device__ __forceinline__ float clear_front(const ReturnsArguments& a, i64 first, i64 length, i64 front,
                                             double* shared) {
  float pending = 0.f;
  for (i64 start = 0; start < front; start += THREADS) {
    const i64 k = front - 1 - start - int(threadIdx.x);  // from the first valid token on
    const bool here = k >= 0;
    const i64 at = a.reverse ? first + length - 1 - k : first + k;
    float reward = 0.f;
    if (here) {
      if (a.move) reward = a.rewards[at];
      a.out[at] = 0.f;
      if (a.second) a.second[at] = 0.f;
    }
    if (a.move) pending += float(block_sum<THREADS>(finite(reward) ? double(reward) : 0., shared));
  }
  return pending;
}

}  // namespace fastreward

// ---------------------------------------------------------------------------------------------------------- launchers
using namespace fastreward;

extern "C" __global__ void __launch_bounds__(THREADS) returns_scan(const ReturnsArguments a) {
  __shared__ double sums[THREADS / WARP];
  __shared__ Passed passed_room[THREADS / WARP];
  __shared__ Map map_room[THREADS / WARP];
  const i64 row = blockIdx.x;
  const i64 first = a.cu_seqlens ? a.cu_seqlens[row] : row * a.columns;
  const i64 length = a.cu_seqlens ? a.cu_seqlens[row + 1] - first : a.columns;
  const Numbers n = numbers_of(a);
  const i64 front = masked_in_front(a, first, length, sums);
  const float beyond = a.beyond ? a.beyond[row] : 0.f;
  const bool valued = a.kind == KIND_GAE || a.kind == KIND_VTRACE;
  Passed before = {1, clear_front(a, first, length, front, sums), 1, valued ? beyond : 0.f, 0};
  Map map = {0.f, a.kind == KIND_RETURNS ? beyond : 0.f};  // a constant: what the recurrence has come to
  for (i64 start = front; start < length; start += TILE) {
    Token tokens[PER_THREAD];
    Passed mine = {0, 0.f, 0, 0.f, 0};
    const i64 own = start + int(threadIdx.x) * PER_THREAD;
#pragma unroll
    for (int j = 0; j < PER_THREAD; ++j) {
      const i64 at = a.reverse ? first + length - 1 - (own + j) : first + own + j;
      Token& t = tokens[j];
      t.inside = own + j < length;
      t.valid = t.inside && counts(a.mask, int(a.mask_kind), at);
      t.reward = t.valid || (a.move && t.inside) ? a.rewards[at] : 0.f;
      if (!t.valid && !finite(t.reward)) t.reward = 0.f;
      t.value = valued && t.valid ? a.values[at] : 0.f;
      mine = join(mine, {t.valid, t.valid ? 0.f : t.reward, t.valid || a.at_masked != AT_CARRY, t.value, t.valid});
    }
    Passed passed = scan_threads(mine, before, before, passed_room);
    Step steps[PER_THREAD];
    Map own_map = {1.f, 0.f};
#pragma unroll
    for (int j = 0; j < PER_THREAD; ++j) {
      const Token& t = tokens[j];
      const i64 at = a.reverse ? first + length - 1 - (own + j) : first + own + j;
      steps[j] = step_of(a, n, row, at, own + j == front, t, passed);
      own_map = join(own_map, {steps[j].c, steps[j].x});
      passed = join(passed, {t.valid, t.valid ? 0.f : t.reward, t.valid || a.at_masked != AT_CARRY, t.value, t.valid});
    }
    float y = scan_threads(own_map, map, map, map_room).x;
#pragma unroll
    for (int j = 0; j < PER_THREAD; ++j) {
      const i64 at = a.reverse ? first + length - 1 - (own + j) : first + own + j;
      const float advantage = fmaf(steps[j].factor, y, steps[j].x);
      y = fmaf(steps[j].c, y, steps[j].x);
      if (tokens[j].inside) put(a, at, tokens[j], y, advantage);
    }
  }
}

extern "C" __global__ void __launch_bounds__(LOOP_THREADS) returns_loop(const ReturnsArguments a) {
  const i64 row = i64(blockIdx.x) * LOOP_THREADS + int(threadIdx.x);
  if (row >= a.rows) return;
  const i64 first = a.cu_seqlens ? a.cu_seqlens[row] : row * a.columns;
  const i64 length = a.cu_seqlens ? a.cu_seqlens[row + 1] - first : a.columns;
  const Numbers n = numbers_of(a);
  const bool timed = a.at_masked == AT_DECAY || a.at_masked == AT_ZERO;
  bool seen = a.beyond != nullptr, started = false;
  float y = seen ? a.beyond[row] : 0.f;
  for (i64 k = 0; k < length; ++k) {
    const i64 at = a.reverse ? first + length - 1 - k : first + k;
    const bool valid = counts(a.mask, int(a.mask_kind), at);
    started = started || valid;
    const float later = coefficient(a.gammas, a.gamma_per_row, n.gamma, row, at) * y;
    if (valid) {
      const float x = a.rewards[at], low = fminf(x, later), high = fmaxf(x, later);
      float joined = a.op == OP_MIN || (a.op == OP_LOGSUMEXP && n.scale < 0.f) ? low : high;
      if (a.op == OP_LOGSUMEXP) joined += n.scale * log1pf(expf((low - high) / fabsf(n.scale)));
      y = seen ? joined : x;
      seen = true;
    } else if (started && timed) {
      y = later;
    } else if (started && a.at_masked == AT_RESET) {
      seen = false;
    }
    a.out[at] = valid || (started && a.at_masked == AT_DECAY) ? y : 0.f;
  }
}

#ifndef __CUDACC_RTC__
fastreward::KernelTable fastreward::returns_kernels() {
  static const Kernel kernels[] = {
      {"returns_scan", reinterpret_cast<const void*>(&returns_scan), sizeof(ReturnsArguments)},
      {"returns_loop", reinterpret_cast<const void*>(&returns_loop), sizeof(ReturnsArguments)}};
  return {kernels, sizeof(kernels) / sizeof(kernels[0])};
}
#endif
