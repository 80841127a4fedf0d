"""The problems of `fastreward verify`, one file per operation."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Problem:
    """One call, three ways: fastreward's, the float64 truth, and plain torch at the input's dtype.

    Each takes the inputs on some device and gives tensors by name; gradients are named "grad of <input>".
    """

    operation: str
    name: str
    dtype: str
    inputs: Mapping[str, Any]
    ours: Callable[[Mapping[str, Any]], Tensors]
    truth: Callable[[Mapping[str, Any]], Tensors]
    plain: Callable[[Mapping[str, Any]], Tensors]


def problems(operation: str, quick: bool) -> Iterator[Problem]:
    """The problems of one operation, random and adversarial."""
    module = importlib.import_module(f"fastreward.verify.problems.{operation}")
    yield from module.problems(quick)


def seeded(
    operation: str,
    quick: bool,
    inputs_of: Callable[[int], Iterable[tuple[str, Mapping[str, Any]]]],
    *ways: Callable[[int, Mapping[str, Any]], Tensors],
) -> Iterator[Problem]:
    """Three seeds' problems, or one: (name, inputs) of a seed, then the ways of a Problem, which take the seed too.

    A problem's dtype is that of its first input.
    """
    for seed in range(1 if quick else 3):
        for name, inputs in inputs_of(seed):
            label = name if seed == 0 else f"{name} (seed {seed})"
            dtype = str(next(iter(inputs.values())).dtype).removeprefix("torch.")
            yield Problem(operation, label, dtype, inputs, *(partial(way, seed) for way in ways))


def on(inputs: Mapping[str, Any], device: str) -> dict[str, Any]:
    """The inputs with every tensor on `device`, strides kept."""
    return {name: _moved(x, device) if isinstance(x, Tensor) else x for name, x in inputs.items()}


def gradients(out: Tensors, leaves: Tensors, seed: int) -> Tensors:
    """Gradients of `out` for `leaves` under random upstream gradients, the same for every way of computing `out`."""
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for x in out.values():  # in order: the numbers drawn depend on the outputs' shapes alone
        upstream = torch.randn(x.shape, generator=generator, dtype=torch.float32)
        if x.requires_grad:
            pairs.append((x, upstream.to(x)))
    if not pairs:
        return {}
    found = torch.autograd.grad(
        [x for x, _ in pairs], list(leaves.values()), [g for _, g in pairs], allow_unused=True, materialize_grads=True
    )
    return {f"grad of {name}": grad for name, grad in zip(leaves, found, strict=True)}


def leaf(x: Tensor, double: bool = False) -> Tensor:
    """A detached `x` that requires a gradient, strides kept; in float64 for the truth."""
    return (x.detach().double() if double else x.detach()).requires_grad_()


def _moved(x: Tensor, device: str) -> Tensor:
    if x.device.type == device:
        return x
    moved = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
    return moved.copy_(x)
