"""Results of the losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


class Metrics(Mapping[str, Tensor]):
    """A loss's metrics: one device tensor `values_tensor` [M] f32, read by name without a host synchronisation.

    What was not computed is absent: `name in metrics` tells, metrics[name] raises KeyError with the names that are
    there. NaN means that there was no token (no pair) to take it over; counts are then 0. Means, shares, smallest and
    largest are over the counted tokens unless said; x_k1, x_k3 are estimates of KL(policy || x).

    Policy losses:
        clip_fraction_low: share with the ratio below its lower bound and A < 0; of losses that clip.
        clip_fraction_high: share with the ratio above its upper bound and A > 0; of losses that clip.
        clip_fraction_dual: share with A < 0 where the dual clip binds; of losses that have one.
        kl_old_k1: mean of -d, d = logprob - old_logprob clamped to +-20.
        kl_old_k3: mean of e^d - d - 1.
        kl_ref_k1: mean of -x, x = ref_logprob - logprob clamped to +-20; where ref_logprobs are given.
        kl_ref_k3: mean of e^x - x - 1; where ref_logprobs are given.
        ratio_mean, ratio_min, ratio_max: mean, smallest and largest e^d.
        entropy_mean: mean entropy; where it is given, or read by a loss from logits or hidden states.
        token_count: counted tokens.
    value_loss:
        value_mean, return_mean: mean value, mean return.
        explained_variance: 1 - var(returns - values) / (var(returns) + 1e-5), ddof 1; where it is asked for, NaN of
            fewer than two tokens. While values still are old_values it is verl's critic/vf_explained_var.
        token_count: counted tokens.
        clip_fraction: share where the clipped value's loss is the larger; where it clips.
    Preference losses:
        pair_count: pairs with a counted token on either side.
        chosen_logprob, rejected_logprob: mean over the pairs of that side's summed log-probs.
        chosen_tokens, rejected_tokens: counted tokens of that side.
    Then what the loss reports itself (t.report): means over tokens, sequences or pairs, as the loss's page says. What a
    policy loss reports of each token is had by return_tokens.

    correction_weights, under verl's names; w is the bounded weight, raw the one before, l = old - rollout, bounds are
    the call's (no lower one: 1 / high). Means "over sequences" take empty ones for 0, as verl's do:
        rollout_is_mean, rollout_is_max, rollout_is_min: of w; of levels above the token max and min of raw, up to e^20.
        rollout_is_ratio_fraction_high, rollout_is_ratio_fraction_low: share of raw beyond that bound, of the level's.
        rollout_is_std: standard deviation of w clipped to [0, high], ddof 0.
        rollout_is_eff_sample_size: 1 / mean of (w / mean w)^2, w as for the deviation.
        rollout_is_seq_mean, _std, _max, _min, _max_deviation: of the sequences' mean w; the last is of |mean w - 1|.
        rollout_is_seq_fraction_high, rollout_is_seq_fraction_low: share of sequences whose mean raw is beyond a bound.
        rollout_is_oob_ratio: share outside the bounds; of modes mask and icepop.
        rollout_is_batch_norm_factor: mean w, which the weights were divided by; with batch_normalize.
        rollout_rs_{criterion}_mean, _max, _min, _std: of the criterion's estimate, per token or per sequence.
        rollout_rs_{criterion}_fraction_high, _fraction_low: share beyond its bounds; only k1 has a lower one.
        rollout_rs_{criterion}_seq_mean, _seq_std, _seq_max, _seq_min, _seq_max_deviation, _seq_fraction_high,
            _seq_fraction_low: the same of the sequences' means.
        rollout_rs_{criterion}_masked_fraction, _seq_masked_fraction: share of tokens it rejects, of sequences with one.
        rollout_rs_masked_fraction, rollout_rs_seq_masked_fraction: the same of all criteria together.
        training_log_ppl, training_ppl, rollout_log_ppl, rollout_ppl: mean over sequences of -mean old (rollout), of e^.
        kl, k3_kl: mean of -l, of e^l - l - 1.
        log_ppl_diff, log_ppl_abs_diff, log_ppl_diff_max, log_ppl_diff_min: of mean rollout - mean old, per sequence.
        ppl_ratio: mean over sequences of e^ that.
        chi2_token, chi2_seq: mean of e^2l - 1, over tokens and with l summed over sequences, clamped to +-20.
    """

    def __init__(self, values: Tensor, names: tuple[str, ...]) -> None:
        self.values_tensor, self.names = values, names

    def __getitem__(self, name: str) -> Tensor:
        return self.values_tensor[self.names.index(name)] if name in self.names else self._missing(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        return f"Metrics({', '.join(self.names)})"

    def floats(self) -> dict[str, float]:
        """All of them as Python floats, in one transfer."""
        return dict(zip(self.names, self.values_tensor.tolist(), strict=True))

    def _map_tensors(self, function: Callable[[Tensor], Any]) -> Metrics:
        return Metrics(function(self.values_tensor), self.names)

    def _missing(self, name: str) -> Tensor:
        raise KeyError(f"no metric {name!r}; there are {', '.join(self.names)}")


@dataclass(frozen=True, slots=True)
class PolicyLoss:
    """loss: scalar f32 with gradient; metrics: by name; token_loss: before aggregation, if asked for.

    tokens: what return_tokens names, by name, f32 in the tokens' shape, 0 where masked out. Constants.
    """

    loss: Tensor
    metrics: Metrics
    token_loss: Tensor | None = None
    tokens: Mapping[str, Tensor] = field(default_factory=dict)
