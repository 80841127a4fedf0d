"""The benchmark engine behind `fastreward bench` and `pytest bench`.

Each operation's file names its cases and builds them: inputs, contenders, truth, bytes and promises. `engine` gates
and times them, `memory` measures peak memory in a fresh process, `targets` judges the promises
(docs/benchmarks.md says what they are), `report` prints.
"""

from __future__ import annotations

import importlib
from typing import Protocol, cast

import torch

from fastreward.bench.case import Case

OPERATIONS = (
    "logprobs",
    "linear_logprobs",
    "divergence",
    "linear_divergence",
    "policy_loss",
    "preference_loss",
    "value_loss",
    "logits_policy_loss",
    "linear_policy_loss",
    "correction",
    "group",
    "balance",
    "whiten",
    "segments",
    "rewards",
    "returns",
    "prefix_tree",
)
BESIDES = ("busy", "small_calls", "ranks")  # no operations: run where they are named, on the CPU
WITH_VOCABULARY = (
    "logprobs",
    "linear_logprobs",
    "divergence",
    "linear_divergence",
    "logits_policy_loss",
    "linear_policy_loss",
    "ranks",
)  # their last dimension is V


_SMALLEST = 8  # the size at which a sweep begins, or up to four times that


class Operation(Protocol):
    """The contents of an operation's file."""

    CASES: tuple[str, ...]
    DTYPES: tuple[str, ...]
    SHAPE: tuple[int, ...]  # the size that its promises are about
    QUICK: tuple[int, ...]

    def build(self, case: str, dtype: torch.dtype, shape: tuple[int, ...], device: str) -> Case:
        """One case, its data on `device`."""
        ...


def operation(name: str) -> Operation:
    """The benchmark of one operation, by name."""
    if name not in (*OPERATIONS, *BESIDES):
        raise ValueError(f"bench: unknown operation {name!r}; expected one of {', '.join((*OPERATIONS, *BESIDES))}")
    return cast(Operation, importlib.import_module(f"fastreward.bench.cases.{name}"))


def shape_of(name: str, quick: bool, rows: int | None, vocab: int | None) -> tuple[int, ...]:
    """The shape to run: the operation's own or the quick one, with as many rows and ids of a vocabulary as asked."""
    module = operation(name)
    shape = list(module.QUICK if quick else module.SHAPE)
    if rows is not None:
        shape[0] = rows
    if vocab is not None and name in WITH_VOCABULARY:
        shape[-1] = vocab
    return tuple(shape)


def growing(name: str) -> tuple[int, ...]:
    """The dimensions that count what there is to do: B and T of tokens; else the first, rows or rollouts."""
    return (0,) if name in (*WITH_VOCABULARY, "group", "balance") else (0, 1)


def sweep(name: str, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Shapes up to `shape`: one of its growing dimensions from small to full, the others full; then the next."""
    grown = [(*shape[:d], size, *shape[d + 1 :]) for d in growing(name) for size in _quarters(shape[d])]
    return list(dict.fromkeys(grown))  # all of them end at `shape`


def _quarters(size: int) -> list[int]:
    """Rising up to `size`, each a quarter of the next."""
    sizes = [size]
    while sizes[0] >= 4 * _SMALLEST:
        sizes.insert(0, sizes[0] // 4)
    return sizes
