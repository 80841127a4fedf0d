"""Policy losses per token of the form -weight * logprob, the weight a constant: every token keeps its gradient.

r = exp(d), d = logprob - old_logprob clamped to +-log_ratio_clamp (verl: 20; None: not clamped), A = advantage.
"""

from __future__ import annotations

import math
from typing import Any

from fastreward.language.define import define
from fastreward.language.functions import clip, exp, expm1, log, maximum, minimum, seq_sum, stop_gradient, where
from fastreward.language.node import Level, Node
from fastreward.language.terms import LOG_RATIO_CLAMP, Terms
from fastreward.losses._rules import RULES, Rule, apply, check
from fastreward.losses.token import clamped_ratio

__all__ = [
    "cispo",
    "dft",
    "dispo",
    "dppo_kl",
    "dppo_tv",
    "dro",
    "gpg",
    "kpop",
    "raft",
    "reinforce",
    "sdpo",
    "sft",
    "topr",
    "verifree",
    "vespo",
]


@define(aggregation="seq-mean-token-sum")
def reinforce(t: Terms) -> Node:
    """-A logprob: REINFORCE, with rollout importance weights where `weights` are passed.

    Verified in code: verl core_algos.py `compute_policy_loss_reinforce`. Aggregation: seq-mean-token-sum.
    """
    return -t.advantage * t.logprob


@define(aggregation="seq-mean-token-mean")
def gpg(t: Terms) -> Node:
    """-A logprob: Group Policy Gradient; what sets it apart is its advantage, (R - mean) times B / valid samples.

    GPG (arXiv 2504.02546). Verified in code: AMAP-ML/GPG grpo_trainer.py, verl core_algos.py `compute_policy_loss_gpg`
    (which leaves the aggregation to its default, token-mean). Aggregation: seq-mean-token-mean.
    """
    return -t.advantage * t.logprob


@define
def sft(t: Terms) -> Node:
    """-logprob: supervised fine-tuning; advantages are not read. Aggregation: token-mean."""
    return -t.logprob


@define
def raft(t: Terms) -> Node:
    """-logprob on the chosen rows, those with A > 0 (the best of each group, or the right ones); 0 on the others.

    Pass keep=advantages > 0 to leave the others out of the mean as well.

    RAFT (arXiv 2304.06767), best-of-n fine-tuning. Known form; no code read. Aggregation: token-mean.
    """
    return where(t.advantage > 0, -t.logprob, 0.0)


@define(aggregation="seq-mean-token-sum")
def verifree(t: Terms) -> Node:
    """-A logprob on the reasoning's tokens, -R logprob on the reference answer's: the gradient of E[pi(answer)].

    t.extra("answer") [B, T], not 0 = a token of the reference answer; t.extra("reward") [B]: R = pi(answer | reasoning)
    under the policy before the update, A = R less the others' mean (`group_advantages(center="leave-one-out")`).

    VeriFree (arXiv 2505.21493). Verified in code: sail-sg/VeriFree verifree.py. Aggregation: seq-mean-token-sum.
    """
    credit = where(t.extra("answer") != 0, t.extra("reward", per="sequence"), t.advantage)
    return -credit * t.logprob


@define
def dft(t: Terms) -> Node:
    """-stop_gradient(p) logprob, p = exp(logprob): SFT whose gradient is that of -p; advantages are not read.

    DFT (arXiv 2508.05629). Verified in code: TRL sft_trainer.py (loss_type "dft"). Aggregation: token-mean.
    """
    return -stop_gradient(exp(t.logprob)) * t.logprob


@define
def topr(t: Terms) -> Node:
    """-A logprob where A > 0, else -stop_gradient(min(r, 1)) A logprob: wrong answers count as far as they are likely.

    A right answer is learned from wherever it came from; the push away from a wrong one ends where the policy no longer
    writes it.

    TOPR (arXiv 2503.14286), its weight per token. Notes: ROLL actor_pg_worker.py by a third-party formula page; the
    paper's own weight is of the sequence. Aggregation: token-mean, reconstructed.
    """
    return -where(t.advantage > 0, 1.0, stop_gradient(minimum(t.ratio, 1.0))) * t.advantage * t.logprob


# ------------------------------------------------------------------------------------------- clipped importance weights
_THRESHOLDS: dict[str, Rule] = {
    **RULES,
    "clip_low": (lambda x: x >= 0, "a threshold >= 0"),
    "clip_high": (lambda x: x > 0, "a positive threshold"),
}


def _check_cispo(convention: str, **parameters: Any) -> None:
    conventions = ("verl", "trl", "tinker")
    if convention not in conventions:
        raise ValueError(f"convention: expected 'verl', 'trl' or 'tinker', got {convention!r}")
    apply(RULES if convention == "verl" else _THRESHOLDS, parameters)
    if convention == "tinker" and parameters["clip_low"] > parameters["clip_high"]:
        raise ValueError(
            f"clip_low: expected at most clip_high, {parameters['clip_high']!r}, got {parameters['clip_low']!r}"
        )


@define(static=("convention", "log_ratio_clamp"), check=_check_cispo)
def cispo(
    t: Terms,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    convention: str = "verl",
    *,
    log_ratio_clamp: float | None = LOG_RATIO_CLAMP,
) -> Node:
    """-stop_gradient(bounded r) A logprob: the importance weight is clipped, no token is.

    Three conventions write the bounds. "verl" (and slime, the paper's equation 4): r in [1 - clip_low, 1 + clip_high];
    the paper's own runs set clip_low 1, no lower bound. "trl" (and ms-swift): r <= clip_high, clip_low not read; 5.0
    is usual. "tinker": r in [clip_low, clip_high], its default [0, 4].

    CISPO, MiniMax-M1 (arXiv 2506.13585). Verified in code: verl core_algos.py `compute_policy_loss_cispo`, TRL
    grpo_trainer.py; "tinker" in its documentation. Aggregation: token-mean.
    """
    ratio = clamped_ratio(t, log_ratio_clamp)
    if convention == "trl":
        low, high = None, clip_high
    elif convention == "tinker":
        low, high = clip_low, clip_high
    else:
        low, high = 1 - clip_low, 1 + clip_high
    if low is not None:
        t.report(clip_fraction_low=(ratio < low) & (t.advantage < 0))
    t.report(clip_fraction_high=(ratio > high) & (t.advantage > 0))
    return -stop_gradient(clip(ratio, low, high)) * t.advantage * t.logprob


@define(static=("log_ratio_clamp",), check=check)
def dispo(
    t: Terms,
    pos_low: float = 0.2,
    pos_high: float = 10.0,
    neg_low: float = 1.0,
    neg_high: float = 100.0,
    *,
    log_ratio_clamp: float | None = LOG_RATIO_CLAMP,
) -> Node:
    """CISPO with bounds by the sign of A: r in [1 - pos_low, 1 + pos_high] where A > 0, else in [1 - neg_low, ...].

    DISPO (arXiv 2602.00983). Formula and defaults from two independent third-party notes that agree, no code released.
    Aggregation: token-mean.
    """
    positive, ratio = t.advantage > 0, clamped_ratio(t, log_ratio_clamp)
    low, high = where(positive, 1 - pos_low, 1 - neg_low), where(positive, 1 + pos_high, 1 + neg_high)
    t.report(clip_fraction_low=(ratio < low) & (t.advantage < 0), clip_fraction_high=(ratio > high) & (t.advantage > 0))
    return -stop_gradient(clip(ratio, low, high)) * t.advantage * t.logprob


# -------------------------------------------------------------------------------------------- trust regions by masking
def _masked_score(t: Terms, keep: Node, cap: float, log_ratio_clamp: float | None) -> Node:
    t.report(
        clip_fraction_low=~keep & (t.advantage < 0),
        clip_fraction_high=~keep & (t.advantage > 0),
    )
    weight = stop_gradient(minimum(clamped_ratio(t, log_ratio_clamp), cap))
    return where(keep, -t.advantage * weight * t.logprob, 0.0)


@define(static=("log_ratio_clamp",), check=check)
def dppo_tv(
    t: Terms,
    low: float = 0.2,
    high: float = 0.2,
    cap: float = 20.0,
    *,
    log_ratio_clamp: float | None = LOG_RATIO_CLAMP,
) -> Node:
    """-A stop_gradient(min(r, cap)) logprob while p - q <= high (A > 0), or p - q >= -low; 0 outside. p, q: new and old
    probability of the token.

    DPPO with the binary total variation (arXiv 2602.04879). Verified in code: verl core_algos.py
    `compute_policy_loss_dppo_tv` (cap 20, thresholds from clip_ratio_low and _high), sail-sg/Stable-RL (cap 10).
    Aggregation: token-mean.
    """
    moved, positive = exp(t.logprob) - exp(t.old_logprob), t.advantage > 0
    keep = (positive & (moved <= high)) | (~positive & (moved >= -low))
    return _masked_score(t, keep, cap, log_ratio_clamp)


@define(static=("log_ratio_clamp",), check=check)
def dppo_kl(
    t: Terms,
    low: float = 0.2,
    high: float = 0.2,
    cap: float = 20.0,
    *,
    log_ratio_clamp: float | None = LOG_RATIO_CLAMP,
) -> Node:
    """-A stop_gradient(min(r, cap)) logprob while KL <= high or p <= q (A > 0), or KL <= low or p >= q; 0 outside.

    KL of the two Bernoulli distributions "this token or another": q (log q - log p) + (1 - q) log((1 - q + 1e-8) /
    (1 - p + 1e-8)), p and q the new and the old probability.

    DPPO with the binary KL (arXiv 2602.04879). Verified in code: verl core_algos.py `compute_policy_loss_dppo_kl`.
    Aggregation: token-mean.
    """
    p, q, positive = exp(t.logprob), exp(t.old_logprob), t.advantage > 0
    other_p, other_q = -expm1(t.logprob), -expm1(t.old_logprob)  # 1 - p without its rounding
    kl = other_q * log((other_q + 1e-8) / (other_p + 1e-8)) - q * t.log_ratio
    keep = (positive & ((kl <= high) | (p <= q))) | (~positive & ((kl <= low) | (p >= q)))
    return _masked_score(t, keep, cap, log_ratio_clamp)


@define(static=("log_ratio_clamp",), check=check)
def kpop(t: Terms, threshold: float = 0.1, *, log_ratio_clamp: float | None = LOG_RATIO_CLAMP) -> Node:
    """-A r while KL(p || q) <= threshold and KL(q || p) <= threshold, 0 outside: whichever way the advantage drives it.

    KL of the two Bernoulli distributions "this token or another", p the new probability, q that of old_logprobs, those
    of the engine that sampled; both are held in [1e-6, 1 - 1e-6]. In ratios the region is wide for rare tokens and
    narrow for certain ones. Reports: masked_fraction.

    KPop (Guo et al., Ant Group; ringtech.notion.site/kpop). From notes: AReaL's pull request 1405, merged, which masks
    between rollouts and the proximal policy, and prime-rl's 3283, open, whose form and clamp this is; both as quoted
    there. Aggregation: token-mean, masked tokens counting.
    """
    low, high = math.log(1e-6), math.log1p(-1e-6)
    log_p, log_q = clip(t.logprob, low, high), clip(t.old_logprob, low, high)
    gap, other = log_p - log_q, log(expm1(log_p) / expm1(log_q))  # of the token, of the others together
    forward = exp(log_p) * gap - expm1(log_p) * other
    backward = expm1(log_q) * other - exp(log_q) * gap
    masked = maximum(forward, backward) > threshold
    t.report(masked_fraction=masked)
    return where(masked, 0.0, -t.advantage * clamped_ratio(t, log_ratio_clamp))


@define(check=check)
def dro(t: Terms, beta: float) -> Node:
    """-(A logprob - beta d^2 / 2), d = logprob - old_logprob not clamped: a quadratic pull to the old policy.

    DRO (arXiv 2405.19107), in verl's per-token form. Verified in code: verl core_algos.py `compute_policy_loss_dro`.
    Aggregation: token-mean.
    """
    return 0.5 * beta * t.log_ratio * t.log_ratio - t.advantage * t.logprob


@define(check=check)
def vespo(t: Terms, k_pos: float = 2.0, lambda_pos: float = 3.0, k_neg: float = 3.0, lambda_neg: float = 2.0) -> Node:
    """-stop_gradient(phi) A logprob, phi = exp(lambda + k log W - lambda W): a soft gate on the whole sequence's ratio.

    log W = sum of d over the sequence, each clamped to +-20, all of it to [log 1e-8, 20]; (k, lambda) by the sign of A.
    `weights` (rollout importance weights) do not multiply the loss: their logarithms, clamped alike, are added to
    log W; weights [B] once.

    VESPO (arXiv 2602.10693). Verified in code: TRL grpo_trainer.py `get_gamma_weights`. Aggregation: token-mean.
    """
    lowest = math.log(1e-8)
    log_w = seq_sum(clip(t.log_ratio, -LOG_RATIO_CLAMP, LOG_RATIO_CLAMP))
    if t.has("weight"):
        correction = clip(log(t.weight), lowest, LOG_RATIO_CLAMP)
        log_w = log_w + (seq_sum(correction) if t.weight.level == Level.TOKEN else correction)
    log_w = clip(log_w, lowest, LOG_RATIO_CLAMP)
    positive = t.advantage >= 0
    k, gate = where(positive, k_pos, k_neg), where(positive, lambda_pos, lambda_neg)
    phi = stop_gradient(exp(k * log_w + gate * (1.0 - exp(log_w))))
    t.report(phi_mean=phi)
    return -phi * t.advantage * t.logprob


@define(check=check)
def sdpo(t: Terms, is_clip: float | None = 2.0) -> Node:
    """stop_gradient(logprob - teacher) logprob: reverse KL to a teacher on the sampled tokens; A is not read.

    t.extra("teacher_logprob") [B, T]: log-probs of the same tokens under the teacher (the model itself, shown a
    successful rollout or feedback). is_clip: times stop_gradient(min(r, is_clip)); None: not. Rows without a
    teacher are left out by `keep`. Over the k likeliest tokens: `sdpo_topk`.

    SDPO (arXiv 2601.20802). Verified in code: lasgroup/SDPO core_algos.py, TRL experimental/sdpo/loss_utils.py.
    Aggregation: token-mean.
    """
    value = stop_gradient(t.logprob - t.extra("teacher_logprob")) * t.logprob
    return value if is_clip is None else value * stop_gradient(minimum(t.ratio, is_clip))
