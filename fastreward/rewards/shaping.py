"""Maps of rewards, element by element: plain torch, which does each in a pass or two, and differentiates it.

All take rewards of any shape and real dtype and give float32, or float64 where the rewards are float64 or integers. NaN
means "not scored" and stays NaN. Numbers may be 0-d tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid as _logsigmoid

from fastreward._arguments import check
from fastreward._arguments.arrays import accepts_arrays
from fastreward._arguments.numbers import Number, number


@accepts_arrays
def affine(rewards: Tensor, scale: Number = 1.0, shift: Number = 0.0) -> Tensor:
    """Scale * R + shift."""
    x = check.rewards("rewards", rewards)
    return x * number("scale", scale, x, check.finite) + number("shift", shift, x, check.finite)


@accepts_arrays
def clip(rewards: Tensor, low: Number | None = None, high: Number | None = None) -> Tensor:
    """R held within [low, high]; None: no bound. Gradient 0 beyond."""
    x = check.rewards("rewards", rewards)
    if low is not None:
        x = torch.where(x < (bound := number("low", low, x, check.finite)), bound, x)
    if high is not None:
        x = torch.where(x > (bound := number("high", high, x, check.finite)), bound, x)
    return x


@accepts_arrays
def sigmoid(rewards: Tensor, center: Number | Tensor = 0.0, scale: Number = 1.0) -> Tensor:
    """1 / (1 + e^-(scale (R - center))), bounded in (0, 1): PAR's map (arXiv 2502.18770).

    center: a number, or a tensor that is broadcast, such as reference rewards [B, 1] or [B, M].
    """
    return _centred(rewards, center, scale).sigmoid()


@accepts_arrays
def logsigmoid(rewards: Tensor, center: Number | Tensor = 0.0, scale: Number = 1.0) -> Tensor:
    """Log of `sigmoid`: linear far below the center, flat far above, so that a sum asks for every component.

    "Transforming and Combining Rewards" (arXiv 2402.00742).
    """
    return _logsigmoid(_centred(rewards, center, scale))


@accepts_arrays
def standardize(rewards: Tensor, mean: Number | Tensor, std: Number | Tensor, eps: Number = 1e-6) -> Tensor:
    """(R - mean) / (std + eps), with statistics that are given: those of a frozen reference policy, or running ones.

    mean, std: numbers, or tensors that are broadcast: [K] of components, [B] of prompts. With statistics of the group
    or the batch it is `group_advantages`.
    """
    x = check.rewards("rewards", rewards)
    divisor = _broadcast("std", std, x) + number("eps", eps, x, check.not_negative)
    return ((x - _broadcast("mean", mean, x)) / divisor).to(x.dtype)


@accepts_arrays
def tiers(scores: Tensor, bounds: Sequence[float] | Tensor, values: Sequence[float] | Tensor) -> Tensor:
    """A step function: values[k] where bounds[k - 1] <= score < bounds[k].

    Args:
        scores: any shape.
        bounds: [K], increasing.
        values: [K + 1]: below the first bound, between two, from the last one on. Gradients flow to them, none to the
            scores.
    """
    x = check.rewards("scores", scores)
    edges, steps = _vector("bounds", bounds, x), _vector("values", values, x)
    check.shape("values", steps, (edges.shape[0] + 1,), "one more than bounds")
    if check.values_checked(edges):
        before = torch.full_like(edges[:1], -torch.inf)
        check.every("bounds", edges.diff(prepend=before) > 0, edges, "bounds that increase")
    found = steps[torch.bucketize(x.detach(), edges.detach(), right=True)]
    return torch.where(x.isnan(), torch.nan, found)


@accepts_arrays
def ramp(x: Tensor, start: Number, end: Number, low: Number = 0.0, high: Number = 1.0) -> Tensor:
    """Linear from `low` at `start` to `high` at `end`, and constant outside; start < end."""
    x = check.rewards("x", x)
    first, last = number("start", start, x, check.finite), number("end", end, x, check.finite)
    if isinstance(first, float) and isinstance(last, float) and first >= last:
        raise ValueError(f"end: expected a number above start, {first}, got {last}")
    share = ((x - first) / (last - first)).clamp(0.0, 1.0)
    bottom, top = number("low", low, x, check.finite), number("high", high, x, check.finite)
    return bottom + (top - bottom) * share


@accepts_arrays
def overlong(
    lengths: Tensor, max_length: int, buffer: int, *, factor: Number = 1.0, floor: Number | None = -1.0
) -> Tensor:
    """DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13): 0 up to max_length - buffer, then falling to -factor.

    That of TRL (get_soft_overlong_punishment), which is never below -1. With floor=None it is verl's (DAPO reward
    manager), which goes on falling beyond max_length. The paper has 20480 and 4096.

    Args:
        lengths: tokens of each response, of any shape.
        max_length: where the penalty is -factor.
        buffer: tokens before that over which it grows; with a floor it may be 0.
        factor: its size at max_length.
        floor: the least value; None: none.
    """
    x = check.rewards("lengths", lengths).double()
    longest = check.whole("max_length", max_length, "tokens")
    width = check.whole("buffer", buffer, "tokens")
    if width < (least := 0 if floor is not None else 1):
        raise ValueError(f"buffer: expected at least {least}, got {width}")
    exceed = (x - (longest - width)).clamp(min=0.0)
    share = (exceed / width).clamp(max=torch.finfo(x.dtype).max)  # finite without a buffer too, so that 0 of it is 0
    penalty = torch.where(exceed == 0, 0.0, -share * number("factor", factor, x, check.not_negative))
    if floor is not None:
        penalty = penalty.clamp(min=number("floor", floor, x, check.finite))
    return penalty.float()


@accepts_arrays
def denoise(
    rewards: Tensor,
    *,
    false_positive: Number | Tensor,
    false_negative: Number | Tensor,
    method: Literal["backward", "forward"] = "backward",
) -> Tensor:
    """Rewards of a verifier that errs, corrected for how often it does (arXiv 2510.00915).

    backward: (R - fp) / (1 - fp - fn), whose expectation is the true reward; forward: R - (1 - fn), which has the
    direction of the clean policy gradient and needs fn alone. Both are affine in R: with one pair of rates for all, a
    group's mean and standard deviation undo them; they act without that, or with rates per prompt.

    Args:
        rewards: of the verifier, in {0, 1}.
        false_positive: fp = P(R = 1 | wrong), a number or a tensor that is broadcast.
        false_negative: fn = P(R = 0 | right); fp + fn below 1.
        method: as above.
    """
    check.choice("method", method, ("backward", "forward"))
    x = check.rewards("rewards", rewards)
    fp, fn = _rate("false_positive", false_positive, x), _rate("false_negative", false_negative, x)
    if method == "forward":
        return (x - (1.0 - fn)).to(x.dtype)
    kept = 1.0 - fp - fn
    if isinstance(kept, float):
        if kept <= 0:
            raise ValueError(f"false_positive, false_negative: expected a sum below 1, got {1.0 - kept}")
    elif check.values_checked(kept):
        check.every("false_positive + false_negative", kept > 0, 1.0 - kept, "sums below 1")
    return ((x - fp) / kept).to(x.dtype)


# ------------------------------------------------------------------------------------------------------------ arguments
def _centred(rewards: Tensor, center: Number | Tensor, scale: Number) -> Tensor:
    x = check.rewards("rewards", rewards)
    return (number("scale", scale, x, check.finite) * (x - _broadcast("center", center, x))).to(x.dtype)


def _broadcast(name: str, value: Number | Tensor, like: Tensor) -> Number | Tensor:
    """A number, or a tensor that torch broadcasts against `like`."""
    if not isinstance(value, Tensor) or value.ndim == 0:
        return number(name, value, like, check.finite)
    check.same_device(name, value, "the rewards", like)
    return check.rewards(name, value)


def _rate(name: str, value: Number | Tensor, like: Tensor) -> Number | Tensor:
    rate = _broadcast(name, value, like)
    if isinstance(rate, float) and not 0.0 <= rate < 1.0:
        raise ValueError(f"{name}: expected a rate in [0, 1), got {rate}")
    return rate


def _vector(name: str, values: Sequence[float] | Tensor, like: Tensor) -> Tensor:
    """[K], in the dtype and on the device of `like`."""
    x = values if isinstance(values, Tensor) else torch.tensor(list(values), dtype=like.dtype)
    if x.ndim != 1:
        raise ValueError(f"{name}: expected a list of numbers, or a tensor [K], got shape {list(x.shape)}")
    return x.to(device=like.device, dtype=like.dtype)
