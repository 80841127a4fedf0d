"""Masked whitening: zero mean and unit variance over the counted positions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastreward import _check
from fastreward._arrays import accepts_arrays
from fastreward._dispatch import implementation, select
from fastreward._memory import empty_like
from fastreward._op import custom_op

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_MASK_DTYPES = (torch.bool, torch.uint8, torch.int32, torch.int64, torch.float32)


@custom_op("whiten_", mutates_args=("out",))
def _whiten_(
    x: Tensor, mask: Tensor | None, shift_mean: bool, ddof: int, eps: float, out: Tensor, backend: str
) -> None:
    implementation("whiten", backend).forward(x, mask, shift_mean, ddof, eps, out)
    torch.autograd.graph.increment_version(out)


@_whiten_.register_fake
def _(x: Tensor, mask: Tensor | None, shift_mean: bool, ddof: int, eps: float, out: Tensor, backend: str) -> None:
    return None


@custom_op("whiten")
def _whiten(x: Tensor, mask: Tensor | None, shift_mean: bool, ddof: int, eps: float, backend: str) -> Tensor:
    out = empty_like(x)
    implementation("whiten", backend).forward(x, mask, shift_mean, ddof, eps, out)
    return out


@_whiten.register_fake
def _(x: Tensor, mask: Tensor | None, shift_mean: bool, ddof: int, eps: float, backend: str) -> Tensor:
    return torch.empty_like(x)


@accepts_arrays
def whiten(
    x: Tensor,
    mask: Tensor | None = None,
    *,
    shift_mean: bool = True,
    ddof: int = 1,
    eps: float = 1e-8,
    process_group: ProcessGroup | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """(x - mean) * rsqrt(var + eps) over the counted positions, 0 elsewhere (verl, TRL `masked_whiten`).

    Args:
        x: float32 [B, T] (or any shape; rows run along the last dimension).
        mask: the shape of x, bool, uint8, int32, int64 or float32; nonzero = counts.
        shift_mean: False keeps the mean: only the variance is normalised.
        ddof: 1 divides the squared deviations by count - 1 (Bessel), 0 by count.
        eps: added to the variance.
        process_group: mean and variance are over all ranks (24 bytes cross, never an element).
        out: where the result goes; may be x itself.

    Returns:
        float32 in the shape of x. Statistics are two-pass in float64. A constant: no gradient flows to x.

    Raises:
        TypeError, ValueError: wrong dtype or shape; on the CPU also for a mask that counts fewer than ddof + 1.
    """
    _check.dtype("x", _check.tensor("x", x), (torch.float32,))
    if mask is not None:
        _check.dtype("mask", _check.tensor("mask", mask), _MASK_DTYPES)
        _check.shape("mask", mask, x.shape, "as x")
        _check.same_device("mask", mask, "x", x)
        mask = mask.contiguous()
    if out is not None:
        _check.dtype("out", _check.tensor("out", out), (torch.float32,))
        _check.shape("out", out, x.shape, "as x")
        if not out.is_contiguous():
            raise ValueError("out: expected a contiguous tensor")
    source = x.detach().contiguous()
    backend = select("whiten", x)
    if process_group is not None:
        return _whiten_across(source, mask, shift_mean, ddof, eps, process_group, out, backend)
    if _check.values_checked(x):
        counted = x.numel() if mask is None else int(mask.count_nonzero())
        if counted < ddof + 1:
            raise ValueError(f"mask: expected at least {ddof + 1} counted positions for ddof={ddof}, got {counted}")
    if out is None:
        white: Tensor = _whiten(source, mask, shift_mean, ddof, eps, backend)
        return white
    if out.data_ptr() == source.data_ptr():  # in place: the op may not see one tensor twice, one of them mutated
        implementation("whiten", backend).forward(source, mask, shift_mean, ddof, eps, out.detach())
    else:
        _whiten_(source, mask, shift_mean, ddof, eps, out, backend)
    return out


def _whiten_across(
    x: Tensor,
    mask: Tensor | None,
    shift_mean: bool,
    ddof: int,
    eps: float,
    group: ProcessGroup,
    out: Tensor | None,
    backend: str,
) -> Tensor:
    """Whitening with the statistics of every rank, merged in rank order (Chan's pairwise update)."""
    kernels = implementation("whiten", backend)
    mine = kernels.statistics(x, mask)
    gathered = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(gathered, mine, group=group)
    count, mean, squares = gathered[0]
    for other_count, other_mean, other_squares in gathered[1:]:
        total = (count + other_count).clamp(min=1)
        delta = other_mean - mean
        squares = squares + other_squares + delta * delta * count * other_count / total
        mean = mean + delta * other_count / total
        count = count + other_count
    scale = torch.rsqrt(squares / (count - ddof) + eps)
    affine = torch.stack([mean, scale, torch.zeros_like(mean) if shift_mean else mean])
    result = empty_like(x) if out is None else out
    kernels.apply(x, mask, affine, result)
    return result
