#include "cpu/common/kept_memory.hpp"

#include <sys/mman.h>

#include <atomic>
#include <cstdint>
#include <mutex>
#include <new>
#include <vector>

namespace fastreward {
namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;
constexpr std::size_t kReclaimable = std::size_t{32} << 20;  // below, marking small pages costs more than it returns
constexpr std::size_t kWaiting = 8;  // what a trainer's step keeps of ours until the next: rewards, weights, masks, advantages, returns

constexpr std::uintptr_t kPage = 4096, kStep = 256;  // blocks begin by turns at one of 16 places of their first page

struct Block {
  void* data;
  std::size_t capacity;
};

struct Waiting {
  std::mutex mutex;
  std::vector<Block> blocks;  // oldest first
};

Waiting& waiting() {
  static auto* const all = new Waiting;  // never destroyed: tensors may outlive every static
  return *all;
}

std::size_t mapped(std::size_t capacity) { return capacity + kHugePage; }

// The huge page that a block begins in.
void* mapping(void* data) { return reinterpret_cast<void*>(reinterpret_cast<std::uintptr_t>(data) & ~(kHugePage - 1)); }

void unmap(const Block& block) { munmap(mapping(block.data), mapped(block.capacity)); }

// More than is needed is mapped and the ends are cut off, because the system aligns to small pages only.
void* map_aligned(std::size_t capacity) {
  const std::size_t whole = mapped(capacity);
  void* const raw = mmap(nullptr, whole + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (raw == MAP_FAILED) throw std::bad_alloc();
  const auto begin = reinterpret_cast<std::uintptr_t>(raw);
  const std::uintptr_t aligned = (begin + kHugePage - 1) & ~(kHugePage - 1);
  if (aligned > begin) munmap(raw, aligned - begin);
  const std::uintptr_t rest = begin + kHugePage - aligned;
  if (rest > 0) munmap(reinterpret_cast<void*>(aligned + whole), rest);
#ifdef MADV_HUGEPAGE
  if (capacity >= kReclaimable) madvise(reinterpret_cast<void*>(aligned), capacity, MADV_HUGEPAGE);  // a hint
#endif
  static std::atomic<std::uintptr_t> turn{0};
  return reinterpret_cast<void*>(aligned + turn.fetch_add(kStep, std::memory_order_relaxed) % kPage);
}

// The latest freed block that fits without wasting more than a quarter.
void* take_waiting(std::size_t wanted, std::size_t& capacity) {
  const std::lock_guard<std::mutex> lock(waiting().mutex);
  std::vector<Block>& blocks = waiting().blocks;
  for (std::size_t i = blocks.size(); i-- > 0;) {
    const Block block = blocks[i];
    if (block.capacity < wanted || block.capacity - wanted > wanted / 4) continue;
    blocks.erase(blocks.begin() + static_cast<std::ptrdiff_t>(i));
    capacity = block.capacity;
    return block.data;
  }
  return nullptr;
}

}  // namespace

KeptMemory::KeptMemory(std::size_t bytes) : size_(bytes), capacity_((bytes + kHugePage - 1) & ~(kHugePage - 1)) {
  data_ = take_waiting(capacity_, capacity_);
  if (data_ == nullptr) data_ = map_aligned(capacity_);
}

KeptMemory::~KeptMemory() {
#ifdef MADV_FREE
  if (capacity_ >= kReclaimable && madvise(mapping(data_), mapped(capacity_), MADV_FREE) != 0) {
    unmap({data_, capacity_});
    return;
  }
#endif
  Block oldest{nullptr, 0};
  {
    const std::lock_guard<std::mutex> lock(waiting().mutex);
    std::vector<Block>& blocks = waiting().blocks;
    blocks.push_back({data_, capacity_});
    if (blocks.size() > kWaiting) {
      oldest = blocks.front();
      blocks.erase(blocks.begin());
    }
  }
  if (oldest.data != nullptr) unmap(oldest);
}

}  // namespace fastreward
