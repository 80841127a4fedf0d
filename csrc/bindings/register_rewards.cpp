// fastreward._core.token_rewards: see csrc/cpu/rewards.hpp.
#include <array>
#include <cstdint>

#include <pybind11/stl.h>

#include "bindings/addresses.hpp"
#include "bindings/registry.hpp"
#include "cpu/rewards.hpp"

namespace fastreward {
namespace {

bool token_rewards(Address scores, Address logprobs, Address ref_logprobs, Address mask, int mask_kind,
                   std::int64_t sequences, std::int64_t columns, Address cu_seqlens, int kl, int place,
                   const std::array<double, 5>& numbers, Address out, int threads) {
  TokenRewards in;
  in.scores = at<const float>(scores);
  in.logprobs = at<const float>(logprobs);
  in.ref_logprobs = at<const float>(ref_logprobs);
  in.mask = {at<const void>(mask), static_cast<MaskKind>(mask_kind)};
  in.sequences = sequences;
  in.columns = columns;
  in.cu_seqlens = at<const std::int64_t>(cu_seqlens);
  in.kl = static_cast<KlEstimate>(kl);
  in.place = static_cast<ScorePlace>(place);
  in.kl_coef = static_cast<float>(numbers[0]);
  in.clamp = static_cast<float>(numbers[1]);
  in.value_clamp = static_cast<float>(numbers[2]);
  in.low = static_cast<float>(numbers[3]);
  in.high = static_cast<float>(numbers[4]);
  return FASTREWARD_DISPATCH(token_rewards)(in, at<float>(out), threads);
}

}  // namespace

void register_rewards(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("token_rewards", &token_rewards, py::call_guard<py::gil_scoped_release>(), py::arg("scores"),
        py::arg("logprobs"), py::arg("ref_logprobs"), py::arg("mask"), py::arg("mask_kind"), py::arg("sequences"),
        py::arg("columns"), py::arg("cu_seqlens"), py::arg("kl"), py::arg("place"), py::arg("numbers"),
        py::arg("out"), py::arg("threads"), "Writes `out`; whether a log-prob was NaN where the mask is set.");
}

}  // namespace fastreward
