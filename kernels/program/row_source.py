"""The work per sequence of a loss program as Triton source: sweeps over the rows, reductions between them."""

from __future__ import annotations

from fastreward.language.node import Level, Node
from fastreward.language.ops import LEAVES

from .arguments import Arguments, wrapped
from .formulas import Formulas
from .layout import ACROSS, TOTALS, RowWork, Sweep

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


def row_function(formulas: Formulas, stage: int, work: RowWork) -> tuple[list[str], Arguments]:
    """The function `rows_<stage + 1>`, and its arguments."""
    return _Writer(formulas, stage, work).function()


class _Writer:
    def __init__(self, formulas: Formulas, stage: int, work: RowWork) -> None:
        self.formulas, self.names, self.layout = formulas, formulas.names, formulas.layout
        self.stage, self.work = stage, work
        self.arguments = formulas.arguments()
        self._scalars: dict[int, Node] = {}

    def function(self) -> tuple[list[str], Arguments]:
        body = [line for n in self.work.given for line in (self._batch_line(n), *self._batch_store(n))]
        body += [line for i, n in self.work.batch if n.level < Level.BATCH for line in self._batch_store(n, i)]
        for step in sorted({*self.work.sweeps, *self.work.between}):
            if step in self.work.sweeps:
                body += self._sweep(step, self.work.sweeps[step])
            body += [line for n in self.work.between.get(step, []) for line in self._between(n)]
        scalars = [self.formulas.scalar(n, "tl.float64") for n in self._scalars.values()]
        names = [a.name for a in self.arguments.ordered()]
        return [
            "@triton.jit",
            *wrapped(f"def rows_{self.stage + 1}(", [*names, "B", "BLOCK_ROWS: tl.constexpr"], "):"),
            f'    """Work per sequence after pass {self.stage + 1}, in f64."""',
            *(f"    {line}" for line in (*scalars, *body)),
        ], self.arguments

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
        if self.layout.inlined(node) and node.op not in LEAVES:
            return self._compute(node)
        return self.formulas.given(node, self.arguments, "row", "ok")

    def _batch_store(self, node: Node, only: int | None = None) -> list[str]:
        """What there is one of for the batch is stored as soon as it is known, so that it takes no registers."""
        places = [i for i, n in self.work.batch if n.id == node.id and only in (None, i)]
        if places:
            self.arguments.plain("batch")
        return [f"tl.store(batch + {i}, {self._number(node)})" for i in places]

    # ------------------------------------------------------------------------------------------------------- sweeps
    def _sweep(self, number: int, sweep: Sweep) -> list[str]:
        before, after, inside = [], [], []
        known: set[int] = set()
        for n in sweep.reduce:
            lanes, (nothing, combine, reduce) = f"{self.names[n.id]}_lanes", _BATCH[n.op]
            before.append(f"{lanes} = tl.full([BLOCK_ROWS], {nothing}, tl.float64)")
            inside += self._in_sweep(n.args[0], number, known)
            x = f"tl.where(ok, {self._value(n.args[0])}, {nothing})"
            inside.append(combine.format(lanes, x))
            after.append(f"{self.names[n.id]} = {reduce.format(lanes)}")
        for n in sweep.keep:
            inside += self._in_sweep(n, number, known)
            inside.append(f"store_column(columns, row, ok, B, {self._number(n)}, {self.layout.by_row(n)})")
            self.arguments.plain("columns")
        for i, n in sweep.outputs:
            inside += self._in_sweep(n, number, known)
            inside.append(f"tl.store({self.arguments.output(i, n.level)} + row, {self._number(n)}, mask=ok)")
        opening = ["row = tl.cast(b, tl.int64) + tl.arange(0, BLOCK_ROWS)", "ok = row < B"]
        loop = ["for b in range(0, B, BLOCK_ROWS):", *(f"    {line}" for line in (*opening, *inside))]
        return [*before, *loop, *after]

    def _in_sweep(self, node: Node, sweep: int, known: set[int]) -> list[str]:
        """The lines that load or compute a SEQUENCE node and what it needs; nothing that is `known` twice."""
        if node.level < Level.SEQUENCE or node.id in known:
            return []
        known.add(node.id)
        if node.op == "input" or not self.layout.here(node, self.stage, sweep):
            return [self._load(node)]
        lines = [line for a in node.args for line in self._in_sweep(a, sweep, known)]
        return [*lines, self._compute(node)]

    def _load(self, node: Node) -> str:
        if node.op == "input":
            loaded = f"tl.load({self.arguments.pointer(node)} + row, mask=ok, other=0.0).to(tl.float64)"
        else:
            loaded = self.formulas.column(node, self.arguments, "row", "ok")
        return f"{self.names[node.id]} = {loaded}"

    # ----------------------------------------------------------------------------------------------- between sweeps
    def _between(self, node: Node) -> list[str]:
        if node.op in ACROSS:
            return [f"{self._across(node)}  # {self.names[node.id]}"]
        lines = [] if node.op in TOTALS else [self._compute(node)]
        if node.id in self.layout.values:
            self.arguments.plain("values")
            lines.append(f"tl.store(values + {self.layout.values[node.id]}, {self._number(node)})")
        return [*lines, *self._batch_store(node)]

    def _across(self, node: Node) -> str:
        self.arguments.plain("columns")
        at = [self.layout.by_row(a) for a in node.args]
        target = self.layout.columns[node.id]
        if node.op == "batch_permute":
            return f"batch_permute(columns, B, {', '.join(map(str, at))}, {self.layout.spare[node.id]}, {target})"
        self.arguments.plain("order", "starts", "groups")
        call = "group_reduce" if _GROUP[node.op] in ("SUM", "MAX", "MIN") else "group_select"
        key = f"{at[-1]}, " if call == "group_select" else ""  # of no meaning for the others
        return f"{call}(columns, order, starts, groups, B, {at[0]}, {key}{target}, {_GROUP[node.op]})"
