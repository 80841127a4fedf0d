// Builds prefix trees: tokens [rows] -> a compressed radix forest (prefix_tree.hpp).
//
// Rows are inserted one after the other: a row is compared with the edges on its path, a vector at a time, until it
// leaves the tree; what is new of it is never read. So the tokens that rows share are read once for each row, nothing
// else is, and the time is linear in tokens. A child is found by hashing (node, first token) into one table per group,
// so that a node with 65,536 children costs no more than one with two. A split puts the new node above the old one:
// the old one keeps its number, its children and their hash entries. At most two nodes are made for each row, which
// bounds all memory by the rows, not by the tokens. Groups are independent of each other: threads take one at a time.
#include <algorithm>
#include <numeric>

#include "cpu/prefix_tree/prefix_tree.hpp"
#include "cpu/threads.hpp"

namespace fastreward::FASTREWARD_ISA {
namespace {

constexpr std::int64_t kTokens = 1 << 13;  // a thread's share, at least
constexpr std::int64_t kNodes = 1 << 10;  // a thread's share, at least
constexpr std::int32_t kNone = -1;

// ------------------------------------------------------------------------------------------------- rows and groups
// f(group) for all groups, at least `least` of them at a time.
template <class F>
void for_groups(const PrefixForest& forest, int threads, std::int64_t least, const F& f) {
  parallel_ranges(threads, forest.groups, grain_of(forest.groups, least), [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t g = begin; g < end; ++g) f(g);
  });
}

// Rows sorted by group (a stable counting sort).
void sort_rows(const PrefixTreeInput& in, const PrefixForest& forest, const PrefixTreeScratch& s) {
  std::fill_n(s.group_start, forest.groups + 1, 0);
  for (std::int64_t b = 0; b < forest.rows; ++b) ++s.group_start[in.group[b] + 1];
  for (std::int64_t g = 0; g < forest.groups; ++g) s.group_start[g + 1] += s.group_start[g];
  for (std::int64_t b = 0; b < forest.rows; ++b) s.members[s.group_start[in.group[b]]++] = b;
  for (std::int64_t g = forest.groups; g > 0; --g) s.group_start[g] = s.group_start[g - 1];
  s.group_start[0] = 0;
}

std::int64_t tokens_of(const PrefixForest& forest) {
  const std::int64_t* const lengths = forest.field(kRowLength);
  return std::accumulate(lengths, lengths + forest.rows, std::int64_t{0});
}

// First i in [begin, end) where a and b differ, else end.
template <class T>
std::int64_t mismatch(const T* a, const T* b, std::int64_t begin, std::int64_t end) {
  constexpr std::int64_t kChunk = 32;
  std::int64_t i = begin;
  for (; i + kChunk <= end; i += kChunk) {
    T differs = 0;
    for (std::int64_t k = 0; k < kChunk; ++k) differs |= a[i + k] ^ b[i + k];
    if (differs != 0) break;
  }
  while (i < end && a[i] == b[i]) ++i;
  return i;
}

// ------------------------------------------------------------------------------------------------- one group's tree
class Tree {
 public:
  Tree(WorkNode* nodes, std::int32_t* slots, std::int64_t slot_count)
      : nodes_(nodes), slots_(slots), mask_(static_cast<std::uint64_t>(slot_count) - 1) {
    if (slots_ != nullptr) std::fill_n(slots_, slot_count, kNone);
    make(kNone, 0, 0, 0, 0);
  }

  WorkNode& node(std::int32_t n) const { return nodes_[n]; }
  std::int32_t size() const { return size_; }

  std::int32_t find(std::int32_t parent, std::int64_t token) const {
    for (std::uint64_t slot = hash(parent, token);; slot = (slot + 1) & mask_) {
      const std::int32_t n = slots_[slot];
      if (n == kNone || (nodes_[n].parent == parent && nodes_[n].first_token == token)) return n;
    }
  }

  // A new last child.
  std::int32_t add(std::int32_t parent, std::int64_t token, std::int64_t start, std::int64_t end, std::int32_t row) {
    const std::int32_t n = make(parent, token, start, end, row);
    append(parent, n);
    if (slots_ != nullptr) slots_[free_slot(parent, token)] = n;
    return n;
  }

  // A new node between `n` and its parent, with n's tokens before position `at`; `token` is n's one there.
  std::int32_t split(std::int32_t n, std::int64_t at, std::int64_t token) {
    WorkNode& below = nodes_[n];
    const std::int32_t above = make(below.parent, below.first_token, below.start, at, below.first_row);
    WorkNode& u = nodes_[above];
    u.count = below.count;
    if (slots_ != nullptr) slots_[slot_of(n)] = above;
    u.previous = below.previous, u.next = below.next;
    (u.previous == kNone ? nodes_[u.parent].first_child : nodes_[u.previous].next) = above;
    (u.next == kNone ? nodes_[u.parent].last_child : nodes_[u.next].previous) = above;
    below.parent = above, below.start = at, below.first_token = token;
    below.previous = below.next = kNone;
    u.first_child = u.last_child = n;
    if (slots_ != nullptr) slots_[free_slot(above, token)] = n;
    return above;
  }

  void append(std::int32_t parent, std::int32_t n) {
    WorkNode& p = nodes_[parent];
    nodes_[n].previous = p.last_child, nodes_[n].next = kNone;
    (p.last_child == kNone ? p.first_child : nodes_[p.last_child].next) = n;
    p.last_child = n;
  }

 private:
  std::int32_t make(std::int32_t parent, std::int64_t token, std::int64_t start, std::int64_t end, std::int32_t row) {
    nodes_[size_] = {token, start, end, parent, kNone, kNone, kNone, kNone, row, 0, 0};
    return size_++;
  }
  std::uint64_t hash(std::int32_t parent, std::int64_t token) const {
    std::uint64_t h = static_cast<std::uint64_t>(token) * 0x9E3779B97F4A7C15U;
    h ^= static_cast<std::uint64_t>(parent) * 0xC2B2AE3D27D4EB4FU;
    h ^= h >> 32;
    h *= 0xD6E8FEB86659FD93U;
    return (h >> 32) & mask_;
  }
  std::uint64_t slot_of(std::int32_t n) const {
    std::uint64_t slot = hash(nodes_[n].parent, nodes_[n].first_token);
    while (slots_[slot] != n) slot = (slot + 1) & mask_;
    return slot;
  }
  std::uint64_t free_slot(std::int32_t parent, std::int64_t token) const {
    std::uint64_t slot = hash(parent, token);
    while (slots_[slot] != kNone) slot = (slot + 1) & mask_;
    return slot;
  }

  WorkNode* nodes_;
  std::int32_t* slots_;
  std::uint64_t mask_;
  std::int32_t size_ = 0;
};

// Inserts tokens [length] as `row`; returns the node where it ends.
template <class T>
std::int32_t insert(Tree& tree, const T* all, const std::int64_t* starts, std::int64_t row, std::int64_t length) {
  const T* const tokens = all + starts[row];
  std::int32_t at = 0;
  std::int64_t position = 0;
  ++tree.node(0).count;
  while (position < length) {
    std::int32_t child = tree.find(at, static_cast<std::int64_t>(tokens[position]));
    if (child == kNone) {
      child = tree.add(at, static_cast<std::int64_t>(tokens[position]), position, length,
                       static_cast<std::int32_t>(row));
      position = length;
    } else {
      const std::int64_t end = tree.node(child).end;
      const T* const other = all + starts[tree.node(child).first_row];
      position = mismatch(tokens, other, position + 1, std::min(end, length));
      if (position < end) child = tree.split(child, position, static_cast<std::int64_t>(other[position]));
    }
    ++tree.node(child).count;
    at = child;
  }
  ++tree.node(at).ends;
  return at;
}

// Hangs `row` off the path to `leaf` (a row's end) after `position` tokens; returns the node where it ends.
std::int32_t branch(Tree& tree, std::int32_t leaf, std::int64_t position, std::int64_t row, std::int64_t length) {
  std::int32_t at = leaf;
  while (tree.node(at).parent != kNone && tree.node(at).start >= position) at = tree.node(at).parent;
  if (position < tree.node(at).end) at = tree.split(at, position, 0);
  if (position < length) at = tree.add(at, 0, position, length, static_cast<std::int32_t>(row));
  ++tree.node(at).ends;
  for (std::int32_t n = at; n != kNone; n = tree.node(n).parent) ++tree.node(n).count;
  return at;
}

// Rows need not come after the row that they branch off: first rows and the children's order are put right at the end.
void reorder(Tree& tree, const std::int64_t* leaves, const std::int64_t* members, std::int64_t count,
             std::int32_t* by_first_row) {
  for (std::int32_t n = 0; n < tree.size(); ++n) {
    tree.node(n).first_row = INT32_MAX;
    tree.node(n).first_child = tree.node(n).last_child = kNone;
    by_first_row[n] = n;
  }
  for (std::int64_t i = 0; i < count; ++i) {
    const auto row = static_cast<std::int32_t>(members[i]);  // ascending: whoever comes first stays
    for (auto n = static_cast<std::int32_t>(leaves[row]); n != kNone && tree.node(n).first_row > row;
         n = tree.node(n).parent)
      tree.node(n).first_row = row;
  }
  std::sort(by_first_row, by_first_row + tree.size(), [&](std::int32_t a, std::int32_t b) {
    return tree.node(a).first_row != tree.node(b).first_row ? tree.node(a).first_row < tree.node(b).first_row : a < b;
  });
  for (std::int32_t i = 0; i < tree.size(); ++i)
    if (tree.node(by_first_row[i]).parent != kNone) tree.append(tree.node(by_first_row[i]).parent, by_first_row[i]);
}

// Grows one group from (parent_row, branch_position); false where rows wait for each other.
bool grow_branches(const PrefixTreeInput& in, const PrefixForest& forest, const PrefixTreeScratch& s, Tree& tree,
                   const std::int64_t* members, std::int64_t count, std::int32_t* waiting) {
  const std::int64_t* const lengths = forest.field(kRowLength);
  for (std::int64_t i = 0; i < count; ++i) s.leaves[members[i]] = kNone;
  for (std::int64_t i = 0; i < count; ++i) {
    std::int64_t depth = 0;  // the rows that must come first, up to one whose parent is there
    for (std::int64_t row = members[i]; row >= 0 && s.leaves[row] == kNone; row = in.parent_row[row]) {
      if (depth == count) return false;
      waiting[depth++] = static_cast<std::int32_t>(row);
    }
    while (depth > 0) {
      const std::int64_t row = waiting[--depth];
      const std::int64_t parent = in.parent_row[row];
      const auto leaf = static_cast<std::int32_t>(parent < 0 ? 0 : s.leaves[parent]);
      s.leaves[row] = branch(tree, leaf, parent < 0 ? 0 : in.branch_position[row], row, lengths[row]);
    }
  }
  reorder(tree, s.leaves, members, count, waiting);
  return true;
}

template <class T>
bool grow_group(const PrefixTreeInput& in, const PrefixForest& forest, const PrefixTreeScratch& s, std::int64_t g,
                std::int32_t* slots) {
  const std::int64_t begin = s.group_start[g], count = s.group_start[g + 1] - begin;
  const std::int64_t* const members = s.members + begin;
  const std::int64_t* const lengths = forest.field(kRowLength);
  const bool by_tokens = in.parent_row == nullptr;  // not tokens != nullptr: [B, 0] tokens have no address
  Tree tree(s.nodes + 2 * begin + g, by_tokens ? slots : nullptr, prefix_tree_slots(count));
  tree.node(0).first_row = static_cast<std::int32_t>(members[0]);
  bool grown = true;
  if (by_tokens) {
    const T* const tokens = static_cast<const T*>(in.tokens);
    const std::int64_t* const starts = forest.field(kRowStart);
    for (std::int64_t i = 0; i < count; ++i)
      s.leaves[members[i]] = insert(tree, tokens, starts, members[i], lengths[members[i]]);
  } else {
    grown = grow_branches(in, forest, s, tree, members, count, slots);
  }
  std::int64_t tokens = 0;
  for (std::int32_t n = 0; n < tree.size(); ++n) tokens += tree.node(n).end - tree.node(n).start;
  s.token_sizes[g + 1] = tokens;
  s.sizes[g + 1] = in.compress ? tree.size() : tokens + 1;
  return grown;
}

// -------------------------------------------------------------------------------------------------------- numbering
// Writes a working node as one node, or as a chain of one node for each token; returns the next free number.
class Numbering {
 public:
  Numbering(const PrefixForest& forest, bool compress) : forest_(forest), compress_(compress) {}

  // `parent` is the final number of the parent (of its last token's node), -1 for a root.
  std::int64_t write(const WorkNode& w, std::int64_t number, std::int64_t parent, std::int64_t token,
                     std::int64_t root, std::int64_t row_begin) const {
    const std::int64_t length = w.end - w.start;
    const bool whole = compress_ || length == 0;
    const std::int64_t links = whole ? 1 : length;
    for (std::int64_t i = 0; i < links; ++i, ++number) {
      field(kNodeParent)[number] = parent;
      field(kNodeDepth)[number] = parent < 0 ? 0 : field(kNodeDepth)[parent] + 1;
      field(kNodeEdgeStart)[number] = w.start + i;
      field(kNodeEdgeLength)[number] = whole ? length : 1;
      field(kNodeCount)[number] = w.count;
      field(kNodeFirstRow)[number] = w.first_row;
      field(kNodeTokenBegin)[number] = token + i;
      field(kNodeChildren)[number] = i + 1 < links ? 1 : 0;  // others count themselves
      field(kNodeRowBegin)[number] = row_begin;
      field(kNodeRoot)[number] = root;
      if (parent >= 0 && i == 0) ++field(kNodeChildren)[parent];
      parent = number;
    }
    return number;
  }

  // End of the subtrees of [first, last], the nodes that one working node has become.
  void close(std::int64_t first, std::int64_t last, std::int64_t tout, std::int64_t token_tout) const {
    for (std::int64_t n = first; n <= last; ++n) {
      field(kNodeTout)[n] = tout;
      field(kNodeTokenTout)[n] = token_tout;
    }
  }

 private:
  std::int64_t* field(NodeField f) const { return forest_.field(f); }
  const PrefixForest& forest_;
  bool compress_;
};

// Pre-order of one group. `numbers` holds the final number of each working node's last token; `row_at` the place in
// `order` of the next row that ends at a node.
void number_group(const PrefixTreeInput& in, const PrefixForest& forest, const PrefixTreeScratch& s, std::int64_t g) {
  const std::int64_t begin = s.group_start[g];
  const WorkNode* const work = s.nodes + 2 * begin + g;
  std::int64_t* const numbers = s.numbers + 2 * begin + g;
  const std::int64_t root = s.sizes[g];
  const Numbering numbering(forest, in.compress);
  std::int64_t number = root, token = s.token_sizes[g], row = begin;
  std::int32_t n = 0;
  for (;;) {
    const WorkNode& w = work[n];
    const std::int64_t parent = w.parent == kNone ? -1 : numbers[w.parent];
    const std::int64_t next = numbering.write(w, number, parent, token, root, row);
    numbers[n] = next - 1;
    number = next;
    token += w.end - w.start;
    row += w.ends;
    if (w.first_child != kNone) {
      n = w.first_child;
      continue;
    }
    // Up to the first node with a next sibling; whatever is left on the way is complete.
    for (;; n = work[n].parent) {
      const std::int64_t length = work[n].end - work[n].start;
      const std::int64_t first = in.compress || length == 0 ? numbers[n] : numbers[n] - length + 1;
      numbering.close(first, numbers[n], number, token);
      if (work[n].next != kNone || work[n].parent == kNone) break;
    }
    if (work[n].next == kNone) break;
    n = work[n].next;
  }
}

// leaf of each row, and the rows in pre-order of their leaves: those that end at a node come first among its rows.
void order_rows(const PrefixForest& forest, const PrefixTreeScratch& s, std::int64_t g) {
  const std::int64_t begin = s.group_start[g], end = s.group_start[g + 1];
  std::int64_t* const numbers = s.numbers + 2 * begin + g;
  std::int64_t* const leaf = forest.field(kRowLeaf);
  std::int64_t* const order = forest.field(kRowOrder);
  const std::int64_t* const row_begin = forest.field(kNodeRowBegin);
  for (std::int64_t i = begin; i < end; ++i) leaf[s.members[i]] = numbers[s.leaves[s.members[i]]];
  // From here on a working node's number is no longer needed: it becomes the next place of the rows that end there.
  for (std::int64_t i = begin; i < end; ++i) {
    const std::int64_t work = s.leaves[s.members[i]];
    numbers[work] = row_begin[leaf[s.members[i]]];
  }
  for (std::int64_t i = begin; i < end; ++i) order[numbers[s.leaves[s.members[i]]]++] = s.members[i];
}

}  // namespace

// --------------------------------------------------------------------------------------------------------- launchers
bool prefix_tree_grow(const PrefixTreeInput& input, PrefixForest& forest, const PrefixTreeScratch& s) {
  sort_rows(input, forest, s);
  // token_sizes doubles as the groups' offsets into the hash tables until a group is grown.
  std::int64_t slot = 0;
  for (std::int64_t g = 0; g < forest.groups; ++g) {
    s.token_sizes[g + 1] = slot;
    slot += prefix_tree_slots(s.group_start[g + 1] - s.group_start[g]);
  }
  const std::int64_t least = kTokens * forest.groups / (tokens_of(forest) + 1);
  bool grown = true;
  for_groups(forest, input.threads, least, [&](std::int64_t g) {
    std::int32_t* const slots = s.slots + s.token_sizes[g + 1];
    const bool done = input.tokens_i64 ? grow_group<std::int64_t>(input, forest, s, g, slots)
                                       : grow_group<std::int32_t>(input, forest, s, g, slots);
    if (!done) __atomic_store_n(&grown, false, __ATOMIC_RELAXED);
  });
  s.sizes[0] = s.token_sizes[0] = 0;
  for (std::int64_t g = 0; g < forest.groups; ++g) {
    s.sizes[g + 1] += s.sizes[g];
    s.token_sizes[g + 1] += s.token_sizes[g];
  }
  forest.size = s.sizes[forest.groups];
  forest.tokens = s.token_sizes[forest.groups];
  return grown;
}

void prefix_tree_number(const PrefixTreeInput& input, const PrefixForest& forest, const PrefixTreeScratch& s) {
  for_groups(forest, input.threads, kNodes * forest.groups / (forest.size + 1), [&](std::int64_t g) {
    number_group(input, forest, s, g);
    order_rows(forest, s, g);
  });
}

}  // namespace fastreward::FASTREWARD_ISA
