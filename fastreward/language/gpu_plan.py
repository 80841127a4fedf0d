"""How a program becomes launches on a GPU: what the last block computes in which phase, and what is kept in between.

One launch per pass over the tokens; the block (or program) of it that arrives last computes what is per sequence and
for the batch. It goes over the sequences in phases: a reduction over a group or the batch ends one, and the next may
use its result. Both GPU generators follow this plan.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final, Literal

from fastreward.language.node import Level, Node
from fastreward.language.ops import GROUP_REDUCTIONS, LEAVES, OPS, REDUCTIONS, SEQ_REDUCTIONS
from fastreward.language.program import Program, TokenStep

#: Reductions with one value for the batch, and those that give each sequence a value from others' (their arguments and
#: results lie in columns).
OVER_BATCH: Final = ("batch_sum", "batch_max", "batch_min")
CROSS_SEQUENCE: Final = (*GROUP_REDUCTIONS, "batch_permute")
#: Of the latter, those with one value per group.
BY_GROUP: Final = ("group_sum", "group_max", "group_min")
#: (launch, phase): when a value is first there for the loop over the sequences.
Time = tuple[int, int]

#: Operators of a value that is sooner computed again than read from a column, by Plan.in_columns.
_COMPUTED_AGAIN: Final = {False: 1, True: 3}

Kind = Literal["sum", "max", "min"]
KINDS: Final[tuple[Kind, ...]] = ("sum", "max", "min")


def kind_of(node: Node) -> Kind:
    """The kind of a reduction; a count is a sum."""
    return "max" if node.op.endswith("_max") else "min" if node.op.endswith("_min") else "sum"


def in_order(nodes: Iterable[Node]) -> list[Node]:
    """Sums, then maxima, then minima: how reductions that are made together lie."""
    return sorted(nodes, key=lambda n: KINDS.index(kind_of(n)))


@dataclass(frozen=True, eq=False)
class Launch:
    """Passes over the tokens of the sides (none: sequences only), then `nodes` in the last block.

    number: of the pass, from 1; 0: what comes before the first.
    """

    number: int
    steps: tuple[TokenStep, ...]
    nodes: tuple[Node, ...]


class Plan:
    """Launches of a program, and where values wait for later use.

    columns: of values per sequence that another phase or launch reads (f64 [columns, sequences]); cheap operators on
    such are computed again instead. totals: of batch values that another launch reads. ready: when operators' values
    are there; those that read inputs and scalars only have no entry and are computed wherever they are needed. stores:
    what a phase's loop writes to a column. permutation: a column more, for sequences' numbers while they are permuted.

    in_columns: whether passes leave their reductions in columns, those of a step one after the other, and what groups
    reduce to is there once per group (`copies`: columns per sequence of it); else phase 0 joins what passes leave.
    """

    def __init__(self, program: Program, *, in_columns: bool = False) -> None:
        self.program, self.in_columns = program, in_columns
        anywhere = _computed_anywhere(program.prologue)
        before = tuple(n for n in program.prologue if n.id not in anywhere)
        passes = (Launch(k, s.tokens, s.sequences) for k, s in enumerate(program.stages, 1))
        self.launches = (*([Launch(0, (), before)] if before else []), *passes)
        self.ready: dict[int, Time] = {}
        for k in range(len(self.launches)):
            self._time(k)
        self.columns: dict[int, int] = {}
        self.copies: dict[int, int] = {}
        self.totals: dict[int, int] = {}
        self.stores: dict[Time, list[Node]] = {}
        self.permutation: int | None = None
        self.known = program.nodes
        self._place()

    @property
    def width(self) -> int:
        """Columns in all."""
        return len(self.columns) + len(self.copies) + (self.permutation is not None)

    @property
    def last(self) -> int:
        """The last launch."""
        return len(self.launches) - 1

    # ------------------------------------------------------------------------------------------------- what and when
    def loop(self, node: Node) -> Time:
        """When the loop over the sequences computes `node`, or adds to it; phase -1: before the first loop."""
        launch, phase = self.ready[node.id]
        return launch, phase - (node.op in (*CROSS_SEQUENCE, *OVER_BATCH))

    def phases(self, k: int) -> int:
        """Phases of launch k."""
        own = [phase for launch, phase in self.ready.values() if launch == k]
        return 1 + max(own, default=0)

    def over_batch(self, time: Time) -> list[Node]:
        """Reductions over the batch that the loop of this phase feeds."""
        return in_order(n for n in self.launches[time[0]].nodes if n.op in OVER_BATCH and self.loop(n) == time)

    def cross_sequence(self, time: Time) -> list[Node]:
        """Reductions over groups and permutations that follow the loop of this phase."""
        return [n for n in self.launches[time[0]].nodes if n.op in CROSS_SEQUENCE and self.loop(n) == time]

    def batch(self, time: Time) -> list[Node]:
        """Batch values that are there when this phase begins, and were not before."""
        return [n for n in self.launches[time[0]].nodes if n.level == Level.BATCH and self.ready[n.id] == time]

    def outputs(self, time: Time) -> list[tuple[int, Node]]:
        """(index, node) of the outputs per sequence that this phase writes: as soon as they are there."""
        per_row = ((i, n) for i, n in enumerate(self.program.outputs) if n.level < Level.TOKEN)
        return [(i, n) for i, n in per_row if self._written(n) == time]

    def results(self, time: Time) -> list[tuple[int, Node]]:
        """(index, node) of the program's batch values that this phase writes."""
        return [(i, n) for i, n in enumerate(self.program.batch) if self._written(n) == time]

    def roots(self, time: Time) -> list[Node]:
        """Nodes that a phase computes for others to read."""
        written = [n for _, n in (*self.outputs(time), *self.results(time))]
        return [*(n.args[0] for n in self.over_batch(time)), *self.stores.get(time, []), *written, *self.batch(time)]

    # --------------------------------------------------------------------------------------------------------- where
    def column(self, node: Node, time: Time) -> int | None:
        """The column from which a phase (-1: a pass) reads the node; None where it computes it."""
        ready = self.ready.get(node.id)
        if ready is None or ready > time or node.level == Level.BATCH:
            return None
        computed = ready == time and node.op not in CROSS_SEQUENCE and not self._left_in_column(node)
        return None if computed else self.columns.get(node.id)

    def total(self, node: Node, time: Time) -> int | None:
        """The place from which a launch reads a batch value of an earlier one."""
        ready = self.ready.get(node.id)
        return None if ready is None or ready[0] >= time[0] else self.totals.get(node.id)

    def argument(self, node: Node) -> int:
        """The column that holds what a cross-sequence reduction reads, one value per sequence."""
        return self.copies[node.id] if node.id in self.copies else self.columns[node.id]

    # ------------------------------------------------------------------------------------------------------ planning
    def _time(self, k: int) -> None:
        """Fills `ready` for launch k."""
        launch = self.launches[k]
        phase = {n.id: 0 for step in launch.steps for n in step.reduce}
        for n in launch.nodes:
            arguments = (self._stored(a, phase) if n.op in CROSS_SEQUENCE else phase.get(a.id, 0) for a in n.args)
            phase[n.id] = max(arguments, default=0) + (n.op in REDUCTIONS)
        self.ready |= {i: (k, p) for i, p in phase.items()}

    def _stored(self, node: Node, phase: dict[int, int]) -> int:
        """The phase whose loop stores an argument of a cross-sequence reduction; -1: a column holds it already."""
        if not self.in_columns:
            return phase.get(node.id, 0)
        if self._left_in_column(node) or node.id in self.ready:
            return -1
        return phase.get(node.id, 0) - (node.op in CROSS_SEQUENCE and node.op not in BY_GROUP)

    def _left_in_column(self, node: Node) -> bool:
        return self.in_columns and node.op in SEQ_REDUCTIONS

    def _written(self, node: Node) -> Time:
        """When an output is written: as soon as it is there."""
        return self.ready.get(node.id, (self.last, 0))

    def _place(self) -> None:
        if self.in_columns:
            for n in (n for launch in self.launches for step in launch.steps for n in in_order(step.reduce)):
                self._keep(n, None)
        waiting: dict[int, Node] = {}
        for node, users in self._uses():
            ready = self.ready.get(node.id)
            if ready is None:
                continue
            if node.level == Level.BATCH and any(launch != ready[0] for launch, _ in users):
                self.totals[node.id] = len(self.totals)
            if node.level == Level.SEQUENCE and any(time != ready for time in users):
                waiting[node.id] = node
        most = _COMPUTED_AGAIN[self.in_columns]
        for _, node in sorted(waiting.items()):
            if self._cost(node, waiting) > most:
                self._keep(node, self.ready[node.id])
        cross_sequence = [n for launch in self.launches for n in launch.nodes if n.op in CROSS_SEQUENCE]
        for node in sorted(cross_sequence, key=self.loop):  # an argument there from the start: before its first use
            self._keep(node, None)
            for a in node.args:
                self._keep_argument(a, self.ready.get(a.id, self.loop(node)))
        if any(n.op == "batch_permute" for n in cross_sequence):
            self.permutation = self.width

    def _keep(self, node: Node, time: Time | None) -> None:
        """A column for `node`; written at `time`, or by the reduction that computes it."""
        if node.id not in self.columns:
            self.columns[node.id] = self.width
            if time is not None and node.op not in CROSS_SEQUENCE:
                self.stores.setdefault(time, []).append(node)

    def _keep_argument(self, node: Node, time: Time) -> None:
        if not (self.in_columns and node.op in BY_GROUP):
            self._keep(node, time)
        elif node.id not in self.copies:
            self.copies[node.id] = self.width
            self.stores.setdefault(time, []).append(node)

    def _cost(self, node: Node, waiting: dict[int, Node], *, argument: bool = False) -> float:
        """Operators that compute a value from what waits anyway; infinite where one is costly, or something is gone."""
        if argument and (node.id in waiting or node.id in self.columns or node.id not in self.ready):
            return 0
        if node.level == Level.BATCH or node.op not in OPS or OPS[node.op].costly:
            return math.inf
        return 1 + sum(self._cost(a, waiting, argument=True) for a in node.args)

    def _uses(self) -> Iterator[tuple[Node, list[Time]]]:
        """Each node that something reads, and when."""
        users: dict[int, tuple[Node, list[Time]]] = {}
        for k, launch in enumerate(self.launches):
            read = [(n, (k, -1)) for step in launch.steps for n in step.given]
            for node in launch.nodes:
                batch = node.level == Level.BATCH and node.op not in OVER_BATCH
                time = self.ready[node.id] if batch else self.loop(node)
                read += [(a, time) for a in node.args]
            for a, time in read:
                users.setdefault(a.id, (a, []))[1].append(time)
        yield from users.values()


def _computed_anywhere(prologue: Iterable[Node]) -> set[int]:
    """Operators that read nothing but inputs and scalars."""
    found: set[int] = set()
    for n in prologue:
        if n.op not in REDUCTIONS and all(a.id in found or a.op in LEAVES or a.level == Level.SCALAR for a in n.args):
            found.add(n.id)
    return found
