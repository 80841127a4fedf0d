// The pool: workers that sleep until a call has chunks for them.
//
// All that a call and its workers agree upon is one 64-bit word: how many chunks nobody has taken yet, how many workers
// may still take part, and how many are inside of a chunk right now. Each step is one compare-and-swap on it:
//   the caller takes a chunk      chunks - 1
//   a worker takes its first one  chunks - 1, seats - 1, inside + 1     only where chunks and seats are left
//   a worker takes another one    chunks - 1
//   a worker finds none and goes                         inside - 1
// What follows from it:
//   - A call has ended when no chunks are left and nobody is inside. A worker that has no chunk is not counted, however
//     far it has come: nobody ever waits for a thread that has not started, or that lost its core before its first chunk.
//   - The call's description, on the caller's stack, is read only by those inside, and outlives them.
//   - A worker that comes late, even from the call before, finds no chunks and goes back to sleep; or it finds those of a
//     new call and takes part in that one. Both are right, so the word needs no generation.
// What remains is the wait for a worker that loses its core inside of a chunk, at most until the system runs it again.
// The caller then sleeps, which frees a core for that worker.
//
// Waking a worker costs some 10 us and it takes some 50 us to come, so the caller begins alone, and wakes workers once its
// own chunks show that those left are worth it: short calls use one thread, whatever their kernel. Workers that have not
// yet gone to sleep again (a kernel often has several parallel parts) come by themselves. They sleep on a futex that
// counts wakings, the caller on one that counts endings; there is no lock that somebody without a core could hold.
// Whoever waits looks for a few microseconds and then gives its core away: the caller sleeps, and a worker, before it
// sleeps too, stays around for some milliseconds in which it yields to whoever wants to run. (A core that has nothing to
// run is halted, and takes up to half a millisecond to come back on virtual machines: more than many calls take.)
//
// fork: the child has none of the workers and may have copied the pool in the middle of another thread's call; it begins
// with an empty pool. exit: the workers are detached, sleep, and touch nothing that has a destructor.
#include "cpu/threads.hpp"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cfenv>
#include <chrono>
#include <climits>
#include <csignal>
#include <exception>

namespace fastreward::threads {
namespace {

using Clock = std::chrono::steady_clock;
constexpr std::chrono::microseconds kLook{20};          // at full speed
constexpr std::chrono::microseconds kStayAround{3000};  // of a worker, yielding

// ----------------------------------------------------------------------------------------------------------- the word
constexpr std::uint64_t kInside = 1;                      // 12 bits
constexpr std::uint64_t kSeat = std::uint64_t{1} << 12;   // 12 bits
constexpr std::uint64_t kChunk = std::uint64_t{1} << 24;  // 40 bits
constexpr std::uint64_t kMost = 4095;                     // of 12 bits
constexpr std::uint64_t inside_of(std::uint64_t work) { return work & kMost; }
constexpr std::uint64_t seats_of(std::uint64_t work) { return work / kSeat & kMost; }
constexpr std::uint64_t chunks_of(std::uint64_t work) { return work / kChunk; }

struct Call {
  Run run;
  const void* function;
  std::int64_t chunks;
  std::fenv_t environment;
  std::atomic<bool> failed{false};
  std::exception_ptr failure;  // written by the one who has set `failed`

  // The chunk that was taken when the word was `work`.
  void attempt(std::uint64_t work, int slot) {
    if (failed.load(std::memory_order_relaxed)) return;
    try {
      run(function, chunks - static_cast<std::int64_t>(chunks_of(work)), slot);
    } catch (...) {
      if (!failed.exchange(true)) failure = std::current_exception();
    }
  }
};

// Nothing in it has a destructor. What is not atomic belongs to whoever has `taken` the pool, and to those inside.
struct Pool {
  alignas(64) std::atomic<std::uint64_t> work{0};
  alignas(64) std::atomic<std::uint32_t> wakings{0};  // futex of the workers
  std::atomic<int> sleepers{0};
  alignas(64) std::atomic<std::uint32_t> endings{0};  // futex of the caller
  std::atomic<bool> caller_sleeps{false};
  alignas(64) std::atomic<bool> taken{false};
  Call* call = nullptr;
  int workers = 0;
};
Pool pool;
std::atomic<int> worth_waking{100};
std::atomic<void (*)()> before_joining{nullptr};

// ------------------------------------------------------------------------------------------------------------ waiting
static_assert(sizeof(std::atomic<std::uint32_t>) == 4, "a futex is a plain word");

void sleep_while(const std::atomic<std::uint32_t>& word, std::uint32_t value) {
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
}
void wake(const std::atomic<std::uint32_t>& word, int sleepers) {
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, sleepers, nullptr, nullptr, 0);
}

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Whether it happens within kLook.
template <class F>
bool seen_soon(const F& happened) {
  const auto end = Clock::now() + kLook;
  do {
    for (int i = 0; i < 16; ++i) {
      if (happened()) return true;
      pause();
    }
  } while (Clock::now() < end);
  return false;
}

// Whether it happens within kStayAround, in which everybody else may run.
template <class F>
bool seen_while_yielding(const F& happened) {
  const auto end = Clock::now() + kStayAround;
  do {
    sched_yield();
    if (happened()) return true;
  } while (Clock::now() < end);
  return false;
}

// ------------------------------------------------------------------------------------------------------------ workers
bool has_room(std::uint64_t work) { return chunks_of(work) > 0 && seats_of(work) > 0; }

// Takes part in the call that there is, if it has chunks and a seat left.
void take_part() {
  std::uint64_t work = pool.work.load(std::memory_order_relaxed);
  do {
    if (!has_room(work)) return;
  } while (!pool.work.compare_exchange_weak(work, work - kChunk - kSeat + kInside, std::memory_order_acquire,
                                            std::memory_order_relaxed));
  Call& call = *pool.call;
  const int slot = static_cast<int>(seats_of(work));
  std::fesetenv(&call.environment);
  for (;;) {
    call.attempt(work, slot);
    work = pool.work.load(std::memory_order_relaxed);
    while (!pool.work.compare_exchange_weak(work, chunks_of(work) > 0 ? work - kChunk : work - kInside,
                                            std::memory_order_acq_rel, std::memory_order_relaxed)) {
    }
    if (chunks_of(work) > 0) continue;
    if (inside_of(work) > 1) return;
    pool.endings.fetch_add(1);  // before the look at caller_sleeps, as the caller looks at `work` after setting it
    if (pool.caller_sleeps.load()) wake(pool.endings, 1);
    return;
  }
}

void* worker_main(void*) {
  for (;;) {
    const std::uint32_t seen = pool.wakings.load();  // before the look at `work`: who calls after it wakes us
    if (void (*const hook)() = before_joining.load(std::memory_order_relaxed)) hook();
    take_part();
    const auto called = [] { return has_room(pool.work.load(std::memory_order_relaxed)); };
    if (seen_soon(called) || seen_while_yielding(called)) continue;
    pool.sleepers.fetch_add(1);
    sleep_while(pool.wakings, seen);
    pool.sleepers.fetch_sub(1);
  }
}

// In the child of a fork. (Where it could not be registered nothing hangs either: calls find no worker, or a taken pool.)
void forget_workers() {
  pool.work = 0;
  pool.wakings = pool.endings = 0;
  pool.sleepers = 0;
  pool.caller_sleeps = pool.taken = false;
  pool.workers = 0;
}
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, forget_workers);

// Fewer than asked for where the system gives no more: the call goes on with those.
void start_workers(int count) {
  if (pool.workers >= count) return;
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);  // signals are for the program's own threads
  pthread_attr_t detached;
  pthread_attr_init(&detached);
  pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
  pthread_t thread;
  while (pool.workers < count && pthread_create(&thread, &detached, worker_main, nullptr) == 0) ++pool.workers;
  pthread_attr_destroy(&detached);
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

// ------------------------------------------------------------------------------------------------------------- caller
void wake_workers(int count) {
  start_workers(count);
  pool.wakings.fetch_add(1);
  if (pool.sleepers.load() > 0) wake(pool.wakings, count);
}

void take_chunks(Call& call, int seats) {
  const auto begin = Clock::now();
  const std::chrono::microseconds worth{worth_waking.load(std::memory_order_relaxed)};
  bool woken = false;
  std::uint64_t work = pool.work.load(std::memory_order_relaxed);
  for (std::int64_t done = 1; chunks_of(work) > 0; ++done) {
    while (!pool.work.compare_exchange_weak(work, work - kChunk, std::memory_order_relaxed))
      if (chunks_of(work) == 0) return;
    call.attempt(work, 0);
    work = pool.work.load(std::memory_order_relaxed);
    if (woken || (Clock::now() - begin) * chunks_of(work) < worth * done) continue;
    woken = true;
    wake_workers(seats);
  }
}

void wait_for_those_inside() {
  const auto ended = [] { return inside_of(pool.work.load(std::memory_order_acquire)) == 0; };
  while (!seen_soon(ended)) {
    pool.caller_sleeps = true;
    const std::uint32_t seen = pool.endings.load();
    if (!ended()) sleep_while(pool.endings, seen);
    pool.caller_sleeps = false;
  }
}

}  // namespace

int set_worth_waking(int microseconds) { return worth_waking.exchange(microseconds); }
void set_before_joining(void (*hook)()) { before_joining = hook; }

void run(int threads, std::int64_t chunks, Run run, const void* function) {
  if (pool.taken.exchange(true, std::memory_order_acquire)) {
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) run(function, chunk, 0);
    return;
  }
  const std::int64_t useful = chunks < threads ? chunks : threads;
  const auto seats = static_cast<int>(useful - 1 < static_cast<std::int64_t>(kMost) ? useful - 1 : kMost);
  Call call{run, function, chunks, {}, {}, {}};
  std::fegetenv(&call.environment);
  pool.call = &call;
  pool.work.store(static_cast<std::uint64_t>(chunks) * kChunk + static_cast<std::uint64_t>(seats) * kSeat);
  take_chunks(call, seats);
  wait_for_those_inside();
  pool.taken.store(false, std::memory_order_release);
  if (call.failure) std::rethrow_exception(call.failure);
}

}  // namespace fastreward::threads
