"""Divergence of a student from a teacher straight from the hidden states and LM heads of both: no [N, V] tensor.

Rows are taken a few hundred at a time: their logits on both sides (one GEMM each) give all of a row's statistics at
once. The backward computes them again, turns the student's into their gradient in place, and that into those of hidden
states and weight (two GEMMs). Over k ids both sides' log-probs of them come from `linear_token_logprobs`.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.arrays import accepts_arrays
from fastreward._arguments.logits import check_token_ids, row_mask, temperatures
from fastreward._arguments.numbers import Number, joined, split
from fastreward._loss_call.buckets import bucket_divergence, given_logprobs, ids_of_buckets
from fastreward._loss_call.divergence import (
    DivergenceStats,
    agreement_where_defined,
    forward_rows,
    given_call,
    gradient_program,
    output_rows,
    statistics_of,
    student_upstream,
)
from fastreward._runtime.custom_op import custom_op
from fastreward._runtime.dispatch import implementation, select
from fastreward._runtime.layout import VALUES
from fastreward._runtime.lm_head import (
    Head,
    HeadGradients,
    check_head,
    compute_dtype_of,
    fake_gradients,
    scaling,
)
from fastreward.divergence import check_outputs, check_teacher, chosen_divergence
from fastreward.divergences import Loss
from fastreward.language.divergence_programs import registered_programs
from fastreward.linear_logprobs import linear_token_logprobs

#: Logits of one side that exist at a time, as elements: on a GPU enough rows to keep the GEMMs at full rate.
_CPU_LOGITS: Final = 1 << 25
_GPU_LOGITS: Final = 1 << 28


class _Side(NamedTuple):
    """Hidden states [N, H] and LM head [V, H] of one side."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None  # [V]
    temperature: Tensor | None  # f64 [N]
    temperature_scalar: float  # where that is None
    logit_scale: float
    given_scale: Tensor | None  # f64 []: instead of it, where the host does not know it
    softcap: float  # 0 = none
    given_softcap: Tensor | None
    dtype: torch.dtype  # of the GEMM

    def head(self, rows: int, backend: str, *, backward: bool = False) -> Head:
        factor, cap = (
            joined(self.logit_scale, self.given_scale, backend),
            joined(self.softcap, self.given_softcap, backend),
        )
        tile = [rows, self.weight.shape[0]]
        return Head(self.hidden, self.weight, self.bias, factor, cap, tile, self.dtype, backward=backward)


# -------------------------------------------------------------------------------------------------------- custom ops
@custom_op("linear_divergence")
def _linear_divergence(
    student: _Side,
    teacher: _Side,
    labels: Tensor,  # [N] i64
    rows: int,  # tokens at a time
    parameters: list[float],
    programs: str,
    sums: int,  # 1: a gradient is wanted
    statistics: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the op token_divergence gives."""
    call = _call(student, teacher, labels, parameters)
    heads = student.head(rows, backend), teacher.head(rows, backend)
    found = _empty(student.hidden, output_rows(programs, sums))
    for part in heads[0].row_chunks():
        x, y = (head.logits(part, slice(0, len(student.weight))) for head in heads)
        own = forward_rows(x, y, call.rows(part.start, len(x)), programs, sums, statistics, backend)
        for whole, piece in zip(found, own, strict=True):
            whole[..., part] = piece
    return found


def _empty(hidden: Tensor, outputs: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def new(*lead: int) -> Tensor:
        return hidden.new_empty((*lead, hidden.shape[0]), dtype=torch.float32)

    return new(outputs), new(len(VALUES)), new(len(VALUES)), new()


@_linear_divergence.register_fake
def _(student_hidden: Tensor, programs: str, sums: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty(student_hidden, output_rows(programs, sums))


@custom_op("linear_divergence_backward")
def _linear_divergence_backward(
    student: _Side,
    teacher: _Side,
    labels: Tensor,
    rows: int,
    parameters: list[float],
    programs: str,
    statistics: bool,
    outputs: Tensor,  # the forward's
    student_values: Tensor,
    teacher_values: Tensor,
    grads: Tensor,  # f32 [3, N]: what flows into the divergence, the student's entropy and the label's log-prob
    needs: list[bool],  # gradient for hidden, weight, bias
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # an unneeded gradient is [0]
    kernels, known = implementation("linear_divergence", backend), registered_programs(programs)
    call = _call(student, teacher, labels, parameters)
    upstream = student_upstream(call, outputs, student_values, grads)
    head, other = student.head(rows, backend, backward=True), teacher.head(rows, backend)
    found, whole = HeadGradients(head, needs), slice(0, len(student.weight))
    for part in head.row_chunks():
        x, y = head.logits(part, whole), other.logits(part, whole)
        slope = (x / head.softcap).square_().neg_().add_(1.0) if head.capped else None
        own = upstream.rows(part.start, len(x))
        kernels.backward(
            gradient_program(known, statistics),
            known.parameters,
            x,
            y,
            call.rows(part.start, len(x)),
            student_values[:, part].contiguous(),
            teacher_values[:, part].contiguous(),
            own.inputs,
            own.label if statistics else None,
            x,
        )
        found.add(part, whole, x if slope is None else x.mul_(slope))
    return found.finish()


@_linear_divergence_backward.register_fake
def _(
    student_hidden: Tensor, student_weight: Tensor, student_bias: Tensor | None, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    return fake_gradients(student_hidden, student_weight, student_bias, needs)


_linear_divergence_backward.refuse_double_backward()


def _call(student: _Side, teacher: _Side, labels: Tensor, parameters: list[float]) -> Any:
    return given_call(
        labels,
        student.temperature,
        student.temperature_scalar,
        teacher.temperature,
        teacher.temperature_scalar,
        None,
        parameters,
    )


# ---------------------------------------------------------------------------------------------------------- autograd
def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *sides, labels, rows, parameters, programs, _, statistics, backend = inputs
    tensors = [x if isinstance(x, Tensor) else None for x in sides]
    # Copies, small beside the heads: the caller may edit the outputs in place before the backward.
    ctx.save_for_backward(*tensors, labels, *(x.detach().clone() for x in output[:3]))
    ctx.sides = [None if isinstance(x, Tensor) else x for x in sides]
    ctx.rest = rows, parameters, programs, statistics
    ctx.backend = backend


def _backward(ctx: Any, grad_outputs: Any, grad_student: Any, *_: Any) -> tuple[Any, ...]:
    *tensors, labels, outputs, student, teacher = ctx.saved_tensors
    sides = [number if x is None else x for x, number in zip(tensors, ctx.sides, strict=True)]
    zero = torch.zeros_like(outputs[0])
    into = zero if grad_outputs is None else grad_outputs[0]
    own = [zero if grad_student is None else grad_student[VALUES.index(name)] for name in ("entropy", "logprobs")]
    needs, grads = list(ctx.needs_input_grad[:3]), torch.stack([into, *own])
    found = _linear_divergence_backward(*sides, labels, *ctx.rest, outputs, student, teacher, grads, needs, ctx.backend)
    return (*(grad if needed else None for grad, needed in zip(found, needs, strict=True)), *[None] * 24)


_linear_divergence.register_autograd(_backward, setup_context=_setup_context)


# --------------------------------------------------------------------------------------------------- public function
@accepts_arrays
def linear_divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    divergence: str | Loss = "reverse-kl",
    temperature: Number = 1.0,
    teacher_temperature: Number | None = None,
    logit_scale: Number = 1.0,
    teacher_logit_scale: Number = 1.0,
    softcap: Number | None = None,
    teacher_softcap: Number | None = None,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    outputs: tuple[str, ...] = (),
    token_ids: Tensor | None = None,
    teacher_logprobs: Tensor | None = None,
    tail: bool = True,
    chunk_size: int | None = None,
) -> DivergenceStats:
    """`token_divergence` of hidden @ weight.T and teacher_hidden @ teacher_weight.T, without any [N, V] tensor.

    Args:
        hidden: the student's, [..., H] float32, bfloat16 or float16. Under autocast the GEMMs run in autocast's dtype.
        weight: [V, H] of its LM head, the same dtype (or any under autocast); bias: [V].
        teacher_hidden, teacher_weight, teacher_bias: the teacher's, [..., G], [V, G] and [V], of a width and dtype of
            their own; constants. None: with teacher_logprobs.
        divergence, temperature, teacher_temperature, labels, outputs, token_ids, teacher_logprobs, tail: as in
            `token_divergence`.
        logit_scale, softcap: logits are softcap * tanh(logit_scale * x / softcap) where a softcap is given (Gemma),
            else logit_scale * x; teacher_logit_scale, teacher_softcap: the same of the teacher's.
        mask: [...], nonzero = compute. Other rows are dropped before the first GEMM, cost nothing and give 0. Counting
            them is the one host synchronisation on a GPU, as in `linear_token_logprobs`.
        chunk_size: tokens whose logits exist at a time (default: what suits the device); over ids the head's own tiles.

    Returns:
        DivergenceStats, as token_divergence gives it. Gradients flow through divergence, entropy and logprobs to
        hidden, weight and bias (and to teacher_logprobs); the backward computes the logits again and accumulates in
        float32. A token's bits are as steady as those of `linear_token_logprobs`.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device, label, id or name, before anything runs.
    """
    places = torch.zeros(hidden.shape[:-1], dtype=torch.int64, device=hidden.device) if labels is None else labels
    check_head(hidden, weight, bias, places)
    check_teacher(teacher_hidden, token_ids, teacher_logprobs, teacher_temperature, "teacher_hidden")
    check_outputs(outputs, labels, teacher_logprobs)
    chosen, tail = chosen_divergence(divergence), check.flag("tail", tail)
    if chunk_size is not None and check.whole("chunk_size", chunk_size, "tokens at a time") < 1:
        raise ValueError(f"chunk_size: expected a positive number of tokens, got {chunk_size}")
    if (teacher_hidden is None) != (teacher_weight is None):
        raise ValueError("teacher_weight: goes with teacher_hidden; pass both")
    teacher = None
    if teacher_hidden is not None and teacher_weight is not None:
        check_head(teacher_hidden, teacher_weight, teacher_bias, places, of="teacher_")
        check.shape("teacher_weight", teacher_weight, (len(weight), teacher_weight.shape[1]), "V of weight")
        check.same_device("teacher_hidden", teacher_hidden, "hidden", hidden)
        teacher = _constants(teacher_hidden, teacher_weight, teacher_bias)
    if labels is not None and check.values_checked(hidden, labels):
        check_token_ids("labels", labels, len(weight), mask)
    rows = row_mask(mask, places)
    own = _Given("", hidden, weight, bias, temperature, logit_scale, softcap)
    tempered = temperature if teacher_temperature is None else teacher_temperature
    other = None if teacher is None else _Given("teacher_", *teacher, tempered, teacher_logit_scale, teacher_softcap)
    if token_ids is not None:
        ids = ids_of_buckets(token_ids, places, len(weight), mask)
        given = None if teacher_logprobs is None else given_logprobs(teacher_logprobs, ids, places, mask)
        found = _over_ids(own, other, given, ids, chosen, tail, places, mask, rows, outputs)
    else:
        assert other is not None
        found = _over_vocabulary(own, other, chosen, places, mask, rows, outputs, chunk_size)
    return DivergenceStats(**{name: x.reshape(places.shape) for name, x in found.items()})


class _Given(NamedTuple):
    """One side as the caller gives it, checked."""

    of: str  # before the names of its arguments
    hidden: Tensor  # [..., H]
    weight: Tensor
    bias: Tensor | None
    temperature: Number
    logit_scale: Number
    softcap: Number | None

    def rows(self, kept: Tensor | None, labels: Tensor, mask: Tensor | None) -> _Side:
        """The rows that count."""
        factor, cap = scaling(self.logit_scale, self.softcap, self.hidden, self.of)
        scalar, per_token = temperatures(self.temperature, labels, mask, f"{self.of}temperature")
        flat = self.hidden.reshape(-1, self.hidden.shape[-1])
        if kept is not None:
            flat, per_token = flat[kept], None if per_token is None else per_token[kept]
        dtype = compute_dtype_of(self.hidden)
        return _Side(flat, self.weight, self.bias, per_token, scalar, *split(factor), *split(cap), dtype)


def _constants(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    return (
        check.constant("teacher_hidden", hidden),
        check.constant("teacher_weight", weight),
        None if bias is None else check.constant("teacher_bias", bias),
    )


def _over_vocabulary(
    student: _Given,
    teacher: _Given,
    chosen: Loss,
    labels: Tensor,
    mask: Tensor | None,
    rows: Tensor | None,
    outputs: tuple[str, ...],
    chunk_size: int | None,
) -> dict[str, Tensor]:
    """The divergence [N] and the outputs."""
    flat, kept = labels.reshape(-1).long(), None if rows is None else rows.nonzero().squeeze(-1)
    own, other = (side.rows(kept, labels, mask) for side in (student, teacher))
    limit = _CPU_LOGITS if own.hidden.device.type == "cpu" else _GPU_LOGITS
    found = _linear_divergence(
        *own,
        *other,
        flat if kept is None else flat[kept],
        chunk_size or max(limit // len(own.weight), 1),
        [chosen.scalars[name] for name in sorted(chosen.scalars)],
        chosen.divergence_plan(),
        int(any(x is not None and x.requires_grad for x in own[:3])),
        bool(outputs),
        select("linear_divergence", own.hidden),
    )
    if kept is not None:
        found = tuple(x.new_zeros((*x.shape[:-1], len(flat))).index_copy(-1, kept, x) for x in found)
    divergence, values, teachers, agreement = found
    return statistics_of(divergence[0], values, teachers, agreement, outputs)


def _over_ids(
    student: _Given,
    teacher: _Given | None,
    teacher_logprobs: Tensor | None,  # [N, k], instead of it
    ids: Tensor,  # [N, k], negative = padding
    chosen: Loss,
    tail: bool,
    labels: Tensor,
    mask: Tensor | None,
    rows: Tensor | None,
    outputs: tuple[str, ...],
) -> dict[str, Tensor]:
    """The divergence [N] over the ids and their rest, and the outputs."""

    def read(side: _Given) -> dict[str, Tensor]:
        side.rows(None, labels, mask)  # its checks, by its names
        asked = ("id_logprobs", *(x for x in ("entropy", "logprobs", "argmax") if _needed(x, outputs)))
        stats = linear_token_logprobs(
            side.hidden,
            side.weight,
            labels,
            bias=side.bias,
            temperature=side.temperature,
            logit_scale=side.logit_scale,
            softcap=side.softcap,
            mask=mask,
            outputs=asked,
            token_ids=ids.clamp(min=0).reshape(*labels.shape, -1),
        )
        return {name: getattr(stats, name) for name in asked}

    own, other = read(student), {} if teacher is None else read(teacher)
    found: dict[str, Tensor] = {name: own[name] for name in ("entropy", "logprobs") if name in outputs}
    if "teacher_entropy" in outputs:
        found["teacher_entropy"] = other["entropy"]
    teachers = other["id_logprobs"].reshape(ids.shape) if teacher_logprobs is None else teacher_logprobs
    divergence = bucket_divergence(own["id_logprobs"].reshape(ids.shape), teachers, ids, chosen, tail, rows)
    if "top1_agreement" in outputs:
        agreement = (own["argmax"] == other["argmax"]).float() * (1 if mask is None else mask != 0)
        found["top1_agreement"] = agreement_where_defined(divergence, agreement.reshape(-1)).reshape(agreement.shape)
    return {"divergence": divergence, **found}


def _needed(statistic: str, outputs: tuple[str, ...]) -> bool:
    """Whether an output is made of this one of `linear_token_logprobs`."""
    needed = {"entropy": ("entropy", "teacher_entropy"), "logprobs": ("logprobs",), "argmax": ("top1_agreement",)}
    return any(name in outputs for name in needed[statistic])
