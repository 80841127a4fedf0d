// Prefix trees of thousands of random batches against a trie of maps; see core_tests.cpp.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <vector>

#include "checks.hpp"
#include "cpu/common/isa.hpp"
#include "cpu/prefix_tree/prefix_tree.hpp"

namespace {

namespace fr = fastreward;
using Integers = std::vector<std::int64_t>;
using Doubles = std::vector<double>;
using Random = std::mt19937;

std::size_t at(std::int64_t i) { return static_cast<std::size_t>(i); }
std::int64_t size_of(std::size_t n) { return static_cast<std::int64_t>(n); }
std::int64_t below(Random& random, std::int64_t end) {
  return end <= 0 ? 0 : static_cast<std::int64_t>(random() % static_cast<std::uint32_t>(end));
}
double real(Random& random) { return static_cast<double>(static_cast<int>(random() % 2001) - 1000) / 250.0; }

// ---------------------------------------------------------------------------------------------------------- batches
struct Batch {
  std::int64_t rows = 0, groups = 0;
  Integers extents, starts, lengths, group;
  Integers tokens, parent_row, branch_position;  // tokens empty: by branches
  std::vector<std::int32_t> tokens_i32;
  std::vector<std::uint8_t> mask;
  bool by_branches = false, compress = true;
  std::vector<Integers> paths;  // what a trie takes: the tokens of each row, or names of its own for those of branches

  std::int64_t flat() const { return extents.back(); }
};

void add_groups(Batch& batch, Random& random, std::int64_t most) {
  std::map<std::int64_t, std::int64_t> numbers;
  for (std::int64_t b = 0; b < batch.rows; ++b)
    batch.group.push_back(numbers.emplace(below(random, most), size_of(numbers.size())).first->second);
  batch.groups = size_of(numbers.size());
}

void add_mask(Batch& batch, Random& random) {
  for (std::int64_t i = 0; i < batch.flat(); ++i) batch.mask.push_back(random() % 5 != 0);
}

// Rows that often begin as an earlier one does; each in an extent that is longer, now and then.
Batch batch_of_tokens(Random& random, std::int64_t most_rows, std::int64_t most_tokens, std::int64_t most_groups) {
  Batch batch;
  batch.rows = below(random, most_rows + 1);
  batch.compress = random() % 3 != 0;
  const std::int64_t alphabet = std::array<std::int64_t, 4>{1, 2, 3, 1000}[random() % 4];
  batch.extents.push_back(0);
  for (std::int64_t b = 0; b < batch.rows; ++b) {
    Integers path;
    if (b > 0 && random() % 3 != 0) {
      const Integers& other = batch.paths[at(below(random, b))];
      path.assign(other.begin(), other.begin() + below(random, size_of(other.size()) + 1));
    }
    for (std::int64_t more = random() % 4 == 0 ? 0 : below(random, most_tokens + 1); more > 0; --more)
      path.push_back(0x7fffffff - below(random, alphabet));
    path.resize(at(std::min(size_of(path.size()), most_tokens)));
    const std::int64_t before = below(random, 3) * below(random, 2), behind = below(random, 3) * below(random, 2);
    batch.starts.push_back(batch.flat() + before);
    batch.lengths.push_back(size_of(path.size()));
    batch.tokens.insert(batch.tokens.end(), at(before), 77);
    batch.tokens.insert(batch.tokens.end(), path.begin(), path.end());
    batch.tokens.insert(batch.tokens.end(), at(behind), 77);
    batch.extents.push_back(size_of(batch.tokens.size()));
    batch.paths.push_back(path);
  }
  batch.tokens.shrink_to_fit();
  for (const std::int64_t token : batch.tokens) batch.tokens_i32.push_back(static_cast<std::int32_t>(token));
  batch.tokens_i32.shrink_to_fit();
  add_groups(batch, random, most_groups);
  add_mask(batch, random);
  return batch;
}

// Rows that branch off each other, before or after the row that they branch off.
Batch batch_of_branches(Random& random, std::int64_t most_rows, std::int64_t most_tokens) {
  Batch batch;
  batch.by_branches = true;
  batch.compress = random() % 3 != 0;
  batch.rows = below(random, most_rows + 1);
  add_groups(batch, random, 3);
  batch.extents.push_back(0);
  Integers order;
  for (std::int64_t b = 0; b < batch.rows; ++b) {
    order.push_back(b);
    batch.lengths.push_back(below(random, most_tokens + 1));
    batch.starts.push_back(batch.flat());
    batch.extents.push_back(batch.flat() + batch.lengths.back());
  }
  std::shuffle(order.begin(), order.end(), random);
  batch.parent_row.assign(at(batch.rows), -1);
  batch.branch_position.assign(at(batch.rows), 0);
  batch.paths.resize(at(batch.rows));
  for (std::size_t i = 0; i < order.size(); ++i) {
    const std::int64_t b = order[i], other = order[at(below(random, size_of(i)))];
    Integers& path = batch.paths[at(b)];
    if (i > 0 && batch.group[at(other)] == batch.group[at(b)] && random() % 5 != 0) {
      const std::int64_t most = std::min(batch.lengths[at(b)], batch.lengths[at(other)]);
      const std::int64_t position = random() % 4 == 0 ? most : below(random, most + 1);
      batch.parent_row[at(b)] = other;
      batch.branch_position[at(b)] = position;
      path.assign(batch.paths[at(other)].begin(), batch.paths[at(other)].begin() + position);
    }
    while (size_of(path.size()) < batch.lengths[at(b)]) path.push_back((b + 1) * 100000 + size_of(path.size()));
  }
  add_mask(batch, random);
  return batch;
}

// ------------------------------------------------------------------------------------------------- the trie of maps
struct Trie {
  std::map<std::int64_t, std::unique_ptr<Trie>> children;
  Integers rows, ends;
  std::int64_t node = -1, unique = -1;  // where its token has gone

  std::vector<Trie*> in_order() const {
    std::vector<Trie*> found;
    for (const auto& [token, child] : children) found.push_back(child.get());
    std::sort(found.begin(), found.end(), [](Trie* a, Trie* b) { return a->rows[0] < b->rows[0]; });
    return found;
  }
};

// Everything a forest says, from tries.
struct Expected {
  std::vector<std::array<std::int64_t, fr::kNodeFields>> nodes;
  Integers leaf, order;
  std::int64_t tokens = 0;
  std::vector<Integers> node_of, unique_of;  // by row and position

  explicit Expected(const Batch& batch) : leaf(at(batch.rows)), node_of(at(batch.rows)), unique_of(at(batch.rows)) {
    for (std::int64_t g = 0; g < batch.groups; ++g) {
      Trie root;
      for (std::int64_t b = 0; b < batch.rows; ++b)
        if (batch.group[at(b)] == g) insert(root, batch.paths[at(b)], b);
      visit({&root}, -1, 0, size_of(nodes.size()), batch.compress);
      for (const std::int64_t b : root.rows) follow(root, batch.paths[at(b)], b);
    }
  }

 private:
  static void insert(Trie& root, const Integers& path, std::int64_t row) {
    Trie* trie = &root;
    trie->rows.push_back(row);
    for (const std::int64_t token : path) {
      auto& child = trie->children[token];
      if (child == nullptr) child = std::make_unique<Trie>();
      trie = child.get();
      trie->rows.push_back(row);
    }
    trie->ends.push_back(row);
  }

  // run: tokens that follow each other (or a root alone), the beginning of a node
  void visit(std::vector<Trie*> run, std::int64_t parent, std::int64_t start, std::int64_t root, bool compress) {
    const bool is_root = parent < 0;
    while (compress && !is_root && run.back()->ends.empty() && run.back()->children.size() == 1)
      run.push_back(run.back()->children.begin()->second.get());
    const Trie& last = *run.back();
    const std::int64_t n = size_of(nodes.size()), length = is_root ? 0 : size_of(run.size());
    nodes.emplace_back();
    nodes[at(n)][fr::kNodeParent] = parent;
    nodes[at(n)][fr::kNodeDepth] = is_root ? 0 : nodes[at(parent)][fr::kNodeDepth] + 1;
    nodes[at(n)][fr::kNodeEdgeStart] = start;
    nodes[at(n)][fr::kNodeEdgeLength] = length;
    nodes[at(n)][fr::kNodeCount] = size_of(last.rows.size());
    nodes[at(n)][fr::kNodeFirstRow] = last.rows[0];
    nodes[at(n)][fr::kNodeTokenBegin] = tokens;
    nodes[at(n)][fr::kNodeChildren] = size_of(last.children.size());
    nodes[at(n)][fr::kNodeRowBegin] = size_of(order.size());
    nodes[at(n)][fr::kNodeRoot] = root;
    for (std::int64_t i = 0; i < length; ++i) run[at(i)]->node = n, run[at(i)]->unique = tokens++;
    for (const std::int64_t b : last.ends) leaf[at(b)] = n, order.push_back(b);
    for (Trie* child : last.in_order()) visit({child}, n, start + length, root, compress);
    nodes[at(n)][fr::kNodeTout] = size_of(nodes.size());
    nodes[at(n)][fr::kNodeTokenTout] = tokens;
  }

  void follow(const Trie& root, const Integers& path, std::int64_t row) {
    const Trie* trie = &root;
    for (const std::int64_t token : path) {
      trie = trie->children.at(token).get();
      node_of[at(row)].push_back(trie->node);
      unique_of[at(row)].push_back(trie->unique);
    }
  }
};

// ---------------------------------------------------------------------------------------------------------- forests
// A forest with all its memory, every array of exactly the size that the header promises.
struct Forest {
  Integers nodes, rows_data;
  fr::PrefixForest view;
  bool grown = false;

  Forest(const Batch& batch, bool tokens_i64, int threads) : rows_data(at(4 * batch.rows), -9) {
    std::copy(batch.starts.begin(), batch.starts.end(), rows_data.begin() + fr::kRowStart * batch.rows);
    std::copy(batch.lengths.begin(), batch.lengths.end(), rows_data.begin() + fr::kRowLength * batch.rows);
    view.rows_data = rows_data.data();
    view.rows = batch.rows;
    view.groups = batch.groups;
    fr::PrefixTreeInput input;
    if (batch.by_branches) {
      input.parent_row = batch.parent_row.data();
      input.branch_position = batch.branch_position.data();
    } else {
      input.tokens = tokens_i64 ? static_cast<const void*>(batch.tokens.data()) : batch.tokens_i32.data();
    }
    input.tokens_i64 = tokens_i64;
    input.group = batch.group.data();
    input.compress = batch.compress;
    input.threads = threads;

    Integers of_group(at(batch.groups));
    for (const std::int64_t g : batch.group) ++of_group[at(g)];
    std::int64_t slot_count = 0;
    for (const std::int64_t count : of_group) slot_count += fr::prefix_tree_slots(count);
    const std::size_t working = at(2 * batch.rows + batch.groups);
    Integers group_start(at(batch.groups + 1), -9), members(at(batch.rows), -9), sizes(at(batch.groups + 1), -9);
    Integers token_sizes(at(batch.groups + 1), -9), leaves(at(batch.rows), -9), numbers(working, -9);
    std::vector<fr::WorkNode> work(working);
    std::vector<std::int32_t> slots(at(slot_count), -9);
    fr::PrefixTreeScratch scratch;
    scratch.group_start = group_start.data(), scratch.members = members.data(), scratch.sizes = sizes.data();
    scratch.token_sizes = token_sizes.data(), scratch.leaves = leaves.data(), scratch.nodes = work.data();
    scratch.slots = slots.data(), scratch.numbers = numbers.data();
    grown = FASTREWARD_DISPATCH(prefix_tree_grow)(input, view, scratch);
    if (!grown) return;
    nodes.assign(at(fr::kNodeFields * view.size), -9);
    nodes.shrink_to_fit();
    view.nodes = nodes.data();
    view.capacity = view.size;
    FASTREWARD_DISPATCH(prefix_tree_number)(input, view, scratch);
  }

  std::int64_t operator()(fr::NodeField f, std::int64_t n) const { return view.field(f)[n]; }
};

void check_forest(const Forest& forest, const Expected& expected, const Batch& batch) {
  CHECK(forest.grown);
  CHECK(forest.view.size == size_of(expected.nodes.size()));
  CHECK(forest.view.tokens == expected.tokens);
  if (!forest.grown || forest.view.size != size_of(expected.nodes.size())) return;
  bool same = true;
  for (std::int64_t n = 0; n < forest.view.size; ++n)
    for (int f = 0; f < fr::kNodeFields; ++f)
      same &= forest(static_cast<fr::NodeField>(f), n) == expected.nodes[at(n)][at(f)];
  CHECK(same);
  CHECK(std::equal(expected.leaf.begin(), expected.leaf.end(), forest.view.field(fr::kRowLeaf)));
  CHECK(std::equal(expected.order.begin(), expected.order.end(), forest.view.field(fr::kRowOrder)));
  CHECK(std::equal(batch.starts.begin(), batch.starts.end(), forest.view.field(fr::kRowStart)));
}

// ----------------------------------------------------------------------------------------------------------- values
template <class T>
std::vector<T> reals(Random& random, std::int64_t count, double least = -1e9) {
  std::vector<T> out(at(count));
  for (T& x : out) x = static_cast<T>(std::max(real(random), least));
  return out;
}

double combine(fr::TreeOp op, double scale, bool mean_form, const Doubles& values, const Doubles& weights) {
  double total = 0.0, weight = 0.0, high = -INFINITY, low = INFINITY, exps = 0.0;
  bool any = false;
  for (std::size_t i = 0; i < values.size(); ++i) {
    total += weights[i] * values[i], weight += weights[i];
    high = std::max(high, values[i]), low = std::min(low, values[i]), any |= values[i] != 0.0;
    exps += weights[i] * std::exp(scale * values[i]);
  }
  switch (op) {
    case fr::TreeOp::mean: return total / weight;
    case fr::TreeOp::sum: return total;
    case fr::TreeOp::max: return high;
    case fr::TreeOp::min: return low;
    case fr::TreeOp::any: return any ? 1.0 : 0.0;
    case fr::TreeOp::logsumexp: break;
  }
  return std::log(mean_form ? exps / weight : exps) / scale;
}

// Each node from what lies below it, in float64.
Doubles aggregated(const Forest& forest, const fr::AggregateOptions& o, const Doubles& values, const Doubles& weights,
                   const Doubles& child_weights) {
  Doubles out(at(forest.view.size));
  const std::int64_t* const leaf = forest.view.field(fr::kRowLeaf);
  const std::int64_t* const order = forest.view.field(fr::kRowOrder);
  for (std::int64_t n = forest.view.size - 1; n >= 0; --n) {
    Doubles v, w;
    const std::int64_t end = forest(fr::kNodeEdgeStart, n) + forest(fr::kNodeEdgeLength, n);
    for (std::int64_t i = 0; i < forest(fr::kNodeCount, n); ++i) {
      const std::int64_t row = order[forest(fr::kNodeRowBegin, n) + i];
      if (o.over_children && leaf[row] != n) continue;
      const auto left = static_cast<double>(forest.view.field(fr::kRowLength)[row] - end);
      v.push_back(values[at(row)] * std::pow(o.discount, left)), w.push_back(weights[at(row)]);
    }
    if (o.over_children)
      for (std::int64_t c = n + 1; c < forest(fr::kNodeTout, n); c = forest(fr::kNodeTout, c)) {
        const auto edge = static_cast<double>(forest(fr::kNodeEdgeLength, c));
        v.push_back(out[at(c)] * std::pow(o.discount, edge)), w.push_back(child_weights[at(c)]);
      }
    out[at(n)] = combine(o.op, o.scale, o.mean_form, v, w);
  }
  return out;
}

void check_aggregate(const Forest& forest, Random& random, int threads) {
  const std::int64_t rows = forest.view.rows, size = forest.view.size;
  const Doubles values = reals<double>(random, rows);
  const Doubles weights = reals<double>(random, rows, 0.25), child_weights = reals<double>(random, size, 0.25);
  const Doubles ones(at(std::max(rows, size)), 1.0), grad = reals<double>(random, size);
  for (const int op : {0, 1, 2, 3, 4, 5})
    for (const bool over_children : {false, true}) {
      fr::AggregateOptions o;
      o.op = static_cast<fr::TreeOp>(op), o.over_children = over_children;
      if (op < 2) o.discount = random() % 2 == 0 ? 1.0 : 0.75;
      if (o.op == fr::TreeOp::logsumexp) o.scale = random() % 2 == 0 ? 0.5 : -0.75, o.mean_form = random() % 2 == 0;
      const bool weighted = random() % 2 == 0, by_child = over_children && random() % 2 == 0;
      const Doubles& w = weighted ? weights : ones;
      const Doubles& cw = by_child ? child_weights : ones;
      const double* const given = weighted ? weights.data() : nullptr;
      const double* const given_child = by_child ? child_weights.data() : nullptr;
      Doubles out(at(size), -9.0), scratch(at(2 * size)), grad_scratch(at(3 * size)), grad_values(at(rows), -9.0);
      FASTREWARD_DISPATCH(prefix_tree_aggregate<double>)(forest.view, o, values.data(), given, given_child, scratch.data(),
                                                     out.data(), threads);
      const Doubles expected = aggregated(forest, o, values, w, cw);
      for (std::size_t n = 0; n < out.size(); ++n) CHECK_NEAR(out[n], expected[n], 1e-9 * (1.0 + std::fabs(expected[n])));
      if (op != 0 && op != 1 && op != 4) continue;
      FASTREWARD_DISPATCH(prefix_tree_aggregate_backward<double>)(forest.view, o, values.data(), given, given_child,
                                                              grad.data(), grad_scratch.data(), grad_values.data(),
                                                              threads);
      // Along a random direction, against a difference of two values.
      const Doubles direction = reals<double>(random, rows);
      constexpr double kStep = 1e-5;
      Doubles ahead = values, back = values;
      double along = 0.0, difference = 0.0;
      for (std::size_t b = 0; b < values.size(); ++b) {
        ahead[b] += kStep * direction[b], back[b] -= kStep * direction[b];
        along += grad_values[b] * direction[b];
      }
      const Doubles up = aggregated(forest, o, ahead, w, cw), down = aggregated(forest, o, back, w, cw);
      for (std::size_t n = 0; n < up.size(); ++n) difference += grad[n] * (up[n] - down[n]) / (2.0 * kStep);
      CHECK_NEAR(along, difference, 1e-5 * (1.0 + std::fabs(difference)));
    }
  // f32 in and out: the same up to its rounding.
  const std::vector<float> narrow(values.begin(), values.end());
  const Doubles wide(narrow.begin(), narrow.end());
  std::vector<float> out(at(size), -9.0f);
  Doubles scratch(at(2 * size));
  FASTREWARD_DISPATCH(prefix_tree_aggregate<float>)(forest.view, {}, narrow.data(), nullptr, nullptr, scratch.data(),
                                                 out.data(), threads);
  const Doubles expected = aggregated(forest, {}, wide, ones, ones);
  for (std::size_t n = 0; n < out.size(); ++n) CHECK_NEAR(static_cast<double>(out[n]), expected[n], 1e-6);
}

void check_advantages(const Forest& forest, Random& random, int threads) {
  const Doubles v = reals<double>(random, forest.view.size);
  for (int mode = 0; mode < 6; ++mode) {
    fr::AdvantageOptions o;
    o.mode = static_cast<fr::TreeMode>(mode);
    o.ddof = static_cast<int>(random() % 2), o.scale_std = random() % 2 == 0, o.singleton_raw = random() % 2 == 0;
    Doubles out(v.size(), -9.0), scratch(3 * v.size());
    FASTREWARD_DISPATCH(prefix_tree_advantages<double>)(forest.view, o, v.data(), scratch.data(), out.data(), threads);
    for (std::int64_t n = 0; n < forest.view.size; ++n) {
      const std::int64_t p = forest(fr::kNodeParent, n);
      double expected = 0.0, sum = 0.0, weight = 0.0;
      if (p >= 0) {
        const double td = v[at(n)] - v[at(p)], root = v[at(n)] - v[at(forest(fr::kNodeRoot, n))];
        for (std::int64_t a = o.mode == fr::TreeMode::depth_weighted ? n : p; a >= 0; a = forest(fr::kNodeParent, a)) {
          const double w =
              o.mode == fr::TreeMode::depth_weighted ? static_cast<double>(forest(fr::kNodeCount, a)) : 1.0;
          sum += w * (v[at(n)] - v[at(a)]), weight += w;
        }
        double mean = 0.0, squares = 0.0, siblings = 0.0;
        const std::int64_t end = forest(fr::kNodeTout, p);
        for (std::int64_t c = p + 1; c < end; c = forest(fr::kNodeTout, c)) mean += v[at(c)], siblings += 1.0;
        mean /= siblings;
        for (std::int64_t c = p + 1; c < end; c = forest(fr::kNodeTout, c))
          squares += (v[at(c)] - mean) * (v[at(c)] - mean);
        const double deviation = std::sqrt(squares / (siblings - o.ddof)) + o.eps;
        switch (o.mode) {
          case fr::TreeMode::td: expected = td; break;
          case fr::TreeMode::root: expected = root; break;
          case fr::TreeMode::td_root: expected = td + root; break;
          case fr::TreeMode::all_ancestors: case fr::TreeMode::depth_weighted: expected = sum / weight; break;
          case fr::TreeMode::sibling:
            if (siblings == 1.0) expected = o.singleton_raw ? v[at(n)] : 0.0;
            else expected = (v[at(n)] - mean) / (o.scale_std ? deviation : 1.0);
            break;
        }
      }
      // Siblings of equal values have a deviation of 0, beside which eps enlarges any rounding.
      CHECK_NEAR(out[at(n)], expected, 1e-8 * (1.0 + std::fabs(expected)));
    }
  }
}

Doubles propagated(const Forest& forest, const Doubles& scale, const Doubles& shift, double low, double high) {
  Doubles x(at(forest.view.size), 0.5);
  for (std::int64_t n = 0; n < forest.view.size; ++n) {
    const std::int64_t p = forest(fr::kNodeParent, n);
    if (p >= 0) x[at(n)] = std::min(std::max(scale[at(n)] * x[at(p)] + shift[at(n)], low), high);
  }
  return x;
}

void check_propagate(const Forest& forest, Random& random, int threads) {
  const std::int64_t size = forest.view.size;
  const Doubles scale = reals<double>(random, size), shift = reals<double>(random, size);
  const Doubles grad = reals<double>(random, size);
  const double low = random() % 2 == 0 ? -INFINITY : -1.03, high = random() % 2 == 0 ? INFINITY : 2.07;
  Doubles out(at(size), -9.0), scratch(at(size)), grad_scratch(at(2 * size));
  FASTREWARD_DISPATCH(prefix_tree_propagate<double>)(forest.view, scale.data(), shift.data(), 0.5, low, high,
                                                 scratch.data(), out.data(), threads);
  const Doubles expected = propagated(forest, scale, shift, low, high);
  for (std::size_t n = 0; n < out.size(); ++n) CHECK_NEAR(out[n], expected[n], 1e-9 * (1.0 + std::fabs(expected[n])));
  Doubles grad_scale(at(size), -9.0), grad_shift(at(size), -9.0);
  FASTREWARD_DISPATCH(prefix_tree_propagate_backward<double>)(forest.view, scale.data(), shift.data(), 0.5, low, high,
                                                          grad.data(), grad_scratch.data(), grad_scale.data(),
                                                          grad_shift.data(), threads);
  // Children after their parents: what reaches a node, by the chain rule from the end.
  Doubles h = grad;
  for (std::int64_t n = size - 1; n >= 0; --n) {
    const std::int64_t p = forest(fr::kNodeParent, n);
    const double inside = p < 0 ? 0.0 : scale[at(n)] * expected[at(p)] + shift[at(n)];
    const double through = p < 0 || inside < low || inside > high ? 0.0 : h[at(n)];
    CHECK_NEAR(grad_shift[at(n)], through, 1e-9 * (1.0 + std::fabs(through)));
    const double of_scale = p < 0 ? 0.0 : through * expected[at(p)];
    CHECK_NEAR(grad_scale[at(n)], of_scale, 1e-9 * (1.0 + std::fabs(of_scale)));
    if (p >= 0) h[at(p)] += scale[at(n)] * through;
  }
}

// ----------------------------------------------------------------------------------------------------------- tokens
// The mask in the memory of one kind; nullptr for none.
struct Mask {
  std::vector<std::int32_t> i32;
  Integers i64;
  std::vector<float> f32;
  fr::MaskView view;

  Mask(const std::vector<std::uint8_t>& bytes, fr::MaskKind kind)
      : i32(bytes.begin(), bytes.end()), i64(bytes.begin(), bytes.end()), f32(bytes.begin(), bytes.end()) {
    view.kind = kind;
    switch (kind) {
      case fr::MaskKind::none: break;
      case fr::MaskKind::bytes: view.data = bytes.data(); break;
      case fr::MaskKind::i32: view.data = i32.data(); break;
      case fr::MaskKind::i64: view.data = i64.data(); break;
      case fr::MaskKind::f32: view.data = f32.data(); break;
    }
  }
};

template <class T>
struct TokenFunctions;
template <>
struct TokenFunctions<float> {
  decltype(&fr::baseline::prefix_tree_broadcast_to_tokens<float>) broadcast =
      FASTREWARD_DISPATCH(prefix_tree_broadcast_to_tokens<float>);
  decltype(&fr::baseline::prefix_tree_collect<float>) collect = FASTREWARD_DISPATCH(prefix_tree_collect<float>);
  decltype(&fr::baseline::prefix_tree_gather<float>) gather = FASTREWARD_DISPATCH(prefix_tree_gather<float>);
  decltype(&fr::baseline::prefix_tree_scatter_reduce<float>) scatter_reduce =
      FASTREWARD_DISPATCH(prefix_tree_scatter_reduce<float>);
};
template <>
struct TokenFunctions<double> {
  decltype(&fr::baseline::prefix_tree_broadcast_to_tokens<double>) broadcast =
      FASTREWARD_DISPATCH(prefix_tree_broadcast_to_tokens<double>);
  decltype(&fr::baseline::prefix_tree_collect<double>) collect = FASTREWARD_DISPATCH(prefix_tree_collect<double>);
  decltype(&fr::baseline::prefix_tree_gather<double>) gather = FASTREWARD_DISPATCH(prefix_tree_gather<double>);
  decltype(&fr::baseline::prefix_tree_scatter_reduce<double>) scatter_reduce =
      FASTREWARD_DISPATCH(prefix_tree_scatter_reduce<double>);
};

template <class T>
void check_tokens(const Forest& forest, const Expected& expected, const Batch& batch, fr::MaskKind kind, Random& random,
                  int threads) {
  const TokenFunctions<T> call;
  const Mask mask(batch.mask, kind);
  const fr::TokenSpan span = {batch.extents.data(), mask.view};
  const auto counts = [&](std::size_t i) { return kind == fr::MaskKind::none || batch.mask[i] != 0; };
  const std::vector<T> values = reals<T>(random, forest.view.size), unique = reals<T>(random, forest.view.tokens);
  const std::vector<T> tokens = reals<T>(random, batch.flat());
  // f(flat index, node, unique token) for all tokens, row by row
  const auto each = [&](auto&& f) {
    for (std::int64_t b = 0; b < batch.rows; ++b)
      for (std::size_t i = 0; i < expected.node_of[at(b)].size(); ++i)
        f(at(batch.starts[at(b)]) + i, expected.node_of[at(b)][i], at(expected.unique_of[at(b)][i]), size_of(i));
  };
  const double tolerance = (sizeof(T) == 4 ? 1e-6 : 1e-14) * (8.0 + 4.0 * static_cast<double>(batch.flat()));

  for (const auto place : {fr::TreePlace::broadcast, fr::TreePlace::start, fr::TreePlace::end}) {
    const auto there = [&](std::int64_t node, std::int64_t position) {
      const std::int64_t k = position - forest(fr::kNodeEdgeStart, node);
      return place == fr::TreePlace::broadcast ||
             k == (place == fr::TreePlace::start ? 0 : forest(fr::kNodeEdgeLength, node) - 1);
    };
    std::vector<T> out(tokens.size(), T(-9)), wanted(tokens.size(), T(0)), found(values.size(), T(-9));
    Doubles sums(values.size(), 0.0);
    call.broadcast(forest.view, span, place, values.data(), nullptr, out.data(), threads);
    call.collect(forest.view, span, place, tokens.data(), found.data(), threads);
    each([&](std::size_t i, std::int64_t node, std::size_t, std::int64_t position) {
      if (!counts(i) || !there(node, position)) return;
      wanted[i] = values[at(node)];
      sums[at(node)] += static_cast<double>(tokens[i]);
    });
    CHECK(out == wanted);
    for (std::size_t n = 0; n < sums.size(); ++n) CHECK_NEAR(static_cast<double>(found[n]), sums[n], tolerance);
    std::vector<T> own(at(batch.rows));
    for (std::size_t b = 0; b < own.size(); ++b) own[b] = T(0.5) * static_cast<T>(b) - T(1);
    call.broadcast(forest.view, span, place, values.data(), own.data(), out.data(), threads);
    for (std::int64_t b = 0; b < batch.rows; ++b)
      for (std::size_t k = 0; k < expected.node_of[at(b)].size(); ++k) {
        const std::size_t i = at(batch.starts[at(b)]) + k;
        const std::int64_t node = expected.node_of[at(b)][k];
        if (counts(i)) wanted[i] = there(node, size_of(k)) ? values[at(node)] + own[at(b)] : own[at(b)];
      }
    CHECK(out == wanted);
  }

  std::vector<T> out(tokens.size(), T(-9)), wanted(tokens.size(), T(0)), first(unique.size(), T(0));
  std::vector<int> counted(unique.size(), 0);
  Doubles sums(unique.size(), 0.0);
  call.gather(forest.view, span, unique.data(), out.data(), threads);
  each([&](std::size_t i, std::int64_t, std::size_t u, std::int64_t) {
    if (!counts(i)) return;
    wanted[i] = unique[u];
    if (counted[u]++ == 0) first[u] = tokens[i];
    sums[u] += static_cast<double>(tokens[i]);
  });
  CHECK(out == wanted);
  for (const auto op : {fr::TokenOp::sum, fr::TokenOp::mean, fr::TokenOp::first}) {
    std::vector<T> reduced(unique.size(), T(-9));
    call.scatter_reduce(forest.view, span, op, tokens.data(), reduced.data(), threads);
    for (std::size_t u = 0; u < reduced.size(); ++u) {
      const double mean = sums[u] / std::max(counted[u], 1);
      const double want = op == fr::TokenOp::sum    ? sums[u]
                          : op == fr::TokenOp::mean ? mean
                                                    : static_cast<double>(first[u]);
      CHECK_NEAR(static_cast<double>(reduced[u]), want, tolerance);
    }
  }

  std::vector<std::int32_t> nodes(tokens.size(), -9), wanted_nodes(tokens.size(), -1);
  Integers uniques(tokens.size(), -9), wanted_uniques(tokens.size(), -1);
  FASTREWARD_DISPATCH(prefix_tree_node_of_token)(forest.view, span, nodes.data(), threads);
  FASTREWARD_DISPATCH(prefix_tree_unique_of_token)(forest.view, span, uniques.data(), threads);
  each([&](std::size_t i, std::int64_t node, std::size_t u, std::int64_t) {
    wanted_nodes[i] = static_cast<std::int32_t>(node), wanted_uniques[i] = size_of(u);
  });
  CHECK(nodes == wanted_nodes);
  CHECK(uniques == wanted_uniques);
}

// Where the rows of a mask begin and how long they are, for every kind of it.
void check_lengths(const Batch& batch, fr::MaskKind kind, int threads) {
  const Mask mask(batch.mask, kind);
  Integers starts(at(batch.rows), -9), lengths(at(batch.rows), -9), whole(at(batch.rows), -9);
  FASTREWARD_DISPATCH(prefix_tree_starts)(mask.view, batch.extents.data(), batch.rows, starts.data(), threads);
  FASTREWARD_DISPATCH(prefix_tree_lengths)
  (mask.view, batch.extents.data(), starts.data(), batch.rows, lengths.data(), threads);
  FASTREWARD_DISPATCH(prefix_tree_lengths)
  (mask.view, batch.extents.data(), nullptr, batch.rows, whole.data(), threads);
  for (std::size_t b = 0; b < starts.size(); ++b) {
    const std::int64_t begin = batch.extents[b], end = batch.extents[b + 1];
    std::int64_t first = begin, last = end;
    while (first < end && batch.mask[at(first)] == 0) ++first;
    while (last > begin && batch.mask[at(last - 1)] == 0) --last;
    CHECK(starts[b] == (first == end ? begin : first));
    CHECK(lengths[b] == (first == end ? 0 : last - first));
    CHECK(whole[b] == last - begin);
  }
}

// ------------------------------------------------------------------------------------------------------------- pack
// Lists of blocks against all pairs of tokens.
void check_blocks(const Integers& tout, std::int64_t block) {
  const std::size_t count = tout.size(), n = (count + at(block) - 1) / at(block);
  std::vector<std::int32_t> counts(n, -9), full_counts(n, -9), indices(n * n, -9), full_indices(n * n, -9);
  FASTREWARD_DISPATCH(prefix_tree_blocks)
  (tout.data(), size_of(count), block, {counts.data(), indices.data(), full_counts.data(), full_indices.data()});
  Integers seen(n * n, 0);  // pairs that may look at each other
  for (std::size_t k = 0; k < count; ++k)
    for (std::size_t q = k; q < at(tout[k]); ++q) ++seen[q / at(block) * n + k / at(block)];
  for (std::size_t q = 0; q < n; ++q) {
    std::vector<std::int32_t> needed, listed;
    for (std::size_t kv = 0; kv < n; ++kv)
      if (seen[q * n + kv] > 0) needed.push_back(static_cast<std::int32_t>(kv));
    const auto list = [&](const std::vector<std::int32_t>& from, std::int32_t entries) {
      const auto begin = from.begin() + size_of(q * n), end = begin + entries;
      CHECK(std::is_sorted(begin, end));
      listed.insert(listed.end(), begin, end);
      return std::vector<std::int32_t>(begin, end);
    };
    list(indices, counts[q]);
    for (const std::int32_t kv : list(full_indices, full_counts[q])) CHECK(seen[q * n + at(kv)] == block * block);
    std::sort(listed.begin(), listed.end());
    CHECK(listed == needed);  // every block that is needed, once, and no other
  }
}

void check_layout(const Forest& forest, const Expected& expected, const Batch& batch, bool tokens_i64, int threads) {
  const std::size_t count = at(forest.view.tokens);
  Integers ids(count, -9), positions(count, -9), parent(count, -9), tout(count, -9), multiplicity(count, -9);
  Integers source(count, -9);
  const void* const tokens = tokens_i64 ? static_cast<const void*>(batch.tokens.data()) : batch.tokens_i32.data();
  FASTREWARD_DISPATCH(prefix_tree_layout)(forest.view, tokens, tokens_i64, ids.data(), positions.data(), parent.data(),
                                          tout.data(), multiplicity.data(), source.data(), threads);
  std::vector<Integers> rows_of(count);
  for (std::int64_t b = 0; b < batch.rows; ++b)
    for (std::size_t i = 0; i < expected.unique_of[at(b)].size(); ++i) {
      const std::size_t u = at(expected.unique_of[at(b)][i]);
      CHECK(ids[u] == batch.paths[at(b)][i]);
      CHECK(positions[u] == size_of(i));
      CHECK(parent[u] == (i == 0 ? -1 : expected.unique_of[at(b)][i - 1]));
      if (rows_of[u].empty()) CHECK(source[u] == batch.starts[at(b)] + size_of(i));
      rows_of[u].push_back(b);
    }
  for (std::size_t u = 0; u < count; ++u) {
    CHECK(multiplicity[u] == size_of(rows_of[u].size()));
    // The end of the subtree: the first token behind it that does not descend from it.
    std::size_t end = u + 1;
    while (end < count && parent[end] >= size_of(u)) ++end;
    CHECK(tout[u] == size_of(end));
  }
  if (count > 0 && count <= 64)
    for (const std::int64_t block : {1, 3, 8}) check_blocks(tout, block);
  if (count > 0) check_blocks(tout, 128);
}

void check_bins(const Forest& forest, const Expected& expected, const Batch& batch, Random& random) {
  const std::int64_t longest =
      batch.rows == 0 ? 0 : *std::max_element(batch.lengths.begin(), batch.lengths.end());
  const std::int64_t room = longest + below(random, 20);
  for (const bool by_rows : {false, true}) {
    Integers bins(at(batch.rows), -9);
    const std::int64_t count = FASTREWARD_DISPATCH(prefix_tree_bins)(forest.view, room, by_rows, bins.data());
    std::vector<std::set<std::int64_t>> unique(at(std::max<std::int64_t>(count, 0)));
    for (std::int64_t b = 0; b < batch.rows; ++b) {
      CHECK(0 <= bins[at(b)] && bins[at(b)] < count);
      unique[at(bins[at(b)])].insert(expected.unique_of[at(b)].begin(), expected.unique_of[at(b)].end());
    }
    for (const auto& bin : unique) CHECK(size_of(bin.size()) <= room);
    if (longest == 0) continue;
    Integers refused(at(batch.rows), -9);
    const std::int64_t answer =
        FASTREWARD_DISPATCH(prefix_tree_bins)(forest.view, longest - 1, by_rows, refused.data());
    CHECK(answer < 0);
    CHECK(batch.lengths[at(-1 - answer)] == longest);  // the row that is too long
  }
}

void check_batch(const Batch& batch, Random& random, int threads) {
  const Expected expected(batch);
  const bool tokens_i64 = random() % 2 == 0;
  const Forest forest(batch, tokens_i64, threads);
  check_forest(forest, expected, batch);
  if (!forest.grown || forest.view.size != size_of(expected.nodes.size())) return;
  check_aggregate(forest, random, threads);
  check_advantages(forest, random, threads);
  check_propagate(forest, random, threads);
  const auto kind = static_cast<fr::MaskKind>(random() % 5);
  check_tokens<float>(forest, expected, batch, kind, random, threads);
  check_tokens<double>(forest, expected, batch, kind, random, threads);
  if (kind != fr::MaskKind::none) check_lengths(batch, kind, threads);
  check_bins(forest, expected, batch, random);
  if (!batch.by_branches) check_layout(forest, expected, batch, tokens_i64, threads);
}

// ------------------------------------------------------------------------------------------------------------ cases
CASE(prefix_trees_of_small_batches) {
  for (unsigned seed = 0; seed < 6000; ++seed) {
    Random random(seed);
    check_batch(batch_of_tokens(random, 9, 7, 1 + below(random, 3)), random, 1 + static_cast<int>(seed % 2));
  }
}

CASE(prefix_trees_of_branches) {
  for (unsigned seed = 0; seed < 3000; ++seed) {
    Random random(seed);
    check_batch(batch_of_branches(random, 9, 7), random, 1 + static_cast<int>(seed % 2));
  }
}

CASE(prefix_trees_of_longer_rows) {
  // Longer than the vectors and blocks in which tokens are compared, copied and summed.
  for (unsigned seed = 0; seed < 24; ++seed) {
    Random random(seed);
    Batch batch = batch_of_tokens(random, 5, seed % 2 == 0 ? 200 : 2500, 2);
    batch.compress = true;  // else each token has all before it as ancestors
    check_batch(batch, random, 2);
  }
}

CASE(prefix_trees_on_threads) {
  // Above the sizes from which threads share the work, and those from which outputs go past the caches.
  Random random(7);
  Batch batch;
  constexpr std::int64_t kColumns = 700;
  batch.rows = 1600;  // f64 of 1.1 million tokens are more than 8 MiB
  batch.extents.push_back(0);
  for (std::int64_t b = 0; b < batch.rows; ++b) {
    Integers path = b % 8 == 0 ? Integers() : batch.paths.back();
    path.resize(at(b % 8 == 0 ? 0 : below(random, 500)));
    const std::int64_t length = below(random, kColumns + 1);
    path.resize(at(std::min(size_of(path.size()), length)));
    while (size_of(path.size()) < length) path.push_back(below(random, 2));
    batch.tokens.insert(batch.tokens.end(), path.begin(), path.end());
    batch.tokens.insert(batch.tokens.end(), at(kColumns - length), 5);
    batch.starts.push_back(batch.flat()), batch.lengths.push_back(length), batch.group.push_back(b / 8);
    batch.extents.push_back(batch.flat() + kColumns);
    batch.paths.push_back(path);
  }
  batch.groups = (batch.rows + 7) / 8;
  batch.tokens_i32.assign(batch.tokens.begin(), batch.tokens.end());
  add_mask(batch, random);
  const Expected expected(batch);
  const Forest forest(batch, false, 3);
  check_forest(forest, expected, batch);
  check_aggregate(forest, random, 3);
  check_advantages(forest, random, 3);
  check_propagate(forest, random, 3);
  check_tokens<float>(forest, expected, batch, fr::MaskKind::bytes, random, 3);
  check_tokens<double>(forest, expected, batch, fr::MaskKind::none, random, 3);
  check_lengths(batch, fr::MaskKind::f32, 3);
}

CASE(prefix_trees_of_rows_in_a_circle) {
  for (const Integers& parent : {Integers{0}, Integers{1, 0}, Integers{-1, 2, 3, 1}, Integers{1, 2, 0, 0}}) {
    Batch batch;
    batch.by_branches = true;
    batch.rows = size_of(parent.size());
    batch.groups = 1;
    batch.parent_row = parent;
    for (Integers* x : {&batch.branch_position, &batch.starts, &batch.group}) x->assign(parent.size(), 0);
    batch.lengths.assign(parent.size(), 1);
    CHECK(!Forest(batch, true, 1).grown);
  }
}

}  // namespace
