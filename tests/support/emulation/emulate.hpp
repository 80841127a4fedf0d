// Runs CUDA C++ kernels on the CPU, so that their logic is tested where there is no GPU: a thread is a fiber, a block an
// OS thread's set of fibers that switch at barriers and warp exchanges, a cluster as many OS threads. Shared memory is
// thread_local. It says nothing about speed, and nothing about races between barriers.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#define __device__
#define __global__ __attribute__((visibility("default")))
#define __shared__ static thread_local
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint4 {
  unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
struct Dim {
  unsigned x;
};

namespace emulation {

constexpr int WARP_SIZE = 32;
constexpr std::size_t STACK = 64 << 10;

struct Rendezvous {  // how many have come, and how often all have
  int arrived = 0, generation = 0;
};

struct Fiber {
  ucontext_t context;  // where it starts
  jmp_buf resume;      // where it goes on: unlike swapcontext, _longjmp makes no system call
  bool started = false, done = false;
};

struct Cluster {
  explicit Cluster(unsigned blocks) : barrier(blocks), anchors(blocks) {}
  std::barrier<> barrier;
  std::vector<char*> anchors;  // of each block's thread_local memory
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Rendezvous> warps;
  std::vector<int> warp_alive;
  std::vector<std::uint64_t> exchange;
  Rendezvous all, cluster_wide;
  int alive = 0;
  bool any = false, any_of_all = false;  // of __syncthreads_or: so far, and of the last one
  unsigned current = 0, index = 0, grid = 0, rank = 0;
  ucontext_t scheduler;
  jmp_buf back;
  Cluster* cluster = nullptr;
  std::vector<float> dynamic;
  void (*body)(void*) = nullptr;
  void* argument = nullptr;
};

inline thread_local Block* block = nullptr;
inline thread_local char anchor = 0;

inline void yield() {
  if (!_setjmp(block->fibers[block->current].resume)) _longjmp(block->back, 1);
}

template <class Last>
void meet(Rendezvous& r, int members, Last last) {
  const int mine = r.generation;
  if (++r.arrived == members) {
    last();
    r.arrived = 0;
    ++r.generation;
    return;
  }
  while (r.generation == mine) yield();
}

inline void meet_block() {
  meet(block->all, block->alive, [] {});
}
inline void meet_warp() {
  const unsigned w = block->current / WARP_SIZE;
  if (block->warp_alive[w] != WARP_SIZE) std::fprintf(stderr, "emulation: warp operation in a partial warp\n"), std::abort();
  meet(block->warps[w], WARP_SIZE, [] {});
}

inline void entry() {
  block->body(block->argument);
  Block& b = *block;
  b.fibers[b.current].done = true;
  --b.alive;
  --b.warp_alive[b.current / WARP_SIZE];
  if (b.all.arrived) std::fprintf(stderr, "emulation: a thread left while others wait at a barrier\n"), std::abort();
  _longjmp(b.back, 1);
}

inline void resume(Block& b) {
  if (_setjmp(b.back)) return;
  Fiber& fiber = b.fibers[b.current];
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  swapcontext(&b.scheduler, &fiber.context);
}

inline void run_block(unsigned index, unsigned grid, unsigned threads, std::size_t shared, Cluster* cluster, unsigned rank,
                      void (*body)(void*), void* argument) {
  static thread_local std::vector<char> stacks;
  stacks.resize(threads * STACK);
  Block b;
  b.fibers.resize(threads), b.warps.resize(threads / WARP_SIZE), b.exchange.resize(2 * threads);
  b.warp_alive.assign(threads / WARP_SIZE, WARP_SIZE);
  b.alive = int(threads), b.index = index, b.grid = grid, b.rank = rank, b.cluster = cluster;
  b.dynamic.assign(shared / sizeof(float) + 1, std::nanf(""));
  b.body = body, b.argument = argument;
  block = &b;
  if (cluster) {
    cluster->anchors[rank] = &anchor;
    cluster->barrier.arrive_and_wait();
  }
  for (unsigned t = 0; t < threads; ++t) {
    getcontext(&b.fibers[t].context);
    b.fibers[t].context.uc_stack.ss_sp = stacks.data() + t * STACK;
    b.fibers[t].context.uc_stack.ss_size = STACK;
    b.fibers[t].context.uc_link = nullptr;
    makecontext(&b.fibers[t].context, entry, 0);
  }
  while (b.alive)
    for (unsigned t = 0; t < threads; ++t)
      if (!b.fibers[t].done) {
        b.current = t;
        resume(b);
      }
  block = nullptr;
}

// Puts a value where the warp sees it and waits for the other lanes; their values. Two rooms in turn: nobody can be two
// exchanges ahead.
template <class T>
const std::uint64_t* put(T value) {
  static_assert(sizeof(T) <= 8);
  Block& b = *block;
  const unsigned warp = b.current / WARP_SIZE, half = b.warps[warp].generation & 1 ? unsigned(b.fibers.size()) : 0u;
  std::memcpy(&b.exchange[half + b.current], &value, sizeof(T));
  meet_warp();
  return &b.exchange[half + warp * WARP_SIZE];
}

template <class T>
T get(const std::uint64_t* lanes, unsigned lane) {
  T value;
  std::memcpy(&value, lanes + lane, sizeof(T));
  return value;
}

template <class T>
T exchanged(T value, unsigned from) {
  return get<T>(put(value), from);
}

template <class T, class Join>
T reduced(T value, Join join) {
  const std::uint64_t* lanes = put(value);
  T result = get<T>(lanes, 0);
  for (unsigned i = 1; i < WARP_SIZE; ++i) result = join(result, get<T>(lanes, i));
  return result;
}

struct ThreadIndex {
  unsigned x;
};

template <std::size_t BYTES>
struct Blob {
  char bytes[BYTES];
};
template <std::size_t BYTES>
void call(void* kernel, void* arguments) {
  reinterpret_cast<void (*)(Blob<BYTES>)>(kernel)(*static_cast<Blob<BYTES>*>(arguments));
}

// A call for each size of an argument struct, in 8-byte words from FIRST on; smaller ones would go in registers.
constexpr std::size_t FIRST = 3, LAST = 256;
using Call = void (*)(void*, void*);
template <std::size_t... WORDS>
Call call_of(std::size_t words, std::index_sequence<WORDS...>) {
  static constexpr Call all[] = {&call<8 * (FIRST + WORDS)>...};
  return words >= FIRST && words <= LAST ? all[words - FIRST] : nullptr;
}

}  // namespace emulation

#define threadIdx (emulation::ThreadIndex{emulation::block->current})
#define blockIdx (emulation::ThreadIndex{emulation::block->index})
#define blockDim (emulation::ThreadIndex{unsigned(emulation::block->fibers.size())})
#define gridDim (emulation::ThreadIndex{emulation::block->grid})

inline void __syncthreads() { emulation::meet_block(); }
inline int __syncthreads_or(int x) {
  emulation::Block& b = *emulation::block;
  b.any |= x != 0;
  emulation::meet(b.all, b.alive, [&b] { b.any_of_all = std::exchange(b.any, false); });
  return b.any_of_all;
}
inline void __syncwarp(unsigned) { emulation::meet_warp(); }
inline void __threadfence() {}
template <class T>
T __shfl_xor_sync(unsigned, T value, int d) {
  return emulation::exchanged(value, (emulation::block->current % 32u) ^ unsigned(d));
}
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulation::exchanged(value, unsigned(lane));
}
template <class T>
T __shfl_up_sync(unsigned, T value, unsigned d) {
  const unsigned lane = emulation::block->current % 32u;
  return emulation::exchanged(value, lane < d ? lane : lane - d);
}
inline unsigned __reduce_add_sync(unsigned, unsigned x) {
  return emulation::reduced(x, [](unsigned a, unsigned b) { return a + b; });
}
inline unsigned __reduce_min_sync(unsigned, unsigned x) {
  return emulation::reduced(x, [](unsigned a, unsigned b) { return a < b ? a : b; });
}
inline unsigned __ballot_sync(unsigned, bool x) {
  const unsigned bit = unsigned(x) << (emulation::block->current % 32u);
  return emulation::reduced(bit, [](unsigned a, unsigned b) { return a | b; });
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
template <class T>
T atomicMax(T* p, T x) {
  const T old = *p;
  *p = old < x ? x : old;
  return old;
}
inline unsigned atomicInc(unsigned* p, unsigned most) {
  const unsigned old = *p;
  *p = old >= most ? 0u : old + 1u;
  return old;
}
inline unsigned atomicAdd(unsigned* p, unsigned x) { return std::exchange(*p, *p + x); }
inline float __int_as_float(int x) {
  float y;
  std::memcpy(&y, &x, 4);
  return y;
}
inline float __uint_as_float(unsigned x) { return __int_as_float(int(x)); }
inline unsigned __float_as_uint(float x) {
  unsigned y;
  std::memcpy(&y, &x, 4);
  return y;
}
inline long long __double_as_longlong(double x) {
  long long y;
  std::memcpy(&y, &x, 8);
  return y;
}
inline double __longlong_as_double(long long x) {
  double y;
  std::memcpy(&y, &x, 8);
  return y;
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return unsigned(((std::uint64_t(high) << 32) | low) >> (shift & 31u));
}
inline void __stcs(uint4* p, const uint4& v) {
  if (reinterpret_cast<std::uintptr_t>(p) % 16) std::fprintf(stderr, "emulation: misaligned store\n"), std::abort();
  *p = v;
}
using std::isinf;
using std::isnan;
inline int min(int a, int b) { return a < b ? a : b; }
inline long long min(long long a, long long b) { return a < b ? a : b; }
inline long long max(long long a, long long b) { return a > b ? a : b; }

// What csrc/cuda/device/ptx.cuh has as inline PTX.
#define FASTREWARD_CLUSTER(size)
namespace fastreward {

inline float exp2_fast(float x) { return std::exp2(x); }
inline float log2_fast(float x) { return std::log2(x); }
inline unsigned f32_to_bf16(float x) {
  const unsigned bits = __float_as_uint(x);
  if (std::isnan(x)) return 0x7fffu;
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}
inline unsigned f32_to_bf16x2(float low, float high) { return f32_to_bf16(low) | f32_to_bf16(high) << 16; }
inline unsigned short f16_bits(_Float16 x) {
  unsigned short bits;
  std::memcpy(&bits, &x, 2);
  return bits;
}
inline unsigned f32_to_f16x2(float low, float high) {
  return unsigned(f16_bits(_Float16(low))) | unsigned(f16_bits(_Float16(high))) << 16;
}
inline float f16_to_f32(unsigned short bits) {
  _Float16 x;
  std::memcpy(&x, &bits, 2);
  return float(x);
}
inline uint4 load16_readonly(const void* p) {
  if (reinterpret_cast<std::uintptr_t>(p) % 16) std::fprintf(stderr, "emulation: misaligned load\n"), std::abort();
  return *static_cast<const uint4*>(p);
}
inline void cluster_barrier() {
  emulation::meet(emulation::block->cluster_wide, emulation::block->alive,
                  [] { emulation::block->cluster->barrier.arrive_and_wait(); });
}
inline unsigned load_from_rank(const unsigned* mine, unsigned rank) {
  const auto offset = reinterpret_cast<const char*>(mine) - &emulation::anchor;
  return *reinterpret_cast<const unsigned*>(emulation::block->cluster->anchors[rank] + offset);
}

}  // namespace fastreward

inline float* emulated_dynamic_shared() { return emulation::block->dynamic.data(); }

// Runs all blocks of `kernel`, whose argument struct is `words` 8-byte words, `cluster` of them at a time; 1 where
// there is no call for that size.
extern "C" inline __attribute__((used, visibility("default"))) int emulate(void* kernel, void* arguments, int words,
                                                                           unsigned grid, unsigned threads,
                                                                           std::size_t shared, unsigned cluster) {
  struct Both {
    emulation::Call body;
    void *kernel, *arguments;
  } both = {emulation::call_of(std::size_t(words), std::make_index_sequence<emulation::LAST - emulation::FIRST + 1>()),
            kernel, arguments};
  if (!both.body) return 1;
  const auto run = [](void* p) {
    const Both& x = *static_cast<Both*>(p);
    x.body(x.kernel, x.arguments);
  };
  if (cluster == 1) {
    for (unsigned i = 0; i < grid; ++i) emulation::run_block(i, grid, threads, shared, nullptr, 0, run, &both);
    return 0;
  }
  for (unsigned first = 0; first < grid; first += cluster) {
    emulation::Cluster together(cluster);
    std::vector<std::thread> blocks;
    for (unsigned rank = 0; rank < cluster; ++rank)
      blocks.emplace_back(
          [&, rank] { emulation::run_block(first + rank, grid, threads, shared, &together, rank, run, &both); });
    for (std::thread& t : blocks) t.join();
  }
  return 0;
}
