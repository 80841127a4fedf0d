"""Divergence of a student's distribution from a teacher's, token by token, from the logits of both."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from fastreward import divergences
from fastreward._arguments import check
from fastreward._arguments.arrays import accepts_arrays
from fastreward._arguments.logits import (
    check_logits,
    check_own_memory,
    check_rows,
    check_token_ids,
    row_mask,
    temperatures,
)
from fastreward._arguments.numbers import Number
from fastreward._loss_call.divergence import STATISTICS, DivergenceStats
from fastreward._loss_call.divergence import token_divergence as op
from fastreward._runtime.dispatch import select
from fastreward._runtime.layout import VALUES
from fastreward.divergences import Loss

#: By their names here, with their defaults (a divergence can't be made while torch.compile traces).
_NAMED: Final = {
    "forward-kl": divergences.forward_kl(),
    "reverse-kl": divergences.reverse_kl(),
    "jsd": divergences.jsd(),
    "skewed-forward-kl": divergences.skewed_forward_kl(),
    "skewed-reverse-kl": divergences.skewed_reverse_kl(),
    "total-variation": divergences.total_variation(),
    "alpha": divergences.alpha(),
    "hellinger": divergences.hellinger(),
}
NAMES: Final = tuple(_NAMED)


@accepts_arrays
def token_divergence(
    logits: Tensor,
    teacher_logits: Tensor,
    *,
    divergence: str | Loss = "reverse-kl",
    temperature: Number = 1.0,
    teacher_temperature: Number | None = None,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    outputs: tuple[str, ...] = (),
    inplace_backward: bool = False,
) -> DivergenceStats:
    """Divergence between softmax(logits / temperature) and softmax(teacher_logits / teacher_temperature) per token.

    Both are read once from memory, and once more for the gradient, which is exact and written once. No tensor of the
    size of the logits is made but that gradient, and with inplace_backward not even that.

    Args:
        logits: the student's, [..., V] float32, bfloat16 or float16; any leading strides, unit stride along V.
        teacher_logits: the teacher's, same shape, of any of these dtypes. It gets a gradient too if it requires one.
        divergence: "forward-kl", "reverse-kl", "jsd", "skewed-forward-kl", "skewed-reverse-kl", "total-variation",
            "alpha", "hellinger", each with its defaults; or one of `fastreward.divergences` with others, or your own
            (`fastreward.divergences.define`).
        temperature: a positive number or 0-d tensor, or one per token [...] (anything where masked out).
        teacher_temperature: the same; None: that of the student.
        mask: [...] bool, integer or float, nonzero = compute; other rows are not read, all theirs is 0.
        labels: [...] integers in [0, V) (anything where masked out), for the output logprobs.
        outputs: what to give besides, of entropy, teacher_entropy (nats), logprobs (the student's, of the labels),
            top1_agreement (1 where both have the same largest logit, else 0; no gradient).
        inplace_backward: the backward overwrites `logits` with its gradient. Only where nothing else needs the logits
            afterwards.

    Returns:
        DivergenceStats(divergence, entropy, teacher_entropy, logprobs, top1_agreement), float32 [...], None where not
        asked for. Gradients flow through divergence, entropy and logprobs to logits, through divergence alone to
        teacher_logits; no second derivatives.
        A log-prob below -10,000 counts as -10,000: a token that the teacher forbids (-inf) costs 10,000 nats times the
        student's probability in reverse_kl, and its gradient says so; where neither allows it, nothing. A row of only
        -inf, or with NaN or +inf, on either side gives NaN.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device, label or name, before anything runs.
    """
    check_rows(logits)
    places = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device) - 1 if labels is None else labels
    check_logits(logits, places)
    _check_teacher(teacher_logits, logits)
    _check_outputs(outputs, labels)
    chosen = _chosen(divergence)
    inplace_backward = check.flag("inplace_backward", inplace_backward)
    if inplace_backward:
        check_own_memory(logits)
        if (
            logits.is_contiguous() and teacher_logits.is_contiguous()
        ):  # as of self-distillation: it would be overwritten
            check.own_memory("teacher_logits", teacher_logits, [logits])
    rows = row_mask(mask, places)
    scalar, per_token = temperatures(temperature, places, mask)
    if teacher_temperature is None:
        teacher_scalar, teacher_per_token = scalar, per_token
    else:
        teacher_scalar, teacher_per_token = temperatures(teacher_temperature, places, mask, "teacher_temperature")
    if labels is not None and check.values_checked(logits, labels):
        check_token_ids("labels", labels, logits.shape[-1], mask)
    found, student, teacher, agreement = op(
        logits,
        teacher_logits,
        places.reshape(-1).long(),
        per_token,
        scalar,
        teacher_per_token,
        teacher_scalar,
        rows,
        [chosen.scalars[name] for name in sorted(chosen.scalars)],
        chosen.divergence_plan(),
        2 if teacher_logits.requires_grad else 1 if logits.requires_grad else 0,
        bool(outputs),
        inplace_backward,
        select("divergence", logits),
    )
    lead = tuple(places.shape)
    given = {
        "entropy": student[VALUES.index("entropy")],
        "teacher_entropy": teacher[VALUES.index("entropy")].detach(),
        "logprobs": student[VALUES.index("logprobs")],
        "top1_agreement": agreement.detach(),
    }
    return DivergenceStats(found[0].reshape(lead), **{name: given[name].reshape(lead) for name in outputs})


def _check_teacher(teacher_logits: Tensor, logits: Tensor) -> None:
    check_rows(teacher_logits, "teacher_logits")
    check.shape("teacher_logits", teacher_logits, logits.shape, "that of logits")
    check.same_device("teacher_logits", teacher_logits, "logits", logits)


def _check_outputs(outputs: tuple[str, ...], labels: Tensor | None) -> None:
    if outputs:
        check.names("outputs", outputs, STATISTICS)
    if ("logprobs" in outputs) != (labels is not None):
        raise ValueError("labels: needed for the output 'logprobs', and only for it")


def _chosen(divergence: str | Loss) -> Loss:
    if isinstance(divergence, str):
        check.choice("divergence", divergence, NAMES)
        return _NAMED[divergence]
    if not isinstance(divergence, Loss):
        raise TypeError(
            "divergence: expected a name or what fastreward.divergences gives, as in divergences.jsd(0.1); "
            f"got {type(divergence).__name__}"
        )
    if divergence.tensors:
        raise ValueError(
            f"divergence: expected numbers as parameters, got a tensor for {', '.join(divergence.tensors)}"
        )
    return divergence
