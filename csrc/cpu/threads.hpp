// The one way in which a kernel uses more than one thread: the package's own pool, compiled once for all instruction
// sets (common/threads.cpp, where its protocol is described).
//
// Work is cut into chunks that the data alone decide, never the number of threads; whoever is free takes the next one.
// The calling thread takes chunks too and begins alone, and no call waits for a thread that has not started: where a
// busy process has every other core, the caller does all the work itself and loses nothing. (OpenMP, which stood here
// before, gives each thread its share beforehand and lets all wait for the last: one thread without a core made calls of
// 0.4 ms take 8 ms.)
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace fastreward {

namespace threads {

using Run = void (*)(const void* function, std::int64_t chunk, int slot);
void run(int threads, std::int64_t chunks, Run run, const void* function);

// How much work must be left, in microseconds on one thread, for workers to be woken. For tests: 0 wakes them always.
// Returns what it was.
int set_worth_waking(int microseconds);
// For tests: what a worker does each time before it takes its first chunk of a call; nullptr: nothing.
void set_before_joining(void (*hook)());

}  // namespace threads

// f(chunk, slot) once for each chunk in [0, chunks), on up to `threads` threads, the caller among them; returns when all
// have been run. Threads that run chunks at the same time have different slots in [0, threads): scratch goes by slot, and
// results may not depend on it. Any number of threads may call at once: one has the pool, the others run their chunks
// alone, as does a call from inside of a chunk. The first exception of a chunk is thrown again on the caller, and chunks
// that nobody has begun are left out then. The floating-point environment is the caller's on all threads.
template <class F>
void parallel_chunks(int threads, std::int64_t chunks, const F& f) {
  if (threads <= 1 || chunks <= 1) {
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) f(chunk, 0);
    return;
  }
  const auto call = [](const void* function, std::int64_t chunk, int slot) {
    (*static_cast<const F*>(function))(chunk, slot);
  };
  threads::run(threads, chunks, call, &f);
}

// f(begin, end, slot) for [0, n) cut into ranges of `grain` items, as parallel_chunks.
template <class F>
void parallel_ranges(int threads, std::int64_t n, std::int64_t grain, const F& f) {
  parallel_chunks(threads, (n + grain - 1) / grain, [&](std::int64_t chunk, int slot) {
    const std::int64_t begin = chunk * grain;
    f(begin, n - begin < grain ? n : begin + grain, slot);
  });
}

// Items in a range of n: at least `least`, which are to take some 5 us, and more where there would be too many ranges.
// (Many, so that one of them is a small part of the work: a worker may lose its core inside of it.)
inline std::int64_t grain_of(std::int64_t n, std::int64_t least) {
  constexpr std::int64_t kRanges = 256;
  const std::int64_t fair = (n + kRanges - 1) / kRanges;
  return fair > least ? fair : least > 1 ? least : 1;
}

// Scratch of the threads of one call: what make() gives, one for each slot that asks.
template <class Make>
class PerSlot {
 public:
  PerSlot(int threads, const Make& make)
      : make_(make), count_(threads > 1 ? threads : 1), slots_(new Slot[static_cast<std::size_t>(count_)]) {}
  auto& operator[](int slot) const {
    Slot& s = slots_[slot];
    if (!s.made) ::new (static_cast<void*>(&s.value)) Value(make_()), s.made = true;
    return s.value;
  }
  // f(what was made) for the slots that have asked.
  template <class F>
  void for_each(const F& f) const {
    for (int k = 0; k < count_; ++k)
      if (slots_[k].made) f(slots_[k].value);
  }

 private:
  using Value = decltype(static_cast<const Make*>(nullptr)->operator()());
  struct alignas(64) Slot {  // a cache line of its own: neighbours are written by other threads
    Slot() {}
    ~Slot() {
      if (made) value.~Value();
    }
    bool made = false;
    union {
      Value value;
    };
  };

  const Make& make_;
  int count_;
  std::unique_ptr<Slot[]> slots_;
};

}  // namespace fastreward
