"""Where the gradient goes at the ties and bounds of every operator: rules written out, and their check on a backend."""

from __future__ import annotations

from collections.abc import Callable

import torch

import fastreward as fr
from fastreward import losses
from fastreward.language.node import Node
from fastreward.losses import abs, clip, maximum, minimum, relu, sign, where

BELOW, TIE, ABOVE = (-1.0, -0.5), (-1.0, -1.0), (-1.0, -2.0)  # (x, y) of a token

#: f(x, y) and, by (x, y), its derivative for x. Every number is exact in float32, and so is every sum of two.
RULES: dict[str, tuple[Callable[[Node, Node], Node], dict[tuple[float, float], float]]] = {
    "minimum, of the first": (lambda x, y: minimum(x, y), {BELOW: 1, TIE: 1, ABOVE: 0}),
    "minimum, of the second": (lambda x, y: minimum(y, x), {BELOW: 1, TIE: 0, ABOVE: 0}),
    "maximum, of the first": (lambda x, y: maximum(x, y), {BELOW: 0, TIE: 1, ABOVE: 1}),
    "maximum, of the second": (lambda x, y: maximum(y, x), {BELOW: 0, TIE: 0, ABOVE: 1}),
    "clip, at its lower bound": (lambda x, y: clip(x, y, -0.25), {BELOW: 0, TIE: 1, ABOVE: 1}),
    "clip, at its upper bound": (lambda x, y: clip(x, -4.0, y), {BELOW: 1, TIE: 1, ABOVE: 0}),
    "clip, of no width": (lambda x, y: clip(x, y, y), {BELOW: 0, TIE: 1, ABOVE: 0}),
    "clip from below": (lambda x, y: clip(x, low=y), {BELOW: 0, TIE: 1, ABOVE: 1}),
    "clip from above": (lambda x, y: clip(x, high=y), {BELOW: 1, TIE: 1, ABOVE: 0}),
    "clip, of its lower bound": (
        lambda x, y: clip(y, 2 * x, 5.0),
        {(-1.0, -3.0): 2, (-1.0, -2.0): 0, (-1.0, -1.0): 0, (-1.0, 5.0): 0, (-1.0, 6.0): 0},
    ),
    "clip, of its upper bound": (
        lambda x, y: clip(y, -5.0, 2 * x),
        {(-1.0, -1.0): 2, (-1.0, -2.0): 0, (-1.0, -3.0): 0, (-1.0, -5.0): 0, (-1.0, -6.0): 0},
    ),
    "clip, of both bounds": (
        lambda x, y: clip(y, 2 * x, 0.5 * x),
        {(-1.0, -3.0): 2, (-1.0, -2.0): 0, (-1.0, -1.0): 0, (-1.0, -0.5): 0, (-1.0, 0.0): 0.5},
    ),
    # Below the lower bound is asked first: between bounds that are crossed the value is the lower one.
    "clip, of bounds that are crossed": (
        lambda x, y: clip(y, 0.5 * x, 2 * x),
        {(-1.0, -3.0): 0.5, (-1.0, -2.0): 0.5, (-1.0, -1.0): 0.5, (-1.0, -0.5): 2, (-1.0, 0.0): 2},
    ),
    "abs": (lambda x, y: abs(x - y), {BELOW: -1, TIE: 0, ABOVE: 1}),
    "sign": (lambda x, y: x * sign(x - y), {BELOW: -1, TIE: 0, ABOVE: 1}),
    "relu": (lambda x, y: relu(x - y), {BELOW: 0, TIE: 1, ABOVE: 1}),
    "where <": (lambda x, y: where(x < y, 2 * x, 3 * x), {BELOW: 2, TIE: 3, ABOVE: 3}),
    "where <=": (lambda x, y: where(x <= y, 2 * x, 3 * x), {BELOW: 2, TIE: 2, ABOVE: 3}),
    "where >": (lambda x, y: where(x > y, 2 * x, 3 * x), {BELOW: 3, TIE: 3, ABOVE: 2}),
    "where >=": (lambda x, y: where(x >= y, 2 * x, 3 * x), {BELOW: 3, TIE: 2, ABOVE: 2}),
    "where ==": (lambda x, y: where(x == y, 2 * x, 3 * x), {BELOW: 3, TIE: 2, ABOVE: 3}),
    "where !=": (lambda x, y: where(x != y, 2 * x, 3 * x), {BELOW: 2, TIE: 3, ABOVE: 2}),
    "where &": (lambda x, y: where((x <= y) & (x >= y), 2 * x, 3 * x), {BELOW: 3, TIE: 2, ABOVE: 3}),
    "where |": (lambda x, y: where((x < y) | (x > y), 2 * x, 3 * x), {BELOW: 2, TIE: 3, ABOVE: 2}),
    "where ~": (lambda x, y: where(~(x < y), 2 * x, 3 * x), {BELOW: 3, TIE: 2, ABOVE: 2}),
    "where, of one branch": (lambda x, y: where(x < y, x * y, 0.0), {BELOW: -0.5, TIE: 0, ABOVE: 0}),
    "where, of the other": (lambda x, y: where(x < y, 0.0, x * y), {BELOW: 0, TIE: -1, ABOVE: -2}),
    "where, of a number": (lambda x, y: where(x - y, 2 * x, 3 * x), {BELOW: 2, TIE: 3, ABOVE: 2}),
    # Equal ones share: half of the gradient to each.
    "seq_max": (lambda x, y: losses.seq_max(x) + 0 * y, {(-1.0, 0.0): 1.5, (-1.0, 1.0): 1.5, (-2.0, 0.0): 0}),
    "seq_min": (lambda x, y: losses.seq_min(x) + 0 * y, {(-2.0, 0.0): 1.5, (-2.0, 1.0): 1.5, (-1.0, 0.0): 0}),
    "batch_max": (lambda x, y: losses.batch_max(x) + 0 * y, {(-1.0, 0.0): 1.5, (-1.0, 1.0): 1.5, (-2.0, 0.0): 0}),
    "batch_min": (lambda x, y: losses.batch_min(x) + 0 * y, {(-2.0, 0.0): 1.5, (-2.0, 1.0): 1.5, (-1.0, 0.0): 0}),
}


@losses.define(aggregation="token-sum", static=("rule",))
def at_ties(t, rule="abs"):  # type: ignore[no-untyped-def]
    return RULES[rule][0](t.logprob, t.old_logprob)


def tokens(rule: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x, y, wanted gradient), each [1, T] in float64."""
    rows = [(*token, gradient) for token, gradient in RULES[rule][1].items()]
    x, y, gradient = torch.tensor(rows, dtype=torch.float64).T
    return x[None], y[None], gradient[None]


def check_ties(rule: str, device: str = "cpu") -> None:
    """The gradient of policy_loss on the backend that is chosen."""
    x, y, wanted = (v.float().to(device) for v in tokens(rule))
    x.requires_grad_()
    fr.policy_loss(x, y, torch.ones_like(y), loss=at_ties(rule=rule)).loss.backward()
    assert x.grad is not None
    assert x.grad.tolist() == wanted.tolist(), rule
