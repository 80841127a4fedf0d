"""Policy losses per token on the probability ratio: PPO's clipped surrogate and what varies it.

r = exp(d), d = logprob - old_logprob clamped to +-log_ratio_clamp with gradient 0 outside (verl, OpenRLHF: 20; None:
not clamped, as TRL), A = advantage. `aggregation` is what the method was published with.
"""

from __future__ import annotations

from fastreward.language.define import define
from fastreward.language.functions import (
    abs,
    batch_largest,
    batch_mean,
    batch_sum,
    clip,
    exp,
    log,
    maximum,
    minimum,
    seq_sum,
    sigmoid,
    sqrt,
    stop_gradient,
    where,
)
from fastreward.language.node import Node
from fastreward.language.terms import LOG_RATIO_CLAMP, Terms
from fastreward.losses._rules import check

__all__ = [
    "cfpo",
    "clip_cov",
    "echo",
    "kl_cov",
    "loglinear_ppo",
    "nsr",
    "ppo",
    "psr",
    "sapo",
    "stable_reinforce",
    "tw_grpo",
    "vapo",
    "visurf",
    "w_reinforce",
]


def clamped_ratio(t: Terms, log_ratio_clamp: float | None) -> Node:
    """exp(log-ratio), clamped to +-log_ratio_clamp; None: not at all, and 1 where the advantage is 0 (no 0 * inf)."""
    if log_ratio_clamp is None:
        return exp(where(t.advantage == 0.0, 0.0, t.log_ratio))
    if log_ratio_clamp == LOG_RATIO_CLAMP:
        return t.ratio
    return exp(clip(t.log_ratio, -log_ratio_clamp, log_ratio_clamp))


def clipped_surrogate(
    t: Terms, ratio: Node, advantage: Node, clip_low: float, clip_high: float, delta: float | None = None
) -> Node:
    """max(-A min(r, delta), -A clip(r, 1 - clip_low, 1 + clip_high)), with its clip fractions reported."""
    cost = -advantage
    t.report(
        clip_fraction_low=(ratio < 1 - clip_low) & (advantage < 0),
        clip_fraction_high=(ratio > 1 + clip_high) & (advantage > 0),
    )
    whole = cost * (ratio if delta is None else minimum(ratio, delta))
    return maximum(whole, cost * clip(ratio, 1 - clip_low, 1 + clip_high))


@define(static=("log_ratio_clamp",), check=check)
def ppo(
    t: Terms,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    delta: float | None = None,
    *,
    log_ratio_clamp: float | None = LOG_RATIO_CLAMP,
) -> Node:
    """PPO-clip: max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)), r = exp(logprob - old_logprob).

    clip_low, clip_high: widths of the clip range; unequal ones are DAPO's clip-higher (arXiv 2503.14476). dual_clip:
    c > 1 bounds the loss of tokens with A < 0 at -A c (arXiv 1912.09729; verl's default is 3.0). delta: upper bound of
    the ratio in the unclipped branch (two-sided clip of INTELLECT-2, as TRL's `delta`). log_ratio_clamp: the log-ratio
    is clamped to +- this, with gradient 0 outside (verl, OpenRLHF: 20); None never.

    PPO arXiv 1707.06347. Verified in code: verl core_algos.py `compute_policy_loss_vanilla`, TRL grpo_trainer.py
    `_compute_loss`, OpenRLHF models/loss.py. Aggregation: token-mean (DAPO, verl); GRPO's paper seq-mean-token-mean,
    Dr.GRPO seq-mean-token-sum-norm.
    """
    value = clipped_surrogate(t, clamped_ratio(t, log_ratio_clamp), t.advantage, clip_low, clip_high, delta)
    if dual_clip is None:
        return value
    cap = -t.advantage * dual_clip
    t.report(clip_fraction_dual=(t.advantage < 0) & (value > cap))
    return where(t.advantage < 0, minimum(value, cap), value)


# --------------------------------------------------------------------------------------------- right and wrong answers
@define(static=("log_ratio_clamp",), check=check)
def psr(
    t: Terms, clip_low: float = 0.2, clip_high: float = 0.2, *, log_ratio_clamp: float | None = LOG_RATIO_CLAMP
) -> Node:
    """Positive sample reinforcement: PPO-clip with A = R, for rewards R in {0, 1} passed as `advantages`.

    Only right answers teach. The method drops the wrong ones from the batch: pass keep=rewards > 0, else their tokens
    still count in the mean.

    RLVR-Decomposed (arXiv 2506.01347). Verified in code: TianHongZXY/RLVR-Decomposed core_algos.py. Aggregation:
    token-mean.
    """
    return clipped_surrogate(t, clamped_ratio(t, log_ratio_clamp), t.advantage, clip_low, clip_high)


@define(static=("log_ratio_clamp",), check=check)
def nsr(
    t: Terms, clip_low: float = 0.2, clip_high: float = 0.2, *, log_ratio_clamp: float | None = LOG_RATIO_CLAMP
) -> Node:
    """Negative sample reinforcement: PPO-clip with A = R - 1, for rewards R in {0, 1} passed as `advantages`.

    Only wrong answers teach. The method drops the right ones from the batch: pass keep=rewards == 0.

    RLVR-Decomposed (arXiv 2506.01347). Verified in code: TianHongZXY/RLVR-Decomposed core_algos.py. Aggregation:
    token-mean.
    """
    advantage = t.advantage - 1.0
    return clipped_surrogate(t, _ratio_for(t, advantage, log_ratio_clamp), advantage, clip_low, clip_high)


@define(static=("log_ratio_clamp",), check=check)
def w_reinforce(
    t: Terms,
    positive_weight: float = 0.1,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    *,
    log_ratio_clamp: float | None = LOG_RATIO_CLAMP,
) -> Node:
    """W-REINFORCE: PPO-clip with A = positive_weight R for right answers and -1 for wrong ones; R as `advantages`.

    RLVR-Decomposed (arXiv 2506.01347). Verified in code: TianHongZXY/RLVR-Decomposed core_algos.py ("weighted").
    Aggregation: token-mean.
    """
    advantage = where(t.advantage > 0, positive_weight * t.advantage, -1.0)
    return clipped_surrogate(t, _ratio_for(t, advantage, log_ratio_clamp), advantage, clip_low, clip_high)


def _ratio_for(t: Terms, advantage: Node, log_ratio_clamp: float | None) -> Node:
    """clamped_ratio where the advantage is not t.advantage."""
    if log_ratio_clamp is None:
        return exp(where(advantage == 0.0, 0.0, t.log_ratio))
    return clamped_ratio(t, log_ratio_clamp)


@define(static=("advantage_filter",), aggregation="seq-mean-token-mean", check=check)
def stable_reinforce(
    t: Terms,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    pre_clip: float = 1000.0,
    advantage_filter: str | None = "paper",
) -> Node:
    """StableReinforce: the ratio is held in [1 / pre_clip, pre_clip] before PPO's clip, and outliers teach nothing.

    Advantages are whitened over the batch's tokens (population variance, at least 1e-8). advantage_filter "paper": 0
    where |z| > 3; "code": 0 where z is further than 3 from the mean of the advantages before whitening, or |z| > 10;
    None: advantages as they come.

    R1-Reward (arXiv 2505.02835). Verified in code: yfzhang114/r1_reward openrlhf/models/loss.py and replay_buffer.py;
    the paper's bound differs from the code's. Aggregation: seq-mean-token-mean.
    """
    bound = log(t.graph.node(pre_clip))
    ratio = exp(clip(t.log_ratio, -bound, bound))
    if advantage_filter is None:
        return clipped_surrogate(t, ratio, t.advantage, clip_low, clip_high)
    tokens = maximum(batch_sum(t.length), 1.0)
    mean = batch_sum(seq_sum(t.advantage)) / tokens
    deviation = t.advantage - mean
    variance = batch_sum(seq_sum(deviation * deviation)) / tokens
    z = deviation / sqrt(maximum(variance, 1e-8)) + 1e-8
    gap = abs(z - mean) if advantage_filter == "code" else abs(z)
    kept = where((gap > 3.0) | (abs(z) > 10.0), 0.0, z)
    return clipped_surrogate(t, ratio, kept, clip_low, clip_high)


# ------------------------------------------------------------------------------------- rows and tokens treated apart
@define(aggregation="seq-mean-token-mean", check=check)
def visurf(t: Terms, clip_low: float = 0.2, clip_high: float = 0.2) -> Node:
    """PPO-clip on rollouts mixed with given answers, which no old policy wrote: old_logprob := stop_gradient(logprob).

    t.extra("expert") [B], not 0 = a given answer: its ratio is 1 and its gradient -A, that of supervised learning
    weighted by A; with A = 1 these are the SFT or RAFT rows of a mixed batch. Their old_logprobs are read by the
    metrics alone (pass the current ones).

    ViSurf (arXiv 2510.10606). Reconstructed: the abstract has ground truth injected into the rollout group; the switch
    is how a ratio can be had for it. Aggregation: seq-mean-token-mean.
    """
    own = t.logprob - stop_gradient(t.logprob)
    gap = where(t.extra("expert", per="sequence") != 0, own, t.log_ratio)
    ratio = exp(clip(gap, -LOG_RATIO_CLAMP, LOG_RATIO_CLAMP))
    return clipped_surrogate(t, ratio, t.advantage, clip_low, clip_high)


@define(static=("log_ratio_clamp",), check=check)
def tw_grpo(
    t: Terms,
    alpha: float = 1.4,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    *,
    log_ratio_clamp: float | None = LOG_RATIO_CLAMP,
) -> Node:
    """PPO-clip times the token weight 1 + (alpha - 1) u, u = t.extra("importance") [B, T] in [0, 1].

    u is how much the group's next-token distributions disagree at a position: `losses.tw_grpo_importance`.

    TW-GRPO (arXiv 2505.24718). Verified in code: longmalongma/TW-GRPO grpo_trainer.py. Aggregation: token-mean over
    the plain token count.
    """
    ratio = clamped_ratio(t, log_ratio_clamp)
    weight = 1.0 + (alpha - 1.0) * t.extra("importance")
    return weight * clipped_surrogate(t, ratio, t.advantage, clip_low, clip_high)


def _covariance(t: Terms) -> Node:
    """(A - mean A)(logprob - mean logprob), means over the batch's tokens; a constant."""
    mean = batch_sum(seq_sum(t.advantage)) / maximum(batch_sum(t.length), 1.0)
    return (t.advantage - mean) * stop_gradient(t.logprob - batch_mean(t.logprob))


@define(static=("log_ratio_clamp",), check=check)
def clip_cov(
    t: Terms,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    share: float = 0.0002,
    cov_low: float = 1.0,
    cov_high: float = 5.0,
    *,
    log_ratio_clamp: float | None = LOG_RATIO_CLAMP,
) -> Node:
    """PPO-clip, 0 on max(1, share of the tokens) drawn from those with cov_low < cov < cov_high that are not clipped.

    cov = (A - mean A)(logprob - mean logprob), means over the batch's tokens. t.extra("lots") [B, T], random numbers
    in [0, 1): the largest are drawn, as a loss itself draws nothing. Where t.extra("selected") [B, T] is passed
    (`losses.cov_mask(..., method="clip")`), it is these tokens instead.

    "The Entropy Mechanism" (arXiv 2505.22617). Verified in code: verl core_algos.py `compute_policy_loss_clip_cov`,
    which clamps no log-ratio and draws by another generator. Aggregation: token-mean.
    """
    ratio = clamped_ratio(t, log_ratio_clamp)
    value = clipped_surrogate(t, ratio, t.advantage, clip_low, clip_high)
    if t.has("selected"):
        return where(t.extra("selected") != 0, 0.0, value)
    covariance = _covariance(t)
    clipped = ((ratio > 1 + clip_high) & (t.advantage > 0)) | ((ratio < 1 - clip_low) & (t.advantage < 0))
    lots = where(~clipped & (covariance > cov_low) & (covariance < cov_high), t.extra("lots"), -1.0)
    return where((lots >= 0.0) & (lots >= batch_largest(lots, share=share)), 0.0, value)


@define(static=("log_ratio_clamp",), check=check)
def kl_cov(
    t: Terms, kl_coef: float = 1.0, share: float = 0.0002, *, log_ratio_clamp: float | None = LOG_RATIO_CLAMP
) -> Node:
    """-A r, plus kl_coef |d| on max(1, share of the tokens) with the largest (A - mean A)(logprob - mean logprob).

    Means over the batch's tokens; of those that equal the last one all are in. Where t.extra("selected") [B, T] is
    passed (`losses.cov_mask(..., method="kl")`), it is on these tokens instead.

    "The Entropy Mechanism" (arXiv 2505.22617). Verified in code: verl core_algos.py `compute_policy_loss_kl_cov`,
    which clamps no log-ratio; verl's configuration sets kl_coef 0.1. Aggregation: token-mean.
    """
    if t.has("selected"):
        selected = t.extra("selected") != 0
    else:
        covariance = _covariance(t)
        selected = covariance >= batch_largest(covariance, share=share)
    penalty = where(selected, kl_coef * abs(t.log_ratio), 0.0)
    return -t.advantage * clamped_ratio(t, log_ratio_clamp) + penalty


@define(static=("log_ratio_clamp",), aggregation="seq-mean-token-mean", check=check)
def sapo(
    t: Terms, tau_pos: float = 1.0, tau_neg: float = 1.05, *, log_ratio_clamp: float | None = LOG_RATIO_CLAMP
) -> Node:
    """Soft gate instead of a clip: -A sigmoid(tau (r - 1)) 4 / tau, tau = tau_pos where A > 0, else tau_neg.

    SAPO (arXiv 2511.20347). Verified in code: verl core_algos.py `compute_policy_loss_sapo`, TRL grpo_trainer.py.
    Aggregation: seq-mean-token-mean.
    """
    positive = t.advantage > 0
    gate = sigmoid(where(positive, tau_pos, tau_neg) * (clamped_ratio(t, log_ratio_clamp) - 1.0))
    return -t.advantage * where(positive, 4.0 / tau_pos, 4.0 / tau_neg) * gate


@define(static=("log_ratio_clamp",), check=check)
def cfpo(t: Terms, epsilon: float = 0.2, *, log_ratio_clamp: float | None = LOG_RATIO_CLAMP) -> Node:
    """A quadratic penalty instead of the clip: -A r + |A| (r - 1)^2 / (2 epsilon), least at r = 1 + sign(A) epsilon.

    CFPO (arXiv 2601.22801), token by token the loss of SPO (arXiv 2401.16025). From three third-party notes and
    codes of the paper that agree, one naming its equation 7; the authors' pull requests to TRL, verl and OpenRLHF, of
    which none was merged, describe it in words. Aggregation: token-mean.
    """
    ratio = clamped_ratio(t, log_ratio_clamp)
    return abs(t.advantage) * (ratio - 1.0) ** 2 / (2.0 * epsilon) - t.advantage * ratio


# ------------------------------------------------------------------------------------------------ PPO and one term more
@define(check=check)
def vapo(t: Terms, clip_low: float = 0.2, clip_high: float = 0.28, nll_coef: float = 0.1) -> Node:
    """PPO-clip + nll_coef times the mean of -logprob over the tokens of right answers, t.extra("reward") [B] above 0.

    The second term's mean is over these tokens alone; under another aggregation than token-mean
    it is weighted as the tokens there are.

    VAPO (arXiv 2504.05118), its positive-example language-model loss. Notes: NeMo-RL loss_functions.py by a third-party
    formula page; the coefficient is reconstructed (the paper's, from memory). Aggregation: token-mean.
    """
    right = t.extra("reward", per="sequence") > 0
    share = batch_sum(t.length) / maximum(batch_sum(where(right, t.length, 0.0)), 1.0)
    clipped = clipped_surrogate(t, t.ratio, t.advantage, clip_low, clip_high)
    return clipped + nll_coef * where(right, -t.logprob * share, 0.0)


@define(check=check)
def echo(t: Terms, alpha: float, clip_low: float = 0.2, clip_high: float = 0.2) -> Node:
    """PPO-clip on the policy's own tokens, -alpha logprob on those of tool outputs: a world model beside the policy.

    t.extra("observation") [B, T], not 0 = a token that a tool wrote, which the mask has to count. Old log-probs and
    advantages are not read there.

    ECHO. Notes: prime-rl echo.py by a third-party formula page, which gives alpha no default. Reconstructed: both kinds
    of tokens count in one mean. Aggregation: token-mean.
    """
    clipped = clipped_surrogate(t, t.ratio, t.advantage, clip_low, clip_high)
    return where(t.extra("observation") != 0, -alpha * t.logprob, clipped)


@define(check=check)
def loglinear_ppo(t: Terms, clip_low: float = 0.2, clip_high: float = 0.2) -> Node:
    """stop_gradient(exp(prox - old)) PPO-clip of exp(logprob - prox), prox between both: old + a (logprob - old).

    PPO whose proximal policy is not the one that wrote the rollouts, without a forward pass for it; prox is a constant,
    a = t.extra("interpolation") [B, T] in [0, 1]: 0 where the proximal policy wrote the token, towards 1 the older it
    is. Both exponents are clamped to +-20.

    Log-linear approximation of decoupled PPO's proximal policy (arXiv 2110.00641). Verified in code: AReaL 1.0.4
    trainer/ppo/actor.py `compute_prox_logp_approximations`, utils/functional `ppo_actor_loss_fn` (whose rejection of
    stale tokens is left to `correction_weights`). Aggregation: token-mean.
    """
    prox = stop_gradient(t.old_logprob + t.extra("interpolation") * t.log_ratio)
    weight = exp(clip(prox - t.old_logprob, -LOG_RATIO_CLAMP, LOG_RATIO_CLAMP))
    ratio = exp(clip(t.logprob - prox, -LOG_RATIO_CLAMP, LOG_RATIO_CLAMP))
    return weight * clipped_surrogate(t, ratio, t.advantage, clip_low, clip_high)
