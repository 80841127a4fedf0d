"""Nodes as formulas that a person reads."""

from __future__ import annotations

from collections.abc import Mapping

from fastreward.language.node import Level, Node
from fastreward.language.ops import ATOM, OPS

_SIDES = ("chosen.", "rejected.")


def expression(node: Node, names: Mapping[int, str] | None = None) -> str:
    """One node as a formula; names: of what it reads, by id."""
    return _write(node, names or {})[0]


def _write(node: Node, names: Mapping[int, str]) -> tuple[str, int]:
    """(text, how tightly its outermost operator binds)."""
    if node.id in names:
        return names[node.id], ATOM
    if node.op == "constant":
        assert node.value is not None
        return (str(bool(node.value)) if node.boolean else f"{node.value:g}"), ATOM if node.value >= 0 else 4
    if node.op in ("parameter", "input"):
        side = _SIDES[node.side] if node.graph.sides == 2 and node.level == Level.TOKEN else ""
        return f"{side}{(node.name or '').removeprefix('parameter.')}", ATOM
    if node.op == "seq_count":
        return f"{_SIDES[node.side] if node.graph.sides == 2 else ''}length", ATOM
    spec = OPS.get(node.op)
    if spec is not None and spec.symbol is not None:
        first, *rest = (_write(a, names) for a in node.args)
        if not rest:
            return f"{spec.symbol}{_bracketed(first, spec.binds)}", spec.binds
        return f"{_bracketed(first, spec.binds)} {spec.symbol} {_bracketed(rest[0], spec.binds + 1)}", spec.binds
    return f"{node.op}({', '.join(_write(a, names)[0] for a in node.args)})", ATOM


def _bracketed(part: tuple[str, int], least: int) -> str:
    """An operand, in parentheses where it binds less than `least`."""
    text, binding = part
    return text if binding >= least else f"({text})"
