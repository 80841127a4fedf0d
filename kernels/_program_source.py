"""Loss programs as Triton source that a person can read.

A stage's pass over the tokens of a side is one kernel; the program of it that arrives last does the stage's work per
sequence (`rows_1`, ...), so that a loss without reductions in its gradient is one launch. Operators are in
_program_math.py, tiles and reductions in _program_tokens.py and _program_rows.py. Nothing here needs Triton or a GPU.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass

from fastreward.losses._graph import Level, Node
from fastreward.losses._ops import BATCH_REDUCTIONS, GROUP_REDUCTIONS, LEAVES
from fastreward.losses._program import Program

from ._program_formulas import Formulas, called
from ._program_layout import Layout, RowWork, Sweep, TokenWork
from ._program_names import names

_MODULES = {
    "_program_math": "exp expm1 expm1_minus log log1p tanh sigmoid logsigmoid sign minimum maximum clip outside",
    "_program_rows": "SUM MAX MIN column group_cumulate group_reduce largest merge_chunks smallest store_column",
    "_program_tokens": "NOTHING add before count is_last most most_of row_bounds store_partial sum_of tile_columns wide",
}
_KIND = {"group_sum": "SUM", "group_max": "MAX", "group_min": "MIN"}
#: (the reduction of nothing, of two values, of lanes)
_BATCH = {
    "batch_sum": ("0.0", "{} + {}", "tl.sum({}, axis=0)"),
    "batch_max": ('float("-inf")', "maximum({}, {})", "largest({}, 0)"),
    "batch_min": ('float("inf")', "minimum({}, {})", "smallest({}, 0)"),
}
_SIDES = ("_chosen", "_rejected")


@dataclass(frozen=True)
class Argument:
    """What a kernel's argument is, and which of its kind: an index of program.inputs, .scalars or .outputs."""

    name: str
    kind: str
    index: int = 0
    comment: str = ""


@dataclass(frozen=True)
class Launch:
    """A kernel. side: of whose tokens, None for work per sequence alone. reductions: columns that it fills.

    row_nodes: values that are computed per sequence, as a measure of the registers that this takes.
    """

    kernel: str
    side: int | None
    arguments: tuple[Argument, ...]
    reductions: int
    row_nodes: int


@dataclass(frozen=True)
class Generated:
    """Source of a module, the launches that it is made for, and the scratch that they share."""

    source: str
    launches: tuple[Launch, ...]
    columns: int
    values: int


def source(program: Program) -> str:
    """The module that runs `program`."""
    return generate(program).source


def generate(program: Program) -> Generated:
    """The module that runs `program`, and how it is launched."""
    return _Module(program).generated()


# ------------------------------------------------------------------------------------------------------- arguments
class Arguments:
    """The tensors and numbers that a kernel needs, found while its source is written."""

    def __init__(self, program: Program, names: dict[int, str]) -> None:
        self._names = names
        self._inputs = {n.id: i for i, n in enumerate(program.inputs)}
        self._scalars = {n.id: i for i, n in enumerate(program.scalars)}
        self.known: dict[str, Argument] = {}

    def pointer(self, node: Node) -> str:
        """Name of the pointer to an input."""
        comment = {Level.TOKEN: "f32, as the tokens", Level.ROW: "f32 [B]"}.get(node.level, "f32 []")
        return self._add(f"{self._names[node.id]}_ptr", "input", self._inputs[node.id], comment)

    def scalar(self, node: Node) -> str:
        """Name of a run-time number."""
        return self._add(self._names[node.id], "scalar", self._scalars[node.id])

    def output(self, index: int, comment: str) -> str:
        """Name of the pointer to an output."""
        return self._add(f"output_{index}_ptr", "output", index, f"f32{comment}, out")

    def plain(self, *kinds: str) -> None:
        """Arguments of which there is one."""
        for kind in kinds:
            self._add(kind, kind, 0, _PLAIN[kind])

    def take(self, other: Arguments) -> None:
        """What a function needs that the kernel calls."""
        self.known |= other.known

    def ordered(self) -> tuple[Argument, ...]:
        """In the order of the signature: tensors, numbers, scratch."""
        kinds = ("input", *_FRONT, "scalar", "output", *_BACK)
        return tuple(sorted(self.known.values(), key=lambda a: (kinds.index(a.kind), a.index)))

    def signature(self) -> list[str]:
        """One line an argument."""
        return [
            f"    {a.name}: tl.float64," if a.kind == "scalar" else f"    {a.name},  # {a.comment}"
            for a in self.ordered()
        ]

    def _add(self, name: str, kind: str, index: int, comment: str = "") -> str:
        self.known[name] = Argument(name, kind, index, comment)
        return name


_FRONT = ("mask", "cu_seqlens", "order", "starts", "groups")
_BACK = ("batch", "columns", "values", "counter")
_PLAIN = {
    "mask": "like the tokens, any dtype, nonzero = counted",
    "cu_seqlens": "i64 [B + 1]",
    "order": "i64 [B], sequences sorted by group",
    "starts": "i64 [B + 1], where each group starts in order",
    "groups": "i64 [B]",
    "batch": "f32, out: what there is one of for the batch",
    "columns": "f64 [columns, B], then [reductions, B, chunks] partial results; scratch",
    "values": "f64, scratch: numbers of the batch that a later launch reads",
    "counter": "i32 [1], zero before and after",
}


# ----------------------------------------------------------------------------------------------------------- module
class _Module:
    def __init__(self, program: Program) -> None:
        self.program, self.layout, self.names = program, Layout(program), names(program)
        self.formulas = Formulas(self.names)
        self.text: list[str] = []
        self.launches: list[Launch] = []

    def generated(self) -> Generated:
        if self.layout.prologue is not None:
            self._sequences(0, self.layout.prologue)
        for k, (stage, rows) in enumerate(zip(self.layout.tokens, self.layout.rows, strict=True), 1):
            for work in stage:
                self._tokens(k, work, rows if work is stage[-1] else RowWork())
            if not stage and rows:
                self._sequences(k, rows)
        body = "\n".join(self.text)
        return Generated(
            f"{self._header()}\n\nimport triton\nimport triton.language as tl\n\n{_imports(body)}\n{body}",
            tuple(self.launches),
            len(self.layout.columns),
            len(self.layout.values),
        )

    def _header(self) -> str:
        lines = [f'"""Loss program {self.program.key}: {len(self.launches)} launch(es), written by fastreward.', ""]
        for launch in self.launches:
            read = [a.name.removesuffix("_ptr") for a in launch.arguments if a.comment.startswith("f32, as the tokens")]
            outputs = [name for name in read if name.startswith("output_")]
            read = [name for name in read if name not in outputs]
            if launch.side is None:
                lines.append(f"{launch.kernel}: {launch.row_nodes} values per sequence, in one program.")
                continue
            wrote = f", writes {', '.join(outputs)}" if outputs else ""
            lines.append(f"{launch.kernel}: reads {', '.join([*read, 'mask'])}{wrote}, once: ")
            lines.append(
                f"    {4 * (len(read) + len(outputs))} bytes a token and the mask's; {launch.reductions} reductions "
                f"over each sequence, then {launch.row_nodes} values per sequence or for the batch."
            )
        lines += ["", "Tokens are f32, sequences and the batch f64. Numbers and sizes are arguments: none is compiled in."]
        return "\n".join([*(line.rstrip() for line in lines), '"""'])

    def _launch(self, kernel: str, side: int | None, arguments: Arguments, reductions: int, rows: RowWork) -> None:
        row_nodes = sum(len(nodes) for nodes in rows.between.values())
        row_nodes += sum(len(s.keep) + len(s.outputs) for s in rows.sweeps.values())
        self.launches.append(Launch(kernel, side, arguments.ordered(), reductions, row_nodes))

    # ------------------------------------------------------------------------------------------------------ kernels
    def _sequences(self, k: int, rows: RowWork) -> None:
        """A kernel of one program that does work per sequence only."""
        arguments = self._rows(k, rows)
        name = f"sequences_{k}"
        self.text += ["", *_decorated(name, arguments, ["B"], ["BLOCK_ROWS"])]
        self.text += [f'    """Work per sequence before pass {k + 1}, in one program."""']
        self.text += _call(f"    rows_{k}", arguments)
        self._launch(name, None, arguments, 0, rows)

    def _tokens(self, k: int, work: TokenWork, rows: RowWork) -> None:
        """A pass over the tokens of a side."""
        suffix = f"{k}{_SIDES[work.step.side] if self.program.sides > 1 else ''}"
        name = f"tokens_{suffix}"
        arguments = Arguments(self.program, self.names)
        row_arguments = self._rows(k, rows) if rows else None
        call = self._token_function(f"token_{suffix}", work, arguments)
        body = [*_OPENING, *self._given(work, arguments), *self._running(work), *_LOOP]
        body += [*call, *self._accumulated(work), *self._stored(work, arguments), *self._partials(work)]
        body += self._last(k, work, row_arguments)
        if work.reductions:
            arguments.plain("columns")
        if work.reductions or rows:
            arguments.plain("counter")
        if row_arguments is not None:
            arguments.take(row_arguments)
        arguments.plain("mask", "cu_seqlens")
        sizes = ["N", "row_units", "B", "chunks"]
        constants = ["PACKED", "HAS_MASK", "ROWS", "STEPS", "LANES", "VEC", "BLOCK_ROWS"]
        self.text += ["", *_decorated(name, arguments, sizes, constants)]
        self.text += ['    """ROWS rows, every chunks-th tile of them. T = row_units * VEC."""', *body]
        self._launch(name, work.step.side, arguments, len(work.reductions), rows)

    def _token_function(self, name: str, work: TokenWork, arguments: Arguments) -> list[str]:
        """The function from the values of a token to all that is reduced or stored; the lines that call it."""
        roots = [n.args[0] for n in work.reductions if n.args] + [n for _, n in work.step.store]
        if not roots:
            return []
        given = [n for n in work.step.rows if n.op != "constant"]
        text, parameters = self.formulas.token_function(name, roots, given)
        self.text += ["", "@triton.jit", *text, ""]
        loaded, passed = [], []
        for n in parameters:
            if n.level == Level.SCALAR:
                passed.append(arguments.scalar(n))
            elif n.level == Level.TOKEN:
                loaded.append(f"        {self.names[n.id]} = tl.load({arguments.pointer(n)} + at, mask=inside, other=0.0)")
                passed.append(self.names[n.id])
            else:
                number = self.names[n.id] if n.boolean else f"{self.names[n.id]}.to(tl.float32)"
                passed.append(f"wide({number})" if n.level == Level.ROW else number)
        results = ", ".join(self.formulas.value(n) for n in {n.id: n for n in roots}.values())
        return [*loaded, *wrapped(f"        {results} = {name}(", passed, ")")]

    def _given(self, work: TokenWork, arguments: Arguments) -> list[str]:
        """Values per sequence and for the batch that a pass reads, in f64."""
        lines = []
        for n in work.given:
            lines.append(self.given(n, arguments, "row", "row_ok", "B"))
        scalars = {a.id: a for n in work.given if self.layout.inlined(n) for a in n.args if a.level == Level.SCALAR}
        numbers = [a for a in scalars.values() if a.op != "constant"]
        for a in numbers:
            arguments.scalar(a)
        return [f"    {line}" for line in [*(self.formulas.scalar(a, "tl.float64") for a in numbers), *lines]]

    def given(self, n: Node, arguments: Arguments, row: str, ok: str, rows: str) -> str:
        """The line that loads or computes a ROW or BATCH node outside the work per sequence."""
        name = self.names[n.id]
        if n.op == "input":
            at = f" + {row}, mask={ok}, other=0.0" if n.level == Level.ROW else ""
            return f"{name} = tl.load({arguments.pointer(n)}{at}).to(tl.float64)"
        if self.layout.inlined(n):
            return self.formulas.line(n, double=True)
        truth = " != 0.0" if n.boolean else ""
        if n.level == Level.BATCH:
            arguments.plain("values")
            return f"{name} = tl.load(values + {self.layout.values[n.id]}){truth}"
        arguments.plain("columns")
        return f"{name} = column(columns, {row}, {ok}, {rows}, {self.layout.columns[n.id]}){truth}"

    # ------------------------------------------------------------------------------------------- parts of a pass
    def _running(self, work: TokenWork) -> list[str]:
        lines = []
        for n in work.reductions:
            dtype = "int32" if n.op == "seq_count" else "float64" if self.layout.precise(n) else "float32"
            start = "tl.zeros([ROWS, LANES], tl." + dtype + ")"
            if n.op in ("seq_max", "seq_min"):
                start = "tl.full([ROWS, LANES], NOTHING, tl.int32)"
            lines.append(f"    {self.names[n.id]}_lanes = {start}")
        return lines

    def _accumulated(self, work: TokenWork) -> list[str]:
        lines = []
        for n in work.reductions:
            lanes = f"{self.names[n.id]}_lanes"
            x = self.formulas.value(n.args[0]) if n.args else ""
            if n.op == "seq_count":
                lines.append(f"        {lanes} = count({lanes}, counted)")
            elif n.op == "seq_sum":
                lines.append(f"        {lanes} = add({lanes}, {x}, counted)")
            else:
                lines.append(f"        {lanes} = most({lanes}, {'-' if n.op == 'seq_min' else ''}{x}, counted)")
        return lines

    def _stored(self, work: TokenWork, arguments: Arguments) -> list[str]:
        lines = []
        for i, n in work.step.store:
            pointer = arguments.output(i, ", as the tokens")
            lines.append(
                f"        tl.store({pointer} + at, tl.where(counted, {self.formulas.value(n)}, 0.0), mask=inside)"
            )
        return lines

    def _partials(self, work: TokenWork) -> list[str]:
        lines = []
        for n in work.reductions:
            extreme = n.op in ("seq_max", "seq_min")
            total = f"{'-' if n.op == 'seq_min' else ''}{'most_of' if extreme else 'sum_of'}({self.names[n.id]}_lanes)"
            where = f"{self.layout.columns[n.id]}, {self._first(work)}, {len(self.layout.columns)}"
            lines.append(
                f"    store_partial(columns, {total}, row, row_ok, B, program % chunks, chunks, {where})"
            )
        return lines

    def _last(self, k: int, work: TokenWork, row_arguments: Arguments | None) -> list[str]:
        """What the last program to arrive does."""
        merged, column = [], self._first(work)
        for nodes, kind in ((work.sums, "SUM"), (work.most, "MAX"), (work.least, "MIN")):
            if nodes:
                where = f"{column}, {len(nodes)}, {self._first(work)}, {len(self.layout.columns)}"
                merged.append(f"            merge_chunks(columns, B, chunks, {where}, {kind}, 64)")
                column += len(nodes)
        if row_arguments is None and not merged:
            return []
        lines = ["    if is_last(counter, programs):"]
        if merged:
            lines += ["        if chunks > 1:", *merged, "        tl.debug_barrier()"]
        if row_arguments is not None:
            lines += _call(f"        rows_{k}", row_arguments)
        return [*lines, "        tl.store(counter, 0)"]

    def _first(self, work: TokenWork) -> int:
        return self.layout.columns[work.reductions[0].id] if work.reductions else 0

    # ------------------------------------------------------------------------------------------- work per sequence
    def _rows(self, k: int, rows: RowWork) -> Arguments:
        """The function that does a stage's work per sequence."""
        writer = _RowWriter(self, k - 1, rows)
        body = writer.lines()
        names = [a.name for a in writer.arguments.ordered()]
        head = wrapped(f"def rows_{k}(", [*names, "B", "BLOCK_ROWS: tl.constexpr"], "):")
        self.text += ["", "@triton.jit", *head, f'    """Work per sequence after pass {k}, in f64."""', *body, ""]
        return writer.arguments


class _RowWriter:
    """Sweeps over the rows, and what is done between them."""

    def __init__(self, module: _Module, stage: int, work: RowWork) -> None:
        self.layout, self.names, self.formulas, self.given = module.layout, module.names, module.formulas, module.given
        self.stage, self.work = stage, work
        self.arguments = Arguments(module.program, module.names)
        self._scalars: dict[int, Node] = {}

    def lines(self) -> list[str]:
        body = [f"    {self._batch_line(n)}" for n in self.work.given]
        steps = sorted({*self.work.sweeps, *self.work.between})
        for sweep in steps:
            if sweep in self.work.sweeps:
                body += self._sweep(sweep, self.work.sweeps[sweep])
            for n in self.work.between.get(sweep, []):
                body += self._between(n)
        for i, n in self.work.batch:
            self.arguments.plain("batch")
            value = self._value(n)
            body.append(f"    tl.store(batch + {i}, {f'tl.where({value}, 1.0, 0.0)' if n.boolean else value})")
        return [*(f"    {self.formulas.scalar(n, 'tl.float64')}" for n in self._scalars.values()), *body]

    def _value(self, node: Node) -> str:
        if node.level == Level.SCALAR and node.op != "constant":
            self._scalars[node.id] = node
            self.arguments.scalar(node)
        return self.formulas.value(node)

    def _compute(self, node: Node) -> str:
        for a in node.args:
            self._value(a)
        return self.formulas.line(node, double=True)

    def _batch_line(self, node: Node) -> str:
        """A BATCH node that is there before the first sweep."""
        if self.layout.inlined(node) and node.op not in LEAVES:
            return self._compute(node)
        return self.given(node, self.arguments, "row", "ok", "B")

    # ------------------------------------------------------------------------------------------------------- sweeps
    def _sweep(self, number: int, sweep: Sweep) -> list[str]:
        before, after, inside = [], [], []
        known: set[int] = set()
        for n in sweep.reduce:
            lanes, (nothing, combine, reduce) = f"{self.names[n.id]}_lanes", _BATCH[n.op]
            before.append(f"    {lanes} = tl.full([BLOCK_ROWS], {nothing}, tl.float64)")
            inside += self._in_sweep(n.args[0], number, known)
            x = f"tl.where(ok, {self._value(n.args[0])}, {nothing})"
            inside.append(f"{lanes} = {combine.format(lanes, x)}")
            after.append(f"    {self.names[n.id]} = {reduce.format(lanes)}")
        for n in sweep.keep:
            inside += self._in_sweep(n, number, known)
            inside.append(f"store_column(columns, row, ok, B, {self._number(n)}, {self.layout.columns[n.id]})")
            self.arguments.plain("columns")
        for i, n in sweep.outputs:
            inside += self._in_sweep(n, number, known)
            inside.append(f"tl.store({self.arguments.output(i, ' [B]')} + row, {self._number(n)}, mask=ok)")
        loop = [
            "    for b in range(0, B, BLOCK_ROWS):",
            "        row = tl.cast(b, tl.int64) + tl.arange(0, BLOCK_ROWS)",
            "        ok = row < B",
        ]
        return [*before, *loop, *(f"        {line}" for line in inside), *after]

    def _in_sweep(self, node: Node, sweep: int, known: set[int]) -> list[str]:
        """The lines that load or compute a ROW node and what it needs; nothing that is `known` twice."""
        if node.level < Level.ROW or node.id in known:
            return []
        known.add(node.id)
        if node.op == "input" or not self.layout.here(node, self.stage, sweep):
            return [self._load(node)]
        lines = [line for a in node.args for line in self._in_sweep(a, sweep, known)]
        return [*lines, self._compute(node)]

    def _load(self, node: Node) -> str:
        name = self.names[node.id]
        if node.op == "input":
            return f"{name} = tl.load({self.arguments.pointer(node)} + row, mask=ok, other=0.0).to(tl.float64)"
        self.arguments.plain("columns")
        truth = " != 0.0" if node.boolean else ""
        return f"{name} = column(columns, row, ok, B, {self.layout.columns[node.id]}){truth}"

    def _number(self, node: Node) -> str:
        value = self._value(node)
        return f"tl.where({value}, 1.0, 0.0)" if node.boolean and node.op != "constant" else value

    def _between(self, node: Node) -> list[str]:
        lines = []
        if node.op in GROUP_REDUCTIONS:
            self.arguments.plain("columns", "order", "starts", "groups")
            at = [str(self.layout.columns[a.id]) for a in (*node.args, node)]
            if len(node.args) == 2:
                call = f"group_cumulate(columns, order, starts, groups, B, {', '.join(at)}, {node.op.endswith('after')})"
            else:
                call = f"group_reduce(columns, order, starts, groups, B, {', '.join(at)}, {_KIND[node.op]})"
            return [f"    {call}  # {self.names[node.id]}"]
        if node.op not in BATCH_REDUCTIONS:
            lines.append(f"    {self._compute(node)}")
        if node.id in self.layout.values:
            self.arguments.plain("values")
            lines.append(f"    tl.store(values + {self.layout.values[node.id]}, {self._number(node)})")
        return lines


# ------------------------------------------------------------------------------------------------------------- text
_OPENING = """\
    T = row_units * VEC
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    row = (program // chunks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_ok = row < B
    start, tokens, extent = row_bounds(cu_seqlens, row, row_ok, N, T, B, PACKED)
    offsets = tile_columns(STEPS, LANES, VEC)
    TILE: tl.constexpr = STEPS * LANES * VEC""".splitlines()

_LOOP = """\
    for t0 in range((program % chunks) * TILE, tl.max(extent, axis=0), chunks * TILE):
        t = t0 + offsets
        at = wide(start) + t
        inside = before(t, extent, row_ok, T, PACKED)
        counted = before(t, tokens, row_ok, T, PACKED)
        if HAS_MASK:
            counted = counted & (tl.load(mask + at, mask=inside, other=0) != 0)""".splitlines()


def _decorated(name: str, arguments: Arguments, sizes: list[str], constants: list[str]) -> list[str]:
    specialise = ", ".join(f'"{size}"' for size in sizes)
    return [
        f"@triton.jit(do_not_specialize=[{specialise}])",
        f"def {name}(",
        *arguments.signature(),
        f"    {', '.join(sizes)},",
        *(f"    {', '.join(f'{c}: tl.constexpr' for c in part)}," for part in (constants[:4], constants[4:]) if part),
        "):  # fmt: skip",
    ]


def _call(name: str, arguments: Arguments) -> list[str]:
    return wrapped(f"{name}(", [*(a.name for a in arguments.ordered()), "B", "BLOCK_ROWS"], ")")


def wrapped(head: str, items: Iterable[str], tail: str) -> list[str]:
    """`head item, item, ... tail`, in lines of at most 120 characters."""
    text = f"{head}{', '.join(items)}{tail}"
    if len(text) <= 120:
        return [text]
    indent = " " * (len(text) - len(text.lstrip()))
    width = 120 - len(indent) - 4
    inner = textwrap.wrap(f"{', '.join(items)},", width, break_long_words=False, break_on_hyphens=False)
    return [head, *(f"{indent}    {line}" for line in inner), f"{indent}{tail}"]


def _imports(body: str) -> str:
    used = called(body)
    used |= {word for word in ("SUM", "MAX", "MIN", "NOTHING") if f"{word})" in body or f"{word}," in body}
    lines = []
    for module, exported in _MODULES.items():
        found = sorted(used & set(exported.split()))
        if found:
            line = f"from fastreward.kernels.{module} import {', '.join(found)}"
            lines += [line] if len(line) <= 120 else wrapped(f"from fastreward.kernels.{module} import (", found, ")")
    return "\n".join(lines) + "\n"
