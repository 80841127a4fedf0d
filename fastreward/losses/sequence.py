"""Policy losses per sequence, and per group of sequences.

d = logprob - old_logprob, L = a sequence's valid tokens, A = advantage. A loss over groups gives every sequence the
loss of its group: with group-mean, which these losses were published with, the batch's loss is the mean over groups
whatever their sizes. Those that learn from rewards rather than advantages take them as `advantages`. A sequence without
a valid token belongs to no group.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastreward.language.define import define
from fastreward.language.functions import (
    clip,
    exp,
    expm1,
    group_cumsum,
    group_logsumexp,
    group_mean,
    group_size,
    group_sum,
    log,
    maximum,
    minimum,
    seq_mean,
    seq_sum,
    sigmoid,
    sign,
    softplus,
    sqrt,
    stop_gradient,
    where,
)
from fastreward.language.node import Node
from fastreward.language.terms import LOG_RATIO_CLAMP, Terms
from fastreward.losses._rules import RULES, apply, check
from fastreward.losses.token import clipped_surrogate

__all__ = [
    "a2po",
    "brain",
    "flowrl",
    "gdro",
    "gmpo",
    "gspo",
    "gspo_token",
    "gvpo",
    "jepo",
    "kto",
    "laser",
    "pacs",
    "real",
    "sdpo_topk",
]

_NOTHING = float("-inf")


# ----------------------------------------------------------------------------------------------------------- sequences
@define(aggregation="seq-mean-token-mean", check=check)
def gspo(t: Terms, clip_low: float = 0.0003, clip_high: float = 0.0004, *, log_ratio_max: float | None = 10.0) -> Node:
    """PPO-clip on the sequence's ratio s = exp(mean of d), its log at most log_ratio_max; A is the sequence's mean.

    GSPO (arXiv 2507.18071). Verified in code: TRL grpo_trainer.py with importance_sampling_level="sequence" and
    OpenRLHF models/loss.py (log_ratio_max None in both), verl core_algos.py `compute_policy_loss_gspo` (10) as
    `gspo_token`. The default widths are the paper's by a third-party note. Aggregation: seq-mean-token-mean.
    """
    mean = seq_mean(t.log_ratio)
    ratio = exp(mean if log_ratio_max is None else minimum(mean, log_ratio_max))
    return clipped_surrogate(t, ratio, seq_mean(t.advantage), clip_low, clip_high)


@define(aggregation="seq-mean-token-mean", check=check)
def gspo_token(
    t: Terms, clip_low: float = 0.0003, clip_high: float = 0.0004, *, log_ratio_max: float | None = 10.0
) -> Node:
    """PPO-clip per token on exp(logprob - stop_gradient(logprob) + stop_gradient(mean of d)): GSPO for advantages that
    differ within a sequence; with one per sequence, value and gradient are GSPO's.

    GSPO (arXiv 2507.18071). Verified in code: verl core_algos.py `compute_policy_loss_gspo`; ms-swift
    importance_sampling_level="sequence_token". Aggregation: seq-mean-token-mean.
    """
    log_s = t.logprob - stop_gradient(t.logprob) + stop_gradient(seq_mean(t.log_ratio))
    ratio = exp(log_s if log_ratio_max is None else minimum(log_s, log_ratio_max))
    return clipped_surrogate(t, ratio, t.advantage, clip_low, clip_high)


_LOG_SPACE = {**RULES, "clip_low": RULES["clip_high"]}


def _check_gmpo(**parameters: Any) -> None:
    apply(_LOG_SPACE, parameters)


@define(static=("log_ratio_clamp",), aggregation="seq-mean-token-mean", check=_check_gmpo)
def gmpo(
    t: Terms,
    clip_low: float = 0.4,
    clip_high: float = 0.4,
    *,
    log_ratio_clamp: float | None = LOG_RATIO_CLAMP,
) -> Node:
    """-A exp(mean of c): the geometric mean of ratios, each clipped on the side that its advantage drives it to.

    c = min(d, u) where A > 0, max(d, u) where A < 0, u = d within [-clip_low, clip_high] (in log space). `weights` do
    not multiply token by token: their geometric mean over the sequence does, as in verl.

    GMPO (arXiv 2507.20673). Verified in code: verl core_algos.py `compute_policy_loss_geo_mean`, TRL
    experimental/gmpo; neither clamps d. Aggregation: seq-mean-token-mean.
    """
    d = t.log_ratio if log_ratio_clamp is None else clip(t.log_ratio, -log_ratio_clamp, log_ratio_clamp)
    direction = sign(t.advantage)
    least = direction * minimum(direction * d, direction * clip(d, -clip_low, clip_high))
    t.report(
        clip_fraction_low=(d < -clip_low) & (t.advantage < 0), clip_fraction_high=(d > clip_high) & (t.advantage > 0)
    )
    value = -seq_mean(t.advantage) * exp(seq_mean(least))
    return value * exp(seq_mean(log(t.weight + 1e-10))) if t.has("weight") else value


@define(aggregation="seq-mean-token-mean", check=check)
def laser(t: Terms, beta: float = 0.1, temperature: float = 1.0, constant: float | None = -23.0) -> Node:
    """(s - R)^2, s = beta (temperature logprob - constant) at the score token: the model rates its own answer.

    t.extra("score_token") [B, T], not 0 = the token after the end of the response whose log-prob is the score (its
    mask must be set); a row without one, a truncated response, gives 0. t.extra("reward") [B]: R. temperature: of
    sampling, which the log-probs were divided by. constant: None takes temperature ref_logprob. Class balance goes
    into `weights` [B]. The method adds 0.1 times this to a policy loss.

    LaSeR (arXiv 2510.14943). Verified in code: RUCBM/LaSeR dp_actor.py, ray_trainer.py. Aggregation:
    seq-mean-token-mean, rows without a score token included.
    """
    base = temperature * t.ref_logprob if constant is None else constant
    error = beta * (temperature * t.logprob - base) - t.extra("reward", per="sequence")
    return seq_sum(where(t.extra("score_token") != 0, error * error, 0.0))


def _check_topk(alpha: float, **_: Any) -> None:
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha: expected a number in [0, 1], got {alpha}")


@define(static=("alpha",), aggregation="seq-mean-token-mean", check=_check_topk)
def sdpo_topk(t: Terms, alpha: float = 0.5, tail: bool = True) -> Node:
    """Divergence of student and teacher over k ids: a "sequence" is one position, its "tokens" the k log-probs of ids.

    logprob: the student's [positions, k] (`token_logprobs(..., token_ids=...)`), t.extra("teacher_logprob") the
    teacher's; old log-probs and advantages are not read. alpha 0: KL(teacher || student), 1: KL(student || teacher),
    between: (1 - alpha) KL(student || M) + alpha KL(teacher || M), M their mixture with weight alpha on the teacher.
    tail: what the k ids leave is one id more; else both are renormalised over the k. The clipped importance weight of
    the sampled token goes into `weights` [positions].

    SDPO (arXiv 2601.20802). Verified in code: lasgroup/SDPO core_algos.py, TRL experimental/sdpo/loss_utils.py.
    Aggregation: mean over positions (seq-mean-token-mean here, token-mean there).
    """
    student, teacher = t.logprob, t.extra("teacher_logprob")
    if not tail:
        student, teacher = student - log(seq_sum(exp(student))), teacher - log(seq_sum(exp(teacher)))
    value = seq_sum(_divergence(student, teacher, alpha))
    return value + _divergence(_rest(student), _rest(teacher), alpha) if tail else value


def _rest(logprobs: Node) -> Node:
    """log(1 - sum of p), the sum at most exp(-1e-7)."""
    return log(-expm1(minimum(log(seq_sum(exp(logprobs))), -1e-7)))


def _divergence(student: Node, teacher: Node, alpha: float) -> Node:
    """One id's share."""
    p, q = exp(student), exp(teacher)
    if alpha == 0:
        return q * (teacher - student)
    if alpha == 1:
        return p * (student - teacher)
    mixture = log((1 - alpha) * p + alpha * q)
    return (1 - alpha) * p * (student - mixture) + alpha * q * (teacher - mixture)


# --------------------------------------------------------------------------------- regressions on rewards, and labels
@define(aggregation="seq-mean-token-mean", check=check)
def a2po(t: Terms, beta: float = 1e-3) -> Node:
    """(beta S - A)^2, S = sum of logprob - ref_logprob: the implicit reward is drawn to the optimal advantage.

    A = R - V*, V* = b log mean over the prompt's rollouts of exp(R / b), passed as `advantages`: the recipe makes it.

    A*PO (arXiv 2505.20686). Verified in code: TRL experimental/a2po/a2po_trainer.py (beta2). Aggregation: mean over
    sequences.
    """
    return (beta * seq_sum(t.logprob - t.ref_logprob) - seq_mean(t.advantage)) ** 2


@define(aggregation="seq-mean-token-mean", check=check)
def gvpo(t: Terms, beta: float = 0.1) -> Node:
    """(beta (S - mean of S over the group) - A)^2 / 2, S = sum of d, A = R less the group's mean reward.

    The gradient goes through the mean as well: what it pulls to is the one policy with these rewards.

    GVPO (arXiv 2504.19599). Notes: verl-recipe gvpo_core_algos.py by a third-party formula page; beta's default is
    reconstructed. Aggregation: mean over sequences.
    """
    total = seq_sum(t.log_ratio)
    return 0.5 * (beta * (total - group_mean(total)) - seq_mean(t.advantage)) ** 2


@define(aggregation="seq-mean-token-mean", check=check)
def flowrl(t: Terms, beta: float = 15.0, weight_low: float = 0.0, weight_high: float = 10.0) -> Node:
    """w (log Z + mean of logprob - beta R - mean of ref_logprob)^2, w = clip(exp(sum of d), weight_low, weight_high).

    R = A's mean; w is a constant. t.extra("log_z") [B]: log Z of the sequence's prompt, from a head on the model's
    states that is trained with it: a gradient flows to it. Reports: log_z; importance_weight, w.

    FlowRL (arXiv 2509.15207). Verified in code: verl's recipe/flowrl flowrl_actor.py and functions.py, whose variants
    bound w by 10, by [0.8, 1.28] or not at all; R are GRPO's advantages there. Aggregation: mean over sequences.
    """
    log_z = t.extra("log_z", per="sequence", differentiable=True)
    weight = clip(exp(seq_sum(t.log_ratio)), weight_low, weight_high)
    gap = log_z + seq_mean(t.logprob) - beta * seq_mean(t.advantage) - seq_mean(t.ref_logprob)
    t.report(log_z=log_z, importance_weight=weight)
    return stop_gradient(weight) * gap * gap


@define(aggregation="seq-mean-token-mean", check=check)
def kto(
    t: Terms,
    beta: float = 0.1,
    reference_point: Tensor | float = 0.0,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Node:
    """w_d (1 - sigmoid(beta (S - z))) for desirable responses, w_u (1 - sigmoid(beta (z - S))) for the others.

    S = sum of logprob - ref_logprob. Desirable: A > 0, for labels 1 and 0 (or -1) passed as `advantages`. z is
    reference_point, a number or 0-d tensor: in TRL the mean of S over mismatched prompts and responses, at least 0.

    KTO (arXiv 2402.01306). Verified in code: TRL kto_trainer.py. Aggregation: mean over sequences.
    """
    x = beta * (seq_sum(t.logprob - t.ref_logprob) - reference_point)
    return where(seq_mean(t.advantage) > 0, desirable_weight * sigmoid(-x), undesirable_weight * sigmoid(x))


# -------------------------------------------------------------------------------------------------------------- groups
@define(aggregation="group-mean", check=check)
def real(t: Terms, tau: float = 0.5, variant: str = "anchor") -> Node:
    """Rewards as labels: rows with A > 0 against the group's others, by their mean log-ratio s = mean of d.

    "anchor": log(1 + sum over positives of exp(-s / tau)) + log(1 + sum over negatives of exp(s / tau)), 0 for a group
    of one class (it still counts in the mean over groups). "bce": each row's softplus(-s / tau), or softplus(s / tau).
    `advantages`: rewards less their group's mean, or 0/1 rewards.

    REAL (arXiv 2602.05630). "anchor" verified in code: ms-swift grpo_trainer.py (loss_type "real"); "bce", the
    abstract's plain binary cross-entropy, reconstructed. Aggregation: group-mean.
    """
    s = seq_mean(t.log_ratio) / tau
    positive = seq_mean(t.advantage) > 0
    if variant == "bce":
        return softplus(where(positive, -s, s))
    positives = group_logsumexp(where(positive, -s, _NOTHING))
    negatives = group_logsumexp(where(positive, _NOTHING, s))
    both = (positives > _NOTHING) & (negatives > _NOTHING)
    return where(both, softplus(where(both, positives, 0.0)) + softplus(where(both, negatives, 0.0)), 0.0)


@define(aggregation="seq-mean-token-mean", check=check)
def pacs(
    t: Terms, beta: float = 1.0, method: str = "sum", center: str = "leave-one-out", balanced: bool = True
) -> Node:
    """Binary cross-entropy of the 0/1 rewards (passed as `advantages`) against a score that the policy itself makes.

    psi = beta sum of d, or with method "mean" beta mean of logprob; score = psi less the mean psi of the group's others
    ("leave-one-out"; 0 where there are none), or (psi - mean) / (std + 1e-6) ("std"), or psi ("none"). The gradient
    goes through the baseline as well. balanced: in a group with both labels each weighs n / (2 n_label).

    PACS (arXiv 2509.02522). Verified in code: ritzz-ai/PACS pacs_core_algos.py (which sums over padding too: its
    log-probs are 0 there). Aggregation: mean over sequences.
    """
    psi = beta * (seq_sum(t.log_ratio) if method == "sum" else seq_mean(t.logprob))
    label = seq_mean(t.advantage)
    score = _centered(t, psi, center)
    loss = softplus(score) - label * score
    if not balanced:
        return loss
    size, right = group_size(t), label > 0.5
    hits = group_sum(where(right, 1.0, 0.0))
    mixed = (hits > 0) & (hits < size)
    return where(mixed, size / (2.0 * where(right, hits, size - hits)), 1.0) * loss


def _centered(t: Terms, psi: Node, center: str) -> Node:
    if center == "none":
        return psi
    size = group_size(t)
    if center == "leave-one-out":
        return psi - (group_sum(psi) - psi) / maximum(size - 1.0, 1.0)
    deviation = psi - group_mean(psi)
    variance = group_sum(deviation * deviation) / maximum(size - 1.0, 1.0)
    spread = variance > 0
    std = where(spread, sqrt(where(spread, variance, 1.0)), 0.0)  # a square root has no derivative at 0
    return deviation / (std + 1e-6)


@define(aggregation="group-mean", check=check)
def jepo(t: Terms, sft_coef: float = 1.0) -> Node:
    """-sum_i A_i (log-prob of the reasoning) - sft_coef J, J = log mean_i p_i: a bound on the answer's likelihood.

    t.extra("answer") [B, T], not 0 = a token of the reference answer; p_i = exp(sum of its log-probs) after rollout i,
    A_i = stop_gradient(J - J over the other rollouts), 0 in a group of one. Rewards are not read: likelihood is the
    reward. Rollouts without an answer token are left out.

    JEPO (arXiv 2503.19618), the multi-sample form with the leave-one-out baseline. Read in a paper that restates it
    (2602.03979). Aggregation: group-mean.
    """
    answer = t.extra("answer") != 0
    answered = seq_sum(answer) > 0
    p = where(answered, seq_sum(where(answer, t.logprob, 0.0)), _NOTHING)  # log p_i
    size = group_sum(answered)
    total = group_logsumexp(p)
    # The likeliest rollout's others may be out of reach of its scale: they get one of their own.
    top = (group_cumsum(answered, by=p) <= 1.0) & answered
    others = where(top, group_logsumexp(where(top, _NOTHING, p)), group_logsumexp(p, others=True))
    several = answered & (size > 1)
    gain = (total - log(size)) - (others - log(size - 1.0))
    advantage = stop_gradient(where(several, gain, 0.0))
    reasoning = seq_sum(where(answer, 0.0, t.logprob))
    bound = where(size > 0, total - log(size), 0.0)
    return -group_sum(advantage * reasoning) - sft_coef * bound


@define(aggregation="group-mean", check=check)
def brain(t: Terms, gamma: float = 1.0) -> Node:
    """-sum_i alpha_i log b_i: the group's posterior given high reward, matched by the policy's own weights.

    b = softmax over the group of the sum of d, old_logprobs those of the proposal that wrote the rollouts; alpha =
    softmax(reward / gamma + sum of (prior - proposal)), rewards passed as `advantages`, ref_logprobs the prior
    (not passed: the proposal is the prior). With two rollouts and a one-hot alpha it is DPO.

    BRAIn (arXiv 2402.02479). Reconstructed from the abstract (self-normalised baseline, softmax over rewards) and its
    special case; no code or equation read. Aggregation: group-mean.
    """
    s = seq_sum(t.log_ratio)
    target = seq_mean(t.advantage) / gamma
    if t.has("ref_logprob"):
        target = target + seq_sum(t.ref_logprob - t.old_logprob)
    alpha = exp(target - group_logsumexp(target))
    return group_sum(alpha * (group_logsumexp(s) - s))


@define(aggregation="group-mean", check=check)
def gdro(t: Terms, beta: float = 0.1, tau: float = 0.05) -> Node:
    """sum_i [LSE of s over those at or below rank i - sum_j q_i(j) s_j]: a listwise loss over every suffix by reward.

    s = beta sum of (logprob - ref_logprob), q_i = softmax of reward / tau over the rollouts ranked i and below,
    rewards passed as `advantages`, equal ones in the order of their rows. tau -> 0 is Plackett-Luce, two rollouts DPO.
    Spreads of s and of reward / tau within a group of more than 700 leave float64's range.

    GDRO (arXiv 2601.02036), stated there for diffusion models with s from velocity errors (beta 6 or 12); from a
    third-party note, the log-ratio form is ours. Aggregation: group-mean.
    """
    s, reward = beta * seq_sum(t.logprob - t.ref_logprob), seq_mean(t.advantage)
    ranked = reward / tau
    weight = exp(ranked - stop_gradient(group_logsumexp(ranked)))
    expected = group_cumsum(weight * s, by=reward, reverse=True) / group_cumsum(weight, by=reward, reverse=True)
    return group_sum(group_logsumexp(s, by=reward, reverse=True) - expected)
