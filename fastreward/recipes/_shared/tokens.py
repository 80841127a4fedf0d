"""Shared parts of the recipes on tokens: checked constants, and values of a response from those of its tokens.

What lies under a mask is replaced before anything is computed of it, so it never matters.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.tokens import token_bounds

#: What is made of the log-probs l of an answer's tokens: sum l, mean l, exp(sum l), exp(mean l), mean exp(l).
Score = Literal["sum", "mean", "prob", "geometric", "mean-prob"]
SCORES: tuple[Score, ...] = ("sum", "mean", "prob", "geometric", "mean-prob")
#: Tokens whose float64 copies stay in the cache.
_TOKENS = 1 << 17


def token_values(name: str, x: Tensor, mask: Tensor | None, mask_name: str = "mask") -> Tensor:
    """`x` as a constant, float32, 0 where the mask is; finite where it counts."""
    x = check.constant(name, check.floats(name, x))
    mask = check.mask(mask, name, x, mask_name)
    # A comparison of bools with a number is made of 64-bit copies of them.
    counted = x if mask is None else x.masked_fill(~mask if mask.dtype == torch.bool else mask == 0, 0.0)
    if check.values_checked(x) and not all(bound.isfinite() for bound in _bounds(counted)):
        check.counted_finite(name, x, mask)  # one pass finds whether, three where
    return counted


def _bounds(x: Tensor) -> tuple[Tensor, ...]:
    """Its least and largest value, NaN where one is NaN; none of nothing."""
    return tuple(x.aminmax()) if x.numel() else ()


def beside(name: str, x: Tensor, reference: str, like: Tensor, mask: Tensor | None) -> Tensor:
    """The same of another argument with the shape and device of `like`."""
    check.shape(name, check.tensor(name, x), like.shape, f"as {reference}")
    check.same_device(name, x, reference, like)
    return token_values(name, x, mask)


def rewards_of_tokens(name: str, x: Tensor, mask: Tensor | None) -> Tensor:
    """Rewards [B, T] of the argument `name`, constants, as `check.rewards` has them; finite where the mask counts."""
    x = check.constant(name, check.rewards(name, x))
    if x.ndim != 2:
        raise ValueError(f"{name}: expected shape [B, T], got {list(x.shape)}")
    mask = check.mask(mask, name, x)
    if check.values_checked(x):
        check.counted_finite(name, x, mask)
    return x


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


# ------------------------------------------------------------------------------------------------- of whole responses
def likelihood(
    name: str, logprobs: Tensor, mask: Tensor | None, score: Score, cu_seqlens: Tensor | None, mask_name: str = "mask"
) -> Tensor:
    """[B] float64: one of SCORES. Without a token a probability is 0, and a log-prob NaN."""
    check.choice("score", score, SCORES)
    x = token_values(name, logprobs, mask, mask_name)
    tokens = count(x, mask, name, cu_seqlens)
    if score == "mean-prob":
        return mean(x.double().exp(), mask, name, cu_seqlens).nan_to_num(0.0)
    value = total(x, name, cu_seqlens) / (1 if score in ("sum", "prob") else tokens)
    if score in ("sum", "mean"):
        return torch.where(tokens > 0, value, torch.nan)
    return torch.where(tokens > 0, value.exp(), 0.0)


def mean(x: Tensor, mask: Tensor | None, name: str, cu_seqlens: Tensor | None) -> Tensor:
    """[B] float64, over the tokens that count; NaN over none."""
    counted = x if mask is None else torch.where(mask != 0, x, 0.0)
    return total(counted, name, cu_seqlens) / count(x, mask, name, cu_seqlens)


def count(x: Tensor, mask: Tensor | None, name: str, cu_seqlens: Tensor | None) -> Tensor:
    """[B] float64: tokens that count."""
    return total(torch.ones_like(x) if mask is None else mask != 0, name, cu_seqlens)


def total(x: Tensor, name: str, cu_seqlens: Tensor | None) -> Tensor:
    """[B] float64: sums over the tokens of each row, in their order."""
    if cu_seqlens is None:
        if x.ndim != 2:
            raise ValueError(f"{name}: expected shape [B, T], or [N] with cu_seqlens, got {list(x.shape)}")
        return _row_sums(x)
    bounds = token_bounds(cu_seqlens, x, name)
    return torch.segment_reduce(x.double(), "sum", offsets=bounds, initial=0)


def _row_sums(x: Tensor) -> Tensor:
    """[B] float64 from [B, T]; on the CPU a few rows at a time, as torch copies to float64 what it adds up in it."""
    if not x.is_cpu or x.numel() <= _TOKENS or torch.compiler.is_compiling():
        return x.sum(-1, dtype=torch.float64)
    rows = max(1, _TOKENS // x.shape[1])
    return torch.cat([x[k : k + rows].sum(-1, dtype=torch.float64) for k in range(0, len(x), rows)])
