"""Balanced partitions as the textbook has them: largest differencing on a heap, whole partitions of Python tuples."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

_Part = tuple[int, int, tuple[int, ...]]  # sum, size, sequences: in the order in which ties are broken


def balance_partitions(lengths: Sequence[int], parts: int, *, equal_size: bool = False) -> list[list[int]]:
    """The sequences of each part, the largest sum first; within a part in the order of the merges."""
    alone: list[_Part] = sorted((length, 1, (i,)) for i, length in enumerate(lengths))
    if equal_size:
        starts = [alone[i : i + parts][::-1] for i in range(0, len(alone), parts)]
    else:
        starts = [[part] + [(0, 0, ())] * (parts - 1) for part in alone]
    heap = [(_priority(partition), partition) for partition in starts]
    heapq.heapify(heap)
    while len(heap) > 1:
        first, second = heapq.heappop(heap)[1], heapq.heappop(heap)[1]
        merged = sorted(map(_joined, first, reversed(second)), reverse=True)
        heapq.heappush(heap, (_priority(merged), merged))
    return [list(sequences) for _, _, sequences in heap[0][1]]


def _joined(x: _Part, y: _Part) -> _Part:
    return x[0] + y[0], x[1] + y[1], x[2] + y[2]


def _priority(partition: list[_Part]) -> tuple[int, ...]:
    """The partition with the largest spread is merged first; of several the one with the largest part."""
    total, size, sequences = partition[0]
    return partition[-1][0] - total, -total, -size, *(-i for i in sequences)
