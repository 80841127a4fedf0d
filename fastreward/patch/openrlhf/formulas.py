"""OpenRLHF's losses and its KL estimate, written once in the loss language: value, metrics and gradient in one pass."""

from __future__ import annotations

from typing import Final

from fastreward.losses import Node, Terms, abs, clip, define, exp, maximum, minimum, seq_mean, stop_gradient, where

#: The estimate of a token is held within +- this.
KL_CLAMP: Final = 10.0
#: Largest weight of a token where the KL's gradient is corrected for the policy that sampled.
KL_WEIGHT_MAX: Final = 10.0
#: Probabilities are kept this far from 0 and 1 where the rollout engine's is compared with the trainer's.
_PROBABILITY_MARGIN: Final = 1e-6


@define
def identity(t: Terms) -> Node:
    """x: what is aggregated is given."""
    return t.logprob


@define
def approximate_kl(t: Terms, kind: str = "k1", unbiased: bool = False) -> Node:
    """OpenRLHF's compute_approx_kl: k1, k2 or k3 of x = logprob - ref_logprob, within +-10.

    unbiased: the value of that estimate with the gradient of w x^2 / 2, w = exp(logprob - old_logprob) at most 10 and
    held constant, 1 without old_logprobs. Verified in code: OpenRLHF models/utils.py. Aggregation: token-sum.
    """
    x = t.logprob - t.ref_logprob
    value = {"k1": _k1, "k2": _k2, "k3": _k3}[kind](x)
    value = clip(value, -KL_CLAMP, KL_CLAMP)
    if not unbiased:
        return value
    surrogate = x * x / 2.0
    if t.has("old_logprob"):
        surrogate = surrogate * stop_gradient(minimum(exp(t.logprob - t.old_logprob), KL_WEIGHT_MAX))
    return stop_gradient(value) + surrogate - stop_gradient(surrogate)


def _k1(x: Node) -> Node:
    return x


def _k2(x: Node) -> Node:
    return x * x / 2.0


def _k3(x: Node) -> Node:
    bounded = maximum(x, -10.0)  # beyond it the estimate is cut off anyway, and exp would overflow
    return exp(-bounded) - 1.0 + bounded


@define
def policy(
    t: Terms,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    low: float,
    high: float,
    kind: str = "ppo",
    dual: bool = False,
    level: str = "off",
    mode: str = "mask",
    gating: str = "ratio",
) -> Node:
    """OpenRLHF's PolicyLoss before it is aggregated: clipped PPO or GSPO, corrected for the rollout engine's mismatch.

    Reports clip_ratio, ppo_kl and, with a correction, vllm_kl and is_filter_ratio. dual: whether dual_clip holds.
    low, high: the correction's bounds. Verified in code: OpenRLHF models/loss.py.
    """
    whole = t.log_ratio if kind == "ppo" or level == "off" else t.logprob - t.rollout_logprob
    ratio = t.ratio if kind == "ppo" else exp(seq_mean(whole))
    surrogate = ratio * t.advantage
    clipped = clip(ratio, 1.0 - clip_low, 1.0 + clip_high) * t.advantage
    t.report(clip_ratio=clipped < surrogate, ppo_kl=-t.log_ratio)
    gain = minimum(surrogate, clipped)
    if dual:
        gain = where(t.advantage < 0.0, maximum(gain, dual_clip * t.advantage), gain)
    if kind != "ppo" or level == "off":
        return -gain
    return _corrected(t, -gain, low, high, level, mode, gating)


def _corrected(t: Terms, loss: Node, low: float, high: float, level: str, mode: str, gating: str) -> Node:
    """The loss times the importance weight of the rollout engine, which is bounded, or drops the token or sequence."""
    log_weight = t.old_logprob - t.rollout_logprob
    weight = exp(log_weight)
    if gating == "ratio":
        statistic = exp(seq_mean(log_weight)) if level == "seq" else weight
    else:
        variation = abs(_probability(t.rollout_logprob) - _probability(t.old_logprob))
        statistic = seq_mean(variation) if level == "seq" else variation
    outside = (statistic < low) | (statistic > high)
    t.report(is_filter_ratio=outside, vllm_kl=-log_weight)
    return loss * (clip(statistic, low, high) if mode == "clip" else where(outside, 0.0, weight))


def _probability(logprob: Node) -> Node:
    return clip(exp(logprob), _PROBABILITY_MARGIN, 1.0 - _PROBABILITY_MARGIN)
