"""The last block's work as CUDA C++: loops over the sequences, with reductions over groups and the batch in between."""

from __future__ import annotations

from collections.abc import Iterator

from fastreward.cuda.program.expressions import (
    Block,
    Given,
    function,
    indented,
    joined,
    kinds,
    literal,
    truth,
    wrapped,
)
from fastreward.cuda.program.values import Values
from fastreward.language.gpu_plan import OVER_BATCH, in_order
from fastreward.language.node import Level, Node
from fastreward.language.ops import GROUP_REDUCTIONS
from fastreward.language.program import TokenStep


class RowWork:
    """Writes `finish_...`, which the block that arrives last in launch `k` calls."""

    def __init__(self, values: Values, k: int) -> None:
        self._values, self._plan, self._k = values, values.plan, k
        self._launch = values.plan.launches[k]
        self._slots = self._places_in_shared_memory()

    def text(self) -> str:
        """The function; "" where there is nothing to do."""
        body = [line for q in range(self._plan.phases(self._k)) for line in (*self._batch(q), *self._loop(q))]
        if not body:
            return ""
        head = ["const i64 rows = a.side0.rows;"]
        if self._slots:
            nodes = {n.id: n for n in self._launch.nodes}
            head += self._values.name.listed("batch", (self._values.name.label(nodes[i]) for i in self._slots))
            head.append(f"__shared__ double batch[{len(self._slots)}];")
        if any(n.op in GROUP_REDUCTIONS for n in self._launch.nodes):
            head += ["Groups groups = a.groups;", "find_groups(groups);"]
        lines = function(f"void {self._values.finish(self._k)}(const Arguments& a, double* room)", [*head, *body])
        return wrapped("\n".join([*lines, "", ""]))

    def widest(self) -> int:
        """The most that one phase reduces over the batch."""
        return max(len(self._plan.over_batch((self._k, q))) for q in range(self._plan.phases(self._k)))

    def _places_in_shared_memory(self) -> dict[int, int]:
        """Where batch values lie that others read; a phase's reductions one after the other."""
        nodes = [n for q in range(self._plan.phases(self._k)) for n in self._plan.over_batch((self._k, q))]
        nodes += [n for n in self._launch.nodes if n.level == Level.BATCH and n.op not in OVER_BATCH and self._read(n)]
        return {n.id: i for i, n in enumerate(nodes)}

    def _read(self, node: Node) -> bool:
        """Whether a loop, or a later phase of this launch, reads a batch operator."""
        own = self._plan.ready[node.id]
        readers = [n for n in self._launch.nodes if any(a.id == node.id for a in n.args)]
        later = any(n.level == Level.SEQUENCE or n.op in OVER_BATCH or self._plan.ready[n.id] > own for n in readers)
        return later or any(n.id == node.id for n in self._values.program.outputs)

    # ------------------------------------------------------------------------------------------------------- one phase
    def _given(self, q: int, row: bool) -> Given:
        """Values that phase q finds: batch values, columns, and what is there from the start."""

        def given(node: Node) -> tuple[str, bool] | None:
            ready = self._plan.ready.get(node.id)
            if ready is not None and node.id in self._slots and ready <= (self._k, q):
                return truth(node, f"batch[{self._slots[node.id]}]"), False
            return self._values.kept(node, (self._k, q)) or self._values.leaf(node, "double", row=row)

        return given

    def _batch(self, q: int) -> list[str]:
        """Batch values: computed by one thread, left where others find them."""
        plan, time = self._plan, (self._k, q)
        own = plan.batch(time)
        operators = [n for n in own if n.op not in OVER_BATCH]
        shared = [(f"batch[{self._slots[n.id]}]", n) for n in operators if n.id in self._slots]
        totals = [(f"a.totals[{plan.totals[n.id]}]", n) for n in own if n.id in plan.totals]
        results = [(f"a.results[{i}]", n) for i, n in plan.results(time)]
        fresh, there = {n.id for n in operators}, self._given(q, row=False)
        block = Block(
            "double",
            lambda n: None if n.id in fresh else there(n),
            self._values.name,
            [n for _, n in (*shared, *totals, *results)],
        )
        lines = [f"{target} = {block.value(n)};" for target, n in (*shared, *totals)]
        lines += [f"{target} = {_as_f32(n, block)};" for target, n in results]
        if not lines:
            return []
        return [
            "if (threadIdx.x == 0) {",
            *indented([*block.lines, *lines]),
            "}",
            *(["__syncthreads();"] if shared else []),
        ]

    def _loop(self, q: int) -> list[str]:
        """The loop over the sequences, then the reductions that it has fed."""
        batch = self._plan.over_batch((self._k, q))
        cross_sequence = self._plan.cross_sequence((self._k, q))
        lines = self._sequences(q, batch)
        if batch:
            lines = [
                "{  // over the batch",
                f"  using Reduced = Reductions<{kinds(batch)}>;",
                "  double sums[Reduced::ROOM];",
                "  Reduced::start(sums);",
                *indented(lines),
                f"  Reduced::over_block(sums, room, batch + {self._slots[batch[0].id]});",
                "}",
                "__syncthreads();",
            ]
        elif cross_sequence:
            lines.append("__syncthreads();")
        together = [line for node in cross_sequence for line in self._cross_sequence(node)]
        return [*lines, *together, *(["__syncthreads();"] if cross_sequence else [])]

    def _sequences(self, q: int, batch: list[Node]) -> list[str]:
        """The loop; [] where the phase has nothing per sequence."""
        plan, time = self._plan, (self._k, q)
        # In the graph's order, so that nothing lives longer than it must.
        tasks = [(n.args[0], joined(f"sums[{i}]", n, "{}")) for i, n in enumerate(batch)]
        tasks += [(n, f"a.columns[{plan.columns[n.id]} * rows + row] = {{}};") for n in plan.stores.get(time, [])]
        tasks += [(n, f"a.out{i}[row] = float({{}});") for i, n in plan.outputs(time)]
        tasks.sort(key=lambda task: task[0].id)
        if not tasks:
            return []
        reduced = {n.id: text for step in self._steps(q) for n, text in self._reduced(step)}
        there = self._given(q, row=True)
        block = Block(
            "double",
            lambda n: (reduced[n.id], False) if n.id in reduced else there(n),
            self._values.name,
            [n for n, _ in tasks],
        )
        for n, statement in tasks:
            value = block.value(n)
            block.lines.append(statement.format(value))
        body = [*self._joined_units(q, "\n".join(block.lines)), *block.lines]
        return ["for (i64 row = threadIdx.x; row < rows; row += THREADS) {", *indented(body), "}"]

    def _steps(self, q: int) -> tuple[TokenStep, ...]:
        return self._launch.steps if q == 0 else ()

    def _array(self, step: TokenStep) -> str:
        return f"tokens{step.side}" if self._values.program.sides == 2 else "tokens"

    def _reduced(self, step: TokenStep) -> Iterator[tuple[Node, str]]:
        for i, n in enumerate(in_order(step.reduce)):
            yield n, f"{self._array(step)}[{i}]"

    def _joined_units(self, q: int, body: str) -> Iterator[str]:
        """Statements that bring a row's units together, for the sides that `body` asks about."""
        for step in self._steps(q):
            array = self._array(step)
            if f"{array}[" in body:
                reduced = f"{self._values.pass_name(self._k, step)}::Reduced"
                yield f"double {array}[{reduced}::ROOM];"
                yield f"{reduced}::over_units(a.side{step.side}, a.sums{step.side}, row, {array});"

    def _cross_sequence(self, node: Node) -> list[str]:
        """The statement that computes, for every sequence, a value from others'."""
        columns = [f"a.columns + {self._plan.columns[n.id]} * rows" for n in (*node.args, node)]
        members = node.op.removeprefix("group_sum_").upper()
        if node.op == "batch_permute":
            call = f"permute_rows(rows, {', '.join(columns)}, a.columns + {self._plan.permutation} * rows);"
        elif members in ("OTHERS", "BEFORE", "AFTER"):
            x, key, out = columns if len(columns) == 3 else (columns[0], "nullptr", columns[1])
            call = f"add_members<{members}>(groups, {x}, {key}, {out});"
        else:
            call = f"over_groups<Reductions<{kinds([node])}>>(groups, {', '.join(columns)});"
        return [f"// {self._values.name(node)}", call]


def _as_f32(node: Node, block: Block) -> str:
    if node.op == "constant":
        assert node.value is not None
        return literal(node.value, "float")
    return f"float({block.value(node)})"
