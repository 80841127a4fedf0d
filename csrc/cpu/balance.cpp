// Largest differencing (Karmarkar and Karp 1982) into any number of parts: lengths [count] -> the sequences of each part.
//
// Each sequence begins as a partition of its own, or, for parts of equal size, each run of `parts` neighbours in sorted
// order does. The two partitions with the largest spread (largest sum less smallest) are merged until one is left: the
// largest part of the one with the smallest of the other, and so on. Parts that are empty are not kept: to merge with a
// single sequence is a binary search and the shift of a few ids instead of a sort of all parts, which makes it fast.
//
// Ties are broken by (sum, size, first sequence), a total order, so that the partition is that of the textbook form on a
// heap, whichever heap that is.
#include "cpu/balance.hpp"

#include <algorithm>
#include <vector>

namespace fastreward::FASTREWARD_ISA {
namespace {

using Id = std::int64_t;
constexpr Id kNone = -1;

// A part under way, a linked list of sequences. The first one is its id: no two parts share a sequence.
struct Part {
  std::int64_t sum, size;
  Id last;
};

using Partition = std::vector<Id>;  // its parts that are not empty, largest first

class Balancer {
 public:
  explicit Balancer(const BalanceProblem& problem)
      : p_(problem), part_(size_of(problem.count)), next_(size_of(problem.count), kNone) {}

  void run() {
    for (Id i = 0; i < p_.count; ++i) part(i) = {p_.lengths[i], 1, i};
    start();
    const auto later = [this](const Partition& a, const Partition& b) { return comes_first(b, a); };
    std::make_heap(heap_.begin(), heap_.end(), later);
    while (heap_.size() > 1) {
      std::pop_heap(heap_.begin(), heap_.end(), later);
      Partition first = std::move(heap_.back());
      heap_.pop_back();
      std::pop_heap(heap_.begin(), heap_.end(), later);
      merge(first, heap_.back());
      heap_.back() = std::move(first);
      std::push_heap(heap_.begin(), heap_.end(), later);
    }
    write(heap_.front());
  }

 private:
  static std::size_t size_of(std::int64_t n) { return static_cast<std::size_t>(n); }
  Part& part(Id id) { return part_[size_of(id)]; }
  const Part& part(Id id) const { return part_[size_of(id)]; }

  // ------------------------------------------------------------------------------------------------------- orders
  bool larger(Id a, Id b) const {
    const Part &x = part(a), &y = part(b);
    if (x.sum != y.sum) return x.sum > y.sum;
    if (x.size != y.size) return x.size > y.size;
    return a > b;
  }

  std::int64_t spread(const Partition& of) const {
    return part(of.front()).sum - (of.size() < size_of(p_.parts) ? 0 : part(of.back()).sum);
  }

  bool comes_first(const Partition& a, const Partition& b) const {
    const std::int64_t x = spread(a), y = spread(b);
    return x != y ? x > y : larger(a.front(), b.front());
  }

  // -------------------------------------------------------------------------------------------------------- steps
  void start() {
    Partition all(size_of(p_.count));
    for (Id i = 0; i < p_.count; ++i) all[size_of(i)] = i;
    const std::size_t run = p_.equal_size ? size_of(p_.parts) : 1;
    if (p_.equal_size) sort(all);
    for (auto at = all.begin(); at != all.end(); at += static_cast<std::ptrdiff_t>(run))
      heap_.emplace_back(at, at + static_cast<std::ptrdiff_t>(run));
  }

  void sort(Partition& parts) {
    std::sort(parts.begin(), parts.end(), [this](Id a, Id b) { return larger(a, b); });
  }

  // Part i of `a` gets part parts - 1 - i of `b`. Where one of them is empty the other stays as it is, so that only the
  // smallest of each are joined, as many as are too many: a's smallest with the largest among b's, and so on.
  void merge(Partition& a, Partition& b) {
    const std::size_t together = a.size() + b.size(), parts = size_of(p_.parts);
    const std::size_t joined = together > parts ? together - parts : 0;
    const std::size_t kept = b.size() - joined;
    others_.clear();
    for (std::size_t i = 0; i < joined; ++i) {
      append(a.back(), b[kept + i]);
      others_.push_back(a.back());
      a.pop_back();
    }
    b.resize(kept);
    if (a.size() < b.size()) a.swap(b);
    others_.insert(others_.end(), b.begin(), b.end());
    sort(others_);
    insert_all(a);
  }

  void append(Id to, Id from) {
    next_[size_of(part(to).last)] = from;
    part(to).last = part(from).last;
    part(to).sum += part(from).sum;
    part(to).size += part(from).size;
  }

  // Inserts `others_`, from the smallest one on: what is smaller moves up by as many places as are still needed.
  void insert_all(Partition& into) {
    auto end = static_cast<std::ptrdiff_t>(into.size());
    into.resize(into.size() + others_.size());
    for (auto left = static_cast<std::ptrdiff_t>(others_.size()); left > 0; --left) {
      const Id other = others_[size_of(left - 1)];
      const auto begin = into.begin();
      const auto place = std::upper_bound(begin, begin + end, other, [this](Id a, Id b) { return larger(a, b); });
      std::move_backward(place, begin + end, begin + end + left);
      end = place - begin;
      into[size_of(end + left - 1)] = other;
    }
  }

  void write(const Partition& partition) {
    std::int64_t at = 0;
    std::int64_t* start = p_.starts;
    for (const Id id : partition) {
      *start++ = at;
      for (Id i = id; i != kNone; i = next_[size_of(i)]) p_.order[at++] = i;
    }
    std::fill(start, p_.starts + p_.parts + 1, at);
  }

  const BalanceProblem& p_;
  std::vector<Part> part_;
  std::vector<Id> next_;  // the sequence after this one in its part
  std::vector<Partition> heap_;
  Partition others_;
};

}  // namespace

// -------------------------------------------------------------------------------------------------------- launcher
void balance(const BalanceProblem& problem) { Balancer(problem).run(); }

}  // namespace fastreward::FASTREWARD_ISA
