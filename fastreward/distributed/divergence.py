"""Divergences where each rank holds a contiguous slice of the vocabulary of both sides.

Two collectives: the softmax statistics of either side, 3 to 5 floats each, then the sums that the slices add to, one to
three. Never a logit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.logits import check_token_ids
from fastreward._arguments.transforms import refuse_double_backward
from fastreward._loss_call.divergence import (
    slice_sums,
    token_divergence_backward,
    token_divergence_backward_,
    upstream_gradients,
)
from fastreward._runtime.dispatch import implementation
from fastreward._runtime.layout import INDICES, flags_of
from fastreward._runtime.lm_head import inverse_temperature
from fastreward._runtime.logprobs import slice_state
from fastreward.distributed.crossing import Slices
from fastreward.distributed.ranks import Ranks

_ARGMAX = INDICES.index("argmax")


class DivergenceShard(NamedTuple):
    """One rank's part of a call; labels are global. In the order of the ops' arguments."""

    labels: Tensor  # [N] i64, negative = none
    temperature: Tensor | None  # [N] f64
    temperature_scalar: float  # where that is None
    teacher_temperature: Tensor | None
    teacher_scalar: float
    mask: Tensor | None  # [N] bool
    parameters: list[float]
    programs: str
    sums: int  # how many sides get a gradient
    statistics: bool
    inplace_backward: bool
    backend: str


def sharded_token_divergence(
    logits: Tensor,  # [..., V of this rank]
    teacher_logits: Tensor,  # the same
    shard: DivergenceShard,
    ranks: Ranks,
    *,
    labelled: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the op of one process returns, of the whole vocabulary: the bits are the same on every rank.

    Differentiable for this rank's logits; the upstream gradients are taken to be the same on every rank.
    """
    mask = shard.mask
    counted = shard.labels if mask is None else shard.labels.masked_fill(~mask, 0)
    slices = Slices(ranks, logits.shape[-1], counted, _same(shard))
    if labelled and check.values_checked(logits, shard.labels):
        lead = logits.shape[:-1]
        check_token_ids("labels", shard.labels.view(lead), int(slices.vocab), None if mask is None else mask.view(lead))
    result: tuple[Tensor, Tensor, Tensor, Tensor]
    result = _Sharded.apply(logits, teacher_logits, shard, slices)  # type: ignore[no-untyped-call]
    return result


def _same(shard: DivergenceShard) -> dict[str, object]:
    """What decides which collectives there are, and what else would be wrong without a word."""
    own, other = (shard.temperature, shard.temperature_scalar), (shard.teacher_temperature, shard.teacher_scalar)
    temperature, of_teacher = (scalar if each is None else each for each, scalar in (own, other))
    return {
        "mask": shard.mask,
        "outputs": shard.statistics,
        "divergence": f"{shard.programs} {shard.parameters}",
        "temperature": temperature,
        "teacher_temperature": of_teacher,
        "logits (how many sides want a gradient)": shard.sums,
    }


class _Sharded(torch.autograd.Function):
    """A collective is no part of a custom op's schema, so this is an autograd function on the ops of one slice."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, teacher_logits: Tensor, shard: DivergenceShard, slices: Slices
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        own = shard._replace(labels=slices.local(shard.labels))
        student, places = _statistics(logits, own, own.temperature, own.temperature_scalar, slices)
        teacher, other_places = _statistics(teacher_logits, own, own.teacher_temperature, own.teacher_scalar, slices)
        agreement = (places[_ARGMAX] == other_places[_ARGMAX]).float()
        added = slice_sums(logits, teacher_logits, *own[:9], student, teacher, own.backend)
        outputs = slices.ranks.gather(added).sum(0).float()
        if own.mask is not None:
            agreement = agreement * own.mask
        # Copies, small beside the logits: the caller may edit the outputs in place before the backward.
        per_token = (own.labels, own.temperature, own.teacher_temperature, own.mask)
        ctx.save_for_backward(logits, teacher_logits, *per_token, outputs.clone(), student.clone(), teacher.clone())
        ctx.shard = own
        ctx.mark_non_differentiable(teacher, agreement)
        return outputs, student, teacher, agreement

    @staticmethod
    def backward(ctx: Any, grad_outputs: Tensor, grad_student: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True; torch's own once_differentiable sees no gradient to refuse
            refuse_double_backward()
        logits, teacher_logits, labels, temperature, of_teacher, mask, outputs, student, teacher = ctx.saved_tensors
        per_token = {"labels": labels, "temperature": temperature, "teacher_temperature": of_teacher, "mask": mask}
        own: DivergenceShard = ctx.shard._replace(**per_token)
        known = (outputs, student, teacher, upstream_gradients(outputs, grad_outputs, grad_student), own.programs)
        given = (logits, teacher_logits, *own[:7], *known, own.statistics)
        grads: list[Tensor | None] = [None, None]
        if not logits.shape[-1]:
            return torch.zeros_like(logits), torch.zeros_like(teacher_logits), None, None
        if ctx.needs_input_grad[1]:
            grads[1] = token_divergence_backward(*given, True, own.backend)
        if ctx.needs_input_grad[0] and own.inplace_backward:
            token_divergence_backward_(*given, own.backend)
            grads[0] = logits.detach()
        elif ctx.needs_input_grad[0]:
            grads[0] = token_divergence_backward(*given, False, own.backend)
        return (*grads, None, None)


def _statistics(
    logits: Tensor, own: DivergenceShard, temperature: Tensor | None, scalar: float, slices: Slices
) -> tuple[Tensor, Tensor]:
    """values f32 [8, N] and indices i64 [2, N] of the whole vocabulary of one side; 0 where masked out."""
    flags = flags_of(("entropy", "argmax")) if own.statistics else 0
    state = slice_state(
        logits.detach(), own.labels, temperature, scalar, own.mask, None, None, flags, None, own.backend
    )
    inverse = inverse_temperature(temperature, scalar)
    merged = slices.whole(state, inverse, flags, None)
    values, indices = implementation("logprobs", own.backend).finish(merged, inverse, 1, flags)
    return values if own.mask is None else values.masked_fill(~own.mask, 0.0), indices
