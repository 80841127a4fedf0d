"""Distillation over the vocabulary, as losses: how far the student's distribution is from a teacher's at each token.

p is the student's distribution, q the teacher's, m a mixture of both. Recipes take the student's logits [B, T, V] or
packed [N, V], the teacher's beside them as constants, and return the loss, a 0-d tensor whose gradient flows to the
logits: the mean over the tokens that count, or their sum over `normalizer` (that of gradient accumulation, say). From
hidden states, without the logits: `fastreward.linear_divergence`.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from fastreward import divergences
from fastreward._arguments import check
from fastreward._arguments.numbers import Number, number
from fastreward.divergence import token_divergence
from fastreward.divergences import Loss
from fastreward.logprobs import token_logprobs
from fastreward.recipes._catalogue.registry import recipe

__all__ = ["gkd", "on_policy_distillation", "roll_kd", "sdpo_logits", "topk_distillation"]

#: ROLL's kd_objective.
_OBJECTIVES: Final = ("forward-kl", "reverse-kl", "adaptive-kl", "skewed-forward-kl", "skewed-reverse-kl", "jsd")


@recipe(
    "GKD (generalised knowledge distillation)",
    "arXiv 2306.13649",
    code="TRL experimental/gkd/gkd_trainer.py `generalized_jsd_loss`",
)
def gkd(
    logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None = None,
    *,
    beta: float = 0.5,
    temperature: Number = 1.0,
    normalizer: Number | None = None,
) -> Tensor:
    """beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p; beta 0: KL(q || p), 1: KL(p || q).

    On the student's own samples, or on given ones. TRL's default beta is 0.5; its beta 0 and 1 are these KLs too, not
    the limits of the formula, which are 0.

    Args:
        logits: the student's, [B, T, V] or [N, V].
        teacher_logits: its shape.
        mask: [B, T] or [N]; nonzero = a token of the response.
        beta: the teacher's weight in the mixture.
        temperature: of both.
        normalizer: what the sum is divided by; None: the number of tokens that count.
    """
    return on_policy_distillation(
        logits, teacher_logits, mask, divergence=_jsd("beta", beta), temperature=temperature, normalizer=normalizer
    )


@recipe(
    "On-policy distillation (with any divergence)",
    "arXiv 2306.08543",
    code="TRL trainer/distillation_trainer.py `_chunked_divergence_loss`",
)
def on_policy_distillation(
    logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None = None,
    *,
    divergence: str | Loss = "reverse-kl",
    temperature: Number = 1.0,
    teacher_temperature: Number | None = None,
    weights: Tensor | None = None,
    normalizer: Number | None = None,
) -> Tensor:
    """mean of D(p, q), D any of fastreward.divergences or one of your own: by default KL(p || q), mode-seeking.

    Args:
        logits: the student's, [B, T, V] or [N, V].
        teacher_logits: its shape.
        mask: [B, T] or [N]; nonzero = a token of the response.
        divergence: as in `token_divergence`.
        temperature: of both.
        teacher_temperature: of the teacher, where it has its own.
        weights: [B, T] or [N], factors of the tokens, such as a clipped importance weight.
        normalizer: what the sum is divided by; None: the number of tokens that count.
    """
    found = token_divergence(
        logits,
        _constant(teacher_logits),
        divergence=divergence,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        mask=mask,
    )
    return _mean(found.divergence, mask, weights, normalizer)


@recipe(
    "Top-k distillation (a teacher that sends its k likeliest tokens)",
    "TRL, github.com/huggingface/trl",
    code="TRL server_distillation_trainer.py `_compute_server_forward_kl_loss`",
)
def topk_distillation(
    logits: Tensor,
    token_ids: Tensor,
    teacher_logprobs: Tensor,
    mask: Tensor | None = None,
    *,
    divergence: str | Loss = "forward-kl",
    temperature: Number = 1.0,
    tail: bool = True,
    weights: Tensor | None = None,
    normalizer: Number | None = None,
) -> Tensor:
    """mean of D(p', q') over k ids and one event for the rest of either side; without tail over the ids, renormalised.

    A plain top-k KL without the rest is least where the student gives the ids all of its mass; with it both sum to 1.

    Args:
        logits: the student's, [B, T, V] or [N, V].
        token_ids: the teacher's likeliest, [B, T, k] or [N, k]; negative: none.
        teacher_logprobs: of these ids, at the teacher's temperature.
        mask: [B, T] or [N]; nonzero = a token of the response.
        divergence: as in `token_divergence`.
        temperature: of the student.
        tail: whether the rest is an event.
        weights: [B, T] or [N], factors of the tokens.
        normalizer: what the sum is divided by; None: the number of tokens that count.
    """
    found = token_divergence(
        logits,
        divergence=divergence,
        temperature=temperature,
        mask=mask,
        token_ids=token_ids,
        teacher_logprobs=check.constant("teacher_logprobs", check.tensor("teacher_logprobs", teacher_logprobs)),
        tail=tail,
    )
    return _mean(found.divergence, mask, weights, normalizer)


@recipe(
    "SDPO (self-distillation) from logits, over the student's k likeliest tokens",
    "arXiv 2601.20802",
    code="TRL experimental/sdft/loss_utils.py `compute_topk_self_distillation_loss`",
    settings={"top_k": 5},
)
def sdpo_logits(
    logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None = None,
    *,
    top_k: int = 100,
    alpha: float = 0.5,
    tail: bool = True,
    temperature: Number = 1.0,
    weights: Tensor | None = None,
    normalizer: Number | None = None,
) -> Tensor:
    """(1 - alpha) KL(p' || m) + alpha KL(q' || m), m = (1 - alpha) p' + alpha q', over the k likeliest ids of p.

    `recipes.sdpo_topk` is the same from log-probs of these ids that are at hand.

    Args:
        logits: the student's, [B, T, V] or [N, V].
        teacher_logits: its shape: of the policy, or an average of it, that was told the answer.
        mask: [B, T] or [N]; nonzero = a token of the response.
        top_k: how many ids.
        alpha: the teacher's weight; 0: KL(q' || p'), 1: KL(p' || q').
        tail: whether what the ids leave is one event more, else both sides are renormalised.
        temperature: of both.
        weights: [B, T] or [N], such as the clipped importance weight of the sampled token.
        normalizer: what the sum is divided by; None: the number of tokens that count.
    """
    if not 1 <= check.whole("top_k", top_k, "ids of a token") <= logits.shape[-1]:
        raise ValueError(f"top_k: expected between 1 and {logits.shape[-1]} ids, got {top_k}")
    found = token_divergence(
        logits,
        _constant(teacher_logits),
        divergence=_jsd("alpha", alpha),
        temperature=temperature,
        mask=mask,
        token_ids=logits.detach().topk(top_k).indices,
        tail=tail,
    )
    return _mean(found.divergence, mask, weights, normalizer)


@recipe(
    "ROLL's knowledge distillation",
    "ROLL, github.com/alibaba/ROLL",
    code="ROLL roll/pipeline/distill/various_divergence.py, distill_worker.py `loss_func`",
)
def roll_kd(
    logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    *,
    objective: str = "forward-kl",
    weight: Number = 0.5,
    temperature: Number = 1.0,
    teacher_temperature: Number = 1.0,
    alpha: float = 0.5,
    skew: float = 0.1,
    token_ids: Tensor | None = None,
    normalizer: Number | None = None,
) -> Tensor:
    """weight D(p, q) + (1 - weight) NLL of the labels, D by its kd_objective.

    ROLL leaves out of D tokens that either side forbids (-inf); here such a token of the teacher's costs what
    `token_divergence` says.

    Args:
        logits: the student's, [B, T, V] or [N, V].
        teacher_logits: its shape.
        labels: [B, T] or [N], the next tokens (anything where masked out).
        mask: its shape; nonzero = a token that counts.
        objective: "forward-kl", "reverse-kl", "adaptive-kl", "skewed-forward-kl", "skewed-reverse-kl", "jsd".
        weight: of the distillation.
        temperature: of the student in D; the NLL has none.
        teacher_temperature: of the teacher.
        alpha: of adaptive-kl, what the teacher's tail has of its mass.
        skew: of the skewed ones.
        token_ids: the teacher's likeliest ids, over which both sides are renormalised (its logits_topk); None: all.
        normalizer: what the sums are divided by; None: the number of tokens that count.
    """
    check.choice("objective", objective, _OBJECTIVES)
    chosen: dict[str, Loss] = {
        "adaptive-kl": divergences.adaptive_kl(alpha),
        "skewed-forward-kl": divergences.skewed_forward_kl(skew),
        "skewed-reverse-kl": divergences.skewed_reverse_kl(skew),
    }
    found = token_divergence(
        logits,
        _constant(teacher_logits),
        divergence=chosen.get(objective, objective),
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        mask=mask,
        token_ids=token_ids,
        tail=False,
    )
    share = number("weight", weight, logits, check.finite)
    likelihood = token_logprobs(logits, labels, mask=mask).logprobs
    return _mean(share * found.divergence - (1.0 - share) * likelihood, mask, None, normalizer)


def _jsd(name: str, share: float) -> str | Loss:
    """The generalised Jensen-Shannon divergence, at its ends the KLs."""
    if not 0 <= check.finite(name, share) <= 1:
        raise ValueError(f"{name}: expected a number in [0, 1], got {share}")
    return "forward-kl" if share == 0 else "reverse-kl" if share == 1 else divergences.jsd(share)


def _constant(teacher_logits: Tensor) -> Tensor:
    return check.constant("teacher_logits", check.tensor("teacher_logits", teacher_logits))


def _mean(x: Tensor, mask: Tensor | None, weights: Tensor | None, normalizer: Number | None) -> Tensor:
    """Of tokens, 0 where masked out."""
    if weights is not None:
        check.shape("weights", check.tensor("weights", weights), x.shape, "one per token")
        weights = check.constant("weights", weights)
        x = x * (weights if mask is None else torch.where(mask != 0, weights, 0.0))
    if normalizer is not None:
        return x.sum() / number("normalizer", normalizer, x, check.positive)
    return x.sum() / (x.new_ones(x.shape) if mask is None else mask != 0).sum().clamp(min=1)
