"""The order in which a pass over the tokens computes its nodes, and what is computed together.

The evaluator (csrc/cpu/program/program.hpp) has one accumulator, a tile of tokens in registers. So a value is used
where it has just been made as far as that goes, and what is needed again later is kept in a slot.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from fastreward.language.node import Level, Node, is_constant, walk
from fastreward.language.ops import OPS, REDUCTIONS, SCANS
from fastreward.language.program import Program, TokenStep

_BOUNDED: Final = 87.0  # |x| up to which exp_bounded may be used

COMPARISONS: Final = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le", "eq": "eq", "ne": "ne"}  # with arguments swapped
LOGIC: Final = ("and", "or", "not")
_EXTREMES: Final = tuple(op for op in REDUCTIONS if op.endswith(("_max", "_min")))
# Operators that may start from memory (of one argument: from a sequence's value too), and those that may keep their
# result as well (csrc/cpu/program/program.hpp).
_STARTING_ANYWHERE: Final = ("exp_bounded", *(op for op, row in OPS.items() if row.arity == 1 and not row.boolean))
_STARTING: Final = (*_STARTING_ANYWHERE, "add", "sub", "from", "mul", "div", "over", "minimum", "maximum")
_KEEPING: Final = (
    *("load", *_STARTING),
    *("fma", "fms", "fnma", "add_product", "sub_product", "clip", "where", "where_not"),
    *("minimum_where", "maximum_where"),
)


# ------------------------------------------------------------------------------------------------- what is computed
@dataclass(eq=False)
class Value:
    """A value that an instruction computes, before it is known where from. op: of a node; args: what it reads, by key.

    made: the keys of its results: a value, a mask, or one of each (clip_outside).
    """

    op: str
    args: tuple[Hashable, ...]
    made: tuple[Hashable, ...]


class Selection:
    """The values of a pass, fused where a fused operator exists. Keys of nodes are their ids.

    contract: whether a product and a sum may be rounded once; a value then has other bits in another pass, where its
    product is kept because somebody else reads it too.
    """

    def __init__(self, step: TokenStep, contract: bool) -> None:
        self.step, self._contract = step, contract
        self.nodes: dict[Hashable, Node] = {}
        self.values: list[Value] = []
        self.counts: list[tuple[Node, Node]] = []  # (the reduction, the mask that it counts)
        self.sums: list[tuple[Node, Node]] = []  # (the reduction, the value)
        for n in step.reduce:
            if n.op == "seq_sum" and (n.args[0].boolean or _is_indicator(n.args[0])):
                self.counts.append((n, n.args[0] if n.args[0].boolean else n.args[0].args[0]))
            elif n.op != "seq_count":
                self.sums.append((n, _as_number(n.args[0])))
        self.stores = [(i, _as_number(n)) for i, n in step.store]
        roots = [x for _, x in (*self.counts, *self.sums, *self.stores)]
        self.body = [
            n for n in walk(roots, lambda n: n.level == Level.TOKEN) if n.level == Level.TOKEN and n.op != "input"
        ]
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
        """Masks made of masks that are only counted: bits that can wait for the end of the chunk."""
        counted = {m.id for _, m in self.counts}
        waiting: set[Hashable] = set()
        readers: dict[Hashable, list[Node]] = {}
        for n in self.body:
            for a in n.args:
                readers.setdefault(a.id, []).append(n)
        sources = {x.id for _, x in (*self.sums, *self.stores)}
        for n in reversed(self.body):
            others = readers.get(n.id, [])
            free = n.op in LOGIC and n.id not in sources and (others or n.id in counted)
            if free and all(r.id in waiting for r in others):
                waiting.add(n.id)
        return waiting

    # --------------------------------------------------------------------------------------------------- fusing
    def _select(self, node: Node) -> None:
        """Adds the value of a node, with what it takes in. Readers come before what they read."""
        rules: tuple[Callable[[Node], Value | None], ...] = (
            self._scan,
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
        self.values.append(Value(node.op, tuple(a.id for a in node.args), (node.id,)))

    def _take(self, node: Node) -> bool:
        """Whether the node has one reader, which then computes it along with itself."""
        alone = self.readers.get(node.id) == 1 and node.level == Level.TOKEN and node.id not in self._inside
        if alone:
            self._inside.add(node.id)
        return alone

    def _scan(self, node: Node) -> Value | None:
        if node.op not in SCANS:
            return None
        x, *by = node.args
        return Value(node.op, (x.id, *(c.id if c.level == Level.TOKEN else _coefficient(c) for c in by)), (node.id,))

    def _product_sum(self, node: Node) -> Value | None:
        if node.op not in ("add", "sub") or not self._contract:
            return None
        for k in (1, 0):
            product, other = node.args[k], node.args[1 - k]
            if product.op == "mul" and self._take(product):
                kind = "fma" if node.op == "add" else "fnma" if k == 1 else "fms"
                return Value(kind, (*(a.id for a in product.args), other.id), (node.id,))
        return None

    def _bounded_exp(self, node: Node) -> Value | None:
        if node.op != "exp" or node.args[0].op != "clip":
            return None
        bounds = [a.value for a in node.args[0].args[1:] if a.op == "constant"]
        small = len(bounds) == 2 and all(b is not None and abs(b) <= _BOUNDED for b in bounds)
        return Value("exp_bounded", (node.args[0].id,), (node.id,)) if small else None

    def _clip_outside(self, node: Node) -> Value | None:
        if node.op not in ("clip", "outside") or any(a.level == Level.TOKEN for a in node.args[1:]):
            return None
        args = tuple(a.id for a in node.args)
        clip, outside = self._same.get(("clip", *args)), self._same.get(("outside", *args))
        if clip is None or outside is None or not {clip.id, outside.id}.isdisjoint(self._inside):
            return None
        self._inside |= {clip.id, outside.id}
        return Value("clip_outside", args, (clip.id, outside.id))

    def _compare_and(self, node: Node) -> Value | None:
        if node.op != "and" or node.id in self.deferred:
            return None
        for comparison, mask in (node.args, node.args[::-1]):
            if comparison.op in COMPARISONS and self._take(comparison):
                return Value(f"{comparison.op}_and", (*(a.id for a in comparison.args), mask.id), (node.id,))
        return None

    def _bound_where(self, node: Node) -> Value | None:
        """where(mask, minimum(value, bound), value)."""
        if node.op != "where" or node.args[1].op not in ("minimum", "maximum"):
            return None
        mask, bounded, value = node.args
        if value.id not in [a.id for a in bounded.args] or not self._take(bounded):
            return None
        bound = next((a for a in bounded.args if a.id != value.id), value)
        return Value(f"{bounded.op}_where", (mask.id, bound.id, value.id), (node.id,))

    def _drop(self, node: Node) -> Value | None:
        if node.op != "where" or not is_constant(node.args[1], 0.0) or node.args[2].level < Level.TOKEN:
            return None
        masks = [node.args[0]]
        while len(masks) < 3:
            either = next((m for m in masks if m.op == "or" and self._take(m)), None)
            if either is None:
                break
            masks = [m for m in masks if m is not either] + [*either.args]
        name = ("drop", "drop2", "drop3")[len(masks) - 1]
        return Value(name, (*(m.id for m in masks), node.args[2].id), (node.id,))


def looks_for_extremes(program: Program) -> bool:
    """Whether a pass looks for the tokens that a maximum or minimum of an earlier pass came from, as gradients do."""
    body = (n for stage in program.stages for step in stage.tokens for n in step.body)
    return any(n.op in COMPARISONS and any(a.op in _EXTREMES for a in n.args) for n in body)


def _coefficient(node: Node) -> Hashable:
    """Key of a value per sequence as scans take it, in f64."""
    return "coefficient", node.id


def _as_number(node: Node) -> Node:
    return node.graph.call("where", node, 1.0, 0.0) if node.boolean else node


def _is_indicator(node: Node) -> bool:
    return node.op == "where" and is_constant(node.args[1], 1.0) and is_constant(node.args[2], 0.0)


# ---------------------------------------------------------------------------------------------------- the order
@dataclass
class Form:
    """One way to compute a value with `acc` in the accumulator: the operator and its fields x, y, z."""

    name: str
    acc: Hashable
    x: Hashable = None
    y: Hashable = None
    z: Hashable = None
    w: Hashable = None  # loaded first
    k: Hashable = None  # kept
    changes: bool = True  # whether the accumulator holds something else afterwards


def _forms(v: Value) -> Iterator[Form]:
    """All ways to compute a value that leaves or makes something in the accumulator."""
    a, b, c = (*v.args, None, None, None)[:3]
    if v.op in COMPARISONS:
        yield Form(v.op, a, b, z=v.made[0], changes=False)
        yield Form(COMPARISONS[v.op], b, a, z=v.made[0], changes=False)
    elif v.op.endswith("_and"):
        name = v.op.removesuffix("_and")
        yield Form(v.op, a, b, c, v.made[0], changes=False)
        yield Form(f"{COMPARISONS[name]}_and", b, a, c, v.made[0], changes=False)
    elif v.op == "outside":
        yield Form(v.op, a, b, c, v.made[0], changes=False)
    elif v.op == "clip_outside":
        yield Form(v.op, a, b, c, v.made[1])
    elif v.op == "where":
        yield Form("where", b, c, z=a)
        yield Form("where_not", c, b, z=a)
    elif v.op in ("minimum_where", "maximum_where"):
        yield Form(v.op, c, b, z=a)
    elif v.op.startswith("drop"):
        *masks, value = v.args
        z, y, w = (*masks, None, None)[:3]
        yield Form(v.op, value, y=y, z=z, w=w)
    elif v.op in SCANS:
        yield Form(v.op, a, b, ("carry", v.made[0]))
    elif v.op in ("add", "mul", "minimum", "maximum"):
        yield Form(v.op, a, b)
        yield Form(v.op, b, a)
    elif v.op in ("sub", "div"):
        yield Form(v.op, a, b)
        yield Form({"sub": "from", "div": "over"}[v.op], b, a)
    elif v.op in ("fma", "fms", "fnma"):
        yield Form(v.op, a, b, c)
        yield Form(v.op, b, a, c)
        if v.op != "fms":
            yield Form({"fma": "add_product", "fnma": "sub_product"}[v.op], c, a, b)
    else:
        yield Form(v.op, a, b, c)


class Schedule:
    """Orders the values of a pass; `forms` is the result, with loads and keeps."""

    def __init__(self, selection: Selection) -> None:
        self.selection = s = selection
        self.forms: list[Form] = []
        self.chunk: list[Value] = []
        self._waiting: list[Value] = []
        for v in s.values:
            (self.chunk if v.op in LOGIC and v.made[0] in s.deferred else self._waiting).append(v)
        self._made: set[Hashable] = {k for k, n in s.nodes.items() if n.op == "input" or n.level < Level.TOKEN}
        self._made |= {_coefficient(n) for n in s.nodes.values() if n.level < Level.TOKEN}
        self._kept: set[Hashable] = set(self._made)
        self._acc: Hashable = None
        self._endings = self._ending_forms()
        while self._waiting or self._endings:
            self._advance()
        self.forms = _joined(self.forms, {k for k, n in s.nodes.items() if n.level < Level.TOKEN})

    def _ending_forms(self) -> dict[Hashable, list[Form]]:
        """Reductions and outputs, by the value that they take from the accumulator."""
        endings: dict[Hashable, list[Form]] = {}
        by_source: dict[Hashable, dict[str, Hashable]] = {}
        for n, x in self.selection.sums:
            by_source.setdefault(x.id, {})[n.op] = ("reduction", n.id)
        for key, found in by_source.items():
            total, least, most = (found.get(k) for k in ("seq_sum", "seq_min", "seq_max"))
            source = self.selection.nodes[key]
            if None not in (total, least, most) and source.op in ("exp", "sigmoid"):
                forms = [Form("sum_extremes", key, total, least, most, changes=False)]
            else:
                forms = [Form("sum", key, total, changes=False)] if total is not None else []
                if least is not None and most is not None:
                    forms.append(Form("extremes", key, least, most, changes=False))
                else:
                    forms += [Form("least", key, least, changes=False)] if least is not None else []
                    forms += [Form("most", key, most, changes=False)] if most is not None else []
            endings.setdefault(key, []).extend(forms)
        for i, node in self.selection.stores:
            endings.setdefault(node.id, []).append(Form("store", node.id, ("output", i), changes=False))
        return endings

    def _advance(self) -> None:
        """Emit instructions that preserve the accumulator, then one that overwrites it, else a load."""
        ready = [v for v in self._waiting if all(a in self._made for a in v.args)]
        logic = [v for v in ready if v.op in LOGIC]
        for v in logic:
            self._emit(Form(v.op, None, v.args[0], (*v.args, None)[1], v.made[0], changes=False), v)
        endings = self._endings.pop(self._acc, [])
        self.forms += endings
        here = [(f, v) for v in ready if v.op not in LOGIC for f in _forms(v) if f.acc == self._acc]
        still: dict[int, tuple[Form, Value]] = {}
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
            self._load([v for v in ready if v.op not in LOGIC])

    def _releases(self, v: Value) -> int:
        """How many of a value's arguments nobody else waits for."""
        return sum(not any(a in w.args for w in self._waiting if w is not v) for a in set(v.args))

    def _needed(self, key: Hashable, besides: Value | None) -> bool:
        return key in self._endings or any(key in w.args for w in self._waiting if w is not besides)

    def _keep(self) -> None:
        if self._acc is not None and self._acc not in self._kept:
            self.forms.append(Form("keep", self._acc, k=self._acc, changes=False))
            self._kept.add(self._acc)

    def _emit(self, form: Form, v: Value) -> None:
        self._waiting.remove(v)
        twice = form.acc is not None and form.acc in (form.x, form.y)
        if twice or (form.changes and self._acc is not None and self._needed(self._acc, v)):
            self._keep()
        self.forms.append(form)
        self._made.update(v.made)
        if form.changes:
            self._acc = v.made[0]

    def _load(self, ready: Sequence[Value]) -> None:
        """Brings an argument of the first value that can be computed, or of an ending."""
        if self._acc is not None and self._needed(self._acc, None):
            self._keep()
        key = next((f.acc for v in ready for f in self._choices(v)), None)
        if key is None:
            key = next(k for k in self._endings if k in self._made)
        self.forms.append(Form("load", None, w=key))
        self._acc = key

    def _choices(self, v: Value) -> list[Form]:
        """Forms by what they load: a token's value rather than a sequence's."""
        return sorted(_forms(v), key=lambda f: -self.selection.nodes[f.acc].level)


def _joined(forms: Sequence[Form], sequences: Container[Hashable]) -> list[Form]:
    """Several as one: what is loaded is computed with, what was computed is kept, both sides are compared.

    sequences: keys of values per sequence.
    """
    joined: list[Form] = []
    maker: Form | None = None  # of what the accumulator holds
    for form in forms:
        last = joined[-1] if joined else None
        if form.name == "keep" and maker is not None and maker.name in _KEEPING:
            maker.k = form.k
            continue
        starting = _STARTING_ANYWHERE if last is not None and last.w in sequences else _STARTING
        if last is not None and last.name == "load" and last.k is None and form.name in starting:
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
