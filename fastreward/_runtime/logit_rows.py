"""Rows of logits under any leading strides, handed to kernels that know one row stride, without a copy.

A kernel sees a matrix [rows, V] with one row stride. Contiguous batches and plain row slices are such a matrix
already. `logits[:, :-1]` and its like are not, but they lie inside one: the rows in its gaps are masked out, and a
masked row is never touched. Anything wilder goes one leading index at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from fastreward._runtime.memory import empty_like, empty_strided


@dataclass(slots=True)
class RowBlock:
    """Rows `start` .. `start + count` of the batch as one matrix: runs of `length` rows, `gap` alien rows between."""

    index: tuple[int, ...]  # leading index of the part of the batch that is covered
    start: int
    count: int
    length: int
    gap: int

    def matrix(self, x: Tensor) -> Tensor:
        """[rows, V] on the memory of x [..., V]: the tensor that was split, or one of the same shape and strides."""
        part = x[self.index] if self.index else x
        if not self.gap:
            if part.ndim == 2:
                return part
            return part.reshape(-1, part.shape[-1]) if part.numel() else part.new_empty(0, part.shape[-1])
        pieces, length, vocab = part.shape
        rows = pieces * (length + self.gap) - self.gap
        return part.as_strided((rows, vocab), (part.stride(1), 1))

    @overload
    def per_row(self, x: Tensor) -> Tensor: ...
    @overload
    def per_row(self, x: Tensor | None) -> Tensor | None: ...
    def per_row(self, x: Tensor | None) -> Tensor | None:
        """Per-row data [N, ...] of the batch to [rows, ...]; zeros in the gaps."""
        if x is None or (not self.gap and self.count == x.shape[0]):
            return x
        mine = x[self.start : self.start + self.count]
        if not self.gap:
            return mine
        runs = mine.reshape(self.count // self.length, self.length, *mine.shape[1:])
        padded = runs.new_zeros((runs.shape[0], self.length + self.gap, *runs.shape[2:]))
        padded[:, : self.length] = runs
        return padded.flatten(0, 1)[: padded.shape[0] * padded.shape[1] - self.gap]

    def inside(self, device: torch.device) -> Tensor:
        """Indices of our rows in the matrix, [count]."""
        own = torch.arange(self.count, device=device)
        return own + own.div(self.length, rounding_mode="floor") * self.gap


def split(x: Tensor, gaps: bool = True) -> list[RowBlock]:
    """How the rows of x [..., V] are laid out in memory; `gaps=False` forbids matrices with alien rows."""
    return _split(x, (), 0, gaps)


def like(x: Tensor, blocks: list[RowBlock], *, fake: bool = False) -> Tensor:
    """An uninitialised tensor like x that `blocks` describe as well as they do x; `fake`: for tracing."""
    if any(block.gap for block in blocks):
        return x.new_empty_strided(x.shape, x.stride()) if fake else empty_strided(x)
    return x.new_empty(x.shape) if fake else empty_like(x)


def _split(x: Tensor, index: tuple[int, ...], start: int, gaps: bool) -> list[RowBlock]:
    count = math.prod(x.shape[:-1])  # numel() would make numbers of torch.compile's symbols
    if x.ndim <= 2 or count == 0 or x.is_contiguous() or _collapses(x):
        return [RowBlock(index, start, count, max(count, 1), 0)]
    if gaps and x.ndim == 3 and not index:
        _, length, vocab = x.shape
        outer, inner = x.stride(0), x.stride(1)
        if inner >= vocab and outer % inner == 0 and outer >= inner * length:
            return [RowBlock(index, start, count, length, outer // inner - length)]
    each = count // x.shape[0]
    return [block for i in range(x.shape[0]) for block in _split(x[i], (*index, i), start + i * each, gaps)]


def _collapses(x: Tensor) -> bool:
    """Whether the leading dimensions of x [..., V] step through memory as one."""
    return all(x.shape[d] == 1 or x.stride(d) == x.stride(d + 1) * x.shape[d + 1] for d in range(x.ndim - 2))
