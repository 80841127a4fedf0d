"""Helpers of every launcher: the right device, a counter for the last program to arrive, arguments."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Final

import torch
from torch import Tensor

#: Compile options of every kernel. Multiply-adds are fused only where the source says `tl.fma`: what the compiler fuses
#: of its own accord differs between variants of a kernel, and a log-prob's bits must not depend on what else is asked.
OPTIONS: Final = {"enable_fp_fusion": False}


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device: make it that of `x`."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def arrival_counter(x: Tensor) -> Tensor:
    """i32 [1], zero: how many programs of a launch have stored their partial sums.

    The last program to arrive sets it back to zero, so one counter serves all launches of a call. It must not outlive
    the call, though keeping one would save its memset: torch.compile(mode="reduce-overhead") warms up, without
    capturing, in the memory of its CUDA graphs, where nothing may stay behind but outputs.
    """
    return torch.zeros(1, dtype=torch.int32, device=x.device)


def mask_bytes(mask: Tensor | None) -> Tensor | None:
    """A mask as u8, nonzero = valid: a kernel is compiled once for it, not once for each type that masks come in.

    Types of one byte are only called by another name; others are converted, in one more launch.
    """
    if mask is None or mask.dtype == torch.uint8:
        return mask
    return (mask if mask.dtype in (torch.bool, torch.int8) else mask != 0).view(torch.uint8)


def contiguous(x: Tensor | None) -> Tensor | None:
    """`x` contiguous: one value per row, small; a copy only where it is a strided view."""
    return None if x is None else x.contiguous()


def contiguous_rows(x: Tensor | None) -> Tensor | None:
    """`x` [N, K] with unit column stride and any row stride, 0 among them."""
    return x if x is None or x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()


def row_stride(x: Tensor | None) -> int:
    """Elements between rows of what `contiguous_rows` gives."""
    prepared = contiguous_rows(x)
    return 0 if prepared is None else prepared.stride(0)


def temperature_arguments(inv_temperature: Tensor | float) -> tuple[Tensor | float, int, bool]:
    """(pointer or number, stride, whether it is a pointer)."""
    if isinstance(inv_temperature, Tensor):
        return inv_temperature, inv_temperature.stride(0), True
    return min(max(float(inv_temperature), 1e-38), 3.4e38), 0, False  # a number goes as float32


def numbers(*values: float | Tensor) -> tuple[list[float], Tensor | None]:
    """(numbers for a kernel; f64 [n] that it reads in their place, where the host does not know all)."""
    tensors = [x for x in values if isinstance(x, Tensor)]
    known = [0.0 if isinstance(x, Tensor) else float(x) for x in values]
    if not tensors:
        return known, None
    return known, torch.stack([x if isinstance(x, Tensor) else tensors[0].new_full((), x) for x in values])


def load_width(x: Tensor) -> int:
    """Columns of x [N, V] per load: 16 bytes, or less where V is no multiple of that. Depends on V and dtype alone."""
    return math.gcd(x.shape[-1], 16 // x.element_size())


def in_units(stride: int, width: int) -> tuple[int, int]:
    """A stride as (multiple, unit), unit = width where that divides it: their product in a kernel proves alignment."""
    return (stride // width, width) if stride % width == 0 else (stride, 1)
