"""Losses as text: formula and derivative, one line per value that is used more than once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from fastreward.language.derivative import gradients
from fastreward.language.graph import Graph, Level, Node, walk
from fastreward.language.ops import ATOM, OPS
from fastreward.language.terms import PairTerms, Terms, asked

if TYPE_CHECKING:
    from fastreward.language.define import Loss

_SIDES = ("chosen.", "rejected.")


def expression(node: Node) -> str:
    """One node as a formula."""
    return _write(node, {})[0]


def show(loss: Loss) -> str:
    """The loss, its reports and its derivative, as assignments."""
    t = loss.terms()
    value = loss.trace(t)
    wanted = [t.chosen.logprob, t.rejected.logprob] if isinstance(t, PairTerms) else [t.logprob, t.entropy]
    named = [("loss", value), *_derivatives(value, wanted)]
    given = ", ".join(f"{k}={'[B]' if k in loss.tensors else repr(v)}" for k, v in loss.parameters.items())
    return "\n".join([f"{loss.name}({given}){_assumed(t)}", *("  " + line for line in assignments(named))])


def _assumed(t: Terms | PairTerms) -> str:
    """The terms that the loss does without where they are not passed."""
    names = sorted(asked(t))
    return f" where {', '.join(names)} {'is' if len(names) == 1 else 'are'} passed" if names else ""


def assignments(named: Iterable[tuple[str, Node]]) -> list[str]:
    """`name = formula` lines; what occurs more than once comes first, under names of its own."""
    named = list(named)
    nodes = list(walk(n for _, n in named))
    uses = Counter(a.id for n in nodes for a in n.args)
    names: dict[int, str] = {}
    lines = []
    for node in nodes:
        if uses[node.id] > 1 and node.args:
            formula = _write(node, names)[0]
            names[node.id] = f"v{len(names) + 1}"
            lines.append(f"{names[node.id]} = {formula}")
    return lines + [f"{name} = {_write(node, names)[0]}" for name, node in named]


def _derivatives(value: Node, wanted: list[Node]) -> list[tuple[str, Node]]:
    """Of the sum of the losses, for each differentiable term that it depends on."""
    found = []
    for x, gradient in zip(wanted, gradients(value, wanted), strict=True):
        if gradient is not None:
            found.append((f"d/d {_write(x, {})[0]}", gradient))
    return found


def _write(node: Node, names: dict[int, str]) -> tuple[str, int]:
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


__all__ = ["Graph", "Terms", "assignments", "expression", "show"]
