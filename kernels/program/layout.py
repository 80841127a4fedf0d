"""Where a loss program's values live while it runs on a GPU: in registers of one loop, in columns, or as batch values.

The per-sequence work of a stage is a few loops over the rows ("sweeps"), one after another: what depends on a reduction
over the batch is computed in a later sweep than the one that reduces. What another sweep, other members of a group or a
later launch reads is kept in a column of a f64 [columns, B] tensor, unless it is as cheap to compute it again; what is
one number for the batch and is read by a later launch, in a f64 vector.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from fastreward.language.node import Level, Node, walk
from fastreward.language.ops import GROUP_REDUCTIONS, LEAVES, OPS, REDUCTIONS, SEQ_REDUCTIONS
from fastreward.language.program import Program, TokenStep

#: Take columns and give one: what a row gets depends on other rows.
ACROSS = (*GROUP_REDUCTIONS, "batch_permute")
#: Of these, what has one value a group, and what has one a row.
BY_GROUP = ("group_sum", "group_max", "group_min")
_BY_ROW = tuple(op for op in ACROSS if op not in BY_GROUP)
#: Give one value for the batch.
TOTALS = ("batch_sum", "batch_max", "batch_min")

_WORTH_KEEPING = 4  # operators; what takes fewer is computed again wherever it is read


@dataclass
class Sweep:
    """One loop over the rows: TOTALS whose argument it reduces, nodes that get a column, rows of outputs."""

    reduce: list[Node] = field(default_factory=list)
    keep: list[Node] = field(default_factory=list)
    outputs: list[tuple[int, Node]] = field(default_factory=list)


@dataclass
class RowWork:
    """The work per sequence after a stage's passes. between: ACROSS and BATCH operators by the sweep they follow.

    given: BATCH nodes that are there before the first sweep. batch: (index of Program.batch, node) to store.
    """

    sweeps: defaultdict[int, Sweep] = field(default_factory=lambda: defaultdict(Sweep))
    between: defaultdict[int, list[Node]] = field(default_factory=lambda: defaultdict(list))
    given: list[Node] = field(default_factory=list)
    batch: list[tuple[int, Node]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.sweeps or self.between or self.batch)


@dataclass
class TokenWork:
    """A pass over the tokens of a side. sums, most, least: its reductions, in the order of their columns.

    given: the SEQUENCE and BATCH nodes that it reads, and what they are computed from where that is done in the pass.
    """

    step: TokenStep
    sums: tuple[Node, ...]
    most: tuple[Node, ...]
    least: tuple[Node, ...]
    given: list[Node] = field(default_factory=list)

    @property
    def reductions(self) -> tuple[Node, ...]:
        """In the order of their columns."""
        return (*self.sums, *self.most, *self.least)


class Layout:
    """The plan of a program. columns, values: places by node id. tokens, rows: the work of each stage.

    spare: columns that hold something meanwhile. copies: by row, of what `columns` has by group. prologue: work before
    the first pass; None where it has no reductions: then it is computed wherever it is read.
    """

    def __init__(self, program: Program) -> None:
        self.columns: dict[int, int] = {}
        self.spare: dict[int, int] = {}
        self.copies: dict[int, int] = {}
        self.values: dict[int, int] = {}
        self._last = len(program.stages) - 1
        self._home: dict[int, int] = {}  # stage of everything that is computed once; -1: a launched prologue
        self._time: dict[int, int] = {}  # sweep that computes a SEQUENCE operator, or that a reduction follows
        self._work: defaultdict[int, RowWork] = defaultdict(RowWork)
        self._seen: set[tuple[int, ...]] = set()
        self._kept: set[tuple[int, int]] = set()
        self._place(program)
        self.tokens = [[self._token_work(step) for step in stage.tokens] for stage in program.stages]
        for work in (work for stage in self.tokens for work in stage):
            self._want_rows_of(work)
        self._want_results(program)
        self.prologue = self._sorted(self._work[-1]) if -1 in self._work else None
        self.rows = [self._sorted(self._work[k]) for k in range(len(program.stages))]
        self._coming_back = self._find_coming_back(program)

    @property
    def column_count(self) -> int:
        """Columns of the scratch tensor."""
        return len(self.columns) + len(self.spare) + len(self.copies)

    def by_row(self, node: Node) -> int:
        """The column where a SEQUENCE node is kept for reductions across rows."""
        return self.copies[node.id] if node.op in BY_GROUP else self.columns[node.id]

    def inlined(self, node: Node) -> bool:
        """Whether the node is computed or loaded wherever it is read: leaves, and a prologue that is not launched."""
        return node.id not in self._home

    def here(self, node: Node, stage: int, sweep: int) -> bool:
        """Whether a SEQUENCE node that this sweep reads is computed in it, not loaded from a column."""
        if node.op in (*SEQ_REDUCTIONS, *ACROSS):
            return False
        home = (self._home.get(node.id), self._time.get(node.id))
        return self.inlined(node) or home == (stage, sweep) or node.id not in self.columns

    def precise(self, node: Node) -> bool:
        """Whether a seq_sum comes back to a token or a sequence: then its lanes are f64, and what the tiling does to
        its order of addition is all but never seen in f32."""
        return node.id in self._coming_back

    # ------------------------------------------------------------------------------------------------------- places
    def _place(self, program: Program) -> None:
        if any(n.op in REDUCTIONS for n in program.prologue):
            self._time_rows(-1, program.prologue)
        for k, stage in enumerate(program.stages):
            for n in (n for step in stage.tokens for n in step.reduce):
                self._home[n.id] = k
            self._time_rows(k, stage.sequences)

    def _time_rows(self, stage: int, rows: Iterable[Node]) -> None:
        for n in rows:
            self._home[n.id] = stage
            if n.op in ACROSS:
                self._time[n.id] = max(self._in_column(a, stage) for a in n.args)
            elif n.level == Level.SEQUENCE or n.op in TOTALS:
                self._time[n.id] = max(self._ready(a, stage) for a in n.args)
            else:
                self._time[n.id] = max([-1, *(self._time[a.id] for a in n.args if self._home.get(a.id) == stage)])

    def _ready(self, node: Node, stage: int) -> int:
        """The first sweep of `stage` that can read the node."""
        if self._home.get(node.id) != stage or node.op in SEQ_REDUCTIONS:
            return 0
        reduced = node.level == Level.BATCH or node.op in ACROSS
        return self._time[node.id] + 1 if reduced else self._time[node.id]

    def _in_column(self, node: Node, stage: int) -> int:
        """The sweep after which the node is in a column; -1: before the first."""
        if node.level == Level.SEQUENCE and not self.inlined(node):
            own = self._home[node.id] == stage and node.op not in SEQ_REDUCTIONS
            return self._time[node.id] + (node.op in BY_GROUP) if own else -1
        return self._ready(node, stage)

    def _token_work(self, step: TokenStep) -> TokenWork:
        sums = tuple(n for n in step.reduce if n.op in ("seq_sum", "seq_count"))
        most = tuple(n for n in step.reduce if n.op == "seq_max")
        work = TokenWork(step, sums, most, tuple(n for n in step.reduce if n.op == "seq_min"))
        for n in work.reductions:
            self.columns[n.id] = self.column_count
        return work

    # ------------------------------------------------------------------------------------------------------ demands
    def _want_rows_of(self, work: TokenWork) -> None:
        found: dict[int, Node] = {}
        for n in work.step.given:
            self._in_tokens(n, found)
        work.given = [found[i] for i in sorted(found)]

    def _want_results(self, program: Program) -> None:
        for i, n in enumerate(program.outputs):
            if n.level < Level.TOKEN:
                stage = self._last if n.op in SEQ_REDUCTIONS else self._home.get(n.id, self._last)
                sweep = self._ready(n, stage)
                self._in_sweep(n, stage, sweep)
                self._work[stage].sweeps[sweep].outputs.append((i, n))
        for i, n in enumerate(program.batch):
            stage = self._home.get(n.id, self._last)
            self._in_batch(n, stage)
            self._work[stage].batch.append((i, n))

    def _in_tokens(self, node: Node, found: dict[int, Node]) -> None:
        """A token pass reads the node."""
        if node.level < Level.BATCH or node.id in found:
            return
        found[node.id] = node
        if self.inlined(node):
            for a in node.args:
                self._in_tokens(a, found)
        elif node.level == Level.BATCH:
            self._keep_value(node)
        elif node.op in ACROSS:
            self._in_across(node)
        elif node.op not in SEQ_REDUCTIONS:
            self._keep(node, self._home[node.id], self._time[node.id])

    def _in_sweep(self, node: Node, stage: int, sweep: int) -> None:
        """This sweep reads the node."""
        if (node.id, stage, sweep) in self._seen:
            return
        self._seen.add((node.id, stage, sweep))
        if node.level <= Level.BATCH:
            self._in_batch(node, stage)
        elif node.op in ACROSS:
            self._in_across(node)
        elif node.op not in (*LEAVES, *SEQ_REDUCTIONS):
            home = (self._home.get(node.id), self._time.get(node.id))
            if self.inlined(node) or home == (stage, sweep) or self._cost(node) < _WORTH_KEEPING:
                for a in node.args:
                    self._in_sweep(a, stage, sweep)
            else:
                self._keep(node, self._home[node.id], self._time[node.id])

    def _in_batch(self, node: Node, stage: int) -> None:
        """`stage` reads the node in sweeps or between them."""
        if node.level < Level.BATCH or (node.id, stage) in self._seen:
            return
        self._seen.add((node.id, stage))
        own = self._home.get(node.id) == stage
        (self._work[stage].between[self._time[node.id]] if own else self._work[stage].given).append(node)
        if own and node.op in TOTALS:
            self._in_sweep(node.args[0], stage, self._time[node.id])
            self._work[stage].sweeps[self._time[node.id]].reduce.append(node)
        elif own or self.inlined(node):
            for a in node.args:
                self._in_batch(a, stage)
        else:
            self._keep_value(node)

    def _in_across(self, node: Node) -> None:
        """Someone reads the result of an ACROSS node."""
        if node.id in self.columns:
            return
        stage = self._home[node.id]
        self.columns[node.id] = self.column_count
        if node.op == "batch_permute":
            self.spare[node.id] = self.column_count
        self._work[stage].between[self._time[node.id]].append(node)
        for a in node.args:
            if a.op in ACROSS:
                self._in_across(a)
            if a.op not in (*SEQ_REDUCTIONS, *_BY_ROW):
                home = self._home.get(a.id, stage) if a.level == Level.SEQUENCE else stage
                self._keep(a, home, self._ready(a, home))

    def _keep(self, node: Node, stage: int, sweep: int) -> None:
        """The node gets a column, which this sweep writes; one that is known everywhere, in each stage that asks."""
        places = self.copies if node.op in BY_GROUP else self.columns
        if node.id not in places:
            places[node.id] = self.column_count
        if (node.id, stage) not in self._kept:
            self._kept.add((node.id, stage))
            self._in_sweep(node, stage, sweep)
            self._work[stage].sweeps[sweep].keep.append(node)

    def _keep_value(self, node: Node) -> None:
        """The BATCH node gets a place among the values, which its own stage writes."""
        if node.id not in self.values:
            self.values[node.id] = len(self.values)
            self._in_batch(node, self._home[node.id])

    def _cost(self, node: Node) -> int:
        if node.level < Level.SEQUENCE or node.op in (*LEAVES, *SEQ_REDUCTIONS, *ACROSS):
            return 0
        return (_WORTH_KEEPING if node.op in OPS and OPS[node.op].costly else 1) + sum(self._cost(a) for a in node.args)

    # ------------------------------------------------------------------------------------------------------ results
    def _sorted(self, work: RowWork) -> RowWork:
        work.given.sort(key=lambda n: n.id)
        for nodes in work.between.values():
            nodes.sort(key=lambda n: n.id)
        return work

    def _find_coming_back(self, program: Program) -> set[int]:
        back = [n for stage in self.tokens for work in stage for n in work.given]
        back += [n for n in program.outputs if n.level < Level.TOKEN]
        return {n.id for n in walk(back, lambda n: n.op not in TOTALS) if n.op == "seq_sum"}
