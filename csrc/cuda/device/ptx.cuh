// All inline PTX, one instruction to a function, so that everything else is plain CUDA C++, and so that
// tests/support/emulation can put its own in place and run the kernels without a GPU.
#pragma once

namespace fastreward {

__device__ __forceinline__ float exp2_fast(float x) {  // at most 2 ulp
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float log2_fast(float x) {  // near 1 good to 2^-22 absolutely and no more
  float y;
  asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ unsigned f32_to_bf16x2(float low, float high) {
  unsigned y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

__device__ __forceinline__ unsigned f32_to_f16x2(float low, float high) {
  unsigned y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

__device__ __forceinline__ float f16_to_f32(unsigned short bits) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(bits));
  return y;
}

// Through the read-only path: the kernel writes nothing there.
__device__ __forceinline__ uint4 load16_readonly(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}

// ------------------------------------------------------------------------------------- thread-block clusters, sm_90+
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define FASTREWARD_CLUSTER(size) __cluster_dims__(size, 1, 1)
#else
#define FASTREWARD_CLUSTER(size)
#endif

__device__ __forceinline__ void cluster_barrier() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// A 32-bit word of another block's shared memory: `mine` is where it lies in one's own.
__device__ __forceinline__ unsigned load_from_rank(const unsigned* mine, unsigned rank) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  unsigned address = unsigned(__cvta_generic_to_shared(mine)), theirs, value;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(theirs) : "r"(address), "r"(rank));
  asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(value) : "r"(theirs) : "memory");
  return value;
#else
  (void)rank;
  return *mine;
#endif
}

}  // namespace fastreward
