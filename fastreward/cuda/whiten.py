"""Raw functions of whiten on CUDA tensors. The kernels: csrc/cuda/whiten.cu."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from fastreward.cuda._launch import countable, counter, launch, multiprocessors, pack

_SOURCE: Final = "whiten"
# As in the source.
_THREADS: Final = 256
_CHUNK: Final = 4096


def forward(x: Tensor, mask: Tensor | None, shift_mean: bool, ddof: int, eps: float, out: Tensor) -> None:
    """(x - mean) * rsqrt(var + eps) (+ mean unless shift_mean) on the valid positions, 0 elsewhere, into out."""
    affine = torch.empty(3, dtype=torch.float64, device=x.device)
    _statistics(x, mask, affine, shift_mean, ddof, eps)
    apply(x, mask, affine, out)


def statistics(x: Tensor, mask: Tensor | None) -> Tensor:
    """(count, mean, sum of squared deviations) of the valid positions, f64 [3]."""
    return _statistics(x, mask, None, True, 0, 0.0)


def apply(x: Tensor, mask: Tensor | None, affine: Tensor, out: Tensor) -> None:
    """(x - affine[0]) * affine[1] + affine[2] on the valid positions, 0 elsewhere; affine f64 [3]; out may be x."""
    count = x.numel()
    if count == 0:
        return
    mask, kind = countable(mask)
    arguments = pack(x, count, mask, kind, affine, out)
    launch(_SOURCE, "whiten_apply", -(-count // _CHUNK), _THREADS, arguments, x.device)


def _statistics(
    x: Tensor, mask: Tensor | None, affine: Tensor | None, shift_mean: bool, ddof: int, eps: float
) -> Tensor:
    chunks = -(-x.numel() // _CHUNK)
    mask, kind = countable(mask)
    moments = torch.empty((chunks, 3), dtype=torch.float64, device=x.device)
    result = torch.empty(3, dtype=torch.float64, device=x.device)
    arguments = pack(
        x, x.numel(), mask, kind, chunks, moments, result, affine, int(shift_mean), ddof, float(eps),
        counter(x.device),
    )  # fmt: skip
    grid = max(1, min(chunks, 8 * multiprocessors(x.device)))
    launch(_SOURCE, "whiten_statistics", grid, _THREADS, arguments, x.device)
    return result
