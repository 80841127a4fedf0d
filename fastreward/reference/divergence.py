"""Divergences of two distributions over the vocabulary in float64 torch, by programs that are run node by node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastreward.reference import logprobs
from fastreward.reference.program import Values

#: Log-probs below this count as this: what a forbidden token costs stays finite.
LOWEST = -1e4


def log_probs(logits: Tensor, inv_temperature: float | Tensor) -> Tensor:
    """f64 [N, V] of logits [N, V]."""
    scale = torch.as_tensor(inv_temperature, dtype=torch.float64, device=logits.device).reshape(-1, 1)
    z = logits.double() * scale.clamp(1e-300, 1e300)
    top = z.amax(-1, keepdim=True)
    z = z - torch.where(top.isfinite(), top, 0.0)
    return (z - torch.logsumexp(z, -1, keepdim=True)).clamp(min=LOWEST)


def forward(
    programs: Any, logits: Tensor, teacher_logits: Tensor, call: Any, sums: int, statistics: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Raw form: outputs f32 [1 + sums, N], both sides' values f32 [8, N], agreement f32 [N]."""
    del statistics  # computes everything, always
    program = programs.values[sums]
    sides = []
    for x, inverse in ((logits, call.inv_temperature), (teacher_logits, call.inv_teacher_temperature)):
        sides.append(logprobs.forward(x, call.labels, inverse, call.mask, None, None, None, 0))
    (student, first, _), (teacher, second, _) = sides
    logs = (log_probs(logits, call.inv_temperature), log_probs(teacher_logits, call.inv_teacher_temperature))
    values = _values(program, programs.parameters, call, _with_probabilities(*logs), logits)
    n = logits.shape[0]
    outputs = torch.stack([values.of(node).expand(n, 1).squeeze(-1) for node in program.outputs]).float()
    agreement = (first[0] == second[0]).float()
    if call.mask is not None:
        outputs, agreement = torch.where(call.mask, outputs, 0.0), torch.where(call.mask, agreement, 0.0)
    return outputs, student, teacher, agreement


def sums(
    programs: Any, logits: Tensor, teacher_logits: Tensor, call: Any, count: int, student: Tensor, teacher: Tensor
) -> Tensor:
    """Raw form: what a slice of the vocabulary adds to forward's outputs by the statistics of whole rows, f64."""
    program = programs.values[count]
    rows = _by_statistics(logits, teacher_logits, call, student, teacher)
    values = _values(program, programs.parameters, call, rows, logits)
    found = torch.stack([values.of(node).expand(logits.shape[0], 1).squeeze(-1) for node in program.outputs])
    return found if call.mask is None else torch.where(call.mask, found, 0.0)


def head_share(
    logits: Tensor, teacher_logits: Tensor, call: Any, student: Tensor, teacher: Tensor, alpha: float
) -> Tensor:
    """Raw form: what lies in the teacher's head of sum |p - q|, f32 [N]."""
    del student, teacher
    p = log_probs(logits, call.inv_temperature).exp()
    q = log_probs(teacher_logits, call.inv_teacher_temperature).exp()
    ordered, order = q.sort(stable=True)
    tail = ordered.cumsum(-1) <= alpha
    between = (p - q).abs().gather(-1, order)
    head, whole = torch.where(tail, 0.0, between).sum(-1), between.sum(-1)
    share = torch.where(whole == 0, 0.5, head / whole).float()
    return share if call.mask is None else torch.where(call.mask, share, 0.0)


def backward(
    program: Any,
    parameters: Sequence[str],
    logits: Tensor,
    teacher_logits: Tensor,
    call: Any,
    student: Tensor,
    teacher: Tensor,
    inputs: Mapping[str, Tensor],
    label_gradients: Tensor | None,
    grad_logits: Tensor,
) -> None:
    """Raw form: the program's output per token of the vocabulary, and what is added at the label, into grad_logits."""
    rows = _by_statistics(logits, teacher_logits, call, student, teacher)
    values = _values(program, parameters, call, {**rows, **inputs}, logits)
    (node,) = program.outputs
    grad = values.of(node).expand(logits.shape).clone()
    if label_gradients is not None:
        inside = (call.labels >= 0) & (call.labels < logits.shape[1])
        amount = torch.where(inside, label_gradients.double(), 0.0)
        grad.scatter_add_(1, call.labels.clamp(0, logits.shape[1] - 1).unsqueeze(1), amount.unsqueeze(1))
    if call.mask is not None:
        grad = grad.masked_fill(~call.mask.unsqueeze(-1), 0.0)
    grad_logits.copy_(grad)


def _by_statistics(
    logits: Tensor, teacher_logits: Tensor, call: Any, student: Tensor, teacher: Tensor
) -> dict[str, Tensor]:
    """Log-probs and probabilities f64 [N, V], by what is known of whole rows: the columns may be a slice."""
    sides = ((logits, call.inv_temperature, student), (teacher_logits, call.inv_teacher_temperature, teacher))
    logs = []
    for x, inverse, values in sides:
        scale = torch.as_tensor(inverse, dtype=torch.float64, device=x.device).reshape(-1, 1).clamp(1e-300, 1e300)
        max_logprob, peak = values[6:8].double().unsqueeze(-1)
        logs.append(((x.double() - peak) * scale + max_logprob).clamp(min=LOWEST))
    return _with_probabilities(*logs)


def _with_probabilities(log_p: Tensor, log_q: Tensor) -> dict[str, Tensor]:
    return {"log_p": log_p, "log_q": log_q, "p": log_p.exp(), "q": log_q.exp()}


def _values(program: Any, parameters: Sequence[str], call: Any, inputs: Mapping[str, Tensor], logits: Tensor) -> Values:
    everywhere = torch.ones(logits.shape, dtype=torch.bool, device=logits.device)
    values = Values({(name, 0): x for name, x in inputs.items()}, [everywhere])
    scalars = program.scalar_values(dict(zip(parameters, call.parameters, strict=True)))
    for node, value in zip(program.scalars, scalars, strict=True):
        values.set(node, value)
    return values
