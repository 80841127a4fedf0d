"""Policy losses that look along the sequence, at what follows a token or at its segment, or at all tokens of the batch.

d = logprob - old_logprob, r = exp(d) with d clamped to +-20, A = advantage. Tokens that do not count are passed over:
they take no step of a discount, and a segment goes on behind them.
"""

from __future__ import annotations

from fastreward.language.define import define
from fastreward.language.functions import (
    batch_threshold,
    clip,
    exp,
    minimum,
    segment_mean,
    segment_sum,
    seq_discounted_sum,
    stop_gradient,
    where,
)
from fastreward.language.node import Node
from fastreward.language.terms import LOG_RATIO_CLAMP, Terms
from fastreward.losses._rules import check
from fastreward.losses.token import clipped_surrogate

__all__ = ["fipo", "m2po", "segment_ppo"]


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
