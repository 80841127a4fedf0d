"""How a program becomes launches: which block computes what, in which phase, and what is kept in between.

One launch per pass over the tokens; its last block computes what is per sequence and for the batch. That block goes
over the sequences in phases: a reduction over a group or the batch ends one, and the next may use its result.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from fastreward.language.node import Level, Node, walk
from fastreward.language.ops import GROUP_REDUCTIONS, LEAVES, OPS, REDUCTIONS
from fastreward.language.program import Program, TokenStep

#: Reductions with one value for the batch, and those that give each sequence a value from others' (their arguments and
#: results lie in columns).
OVER_BATCH: Final = ("batch_sum", "batch_max", "batch_min")
ACROSS: Final = (*GROUP_REDUCTIONS, "batch_permute")
#: (launch, phase): when a value is first there for the loop over the sequences.
Time = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Launch:
    """Passes over the tokens of the sides (none: sequences only), then `nodes` in the last block."""

    kernel: str
    steps: tuple[TokenStep, ...]
    nodes: tuple[Node, ...]

    @property
    def name(self) -> str:
        """Its kernel without the prefix."""
        return self.kernel.removeprefix("program_")

    @property
    def finish(self) -> str:
        """The function for the last block."""
        return f"finish_{self.name}"

    @property
    def resident(self) -> int:
        """Blocks that are to fit on a multiprocessor: the more a thread holds, the fewer (64, 80 or 128 registers)."""
        most = max(len(self.nodes), *(len(step.body) + 2 * len(step.reduce) for step in self.steps), 0)
        return 4 if most <= 40 else 3 if most <= 80 else 2


class Plan:
    """Launches of a program, and where values wait for later use.

    columns: of values per sequence that another phase or launch reads (f64 [columns, rows]); cheap operators on such
    are computed again instead. totals: of batch values
    that another launch reads. ready: when operators' values are there; those that read inputs and scalars only have no
    entry and are computed wherever they are needed. stores: what a phase's loop writes to its column. permutation: a
    column more, for row numbers while rows are permuted.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        anywhere = _computed_anywhere(program.prologue)
        before = tuple(n for n in program.prologue if n.id not in anywhere)
        passes = (Launch(f"program_pass_{k}", s.tokens, s.sequences) for k, s in enumerate(program.stages, 1))
        self.launches = (*([Launch("program_rows", (), before)] if before else []), *passes)
        self.ready = dict(_times(self.launches))
        self.columns: dict[int, int] = {}
        self.totals: dict[int, int] = {}
        self.stores: dict[Time, list[Node]] = {}
        self.known = list(walk((*program.outputs, *program.batch)))
        waiting = {}
        for node, users in self._uses():
            ready = self.ready.get(node.id)
            if ready is None:
                continue
            if node.level == Level.BATCH and any(launch != ready[0] for launch, _ in users):
                self.totals[node.id] = len(self.totals)
            if node.level == Level.SEQUENCE and any(time != ready for time in users):
                waiting[node.id] = node
        for _, node in sorted(waiting.items()):
            if not self._is_cheap(node, waiting):
                self._keep(node, self.ready[node.id])
        across = [n for launch in self.launches for n in launch.nodes if n.op in ACROSS]
        for node in sorted(across, key=self.loop):  # an argument that is there from the start: before its first use
            self._keep(node, None)
            for a in node.args:
                self._keep(a, self.ready.get(a.id, self.loop(node)))
        self.permutation = len(self.columns) if any(n.op == "batch_permute" for n in program.sequences) else None

    @property
    def width(self) -> int:
        """Columns in all."""
        return len(self.columns) + (self.permutation is not None)

    @property
    def last(self) -> int:
        """The last launch."""
        return len(self.launches) - 1

    def loop(self, node: Node) -> Time:
        """When the loop over the sequences computes `node`, or adds to it."""
        launch, phase = self.ready[node.id]
        return launch, phase - (node.op in (*ACROSS, *OVER_BATCH))

    def output_time(self, node: Node) -> Time:
        """When an output is written: as soon as it is there."""
        return self.ready.get(node.id, (self.last, 0))

    def phases(self, k: int) -> int:
        """Phases of launch k."""
        own = [phase for launch, phase in self.ready.values() if launch == k]
        return 1 + max(own, default=0)

    def reductions(self, time: Time) -> tuple[Node, ...]:
        """Reductions that the loop of this phase feeds."""
        nodes = (n for n in self.launches[time[0]].nodes if n.op in (*ACROSS, *OVER_BATCH))
        return tuple(n for n in nodes if self.loop(n) == time)

    def _keep(self, node: Node, time: Time | None) -> None:
        """A column for `node`; written at `time`, or by the reduction that computes it."""
        if node.id not in self.columns:
            self.columns[node.id] = len(self.columns)
            if time is not None and node.op not in ACROSS:
                self.stores.setdefault(time, []).append(node)

    def _is_cheap(self, node: Node, waiting: Container[int]) -> bool:
        """Whether a value is sooner computed again, from others that wait anyway, than read."""
        known = (a.id in waiting or a.id not in self.ready for a in node.args)
        return node.op in OPS and not OPS[node.op].costly and all(known)

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


def _times(launches: Iterable[Launch]) -> Iterator[tuple[int, Time]]:
    for k, launch in enumerate(launches):
        phase = {n.id: 0 for step in launch.steps for n in step.reduce}
        for n in launch.nodes:
            phase[n.id] = max((phase.get(a.id, 0) for a in n.args), default=0) + (n.op in REDUCTIONS)
        yield from ((i, (k, p)) for i, p in phase.items())
