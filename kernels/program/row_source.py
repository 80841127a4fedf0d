"""The work per sequence of a loss program as Triton source: sweeps over the rows, reductions between them."""

from __future__ import annotations

from dataclasses import dataclass

from fastreward.language.gpu_plan import CROSS_SEQUENCE, OVER_BATCH, Time
from fastreward.language.node import Level, Node

from .arguments import Arguments, wrapped
from .formulas import Formulas

_GROUP = {
    "group_sum": "SUM",
    "group_max": "MAX",
    "group_min": "MIN",
    "group_sum_others": "OTHERS",
    "group_sum_before": "BEFORE",
    "group_sum_after": "AFTER",
}
#: (the reduction of nothing, how lanes take a value in, the reduction of lanes)
_BATCH = {
    "batch_sum": ("0.0", "{0} += {1}", "tl.sum({}, axis=0)"),
    "batch_max": ('float("-inf")', "{0} = maximum({0}, {1})", "largest({}, 0)"),
    "batch_min": ('float("inf")', "{0} = minimum({0}, {1})", "smallest({}, 0)"),
}


@dataclass(frozen=True)
class RowFunction:
    """The function `rows_<number>`; sweeps: loops over the sequences in it."""

    text: list[str]
    arguments: Arguments
    sweeps: int


def row_function(formulas: Formulas, launch: int) -> RowFunction | None:
    """The function for the work per sequence of a launch; None where there is none."""
    return _Writer(formulas, launch).function()


class _Writer:
    def __init__(self, formulas: Formulas, launch: int) -> None:
        self.formulas, self.names, self.plan = formulas, formulas.names, formulas.plan
        self.launch = launch
        self.arguments = formulas.arguments()
        self._scalars: dict[int, Node] = {}

    def function(self) -> RowFunction | None:
        body = [line for n in self._given() for line in (self._batch_line(n), *self._batch_store(n))]
        body += [line for i, n in self._results() if n.level < Level.BATCH for line in self._batch_store(n, i)]
        sweeps = 0
        for phase in range(-1, self.plan.phases(self.launch)):
            sweep = self._sweep(phase)
            sweeps += bool(sweep)
            body += sweep
            following = [*self.plan.cross_sequence((self.launch, phase)), *self.plan.batch((self.launch, phase + 1))]
            body += [line for n in sorted(following, key=lambda n: n.id) for line in self._between(n)]
        if not body:
            return None
        scalars = [self.formulas.scalar(n, "tl.float64") for n in self._scalars.values()]
        names, number = [a.name for a in self.arguments.ordered()], self.plan.launches[self.launch].number
        lines = [
            "@triton.jit",
            *wrapped(f"def rows_{number}(", [*names, "B", "BLOCK_ROWS: tl.constexpr"], "):"),
            f'    """Work per sequence after pass {number}, in f64."""',
            *(f"    {line}" for line in (*scalars, *body)),
        ]
        return RowFunction(lines, self.arguments, sweeps)

    def _results(self) -> list[tuple[int, Node]]:
        times = ((self.launch, phase) for phase in range(self.plan.phases(self.launch)))
        return [result for time in times for result in self.plan.results(time)]

    def _given(self) -> list[Node]:
        """The BATCH nodes that the launch reads and does not compute in its phases."""
        found: dict[int, Node] = {}
        for time in ((self.launch, phase) for phase in range(self.plan.phases(self.launch))):
            found |= {n.id: n for n in self.formulas.needed(self.plan.roots(time), time)}
        own = {n.id for n in self.plan.launches[self.launch].nodes}
        return [n for i, n in sorted(found.items()) if n.level == Level.BATCH and i not in own]

    # ---------------------------------------------------------------------------------------------------- operands
    def _value(self, node: Node) -> str:
        self._note(node)
        return self.formulas.value(node)

    def _number(self, node: Node) -> str:
        self._note(node)
        return self.formulas.number(node)

    def _compute(self, node: Node) -> str:
        for a in node.args:
            self._note(a)
        return self.formulas.line(node, double=True)

    def _note(self, node: Node) -> None:
        """Numbers become arguments when they are read."""
        if node.level == Level.SCALAR and node.op != "constant":
            self._scalars[node.id] = node
            self.arguments.scalar(node)

    def _batch_line(self, node: Node) -> str:
        """A BATCH node that is there before the first sweep."""
        start = (self.launch, -1)
        if self.formulas.computed(node, start):
            return self._compute(node)
        return self.formulas.given(node, self.arguments, start, "row", "ok")

    def _batch_store(self, node: Node, only: int | None = None) -> list[str]:
        """Batch values are stored as soon as they are known, so that they take no registers."""
        places = [i for i, n in self._results() if n.id == node.id and only in (None, i)]
        if places:
            self.arguments.plain("batch")
        return [f"tl.store(batch + {i}, {self._number(node)})" for i in places]

    # ------------------------------------------------------------------------------------------------------- sweeps
    def _sweep(self, phase: int) -> list[str]:
        """The loop over the sequences of a phase, and the reductions that it feeds; [] where it has nothing to do."""
        before, after, inside = [], [], []
        known: set[int] = set()
        time = (self.launch, phase)
        for n in self.plan.over_batch(time):
            lanes, (nothing, combine, reduce) = f"{self.names[n.id]}_lanes", _BATCH[n.op]
            before.append(f"{lanes} = tl.full([BLOCK_ROWS], {nothing}, tl.float64)")
            inside += self._in_sweep(n.args[0], time, known)
            x = f"tl.where(ok, {self._value(n.args[0])}, {nothing})"
            inside.append(combine.format(lanes, x))
            after.append(f"{self.names[n.id]} = {reduce.format(lanes)}")
        for n in self.plan.stores.get(time, []):
            inside += self._in_sweep(n, time, known)
            inside.append(f"store_column(columns, row, ok, B, {self._number(n)}, {self.plan.argument(n)})")
            self.arguments.plain("columns")
        for i, n in self.plan.outputs(time):
            inside += self._in_sweep(n, time, known)
            inside.append(f"tl.store({self.arguments.output(i, n.level)} + row, {self._number(n)}, mask=ok)")
        if not inside:
            return []
        opening = ["row = tl.cast(b, tl.int64) + tl.arange(0, BLOCK_ROWS)", "ok = row < B"]
        loop = ["for b in range(0, B, BLOCK_ROWS):", *(f"    {line}" for line in (*opening, *inside))]
        return [*before, *loop, *after]

    def _in_sweep(self, node: Node, time: Time, known: set[int]) -> list[str]:
        """The lines that load or compute a SEQUENCE node and what it needs; nothing that is `known` twice."""
        if node.level < Level.SEQUENCE or node.id in known:
            return []
        known.add(node.id)
        if not self.formulas.computed(node, time):
            return [self.formulas.given(node, self.arguments, time, "row", "ok")]
        lines = [line for a in node.args for line in self._in_sweep(a, time, known)]
        return [*lines, self._compute(node)]

    # ----------------------------------------------------------------------------------------------- between sweeps
    def _between(self, node: Node) -> list[str]:
        if node.op in CROSS_SEQUENCE:
            return [f"{self._cross_sequence(node)}  # {self.names[node.id]}"]
        lines = [] if node.op in OVER_BATCH else [self._compute(node)]
        if node.id in self.plan.totals:
            self.arguments.plain("values")
            lines.append(f"tl.store(values + {self.plan.totals[node.id]}, {self._number(node)})")
        return [*lines, *self._batch_store(node)]

    def _cross_sequence(self, node: Node) -> str:
        self.arguments.plain("columns")
        at = [self.plan.argument(a) for a in node.args]
        target = self.plan.columns[node.id]
        if node.op == "batch_permute":
            return f"batch_permute(columns, B, {', '.join(map(str, at))}, {self.plan.permutation}, {target})"
        self.arguments.plain("order", "starts", "groups")
        call = "group_reduce" if _GROUP[node.op] in ("SUM", "MAX", "MIN") else "group_select"
        key = f"{at[-1]}, " if call == "group_select" else ""  # of no meaning for the others
        return f"{call}(columns, order, starts, groups, B, {at[0]}, {key}{target}, {_GROUP[node.op]})"
