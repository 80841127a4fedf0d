"""Losses as text: formula and derivative, one line per value that is used more than once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from fastreward.language.derivative import gradients
from fastreward.language.formula import expression
from fastreward.language.node import Node, walk
from fastreward.language.terms import PairTerms, Terms, asked
from fastreward.language.traced import TracedLoss


def show(loss: TracedLoss) -> str:
    """The loss, its reports and its derivative, as assignments."""
    t = loss.terms()
    value = loss.trace(t)
    wanted = (
        [t.chosen.logprob, t.rejected.logprob]
        if isinstance(t, PairTerms)
        else [t.logprob, t.entropy, t.value, *t.differentiable.values()]
    )
    named = [("loss", value), *_derivatives(value, wanted)]
    return "\n".join([f"{head(loss)}{_assumed(t)}", *("  " + line for line in assignments(named))])


def head(loss: TracedLoss) -> str:
    """The loss's name with its parameters."""
    given = ", ".join(f"{k}={'[B]' if k in loss.tensors else repr(v)}" for k, v in loss.parameters.items())
    return f"{loss.name}({given})"


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
            formula = expression(node, names)
            names[node.id] = f"v{len(names) + 1}"
            lines.append(f"{names[node.id]} = {formula}")
    return lines + [f"{name} = {expression(node, names)}" for name, node in named]


def _derivatives(value: Node, wanted: list[Node]) -> list[tuple[str, Node]]:
    """Of the sum of the losses, for each differentiable term that it depends on."""
    found = []
    for x, gradient in zip(wanted, gradients(value, wanted), strict=True):
        if gradient is not None:
            found.append((f"d/d {expression(x)}", gradient))
    return found


__all__ = ["assignments", "head", "show"]
