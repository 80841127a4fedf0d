"""Pieces of C++: nodes of the loss language in f32 (per token) and f64 (per sequence), statements, functions."""

from __future__ import annotations

import math
import struct
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Final, Literal

from fastreward.language.node import Node, walk
from fastreward.language.ops import ATOM, OPS

Real = Literal["float", "double"]
#: C++ for a node that is there already, and whether reading it costs something; None for one that is to be computed.
Given = Callable[[Node], tuple[str, bool] | None]

#: Longer expressions get a name even where they are used once.
_WIDE: Final = 72
#: Lines that are longer are wrapped.
_LONGEST: Final = 120


def literal(value: float, real: Real) -> str:
    """A number in C++."""
    if real == "float":
        value = _as_f32(value)
    if math.isfinite(value):
        return _shortest(value, real) + ("f" if real == "float" else "")
    text = "not_a_number()" if math.isnan(value) else "infinity()" if value > 0 else "negative_infinity()"
    return text if real == "float" else f"double({text})"


def _as_f32(value: float) -> float:
    try:
        return float(struct.unpack("f", struct.pack("f", value))[0])
    except OverflowError:
        return math.copysign(math.inf, value)


def _shortest(value: float, real: Real) -> str:
    """The fewest digits that mean this very number, with a point or an exponent."""
    text = repr(value)
    if real == "float":
        text = repr(next(x for x in (float(f"{value:.{n}g}") for n in range(1, 10)) if _as_f32(x) == value))
    text = text.removesuffix(".0")
    return text if "." in text or "e" in text else f"{text}."


class Block:
    """Statements that compute nodes: what is used more than once, or is long, gets a name; the rest is written inline.

    real: the type of numbers. given: what is there already; what costs something is read once. name: what to call a
    node. roots: what will be asked for.
    """

    def __init__(
        self,
        real: Real,
        given: Given,
        name: Callable[[Node], str],
        roots: Iterable[Node],
    ) -> None:
        self.lines: list[str] = []
        self._real, self._given, self._name = real, given, name
        self._texts: dict[int, tuple[str, int]] = {}  # and how tightly they bind
        roots = list(roots)
        computed = (n for n in walk(roots, self._to_compute) if self._to_compute(n))
        self._uses = Counter([a.id for n in computed for a in n.args] + [n.id for n in roots])

    def value(self, node: Node) -> str:
        """An expression for `node`; the statements that it needs are in `lines`."""
        for n in walk([node], lambda n: n.id not in self._texts and self._to_compute(n)):
            if n.id not in self._texts:
                self._texts[n.id] = self._write(n)
        return self._texts[node.id][0]

    def _to_compute(self, node: Node) -> bool:
        return self._given(node) is None

    def _write(self, node: Node) -> tuple[str, int]:
        there = self._given(node)
        if there is not None:
            text, once = there
            name_it = once and self._uses[node.id] > 1
            binding = 6 if text.startswith("-") else ATOM
        else:
            text, binding = self._operator(node)
            name_it = self._uses[node.id] > 1 or len(text) > _WIDE
        if not name_it:
            return text, binding
        name = self._name(node)
        self.lines.append(f"const {'bool' if node.boolean else self._real} {name} = {text};")
        return name, ATOM

    def _operator(self, node: Node) -> tuple[str, int]:
        spec, parts = OPS[node.op], [self._texts[a.id] for a in node.args]
        if spec.symbol is not None:
            symbol, binding = spec.cuda or spec.symbol, spec.binds
            if spec.arity == 1:
                return f"{symbol}{_wrapped(parts[0], binding + 1)}", binding
            # Operands of && and || get parentheses if they are && or || themselves: compilers warn, readers stumble.
            left, right = {1: (3, 3), 2: (3, 3), 3: (4, 4)}.get(binding, (binding, binding + 1))
            return f"{_wrapped(parts[0], left)} {symbol} {_wrapped(parts[1], right)}", binding
        call = spec.cuda or f"{node.op}({', '.join(f'{{{k}}}' for k in range(spec.arity))})"
        f = "f" if self._real == "float" else ""
        return call.format(*(text for text, _ in parts), f=f, real=self._real), ATOM


def _wrapped(part: tuple[str, int], least: int) -> str:
    text, binding = part
    return text if binding >= least else f"({text})"


# ------------------------------------------------------------------------------------------------------------- text
def truth(node: Node, text: str) -> str:
    """What was stored as a number, as what it is."""
    return f"({text} != 0.)" if node.boolean else text


def kind_of(node: Node) -> Literal["sum", "max", "min"]:
    """What a reduction is; a count is a sum."""
    return "max" if node.op.endswith("_max") else "min" if node.op.endswith("_min") else "sum"


def in_order(nodes: Iterable[Node]) -> list[Node]:
    """Sums, then maxima, then minima, as program.cuh's Reductions wants them."""
    return sorted(nodes, key=lambda n: _KINDS.index(kind_of(n)))


def kinds(nodes: Iterable[Node]) -> str:
    """The arguments of Reductions for these."""
    count = Counter(map(kind_of, nodes))
    return ", ".join(str(count[kind]) for kind in _KINDS)


def joined(target: str, node: Node, x: str) -> str:
    """The statement by which x joins the reduction `node` in `target`."""
    kind = kind_of(node)
    return f"{target} += {x};" if kind == "sum" else f"{target} = {kind}imum({target}, {x});"


def function(signature: str, body: Iterable[str], *, member: bool = False) -> list[str]:
    """A device function; `member`: static, in a struct."""
    lines = [f"{'static ' if member else ''}__device__ __forceinline__ {signature} {{", *indented(body), "}"]
    return indented(lines) if member else lines


def wrapped(text: str) -> str:
    """Text whose statements are on as many lines as they need; comments stay as they are."""
    return "\n".join(part for line in text.split("\n") for part in _parts(line))


def _parts(line: str) -> list[str]:
    if len(line) <= _LONGEST or "//" in line:
        return [line]
    indent = " " * (len(line) - len(line.lstrip()) + 4)
    return textwrap.wrap(line, _LONGEST, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def indented(lines: Iterable[str]) -> list[str]:
    """One level further in."""
    return [f"  {line}" for line in lines]


_KINDS: Final = ("sum", "max", "min")
