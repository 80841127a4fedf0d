"""Distance of a result from the truth."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_ROWS = 8
_TINY = 1e-30  # underflow to 0 in the result's dtype is no error of the kernel


def sampled_rows(count: int, device: torch.device) -> Tensor:
    """A few row indices from the first to the last of `count`."""
    return torch.linspace(0, max(count - 1, 0), min(_ROWS, count), dtype=torch.float64, device=device).long()


def distance(got: Tensor, want: Tensor, of_gradient: bool = False) -> float:
    """Largest error of got, in units of what matters.

    Values: absolute for entries within 1, relative beyond. Gradients: relative to the largest entry, absolute where all
    are 0. NaN and infinities have to be where the truth has them, else the distance is infinite.
    """
    if got.shape != want.shape:
        return math.inf
    if want.numel() == 0:
        return 0.0
    got, want = got.detach().double().to(want.device), want.detach().double()
    finite = want.isfinite()
    strange = (got == want) | (got.isnan() & want.isnan())
    if not bool((finite & got.isfinite() | ~finite & strange).all()):
        return math.inf
    magnitude = want[finite].abs()
    if magnitude.numel() == 0:
        return 0.0
    largest = float(magnitude.max())
    scale = magnitude.clamp(min=max(largest, _TINY) if of_gradient and largest else 1.0)
    return float(((got[finite] - want[finite]).abs() / scale).max())
