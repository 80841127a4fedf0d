// Huge pages for large fresh outputs: page faults cost more than the kernels that fill them.
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>

#include "bindings/registry.hpp"

namespace fastreward {
namespace {

// Asks for huge pages on the whole 2 MiB pages inside [address, address + bytes). A hint: failure changes no result.
bool advise_huge_pages(std::uintptr_t address, std::size_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr std::uintptr_t page = std::uintptr_t{1} << 21;
  const std::uintptr_t begin = (address + page - 1) & ~(page - 1);
  const std::uintptr_t end = (address + bytes) & ~(page - 1);
  if (end <= begin) return false;
  return madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE) == 0;
#else
  (void)address, (void)bytes;
  return false;
#endif
}

}  // namespace

void register_memory(pybind11::module_& m) {
  m.def("advise_huge_pages", &advise_huge_pages, pybind11::arg("address"), pybind11::arg("bytes"));
}

}  // namespace fastreward
