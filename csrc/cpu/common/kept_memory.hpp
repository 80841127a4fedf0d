// Memory for large fresh outputs, kept when it is freed: first touching a gradient of logits costs more than computing
// it (page faults), and every training step frees one and asks for the next.
#pragma once

#include <cstddef>

namespace fastreward {

// A block of uninitialised memory, 2 MiB aligned. Freed ones wait for the next request of about their size, at most
// eight, the oldest is given back. From 32 MiB on they are huge pages, and the system may take them back while they wait
// (MADV_FREE), so that they cost nobody any memory. Any thread. Throws std::bad_alloc.
class KeptMemory {
 public:
  explicit KeptMemory(std::size_t bytes);
  ~KeptMemory();
  KeptMemory(const KeptMemory&) = delete;
  KeptMemory& operator=(const KeptMemory&) = delete;

  void* data() const { return data_; }
  std::size_t size() const { return size_; }

 private:
  void* data_;
  std::size_t size_, capacity_;
};

}  // namespace fastreward
