"""What several cases time and compare: forward + backward, torch's own forms, the worst error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastreward.bench import peers
from fastreward.bench.case import Case, Contender
from fastreward.verify.error import distance

Tensors = tuple[Tensor, ...]


def step(function: Callable[..., Any], leaves: int, *data: Tensor) -> Tensors:
    """(loss, gradients of the first `leaves` of data)."""
    inputs = [x.detach().requires_grad_() for x in data[:leaves]]
    out = function(*inputs, *data[leaves:])
    return (out.detach(), *torch.autograd.grad(out, inputs))


def add_torch(
    case: Case, function: Callable[..., Any], call_of: Callable[[Callable[..., Any]], Callable[[], Any]], tol: float
) -> None:
    """Adds plain torch, eager and compiled; `call_of` makes the timed call of a form of the function."""
    case.contenders.append(Contender("torch eager", call_of(function), tolerance=tol))
    compiled = call_of(peers.compiled(function))
    case.contenders.append(Contender("torch.compile", compiled, tolerance=tol, compiled=True))


def worst(expected: Sequence[Tensor], result: Sequence[Tensor]) -> float:
    """The largest error of several tensors."""
    return max(distance(r, e) for r, e in zip(result, expected, strict=True))


def worst_of_step(expected: Sequence[Tensor], result: Sequence[Tensor]) -> float:
    """The largest error of a loss, and of its gradients beside the largest of their own entries: a mean's are tiny."""
    pairs = zip(result, expected, strict=True)
    return max(distance(r, e, of_gradient=k > 0) for k, (r, e) in enumerate(pairs))


def off_edges(expected: Sequence[Tensor], result: Sequence[Tensor]) -> float:
    """The same, of the gradients away from a clip's edges, where float32 may fall on the other side."""
    kept = [(result[0], expected[0])]
    for got, want in zip(result[1:], expected[1:], strict=True):
        close = (got - want).abs() <= 1e-4 * want.abs().max()
        whole = float(close.double().mean()) < 1 - 1e-5
        kept.append((got, want) if whole else (got[close], want[close]))
    return worst_of_step([want for _, want in kept], [got for got, _ in kept])


def worst_of_rows(truth: tuple[Tensor, Tensors], gradients: bool, result: Tensors) -> float:
    """The same over the rows that the truth names; what is not in the truth is not looked at.

    Without gradients all are values, of which a contender may give the first alone.
    """
    rows, expected = truth
    found = [got[rows] for got in result[: len(expected)]]
    return worst_of_step(expected, found) if gradients else worst(expected[: len(found)], found)
