// Tensors as Python hands them over: their data pointers as integers, 0 = absent or empty.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace fastreward {

using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// The pointer to `count` values that a kernel will touch: refused, not followed, where there are none.
template <class T>
T* required(const char* name, Address address, std::int64_t count) {
  if (address == 0 && count > 0)
    throw std::invalid_argument(std::string(name) + ": expected " + std::to_string(count) + " values, got none");
  return at<T>(address);
}

inline void expect_size(const char* name, std::size_t size, int expected) {
  if (size != static_cast<std::size_t>(expected))
    throw std::invalid_argument(std::string(name) + ": expected " + std::to_string(expected) + ", got " +
                                std::to_string(size));
}

}  // namespace fastreward
