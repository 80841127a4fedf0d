"""Losses of a critic, for `value_loss`: the distance of values from returns, with PPO's clip.

v = value, R = returns. The clip holds v within old_value +- clip and takes the larger of the two losses, so that a
value which has moved further than that from where the rollouts saw it is only ever pulled back.
"""

from __future__ import annotations

from fastreward.language.define import define
from fastreward.language.functions import abs, clip, minimum, stop_gradient, where
from fastreward.language.node import Node
from fastreward.language.terms import Terms
from fastreward.losses._rules import check_value

__all__ = ["huber", "squared"]


def _gap(t: Terms, bound: float | None) -> Node:
    """v - R, or that of the clipped value where it is the larger; reports where. Both losses grow with its size.

    Where the clipped value's is the larger it lies on a bound, which no gradient moves.
    """
    whole = t.value - t.returns
    if bound is None:
        return whole
    clipped = stop_gradient(clip(t.value, t.old_value - bound, t.old_value + bound)) - t.returns
    larger = abs(clipped) > abs(whole)
    t.report(clip_fraction=larger)
    return where(larger, clipped, whole)


@define(check=check_value)
def squared(t: Terms, clip: float | None = 0.2) -> Node:
    """PPO's value loss: max((v - R)^2, (clip(v, old_value - clip, old_value + clip) - R)^2) / 2.

    clip: None does not clip, and reads no old_value. Where both are equal the gradient is that of (v - R)^2.

    PPO as OpenAI's baselines have it. Verified in code: verl core_algos.py `compute_value_loss`, OpenRLHF
    models/loss.py `ValueLoss`. Aggregation: token-mean.
    """
    gap = _gap(t, clip)
    return 0.5 * (gap * gap)


@define(check=check_value)
def huber(t: Terms, clip: float | None = 0.2, delta: float = 1.0) -> Node:
    """The same with Huber's loss, which is e^2 / 2 where |e| <= delta and delta (|e| - delta / 2) beyond, e = v - R.

    Huber 1964, torch's huber_loss; the clip is PPO's. Aggregation: token-mean.
    """
    gap = abs(_gap(t, clip))
    inside = minimum(gap, delta)
    return inside * (gap - 0.5 * inside)
