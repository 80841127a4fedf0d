"""balance_partitions: sequences to parts of nearly equal length, as trainers do it between rollouts and update.

micro-batches: as many parts as it takes, any sizes; ranks: each of eight ranks gets as many sequences. Lengths are
log-normal, as of responses. An error is how much larger than the largest part of the reference one's own largest is,
relative to it: the longest-first greedy of a few lines is allowed a tenth, all others nothing.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from fastreward.balance import balance_partitions
from fastreward.bench import peers, roofline
from fastreward.bench.case import OURS, Case, Contender, Target
from fastreward.reference import balance as reference

CASES = ("micro-batches", "ranks")
DTYPES = ("int64",)
SHAPE = (4096, 8)  # sequences, of one part
QUICK = (256, 8)

_RANKS = 8


def build(case: str, dtype: torch.dtype, shape: tuple[int, ...], device: str) -> Case:
    """`shape` is (sequences, sequences of a part of micro-batches)."""
    count, size = shape
    ranks = case == "ranks"
    parts = min(count, _RANKS) if ranks else -(-count // size)
    count -= count % parts if ranks else 0
    lengths = (
        torch.randn(count, generator=torch.Generator().manual_seed(0)).mul(0.8).exp().mul(800).long().clamp(1, 8192)
    )
    listed = lengths.tolist()
    largest = _largest(listed, reference.balance_partitions(listed, parts, equal_size=ranks))
    built = Case(
        operation="balance",
        name=case,
        dtype=str(dtype).removeprefix("torch."),
        shape=(count, parts),
        traffic=roofline.Traffic(8 * count, 8 * count),
        error=lambda found: max(0.0, _largest(listed, found) / largest - 1.0),
        contenders=[Contender(OURS, lambda: balance_partitions(listed, parts, equal_size=ranks))],
        tolerance=0.0,
        inputs=[],
        targets=(Target("first_call", 0.02), Target("speedup", 5.0 if ranks else 200.0, "verl")),
    )
    if not ranks:
        built.contenders.append(Contender("longest first", partial(_longest_first, listed, parts), tolerance=0.1))
    peers.add(built, "verl", partial(_verl, listed, parts, ranks))
    built.absent |= dict.fromkeys(("TRL", "liger-kernel", "torch eager"), "no such function")
    built.absent["torch.compile"] = "nothing to compile: a heap of lists"
    return built


def _largest(lengths: list[int], parts: list[list[int]]) -> int:
    """The sum of the largest part, if every sequence is in one part."""
    assert sorted(i for part in parts for i in part) == list(range(len(lengths)))
    return max(sum(lengths[i] for i in part) for part in parts)


def _longest_first(lengths: list[int], parts: int) -> list[list[int]]:
    """The greedy of a few lines: the longest of what is left to the part with least."""
    found: list[list[int]] = [[] for _ in range(parts)]
    heap = [(0, k) for k in range(parts)]
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        total, k = heap[0]
        found[k].append(i)
        heapq.heapreplace(heap, (total + lengths[i], k))
    return found


def _verl(lengths: list[int], parts: int, equal_size: bool) -> Contender:
    function: Callable[..., Any] = peers.load("verl", "verl.utils.seqlen_balancing").get_seqlen_balanced_partitions
    return Contender("verl", lambda: function(lengths, parts, equal_size))
