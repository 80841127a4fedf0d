"""Shared parts of the recipes on tokens: checked constants, and values of a response from those of its tokens.

What lies under a mask is replaced before anything is computed of it, so it never matters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastreward._arguments import check


def token_values(name: str, x: Tensor, mask: Tensor | None, mask_name: str = "mask") -> Tensor:
    """`x` as a constant, float32, 0 where the mask is; finite where it counts."""
    x = check.constant(name, check.floats(name, x))
    mask = check.mask(mask, name, x, mask_name)
    if check.values_checked(x):
        check.counted_finite(name, x, mask)
    return x if mask is None else torch.where(mask != 0, x, 0.0)


def beside(name: str, x: Tensor, reference: str, like: Tensor, mask: Tensor | None) -> Tensor:
    """The same of another argument with the shape and device of `like`."""
    check.shape(name, check.tensor(name, x), like.shape, f"as {reference}")
    check.same_device(name, x, reference, like)
    return token_values(name, x, mask)


def per_response(name: str, x: Tensor, reference: str, like: Tensor) -> Tensor:
    """[B] float32, a constant, finite: one for each row of `like`."""
    x = check.constant(name, check.reals(name, x))
    check.shape(name, x, like.shape[:1], "one per response")
    check.same_device(name, x, reference, like)
    if check.values_checked(x):
        check.every(name, x.isfinite(), x, "finite numbers")
    return x


def on_tokens(name: str, x: Tensor, reference: str, like: Tensor, mask: Tensor | None) -> Tensor:
    """Values per response [B], or of the shape of `like`, on its tokens; 0 under the mask."""
    if like.ndim == 2 and check.tensor(name, x).ndim == 1:
        x = per_response(name, x, reference, like).unsqueeze(-1).expand(like.shape)
        return x if mask is None else torch.where(mask != 0, x, 0.0)
    return beside(name, x, reference, like, mask)
