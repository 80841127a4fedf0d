"""Methods whose loss is one value per sequence, or per group of sequences.

d = logprobs - old_logprobs, lp = logprobs, A = advantages, R = rewards, L = a sequence's valid tokens. Every recipe
takes the arguments of `fastreward.policy_loss`, passes its options on and returns what it returns; parameters have
their published values. Methods over groups need group_ids or group_size. A response whose reward is NaN was not scored,
and is left out.
"""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from fastreward import losses
from fastreward._arguments import check
from fastreward._arguments.numbers import Number
from fastreward._arguments.options import Aggregation
from fastreward._loss_call.results import PolicyLoss
from fastreward.group import group_advantages
from fastreward.group_statistics import group_statistics
from fastreward.losses import Loss
from fastreward.policy_loss import policy_loss
from fastreward.recipes._catalogue.registry import recipe
from fastreward.recipes._shared.factory import policy_recipe, reading_recipe, reward_recipe
from fastreward.recipes._shared.options import LossOptions, PolicyOptions, add_extra, scored

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
    "luspo",
    "pacs",
    "real",
    "verifree",
]

_TRL = "TRL grpo_trainer.py `_compute_loss`"


# ----------------------------------------------------------------------------------------------------------- sequences
@policy_recipe(
    "GSPO (group sequence policy optimization)",
    "arXiv 2507.18071",
    code=f'{_TRL} (importance_sampling_level "sequence"), OpenRLHF models/loss.py; widths from a note on the paper',
)
def gspo(
    *,
    clip_low: float = 0.0003,
    clip_high: float = 0.0004,
    log_ratio_max: float | None = 10.0,
    **options: Unpack[LossOptions],
) -> Loss:
    """max(-A s, -A clip(s, 1 - clip_low, 1 + clip_high)), s = exp(mean of d over the sequence).

    log s is at most log_ratio_max (verl; None: TRL, OpenRLHF). Advantages: GRPO's, `group_advantages(rewards, ...)`.
    """
    return losses.gspo(clip_low, clip_high, log_ratio_max=log_ratio_max)


@policy_recipe(
    "GSPO-token",
    "arXiv 2507.18071",
    code='verl core_algos.py `compute_policy_loss_gspo`, ms-swift (importance_sampling_level "sequence_token")',
)
def gspo_token(
    *,
    clip_low: float = 0.0003,
    clip_high: float = 0.0004,
    log_ratio_max: float | None = 10.0,
    **options: Unpack[LossOptions],
) -> Loss:
    """GSPO's loss per token, its ratio exp(lp - sg(lp) + sg(mean of d)).

    For advantages that differ within a sequence; with one per sequence, value and gradient are GSPO's.
    """
    return losses.gspo_token(clip_low, clip_high, log_ratio_max=log_ratio_max)


@policy_recipe(
    "LUSPO (length-unbiased sequence policy optimization)",
    "arXiv 2602.05261",
    code=f'{_TRL} (loss_type "luspo")',
    aggregation="seq-mean-token-sum",
)
def luspo(*, clip_low: float = 0.0003, clip_high: float = 0.0004, **options: Unpack[LossOptions]) -> Loss:
    """GSPO's loss of a sequence times its length L, mean over sequences.

    The clip widths are GSPO's: TRL gives none for LUSPO. Advantages: GRPO's, `group_advantages(rewards, ...)`.
    """
    return losses.gspo(clip_low, clip_high, log_ratio_max=None)


@policy_recipe(
    "GMPO (geometric-mean policy optimization)",
    "arXiv 2507.20673",
    code="verl core_algos.py `compute_policy_loss_geo_mean`, TRL experimental/gmpo",
)
def gmpo(*, clip_low: float = 0.4, clip_high: float = 0.4, **options: Unpack[LossOptions]) -> Loss:
    """-A exp(mean of c), c = min(d, u) where A > 0, max(d, u) where A < 0, u = clip(d, -clip_low, clip_high).

    weights= (rollout importance weights) multiply by their geometric mean over the sequence, as in verl. Advantages:
    GRPO's, `group_advantages(rewards, ...)`.
    """
    return losses.gmpo(clip_low, clip_high)


@recipe(
    "LaSeR's last-token term (self-rewarding)",
    "arXiv 2510.14943",
    code="RUCBM/LaSeR dp_actor.py, ray_trainer.py",
    build=losses.laser,
)
def laser(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    rewards: Tensor,
    score_token: Tensor,
    mask: Tensor | None = None,
    *,
    beta: float = 0.1,
    temperature: float = 1.0,
    constant: float | None = -23.0,
    aggregation: Aggregation = "seq-mean-token-mean",
    **options: Unpack[PolicyOptions],
) -> PolicyLoss:
    """(beta (temperature lp - constant) - R)^2 at the score token, 0 for sequences without one.

    score_token, in the shape of logprobs: nonzero at the fixed token behind the end of the response, which has to count
    in mask. constant None: temperature ref_lp in its place (pass ref_logprobs). temperature: of sampling. rewards [B]:
    1 right, 0 wrong. The method adds 0.1 times this to a GRPO loss, right and wrong responses balanced by weights= [B];
    old_logprobs go into the metrics alone.
    """
    rewards = scored(options, rewards, logprobs)
    add_extra(options, score_token=score_token, reward=rewards)
    loss = losses.laser(beta, temperature, constant)
    return policy_loss(logprobs, old_logprobs, None, mask, loss=loss, aggregation=aggregation, **options)


# --------------------------------------------------------------------------------- regressions on rewards, and labels
@policy_recipe(
    "GVPO (group variance policy optimization)",
    "arXiv 2504.19599",
    note="verl-recipe gvpo_core_algos.py by a third-party formula page; beta's default is reconstructed",
    advantages='scale="none"',
    passes=("group_ids",),
)
def gvpo(*, beta: float = 0.1, **options: Unpack[LossOptions]) -> Loss:
    """(beta (S - group mean of S) - A)^2 / 2, S = sum of d over the sequence.

    Advantages: reward - group mean, `group_advantages(rewards, ..., scale="none")`.
    """
    return losses.gvpo(beta)


@recipe(
    "A*PO (optimal advantage regression)",
    "arXiv 2505.20686",
    code="TRL experimental/a2po/a2po_trainer.py",
    build=losses.a2po,
    passes=("ref_logprobs", "group_ids"),
)
def a2po(
    logprobs: Tensor,
    rewards: Tensor,
    mask: Tensor | None = None,
    *,
    optimal_values: Tensor | None = None,
    beta1: float = 0.5,
    beta2: float = 1e-3,
    aggregation: Aggregation = "seq-mean-token-mean",
    **options: Unpack[PolicyOptions],
) -> PolicyLoss:
    """(beta2 S - (R - V*))^2, S = sum of lp - ref_lp, V* = beta1 log mean of exp(R / beta1) over the prompt's rollouts.

    optimal_values [B]: V* of each response's prompt, from rollouts of the reference policy made before training, as the
    method has it. None: from the rewards at hand, by group_ids or group_size. Needs ref_logprobs.
    """
    rewards = scored(options, rewards, logprobs)
    if optimal_values is None:
        ids, size = options.get("group_ids"), options.get("group_size")
        found = group_statistics(rewards / beta1, ids, ("logsumexp", "count"), group_size=size)
        optimal_values = beta1 * (found["logsumexp"] - found["count"].log())
    loss, goal = losses.a2po(beta2), rewards - optimal_values
    return policy_loss(logprobs, None, goal, mask, loss=loss, aggregation=aggregation, **options)


@reading_recipe(
    "FlowRL (flow balance with a learned partition function)",
    "arXiv 2509.15207",
    code="verl recipe/flowrl flowrl_actor.py, functions.py (weights at most 10, in [0.8, 1.28], or not bounded)",
    passes=("ref_logprobs",),
)
def flowrl(
    log_z: Tensor,
    mask: Tensor | None = None,
    *,
    beta: float = 15.0,
    weight_low: float = 0.0,
    weight_high: float = 10.0,
    **options: Unpack[LossOptions],
) -> Loss:
    """w (log Z + mean of lp - beta mean of A - mean of ref_lp)^2, w = sg(clip(exp(sum of d), weight_low, weight_high)).

    log_z [B]: log Z of each response's prompt, by a head on the policy's states of the prompt; it gets a gradient, as
    logprobs do. Needs ref_logprobs. Advantages: GRPO's, `group_advantages(rewards, ...)`.
    """
    return losses.flowrl(beta, weight_low, weight_high)


@recipe(
    "KTO (Kahneman-Tversky optimization)",
    "arXiv 2402.01306",
    code="TRL kto_trainer.py",
    build=losses.kto,
    passes=("ref_logprobs",),
)
def kto(
    logprobs: Tensor,
    desirable: Tensor,
    mask: Tensor | None = None,
    *,
    beta: float = 0.1,
    reference_point: Number = 0.0,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    aggregation: Aggregation = "seq-mean-token-mean",
    **options: Unpack[PolicyOptions],
) -> PolicyLoss:
    """w (1 - sigmoid(beta (S - z))) where desirable, else w (1 - sigmoid(beta (z - S))), S = sum of lp - ref_lp.

    desirable [B]: above 0 for a response that is wanted. reference_point: z, a constant of the batch, in the method the
    mean of S over prompts with another prompt's response, at least 0. Needs ref_logprobs.
    """
    loss = losses.kto(beta, reference_point, desirable_weight, undesirable_weight)
    labels = check.reals("desirable", desirable)
    return policy_loss(logprobs, None, labels, mask, loss=loss, aggregation=aggregation, **options)


# ----------------------------------------------------------------------------------------- likelihood of a given answer
@recipe(
    "VeriFree (reinforcing general reasoners without verifiers)",
    "arXiv 2505.21493",
    code="sail-sg/VeriFree verifree.py",
    build=losses.verifree,
    passes=("group_ids",),
)
def verifree(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    rewards: Tensor,
    answer: Tensor,
    mask: Tensor | None = None,
    *,
    aggregation: Aggregation = "seq-mean-token-sum",
    **options: Unpack[PolicyOptions],
) -> PolicyLoss:
    """-A lp on the reasoning's tokens, -R lp on the reference answer's.

    answer, in the shape of logprobs: nonzero on the reference answer's tokens, spliced in behind the reasoning. rewards
    [B]: R = exp(sum of old_logprobs over the answer), 0 where the response has no place for one. A = R - mean R of the
    group's others, computed here by `group_advantages(..., center="leave-one-out", scale="none")`: pass group_ids or
    group_size. old_logprobs go into the metrics alone.
    """
    advantages = group_advantages(
        rewards, options.get("group_ids"), group_size=options.get("group_size"), center="leave-one-out", scale="none"
    )
    add_extra(options, answer=answer, reward=scored(options, rewards, logprobs))
    loss = losses.verifree()
    return policy_loss(logprobs, old_logprobs, advantages, mask, loss=loss, aggregation=aggregation, **options)


@recipe(
    "JEPO (Jensen's evidence lower bound policy optimization)",
    "arXiv 2503.19618",
    paper="arXiv 2602.03979, which restates it (equations 2 to 11)",
    build=losses.jepo,
    passes=("group_ids",),
)
def jepo(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    answer: Tensor,
    mask: Tensor | None = None,
    *,
    sft_coef: float = 1.0,
    aggregation: Aggregation = "group-mean",
    **options: Unpack[PolicyOptions],
) -> PolicyLoss:
    """-sum_i A_i lp(reasoning_i) - sft_coef J, J = log mean_i p_i, A_i = sg(J - J without i), per group.

    p_i = exp(sum of lp over the reference answer's tokens after reasoning i). answer, in the shape of logprobs: nonzero
    on these tokens. There are no rewards; old_logprobs go into the metrics alone.
    """
    add_extra(options, answer=answer)
    loss = losses.jepo(sft_coef)
    return policy_loss(logprobs, old_logprobs, None, mask, loss=loss, aggregation=aggregation, **options)


# -------------------------------------------------------------------------------------------------- rewards as labels
@reward_recipe(
    "REAL (rewards as labels)",
    "arXiv 2602.05630",
    code='ms-swift grpo_trainer.py (loss_type "real"); the variant "bce" is reconstructed from the abstract',
    passes=("group_ids",),
)
def real(*, tau: float = 0.5, variant: str = "anchor", **options: Unpack[LossOptions]) -> Loss:
    """log(1 + sum_right exp(-s / tau)) + log(1 + sum_wrong exp(s / tau)) per group, s = mean of d.

    The mean is over the sequence. rewards [B]: positive for right answers, else 0 or below (so group-centred ones do as
    well). A group of one class has loss 0 and counts in the mean over groups. variant "bce": each sequence's own
    softplus(-s / tau) or softplus(s / tau).
    """
    return losses.real(tau, variant)


@reward_recipe(
    "PACS (implicit actor-critic coupling)",
    "arXiv 2509.02522",
    code="ritzz-ai/PACS pacs_core_algos.py",
    passes=("group_ids",),
)
def pacs(
    *,
    beta: float = 1.0,
    method: str = "sum",
    center: str = "leave-one-out",
    balanced: bool = True,
    **options: Unpack[LossOptions],
) -> Loss:
    """Cross-entropy of R in {0, 1} with the logit psi - mean psi of the group's others, psi = beta sum of d.

    The gradient goes through that baseline too. method "mean": psi = beta mean of lp; center "std": (psi - mean) / std,
    "none": psi. balanced: in a group with both labels each weighs n / (2 n_label). rewards [B]: the labels.
    """
    return losses.pacs(beta, method, center, balanced)


@reward_recipe(
    "BRAIn (Bayesian reward-conditioned amortized inference)",
    "arXiv 2402.02479",
    reconstructed="the abstract and its special case, DPO-sft; no code or equation read",
    passes=("group_ids",),
)
def brain(*, gamma: float = 1.0, **options: Unpack[LossOptions]) -> Loss:
    """-sum_i alpha_i log softmax_i(sum of d), alpha = sg(softmax_i(R_i / gamma + sum of ref_lp - old_lp)), per group.

    old_logprobs: of the proposal that wrote the responses. ref_logprobs: of the prior; not passed, the proposal is the
    prior. rewards [B].
    """
    return losses.brain(gamma)


@reward_recipe(
    "GDRO (group-level direct reward optimization)",
    "arXiv 2601.02036",
    note="a note on the paper, which is on diffusion models; its form for log-ratios is ours",
    passes=("ref_logprobs", "group_ids"),
)
def gdro(*, beta: float = 0.1, tau: float = 0.05, **options: Unpack[LossOptions]) -> Loss:
    """sum_i [LSE_{j >= i} s_j - sum_{j >= i} q_i(j) s_j] per group, s = beta sum of lp - ref_lp.

    i, j: ranks by reward, the best first; q_i = softmax of R / tau over the ranks from i on. Needs ref_logprobs. tau ->
    0 is Plackett-Luce, a group of two DPO. rewards [B]; old_logprobs go into the metrics alone.
    """
    return losses.gdro(beta, tau)
