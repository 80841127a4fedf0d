"""Masked whitening in float64 torch: the truth."""

from __future__ import annotations

import torch
from torch import Tensor


def whiten(
    x: Tensor, mask: Tensor | None = None, *, shift_mean: bool = True, ddof: int = 1, eps: float = 1e-8
) -> Tensor:
    """(x - mean) * rsqrt(var + eps) over the valid positions, in float64; 0 elsewhere. Shapes any, equal.

    0 / 0 is 0, and without degrees of freedom the variance is infinite.
    """
    counted = torch.ones_like(x, dtype=torch.bool) if mask is None else mask != 0
    values = x.double()[counted]
    mean = values.mean() if values.numel() else values.new_zeros(())
    freedom = values.numel() - ddof
    variance = ((values - mean) ** 2).sum() / freedom + eps if freedom > 0 else torch.full_like(mean, torch.inf)
    scale = torch.where(variance == 0, 0.0, torch.rsqrt(variance))
    white = (x.double() - mean) * scale
    return torch.where(counted, white if shift_mean else white + mean, 0.0)


def forward(x: Tensor, mask: Tensor | None, shift_mean: bool, ddof: int, eps: float, out: Tensor) -> None:
    """Raw form of `whiten`, into `out` (which may be `x`)."""
    out.copy_(whiten(x, mask, shift_mean=shift_mean, ddof=ddof, eps=eps))


def statistics(x: Tensor, mask: Tensor | None) -> Tensor:
    """(count, mean, sum of squared deviations) of the valid positions, f64 [3]."""
    counted = torch.ones_like(x, dtype=torch.bool) if mask is None else mask != 0
    values = x.double()[counted]
    mean = values.mean() if values.numel() else values.new_zeros(())
    count = torch.full_like(mean, values.numel())
    return torch.stack([count, mean, ((values - mean) ** 2).sum()])


def apply(x: Tensor, mask: Tensor | None, affine: Tensor, out: Tensor) -> None:
    """(x - affine[0]) * affine[1] + affine[2] on the valid positions, 0 elsewhere; affine f64 [3]."""
    white = (x.double() - affine[0]) * affine[1] + affine[2]
    out.copy_(white if mask is None else torch.where(mask != 0, white, 0.0))
