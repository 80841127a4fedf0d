// How nvcc's build launches a kernel by name. Which kernel, how many blocks and with what arguments is decided in
// fastreward/cuda/_launch.py, for this route and for CuPy's alike.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastreward {

struct Kernel {
  const char* name;      // of the extern "C" entry
  const void* function;  // its host stub
  std::size_t bytes;     // of its one argument, a struct passed by value
};

struct KernelTable {
  const Kernel* kernels;
  std::size_t count;
};

KernelTable logprobs_kernels();
KernelTable group_kernels();
KernelTable whiten_kernels();
KernelTable segments_kernels();
KernelTable returns_kernels();
KernelTable rewards_kernels();
KernelTable prefix_tree_kernels();

// Queues one launch on `stream` of `device`; nullptr, or CUDA's words for what went wrong.
const char* launch(const Kernel& kernel, int device, unsigned grid, unsigned block, std::size_t shared, std::uintptr_t stream,
                   const void* arguments);

}  // namespace fastreward
