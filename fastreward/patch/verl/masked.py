"""verl.utils.torch_functional: sums, means and variance over a mask, and whitening, where nothing is differentiated."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from fastreward.patch.verl.batch import constants, flags, lengths
from fastreward.patch.verl.replacement import TORCH, NotServed, Replacement
from fastreward.returns import discounted_returns
from fastreward.whiten import whiten


def masked_sum(_: Any, values: Tensor, mask: Tensor, axis: Any = None) -> Tensor:
    """Over the tokens that count."""
    return _sum(values, _flags(values, mask), axis)


def masked_mean(_: Any, values: Tensor, mask: Tensor, axis: Any = None) -> Tensor:
    """The sum by their number, to which verl adds 1e-8."""
    there = _flags(values, mask)
    return _sum(values, there, axis) / (_count(there, axis) + 1e-8)


def masked_var(_: Any, values: Tensor, mask: Tensor, unbiased: bool = True) -> Tensor:
    """Mean squared distance from the mean, times n / (n - 1) where unbiased."""
    there = _flags(values, mask)
    n = _count(there, None)
    if unbiased and n < 2:
        raise NotServed  # an error
    mean = _sum(values, there, None) / (n + 1e-8)
    squares = _kept(values - mean, there).square_().sum()
    return squares / ((n - 1) if unbiased else (n + 1e-8))


def masked_whiten(_: Any, values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """(values - mean) * rsqrt(var + 1e-8) where mask is set, and 0 elsewhere, where verl computes on."""
    constants(values)
    return whiten(values, flags(mask, values), shift_mean=shift_mean)


def _flags(values: Tensor, mask: Tensor) -> Tensor:
    constants(values)
    if values.ndim != 2:
        raise NotServed
    return flags(mask, values)


def _kept(values: Tensor, there: Tensor) -> Tensor:
    """The values that count, 0 elsewhere, in memory of its own: a return that looks no token ahead."""
    return discounted_returns(values, there, gamma=0.0, masked_rewards="drop")


def _sum(values: Tensor, there: Tensor, axis: Any) -> Tensor:
    return torch.sum(_kept(values, there), axis)


def _count(there: Tensor, axis: Any) -> Tensor:
    if axis is None:
        return lengths(there).sum()
    return lengths(there) if axis in (-1, 1) else there.sum(axis)


_MASKED: Final = ("values", "mask", "axis")

REPLACEMENTS: Final = tuple(
    Replacement(f"{TORCH}.{name}", parameters, ours, what, "passes over the tokens without copies of them")
    for name, parameters, ours, what in (
        ("masked_sum", _MASKED, masked_sum, "fastreward.discounted_returns"),
        ("masked_mean", _MASKED, masked_mean, "fastreward.discounted_returns"),
        ("masked_var", ("values", "mask", "unbiased"), masked_var, "fastreward.discounted_returns"),
        ("masked_whiten", ("values", "mask", "shift_mean"), masked_whiten, "fastreward.whiten"),
    )
)
