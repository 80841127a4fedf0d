"""Masked whitening: zero mean and unit variance over the valid positions."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.arrays import accepts_arrays
from fastreward._arguments.numbers import Number, joined, number, split
from fastreward._runtime.custom_op import custom_op
from fastreward._runtime.dispatch import implementation, select
from fastreward._runtime.masks import count_valid
from fastreward._runtime.memory import empty_like
from fastreward.distributed.ranks import Ranks, refused_together

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@custom_op("whiten_", mutates_args=("out",))
def _whiten_(
    x: Tensor | None,  # None: out itself, as an op may not see one tensor twice, one of them mutated
    mask: Tensor | None,
    shift_mean: bool,
    ddof: int,
    eps: float,
    given_eps: Tensor | None,  # f64 []: instead of it, where the host does not know it
    out: Tensor,
    backend: str,
) -> None:
    _forward(out if x is None else x, mask, shift_mean, ddof, joined(eps, given_eps, backend), out, backend)
    torch.autograd.graph.increment_version(out)


@_whiten_.register_fake
def _(*_: Any) -> None:
    return None


@custom_op("whiten")
def _whiten(
    x: Tensor,
    mask: Tensor | None,
    shift_mean: bool,
    ddof: int,
    eps: float,
    given_eps: Tensor | None,
    backend: str,
) -> Tensor:
    out = empty_like(x)
    _forward(x, mask, shift_mean, ddof, joined(eps, given_eps, backend), out, backend)
    return out


@_whiten.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


def _forward(
    x: Tensor, mask: Tensor | None, shift_mean: bool, ddof: int, eps: Number, out: Tensor, backend: str
) -> None:
    kernels = implementation("whiten", backend)
    if isinstance(eps, Tensor):
        count, mean, squares = kernels.statistics(x, mask)
        kernels.apply(x, mask, _affine(count, mean, squares, shift_mean, ddof, eps), out)
    else:
        kernels.forward(x, mask, shift_mean, ddof, eps, out)


def _affine(count: Tensor, mean: Tensor, squares: Tensor, shift_mean: bool, ddof: int, eps: Number) -> Tensor:
    """Coefficients that `apply` uses for each element, f64 [3]."""
    variance = torch.where(count > ddof, squares / (count - ddof), math.inf) + eps
    scale = torch.where(variance == 0, 0.0, torch.rsqrt(variance))  # 0 / 0 is 0
    return torch.stack([mean, scale, torch.zeros_like(mean) if shift_mean else mean])


@accepts_arrays
@refused_together
def whiten(
    x: Tensor,
    mask: Tensor | None = None,
    *,
    shift_mean: bool = True,
    ddof: int = 1,
    eps: Number = 1e-8,
    process_group: ProcessGroup | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """(x - mean) * rsqrt(var + eps) over the valid positions, 0 elsewhere (verl, TRL `masked_whiten`).

    Args:
        x: float32 [B, T] (or any shape; rows run along the last dimension), finite where valid. float16 and bfloat16
            are converted, exactly.
        mask: the shape of x, bool, integer or float; nonzero = counts.
        shift_mean: False keeps the mean: only the variance is normalised.
        ddof: 1 divides the squared deviations by count - 1 (Bessel), 0 by count.
        eps: added to the variance; a number or a 0-d tensor. May be 0: where nothing differs from the mean, x - mean
            stays 0.
        process_group: mean and variance are over all ranks, which may have different shapes, or nothing at all (three
            numbers of each cross, never an element).
        out: where the result goes, contiguous; may be x itself.

    Returns:
        float32 in the shape of x. Statistics are two-pass in float64. x is a constant.

    Raises:
        TypeError, ValueError: wrong dtype, shape or device, an `x` or `out` that needs a gradient, an `out` that
            overlaps a part of x; on the CPU also for a mask that counts fewer than ddof + 1 and for values that are not
            finite (over a process group on every rank).
    """
    check.dtype("x", check.tensor("x", x), (torch.float32, torch.float16, torch.bfloat16))
    mask = check.mask(mask, "x", x)
    x = x if x.dtype == torch.float32 else x.float()
    ddof, shift_mean = check.whole("ddof", ddof, "the divisor is count - ddof"), check.flag("shift_mean", shift_mean)
    eps = number("eps", eps, x, check.not_negative)
    source = check.constant("x", x).contiguous()
    inplace = out is not None and _check_out(out, x, source)
    backend = select("whiten", x)
    if process_group is not None:
        return _whiten_across(source, mask, shift_mean, ddof, eps, Ranks.of(process_group), out, backend)
    if check.values_checked(x):
        check_counted(x.numel() if mask is None else count_valid(mask), ddof)
        if backend != "cpu":  # which finds it in the statistics
            check.counted_finite("x", source, mask)
    if out is None:
        white: Tensor = _whiten(source, mask, shift_mean, ddof, *split(eps), backend)
        return white
    _whiten_(None if inplace else source, mask, shift_mean, ddof, *split(eps), out, backend)
    return out


def _check_out(out: Tensor, x: Tensor, source: Tensor) -> bool:
    """Whether `out` is `source`, the memory of a contiguous x."""
    check.output("whiten", "out", out, x, "x")
    if torch.compiler.is_compiling():  # a traced tensor has no address
        return out is x
    distance = abs(out.data_ptr() - source.data_ptr())
    if 0 < distance < out.nbytes:
        raise ValueError("out: expected x itself or memory of its own, got memory that overlaps a part of x")
    return distance == 0


def check_counted(counted: int, ddof: int) -> None:
    """That so many positions have a variance."""
    if counted < ddof + 1:
        raise ValueError(f"mask: expected at least {ddof + 1} counted positions for ddof={ddof}, got {counted}")


def _whiten_across(
    x: Tensor,
    mask: Tensor | None,
    shift_mean: bool,
    ddof: int,
    eps: Number,
    ranks: Ranks,
    out: Tensor | None,
    backend: str,
) -> Tensor:
    """Whitening with the statistics of every rank, merged in rank order (Chan's pairwise update)."""
    kernels = implementation("whiten", backend)
    ranks.meet(same={"shift_mean": shift_mean, "ddof": ddof, "eps": eps})
    gathered = ranks.gather(kernels.statistics(x, mask))
    count, mean, squares = gathered[0]
    for other_count, other_mean, other_squares in gathered[1:]:
        total = (count + other_count).clamp(min=1)
        delta = other_mean - mean
        squares = squares + other_squares + delta * delta * count * other_count / total
        mean = mean + delta * other_count / total
        count = count + other_count
    if check.values_checked(x):  # the same on every rank, so that none is left waiting
        check_counted(int(count), ddof)
        if not math.isfinite(squares):
            check.counted_finite("x", x, mask)
            raise ValueError("x: expected finite values where mask is set, got others on another rank")
    affine = _affine(count, mean, squares, shift_mean, ddof, eps)
    result = empty_like(x) if out is None else out
    kernels.apply(x, mask, affine, result)
    torch.autograd.graph.increment_version(result)
    return result
