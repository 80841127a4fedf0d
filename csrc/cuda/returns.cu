// Returns, GAE, lambda-returns and V-trace: y_t = x_t + c_t y_{t+1} along each row.
//
// Fused: masks, moved rewards, next values, episode ends, the recurrence and both results in one launch. A block has a
// row and goes through it in tiles, from its last valid token to the left (from its first one to the right where the
// recurrence does). A thread has PER_THREAD neighbours; two scans over the threads bring it what masked tokens hand on
// (rewards that move, the value of the next valid token), and the map y -> c y + x of the tokens before. Tiles are
// counted from that first token, so that no padding, on whichever side, changes a bit. Bytes per token: 4 for each
// array that is read, 4 for each that is written, and the mask, twice where a row ends in masked tokens.
//
// Few long rows would leave most of the chip idle, so there each tile has a block, in several launches: where the
// recurrences begin, what tiles hand on over masked tokens and what comes into each (these only under a mask), each
// tile's map, what comes into each, and the results. Tiles and the order in which they are joined are the same, and so
// the bits are the same. What is read is read twice then, under a mask three times.
//
// Minima and maxima are scanned too where there is no discount. Under one, and with logsumexp, they have no associative
// form: a thread has a row there.
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
  // Where each tile has a block:
  i64 slots;
  i64* reach;             // [rows], 0 at first: tokens from the first valid one on; null: all of a row
  struct Passed* passed;  // [slots]: what a tile hands on, then what comes into it; null without a mask
  struct Map* maps;       // [slots]: a tile's map, then the constant that it is applied to
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

struct JoinPassed {
  __device__ __forceinline__ Passed operator()(const Passed& x, const Passed& y) const { return join(x, y); }
};

// y -> c y + x; for minima and maxima, which have no discount, y -> op(x, y), and y -> x where c is 0.
struct Map {
  float c, x;
};

struct JoinMaps {
  i64 op;
  __device__ __forceinline__ Map operator()(const Map& m, const Map& after) const {
    const float c = m.c == 0.f || after.c == 0.f ? 0.f : m.c * after.c;  // a 0 stays one beside what is beyond float32
    if (op == OP_SUM) return {c, m.x == 0.f ? after.x : fmaf(after.c, m.x, after.x)};
    const bool replaced = after.c != 0.f && (op == OP_MIN ? m.x < after.x : m.x > after.x);
    return {c, replaced ? m.x : after.x};
  }
};

// What the recurrence starts from where nothing lies beyond.
__device__ __forceinline__ float nothing(i64 op) {
  return op == OP_MIN ? -negative_infinity() : op == OP_MAX ? negative_infinity() : 0.f;
}

__device__ __forceinline__ Map shuffled(const Map& m, int d) {
  return {__shfl_up_sync(FULL, m.c, d), __shfl_up_sync(FULL, m.x, d)};
}

// What the threads before this one make together, after `before`; `all` becomes what all of them make without it.
template <class T, class Join>
__device__ __forceinline__ T scan_threads(T mine, const T& before, T& all, T* shared, const Join& join) {
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
  T warps = all = shared[0];
#pragma unroll
  for (int w = 1; w < THREADS / WARP; ++w) {
    if (w == warp) warps = all;
    all = join(all, shared[w]);
  }
  if (threadIdx.x == 0) return before;
  return join(before, warp == 0 ? left : lane == 0 ? warps : join(warps, left));
}

// Where the tokens of a row are, [first, first + length), and how many of them lie in front of the recurrence.
struct Row {
  i64 row, first, length, front;
  __device__ __forceinline__ i64 at(const ReturnsArguments& a, i64 k) const {
    return a.reverse ? first + length - 1 - k : first + k;
  }
};

__device__ __forceinline__ Row row_of(const ReturnsArguments& a, i64 row) {
  const i64 first = a.cu_seqlens ? a.cu_seqlens[row] : row * a.columns;
  return {row, first, a.cu_seqlens ? a.cu_seqlens[row + 1] - first : a.columns, 0};
}

// Where a row's tiles begin among all rows': there is room for those on both sides of its first valid token.
__device__ __forceinline__ i64 slot_of(const ReturnsArguments& a, i64 row) {
  return a.cu_seqlens ? 2 * row + a.cu_seqlens[row] / TILE : row * (a.columns / TILE + 2);
}

__device__ __forceinline__ i64 row_at(const ReturnsArguments& a, i64 slot) {
  if (!a.cu_seqlens) return slot / (a.columns / TILE + 2);
  i64 row = 0, last = a.rows - 1;
  while (row < last) {
    const i64 middle = (row + last + 1) / 2;
    if (slot_of(a, middle) <= slot)
      row = middle;
    else
      last = middle - 1;
  }
  return row;
}

__device__ __forceinline__ i64 tiles(i64 count) { return (count + TILE - 1) / TILE; }

// A tile of the recurrence, or of the masked tokens in front of it; both are counted from its first valid token.
struct Tile {
  Row r;
  bool in_front;
  i64 k;
};

__device__ __forceinline__ Tile tile_of(const ReturnsArguments& a, i64 slot) {
  Row r = row_of(a, row_at(a, slot));
  if (a.reach) r.front = r.length - a.reach[r.row];
  const i64 k = slot - slot_of(a, r.row), fronts = tiles(r.front);
  return {r, k < fronts, k < fronts ? k : k - fronts};
}

// The first valid token among the row's k-th THREADS, counted in the order of the recurrence; else `length`.
__device__ __forceinline__ i64 first_valid(const ReturnsArguments& a, const Row& r, i64 start, double* shared) {
  const i64 k = start + int(threadIdx.x);
  const bool valid = k < r.length && counts(a.mask, int(a.mask_kind), r.at(a, k));
  const double nearest = block_max<THREADS>(valid ? double(THREADS - int(threadIdx.x)) : 0., shared);
  return nearest > 0. ? start + THREADS - i64(nearest) : r.length;
}

// How far the recurrence's first valid token is from the row's end that it begins at; `length` where there is none.
__device__ __forceinline__ i64 masked_in_front(const ReturnsArguments& a, const Row& r, double* shared) {
  if (a.mask_kind == MASK_NONE) return 0;
  i64 found = r.length;
  for (i64 start = 0; start < found; start += THREADS) found = min(found, first_valid(a, r, start, shared));
  return found;
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
  if (!t.inside || (!t.valid && (!timed || a.op != OP_SUM)))
    return {t.inside && a.at_masked == AT_RESET ? 0.f : 1.f, nothing(a.op), 0.f};
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

// Rewards of the k-th tile of tokens in front of the recurrence.
__device__ __forceinline__ float front_reward(const ReturnsArguments& a, const Row& r, i64 k, double* shared) {
  double sum = 0.;
  for (int j = 0; j < PER_THREAD; ++j) {
    const i64 back = r.front - 1 - k * TILE - j * THREADS - int(threadIdx.x);  // from the first valid token on
    const float reward = back >= 0 ? a.rewards[r.at(a, back)] : 0.f;
    if (finite(reward)) sum += reward;
  }
  return float(block_sum<THREADS>(sum, shared));
}

// They get 0.
__device__ __forceinline__ void clear_front(const ReturnsArguments& a, const Row& r, i64 k) {
  for (int j = 0; j < PER_THREAD; ++j) {
    const i64 back = r.front - 1 - k * TILE - j * THREADS - int(threadIdx.x);
    if (back < 0) continue;
    a.out[r.at(a, back)] = 0.f;
    if (a.second) a.second[r.at(a, back)] = 0.f;
  }
}

__device__ __forceinline__ bool has_values(const ReturnsArguments& a) {
  return a.kind == KIND_GAE || a.kind == KIND_VTRACE;
}

// What comes into the recurrence's first tile: what lies beyond the row.
__device__ __forceinline__ Passed passed_beyond(const ReturnsArguments& a, i64 row) {
  return {1, 0.f, 1, has_values(a) && a.beyond ? a.beyond[row] : 0.f, 0};
}

// A constant: what the recurrence has come to.
__device__ __forceinline__ Map map_beyond(const ReturnsArguments& a, i64 row) {
  if (a.kind != KIND_RETURNS) return {0.f, 0.f};
  return {0.f, a.beyond ? a.beyond[row] : nothing(a.op)};
}

struct Rooms {
  double sums[THREADS / WARP];
  Passed passed[THREADS / WARP];
  Map maps[THREADS / WARP];
};

__device__ __forceinline__ Token token_of(const ReturnsArguments& a, const Row& r, i64 k) {
  Token t;
  const i64 at = r.at(a, k);
  t.inside = k < r.length;
  t.valid = t.inside && counts(a.mask, int(a.mask_kind), at);
  t.reward = t.valid || (a.move && t.inside) ? a.rewards[at] : 0.f;
  if (!t.valid && !finite(t.reward)) t.reward = 0.f;
  t.value = has_values(a) && t.valid ? a.values[at] : 0.f;
  return t;
}

__device__ __forceinline__ Passed passed_by(const ReturnsArguments& a, const Token& t) {
  return {t.valid, t.valid ? 0.f : t.reward, t.valid || a.at_masked != AT_CARRY, t.value, t.valid};
}

// What a thread's tokens hand on over masked ones; `all`: what the tile's do.
__device__ __forceinline__ Passed pass(const ReturnsArguments& a, const Row& r, i64 own, const Passed& before,
                                       Token (&tokens)[PER_THREAD], Passed& all, Rooms& rooms) {
  Passed mine = {0, 0.f, 0, 0.f, 0};
#pragma unroll
  for (int j = 0; j < PER_THREAD; ++j) {
    tokens[j] = token_of(a, r, own + j);
    mine = join(mine, passed_by(a, tokens[j]));
  }
  return scan_threads(mine, before, all, rooms.passed, JoinPassed{});
}

// The k-th tile of the recurrence. `before` and `map` are what comes into it and become what it hands on: the map's
// value, or without RESULTS the tile's own map.
template <bool RESULTS>
__device__ __forceinline__ void tile(const ReturnsArguments& a, const Numbers& n, const Row& r, i64 k, Passed& before,
                                     Map& map, Rooms& rooms) {
  const i64 own = r.front + k * TILE + int(threadIdx.x) * PER_THREAD;
  const JoinMaps joined{a.op};
  Token tokens[PER_THREAD];
  Passed all;
  Passed passed = pass(a, r, own, before, tokens, all, rooms);
  before = join(before, all);
  Step steps[PER_THREAD];
  Map own_map = {1.f, 0.f};
#pragma unroll
  for (int j = 0; j < PER_THREAD; ++j) {
    steps[j] = step_of(a, n, r.row, r.at(a, own + j), own + j == r.front, tokens[j], passed);
    const Map next = {steps[j].c, steps[j].x};
    own_map = j == 0 ? next : joined(own_map, next);
    passed = join(passed, passed_by(a, tokens[j]));
  }
  Map tile_map;
  [[maybe_unused]] float y = scan_threads(own_map, map, tile_map, rooms.maps, joined).x;
  map = RESULTS ? joined(map, tile_map) : tile_map;
  if constexpr (RESULTS) {
#pragma unroll
    for (int j = 0; j < PER_THREAD; ++j) {
      const float advantage = fmaf(steps[j].factor, y, steps[j].x);
      y = joined({0.f, y}, {steps[j].c, steps[j].x}).x;
      if (tokens[j].inside) put(a, r.at(a, own + j), tokens[j], y, advantage);
    }
  }
}

// What comes into a tile. Without a mask it is the value of the token before it.
__device__ __forceinline__ Passed coming_in(const ReturnsArguments& a, const Tile& t, i64 slot) {
  if (a.passed) return a.passed[slot];
  if (t.k == 0) return passed_beyond(a, t.r.row);
  return {1, 0.f, 1, has_values(a) ? a.values[t.r.at(a, t.r.front + t.k * TILE - 1)] : 0.f, 1};
}

__device__ __forceinline__ Passed broadcast(const Passed& p, int lane) {
  return {__shfl_sync(FULL, p.valid, lane), __shfl_sync(FULL, p.pending, lane), __shfl_sync(FULL, p.valued, lane),
          __shfl_sync(FULL, p.value, lane), __shfl_sync(FULL, p.last, lane)};
}

__device__ __forceinline__ Map broadcast(const Map& m, int lane) {
  return {__shfl_sync(FULL, m.c, lane), __shfl_sync(FULL, m.x, lane)};
}

// A warp: what comes into each of `count` tiles, one after the other, in the place of what it makes.
template <class T, class Join>
__device__ __forceinline__ void join_tiles(T* made, i64 count, T before, const Join& join) {
  const int lane = int(threadIdx.x) % WARP;
  T next = made[lane < count ? lane : 0];
  for (i64 start = 0; start < count; start += WARP) {
    const T loaded = next;
    const i64 ahead = start + WARP + lane;
    next = made[ahead < count ? ahead : count - 1];
    T mine = before;
#pragma unroll
    for (int j = 0; j < WARP; ++j) {
      if (lane == j) mine = before;
      before = join(before, broadcast(loaded, j));
    }
    if (start + lane < count) made[start + lane] = mine;
  }
}

}  // namespace fastreward

// ---------------------------------------------------------------------------------------------------------- launchers
using namespace fastreward;

extern "C" __global__ void __launch_bounds__(THREADS) returns_scan(const ReturnsArguments a) {
  __shared__ Rooms rooms;
  const Numbers n = numbers_of(a);
  Row r = row_of(a, blockIdx.x);
  r.front = masked_in_front(a, r, rooms.sums);
  Passed before = passed_beyond(a, r.row);
  Map map = map_beyond(a, r.row);
  for (i64 k = 0; k < tiles(r.front); ++k) {
    if (a.move) before.pending += front_reward(a, r, k, rooms.sums);
    clear_front(a, r, k);
  }
  for (i64 k = 0; k < tiles(r.length - r.front); ++k) tile<true>(a, n, r, k, before, map, rooms);
}

extern "C" __global__ void __launch_bounds__(THREADS) returns_reach(const ReturnsArguments a) {
  __shared__ double shared[THREADS / WARP];
  const Row r = row_of(a, row_at(a, blockIdx.x));
  const i64 start = (blockIdx.x - slot_of(a, r.row)) * TILE;
  i64 found = r.length;
  for (int j = 0; j < PER_THREAD && found == r.length; ++j) found = first_valid(a, r, start + j * THREADS, shared);
  if (threadIdx.x == 0 && found < r.length) atomicMax(a.reach + r.row, r.length - found);
}

extern "C" __global__ void __launch_bounds__(THREADS) returns_passed(const ReturnsArguments a) {
  __shared__ Rooms rooms;
  const Tile t = tile_of(a, blockIdx.x);
  const Passed before = {0, 0.f, 0, 0.f, 0};
  Passed all = before;
  if (t.in_front) {
    if (a.move) all.pending = front_reward(a, t.r, t.k, rooms.sums);
  } else if (t.k < tiles(t.r.length - t.r.front)) {
    Token tokens[PER_THREAD];
    const i64 own = t.r.front + t.k * TILE + int(threadIdx.x) * PER_THREAD;
    pass(a, t.r, own, before, tokens, all, rooms);
  }
  if (threadIdx.x == 0) a.passed[blockIdx.x] = all;
}

extern "C" __global__ void __launch_bounds__(THREADS) returns_maps(const ReturnsArguments a) {
  __shared__ Rooms rooms;
  const Tile t = tile_of(a, blockIdx.x);
  if (t.in_front || t.k >= tiles(t.r.length - t.r.front)) return;
  Passed before = coming_in(a, t, blockIdx.x);
  Map map = {0.f, 0.f};
  tile<false>(a, numbers_of(a), t.r, t.k, before, map, rooms);
  if (threadIdx.x == 0) a.maps[blockIdx.x] = map;
}

extern "C" __global__ void __launch_bounds__(THREADS) returns_results(const ReturnsArguments a) {
  __shared__ Rooms rooms;
  const Tile t = tile_of(a, blockIdx.x);
  if (t.in_front) return clear_front(a, t.r, t.k);
  if (t.k >= tiles(t.r.length - t.r.front)) return;
  Passed before = coming_in(a, t, blockIdx.x);
  Map map = a.maps[blockIdx.x];
  tile<true>(a, numbers_of(a), t.r, t.k, before, map, rooms);
}

extern "C" __global__ void __launch_bounds__(WARP) returns_join_passed(const ReturnsArguments a) {
  const Tile t = tile_of(a, slot_of(a, blockIdx.x));
  const i64 count = tiles(t.r.front) + tiles(t.r.length - t.r.front);
  join_tiles(a.passed + slot_of(a, blockIdx.x), count, passed_beyond(a, blockIdx.x), JoinPassed{});
}

extern "C" __global__ void __launch_bounds__(WARP) returns_join_maps(const ReturnsArguments a) {
  const Tile t = tile_of(a, slot_of(a, blockIdx.x));
  const i64 fronts = tiles(t.r.front), count = tiles(t.r.length - t.r.front);
  join_tiles(a.maps + slot_of(a, blockIdx.x) + fronts, count, map_beyond(a, blockIdx.x), JoinMaps{a.op});
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
      {"returns_reach", reinterpret_cast<const void*>(&returns_reach), sizeof(ReturnsArguments)},
      {"returns_passed", reinterpret_cast<const void*>(&returns_passed), sizeof(ReturnsArguments)},
      {"returns_join_passed", reinterpret_cast<const void*>(&returns_join_passed), sizeof(ReturnsArguments)},
      {"returns_maps", reinterpret_cast<const void*>(&returns_maps), sizeof(ReturnsArguments)},
      {"returns_join_maps", reinterpret_cast<const void*>(&returns_join_maps), sizeof(ReturnsArguments)},
      {"returns_results", reinterpret_cast<const void*>(&returns_results), sizeof(ReturnsArguments)},
      {"returns_loop", reinterpret_cast<const void*>(&returns_loop), sizeof(ReturnsArguments)}};
  return {kernels, sizeof(kernels) / sizeof(kernels[0])};
}
#endif
