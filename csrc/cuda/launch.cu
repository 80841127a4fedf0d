// The one place where nvcc's build calls the CUDA runtime: a launch by function pointer. CUDA is first touched by the
// first launch, so that the module imports on a machine that has no driver.
#include "cuda/device/launch.hpp"

#include <cuda_runtime.h>

namespace fastreward {

// ---------------------------------------------------------------------------------------------------------- launchers
const char* launch(const Kernel& kernel, int device, unsigned grid, unsigned block, std::size_t shared, std::uintptr_t stream,
                   const void* arguments) {
  int before = 0;
  cudaError_t status = cudaGetDevice(&before);
  if (status == cudaSuccess && before != device) status = cudaSetDevice(device);
  if (status == cudaSuccess) {
    void* list[] = {const_cast<void*>(arguments)};
    status = cudaLaunchKernel(kernel.function, dim3(grid), dim3(block), list, shared,
                              reinterpret_cast<cudaStream_t>(stream));
  }
  if (status == cudaSuccess && before != device) status = cudaSetDevice(before);
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace fastreward
