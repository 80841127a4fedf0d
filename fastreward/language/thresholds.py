"""Thresholds over the batch, taken out of a loss: a call has them before its program runs, and passes them in.

A program of its own makes the values, per token; the threshold is selected from these, and the loss's program reads
both: so what is compared with a threshold is the very number that it was selected from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from fastreward.language.graph import Graph
from fastreward.language.node import Level, Node, walk
from fastreward.language.ops import THRESHOLDS
from fastreward.language.program import Program, copied, program

#: Names of the inputs that stand for values and thresholds, before their number.
VALUES: Final = "thresholded."
SELECTED: Final = "threshold."


@dataclass(frozen=True, eq=False)
class Threshold:
    """program: its output are the values per token, its batch value is the bound. values, name: inputs by these names
    stand for the values and the threshold; they are read by the programs of later thresholds and by the loss's. share:
    of the largest, not of a mean."""

    program: Program
    side: int
    values: str
    name: str
    share: bool

    def bound(self, scalars: Sequence[float]) -> float | None:
        """The bound in float64 where the host knows it."""
        (bound,) = self.program.batch
        if bound.op == "constant":
            return bound.value
        known = {n.id: x for n, x in zip(self.program.scalars, scalars, strict=True)}
        return known.get(bound.id)


def without_thresholds(roots: Sequence[Node], sides: int) -> tuple[list[Node], tuple[Threshold, ...]]:
    """The nodes with inputs where there were thresholds, and these in the order in which they are computed."""
    nodes = list(walk(roots))
    found = [n for n in nodes if n.op in THRESHOLDS]
    if not found:
        return list(roots), ()
    graph = Graph(sides)
    thresholds: list[Threshold] = []
    numbers = {x: k for k, x in enumerate(dict.fromkeys(n.args[0].id for n in found))}
    values: dict[int, Node] = {}  # what is compared, as it is computed
    copy: dict[int, Node] = {}
    for n in nodes:
        args = [copy[a.id] for a in n.args]
        if n.op in THRESHOLDS:
            x = n.args[0]
            own, name = f"{VALUES}{numbers[x.id]}", f"{SELECTED}{len(thresholds)}"
            made = program([values[x.id]], [args[1]], sides)
            thresholds.append(Threshold(made, x.side, own, name, n.op == "batch_largest"))
            copy[n.id] = graph.input(name, Level.BATCH)
            continue
        copy[n.id] = copied(graph, n, args)
        if n.id in numbers:
            values[n.id] = copy[n.id]
            copy[n.id] = graph.input(f"{VALUES}{numbers[n.id]}", Level.TOKEN, n.side)
    return [copy[n.id] for n in roots], tuple(thresholds)


def given(name: str) -> bool:
    """Whether an input of this name is a call's, not a threshold's."""
    return not name.startswith((VALUES, SELECTED))
