"""Fresh CPU outputs: large ones get memory that an earlier one has left, because page faults cost more than kernels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LARGE = 8 << 20  # bytes; below, malloc keeps what is freed


def empty(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """An uninitialised contiguous tensor."""
    if torch.compiler.is_compiling():  # a graph's memory is for the compiler to plan
        return torch.empty(shape, dtype=dtype, device=device)
    count = math.prod(shape)
    if count * dtype.itemsize < _LARGE or torch.device(device).type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    from fastreward import _core

    return torch.frombuffer(_core.KeptMemory(count * dtype.itemsize), dtype=dtype).view(shape)


def empty_like(x: Tensor) -> Tensor:
    """An uninitialised contiguous tensor of x's shape, dtype and device."""
    return empty(x.shape, x.dtype, x.device)


def empty_strided(x: Tensor) -> Tensor:
    """An uninitialised tensor of x's shape, strides, dtype and device; the memory between its elements is its own."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    return empty((extent,), x.dtype, x.device).as_strided(x.shape, x.stride())
