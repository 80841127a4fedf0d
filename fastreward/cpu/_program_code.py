"""From programs of the loss language to the instructions of csrc/cpu/program.hpp.

Nodes become instructions one by one, except where a fused form covers several. Slots (blocks of floats or of mask words)
and columns (values per row) are given out by liveness, so that a block's values stay in L1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final

from fastreward import _core
from fastreward.losses._graph import Level, Node, is_constant
from fastreward.losses._ops import REDUCTIONS, SEQ_REDUCTIONS
from fastreward.losses._program import Program, TokenStep

_TOKEN_OPERATORS: Final = _core.program_token_operators()
_ROW_OPERATORS: Final = _core.program_row_operators()
# csrc/cpu/program.hpp: OperandKind, ReductionKind, kTokenOutput
_SLOT, _MASK_SLOT, _ROW_VALUE, _ROW_MASK, _INPUT, _OUTPUT, _REDUCTION = range(7)
_REDUCTION_KINDS: Final = {"seq_sum": 0, "seq_min": 1, "seq_max": 2, "count": 3, "seq_count": 4}
_TOKEN_OUTPUT: Final = 2**31 - 1
_BOUNDED: Final = 87.0  # |x| up to which exp_bounded may be used


# ------------------------------------------------------------------------------------------------- values per row
class _Places:
    """RowPlaces: a number for each scalar or batch value, columns for rows, reused when the last reader is done."""

    def __init__(self, program: Program) -> None:
        self.numbers: dict[int, int] = {}
        self.columns: dict[int, int] = {}
        self.constants: dict[int, float] = {}
        self.column_count = 0
        self._free: list[int] = []
        self._last = _last_readings(program)

    def of(self, node: Node) -> int:
        """The place of a value that exists already, or of a scalar."""
        if node.level == Level.ROW:
            return ~self.columns[node.id]
        number = self.numbers.setdefault(node.id, len(self.numbers))
        if node.op == "constant":
            assert node.value is not None
            self.constants[number] = node.value
        return number

    def new(self, node: Node) -> int:
        """A place for a value that is about to be computed."""
        if node.level == Level.ROW:
            if not self._free:
                self._free.append(self.column_count)
                self.column_count += 1
            self.columns[node.id] = self._free.pop()
        return self.of(node)

    def release(self, time: int, nodes: Iterable[Node]) -> None:
        """Frees the columns of `nodes` that nobody reads after `time`."""
        for node in {n.id: n for n in nodes}.values():
            if node.level == Level.ROW and self._last.get(node.id, -1) <= time:
                self._free.append(self.columns[node.id])


def _last_readings(program: Program) -> dict[int, int]:
    """By node: when it is read for the last time, in steps of the program."""
    last: dict[int, int] = {}
    for time, (_, reads) in enumerate(_timeline(program)):
        last.update({n.id: time for n in reads})
    end = 1 << 30
    last.update({n.id: end for n in (*program.outputs, *program.batch)})
    return last


def _timeline(program: Program) -> list[tuple[Node | TokenStep, tuple[Node, ...]]]:
    """Everything that is done with values per row, in order, and what it reads."""
    steps: list[tuple[Node | TokenStep, tuple[Node, ...]]] = [(n, n.args) for n in program.prologue]
    for stage in program.stages:
        steps += [(step, step.rows) for step in stage.tokens]
        steps += [(n, n.args) for n in stage.rows]
    return steps


# ------------------------------------------------------------------------------------------------- token passes
@dataclass
class _Op:
    """An instruction before its operands have numbers. results: up to three; args: up to four; all are keys."""

    name: str
    results: tuple[object, ...]
    args: tuple[object, ...]


@dataclass
class _Operands:
    """The operands of a step: (kind, index), by key."""

    table: list[tuple[int, int]] = field(default_factory=list)
    at: dict[object, int] = field(default_factory=dict)

    def get(self, key: object, kind: int, index: int) -> int:
        """The operand of that key, made if need be."""
        if key not in self.at:
            self.at[key] = len(self.table)
            self.table.append((kind, index))
        return self.at[key]


class _Selection:
    """Chooses the instructions of a step. Keys: a node's id; ("not", id) and the like; ("out", i); ("sum", i)."""

    def __init__(self, step: TokenStep) -> None:
        self.step = step
        self.nodes: dict[object, Node] = {}
        self.ops: list[_Op] = []
        self.reductions: list[tuple[str, Node]] = []
        self._uses: Counter[int] = Counter(a.id for n in (*step.body, *step.reduce) for a in n.args)
        self._uses.update(n.id for _, n in step.store)
        self._same = {(n.op, *(a.id for a in n.args)): n for n in step.body}
        self._done: set[int] = set()
        self._counted = {
            n.id: n.args[0].args[0] for n in step.reduce if n.op == "seq_sum" and _is_indicator(n.args[0])
        }
        for n in step.reduce:
            if n.id in self._counted:  # the condition is counted itself
                self._uses[n.args[0].id] -= 1
        self._fuse()
        self._reduced = self._reductions_by_source()
        for node in step.body:
            self._emit(node)
        self._finish()

    # ------------------------------------------------------------------------------------------- what is fused
    def _fuse(self) -> None:
        """Marks nodes that their only reader computes along with itself."""
        self._inside: dict[int, Node] = {}
        for _, node in self.step.store:
            self._absorb_output(node)
        for node in reversed(self.step.body):
            if self._uses[node.id] == 0 or node.id in self._inside:
                continue
            if node.op in ("add", "sub"):
                product = next((a for a in node.args if a.op == "mul" and self._only(a)), None)
                if product is not None:
                    self._inside[product.id] = node

    def _absorb_output(self, node: Node) -> None:
        if not self._only(node):
            return
        if node.op == "mul":
            self._inside[node.id] = node
        elif _is_drop(node):
            self._inside[node.id] = node
            value = node.args[2]
            if value.op == "mul" and self._only(value):
                self._inside[value.id] = node

    def _only(self, node: Node) -> bool:
        return self._uses[node.id] == 1 and node.level == Level.TOKEN and node.op not in ("input",)

    # ------------------------------------------------------------------------------------------- instructions
    def _add(self, name: str, results: Sequence[object], args: Sequence[Node | object]) -> None:
        keys = []
        for a in args:
            if isinstance(a, Node):
                self.nodes[a.id] = a
                keys.append(a.id)
            else:
                keys.append(a)
        self.ops.append(_Op(name, tuple(results), tuple(keys)))
        for key in [*keys, *results]:
            self._reduce(key)

    def _emit(self, node: Node) -> None:
        if node.id in self._done or node.id in self._inside or self._uses[node.id] == 0:
            return
        self._done.add(node.id)
        self.nodes[node.id] = node
        for rule in (self._bounded_exp, self._with_product, self._pair, self._clip, self._drop):
            if rule(node):
                return
        swapped = {"gt": "lt", "ge": "le"}.get(node.op)
        if swapped is not None:
            self._add(swapped, (node.id,), node.args[::-1])
        else:
            self._add(node.op, (node.id,), node.args)

    def _bounded_exp(self, node: Node) -> bool:
        x = node.args[0]
        bounded = node.op == "exp" and x.op == "clip" and all(_is_small(bound) for bound in x.args[1:])
        if bounded:
            self._add("exp_bounded", (node.id,), node.args)
        return bounded

    def _with_product(self, node: Node) -> bool:
        product = next((a for a in node.args if self._inside.get(a.id) is node), None)
        if product is None or node.op not in ("add", "sub"):
            return False
        first = node.args[0] is product
        name = "fma" if node.op == "add" else "fms" if first else "fnma"
        a, b = product.args if product.args[0].level == Level.TOKEN else product.args[::-1]
        self._add(name, (node.id,), (a, b, node.args[1] if first else node.args[0]))
        return True

    def _pair(self, node: Node) -> bool:
        """An extreme and the comparison of the same two."""
        for extreme, comparison in (("maximum", "lt"), ("minimum", "gt")):
            if node.op not in (extreme, comparison):
                continue
            ids = tuple(a.id for a in node.args)
            other = self._same.get((comparison if node.op == extreme else extreme, *ids))
            if other is None or not self._pending(other):
                return False
            self._done.add(other.id)
            self.nodes[other.id] = other
            both = (node, other) if node.op == extreme else (other, node)
            self._add(f"{extreme}_{comparison}", [n.id for n in both], node.args)
            return True
        return False

    def _clip(self, node: Node) -> bool:
        """clip, and which side of it was hit."""
        if node.op != "clip" or any(bound.level == Level.TOKEN for bound in node.args[1:]):
            return False
        x, low, high = node.args
        below, above = self._same.get(("lt", x.id, low.id)), self._same.get(("gt", x.id, high.id))
        outside = self._same.get(("outside", x.id, low.id, high.id))
        sides = [n if n is not None and self._pending(n) else None for n in (below, above)]
        outside = outside if outside is not None and self._pending(outside) else None
        if outside is None and None in sides:
            return False
        keys: list[object] = []
        for name, n in zip(("below", "above"), sides, strict=True):
            keys.append((name, node.id) if n is None else n.id)
            if n is not None:
                self._done.add(n.id)
                self.nodes[n.id] = n
        self._add("clip_parts", (node.id, *keys), node.args)
        if outside is not None:
            self._done.add(outside.id)
            self.nodes[outside.id] = outside
            self._add("or", (outside.id,), keys)
        return True

    def _drop(self, node: Node) -> bool:
        if not _is_drop(node):
            return False
        self._add("drop", (node.id,), (node.args[0], node.args[2]))
        return True

    def _pending(self, node: Node) -> bool:
        return node.id not in self._done and node.id not in self._inside and self._uses[node.id] > 0

    # ----------------------------------------------------------------------------------- reductions and outputs
    def _reductions_by_source(self) -> dict[int, dict[str, Node]]:
        found: dict[int, dict[str, Node]] = {}
        for n in self.step.reduce:
            if n.op == "seq_count":
                self.reductions.append(("seq_count", n))
            elif n.id in self._counted:
                found.setdefault(self._counted[n.id].id, {})["count"] = n
            else:
                found.setdefault(n.args[0].id, {})[n.op] = n
        return found

    def _reduce(self, key: object) -> None:
        """The reductions of a value, as soon as it is there."""
        found = self._reduced.pop(key, None) if isinstance(key, int) else None
        if found is None:
            return
        kinds = ("count",) if "count" in found else ("seq_sum", "seq_min", "seq_max")
        results = []
        for kind in kinds:
            node = found.pop(kind, None)
            results.append(None if node is None else ("sum", len(self.reductions)))
            if node is not None:
                self.reductions.append((kind, node))
        assert not found, found
        self.ops.append(_Op("count" if kinds == ("count",) else "reduce", tuple(results), (key,)))

    def _finish(self) -> None:
        for source in list(self._reduced):  # of inputs that nothing else reads
            node = next(n.args[0] for n in self.step.reduce if n.args and n.args[0].id == source)
            self.nodes[source] = node
            self._reduce(source)
        for index, node in self.step.store:
            self._store(index, node)

    def _store(self, index: int, node: Node) -> None:
        out = (("out", index),)
        if node.id not in self._inside:
            self._add("store", out, (node,))
        elif node.op == "mul":
            self._add("mul_store", out, node.args)
        elif node.args[2].id in self._inside:
            self._add("mul_drop_store", out, (node.args[0], *node.args[2].args))
        else:
            self._add("drop_store", out, (node.args[0], node.args[2]))


def _is_drop(node: Node) -> bool:
    return node.op == "where" and is_constant(node.args[1], 0.0)


def _is_indicator(node: Node) -> bool:
    return node.op == "where" and is_constant(node.args[1], 1.0) and is_constant(node.args[2], 0.0)


def _is_small(node: Node) -> bool:
    return node.op == "constant" and node.value is not None and abs(node.value) <= _BOUNDED


class _StepCode:
    """A step as the arrays of TokenStep."""

    def __init__(self, step: TokenStep, places: _Places, inputs: dict[int, int]) -> None:
        self._selection = _Selection(step)
        self._places, self._inputs = places, inputs
        self._operands = _Operands()
        self._slots: list[list[int]] = [[], []]  # free ones: of floats, of masks
        self._slot_counts = [0, 0]
        self._temporary: dict[object, tuple[int, int]] = {}
        ops = self._selection.ops
        self._last = {key: time for time, op in enumerate(ops) for key in op.args}
        self.instructions = [self._instruction(time, op) for time, op in enumerate(ops)]
        self.side = step.side

    def code(self) -> tuple[Any, ...]:
        """What `_core.Program` takes for a step."""
        reductions = [(_REDUCTION_KINDS[kind], self._places.new(n)) for kind, n in self._selection.reductions]
        return (self.side, *self._slot_counts, self._operands.table, self.instructions, reductions)

    def _instruction(self, time: int, op: _Op) -> tuple[int, ...]:
        args = [self._operand(key) for key in op.args]
        for key in set(op.args):
            if key in self._temporary and self._last[key] == time:
                kind, slot = self._temporary[key]
                self._slots[kind].append(slot)
        results = [-1 if key is None else self._result(key, op.name, k) for k, key in enumerate(op.results)]
        for key in op.results:  # made along with another and never read
            if key in self._temporary and key not in self._last:
                kind, slot = self._temporary[key]
                self._slots[kind].append(slot)
        padded = [*results, *[-1] * (3 - len(results)), *args, *[-1] * (4 - len(args))]
        return (_TOKEN_OPERATORS[op.name], *padded)

    def _operand(self, key: object) -> int:
        if key in self._temporary:
            kind, slot = self._temporary[key]
            return self._operands.get(("slot", kind, slot), (_SLOT, _MASK_SLOT)[kind], slot)
        node = self._selection.nodes[key]
        if node.level < Level.TOKEN:
            return self._operands.get(key, _ROW_MASK if node.boolean else _ROW_VALUE, self._places.of(node))
        assert node.op == "input", node
        return self._operands.get(key, _INPUT, self._inputs[node.id])

    def _result(self, key: object, name: str, k: int) -> int:
        if isinstance(key, tuple) and key[0] in ("out", "sum"):
            return self._operands.get(key, _OUTPUT if key[0] == "out" else _REDUCTION, key[1])
        kind = int(k > 0 or name in ("lt", "le", "eq", "ne", "outside", "and", "or", "not"))
        if not self._slots[kind]:
            self._slots[kind].append(self._slot_counts[kind])
            self._slot_counts[kind] += 1
        self._temporary[key] = kind, self._slots[kind].pop()
        return self._operand(key)


# ----------------------------------------------------------------------------------------------------- the whole
def encode(program: Program) -> _core.Program:
    """The program as the evaluator takes it; kept."""
    return _encode(_ByKey(program))


@dataclass(frozen=True)
class _ByKey:
    program: Program = field(hash=False, compare=False)
    key: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", self.program.key)


@cache
def _encode(by_key: _ByKey) -> _core.Program:
    program = by_key.program
    places = _Places(program)
    inputs = [(int(n.level), 0 if n.level == Level.TOKEN else places.new(n)) for n in program.inputs]
    input_numbers = {n.id: i for i, n in enumerate(program.inputs)}
    prologue: list[tuple[int, ...]] = []
    stages: list[tuple[list[Any], list[tuple[int, ...]]]] = []
    bounds = _stage_bounds(program)
    for time, (what, reads) in enumerate(_timeline(program)):
        while len(stages) < sum(time >= b for b in bounds):
            stages.append(([], []))
        if isinstance(what, TokenStep):
            stages[-1][0].append(_StepCode(what, places, input_numbers).code())
            places.release(time, reads)
        else:
            args = [places.of(a) for a in reads]
            places.release(time, reads)
            code = (_ROW_OPERATORS[what.op], places.new(what), *args, *[0] * (3 - len(args)))
            (stages[-1][1] if stages else prologue).append(code)
    scalars = [places.of(n) for n in program.scalars]
    outputs = [_TOKEN_OUTPUT if n.level == Level.TOKEN else places.of(n) for n in program.outputs]
    batch = [places.of(n) for n in program.batch]
    return _core.Program(
        numbers=len(places.numbers),
        columns=places.column_count,
        constants=list(places.constants.items()),
        scalars=scalars,
        inputs=inputs,
        prologue=prologue,
        stages=stages,
        outputs=outputs,
        batch=batch,
    )


def _stage_bounds(program: Program) -> list[int]:
    """At which steps of the timeline the stages begin."""
    bounds, time = [], len(program.prologue)
    for stage in program.stages:
        bounds.append(time)
        time += len(stage.tokens) + len(stage.rows)
    return bounds


assert set(SEQ_REDUCTIONS) < set(REDUCTIONS)
__all__ = ["encode"]
