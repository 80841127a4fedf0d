"""Several rewards of each response, [B, K], to one, [B]: plain torch, differentiable.

NaN means "not scored": such a component is left out, and a row without any is NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.arrays import accepts_arrays
from fastreward._arguments.numbers import Number, number, stacked

Combination = Literal["sum", "mean", "min", "max", "product", "geometric-mean", "mean-minus-variance"]


@accepts_arrays
def combine(
    rewards: Tensor,
    op: Combination = "sum",
    *,
    weights: Tensor | Sequence[float] | None = None,
    smoothing: Number = 0.0,
    penalty: Number = 0.1,
    ddof: int = 1,
) -> Tensor:
    """One reward from several, over the components that were scored.

    sum, mean, product: with weights sum w R, sum w R / sum w, prod R^w. min, max: WCO, the worst case, and the best.
    geometric-mean: prod (R + smoothing)^(1/n), with weights prod (R + smoothing)^(w / sum w): near 0 where any is, as
    "all of these must hold" wants it. mean-minus-variance: UWO, mean - penalty * var (arXiv 2310.02743).

    Args:
        rewards: [B, K], or [..., K].
        op: as above. product and geometric-mean are for rewards of at least 0 (less smoothing).
        weights: [K], for sum, mean, product and geometric-mean.
        smoothing: of the geometric mean.
        penalty: of the variance: 0.1 in the paper's PPO, 0.5 in its best-of-n.
        ddof: of the variance: 1 in the code's PPO, 0 in its best-of-n. A variance over no more than ddof is 0.

    Returns:
        [B] ([...]); NaN where nothing was scored. Gradients flow to the rewards and the weights.
    """
    check.choice("op", op, get_args(Combination))
    x = _components(rewards)
    there = ~x.isnan()
    if weights is not None and op not in ("sum", "mean", "product", "geometric-mean"):
        raise ValueError(f"weights: {op!r} has none")
    w = torch.where(there, 1.0 if weights is None else component_weights(weights, x), 0.0)
    count = there.sum(-1)
    result = _combined(x, there, w, count, op, number("smoothing", smoothing, x, check.not_negative))
    if op == "mean-minus-variance":
        result = result - number("penalty", penalty, x, check.finite) * _variance(x, there, count, result, ddof)
    return torch.where(count > 0, result, torch.nan)


def _combined(x: Tensor, there: Tensor, w: Tensor, count: Tensor, op: Combination, smoothing: float | Tensor) -> Tensor:
    if op in ("min", "max"):
        neutral = torch.inf if op == "min" else -torch.inf
        filled = torch.where(there, x, neutral)
        return filled.amin(-1) if op == "min" else filled.amax(-1)
    if op == "product":
        return (torch.where(there, x, 1.0) ** w).prod(-1)
    total = torch.where(count > 0, w.sum(-1), 1.0)
    if op == "geometric-mean":
        shares = w / total.unsqueeze(-1)
        return (torch.where(there, x + smoothing, 1.0) ** shares).prod(-1)
    weighted = (w * torch.where(there, x, 0.0)).sum(-1)
    return weighted if op == "sum" else weighted / total


def _variance(x: Tensor, there: Tensor, count: Tensor, mean: Tensor, ddof: int) -> Tensor:
    off = torch.where(there, x - mean.unsqueeze(-1), 0.0)
    freedom = count - check.whole("ddof", ddof, "the divisor is count - ddof")
    return torch.where(freedom > 0, off.square().sum(-1) / freedom.clamp(min=1), 0.0)


@accepts_arrays
def gate(rewards: Tensor, gates: Tensor, threshold: Number | Tensor = 0.5, *, otherwise: Number = 0.0) -> Tensor:
    """R where gates >= threshold, else `otherwise`: a reward that counts only where something else holds.

    Args:
        rewards: any shape.
        gates: what it is broadcast with, of any real dtype; a veto is a gate. NaN: not scored, and then R is NaN too.
        threshold: a number, or a tensor that is broadcast.
        otherwise: what an unscored-for reward is.
    """
    x, open_ = check.rewards("rewards", rewards), check.rewards("gates", gates)
    check.same_device("gates", open_, "rewards", x)
    bound = threshold if isinstance(threshold, Tensor) else number("threshold", threshold, x, check.finite)
    closed = torch.where(open_.isnan(), x.new_full((), torch.nan), number("otherwise", otherwise, x, check.finite))
    return torch.where(open_ >= bound, x, closed.to(x.dtype))


@accepts_arrays
def priority_gate(rewards: Tensor, thresholds: Sequence[float] | Tensor) -> Tensor:
    """G-RA's gate (arXiv 2508.10548): a component counts where all that stand before it are above their thresholds.

    Args:
        rewards: [B, K], by falling priority.
        thresholds: [K - 1] (or [K], whose last is not used): component j opens what follows where
            R_j > threshold_j. One that was not scored does not open.

    Returns:
        [B, K]: R, 0 behind a closed gate; `combine` adds them up.
    """
    x = _components(rewards)
    bounds = component_weights(thresholds, x[..., :-1], "thresholds", spare=True)
    opened = (x[..., :-1] > bounds).long().cumprod(-1) != 0
    first = torch.ones_like(x[..., :1], dtype=torch.bool)
    return torch.where(torch.cat([first, opened], -1), x, 0.0)


@accepts_arrays
def pareto_mask(rewards: Tensor) -> Tensor:
    """Which rows no other dominates: bool [B]. A row dominates one that it is nowhere below and somewhere above.

    rewards: [B, K]; a row with a component that was not scored neither dominates nor is kept. Time B^2 K, memory B K
    times a few hundred.
    """
    x = _components(rewards).detach()
    if x.ndim != 2:
        raise ValueError(f"rewards: expected [B, K], got shape {list(x.shape)}")
    scored = ~x.isnan().any(-1)
    kept = []
    for begin in range(0, len(x), 256):
        rows = x[begin : begin + 256]
        others = x.unsqueeze(0)
        above, below = others > rows.unsqueeze(1), others < rows.unsqueeze(1)
        dominated = above.any(-1) & ~below.any(-1) & scored  # a NaN is neither above nor below
        kept.append(~dominated.any(-1))
    return torch.cat(kept) & scored if kept else scored


# ------------------------------------------------------------------------------------------------------------ arguments
def _components(rewards: Tensor) -> Tensor:
    x = check.rewards("rewards", rewards)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"rewards: expected [B, K] with at least one component, got shape {list(x.shape)}")
    return x


def component_weights(
    values: Tensor | Sequence[float], like: Tensor, name: str = "weights", *, spare: bool = False
) -> Tensor:
    """[K], one for each component of `like`, finite; thresholds, with `spare`: one more or none, infinities too."""
    x = values if isinstance(values, Tensor) else stacked(name, values, like, check.not_nan if spare else check.finite)
    if x.dtype.is_complex:
        raise TypeError(f"{name}: expected real numbers, got {str(x.dtype).removeprefix('torch.')}")
    if check.values_checked(x):
        good = ~x.isnan() if spare else x.isfinite()
        check.every(name, good, x.detach(), "no NaN" if spare else "finite numbers")
    components = like.shape[-1]
    if spare and x.ndim == 1 and x.shape[0] == components + 1:
        x = x[:components]
    check.shape(name, x, (components,), "one per component")
    return x.to(device=like.device, dtype=like.dtype)
