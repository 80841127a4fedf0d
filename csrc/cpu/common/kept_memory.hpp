// Memory for large fresh outputs, kept when it is freed: first touching a gradient of logits costs more than computing
// it (page faults), and every training step frees one and asks for the next.
#pragma once

#include <cstddef>

namespace fastreward {

// A block of uninitialised memory, 64 bytes aligned, and not like the last ones begun within its page: on AMD's Zen 3 two
// streams past the caches to one place of two pages take five times as long (gae's advantages and returns). Freed ones wait for the next request of about their size, at most
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
  std::size_t size_, capacity_;  // capacity: from data on
};

}  // namespace fastreward
