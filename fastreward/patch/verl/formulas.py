"""The losses that verl's trainer calls, with what verl measures of them, in the loss language.

Each takes its value from `fastreward.losses`; what is written out here is verl's metrics, under verl's names without
"actor/", and where verl differs from the published loss in more than its parameters.
"""

from __future__ import annotations

from fastreward import losses
from fastreward.language.node import Node
from fastreward.language.terms import Terms
from fastreward.losses import abs, define, exp, log, minimum, stop_gradient, where

#: What `losses.ppo` and `losses.gspo_token` report: tokens beyond the clip, at whose either end the clipped loss is
#: the larger one. verl compares the two losses and counts the same tokens.
CLIPPED = ("clip_fraction_low", "clip_fraction_high")


@define
def gspo(t: Terms, clip_low: float, clip_high: float) -> Node:
    """verl's GSPO; its KL is not clamped."""
    t.report(ppo_kl=-t.log_ratio)
    return losses.gspo_token(clip_low, clip_high)(t)


@define
def cispo(t: Terms, clip_low: float, clip_high: float) -> Node:
    """verl's CISPO, whose clip fraction counts tokens of either sign."""
    t.report(pg_clipfrac=(t.ratio < 1 - clip_low) | (t.ratio > 1 + clip_high))
    return losses.cispo(clip_low, clip_high)(t)


@define
def dppo_tv(t: Terms, low: float, high: float, cap: float) -> Node:
    """verl's DPPO with the binary total variation."""
    moved = exp(t.logprob) - exp(t.old_logprob)
    _report_kept(t, where(t.advantage > 0, _one(moved <= high), _one(moved >= -low)) > 0, cap)
    return losses.dppo_tv(low, high, cap)(t)


@define
def dppo_kl(t: Terms, low: float, high: float, cap: float) -> Node:
    """verl's DPPO with the binary KL, whose 1 - p is rounded as verl's: near p = 1 that decides what is kept."""
    p, q = exp(t.logprob), exp(t.old_logprob)
    kl = q * (t.old_logprob - t.logprob) + (1.0 - q) * log((1.0 - q + 1e-8) / (1.0 - p + 1e-8))
    up, down = (kl <= high) | (p <= q), (kl <= low) | (p >= q)
    kept = where(t.advantage > 0, _one(up), _one(down)) > 0
    _report_kept(t, kept, cap)
    return where(kept, -t.advantage * stop_gradient(minimum(t.ratio, cap)) * t.logprob, 0.0)


def _report_kept(t: Terms, kept: Node, cap: float) -> None:
    t.report(pg_clipfrac=~kept, pg_clipfrac_lower=kept & (t.ratio > cap))


def _one(condition: Node) -> Node:
    return where(condition, 1.0, 0.0)


@define
def geo_mean(t: Terms, clip_low: float, clip_high: float) -> Node:
    """verl's GMPO; its clip fractions count what is beyond either end, by the sign of the advantage."""
    d = t.log_ratio
    clipped = (d < -clip_low) | (d > clip_high)
    t.report(
        pg_clipfrac=clipped & (t.advantage > 0), pg_clipfrac_lower=clipped & (t.advantage < 0), ppo_kl=-t.log_ratio
    )
    return losses.gmpo(clip_low, clip_high, log_ratio_clamp=None)(t)


@define
def kl_cov(t: Terms, kl_coef: float) -> Node:
    """verl's KL-Cov, of whose log-ratio nothing is clamped; its KL is the mean of |d|."""
    t.report(ppo_kl=abs(t.log_ratio))
    return losses.kl_cov(kl_coef, log_ratio_clamp=None)(t)


@define
def dro(t: Terms, beta: float) -> Node:
    """verl's DRO; its KL is not clamped."""
    t.report(ppo_kl=-t.log_ratio)
    return losses.dro(beta)(t)


@define
def reinforce(t: Terms) -> Node:
    """verl's REINFORCE, whose KL is to the rollout policy (the old log-probs here), not clamped."""
    t.report(ppo_kl=-t.log_ratio)
    return losses.reinforce()(t)


@define
def identity(t: Terms) -> Node:
    """A loss that has been computed per token, to be aggregated."""
    return t.logprob
