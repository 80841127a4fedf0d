"""Policy losses that look along the sequence, at what follows a token or at its segment, or at all tokens of the batch.

d = logprob - old_logprob, r = exp(d) with d clamped to +-20, A = advantage. Tokens that do not count are passed over:
they take no step of a discount, and a segment goes on behind them.
"""

from __future__ import annotations

import math
from typing import Any

from fastreward.language.define import define
from fastreward.language.functions import (
    batch_sum,
    batch_threshold,
    clip,
    exp,
    maximum,
    minimum,
    segment_mean,
    segment_sum,
    seq_discounted_sum,
    seq_sum,
    stop_gradient,
    where,
)
from fastreward.language.node import Node
from fastreward.language.terms import LOG_RATIO_CLAMP, Terms
from fastreward.losses._rules import check
from fastreward.losses.token import clipped_surrogate

__all__ = ["bapo", "fipo", "m2po", "segment_ppo"]

Number = Node | float
_MOST_STEPS = 200  # of bapo's upper bound: with them its program is made in a second


@define(check=check)
def fipo(
    t: Terms,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    gamma: float = 2 ** (-1 / 32),
    weight_low: float = 1.0,
    weight_high: float = 1.2,
    safety: float | None = 4.0,
    delta: float | None = None,
) -> Node:
    """w max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)) with the constant w = clip(exp(f), weight_low, weight_high).

    f_t = d_t + gamma f_(t+1): how much likelier what follows has become, with a half-life of 32 tokens. safety: where
    A < 0 and r is above it, w is clipped to [0.8, 1] instead; None: nowhere. delta: r is at most this, and tokens above
    it add nothing to f; None: no bound. Reports: future_weight, w.

    FIPO (arXiv 2603.19835). Verified in code: ms-swift grpo_trainer.py `_compute_fipo_influence`, where the discount
    also takes steps over tokens that do not count. Aggregation: token-mean.
    """
    ahead = t.log_ratio if delta is None else where(t.ratio > delta, 0.0, t.log_ratio)
    weight = clip(exp(seq_discounted_sum(ahead, gamma)), weight_low, weight_high)
    if safety is not None:
        weight = where((t.advantage < 0.0) & (t.ratio > safety), clip(weight, 0.8, 1.0), weight)
    t.report(future_weight=weight)
    return stop_gradient(weight) * clipped_surrogate(t, t.ratio, t.advantage, clip_low, clip_high, delta)


@define(static=("average",), check=check)
def segment_ppo(
    t: Terms,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    *,
    average: bool = True,
    log_ratio_max: float | None = LOG_RATIO_CLAMP,
) -> Node:
    """PPO-clip on the ratio of the token's segment (turn, step): exp(mean of d over it), average=False: exp(sum of d).

    t.extra("segment_ids") [B, T]: ids, of which equal neighbours are one segment; -1: no segment, the ratio is 1 and
    nothing is learnt. The log-ratio is at most log_ratio_max (None: any). The gradient goes through the whole segment.

    Segment-level importance weights. Reconstructed from ROLL base_config.py (importance_sampling at segment level,
    product or geometric mean). Aggregation: token-mean.
    """
    ids = t.extra("segment_ids")
    log_ratio = (segment_mean if average else segment_sum)(t.log_ratio, ids)
    ratio = exp(log_ratio if log_ratio_max is None else minimum(log_ratio, log_ratio_max))
    return where(ids < 0.0, 0.0, clipped_surrogate(t, ratio, t.advantage, clip_low, clip_high))


def _check_bapo(**parameters: Any) -> None:
    check(**parameters)
    for side in ("low", "high"):
        start, end = parameters[f"{side}_start"], parameters[f"{side}_end"]
        if not start <= end:
            raise ValueError(f"{side}_end: expected at least {side}_start, {start!r}, got {end!r}")
    steps = (parameters["high_end"] - parameters["high_start"]) / parameters["high_step"]
    if not steps <= _MOST_STEPS:
        raise ValueError(
            f"high_step: expected at most {_MOST_STEPS} steps from high_start to high_end, got {steps:.0f}; each is a "
            "sum over the batch"
        )


@define(static=("high_start", "high_end", "high_step"), check=_check_bapo)
def bapo(
    t: Terms,
    target: float = 1.0,
    low_start: float = 0.6,
    low_end: float = 0.8,
    high_start: float = 1.2,
    high_end: float = 2.0,
    high_step: float = 0.05,
    dual_clip: float = 3.0,
) -> Node:
    """PPO-clip with the ratio in [low, high], the narrowest bounds in which tokens with A > 0 have their share.

    They have it where the sum of A min(r, high) over A > 0 is at least target times that of -A max(r, low) over A < 0.
    Until then low goes from low_start to low_end, then high up in steps of high_step, to high_end at most; both are
    constants. dual_clip bounds the loss of tokens with A < 0 at -A dual_clip. Reports: bound_low, bound_high.

    The sums are over this call's tokens; in the authors' code over those of all ranks. low is raised in steps there:
    as the second sum grows with it, always to its end.

    BAPO (arXiv 2510.18927). Verified in code: WooooDyy/BAPO recipe/bapo/policy_loss.py; the bounds are the examples of
    its config.py. By a third-party note the paper raises high first, and asks for a share of both sums: target = share
    / (1 - share). Aggregation: token-mean.
    """
    low, high = _balancing(t, target, (low_start, low_end), (high_start, high_end), high_step)
    t.report(
        bound_low=low,
        bound_high=high,
        clip_fraction_low=(t.ratio < low) & (t.advantage < 0),
        clip_fraction_high=(t.ratio > high) & (t.advantage > 0),
    )
    value = maximum(-t.advantage * t.ratio, -t.advantage * clip(t.ratio, low, high))
    return where(t.advantage < 0, minimum(value, -t.advantage * dual_clip), value)


def _balancing(
    t: Terms, target: Number, lows: tuple[Number, Number], highs: tuple[float, float], step: float
) -> tuple[Node, Node]:
    """BAPO's bounds of the ratio; each upper one that may be taken is a sum over the batch."""

    def good(high: float) -> Node:
        return batch_sum(seq_sum(maximum(t.advantage, 0.0) * minimum(ratio, high)))

    def bad(low: Number) -> Node:
        return batch_sum(seq_sum(maximum(-t.advantage, 0.0) * maximum(ratio, low)))

    ratio, (start, end) = stop_gradient(t.ratio), highs
    enough = good(start) >= target * bad(lows[0])
    needed, high = target * bad(lows[1]), t.graph.constant(end)
    for k in reversed(range(1, math.ceil((end - start) / step - 1e-6))):
        bound = start + k * step
        high = where(good(bound) >= needed, bound, high)
    return where(enough, lows[0], lows[1]), where(enough, start, high)


@define(check=check)
def m2po(t: Terms, tau: float = 0.04, clip_low: float = 0.2, clip_high: float = 0.2) -> Node:
    """PPO-clip on the tokens that are left when those of the largest d^2 are dropped until the mean of it is below tau.

    At least the smallest is left; equal ones go or stay together. Dropped tokens count as tokens with a loss of 0.
    Reports: dropped_fraction; second_moment, the mean of d^2 before.

    M2PO (arXiv 2510.01161). Verified in code: AReaL actor.py `_get_m2po_loss_mask` (m2_threshold), where d is between
    the policy that sampled and the recomputed one, a part of equal tokens may go, and the mean is over what is left.
    Aggregation: token-mean.
    """
    moment = t.log_ratio * t.log_ratio
    dropped = moment > batch_threshold(moment, keep_mean_below=tau)
    t.report(dropped_fraction=dropped, second_moment=moment)
    return where(dropped, 0.0, clipped_surrogate(t, t.ratio, t.advantage, clip_low, clip_high))
