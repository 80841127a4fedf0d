"""Pieces of C++: nodes of the loss language in f32 (per token) and f64 (per sequence), statements, functions."""

from __future__ import annotations

import math
import struct
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Final, Literal

from fastreward.language.gpu_plan import KINDS, kind_of
from fastreward.language.node import Node, walk
from fastreward.language.ops import ATOM, PREFIX
from fastreward.language.render import Part, operator

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
    node. roots: what will be asked for. together: a call that all threads make, of a node's operands; None for others.
    """

    def __init__(
        self,
        real: Real,
        given: Given,
        name: Callable[[Node], str],
        roots: Iterable[Node],
        together: Callable[[Node, list[str]], str | None] = lambda node, operands: None,
    ) -> None:
        self.lines: list[str] = []
        self._real, self._given, self._name, self._together = real, given, name, together
        self._texts: dict[int, Part] = {}
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

    def _write(self, node: Node) -> Part:
        there = self._given(node)
        if there is not None:
            text, once = there
            name_it = once and self._uses[node.id] > 1
            binding = PREFIX if text.startswith("-") else ATOM
        else:
            parts = [self._texts[a.id] for a in node.args]
            called = self._together(node, [text for text, _ in parts])
            if called is not None:
                self.lines.append(f"const {self._real} {self._name(node)} = {called};")
                return self._name(node), ATOM
            text, binding = operator(node.op, parts, "cuda", f="f" if self._real == "float" else "", real=self._real)
            name_it = self._uses[node.id] > 1 or len(text) > _WIDE
        if not name_it:
            return text, binding
        name = self._name(node)
        self.lines.append(f"const {'bool' if node.boolean else self._real} {name} = {text};")
        return name, ATOM


# ------------------------------------------------------------------------------------------------------------- text
def truth(node: Node, text: str) -> str:
    """Read a stored float back as a bool where the node is one."""
    return f"({text} != 0.)" if node.boolean else text


def kinds(nodes: Iterable[Node]) -> str:
    """The arguments of program.cuh's Reductions for these."""
    count = Counter(map(kind_of, nodes))
    return ", ".join(str(count[kind]) for kind in KINDS)


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
