"""Simplification rules by operator that change no value: each gives a simpler node, or None.

"drop(c, x)" below is where(c, 0, x): what derivatives of clips, maxima and where are made of. Drops are pushed
outwards and merged, so that a clipped gradient costs one select.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from fastreward.language.node import Node, Nodes, is_constant


def _drop(graph: Nodes, condition: Node, x: Node) -> Node:
    return graph.call("where", condition, 0.0, x)


def _as_drop(graph: Nodes, x: Node) -> tuple[Node, Node] | None:
    """(condition, value) where x is a drop, written either way round."""
    if x.op != "where":
        return None
    if is_constant(x.args[1], 0.0):
        return x.args[0], x.args[2]
    return (graph.call("not", x.args[0]), x.args[1]) if is_constant(x.args[2], 0.0) else None


def _add(graph: Nodes, x: Node, y: Node) -> Node | None:
    if is_constant(x, 0.0):
        return y
    if is_constant(y, 0.0):
        return x
    if y.op == "neg":
        return graph.call("sub", x, y.args[0])
    if x.op == "neg":
        return graph.call("sub", y, x.args[0])
    twice = _twice(graph, x) if x.id == y.id else None
    if twice is not None:
        return twice
    first, second = _as_drop(graph, x), _as_drop(graph, y)
    if first is not None and second is not None and first[1].id == second[1].id:
        merged = _alternatives(graph, first[0], second[0])
        if merged is not None:
            return _drop(graph, merged, first[1])
    return graph.find("add", y, x)


def _twice(graph: Nodes, x: Node) -> Node | None:
    """2 x where a constant factor takes the 2 in, which is exact (the derivative of half a square); else None."""
    if x.op == "constant" and x.value is not None:
        return graph.constant(2.0 * x.value)
    for a, b in (x.args, x.args[::-1]) if x.op == "mul" else ():
        twice = _twice(graph, a)
        if twice is not None:
            return graph.call("mul", twice, b)
    return None


def _alternatives(graph: Nodes, c: Node, d: Node) -> Node | None:
    """c & d for conditions of which one always holds, since a member p of one is negated in the other; else None.

    c = s | ~p | q and d = s | p | r: s is common, and what is left is p & q where r is empty (as in a clipped maximum).
    """
    left, right = ({m.id: m for m in _members(x)} for x in (c, d))
    for one, other in ((left, right), (right, left)):
        for p in list(one.values()):
            negated = graph.call("not", p)
            if negated.id not in other:
                continue
            shared = [m for m in one.values() if m.id in other]
            r = [m for m in one.values() if m.id not in other and m.id != p.id]
            q = [m for m in other.values() if m.id not in one and m.id != negated.id]
            rest = graph.call("and", p, _any(graph, q)) if not r else None
            if rest is None and not q:
                rest = graph.call("and", negated, _any(graph, r))
            if rest is not None:
                return graph.call("or", _any(graph, shared), rest)
    return None


def _any(graph: Nodes, conditions: Iterable[Node]) -> Node:
    result = graph.truth(0.0)
    for c in conditions:
        result = graph.call("or", result, c)
    return result


def _members(x: Node) -> Iterator[Node]:
    if x.op == "or":
        for a in x.args:
            yield from _members(a)
    else:
        yield x


def _sub(graph: Nodes, x: Node, y: Node) -> Node | None:
    if is_constant(y, 0.0):
        return x
    if is_constant(x, 0.0):
        return graph.call("neg", y)
    if y.op == "neg":
        return graph.call("add", x, y.args[0])
    return graph.constant(0.0) if x.id == y.id else None


def _mul(graph: Nodes, x: Node, y: Node) -> Node | None:
    for a, b in ((x, y), (y, x)):
        if is_constant(a, 0.0):
            return graph.constant(0.0)
        if is_constant(a, 1.0):
            return b
        if is_constant(a, -1.0):
            return graph.call("neg", b)
        dropped = _as_drop(graph, a) if a.level >= b.level else None  # a sequence's select stays the sequence's
        if dropped is not None:
            return _drop(graph, dropped[0], graph.call("mul", dropped[1], b))
    if x.op == "neg" and y.op == "neg":
        return graph.call("mul", x.args[0], y.args[0])
    found = graph.find("mul", y, x)
    return found if found is not None else _regroup(graph, x, y)


def _regroup(graph: Nodes, x: Node, y: Node) -> Node | None:
    """(a * b) * y as a * (b * y) where b * y is there already, or is known once a sequence while a is a token's."""
    for product, other in ((x, y), (y, x)):
        if product.op != "mul":
            continue
        for a, b in (product.args, product.args[::-1]):
            there = graph.find("mul", b, other)
            if there is None:
                there = graph.find("mul", other, b)
            if there is None and max(b.level, other.level) < a.level and not is_constant(b):
                there = graph.call("mul", b, other)
            if there is not None:
                return graph.plain("mul", a, there)  # as it is: regrouping it again would undo this
    return None


def _div(graph: Nodes, x: Node, y: Node) -> Node | None:
    if is_constant(y, 1.0):
        return x
    if is_constant(x, 0.0):
        return x
    if is_constant(y) and y.value and math.frexp(y.value)[0] in (0.5, -0.5):  # a power of two: exact
        return graph.call("mul", x, 1.0 / y.value)
    dropped = _as_drop(graph, x) if x.level >= y.level else None
    return None if dropped is None else _drop(graph, dropped[0], graph.call("div", dropped[1], y))


def _neg(graph: Nodes, x: Node) -> Node | None:
    if x.op == "neg":
        return x.args[0]
    if x.op == "sub":
        return graph.call("sub", x.args[1], x.args[0])
    dropped = _as_drop(graph, x)
    return None if dropped is None else _drop(graph, dropped[0], graph.call("neg", dropped[1]))


def _where(graph: Nodes, condition: Node, x: Node, y: Node) -> Node | None:
    if condition.op == "constant":
        return x if condition.value else y
    if x.id == y.id:
        return x
    if is_constant(x, 0.0):
        dropped = _as_drop(graph, y) if y.level >= condition.level else None
        return None if dropped is None else _drop(graph, graph.call("or", condition, dropped[0]), dropped[1])
    if is_constant(y, 0.0):
        return _drop(graph, graph.call("not", condition), x) if not is_constant(x) else None
    return graph.call("where", condition.args[0], y, x) if condition.op == "not" else None


def _clip(graph: Nodes, x: Node, low: Node, high: Node) -> Node | None:
    below, above = is_constant(low, -math.inf), is_constant(high, math.inf)
    if below and above:
        return x
    if below:
        return graph.call("minimum", x, high)
    return graph.call("maximum", x, low) if above else None


def _extreme(graph: Nodes, x: Node, y: Node) -> Node | None:
    return x if x.id == y.id else None


def _and(graph: Nodes, x: Node, y: Node) -> Node | None:
    for a, b in ((x, y), (y, x)):
        if a.op == "constant":
            return b if a.value else a
    return x if x.id == y.id else graph.find("and", y, x)


def _or(graph: Nodes, x: Node, y: Node) -> Node | None:
    for a, b in ((x, y), (y, x)):
        if a.op == "constant":
            return a if a.value else b
    return x if x.id == y.id else graph.find("or", y, x)


def _not(graph: Nodes, x: Node) -> Node | None:
    return x.args[0] if x.op == "not" else None


RULES: Final[dict[str, Callable[..., Node | None]]] = {
    "add": _add,
    "sub": _sub,
    "mul": _mul,
    "div": _div,
    "neg": _neg,
    "where": _where,
    "clip": _clip,
    "minimum": _extreme,
    "maximum": _extreme,
    "and": _and,
    "or": _or,
    "not": _not,
}
