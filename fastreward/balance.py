"""Sequences to parts of nearly equal length: for data-parallel ranks and micro-batches.

A host-only operation: Python lists come out, whatever device the lengths are on, so there is one kernel, for the CPU,
and no backend to choose. Largest differencing (Karmarkar and Karp 1982; Michiels, Korst and Aarts 2003 for more than
two parts), which trainers run in Python: `get_seqlen_balanced_partitions` of verl and OpenRLHF, with the same result.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from fastreward import _core
from fastreward._arguments import check
from fastreward._arguments.arrays import as_tensor

_LARGEST: Final = 2**63 - 1


def balance_partitions(
    lengths: Tensor | Sequence[int],
    parts: int | None = None,
    *,
    equal_size: bool = False,
    costs: Tensor | Sequence[int] | None = None,
    max_tokens: int | None = None,
) -> list[list[int]]:
    """Split sequences into parts whose lengths add up to nearly the same.

    Args:
        lengths: whole numbers of at least 0, [B]: a tensor, an array or a list. One on a GPU is waited for.
        parts: how many, at most B; with max_tokens the fewest, and 1 where not given.
        equal_size: every part gets B / parts sequences, which has to be a whole number.
        costs: [B], as lengths: what is balanced instead of the lengths, such as the FLOPs of a sequence.
        max_tokens: no part's lengths add up to more: there are as many parts as that takes, counted up from `parts` or
            from what the sum of all lengths takes, whichever is more.

    Returns:
        The indices of each part, ascending; parts with the largest sum first. The same for the same input, always.

    Raises:
        TypeError, ValueError: numbers that are not whole or below 0, sums above 2^63 - 1, more parts than sequences, B
            not divisible by parts, a sequence longer than max_tokens, equal_size with max_tokens.
    """
    tokens = _whole_numbers("lengths", lengths)
    weights = tokens if costs is None else _whole_numbers("costs", costs)
    check.shape("costs", weights, tokens.shape, "as lengths")
    if parts is None and max_tokens is None:
        raise ValueError("parts, max_tokens: expected one of them at least, got neither")
    count = _checked_parts(1 if parts is None else parts, len(tokens), check.flag("equal_size", equal_size))
    if max_tokens is None:
        return [sorted(part) for part in differenced(weights, count, equal_size)]
    if equal_size:
        raise ValueError("equal_size: expected False with max_tokens, which may need any number of parts, got True")
    return _within(tokens, weights, count, _checked_cap(max_tokens, tokens))


def differenced(costs: Tensor, parts: int, equal_size: bool) -> list[list[int]]:
    """The indices of each part, in the order in which largest differencing has put them together.

    costs: i64 [B], contiguous, on the CPU, at least 0, with a sum below 2^63; 1 <= parts <= B.
    """
    order, starts = torch.empty_like(costs), torch.empty(parts + 1, dtype=torch.int64)
    _core.balance(costs.data_ptr(), len(costs), parts, equal_size, order.data_ptr(), starts.data_ptr())
    flat, bounds = order.tolist(), starts.tolist()
    return [flat[begin:end] for begin, end in itertools.pairwise(bounds)]


def _within(tokens: Tensor, costs: Tensor, parts: int, cap: int) -> list[list[int]]:
    lengths = tokens.tolist()
    parts = max(parts, -(-sum(lengths) // cap) if cap else 1)
    while True:  # ends: with a part for each sequence, none is above the cap
        found = differenced(costs, parts, equal_size=False)
        if all(sum(lengths[i] for i in part) <= cap for part in found):
            return [sorted(part) for part in found]
        parts += 1


def _whole_numbers(name: str, x: Any) -> Tensor:
    """`x` as i64 [B] on the CPU, if it holds whole numbers of at least 0 whose sum fits."""
    given = as_tensor(x)
    if not isinstance(given, Tensor):
        given = _listed(name, given)
    check.integers(name, given)
    if given.ndim != 1:
        raise ValueError(f"{name}: expected shape [B], got {list(given.shape)}")
    numbers = given.detach().to("cpu", torch.int64).contiguous()
    check.every(name, numbers >= 0, numbers, "whole numbers of at least 0")
    if float(numbers.double().sum()) >= 2.0**62 and sum(numbers.tolist()) > _LARGEST:
        raise ValueError(f"{name}: expected a sum of at most 2^63 - 1, got {sum(numbers.tolist())}")
    return numbers


def _listed(name: str, x: Any) -> Tensor:
    """A list of integers as a tensor; torch itself would cut 1.5 off to 1."""
    items = list(x)
    if not all(type(item) is int for item in items):
        items = [check.whole(f"{name}[{i}]", item, "a length") for i, item in enumerate(items)]
    if items and max(items) > _LARGEST:
        raise ValueError(f"{name}: expected a sum of at most 2^63 - 1, got {sum(items)}")
    return torch.tensor(items, dtype=torch.int64)


def _checked_parts(parts: object, count: int, equal_size: bool) -> int:
    number = check.whole("parts", parts, "of parts")
    if not 1 <= number <= count:
        raise ValueError(f"parts: expected 1 to {count}, the number of sequences, got {number}")
    if equal_size and count % number:
        raise ValueError(f"parts: expected a divisor of {count}, the number of sequences, for equal_size, got {number}")
    return number


def _checked_cap(max_tokens: object, tokens: Tensor) -> int:
    cap = check.whole("max_tokens", max_tokens, "of tokens")
    check.every("lengths", tokens <= cap, tokens, f"at most max_tokens ({cap})")
    return cap
