"""Masked whitening in float64 torch: the truth."""

from __future__ import annotations

import torch
from torch import Tensor


def whiten(
    x: Tensor, mask: Tensor | None = None, *, shift_mean: bool = True, ddof: int = 1, eps: float = 1e-8
) -> Tensor:
    """(x - mean) * rsqrt(var + eps) over the counted positions, in float64; 0 elsewhere. Shapes any, equal."""
    counted = torch.ones_like(x, dtype=torch.bool) if mask is None else mask != 0
    values = x.double()[counted]
    mean = values.mean()
    variance = ((values - mean) ** 2).sum() / (values.numel() - ddof)
    white = (x.double() - mean) * torch.rsqrt(variance + eps)
    return torch.where(counted, white if shift_mean else white + mean, 0.0)
