// fastreward._core.prefix_tree_*: addresses to cpu/prefix_tree/prefix_tree.hpp, with the scratch memory that it asks for.
#include <algorithm>
#include <cstdint>
#include <memory>
#include <tuple>

#include "bindings/addresses.hpp"
#include "bindings/registry.hpp"
#include "cpu/common/number_integers.hpp"
#include "cpu/prefix_tree/prefix_tree.hpp"

namespace fastreward {
namespace {

template <class T>
std::unique_ptr<T[]> scratch(std::int64_t count) {
  return std::unique_ptr<T[]>(new T[static_cast<std::size_t>(std::max<std::int64_t>(count, 1))]);
}

MaskView mask_view(Address data, int kind) { return {at<const void>(data), static_cast<MaskKind>(kind)}; }

// (nodes, capacity, size, rows_data, rows, unique tokens)
using ForestArguments = std::tuple<Address, std::int64_t, std::int64_t, Address, std::int64_t, std::int64_t>;

PrefixForest forest_of(const ForestArguments& arguments) {
  const auto [nodes, capacity, size, rows_data, rows, tokens] = arguments;
  return {at<std::int64_t>(nodes), capacity, at<std::int64_t>(rows_data), rows, size, 0, tokens};
}

// ------------------------------------------------------------------------------------------------------------- build
void lengths(Address mask, int kind, Address extents, Address starts, std::int64_t rows, Address out, int threads) {
  FASTREWARD_DISPATCH(prefix_tree_lengths)(mask_view(mask, kind), at<const std::int64_t>(extents),
                                           at<const std::int64_t>(starts), rows, at<std::int64_t>(out), threads);
}

void starts(Address mask, int kind, Address extents, std::int64_t rows, Address out, int threads) {
  FASTREWARD_DISPATCH(prefix_tree_starts)(mask_view(mask, kind), at<const std::int64_t>(extents), rows,
                                          at<std::int64_t>(out), threads);
}

// A forest that has grown and waits to be numbered, once its caller has memory of the right size.
class Growth {
 public:
  // group: any labels, numbered in first-seen order; with ordered_groups they are 0, 1, ... themselves.
  Growth(Address tokens, bool tokens_i64, Address parent_row, Address branch_position, Address group,
         bool ordered_groups, Address rows_data, std::int64_t rows, bool compress, int threads) {
    forest_.rows = rows;
    forest_.rows_data = at<std::int64_t>(rows_data);
    input_.tokens = at<const void>(tokens);
    input_.tokens_i64 = tokens_i64;
    input_.parent_row = at<const std::int64_t>(parent_row);
    input_.branch_position = at<const std::int64_t>(branch_position);
    input_.compress = compress;
    input_.threads = threads;
    number_groups(at<const std::int64_t>(group), ordered_groups);
    std::int64_t slots = 0;
    for (std::int64_t g = 0; g < forest_.groups; ++g) slots += prefix_tree_slots(sizes_[g]);
    const std::int64_t nodes = 2 * rows + forest_.groups;
    sizes_ = scratch<std::int64_t>(forest_.groups + 1);
    group_start_ = scratch<std::int64_t>(forest_.groups + 1);
    token_sizes_ = scratch<std::int64_t>(forest_.groups + 1);
    members_ = scratch<std::int64_t>(rows);
    leaves_ = scratch<std::int64_t>(rows);
    nodes_ = scratch<WorkNode>(nodes);
    slots_ = scratch<std::int32_t>(slots);
    numbers_ = scratch<std::int64_t>(nodes);
    grown_ = FASTREWARD_DISPATCH(prefix_tree_grow)(input_, forest_, views());
  }

  bool grown() const { return grown_; }
  std::int64_t size() const { return forest_.size; }
  std::int64_t groups() const { return forest_.groups; }
  std::int64_t tokens() const { return forest_.tokens; }

  void number(Address nodes, std::int64_t capacity) {
    forest_.nodes = at<std::int64_t>(nodes);
    forest_.capacity = capacity;
    FASTREWARD_DISPATCH(prefix_tree_number)(input_, forest_, views());
  }

 private:
  // Sets input_.group and forest_.groups, and leaves each group's rows in sizes_.
  void number_groups(const std::int64_t* group, bool ordered) {
    const std::int64_t rows = forest_.rows;
    if (ordered) {
      input_.group = group;
      forest_.groups = rows == 0 ? 0 : *std::max_element(group, group + rows) + 1;
    } else {
      group_ = scratch<std::int64_t>(rows);
      forest_.groups = rows == 0 ? 0 : number_integers(group, rows, group_.get());
      input_.group = group_.get();
    }
    sizes_ = scratch<std::int64_t>(forest_.groups);
    std::fill_n(sizes_.get(), forest_.groups, 0);
    for (std::int64_t b = 0; b < rows; ++b) ++sizes_[static_cast<std::size_t>(input_.group[b])];
  }

  PrefixTreeScratch views() const {
    PrefixTreeScratch s;
    s.group_start = group_start_.get();
    s.members = members_.get();
    s.sizes = sizes_.get();
    s.token_sizes = token_sizes_.get();
    s.leaves = leaves_.get();
    s.nodes = nodes_.get();
    s.slots = slots_.get();
    s.numbers = numbers_.get();
    return s;
  }

  PrefixTreeInput input_;
  PrefixForest forest_;
  bool grown_ = false;
  std::unique_ptr<std::int64_t[]> group_, group_start_, members_, sizes_, token_sizes_, leaves_, numbers_;
  std::unique_ptr<WorkNode[]> nodes_;
  std::unique_ptr<std::int32_t[]> slots_;
};

// The kernel of a dtype; `T` is float or double in its arguments.
#define FASTREWARD_TREE_CALL(name, f64, ...)                 \
  if (f64) {                                                 \
    using T = double;                                        \
    FASTREWARD_DISPATCH(prefix_tree_##name<T>)(__VA_ARGS__); \
  } else {                                                   \
    using T = float;                                         \
    FASTREWARD_DISPATCH(prefix_tree_##name<T>)(__VA_ARGS__); \
  }

// ------------------------------------------------------------------------------------------------------------ values
// (op, over children, mean form, scale, discount)
using AggregateArguments = std::tuple<int, bool, bool, double, double>;
// (mode, scale by std, raw singletons, ddof, eps)
using AdvantageArguments = std::tuple<int, bool, bool, int, double>;
// (initial, low, high)
using Bounds = std::tuple<double, double, double>;

AggregateOptions options_of(const AggregateArguments& options) {
  const auto& [op, over_children, mean_form, scale, discount] = options;
  return {static_cast<TreeOp>(op), over_children, mean_form, scale, discount};
}

void aggregate(const ForestArguments& f, const AggregateArguments& options, bool f64, Address values, Address weights,
               Address child_weights, Address out, int threads) {
  const PrefixForest forest = forest_of(f);
  const AggregateOptions o = options_of(options);
  const auto memory = scratch<double>(2 * forest.size);
  FASTREWARD_TREE_CALL(aggregate, f64, forest, o, at<const T>(values), at<const T>(weights), at<const T>(child_weights),
                       memory.get(), at<T>(out), threads)
}

void aggregate_backward(const ForestArguments& f, const AggregateArguments& options, bool f64, Address values,
                        Address weights, Address child_weights, Address grad, Address grad_values, int threads) {
  const PrefixForest forest = forest_of(f);
  const AggregateOptions o = options_of(options);
  const auto memory = scratch<double>(3 * forest.size);
  FASTREWARD_TREE_CALL(aggregate_backward, f64, forest, o, at<const T>(values), at<const T>(weights),
                       at<const T>(child_weights), at<const T>(grad), memory.get(), at<T>(grad_values), threads)
}

void advantages(const ForestArguments& f, const AdvantageArguments& options, bool f64, Address values, Address out,
                int threads) {
  const PrefixForest forest = forest_of(f);
  const auto& [mode, scale_std, singleton_raw, ddof, eps] = options;
  const AdvantageOptions o = {static_cast<TreeMode>(mode), scale_std, singleton_raw, ddof, eps};
  const auto memory = scratch<double>(3 * forest.size);
  FASTREWARD_TREE_CALL(advantages, f64, forest, o, at<const T>(values), memory.get(), at<T>(out), threads)
}

void propagate(const ForestArguments& f, const Bounds& bounds, bool f64, Address scale, Address shift, Address out,
               int threads) {
  const PrefixForest forest = forest_of(f);
  const auto [initial, low, high] = bounds;
  const auto memory = scratch<double>(forest.size);
  FASTREWARD_TREE_CALL(propagate, f64, forest, at<const T>(scale), at<const T>(shift), initial, low, high, memory.get(),
                       at<T>(out), threads)
}

void propagate_backward(const ForestArguments& f, const Bounds& bounds, bool f64, Address scale, Address shift,
                        Address grad, Address grad_scale, Address grad_shift, int threads) {
  const PrefixForest forest = forest_of(f);
  const auto [initial, low, high] = bounds;
  const auto memory = scratch<double>(2 * forest.size);
  FASTREWARD_TREE_CALL(propagate_backward, f64, forest, at<const T>(scale), at<const T>(shift), initial, low, high,
                       at<const T>(grad), memory.get(), at<T>(grad_scale), at<T>(grad_shift), threads)
}

// ------------------------------------------------------------------------------------------------------------ tokens
// (extents, mask, its kind)
using SpanArguments = std::tuple<Address, Address, int>;

TokenSpan span_of(const SpanArguments& span) {
  const auto [extents, mask, kind] = span;
  return {at<const std::int64_t>(extents), mask_view(mask, kind)};
}

void broadcast_to_tokens(const ForestArguments& f, const SpanArguments& span, int place, bool f64, Address values,
                         Address row_values, Address tokens, int threads) {
  FASTREWARD_TREE_CALL(broadcast_to_tokens, f64, forest_of(f), span_of(span),
                       static_cast<TreePlace>(place), at<const T>(values), at<const T>(row_values), at<T>(tokens),
                       threads)
}

void collect(const ForestArguments& f, const SpanArguments& span, int place, bool f64, Address tokens, Address values,
             int threads) {
  FASTREWARD_TREE_CALL(collect, f64, forest_of(f), span_of(span), static_cast<TreePlace>(place),
                       at<const T>(tokens), at<T>(values), threads)
}

void gather(const ForestArguments& f, const SpanArguments& span, bool f64, Address unique, Address tokens,
            int threads) {
  FASTREWARD_TREE_CALL(gather, f64, forest_of(f), span_of(span), at<const T>(unique), at<T>(tokens),
                       threads)
}

void scatter_reduce(const ForestArguments& f, const SpanArguments& span, int op, bool f64, Address tokens,
                    Address unique, int threads) {
  FASTREWARD_TREE_CALL(scatter_reduce, f64, forest_of(f), span_of(span), static_cast<TokenOp>(op),
                       at<const T>(tokens), at<T>(unique), threads)
}

#undef FASTREWARD_TREE_CALL

void node_of_token(const ForestArguments& f, Address extents, Address out, int threads) {
  FASTREWARD_DISPATCH(prefix_tree_node_of_token)(forest_of(f), span_of({extents, 0, 0}), at<std::int32_t>(out),
                                                 threads);
}

void unique_of_token(const ForestArguments& f, Address extents, Address out, int threads) {
  FASTREWARD_DISPATCH(prefix_tree_unique_of_token)(forest_of(f), span_of({extents, 0, 0}), at<std::int64_t>(out),
                                                   threads);
}

// -------------------------------------------------------------------------------------------------------------- pack
void layout(const ForestArguments& f, Address tokens, bool tokens_i64, Address token_ids, Address position_ids,
            Address parent, Address tout, Address multiplicity, Address source, int threads) {
  FASTREWARD_DISPATCH(prefix_tree_layout)(forest_of(f), at<const void>(tokens), tokens_i64, at<std::int64_t>(token_ids),
                                          at<std::int64_t>(position_ids), at<std::int64_t>(parent),
                                          at<std::int64_t>(tout), at<std::int64_t>(multiplicity),
                                          at<std::int64_t>(source), threads);
}

std::int64_t bins(const ForestArguments& f, std::int64_t max_tokens, bool by_rows, Address out) {
  return FASTREWARD_DISPATCH(prefix_tree_bins)(forest_of(f), max_tokens, by_rows, at<std::int64_t>(out));
}

void blocks(Address tout, std::int64_t tokens, std::int64_t block, Address counts, Address indices, Address full_counts,
            Address full_indices) {
  const BlockLists lists = {at<std::int32_t>(counts), at<std::int32_t>(indices), at<std::int32_t>(full_counts),
                            at<std::int32_t>(full_indices)};
  FASTREWARD_DISPATCH(prefix_tree_blocks)(at<const std::int64_t>(tout), tokens, block, lists);
}

}  // namespace

void register_prefix_tree(pybind11::module_& m) {
  namespace py = pybind11;
  using Released = py::call_guard<py::gil_scoped_release>;
  py::class_<Growth>(m, "PrefixTreeGrowth")
      .def(py::init<Address, bool, Address, Address, Address, bool, Address, std::int64_t, bool, int>(), Released(),
           py::arg("tokens"), py::arg("tokens_i64"), py::arg("parent_row"), py::arg("branch_position"),
           py::arg("group"), py::arg("ordered_groups"), py::arg("rows_data"), py::arg("rows"), py::arg("compress"),
           py::arg("threads"))
      .def_property_readonly("grown", &Growth::grown)
      .def_property_readonly("size", &Growth::size)
      .def_property_readonly("groups", &Growth::groups)
      .def_property_readonly("tokens", &Growth::tokens)
      .def("number", &Growth::number, Released(), py::arg("nodes"), py::arg("capacity"));
  m.def("prefix_tree_lengths", &lengths, Released());
  m.def("prefix_tree_starts", &starts, Released());
  m.def("prefix_tree_aggregate", &aggregate, Released());
  m.def("prefix_tree_aggregate_backward", &aggregate_backward, Released());
  m.def("prefix_tree_advantages", &advantages, Released());
  m.def("prefix_tree_propagate", &propagate, Released());
  m.def("prefix_tree_propagate_backward", &propagate_backward, Released());
  m.def("prefix_tree_broadcast_to_tokens", &broadcast_to_tokens, Released());
  m.def("prefix_tree_collect", &collect, Released());
  m.def("prefix_tree_gather", &gather, Released());
  m.def("prefix_tree_scatter_reduce", &scatter_reduce, Released());
  m.def("prefix_tree_node_of_token", &node_of_token, Released());
  m.def("prefix_tree_unique_of_token", &unique_of_token, Released());
  m.def("prefix_tree_layout", &layout, Released());
  m.def("prefix_tree_bins", &bins, Released());
  m.def("prefix_tree_blocks", &blocks, Released());
}

}  // namespace fastreward
