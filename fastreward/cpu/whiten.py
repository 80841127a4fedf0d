"""CPU backend of `whiten`: torch tensors to pointers for csrc/cpu/whiten.cpp. Inputs are validated already."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastreward import _core
from fastreward._arguments import check
from fastreward._runtime.addresses import address, mask_arguments


def forward(x: Tensor, mask: Tensor | None, shift_mean: bool, ddof: int, eps: float, out: Tensor) -> None:
    """x f32 [..., T] contiguous, mask of its shape or None; writes the whitened x to `out`, which may be x.

    A value that is counted and not finite is seen in the statistics, before anything is written.
    """
    count, mean, squares = _statistics(x, mask)
    if not math.isfinite(squares):
        check.counted_finite("x", x, mask)
    freedom = count - ddof
    variance = squares / freedom if freedom > 0 else math.inf
    _apply(x, mask, mean, _rsqrt(variance + eps), 0.0 if shift_mean else mean, out)


def statistics(x: Tensor, mask: Tensor | None) -> Tensor:
    """(count, mean, sum of squared deviations) of the counted positions, f64 [3]."""
    return torch.tensor(_statistics(x, mask), dtype=torch.float64, device="cpu")


def apply(x: Tensor, mask: Tensor | None, affine: Tensor, out: Tensor) -> None:
    """(x - affine[0]) * affine[1] + affine[2] on the counted positions, 0 elsewhere; affine f64 [3]."""
    shift, scale, offset = affine.tolist()
    _apply(x, mask, shift, scale, offset, out)


def _statistics(x: Tensor, mask: Tensor | None) -> tuple[float, float, float]:
    columns = x.shape[-1] if x.ndim else 1
    rows = x.numel() // columns if columns else 0
    moments: tuple[float, float, float] = _core.whiten_statistics(
        x.data_ptr(), *mask_arguments(mask), rows, columns, torch.get_num_threads()
    )
    return moments


def _apply(x: Tensor, mask: Tensor | None, shift: float, scale: float, offset: float, out: Tensor) -> None:
    _core.whiten_apply(
        x.data_ptr(),
        *mask_arguments(mask),
        1,
        x.numel(),
        shift,
        scale,
        offset,
        address(out),
        torch.get_num_threads(),
    )


def _rsqrt(x: float) -> float:
    """1 / sqrt(x); 0 for 0, as then no value differs from the mean, and 0 / 0 is 0."""
    if x > 0.0:
        return 1.0 / math.sqrt(x)
    return 0.0 if x == 0.0 else math.nan
