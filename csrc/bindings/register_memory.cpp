// KeptMemory as a Python buffer: torch.frombuffer makes a tensor of it that gives it back when it dies.
#include "bindings/registry.hpp"
#include "cpu/common/kept_memory.hpp"

namespace fastreward {

void register_memory(pybind11::module_& m) {
  pybind11::class_<KeptMemory>(m, "KeptMemory", pybind11::buffer_protocol())
      .def(pybind11::init<std::size_t>(), pybind11::arg("bytes"))
      .def_buffer([](const KeptMemory& memory) {
        return pybind11::buffer_info(static_cast<unsigned char*>(memory.data()),
                                     static_cast<pybind11::ssize_t>(memory.size()));
      });
}

}  // namespace fastreward
