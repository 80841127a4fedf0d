"""Reverse-mode derivative of a graph, as nodes of the same graph.

A value that is broadcast (a sequence's to its tokens, the batch's to its sequences) gets the sum of what comes back, so
a loss with reductions has a gradient with reductions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final

from fastreward.language.functions import exp, sigmoid, sign, where
from fastreward.language.graph import Level, Node, walk

Rule = Callable[[Node, Node], Iterator[tuple[int, Callable[[], Node]]]]


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
        for index, contribution in _RULES.get(node.op, _none)(node, upstream):
            arg = node.args[index]
            if arg.id in depends:
                there = adjoint.get(arg.id)
                here = _summed(node, contribution(), arg)
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


def _none(_: Node, __: Node) -> Iterator[tuple[int, Callable[[], Node]]]:
    yield from ()


def _one(derivative: Callable[[Node, Node, Node], Node]) -> Rule:
    """Rule of an operator of one argument from (node, argument, upstream)."""

    def rule(y: Node, g: Node) -> Iterator[tuple[int, Callable[[], Node]]]:
        yield 0, lambda: derivative(y, y.args[0], g)

    return rule


def _add(y: Node, g: Node) -> Iterator[tuple[int, Callable[[], Node]]]:
    yield 0, lambda: g
    yield 1, lambda: g


def _sub(y: Node, g: Node) -> Iterator[tuple[int, Callable[[], Node]]]:
    yield 0, lambda: g
    yield 1, lambda: -g


def _mul(y: Node, g: Node) -> Iterator[tuple[int, Callable[[], Node]]]:
    yield 0, lambda: g * y.args[1]
    yield 1, lambda: g * y.args[0]


def _div(y: Node, g: Node) -> Iterator[tuple[int, Callable[[], Node]]]:
    yield 0, lambda: g / y.args[1]
    yield 1, lambda: -(g * y / y.args[1])


def _minimum(y: Node, g: Node) -> Iterator[tuple[int, Callable[[], Node]]]:
    yield 0, lambda: where(y.args[0] > y.args[1], 0.0, g)
    yield 1, lambda: where(y.args[0] > y.args[1], g, 0.0)


def _maximum(y: Node, g: Node) -> Iterator[tuple[int, Callable[[], Node]]]:
    yield 0, lambda: where(y.args[0] < y.args[1], 0.0, g)
    yield 1, lambda: where(y.args[0] < y.args[1], g, 0.0)


def _clip(y: Node, g: Node) -> Iterator[tuple[int, Callable[[], Node]]]:
    x, low, high = y.args
    yield 0, lambda: where(y.graph.call("outside", x, low, high), 0.0, g)
    yield 1, lambda: where(x < low, g, 0.0)
    yield 2, lambda: where((x > high) & ~(x < low), g, 0.0)  # between bounds that are crossed the value is low


def _where(y: Node, g: Node) -> Iterator[tuple[int, Callable[[], Node]]]:
    yield 1, lambda: where(y.args[0], g, 0.0)
    yield 2, lambda: where(y.args[0], 0.0, g)


def _extreme(count: Callable[[Node], Node], gather: Callable[[Node, Node], Node] = lambda g, _: g) -> Rule:
    """Rule of a maximum or minimum over something: equals share the gradient; `count` counts them.

    gather: from the upstream gradient of all that the value was given to.
    """

    def rule(y: Node, g: Node) -> Iterator[tuple[int, Callable[[], Node]]]:
        def shared() -> Node:
            attained = y.args[0] == y
            return where(attained, gather(g, y) / count(where(attained, 1.0, 0.0)), 0.0)

        yield 0, shared

    return rule


def _reduced(op: str) -> Callable[[Node], Node]:
    return lambda x: x.graph.reduce(op, x)


def _after(y: Node, g: Node) -> Iterator[tuple[int, Callable[[], Node]]]:
    yield 0, lambda: y.graph.reduce("group_sum_after", _row(g, y), y.args[1])


def _before(y: Node, g: Node) -> Iterator[tuple[int, Callable[[], Node]]]:
    yield 0, lambda: y.graph.reduce("group_sum_before", _row(g, y), y.args[1])


def _group_sum(y: Node, g: Node) -> Iterator[tuple[int, Callable[[], Node]]]:
    # Only what counts adds to a group's sum, and only that gets a gradient: no sum over all members is wrong here.
    yield 0, lambda: _of_group(g, y)


def _of_group(g: Node, y: Node) -> Node:
    return y.graph.reduce("group_sum", _row(g, y))


def _group_sum_others(y: Node, g: Node) -> Iterator[tuple[int, Callable[[], Node]]]:
    yield 0, lambda: y.graph.reduce("group_sum_others", _row(g, y))


def _permute(y: Node, g: Node) -> Iterator[tuple[int, Callable[[], Node]]]:
    yield 0, lambda: y.graph.reduce("batch_permute", _row(g, y), y.args[2], y.args[1])


def _row(g: Node, y: Node) -> Node:
    """A gradient once a row, also where it is the same for all; 0 where nothing counts, whose extremes are infinite."""
    return where(y.graph.counted(), g, 0.0)


_RULES: Final[dict[str, Rule]] = {
    "add": _add,
    "sub": _sub,
    "mul": _mul,
    "div": _div,
    "minimum": _minimum,
    "maximum": _maximum,
    "clip": _clip,
    "where": _where,
    "neg": _one(lambda y, x, g: -g),
    "abs": _one(lambda y, x, g: g * sign(x)),
    "sqrt": _one(lambda y, x, g: g * 0.5 / y),
    "exp": _one(lambda y, x, g: g * y),
    "expm1": _one(lambda y, x, g: g * exp(x)),
    "log": _one(lambda y, x, g: g / x),
    "log1p": _one(lambda y, x, g: g / (x + 1.0)),
    "tanh": _one(lambda y, x, g: g * (1.0 - y * y)),
    "sigmoid": _one(lambda y, x, g: g * (y * (1.0 - y))),
    "logsigmoid": _one(lambda y, x, g: g * sigmoid(-x)),
    "seq_sum": _one(lambda y, x, g: g),
    "batch_sum": _one(lambda y, x, g: g),
    "group_sum": _group_sum,
    "group_sum_others": _group_sum_others,
    "batch_permute": _permute,
    "group_sum_before": _after,
    "group_sum_after": _before,
    "seq_max": _extreme(_reduced("seq_sum")),
    "seq_min": _extreme(_reduced("seq_sum")),
    "group_max": _extreme(_reduced("group_sum"), _of_group),
    "group_min": _extreme(_reduced("group_sum"), _of_group),
    "batch_max": _extreme(_reduced("batch_sum")),
    "batch_min": _extreme(_reduced("batch_sum")),
}
