// The pool of threads (cpu/threads.hpp): what it promises, with workers that come late, or never; and kernels whose bits
// may not depend on it. Run under ASan and under TSan.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <chrono>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <thread>
#include <vector>

#include "checks.hpp"
#include "cpu/group.hpp"
#include "cpu/mask.hpp"
#include "cpu/threads.hpp"
#include "cpu/whiten.hpp"

namespace {

namespace fr = fastreward;

// Waits until it happens; a failure after a minute.
template <class F>
void until(const F& happened) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::minutes(1);
  while (!happened() && std::chrono::steady_clock::now() < end) std::this_thread::yield();
  CHECK(happened());
}

// Runs `chunks` chunks and checks that each has been run once, and that no slot was used twice at a time.
void check_call(int threads, std::int64_t chunks) {
  std::vector<int> times(static_cast<std::size_t>(chunks));
  std::vector<std::atomic<bool>> used(static_cast<std::size_t>(threads));
  std::atomic<bool> shared{false};
  fr::parallel_chunks(threads, chunks, [&](std::int64_t chunk, int slot) {
    if (slot < 0 || slot >= threads || used[static_cast<std::size_t>(slot)].exchange(true)) shared = true;
    ++times[static_cast<std::size_t>(chunk)];
    used[static_cast<std::size_t>(slot)] = false;
  });
  CHECK(!shared);
  for (const int n : times) CHECK(n == 1);
}

// A call in which a worker does take part: the caller's first chunk but one waits for it.
void check_with_worker(int threads) {
  std::atomic<bool> joined{false};
  std::atomic<int> run{0};
  fr::parallel_chunks(threads, 16, [&](std::int64_t, int slot) {
    if (slot > 0) joined = true;
    else if (run.load() > 0) until([&] { return joined.load(); });
    ++run;
  });
  CHECK(joined && run == 16);
}

CASE(threads_run_each_chunk_once) {
  for (const int threads : {-1, 0, 1, 2, 3, 8})
    for (const std::int64_t chunks : {0, 1, 2, 3, 100, 1000}) check_call(threads > 1 ? threads : 1, chunks);
  std::mt19937 random(1);
  for (int i = 0; i < 3000; ++i) check_call(1 + static_cast<int>(random() % 4), static_cast<std::int64_t>(random() % 40));
}

CASE(threads_take_part) {
  for (const int threads : {2, 3, 5, 2}) check_with_worker(threads);
}

CASE(threads_cut_ranges) {
  std::vector<std::int64_t> order;
  fr::parallel_ranges(1, 10, 4, [&](std::int64_t begin, std::int64_t end, int) { order.push_back(begin), order.push_back(end); });
  CHECK((order == std::vector<std::int64_t>{0, 4, 4, 8, 8, 10}));
  CHECK(fr::grain_of(10, 0) == 1 && fr::grain_of(10, 3) == 3 && fr::grain_of(25601, 3) == 101);
}

// ------------------------------------------------------------------------------------------- workers that come late
std::atomic<bool> held{false};
std::atomic<int> waiting{0};
void hold() {
  ++waiting;
  while (held.load()) std::this_thread::yield();
  --waiting;
}

CASE(threads_that_never_start_are_not_waited_for) {
  check_with_worker(4);  // they are there
  held = true;
  fr::threads::set_before_joining(hold);
  fr::parallel_chunks(4, 64, [](std::int64_t, int) { std::this_thread::sleep_for(std::chrono::microseconds(100)); });
  until([] { return waiting.load() > 0; });  // woken, and held before they have a chunk
  for (int call = 0; call < 20; ++call) {
    std::atomic<int> run{0};
    fr::parallel_chunks(4, 64, [&](std::int64_t, int) { ++run; });
    CHECK(run == 64);
  }
  held = false;  // they find the call of their waking gone, and take part in the next ones
  fr::threads::set_before_joining(nullptr);
  check_with_worker(4);
}

CASE(threads_inside_of_a_chunk_are_waited_for) {
  for (int call = 0; call < 5; ++call) {
    std::atomic<bool> inside{false};
    int late = 0;
    fr::parallel_chunks(2, 8, [&](std::int64_t chunk, int slot) {
      if (slot > 0 && !inside.exchange(true)) {
        std::this_thread::sleep_for(std::chrono::milliseconds(20));
        late = 1;
      } else if (slot == 0 && chunk > 0) {
        until([&] { return inside.load(); });
      }
    });
    CHECK(late == 1);
  }
}

// ------------------------------------------------------------------------------------------------ calls at one time
CASE(threads_serve_many_callers) {
  std::vector<std::thread> callers;
  std::atomic<int> wrong{0};
  for (int caller = 0; caller < 4; ++caller)
    callers.emplace_back([&wrong, caller] {
      for (int call = 0; call < 500; ++call) {
        std::atomic<std::int64_t> sum{0};
        fr::parallel_chunks(2 + caller % 2, 30, [&](std::int64_t chunk, int) { sum += chunk; });
        if (sum != 435) ++wrong;
      }
    });
  for (std::thread& caller : callers) caller.join();
  CHECK(wrong == 0);
}

CASE(threads_inside_of_threads) {
  std::atomic<int> run{0};
  fr::parallel_chunks(3, 20, [&](std::int64_t, int) { fr::parallel_chunks(3, 20, [&](std::int64_t, int) { ++run; }); });
  CHECK(run == 400);
}

CASE(threads_throw_on_the_caller) {
  for (const bool by_worker : {false, true}) {
    std::atomic<bool> joined{false};
    bool caught = false;
    try {
      fr::parallel_chunks(2, 50, [&](std::int64_t chunk, int slot) {
        if (slot > 0) joined = true;
        if (by_worker && slot == 0 && chunk > 0) until([&] { return joined.load(); });
        if (by_worker ? slot > 0 : chunk == 7) throw std::runtime_error("a chunk");
      });
    } catch (const std::runtime_error&) {
      caught = true;
    }
    CHECK(caught);
    check_with_worker(2);  // and the pool goes on
  }
}

CASE(threads_compute_as_the_caller_does) {
  std::fesetround(FE_UPWARD);
  std::atomic<bool> joined{false}, other{false};
  fr::parallel_chunks(2, 16, [&](std::int64_t chunk, int slot) {
    if (slot > 0) joined = true;
    else if (chunk > 0) until([&] { return joined.load(); });
    if (std::fegetround() != FE_UPWARD) other = true;
  });
  std::fesetround(FE_TONEAREST);
  CHECK(joined && !other);
}

CASE(threads_have_scratch_by_slot) {
  std::atomic<int> alive{0}, made{0};
  struct Scratch {
    explicit Scratch(std::atomic<int>& count) : alive(count) { ++alive; }
    ~Scratch() { --alive; }
    Scratch(const Scratch&) = delete;
    std::atomic<int>& alive;
    int runs = 0;
  };
  std::atomic<int> runs{0};
  {
    const auto make = [&] {
      ++made;
      return Scratch(alive);
    };
    const fr::PerSlot scratch(3, make);
    fr::parallel_chunks(3, 100, [&](std::int64_t, int slot) { runs += ++scratch[slot].runs > 0 ? 1 : 0; });
    CHECK(alive == made && made >= 1 && made <= 3);
  }
  CHECK(alive == 0 && runs == 100);
}

#ifndef __SANITIZE_THREAD__  // its runtime starts no threads in the child of a process that had some
int exit_code(pid_t child) {
  int status = -1;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

CASE(threads_go_on_in_the_child_of_a_fork) {
  check_with_worker(3);
  std::atomic<bool> stop{false};
  std::thread other([&] {  // forks fall into its calls
    while (!stop) fr::parallel_chunks(2, 50, [](std::int64_t, int) {});
  });
  for (int i = 0; i < 20; ++i) {
    const pid_t child = fork();
    if (child == 0) {
      alarm(60);
      const int before = checks::failures;
      check_call(3, 100);
      check_with_worker(3);
      _exit(checks::failures == before ? 0 : 1);
    }
    CHECK(exit_code(child) == 0);
  }
  stop = true;
  other.join();
  check_with_worker(3);
}
#endif

// ---------------------------------------------------------------------------------------------------------- kernels
CASE(whiten_and_masks_on_threads) {
  constexpr std::int64_t kRows = 40, kColumns = 5001;
  std::mt19937 random(3);
  std::vector<float> x(kRows * kColumns);
  std::vector<std::int32_t> mask(x.size());
  std::int64_t counted = 0;
  for (std::size_t i = 0; i < x.size(); ++i) {
    x[i] = static_cast<float>(random() % 1000) / 100.0f;
    mask[i] = random() % 4 != 0 ? 7 : 0;
    counted += mask[i] != 0 ? 1 : 0;
  }
  std::vector<std::int32_t> ones(mask);
  for (std::int32_t& m : ones) m = m != 0 ? 1 : 0;
  const fr::MaskView view{mask.data(), fr::MaskKind::i32};
  const fr::WhitenInput in{x.data(), view, kRows, kColumns};
  std::vector<fr::Moments> scratch(static_cast<std::size_t>(kRows * in.blocks_per_row()));
  std::vector<float> first;
  double mean = 0.0;
  for (const int threads : {1, 2, 3, 8}) {
    const fr::Moments m = FASTREWARD_DISPATCH(whiten_statistics)(in, scratch.data(), threads);
    std::vector<float> out(x.size());
    FASTREWARD_DISPATCH(whiten_apply)(in, {m.mean, 0.5, 0.0}, out.data(), threads);
    if (threads == 1) first = out, mean = m.mean;
    CHECK(out == first && m.mean == mean);
    CHECK(m.count == static_cast<double>(counted));
    CHECK(FASTREWARD_DISPATCH(mask_count)(view, kRows * kColumns, threads) == counted);
    std::vector<std::uint8_t> flags(x.size());
    std::vector<float> counts(kRows);
    CHECK(!FASTREWARD_DISPATCH(mask_flags)(view, kRows, kColumns, flags.data(), counts.data(), threads));  // of sevens
    CHECK(FASTREWARD_DISPATCH(mask_flags)({ones.data(), fr::MaskKind::i32}, kRows, kColumns, flags.data(), counts.data(),
                                          threads));
    CHECK(std::accumulate(counts.begin(), counts.end(), 0.0) == static_cast<double>(counted));
    CHECK(std::equal(flags.begin(), flags.end(), ones.begin()));
  }
}

CASE(groups_on_threads) {
  constexpr std::int64_t kRows = 50000, kGroups = 3000;
  std::mt19937 random(4);
  std::vector<float> rewards(2 * kRows), first;
  std::vector<std::int64_t> index(kRows);
  for (float& r : rewards) r = static_cast<float>(random() % 1000) / 100.0f;
  for (std::int64_t& g : index) g = static_cast<std::int64_t>(random() % kGroups);
  std::vector<std::int64_t> starts(kGroups + 1), order(kRows);
  std::vector<double> values(kRows), totals(kRows);
  for (const int threads : {1, 2, 3, 8}) {
    std::vector<float> advantages(kRows);
    fr::GroupProblem p;
    p.rewards = rewards.data(), p.rows = kRows, p.components = 2;
    p.group_index = index.data(), p.groups = kGroups;
    p.advantages = advantages.data(), p.threads = threads;
    fr::GroupScratch s;
    s.starts = starts.data(), s.order = order.data(), s.values = values.data(), s.totals = totals.data();
    FASTREWARD_DISPATCH(group_advantages)(p, s);
    if (threads == 1) first = advantages;
    CHECK(advantages == first);
  }
}

}  // namespace
