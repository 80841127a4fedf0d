// fastreward._cuda: the kernels that nvcc built, launched by name. Links the static CUDA runtime and calls it at the
// first launch only, so that it imports on a machine with no driver. Takes device pointers; never links libtorch.
#include <pybind11/pybind11.h>

#include <cstring>
#include <stdexcept>
#include <string>
#include <unordered_map>

#include "cuda/device/launch.hpp"

namespace py = pybind11;

namespace {

using fastreward::Kernel;

const std::unordered_map<std::string, Kernel>& kernels() {
  static const std::unordered_map<std::string, Kernel> all = [] {
    std::unordered_map<std::string, Kernel> map;
    for (const fastreward::KernelTable table : {fastreward::logprobs_kernels(), fastreward::group_kernels(),
                                                fastreward::whiten_kernels(), fastreward::returns_kernels(),
                                                fastreward::segments_kernels(), fastreward::rewards_kernels(),
                                                fastreward::prefix_tree_kernels()})
      for (std::size_t i = 0; i < table.count; ++i) map.emplace(table.kernels[i].name, table.kernels[i]);
    return map;
  }();
  return all;
}

// Queues kernel `name`; `arguments` are the bytes of its one struct.
void launch(const std::string& name, int device, unsigned grid, unsigned block, std::size_t shared,
            std::uintptr_t stream, const py::bytes& arguments) {
  const auto found = kernels().find(name);
  if (found == kernels().end()) throw std::invalid_argument("fastreward._cuda has no kernel " + name);
  const Kernel& kernel = found->second;
  alignas(16) char copy[512];
  const std::string_view bytes = arguments;
  if (bytes.size() != kernel.bytes || bytes.size() > sizeof(copy))
    throw std::invalid_argument(name + " takes " + std::to_string(kernel.bytes) + " bytes of arguments, not " +
                                std::to_string(bytes.size()));
  std::memcpy(copy, bytes.data(), bytes.size());
  if (const char* error = fastreward::launch(kernel, device, grid, block, shared, stream, copy))
    throw std::runtime_error("fastreward: CUDA refused " + name + ": " + error);
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "fastreward's CUDA C++ kernels. Device pointers in, nothing allocated; use fastreward's functions instead.";
  m.def("launch", &launch, py::arg("name"), py::arg("device"), py::arg("grid"), py::arg("block"), py::arg("shared"),
        py::arg("stream"), py::arg("arguments"), "Queues a kernel on a stream; `arguments` is its packed struct.");
  m.def(
      "kernels",
      [] {
        py::dict sizes;
        for (const auto& [name, kernel] : kernels()) sizes[py::str(name)] = kernel.bytes;
        return sizes;
      },
      "Bytes of every kernel's argument struct, by the kernel's name.");
}
