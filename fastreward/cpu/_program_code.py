"""From programs of the loss language to the instructions of csrc/cpu/program.hpp.

The evaluator of token passes has one accumulator, a tile of tokens in registers. So a pass's nodes are ordered such
that a value is used where it has just been made; only what is needed again later is kept in a slot. Values per row get
columns, reused when their last reader is done.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Final

from fastreward import _core
from fastreward.losses._graph import Level, Node, is_constant
from fastreward.losses._program import Program, TokenStep

_TOKEN_OPERATORS: Final = _core.program_token_operators()
_MASK_OPERATORS: Final = _core.program_mask_operators()
_ROW_OPERATORS: Final = _core.program_row_operators()
# csrc/cpu/program.hpp: OperandKind, ReductionKind, kTokenOutput
_SLOT, _MASK, _ROW_VALUE, _ROW_MASK, _INPUT, _OUTPUT, _REDUCTION = range(7)
_REDUCTION_KINDS: Final = {"seq_sum": 0, "seq_min": 1, "seq_max": 2, "count": 3, "seq_count": 4}
_TOKEN_OUTPUT: Final = 2**31 - 1
_BOUNDED: Final = 87.0  # |x| up to which exp_bounded may be used

_COMPARISONS: Final = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le", "eq": "eq", "ne": "ne"}  # with arguments swapped
_LOGIC: Final = ("and", "or", "not")
# Operators that may start from memory, and those that may keep their result as well (csrc/cpu/program.hpp).
_STARTING: Final = (
    *("neg", "abs", "sign", "sqrt", "exp", "exp_bounded", "expm1", "log", "log1p", "tanh", "sigmoid", "logsigmoid"),
    *("add", "sub", "from", "mul", "div", "over", "minimum", "maximum"),
)
_KEEPING: Final = (
    *("load", *_STARTING),
    *("fma", "fms", "fnma", "add_product", "sub_product", "clip", "where", "where_not"),
    *("minimum_where", "maximum_where"),
)


# ------------------------------------------------------------------------------------------------- what is computed
@dataclass(eq=False)
class _Value:
    """What an instruction computes, before it is known where from. op: of a node; args: what it reads, by key.

    made: the keys of its results: a value, a mask, or one of each (clip_outside).
    """

    op: str
    args: tuple[Hashable, ...]
    made: tuple[Hashable, ...]


class _Selection:
    """The values of a pass, fused where a fused operator exists. Keys of nodes are their ids."""

    def __init__(self, step: TokenStep) -> None:
        self.step = step
        self.nodes: dict[Hashable, Node] = {}
        self.values: list[_Value] = []
        self.counts: list[tuple[Node, Node]] = []  # (the reduction, the mask that it counts)
        self.sums: list[Node] = []
        for n in step.reduce:
            if n.op == "seq_sum" and (n.args[0].boolean or _is_indicator(n.args[0])):
                self.counts.append((n, n.args[0] if n.args[0].boolean else n.args[0].args[0]))
            elif n.op != "seq_count":
                self.sums.append(n)
        roots = [*(m for _, m in self.counts), *(n.args[0] for n in self.sums), *(n for _, n in step.store)]
        self.body = [n for n in _walk(roots) if n.level == Level.TOKEN and n.op != "input"]
        self.readers: dict[Hashable, int] = {}
        for a in (*(a for n in self.body for a in n.args), *roots):
            self.nodes[a.id] = a
            self.readers[a.id] = self.readers.get(a.id, 0) + 1
        self._inside: set[Hashable] = set()
        self._same = {(n.op, *(a.id for a in n.args)): n for n in self.body}
        self.deferred = self._find_deferred()
        for node in reversed(self.body):
            if node.id not in self._inside:
                self._select(node)
        self.values.reverse()

    def _find_deferred(self) -> set[Hashable]:
        """Masks made of masks that are only counted: bits that can wait for the end of the item."""
        counted = {m.id for _, m in self.counts}
        waiting: set[Hashable] = set()
        readers: dict[Hashable, list[Node]] = {}
        for n in self.body:
            for a in n.args:
                readers.setdefault(a.id, []).append(n)
        sources = {n.args[0].id for n in self.sums} | {n.id for _, n in self.step.store}
        for n in reversed(self.body):
            others = readers.get(n.id, [])
            free = n.op in _LOGIC and n.id not in sources and (others or n.id in counted)
            if free and all(r.id in waiting for r in others):
                waiting.add(n.id)
        return waiting

    # --------------------------------------------------------------------------------------------------- fusing
    def _select(self, node: Node) -> None:
        """Adds the value of a node, with what it takes in. Readers come before what they read."""
        rules: tuple[Callable[[Node], _Value | None], ...] = (
            self._product_sum,
            self._bounded_exp,
            self._clip_outside,
            self._compare_and,
            self._bound_where,
            self._drop,
        )
        for rule in rules:
            value = rule(node)
            if value is not None:
                self.values.append(value)
                return
        self.values.append(_Value(node.op, tuple(a.id for a in node.args), (node.id,)))

    def _take(self, node: Node) -> bool:
        """Whether the node has one reader, which then computes it along with itself."""
        alone = self.readers.get(node.id) == 1 and node.level == Level.TOKEN and node.id not in self._inside
        if alone:
            self._inside.add(node.id)
        return alone

    def _product_sum(self, node: Node) -> _Value | None:
        if node.op not in ("add", "sub"):
            return None
        for k in (1, 0):
            product, other = node.args[k], node.args[1 - k]
            if product.op == "mul" and self._take(product):
                kind = "fma" if node.op == "add" else "fnma" if k == 1 else "fms"
                return _Value(kind, (*(a.id for a in product.args), other.id), (node.id,))
        return None

    def _bounded_exp(self, node: Node) -> _Value | None:
        if node.op != "exp" or node.args[0].op != "clip":
            return None
        bounds = [a.value for a in node.args[0].args[1:] if a.op == "constant"]
        small = len(bounds) == 2 and all(b is not None and abs(b) <= _BOUNDED for b in bounds)
        return _Value("exp_bounded", (node.args[0].id,), (node.id,)) if small else None

    def _clip_outside(self, node: Node) -> _Value | None:
        if node.op not in ("clip", "outside") or any(a.level == Level.TOKEN for a in node.args[1:]):
            return None
        args = tuple(a.id for a in node.args)
        clip, outside = self._same.get(("clip", *args)), self._same.get(("outside", *args))
        if clip is None or outside is None or not {clip.id, outside.id}.isdisjoint(self._inside):
            return None
        self._inside |= {clip.id, outside.id}
        return _Value("clip_outside", args, (clip.id, outside.id))

    def _compare_and(self, node: Node) -> _Value | None:
        if node.op != "and" or node.id in self.deferred:
            return None
        for comparison, mask in (node.args, node.args[::-1]):
            if comparison.op in _COMPARISONS and self._take(comparison):
                return _Value(f"{comparison.op}_and", (*(a.id for a in comparison.args), mask.id), (node.id,))
        return None

    def _bound_where(self, node: Node) -> _Value | None:
        """where(mask, minimum(value, bound), value)."""
        if node.op != "where" or node.args[1].op not in ("minimum", "maximum"):
            return None
        mask, bounded, value = node.args
        if value.id not in [a.id for a in bounded.args] or not self._take(bounded):
            return None
        bound = next((a for a in bounded.args if a.id != value.id), value)
        return _Value(f"{bounded.op}_where", (mask.id, bound.id, value.id), (node.id,))

    def _drop(self, node: Node) -> _Value | None:
        if node.op != "where" or not is_constant(node.args[1], 0.0) or node.args[2].level < Level.TOKEN:
            return None
        masks = [node.args[0]]
        while len(masks) < 3:
            either = next((m for m in masks if m.op == "or" and self._take(m)), None)
            if either is None:
                break
            k = masks.index(either) if False else next(i for i, m in enumerate(masks) if m is either)
            masks[k : k + 1] = either.args
        name = ("drop", "drop2", "drop3")[len(masks) - 1]
        return _Value(name, (*(m.id for m in masks), node.args[2].id), (node.id,))


def _walk(roots: Iterable[Node]) -> list[Node]:
    """Token nodes under `roots`, arguments first."""
    seen: dict[int, Node] = {}
    waiting = list(roots)
    while waiting:
        node = waiting.pop()
        if node.id not in seen:
            seen[node.id] = node
            if node.level == Level.TOKEN:
                waiting.extend(node.args)
    return [seen[i] for i in sorted(seen)]


def _is_indicator(node: Node) -> bool:
    return node.op == "where" and is_constant(node.args[1], 1.0) and is_constant(node.args[2], 0.0)


# ---------------------------------------------------------------------------------------------------- the order
@dataclass
class _Form:
    """One way to compute a value with `acc` in the accumulator: the operator and its fields x, y, z."""

    name: str
    acc: Hashable
    x: Hashable = None
    y: Hashable = None
    z: Hashable = None
    w: Hashable = None  # loaded first
    k: Hashable = None  # kept
    changes: bool = True  # whether the accumulator holds something else afterwards


def _forms(v: _Value) -> Iterator[_Form]:
    """All ways to compute a value that leaves or makes something in the accumulator."""
    a, b, c = (*v.args, None, None, None)[:3]
    if v.op in _COMPARISONS:
        yield _Form(v.op, a, b, z=v.made[0], changes=False)
        yield _Form(_COMPARISONS[v.op], b, a, z=v.made[0], changes=False)
    elif v.op.endswith("_and"):
        name = v.op.removesuffix("_and")
        yield _Form(v.op, a, b, c, v.made[0], changes=False)
        yield _Form(f"{_COMPARISONS[name]}_and", b, a, c, v.made[0], changes=False)
    elif v.op == "outside":
        yield _Form(v.op, a, b, c, v.made[0], changes=False)
    elif v.op == "clip_outside":
        yield _Form(v.op, a, b, c, v.made[1])
    elif v.op == "where":
        yield _Form("where", b, c, z=a)
        yield _Form("where_not", c, b, z=a)
    elif v.op in ("minimum_where", "maximum_where"):
        yield _Form(v.op, c, b, z=a)
    elif v.op.startswith("drop"):
        *masks, value = v.args
        z, y, w = (*masks, None, None)[:3]
        yield _Form(v.op, value, y=y, z=z, w=w)
    elif v.op in ("add", "mul", "minimum", "maximum"):
        yield _Form(v.op, a, b)
        yield _Form(v.op, b, a)
    elif v.op in ("sub", "div"):
        yield _Form(v.op, a, b)
        yield _Form({"sub": "from", "div": "over"}[v.op], b, a)
    elif v.op in ("fma", "fms", "fnma"):
        yield _Form(v.op, a, b, c)
        yield _Form(v.op, b, a, c)
        if v.op != "fms":
            yield _Form({"fma": "add_product", "fnma": "sub_product"}[v.op], c, a, b)
    else:
        yield _Form(v.op, a, b, c)


class _Schedule:
    """Orders the values of a pass; `forms` is the result, with loads and keeps."""

    def __init__(self, selection: _Selection) -> None:
        self.selection = s = selection
        self.forms: list[_Form] = []
        self.item: list[_Value] = []
        self._waiting: list[_Value] = []
        for v in s.values:
            (self.item if v.op in _LOGIC and v.made[0] in s.deferred else self._waiting).append(v)
        self._made: set[Hashable] = {k for k, n in s.nodes.items() if n.op == "input" or n.level < Level.TOKEN}
        self._kept: set[Hashable] = set(self._made)
        self._acc: Hashable = None
        self._endings = self._ending_forms()
        while self._waiting or self._endings:
            self._advance()
        self.forms = _joined(self.forms)

    def _ending_forms(self) -> dict[Hashable, list[_Form]]:
        """Reductions and outputs, by the value that they take from the accumulator."""
        endings: dict[Hashable, list[_Form]] = {}
        by_source: dict[Hashable, dict[str, Hashable]] = {}
        for n in self.selection.sums:
            by_source.setdefault(n.args[0].id, {})[n.op] = ("reduction", n.id)
        for key, found in by_source.items():
            total, least, most = (found.get(k) for k in ("seq_sum", "seq_min", "seq_max"))
            source = self.selection.nodes[key]
            if None not in (total, least, most) and source.op in ("exp", "sigmoid"):
                forms = [_Form("sum_extremes", key, total, least, most, changes=False)]
            else:
                forms = [_Form("sum", key, total, changes=False)] if total is not None else []
                if least is not None and most is not None:
                    forms.append(_Form("extremes", key, least, most, changes=False))
                else:
                    forms += [_Form("least", key, least, changes=False)] if least is not None else []
                    forms += [_Form("most", key, most, changes=False)] if most is not None else []
            endings.setdefault(key, []).extend(forms)
        for i, node in self.selection.step.store:
            endings.setdefault(node.id, []).append(_Form("store", node.id, ("output", i), changes=False))
        return endings

    def _advance(self) -> None:
        """Whatever needs no other accumulator first; then what changes it; else loads one."""
        ready = [v for v in self._waiting if all(a in self._made for a in v.args)]
        logic = [v for v in ready if v.op in _LOGIC]
        for v in logic:
            self._emit(_Form(v.op, None, v.args[0], (*v.args, None)[1], v.made[0], changes=False), v)
        endings = self._endings.pop(self._acc, [])
        self.forms += endings
        here = [(f, v) for v in ready if v.op not in _LOGIC for f in _forms(v) if f.acc == self._acc]
        still: dict[int, tuple[_Form, _Value]] = {}
        for form, v in here:
            if not form.changes:
                still.setdefault(id(v), (form, v))
        for form, v in still.values():
            self._emit(form, v)
        if logic or endings or still:
            return
        if here:
            self._emit(*max(here, key=lambda pair: self._releases(pair[1])))
        else:
            self._load([v for v in ready if v.op not in _LOGIC])

    def _releases(self, v: _Value) -> int:
        """How many of a value's arguments nobody else waits for."""
        return sum(not any(a in w.args for w in self._waiting if w is not v) for a in set(v.args))

    def _needed(self, key: Hashable, besides: _Value | None) -> bool:
        return key in self._endings or any(key in w.args for w in self._waiting if w is not besides)

    def _keep(self) -> None:
        if self._acc is not None and self._acc not in self._kept:
            self.forms.append(_Form("keep", self._acc, k=self._acc, changes=False))
            self._kept.add(self._acc)

    def _emit(self, form: _Form, v: _Value) -> None:
        self._waiting.remove(v)
        twice = form.acc is not None and form.acc in (form.x, form.y)
        if twice or (form.changes and self._acc is not None and self._needed(self._acc, v)):
            self._keep()
        self.forms.append(form)
        self._made.update(v.made)
        if form.changes:
            self._acc = v.made[0]

    def _load(self, ready: Sequence[_Value]) -> None:
        """Brings an argument of the first value that can be computed, or of an ending."""
        if self._acc is not None and self._needed(self._acc, None):
            self._keep()
        key = next((f.acc for v in ready for f in self._choices(v)), None)
        if key is None:
            key = next(k for k in self._endings if k in self._made)
        self.forms.append(_Form("load", None, w=key))
        self._acc = key

    def _choices(self, v: _Value) -> list[_Form]:
        """Forms by what they load: a token's value rather than a row's."""
        return sorted(_forms(v), key=lambda f: -self.selection.nodes[f.acc].level)


def _joined(forms: Sequence[_Form]) -> list[_Form]:
    """Several as one: what is loaded is computed with, what was computed is kept, both sides are compared."""
    joined: list[_Form] = []
    maker: _Form | None = None  # of what the accumulator holds
    for form in forms:
        last = joined[-1] if joined else None
        if form.name == "keep" and maker is not None and maker.name in _KEEPING:
            maker.k = form.k
            continue
        if last is not None and last.name == "load" and last.k is None and form.name in _STARTING:
            form.w = last.w
            joined.pop()
        elif last is not None and form.name == "store" and last.name in ("drop", "drop2", "drop3"):
            form = replace(last, name=f"{last.name}_store", x=form.x)
            joined.pop()
        elif last is not None and {last.name, form.name} == {"lt", "gt"}:
            below, above = (last, form) if form.name == "gt" else (form, last)
            form = replace(below, name="sides", y=above.x, z=(below.z, above.z))
            joined.pop()
        joined.append(form)
        maker = form if form.changes else maker
    return joined


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

    def __init__(self, step: TokenStep, places: _Places, inputs: dict[int, int]) -> None:
        self.step = step
        self._places, self._inputs = places, inputs
        self._selection = _Selection(step)
        schedule = _Schedule(self._selection)
        self._operands = _Operands()
        self._free: dict[int, list[int]] = {_SLOT: [], _MASK: []}
        self._counts = {_SLOT: 0, _MASK: 0}
        self._slots: dict[Hashable, tuple[int, int]] = {}
        self._number_reductions()
        self._last = {k: t for t, f in enumerate(schedule.forms) for k in (f.w, f.x, f.y, f.z)}
        self._item_masks = {a for v in schedule.item for a in (*v.args, *v.made)}
        self._item_masks |= {m.id for _, m in self._selection.counts}
        self.tile = [self._instruction(t, f) for t, f in enumerate(schedule.forms)]
        self.item = [self._mask_instruction(v) for v in schedule.item]
        for node, mask in self._selection.counts:
            x, z = self._operand(mask.id), self._operand(("reduction", node.id))
            self.item.append((_MASK_OPERATORS["count"], x, -1, z))

    def _number_reductions(self) -> None:
        counted = {n.id for n, _ in self._selection.counts}
        self._reductions = [
            (_REDUCTION_KINDS["count" if n.id in counted else n.op], self._places.new(n)) for n in self.step.reduce
        ]
        self._reduction_at = {n.id: i for i, n in enumerate(self.step.reduce)}

    def code(self) -> tuple[Any, ...]:
        """What `_core.Program` takes for a step."""
        return (self.step.side, self._operands.table, self.tile, self.item, self._reductions)

    def _instruction(self, time: int, form: _Form) -> tuple[int, ...]:
        made = form.z if _makes_mask(form.name) else None
        read = [form.w, form.x, form.y, None if made is not None else form.z]
        fields = [-1 if key is None else self._operand(key) for key in read]
        for key in {*read} - {None}:
            if key in self._slots and self._last[key] == time and key not in self._item_masks:
                kind, index = self._slots[key]
                self._free[kind].append(index)
        if isinstance(made, tuple):
            fields[3] = self._new_neighbours(*made)
        elif made is not None:
            fields[3] = self._new_slot(made, _MASK)
        kept = -1 if form.k is None else self._new_slot(form.k, _SLOT)
        return (_TOKEN_OPERATORS[form.name], *fields, kept)

    def _mask_instruction(self, v: _Value) -> tuple[int, int, int, int]:
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
            return self._operands.get(_REDUCTION, self._reduction_at[index])
        node = self._selection.nodes[key]
        if node.level < Level.TOKEN:
            return self._operands.get(_ROW_MASK if node.boolean else _ROW_VALUE, self._places.of(node))
        assert node.op == "input", node
        return self._operands.get(_INPUT, self._inputs[node.id])


def _makes_mask(name: str) -> bool:
    return name in (*_COMPARISONS, *_LOGIC, "outside", "sides", "clip_outside") or name.endswith("_and")


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


def _timeline(program: Program) -> list[tuple[Node | TokenStep, Sequence[Node]]]:
    """Everything that is done with values per row, in order, and what it reads."""
    steps: list[tuple[Node | TokenStep, Sequence[Node]]] = [(n, n.args) for n in program.prologue]
    for stage in program.stages:
        steps += [(step, step.rows) for step in stage.tokens]
        steps += [(n, n.args) for n in stage.rows]
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
    inputs = [(int(n.level), 0 if n.level == Level.TOKEN else places.new(n)) for n in program.inputs]
    input_numbers = {n.id: i for i, n in enumerate(program.inputs)}
    clock = iter(range(1 << 30))

    def row(node: Node) -> tuple[int, ...]:
        args = [places.of(a) for a in node.args]
        places.release(next(clock), node.args)
        return (_ROW_OPERATORS[node.op], places.new(node), *args, *[0] * (3 - len(args)))

    def tokens(step: TokenStep) -> tuple[Any, ...]:
        code = _StepCode(step, places, input_numbers).code()
        places.release(next(clock), step.rows)
        return code

    prologue = [row(n) for n in program.prologue]
    stages = [([tokens(step) for step in stage.tokens], [row(n) for n in stage.rows]) for stage in program.stages]
    scalars = [places.of(n) for n in program.scalars]
    outputs = [_TOKEN_OUTPUT if n.level == Level.TOKEN else places.of(n) for n in program.outputs]
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
