"""Operators of the loss language as Triton source, one line per value."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

from fastreward.losses._graph import Level, Node
from fastreward.losses._ops import OPS

_FROM_TRITON = {"abs": "tl.abs", "sqrt": "tl.sqrt", "where": "tl.where"}
_CALL = re.compile(r"(?<![\w.])([A-Za-z_]\w*)\(")


class Formulas:
    """Writes nodes by their names."""

    def __init__(self, names: Mapping[int, str]) -> None:
        self.names = names

    def value(self, node: Node) -> str:
        """The node as an operand: its name, or the number it is."""
        return literal(node.value) if node.op == "constant" and node.value is not None else self.names[node.id]

    def line(self, node: Node, *, double: bool) -> str:
        """`name = operator(operands)`; double: of f64 values."""
        return f"{self.names[node.id]} = {self._formula(node, double)}"

    def token_function(self, name: str, roots: Iterable[Node], given: Iterable[Node]) -> tuple[list[str], list[Node]]:
        """A function from values of one token, in f32, to `roots`; its source and the nodes that are its parameters.

        given: nodes that are not computed in it besides TOKEN inputs: ROW, BATCH and SCALAR ones.
        """
        wanted = list({n.id: n for n in roots}.values())
        known = {n.id for n in given}
        nodes = list(_walk(wanted, known))
        inputs = [n for n in nodes if n.op == "input" or n.id in known]
        parameters = [n for n in inputs if n.op != "constant"]
        lines = [f"def {name}({', '.join(self.names[n.id] for n in parameters)}):"]
        lines.append('    """Of one token, or of as many as the arguments hold, in f32."""')
        lines += [f"    {self.scalar(n, 'tl.float32')}" for n in parameters if n.level == Level.SCALAR]
        lines += [f"    {self.line(n, double=False)}" for n in nodes if n.level == Level.TOKEN and n.op != "input"]
        return [*lines, f"    return {', '.join(self.value(n) for n in wanted)}"], parameters

    def scalar(self, node: Node, dtype: str) -> str:
        """A run-time number, in a kernel a f64 and under the interpreter a plain float, as a value of `dtype`."""
        name = self.names[node.id]
        return f"{name} = tl.full([], {name}, {dtype}){' != 0.0' if node.boolean else ''}"

    def _formula(self, node: Node, double: bool) -> str:
        args = [self.value(a) for a in operands(node)]
        if _cancels(node) and not double:
            return f"expm1_minus({args[0]})"
        if node.op in ("neg", "not"):
            return f"{'-' if node.op == 'neg' else '~'}{args[0]}"
        if node.op in ("minimum", "maximum"):
            return self._extreme(node, *args)
        if node.op == "where" and double and all(a.op == "constant" for a in node.args[1:]):
            args[1] = f"tl.full([], {args[1]}, tl.float64)"
        symbol = OPS[node.op].symbol
        if symbol is not None:
            return f"{args[0]} {symbol} {args[1]}"
        return f"{_FROM_TRITON.get(node.op, node.op)}({', '.join(args)})"

    def _extreme(self, node: Node, x: str, y: str) -> str:
        """A NaN of either side comes out; of a constant there is none."""
        sign = "<" if node.op == "minimum" else ">"
        if node.args[1].op == "constant":
            return f"tl.where({y} {sign} {x}, {y}, {x})"
        return f"tl.where({x} {sign} {y}, {x}, {y})" if node.args[0].op == "constant" else f"{node.op}({x}, {y})"


def operands(node: Node) -> tuple[Node, ...]:
    """The nodes that the node's line names."""
    return node.args[1:] if _cancels(node) else node.args


def called(source: str) -> set[str]:
    """Names of what the source calls."""
    return set(_CALL.findall(source))


def literal(value: float) -> str:
    """A number as source."""
    return repr(value) if math.isfinite(value) else f'float("{value}")'


def _cancels(node: Node) -> bool:
    """expm1(x) - x per token, which in f32 would lose the digits of a small one."""
    if node.op != "sub" or node.level != Level.TOKEN:
        return False
    return node.args[0].op == "expm1" and node.args[0].args[0].id == node.args[1].id


def _walk(roots: Iterable[Node], known: set[int]) -> Iterable[Node]:
    """As `walk`, by the operands of lines, not beyond what is known."""
    found: dict[int, Node] = {}
    waiting = list(roots)
    while waiting:
        node = waiting.pop()
        if node.id not in found:
            found[node.id] = node
            if node.id not in known:
                waiting.extend(operands(node))
    return (found[i] for i in sorted(found))
