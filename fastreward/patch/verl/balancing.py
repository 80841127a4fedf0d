"""verl.utils.seqlen_balancing: sequences to ranks and to micro-batches, with the very parts that verl gives.

`rearrange_micro_batches`, with its collectives and its loop until no part is above the cap, stays verl's and calls what
is bound here. Whatever verl answers with an AssertionError is handed on to it, and so are numbers that are not whole.
"""

from __future__ import annotations

import itertools
from typing import Any, Final

import torch
from torch import Tensor

from fastreward.balance import differenced
from fastreward.patch.usage import handed_on
from fastreward.patch.verl.replacement import Replacement

_MODULE: Final = "verl.utils.seqlen_balancing"
_TOO_MUCH: Final = 2**63


def karmarkar_karp(stock: Any, seqlen_list: Any, k_partitions: int, equal_size: bool) -> list[list[int]]:
    """Indices of each part, the largest first, in the order of the merges."""
    costs = _served(seqlen_list, k_partitions, equal_size)
    if costs is None:
        handed_on()
        return stock(seqlen_list, k_partitions, equal_size)  # type: ignore[no-any-return]
    return differenced(costs, k_partitions, equal_size)


def balanced_partitions(stock: Any, seqlen_list: Any, k_partitions: int, equal_size: bool) -> list[list[int]]:
    """Indices of each part, ascending, the part with the largest sum first."""
    costs = _served(seqlen_list, k_partitions, equal_size)
    if costs is None:
        handed_on()
        return stock(seqlen_list, k_partitions, equal_size)  # type: ignore[no-any-return]
    return [sorted(part) for part in differenced(costs, k_partitions, equal_size)]


def group_balanced_partitions(stock: Any, seqlen_list: Any, uid_list: Any, k_partitions: int) -> list[list[int]]:
    """The same of groups: neighbours with one uid stay together, and each part gets as many groups."""
    lengths = _whole_numbers(seqlen_list)
    if lengths is None or not len(lengths) == len(uid_list) > 0:
        handed_on()
        return stock(seqlen_list, uid_list, k_partitions)  # type: ignore[no-any-return]
    workloads = stock.__globals__["calculate_workload"](lengths).tolist()  # verl calls it once per sequence
    changes = [i for i in range(1, len(lengths)) if uid_list[i] != uid_list[i - 1]]
    groups = list(itertools.pairwise([0, *changes, len(lengths)]))
    costs = _served([sum(workloads[begin:end]) for begin, end in groups], k_partitions, True)
    if costs is None:
        handed_on()
        return stock(seqlen_list, uid_list, k_partitions)  # type: ignore[no-any-return]
    parts = differenced(costs, k_partitions, True)
    return [[i for group in sorted(part) for i in range(*groups[group])] for part in parts]


def _served(costs: Any, parts: Any, equal_size: bool) -> Tensor | None:
    """The costs as i64 [B] on the CPU; None where verl raises, or computes with other numbers."""
    numbers = _whole_numbers(costs)
    if numbers is None or type(parts) is not int or not 1 <= parts <= len(numbers):
        return None
    if equal_size and len(numbers) % parts:
        return None
    total = float(numbers.double().sum())
    return numbers if int(numbers.min()) >= 0 and total < _TOO_MUCH * (1 - 1e-9) else None


def _whole_numbers(x: Any) -> Tensor | None:
    """i64 [B] on the CPU, contiguous, of a tensor or list of whole numbers; None: it is something else."""
    if isinstance(x, Tensor):
        fits = x.ndim == 1 and not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)
        return x.detach().to("cpu", torch.int64).contiguous() if fits else None
    if not isinstance(x, list | tuple) or not all(type(item) is int and abs(item) < _TOO_MUCH for item in x):
        return None
    return torch.tensor(x, dtype=torch.int64)


def _no_tokens(*_: Any, **__: Any) -> int:
    """Costs are dealt out here, and no token is looked at."""
    return 0


REPLACEMENTS: Final = (
    Replacement(
        f"{_MODULE}.karmarkar_karp",
        ("seqlen_list", "k_partitions", "equal_size"),
        karmarkar_karp,
        "fastreward.balance_partitions",
        "largest differencing in C++; the same parts",
        _no_tokens,
    ),
    Replacement(
        f"{_MODULE}.get_seqlen_balanced_partitions",
        ("seqlen_list", "k_partitions", "equal_size"),
        balanced_partitions,
        "fastreward.balance_partitions",
        "largest differencing in C++; the same parts",
        _no_tokens,
    ),
    Replacement(
        f"{_MODULE}.get_group_balanced_partitions",
        ("seqlen_list", "uid_list", "k_partitions"),
        group_balanced_partitions,
        "fastreward.balance_partitions",
        "all workloads in one call, then as above",
        _no_tokens,
    ),
)
