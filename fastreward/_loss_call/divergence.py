"""Custom ops of token_divergence, with their gradient, and what they give by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from fastreward._arguments.divergence import DivergenceCall
from fastreward._arguments.transforms import refuse_double_backward
from fastreward._runtime import logit_rows
from fastreward._runtime.custom_op import custom_op
from fastreward._runtime.dispatch import implementation
from fastreward._runtime.layout import VALUES
from fastreward._runtime.memory import empty_like
from fastreward.language.divergence_programs import (
    CONSTANT,
    HEAD_SHARE,
    SLOPE,
    TOTAL,
    UPSTREAM,
    DivergencePrograms,
    registered_programs,
)
from fastreward.language.program import Program

#: What token_divergence gives besides the divergence, where it is asked for.
STATISTICS: Final = ("entropy", "teacher_entropy", "logprobs", "top1_agreement")
_LOGPROB, _ENTROPY = VALUES.index("logprobs"), VALUES.index("entropy")


@dataclass(frozen=True, slots=True)
class DivergenceStats:
    """Per token f32 [...]; what was not asked for is None. Gradients flow through divergence, entropy and logprobs."""

    divergence: Tensor
    entropy: Tensor | None = None
    teacher_entropy: Tensor | None = None
    logprobs: Tensor | None = None
    top1_agreement: Tensor | None = None


def statistics_of(
    divergence: Tensor, student: Tensor, teacher: Tensor, agreement: Tensor, outputs: tuple[str, ...]
) -> dict[str, Tensor]:
    """Of the divergence [N], both sides' values [8, N] and the agreement [N], all outputs [N] by name."""
    found = {
        "entropy": student[_ENTROPY],
        "teacher_entropy": teacher[_ENTROPY].detach(),
        "logprobs": student[_LOGPROB],
    }
    if "top1_agreement" in outputs:
        found["top1_agreement"] = agreement_where_defined(divergence, agreement)
    return {"divergence": divergence, **{name: found[name] for name in outputs}}


def agreement_where_defined(divergence: Tensor, agreement: Tensor) -> Tensor:
    """The agreement, NaN where the divergence is: a row of NaN or of only -inf has a first index, but no top token."""
    divergence = divergence.detach()
    return torch.where(divergence.isnan(), divergence, agreement.detach())


def given_call(
    labels: Tensor,
    temperature: Tensor | None,
    scalar: float,
    teacher_temperature: Tensor | None,
    teacher_scalar: float,
    mask: Tensor | None,
    parameters: list[float],
) -> DivergenceCall:
    """What every backend is given, of an op's arguments."""
    inverse = 1.0 / scalar if temperature is None else temperature.reciprocal()
    of_teacher = 1.0 / teacher_scalar if teacher_temperature is None else teacher_temperature.reciprocal()
    return DivergenceCall(labels, inverse, of_teacher, mask, parameters)


def _matrices(*tensors: Tensor, start: int = 0) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """(number of the first row, matrices [rows, V] on the memory of each of `tensors` [..., V]), without a copy."""
    if all(len(logit_rows.split(x, gaps=False)) == 1 for x in tensors):
        yield start, tuple(x if x.ndim == 2 else x.reshape(-1, x.shape[-1]) for x in tensors)
        return
    each = tensors[0].shape[1:-1].numel()
    for i in range(tensors[0].shape[0]):
        yield from _matrices(*(x[i] for x in tensors), start=start + i * each)


# ---------------------------------------------------------------------------------------------------------- forward
def output_rows(programs: str, sums: int) -> int:
    """Rows of the op's outputs."""
    return 1 + sums + registered_programs(programs).adaptive


def forward_rows(
    logits: Tensor,  # [N, V]
    teacher_logits: Tensor,  # [N, V]
    call: DivergenceCall,
    programs: str,
    sums: int,
    statistics: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the op gives of the rows of a matrix."""
    kernels, known = implementation("divergence", backend), registered_programs(programs)
    found = kernels.forward(known, logits, teacher_logits, call, sums, statistics)
    if not known.adaptive:
        return found
    outputs, student, teacher, agreement = found
    alpha = call.parameters[known.parameters.index("alpha")]
    share = kernels.head_share(logits, teacher_logits, call, student, teacher, alpha)
    mixed = share * outputs[::2] + (1.0 - share) * outputs[1::2]
    return torch.cat([mixed, share.unsqueeze(0)]), student, teacher, agreement


@custom_op("token_divergence")
def token_divergence(
    logits: Tensor,  # [..., V]
    teacher_logits: Tensor,  # [..., V]
    labels: Tensor,  # [N]
    temperature: Tensor | None,  # f64 [N]
    temperature_scalar: float,  # where that is None
    teacher_temperature: Tensor | None,
    teacher_scalar: float,
    mask: Tensor | None,  # [N] bool
    parameters: list[float],
    programs: str,
    sums: int,  # how many sides get a gradient: none, the student's logits, the teacher's too
    statistics: bool,
    inplace_backward: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """outputs, both sides' values f32 [8, N], agreement f32 [N].

    outputs: f32 [1 + sums, N], the divergence and the sums of f1 and f2; one row more, the head's share, if adaptive.
    """
    call = given_call(labels, temperature, temperature_scalar, teacher_temperature, teacher_scalar, mask, parameters)
    parts = [
        forward_rows(x, y, call.rows(start, x.shape[0]), programs, sums, statistics, backend)
        for start, (x, y) in _matrices(logits, teacher_logits)
    ]
    if len(parts) == 1:
        return parts[0]
    outputs, student, teacher, agreement = zip(*parts, strict=True)
    return torch.cat(outputs, 1), torch.cat(student, 1), torch.cat(teacher, 1), torch.cat(agreement)


@token_divergence.register_fake
def _(logits: Tensor, labels: Tensor, programs: str, sums: int) -> tuple[Tensor, ...]:
    n, new = labels.shape[0], logits.new_empty
    shapes = (output_rows(programs, sums), n), (len(VALUES), n), (len(VALUES), n), (n,)
    return tuple(new(shape, dtype=torch.float32) for shape in shapes)


def slice_sums(
    logits: Tensor,  # [..., V of a slice of the vocabulary]
    teacher_logits: Tensor,  # the same columns
    labels: Tensor,  # [N]
    temperature: Tensor | None,
    temperature_scalar: float,
    teacher_temperature: Tensor | None,
    teacher_scalar: float,
    mask: Tensor | None,
    parameters: list[float],
    programs: str,
    sums: int,
    student: Tensor,  # [8, N] f32, of the whole vocabulary
    teacher: Tensor,  # [8, N] f32
    backend: str,
) -> Tensor:
    """What the slice adds to the op's outputs, f64 [1 + sums, N]."""
    if not logits.numel():
        return torch.zeros((1 + sums, labels.shape[0]), dtype=torch.float64, device=logits.device)
    call = given_call(labels, temperature, temperature_scalar, teacher_temperature, teacher_scalar, mask, parameters)
    kernels, known, parts = implementation("divergence", backend), registered_programs(programs), []
    for start, (x, y) in _matrices(logits.detach(), teacher_logits.detach()):
        rows = x.shape[0]
        own = (values[:, start : start + rows].contiguous() for values in (student, teacher))
        parts.append(kernels.sums(known, x, y, call.rows(start, rows), sums, *own))
    return torch.cat(parts, 1)


# --------------------------------------------------------------------------------------------------------- backward
class Upstream(NamedTuple):
    """f32 [N] each, what a gradient program reads per row, and what is added at the label."""

    inputs: dict[str, Tensor]
    label: Tensor | None

    def rows(self, start: int, count: int) -> Upstream:
        """Of rows start .. start + count."""
        end = start + count
        label = None if self.label is None else self.label[start:end]
        return Upstream({name: x[start:end] for name, x in self.inputs.items()}, label)


def gradient_program(programs: DivergencePrograms, statistics: bool) -> Program:
    """That of the student's logits; statistics: with what comes through the other outputs."""
    return programs.statistics if statistics else programs.student


def student_upstream(call: DivergenceCall, outputs: Tensor, student: Tensor, grads: Tensor) -> Upstream:
    """For the student's logits. grads [3, N]: what flows into the divergence, the entropy and the label's log-prob."""
    inverse = call.inv_temperature
    into, entropy, logprob = (grads.double() * inverse).float()
    known = torch.where(entropy == 0, 0.0, student[_ENTROPY])  # not computed, or NaN: no one asked
    inputs = {UPSTREAM: into, TOTAL: outputs[1], CONSTANT: -(entropy * known + logprob), SLOPE: -entropy}
    inputs[HEAD_SHARE] = outputs[-1]  # read by programs that are adaptive
    return Upstream(inputs, logprob.contiguous())


def _teacher_upstream(call: DivergenceCall, outputs: Tensor, grad: Tensor) -> Upstream:
    into = (grad.double() * call.inv_teacher_temperature).float()
    return Upstream({UPSTREAM: into, TOTAL: outputs[2], HEAD_SHARE: outputs[-1]}, None)


@custom_op("token_divergence_backward")
def token_divergence_backward(
    logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    temperature: Tensor | None,
    temperature_scalar: float,
    teacher_temperature: Tensor | None,
    teacher_scalar: float,
    mask: Tensor | None,
    parameters: list[float],
    outputs: Tensor,
    student: Tensor,
    teacher: Tensor,
    grads: Tensor,  # f32 [3, N]
    programs: str,
    statistics: bool,
    of_teacher: bool,
    backend: str,
) -> Tensor:
    """The gradient for the student's logits, or for the teacher's."""
    call = given_call(labels, temperature, temperature_scalar, teacher_temperature, teacher_scalar, mask, parameters)
    grad = empty_like(teacher_logits if of_teacher else logits)
    _write(
        grad, logits, teacher_logits, call, outputs, student, teacher, grads, programs, statistics, of_teacher, backend
    )
    return grad


@token_divergence_backward.register_fake
def _(logits: Tensor, teacher_logits: Tensor, of_teacher: bool) -> Tensor:
    return torch.empty_like(teacher_logits if of_teacher else logits)


token_divergence_backward.refuse_double_backward()


@custom_op("token_divergence_backward_", mutates_args=("logits",))
def token_divergence_backward_(
    logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    temperature: Tensor | None,
    temperature_scalar: float,
    teacher_temperature: Tensor | None,
    teacher_scalar: float,
    mask: Tensor | None,
    parameters: list[float],
    outputs: Tensor,
    student: Tensor,
    teacher: Tensor,
    grads: Tensor,
    programs: str,
    statistics: bool,
    backend: str,
) -> None:
    """The student's gradient over its logits."""
    call = given_call(labels, temperature, temperature_scalar, teacher_temperature, teacher_scalar, mask, parameters)
    _write(logits, logits, teacher_logits, call, outputs, student, teacher, grads, programs, statistics, False, backend)
    torch.autograd.graph.increment_version(logits)


@token_divergence_backward_.register_fake
def _(*_: Any) -> None:
    return None


def _write(
    grad: Tensor,
    logits: Tensor,
    teacher_logits: Tensor,
    call: DivergenceCall,
    outputs: Tensor,
    student: Tensor,
    teacher: Tensor,
    grads: Tensor,
    programs: str,
    statistics: bool,
    of_teacher: bool,
    backend: str,
) -> None:
    known = registered_programs(programs)
    program = known.teacher if of_teacher else gradient_program(known, statistics)
    upstream = (
        _teacher_upstream(call, outputs, grads[0]) if of_teacher else student_upstream(call, outputs, student, grads)
    )
    kernels = implementation("divergence", backend)
    for start, (x, y, out) in _matrices(logits, teacher_logits, grad):
        own, end = upstream.rows(start, x.shape[0]), start + x.shape[0]
        label = own.label if statistics and not of_teacher else None
        kernels.backward(
            program,
            known.parameters,
            x,
            y,
            call.rows(start, x.shape[0]),
            student[:, start:end].contiguous(),
            teacher[:, start:end].contiguous(),
            own.inputs,
            label,
            out,
        )


# --------------------------------------------------------------------------------------------------------- autograd
def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, teacher_logits, labels, temperature, scalar, teacher_temperature, teacher_scalar, mask, *rest = inputs
    parameters, programs, _, statistics, inplace, backend = rest
    outputs, student, teacher, _ = output
    # Copies, small beside the logits: the caller may edit the outputs in place before the backward.
    saved = (outputs.detach().clone(), student.detach().clone(), teacher.detach().clone())
    ctx.save_for_backward(logits, teacher_logits, labels, temperature, teacher_temperature, mask, *saved)
    ctx.numbers = scalar, teacher_scalar, parameters
    ctx.rest = programs, statistics, inplace, backend


def upstream_gradients(outputs: Tensor, grad_outputs: Tensor | None, grad_student: Tensor | None) -> Tensor:
    """f32 [3, N]: of the divergence, the student's entropy and the label's log-prob."""
    zero = torch.zeros_like(outputs[0])
    into = zero if grad_outputs is None else grad_outputs[0]
    entropy, logprob = (zero, zero) if grad_student is None else (grad_student[_ENTROPY], grad_student[_LOGPROB])
    return torch.stack([into, entropy, logprob])


def _backward(ctx: Any, grad_outputs: Any, grad_student: Any, *_: Any) -> tuple[Any, ...]:
    logits, teacher_logits, labels, temperature, teacher_temperature, mask, outputs, student, teacher = (
        ctx.saved_tensors
    )
    scalar, teacher_scalar, parameters = ctx.numbers
    programs, statistics, inplace, backend = ctx.rest
    grads = upstream_gradients(outputs, grad_outputs, grad_student)
    given = (logits, teacher_logits, labels, temperature, scalar, teacher_temperature, teacher_scalar, mask, parameters)
    known = (outputs, student, teacher, grads, programs, statistics)
    grad = of_teacher = None
    if ctx.needs_input_grad[1]:
        of_teacher = token_divergence_backward(*given, *known, True, backend)
    if ctx.needs_input_grad[0] and inplace:
        if torch.is_grad_enabled():
            refuse_double_backward()
        token_divergence_backward_(*given, *known, backend)
        grad = logits.detach()
    elif ctx.needs_input_grad[0]:
        grad = token_divergence_backward(*given, *known, False, backend)
    return (grad, of_teacher, *[None] * 12)


token_divergence.register_autograd(_backward, setup_context=_setup_context)
