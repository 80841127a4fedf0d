// fastreward._core.policy_forward, policy_scale and policy_spread: see csrc/cpu/policy_loss.hpp.
#include <pybind11/stl.h>

#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <utility>

#include "bindings/registry.hpp"
#include "cpu/policy_loss.hpp"

namespace fastreward {
namespace {

template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

double or_infinity(std::optional<double> x) { return x.value_or(std::numeric_limits<double>::infinity()); }

// Rows, mask and the item table that every launcher needs.
struct Table {
  PolicyTokens tokens;
  std::unique_ptr<std::int64_t[]> first_item;
  std::int64_t items = 0;

  Table(std::int64_t rows, std::int64_t columns, std::uintptr_t cu_seqlens, std::uintptr_t mask, int mask_kind)
      : first_item(new std::int64_t[static_cast<std::size_t>(rows) + 1]) {
    tokens.rows = rows;
    tokens.columns = columns;
    tokens.cu_seqlens = pointer<const std::int64_t>(cu_seqlens);
    tokens.mask = {pointer<const void>(mask), static_cast<MaskKind>(mask_kind)};
    items = FASTREWARD_DISPATCH(policy_items)(tokens, first_item.get());
    tokens.first_item = first_item.get();
  }
};

// Returns (row, column) of the first NaN advantage that counts, or (-1, -1).
std::pair<std::int64_t, std::int64_t> policy_forward(
    std::int64_t rows, std::int64_t columns, std::uintptr_t cu_seqlens, std::uintptr_t mask, int mask_kind,
    std::uintptr_t logprobs, std::uintptr_t old_logprobs, std::uintptr_t advantages, bool advantage_per_row,
    std::uintptr_t ref_logprobs, std::uintptr_t entropy, std::uintptr_t weights, std::uintptr_t normalizer,
    double clip_low, double clip_high, std::optional<double> dual_clip, std::optional<double> delta,
    std::optional<double> log_ratio_clamp, int aggregation, int kl, double kl_coef, double entropy_coef,
    std::uintptr_t loss, std::uintptr_t metrics, std::uintptr_t gradient, std::uintptr_t row_weight,
    std::uintptr_t token_loss, int threads) {
  const pybind11::gil_scoped_release release;
  const Table table(rows, columns, cu_seqlens, mask, mask_kind);
  PolicyInput in;
  in.logprobs = pointer<const float>(logprobs);
  in.old_logprobs = pointer<const float>(old_logprobs);
  in.advantages = pointer<const float>(advantages);
  in.advantage_per_row = advantage_per_row;
  in.ref_logprobs = pointer<const float>(ref_logprobs);
  in.entropy = pointer<const float>(entropy);
  in.weights = pointer<const float>(weights);
  in.normalizer = pointer<const float>(normalizer);
  PolicySettings settings;
  settings.clip_low = clip_low;
  settings.clip_high = clip_high;
  settings.dual_clip = or_infinity(dual_clip);
  settings.delta = or_infinity(delta);
  settings.log_ratio_clamp = or_infinity(log_ratio_clamp);
  settings.aggregation = static_cast<Aggregation>(aggregation);
  settings.kl = static_cast<KlTerm>(kl);
  settings.kl_coef = kl_coef;
  settings.entropy_coef = entropy_coef;
  PolicyOutput out;
  out.loss = pointer<float>(loss);
  out.metrics = pointer<float>(metrics);
  out.gradient = pointer<float>(gradient);
  out.row_weight = pointer<float>(row_weight);
  out.token_loss = pointer<float>(token_loss);
  const std::unique_ptr<std::int64_t[]> lengths(new std::int64_t[static_cast<std::size_t>(rows)]);
  const std::unique_ptr<PolicySums[]> items(new PolicySums[static_cast<std::size_t>(table.items)]);
  FASTREWARD_DISPATCH(policy_forward)(table.tokens, in, settings, lengths.get(), items.get(), out, threads);
  return {out.nan_row, out.nan_column};
}

void policy_scale(std::uintptr_t x, double factor, std::int64_t n, std::uintptr_t out, int threads) {
  FASTREWARD_DISPATCH(policy_scale)
  (pointer<const float>(x), static_cast<float>(factor), n, pointer<float>(out), threads);
}

void policy_spread(std::int64_t rows, std::int64_t columns, std::uintptr_t cu_seqlens, std::uintptr_t mask,
                   int mask_kind, std::uintptr_t row_weight, double factor, std::uintptr_t out, int threads) {
  const Table table(rows, columns, cu_seqlens, mask, mask_kind);
  FASTREWARD_DISPATCH(policy_spread)
  (table.tokens, pointer<const float>(row_weight), static_cast<float>(factor), pointer<float>(out), threads);
}

}  // namespace

void register_policy_loss(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("policy_forward", &policy_forward, py::kw_only(), py::arg("rows"), py::arg("columns"), py::arg("cu_seqlens"),
        py::arg("mask"), py::arg("mask_kind"), py::arg("logprobs"), py::arg("old_logprobs"), py::arg("advantages"),
        py::arg("advantage_per_row"), py::arg("ref_logprobs"), py::arg("entropy"), py::arg("weights"),
        py::arg("normalizer"), py::arg("clip_low"), py::arg("clip_high"), py::arg("dual_clip"), py::arg("delta"),
        py::arg("log_ratio_clamp"), py::arg("aggregation"), py::arg("kl"), py::arg("kl_coef"),
        py::arg("entropy_coef"), py::arg("loss"), py::arg("metrics"), py::arg("gradient"), py::arg("row_weight"),
        py::arg("token_loss"), py::arg("threads"),
        "Loss, metrics, gradient; returns (row, column) of the first counted NaN advantage, or (-1, -1).");
  m.def("policy_scale", &policy_scale, py::call_guard<py::gil_scoped_release>(), py::arg("x"), py::arg("factor"),
        py::arg("n"), py::arg("out"), py::arg("threads"), "out = x * factor");
  m.def("policy_spread", &policy_spread, py::call_guard<py::gil_scoped_release>(), py::arg("rows"),
        py::arg("columns"), py::arg("cu_seqlens"), py::arg("mask"), py::arg("mask_kind"), py::arg("row_weight"),
        py::arg("factor"), py::arg("out"), py::arg("threads"), "row_weight * factor on counted tokens, 0 elsewhere.");
}

}  // namespace fastreward
