"""Reverse-mode derivative of a graph, as nodes of the same graph.

A value that is broadcast (a sequence's to its tokens, the batch's to its sequences) gets the sum of what comes back, so
a loss with reductions has a gradient with reductions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from fastreward.language.node import Level, Node, walk
from fastreward.language.ops import OPS, Derivative, where


def gradients(y: Node, wrt: Sequence[Node], seed: Node | None = None) -> list[Node | None]:
    """dy/dx for each x of `wrt`, None where y does not depend on it (or only through stop_gradient).

    seed: upstream gradient of y, a node of at most y's level; 1 without it.
    """
    graph = y.graph
    order = list(walk([y]))
    depends = _dependents(order, wrt)
    adjoint: dict[int, Node] = {y.id: graph.constant(1.0) if seed is None else seed} if y.id in depends else {}
    for node in reversed(order):
        upstream = adjoint.get(node.id)
        if upstream is None or node.id not in depends:
            continue
        for arg, rule in zip(node.args, _rules(node.op), strict=False):
            if rule is not None and arg.id in depends:
                there = adjoint.get(arg.id)
                here = _summed(node, rule(upstream, node, *node.args), arg)
                adjoint[arg.id] = here if there is None else there + here
    return [adjoint.get(x.id) for x in wrt]


def _dependents(order: Sequence[Node], wrt: Sequence[Node]) -> set[int]:
    depends = {x.id for x in wrt}
    for node in order:
        if node.op != "stop_gradient" and any(a.id in depends for a in node.args):
            depends.add(node.id)
    return depends


def _summed(node: Node, x: Node, arg: Node) -> Node:
    """The contribution `x` of `node` to `arg`, summed over what `arg` was broadcast to."""
    level = node.level
    if level == Level.TOKEN and arg.level < Level.TOKEN:
        x = node.graph.reduce("seq_sum", x) if x.level == Level.TOKEN else x * node.graph.length(node.side)
        level = Level.SEQUENCE
    if level == Level.SEQUENCE and arg.level < Level.SEQUENCE:
        x = node.graph.reduce("batch_sum", _row(x, node))
    return x


def _row(g: Node, y: Node) -> Node:
    """A gradient once a sequence, also where it is the same for all; 0 for empty ones, whose extremes are infinite."""
    return where(y.graph.valid(), g, 0.0)


def _over(op: str) -> Derivative:
    """Of a sum over sequences: the sum, by `op`, of what comes back to each."""
    return lambda g, y, x, *keys: y.graph.reduce(op, _row(g, y), *keys)


def _extreme(over: str, *, of_group: bool = False) -> Derivative:
    """Of a maximum or minimum: equals share what comes back, of a group from all its members; `over` counts them."""

    def rule(g: Node, y: Node, x: Node) -> Node:
        attained = x == y
        total = _over("group_sum")(g, y, x) if of_group else g
        return where(attained, total / x.graph.reduce(over, where(attained, 1.0, 0.0)), 0.0)

    return rule


#: By argument, as in the operators' table. Only what counts adds to a group's sum, and only that gets a gradient.
_REDUCTIONS: Final[dict[str, Derivative]] = {
    "seq_sum": lambda g, y, x: g,
    "batch_sum": lambda g, y, x: g,
    "group_sum": _over("group_sum"),
    "group_sum_others": _over("group_sum_others"),
    "group_sum_before": _over("group_sum_after"),
    "group_sum_after": _over("group_sum_before"),
    "batch_permute": lambda g, y, x, source, target: y.graph.reduce("batch_permute", _row(g, y), target, source),
    "seq_max": _extreme("seq_sum"),
    "seq_min": _extreme("seq_sum"),
    "group_max": _extreme("group_sum", of_group=True),
    "group_min": _extreme("group_sum", of_group=True),
    "batch_max": _extreme("batch_sum"),
    "batch_min": _extreme("batch_sum"),
}


def _scan(back: str, shift: str, shift_back: str) -> tuple[Derivative, Derivative]:
    """Of y_t = x_t + c_t y_(t-1): the scan the other way round, each step by the c of the token that it comes from."""

    def returned(g: Node, y: Node, c: Node) -> Node:
        by = y.graph.along(shift_back, c) if c.level == Level.TOKEN else c
        return y.graph.along(back, g, by, side=y.side)

    return (
        lambda g, y, x, c: returned(g, y, c),
        lambda g, y, x, c: returned(g, y, c) * y.graph.along(shift, y),
    )


def _shift(back: str) -> tuple[Derivative]:
    return (lambda g, y, x: y.graph.along(back, g, side=y.side),)


_ALONG: Final[dict[str, tuple[Derivative | None, ...]]] = {
    "scan": _scan("scan_reverse", "shift", "shift_reverse"),
    "scan_reverse": _scan("scan", "shift_reverse", "shift"),
    "shift": _shift("shift_reverse"),
    "shift_reverse": _shift("shift"),
    "segment_sum": (lambda g, y, x, ids: y.graph.along("segment_sum", g, ids), None),
}


def _rules(op: str) -> tuple[Derivative | None, ...]:
    if op in OPS:
        return OPS[op].derivatives
    return _ALONG[op] if op in _ALONG else (_REDUCTIONS.get(op),)
