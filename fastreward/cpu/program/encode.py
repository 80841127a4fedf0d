"""From programs of the loss language to the instructions of csrc/cpu/program/program.hpp: numbers for everything.

Values per sequence get columns, tiles that are kept and masks get slots, all reused when their last reader is done.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final

from fastreward import _core
from fastreward.cpu.program.schedule import COMPARISONS, LOGIC, Form, Schedule, Selection, Value, looks_for_extremes
from fastreward.language.node import Level, Node
from fastreward.language.program import Program, TokenStep

_TOKEN_OPERATORS: Final = _core.program_token_operators()
_MASK_OPERATORS: Final = _core.program_mask_operators()
_SEQUENCE_OPERATORS: Final = _core.program_sequence_operators()
# csrc/cpu/program/program.hpp: OperandKind, ReductionKind, kTokenOutput
_SLOT, _MASK, _SEQUENCE_VALUE, _SEQUENCE_MASK, _INPUT, _OUTPUT, _REDUCTION, _COEFFICIENT, _CARRY = range(9)
_REDUCTION_KINDS: Final = {"seq_sum": 0, "seq_min": 1, "seq_max": 2, "count": 3, "seq_count": 4}
_TOKEN_OUTPUT: Final = 2**31 - 1


# --------------------------------------------------------------------------------------------------- as numbers
class _Operands:
    """The operands of a step, by key."""

    def __init__(self) -> None:
        self.table: list[tuple[int, int]] = []
        self._at: dict[Hashable, int] = {}

    def get(self, kind: int, index: int) -> int:
        key = kind, index
        if key not in self._at:
            self._at[key] = len(self.table)
            self.table.append(key)
        return self._at[key]


class _StepCode:
    """A step as the arrays of TokenStep."""

    def __init__(self, step: TokenStep, places: _Places, inputs: dict[int, int], contract: bool) -> None:
        self.step = step
        self._places, self._inputs = places, inputs
        self._selection = Selection(step, contract)
        schedule = Schedule(self._selection)
        self._operands = _Operands()
        self._free: dict[int, list[int]] = {_SLOT: [], _MASK: []}
        self._counts = {_SLOT: 0, _MASK: 0}
        self._slots: dict[Hashable, tuple[int, int]] = {}
        self._carries: dict[Hashable, int] = {}  # numbers of the scans'
        self._number_reductions()
        self._last = {k: t for t, f in enumerate(schedule.forms) for k in (f.w, f.x, f.y, f.z)}
        self._chunk_masks = {a for v in schedule.chunk for a in (*v.args, *v.made)}
        self._chunk_masks |= {m.id for _, m in self._selection.counts}
        self.tile = [self._instruction(t, f) for t, f in enumerate(schedule.forms)]
        self.chunk = [self._mask_instruction(v) for v in schedule.chunk]
        for node, mask in self._selection.counts:
            x, z = self._operand(mask.id), self._operand(("reduction", node.id))
            self.chunk.append((_MASK_OPERATORS["count"], x, -1, z))

    def _number_reductions(self) -> None:
        counted = {n.id for n, _ in self._selection.counts}
        self._reductions = [
            (_REDUCTION_KINDS["count" if n.id in counted else n.op], self._places.new(n)) for n in self.step.reduce
        ]
        self._reduction_at = {n.id: i for i, n in enumerate(self.step.reduce)}

    def code(self) -> tuple[Any, ...]:
        """A step as `_core.Program` takes it."""
        way = (bool(self.step.scans), self.step.reverse)
        return (self.step.side, *way, self._operands.table, self.tile, self.chunk, self._reductions)

    def _instruction(self, time: int, form: Form) -> tuple[int, ...]:
        made = form.z if _makes_mask(form.name) else None
        read = [form.w, form.x, form.y, None if made is not None else form.z]
        fields = [-1 if key is None else self._operand(key) for key in read]
        for key in {*read} - {None}:
            if key in self._slots and self._last[key] == time and key not in self._chunk_masks:
                kind, index = self._slots[key]
                self._free[kind].append(index)
        if isinstance(made, tuple):
            fields[3] = self._new_neighbours(*made)
        elif made is not None:
            fields[3] = self._new_slot(made, _MASK)
        kept = -1 if form.k is None else self._new_slot(form.k, _SLOT)
        return (_TOKEN_OPERATORS[form.name], *fields, kept)

    def _mask_instruction(self, v: Value) -> tuple[int, int, int, int]:
        x, y = (*(self._operand(k) for k in v.args), -1)[:2]
        return (_MASK_OPERATORS[v.op], x, y, self._new_slot(v.made[0], _MASK))

    def _new_slot(self, key: Hashable, kind: int) -> int:
        if not self._free[kind]:
            self._free[kind].append(self._counts[kind])
            self._counts[kind] += 1
        self._slots[key] = kind, self._free[kind].pop()
        return self._operands.get(*self._slots[key])

    def _new_neighbours(self, first: Hashable, second: Hashable) -> int:
        """Two masks, one after the other."""
        index = self._counts[_MASK]
        self._counts[_MASK] += 2
        self._slots[first], self._slots[second] = (_MASK, index), (_MASK, index + 1)
        self._operands.get(_MASK, index + 1)
        return self._operands.get(_MASK, index)

    def _operand(self, key: Hashable) -> int:
        if key in self._slots:
            return self._operands.get(*self._slots[key])
        if isinstance(key, tuple):
            kind, index = key
            if kind == "output":
                return self._operands.get(_OUTPUT, index)
            if kind == "coefficient":
                return self._operands.get(_COEFFICIENT, self._places.of(self._selection.nodes[index]))
            if kind == "carry":
                return self._operands.get(_CARRY, self._carries.setdefault(index, len(self._carries)))
            return self._operands.get(_REDUCTION, self._reduction_at[index])
        node = self._selection.nodes[key]
        if node.level < Level.TOKEN:
            return self._operands.get(_SEQUENCE_MASK if node.boolean else _SEQUENCE_VALUE, self._places.of(node))
        assert node.op == "input", node
        return self._operands.get(_INPUT, self._inputs[node.id])


def _makes_mask(name: str) -> bool:
    return name in (*COMPARISONS, *LOGIC, "outside", "sides", "clip_outside") or name.endswith("_and")


# -------------------------------------------------------------------------------------------- values per sequence
class _Places:
    """SequencePlaces: a number for a scalar or batch value, else a column, free again after its last reader."""

    def __init__(self, program: Program) -> None:
        self.numbers: dict[int, int] = {}
        self.columns: dict[int, int] = {}
        self.constants: dict[int, float] = {}
        self.column_count = 0
        self._free: list[int] = []
        self._last = _last_readings(program)

    def of(self, node: Node) -> int:
        """The place of a value that exists already, or of a scalar."""
        if node.level == Level.SEQUENCE:
            return ~self.columns[node.id]
        number = self.numbers.setdefault(node.id, len(self.numbers))
        if node.op == "constant":
            assert node.value is not None
            self.constants[number] = node.value
        return number

    def new(self, node: Node) -> int:
        """A place for a value that is about to be computed."""
        if node.level == Level.SEQUENCE:
            if not self._free:
                self._free.append(self.column_count)
                self.column_count += 1
            self.columns[node.id] = self._free.pop()
        return self.of(node)

    def release(self, time: int, nodes: Iterable[Node]) -> None:
        """Frees the columns of `nodes` that nobody reads after `time`."""
        for node in {n.id: n for n in nodes}.values():
            if node.level == Level.SEQUENCE and self._last.get(node.id, -1) <= time:
                self._free.append(self.columns[node.id])


def _last_readings(program: Program) -> dict[int, int]:
    """By node: when it is read for the last time, in steps of the program."""
    last: dict[int, int] = {}
    for time, (_, reads) in enumerate(_timeline(program)):
        last.update({n.id: time for n in reads})
    end = 1 << 30
    last.update({n.id: end for n in (*program.outputs, *program.batch)})
    return last


def _timeline(program: Program) -> list[tuple[Node | TokenStep, Sequence[Node]]]:
    """Everything that is done with values per sequence, in order, and what it reads."""
    steps: list[tuple[Node | TokenStep, Sequence[Node]]] = [(n, n.args) for n in program.prologue]
    for stage in program.stages:
        steps += [(step, step.given) for step in stage.tokens]
        steps += [(n, n.args) for n in stage.sequences]
    return steps


# ----------------------------------------------------------------------------------------------------- the whole
@dataclass(frozen=True)
class ByKey:
    """A program as a cache's key."""

    key: str
    program: Program = field(hash=False, compare=False)


def encode(program: Program) -> _core.Program:
    """The program as the evaluator takes it; kept."""
    return _encode(ByKey(program.key, program))


@lru_cache(maxsize=512)
def _encode(by_key: ByKey) -> _core.Program:
    program = by_key.program
    places = _Places(program)
    inputs = [(int(n.level), 0 if n.level == Level.TOKEN else places.new(n)) for n in program.all_inputs]
    input_numbers = {n.id: i for i, n in enumerate(program.all_inputs)}
    clock, contract = iter(range(1 << 30)), not looks_for_extremes(program)

    def per_sequence(node: Node) -> tuple[int, ...]:
        args = [places.of(a) for a in node.args]
        places.release(next(clock), node.args)
        return (_SEQUENCE_OPERATORS[node.op], places.new(node), *args, *[0] * (3 - len(args)))

    def tokens(step: TokenStep) -> tuple[Any, ...]:
        code = _StepCode(step, places, input_numbers, contract).code()
        places.release(next(clock), step.given)
        return code

    prologue = [per_sequence(n) for n in program.prologue]
    stages = [
        ([tokens(s) for s in stage.tokens], [per_sequence(n) for n in stage.sequences]) for stage in program.stages
    ]
    scalars = [places.of(n) for n in program.scalars]
    outputs = [_TOKEN_OUTPUT if n.level == Level.TOKEN else places.of(n) for n in program.outputs]
    outputs += [_TOKEN_OUTPUT for _ in program.kept]
    batch = [places.of(n) for n in program.batch]
    return _core.Program(
        sides=program.sides,
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


__all__ = ["encode"]
