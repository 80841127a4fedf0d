"""Operators of the loss language as Triton source, one line per value."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from fastreward.language.gpu_plan import BY_GROUP, Plan, Time
from fastreward.language.node import Level, Node, walk
from fastreward.language.ops import ATOM, BACKWARDS, LEAVES, SCANS, SHIFTS
from fastreward.language.program import Program, TokenStep
from fastreward.language.render import operator

from .arguments import Arguments, wrapped
from .names import names


class Formulas:
    """A program's nodes as source, by their names and places."""

    def __init__(self, program: Program, spelled: Mapping[str, str]) -> None:
        self.program, self.names, self.plan = program, names(program), Plan(program, in_columns=True)
        self._spelled = spelled

    def arguments(self) -> Arguments:
        """Those of a function that is about to be written."""
        return Arguments(self.program, self.names)

    def value(self, node: Node) -> str:
        """The node as an operand: its name, or the number it is."""
        return _literal(node.value) if node.op == "constant" and node.value is not None else self.names[node.id]

    def number(self, node: Node) -> str:
        """The node as an operand that may be stored: 1.0 or 0.0 for a condition."""
        truth = node.boolean and node.op != "constant"
        return f"tl.where({self.value(node)}, 1.0, 0.0)" if truth else self.value(node)

    def line(self, node: Node, *, double: bool) -> str:
        """`name = operator(operands)`; double: of f64 values."""
        return f"{self.names[node.id]} = {_of_batch(node, self._formula(node, double))}"

    def scalar(self, node: Node, dtype: str) -> str:
        """A run-time number, in a kernel a f64 and under the interpreter a plain float, as a value of `dtype`."""
        name = self.names[node.id]
        return f"{name} = tl.full([], {name}, {'tl.int32) != 0' if node.boolean else f'{dtype})'}"

    def computed(self, node: Node, time: Time) -> bool:
        """Whether what runs at `time` computes the node: it is neither an input nor kept from before."""
        kept = self.plan.column(node, time) is not None or self.plan.total(node, time) is not None
        return not kept and node.op not in LEAVES

    def needed(self, nodes: Iterable[Node], time: Time) -> list[Node]:
        """The SEQUENCE and BATCH nodes that lines for `nodes` name, arguments first."""
        found = walk(nodes, lambda n: self.computed(n, time))
        return sorted((n for n in found if n.level in (Level.SEQUENCE, Level.BATCH)), key=lambda n: n.id)

    def given(self, node: Node, arguments: Arguments, time: Time, row: str, ok: str) -> str:
        """The line that loads a SEQUENCE or BATCH node, or computes it where it is not kept."""
        name = self.names[node.id]
        if node.op == "input":
            at = f" + {row}, mask={ok}, other=0.0" if node.level == Level.SEQUENCE else ""
            return f"{name} = tl.load({arguments.pointer(node)}{at}).to(tl.float64)"
        if self.computed(node, time):
            return self.line(node, double=True)
        if node.level == Level.BATCH:
            arguments.plain("values")
            loaded = f"tl.load(values + {self.plan.totals[node.id]}){' != 0.0' if node.boolean else ''}"
            return f"{name} = {_of_batch(node, loaded)}"
        return f"{name} = {self._column(node, arguments, row, ok)}"

    def _column(self, node: Node, arguments: Arguments, row: str, ok: str) -> str:
        """The expression that loads a SEQUENCE node from its column; what groups reduce to is there by group."""
        arguments.plain("columns")
        if node.op in BY_GROUP:
            arguments.plain("groups")
            row = f"tl.load(groups + {row}, mask={ok}, other=0)"
        return f"column(columns, {row}, {ok}, B, {self.plan.columns[node.id]}){' != 0.0' if node.boolean else ''}"

    def all_given(self, nodes: Iterable[Node], arguments: Arguments, time: Time, row: str, ok: str) -> list[str]:
        """The lines of `given` for nodes in order, after those of the numbers that they need."""
        nodes = list(nodes)
        read = {a.id: a for n in nodes if self.computed(n, time) for a in n.args if a.level == Level.SCALAR}
        scalars = [a for a in read.values() if a.op != "constant"]
        for a in scalars:
            arguments.scalar(a)
        return [
            *(self.scalar(a, "tl.float64") for a in scalars),
            *(self.given(n, arguments, time, row, ok) for n in nodes),
        ]

    def pass_given(self, step: TokenStep, launch: int, arguments: Arguments, ok: str) -> list[str]:
        """The lines before a pass's loop: what its tokens read of their row and the batch."""
        start = (launch, -1)
        return self.all_given(self.needed(step.given, start), arguments, start, "row", ok)

    def token_function(
        self, name: str, roots: Iterable[Node], given: Iterable[Node], maps: Sequence[Node] = ()
    ) -> tuple[list[str], list[Node], list[Node]]:
        """A function from values of one token, in f32, to `roots`; its source, its parameters, and the scans in it.

        given: nodes that are not computed in it besides TOKEN inputs: SEQUENCE, BATCH and SCALAR ones. With scans it
        is one of tiles, which takes and gives more: see `coefficients` and `carries`. maps: scans whose `map_names`
        it gives, in the place of the roots, which are their operands.
        """
        wanted = unique(roots)
        known = {n.id for n in given}
        nodes = _walk(wanted, known)
        parameters = [n for n in nodes if n.op != "constant" and (n.op == "input" or n.id in known)]
        scans = [n for n in nodes if n.op in SCANS]
        tiled = unique([*scans, *maps])
        more = [*map(self._wide, coefficients(tiled)), *(["valid", *self.carries(scans)] if tiled else [])]
        signature = ", ".join([*(self.names[n.id] for n in parameters), *more])
        lines = ["@triton.jit", *wrapped(f"def {name}(", signature.split(", "), "):")]
        lines.append('    """Of one token, or of as many as the arguments hold, in f32."""')
        lines += [f"    {self._wide(c)} = tl.full([], {self.names[c.id]}, tl.float64)" for c in _numbers(tiled)]
        lines += [f"    {self.scalar(n, 'tl.float32')}" for n in parameters if n.level == Level.SCALAR]
        lines += [f"    {self._token_line(n)}" for n in nodes if n.level == Level.TOKEN and n.op != "input"]
        lines += [f"    {', '.join(self.map_names([n]))} = {self._along(n, '_map')}" for n in maps]
        results = self.map_names(maps) if maps else map(self.value, wanted)
        return [*lines, f"    return {', '.join([*results, *self.carries(scans)])}"], parameters, scans

    def map_names(self, scans: Iterable[Node]) -> list[str]:
        """What tiles' maps y -> c y + x are called: c and x of each."""
        return [f"{self.names[n.id]}_{part}" for n in scans for part in ("factor", "term")]

    def carries(self, scans: Iterable[Node]) -> list[str]:
        """What scans hand on from tile to tile: parameters and results of a function of tokens."""
        return [f"{self.names[n.id]}_carry" for n in scans]

    def _token_line(self, node: Node) -> str:
        if node.op not in SCANS:
            return self.line(node, double=False)
        (carry,) = self.carries([node])
        return f"{self.names[node.id]}, {carry} = {self._along(node, '', carry)}"

    def _along(self, node: Node, what: str, *carry: str) -> str:
        """The call of a scan, or of its map."""
        x, *by = node.args
        given = [self.value(x), *(self._wide(c) if c.level < Level.TOKEN else self.value(c) for c in by)]
        operands = ", ".join([*given, "valid", *carry, str(node.op in BACKWARDS)])
        return f"{node.op.removesuffix('_reverse')}{what}({operands})"

    def _wide(self, node: Node) -> str:
        """A coefficient that is not per token, in f64."""
        if node.op == "constant" and node.value is not None:
            return _double(_literal(node.value))
        return f"{self.names[node.id]}_wide"

    def _formula(self, node: Node, double: bool) -> str:
        args = [self.value(a) for a in _operands(node)]
        if node.op in self._spelled and not double:
            return f"{self._spelled[node.op]}({', '.join(args)})"
        if _cancels(node) and not double:
            return f"expm1_minus({args[0]})"
        if node.op in ("minimum", "maximum"):
            return self._extreme(node, *args)
        if node.op == "where" and double and all(a.op == "constant" for a in node.args[1:]):
            args[1] = _double(args[1])
        if node.op == "div" and double:
            return f"divide({args[0]}, {_double(args[1]) if node.args[1].op == 'constant' else args[1]})"
        if node.op == "outside":
            sides = ((sign, a, text) for sign, a, text in zip("<>", node.args[1:], args[1:], strict=True))
            return " | ".join(f"({_of_pair(node.args[0], a, f'{args[0]} {sign} {text}')})" for sign, a, text in sides)
        return operator(node.op, [(text, ATOM) for text in args], "triton")[0]

    def _extreme(self, node: Node, x: str, y: str) -> str:
        """A NaN of either side comes out; of a constant there is none."""
        sign = "<" if node.op == "minimum" else ">"
        if node.args[1].op == "constant":
            return f"tl.where({y} {sign} {x}, {y}, {x})"
        return f"tl.where({x} {sign} {y}, {x}, {y})" if node.args[0].op == "constant" else f"{node.op}({x}, {y})"


def coefficients(scans: Iterable[Node]) -> list[Node]:
    """Those of scans that a function of tokens takes in f64 besides: once per sequence, or for the batch."""
    by = (n.args[1] for n in scans if len(n.args) > 1)
    return unique(c for c in by if c.level in (Level.SEQUENCE, Level.BATCH))


def alone(scans: Sequence[Node]) -> bool:
    """Whether tiles' maps are known without the scans before them, but for shifts' values: none is made of another."""
    for n in scans:
        under = [m for m in walk(n.args, lambda m: m.level == Level.TOKEN) if m.op in SCANS]
        if any(m.op not in SHIFTS for m in under) or (n.op in SHIFTS and under):
            return False
    return bool(scans)


def _numbers(scans: Iterable[Node]) -> list[Node]:
    """Those that are run-time numbers."""
    by = (n.args[1] for n in scans if len(n.args) > 1)
    return unique(c for c in by if c.level == Level.SCALAR and c.op != "constant")


def unique(nodes: Iterable[Node]) -> list[Node]:
    """Each once, in the order of their first occurrence."""
    return list({n.id: n for n in nodes}.values())


def _literal(value: float) -> str:
    return repr(value) if math.isfinite(value) else f'float("{value}")'


def _double(number: str) -> str:
    """A number as a f64, where nothing beside it says so."""
    return f"tl.full([], {number}, tl.float64)"


def _of_batch(node: Node, formula: str) -> str:
    """The formula of a node; one of a scalar condition so that it can be broadcast."""
    return f"truth({formula})" if node.boolean and node.level == Level.BATCH else formula


def _of_pair(x: Node, y: Node, comparison: str) -> str:
    return f"truth({comparison})" if x.level <= Level.BATCH and y.level <= Level.BATCH else comparison


def _cancels(node: Node) -> bool:
    """expm1(x) - x per token, which in f32 would lose the digits of a small one."""
    if node.op != "sub" or node.level != Level.TOKEN:
        return False
    return node.args[0].op == "expm1" and node.args[0].args[0].id == node.args[1].id


def _operands(node: Node) -> tuple[Node, ...]:
    """The nodes that the node's line names."""
    return node.args[1:] if _cancels(node) else node.args


def _walk(roots: Iterable[Node], known: set[int]) -> list[Node]:
    """Nodes that lines for `roots` name, arguments first; not those that the known ones are made of."""
    found: dict[int, Node] = {}
    waiting = list(roots)
    while waiting:
        node = waiting.pop()
        if node.id not in found:
            found[node.id] = node
            if node.id not in known:
                waiting.extend(_operands(node))
    return [found[i] for i in sorted(found)]
