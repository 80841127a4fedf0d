"""Expression graphs: what a loss becomes when it is called with terms instead of numbers.

Every node lives in one graph, which keeps equal nodes once (common subexpressions), folds constants and drops what has
no effect while it is built. A node's level says how often it has a value: once (SCALAR: known before anything runs;
BATCH: known on the device), once a sequence (SEQUENCE) or once a token (TOKEN).
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from enum import IntEnum
from numbers import Real
from typing import Any, Final, NoReturn

from fastreward.language.ops import OPS, REDUCTIONS

_HERE: Final = os.path.dirname(os.path.abspath(__file__))


class Level(IntEnum):
    """How often a node has a value."""

    SCALAR = 0
    BATCH = 1
    SEQUENCE = 2
    TOKEN = 3


class Node:
    """A symbolic value; arithmetic and comparisons with it give further ones.

    `id` grows in the order of creation, so that arguments always have smaller ones. `side` tells the two sets of
    tokens of a preference loss apart (0 chosen, 1 rejected).
    """

    __slots__ = ("args", "boolean", "graph", "id", "level", "name", "op", "side", "value")

    def __init__(
        self,
        graph: Graph,
        op: str,
        args: tuple[Node, ...],
        level: Level,
        side: int,
        boolean: bool,
        value: float | None,
        name: str | None,
    ) -> None:
        self.graph, self.op, self.args, self.level, self.side = graph, op, args, level, side
        self.boolean, self.value, self.name = boolean, value, name
        self.id = graph.count

    # ------------------------------------------------------------------------------------------------- operators
    def __add__(self, other: object) -> Node:
        return self.graph.call("add", self, other)

    def __radd__(self, other: object) -> Node:
        return self.graph.call("add", other, self)

    def __sub__(self, other: object) -> Node:
        return self.graph.call("sub", self, other)

    def __rsub__(self, other: object) -> Node:
        return self.graph.call("sub", other, self)

    def __mul__(self, other: object) -> Node:
        return self.graph.call("mul", self, other)

    def __rmul__(self, other: object) -> Node:
        return self.graph.call("mul", other, self)

    def __truediv__(self, other: object) -> Node:
        return self.graph.call("div", self, other)

    def __rtruediv__(self, other: object) -> Node:
        return self.graph.call("div", other, self)

    def __pow__(self, exponent: object) -> Node:
        power = python_number(exponent)
        if isinstance(power, float) and power == 0.5:
            return self.graph.call("sqrt", self)
        if isinstance(power, Node):
            self.fail(
                "** takes a number, got a term; write exp(y * log(x)), or name the parameter in define(static=...)"
            )
        if isinstance(power, bool) or not isinstance(power, int | float):
            self.fail(f"** takes a whole number or 0.5, got {described(exponent)}")
        if power % 1 != 0:
            self.fail(f"** takes a whole number or 0.5, got {power!r}; write exp({power!r} * log(x))")
        result = self.graph.constant(1.0)
        for _ in range(abs(int(power))):
            result = result * self
        return result if power >= 0 else 1.0 / result

    def __pos__(self) -> Node:
        return self

    def __neg__(self) -> Node:
        return self.graph.call("neg", self)

    def __abs__(self) -> Node:
        return self.graph.call("abs", self)

    def __lt__(self, other: object) -> Node:
        return self.graph.call("lt", self, other)

    def __le__(self, other: object) -> Node:
        return self.graph.call("le", self, other)

    def __gt__(self, other: object) -> Node:
        return self.graph.call("gt", self, other)

    def __ge__(self, other: object) -> Node:
        return self.graph.call("ge", self, other)

    def __eq__(self, other: object) -> Node:  # type: ignore[override]
        return self.graph.call("eq", self, other)

    def __ne__(self, other: object) -> Node:  # type: ignore[override]
        return self.graph.call("ne", self, other)

    def __and__(self, other: object) -> Node:
        return self.graph.call("and", self, other)

    def __rand__(self, other: object) -> Node:
        return self.graph.call("and", other, self)

    def __or__(self, other: object) -> Node:
        return self.graph.call("or", self, other)

    def __ror__(self, other: object) -> Node:
        return self.graph.call("or", other, self)

    def __invert__(self) -> Node:
        return self.graph.call("not", self)

    __hash__ = object.__hash__  # by identity; never a key of a dict: == gives a node

    # ---------------------------------------------------------------------------------------------- what can't be
    def __bool__(self) -> NoReturn:
        self.fail("a term has no truth value while the loss is traced; write where(condition, a, b), and & | ~")

    def __float__(self) -> NoReturn:
        self.fail("a term is not a number while the loss is traced; use the functions of fastreward.losses, not math's")

    __int__ = __index__ = __complex__ = __float__

    def __len__(self) -> NoReturn:
        self.fail("a term has no length; it stands for one token or one sequence (t.length counts a sequence's tokens)")

    def __iter__(self) -> NoReturn:
        self.fail("a term can't be iterated over; it stands for one token or one sequence")

    def __contains__(self, _: object) -> NoReturn:
        self.fail("a term can't be searched; it stands for one token or one sequence")

    def __getitem__(self, _: object) -> NoReturn:
        self.fail("a term can't be indexed; it stands for one token or one sequence")

    def __rpow__(self, base: object) -> NoReturn:
        self.fail(f"a term can't be an exponent; write exp(x * math.log({base!r}))")

    def __matmul__(self, _: object) -> NoReturn:
        self.fail("@ is not in the language; a product summed over a sequence is seq_sum(x * y)")

    def __xor__(self, _: object) -> NoReturn:
        self.fail("^ is not in the language; a power is x ** 2, one condition or the other (a & ~b) | (~a & b)")

    def __round__(self, *_: object) -> NoReturn:
        self.fail("the language does not round: no round, floor, //, % or divmod; use comparisons, or round an extra")

    __floor__ = __ceil__ = __trunc__ = __floordiv__ = __mod__ = __divmod__ = __round__
    __rfloordiv__ = __rmod__ = __rdivmod__ = __round__
    __rmatmul__, __rxor__ = __matmul__, __xor__

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_"):
            raise AttributeError(name)
        raise AttributeError(f"{origin()}: a term has no .{name}; {_instead(name)}")

    @classmethod
    def __torch_function__(cls, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        _refuse_foreign("torch", function, args)

    def __array_function__(self, function: Any, _: Any, args: Any, kwargs: Any) -> NoReturn:
        _refuse_foreign("NumPy", function, args)

    def __array_ufunc__(self, ufunc: Any, _: str, *inputs: Any, **__: Any) -> Node:
        if ufunc.__name__ not in _SIGNS or _given(inputs):
            _refuse_foreign("NumPy", ufunc, inputs)
        return self.graph.call(_SIGNS[ufunc.__name__], *inputs)  # a NumPy scalar left of a sign

    def __array__(self, *_: object, **__: object) -> NoReturn:
        self.fail("a term is no array while the loss is traced; use the functions of fastreward.losses, not NumPy's")

    def fail(self, message: str) -> NoReturn:
        """Raises a TypeError that names the line of the loss."""
        raise TypeError(f"{origin()}: {message}")

    def __repr__(self) -> str:
        from fastreward.language.show import expression

        return expression(self)


_TOKEN, _SEQUENCE = Level.TOKEN, Level.SEQUENCE
#: Which operands of an operator are conditions; of the others none.
_CONDITIONS: Final = {"where": [True, False, False], "and": [True, True], "or": [True, True], "not": [True]}
_NUMBERS: Final = [[False] * arity for arity in range(4)]


class Graph:
    """Makes nodes."""

    def __init__(self, sides: int = 1, on_device: Collection[str] = ()) -> None:
        self.sides = sides  # 2 for losses over pairs of sequences
        self.on_device = frozenset(on_device)  # parameters whose values the host does not know
        self.reader = "the loss"  # whose formula it is, for messages
        self.count = 0
        self._nodes: dict[tuple[object, ...], Node] = {}

    # ------------------------------------------------------------------------------------------------------ leaves
    def constant(self, value: float) -> Node:
        """A number that is part of the formula."""
        value = float(value)
        return self._make("constant", (), Level.SCALAR, value=value, key=(repr(value),))

    def truth(self, value: float | None) -> Node:
        """A condition that always, or never, holds."""
        truth = bool(value)
        return self._make("constant", (), Level.SCALAR, boolean=True, value=float(truth), key=(truth,))

    def parameter(self, name: str) -> Node:
        """A number that is given at each call; one that only a kernel may read is an input of the batch."""
        if name in self.on_device:
            return self.input(f"parameter.{name}", Level.BATCH)
        return self._make("parameter", (), Level.SCALAR, name=name, key=(name,))

    def input(self, name: str, level: Level, side: int = 0) -> Node:
        """What a tensor of the call holds for the token or the sequence."""
        return self._make("input", (), level, side=side, name=name, key=(name, level, side))

    # -------------------------------------------------------------------------------------------------- operators
    def node(self, x: object) -> Node:
        """`x`, or the constant it is."""
        if isinstance(x, Node):
            if x.graph is not self:
                x.fail("terms of two different calls are mixed in one expression")
            return x
        x = python_number(x)
        if isinstance(x, int | float):
            return self.constant(x)
        raise TypeError(f"{origin()}: expected a term or a number, got {described(x)}")

    def call(self, op: str, *operands: object) -> Node:
        """An elementwise operator on terms and numbers, folded and simplified where that changes nothing."""
        # A loss makes some hundred of these at its first call: no generators, no tables made anew.
        args = tuple([self.node(x) for x in operands])
        spec = OPS[op]
        wanted = _CONDITIONS.get(op) or _NUMBERS[spec.arity]
        if [a.boolean for a in args] != wanted:
            args = tuple(self._as(a, boolean) for a, boolean in zip(args, wanted, strict=True))
        if [a.op for a in args] == ["constant"] * len(args):
            value = float(spec.python(*(_python(a) for a in args)))
            return self.truth(value) if spec.boolean else self.constant(value)
        simple = _SIMPLIFY[op](self, *args) if op in _SIMPLIFY else None
        if simple is not None:
            return simple
        return self.plain(op, *args)

    def plain(self, op: str, *args: Node) -> Node:
        """The operator on these nodes, not simplified."""
        level = max([a.level for a in args])
        return self._make(op, args, level, side=self._side(op, args), boolean=OPS[op].boolean)

    def reduce(self, op: str, *args: Node, side: int = 0) -> Node:
        """A reduction (see _ops.py). What is the same for all tokens may be summed over them: length times it.

        Of an empty sequence that is 0, whatever it has per sequence.
        """
        if op.startswith("seq") and args and args[0].level < Level.TOKEN:
            length = self.length(args[0].side)
            return self.call("where", length > 0.0, args[0] * length, 0.0) if op == "seq_sum" else args[0]
        if args and is_constant(args[0], 0.0):
            return args[0]
        assert op == "seq_count" or args[0].level >= Level.SEQUENCE, f"{op} of a {args[0].level.name} node"
        level = Level.BATCH if op.startswith("batch") and op != "batch_permute" else Level.SEQUENCE
        key = (side,) if op == "seq_count" else ()
        return self._make(op, args, level, side=args[0].side if args else side, key=key)

    def length(self, side: int = 0) -> Node:
        """Counted tokens of the sequence."""
        return self.reduce("seq_count", side=side)

    def counted(self) -> Node:
        """Whether the sequence (the pair) has a counted token: others do not count in any mean."""
        tokens = self.length(0)
        for side in range(1, self.sides):
            tokens = tokens + self.length(side)
        return tokens > 0.0

    def inputs(self) -> list[tuple[str, Level, int]]:
        """(name, level, side) of all inputs so far."""
        return [(n.name or "", n.level, n.side) for n in self._nodes.values() if n.op == "input"]

    def find(self, op: str, *args: Node) -> Node | None:
        """The node of this operator and these arguments, if there is one already."""
        return self._nodes.get((op, *(a.id for a in args)))

    def _as(self, x: Node, boolean: bool) -> Node:
        if boolean == x.boolean:
            return x
        if boolean:
            return self.truth(x.value) if x.op == "constant" else self.call("ne", x, 0.0)
        return self.call("where", x, 1.0, 0.0)

    def _side(self, op: str, args: tuple[Node, ...]) -> int:
        sides = [a.side for a in args if a.level == _TOKEN]
        if sides and min(sides) != max(sides):
            raise TypeError(
                f"{origin()}: {op} mixes chosen and rejected tokens; reduce each side first, as in seq_sum(...)"
            )
        return sides[0] if sides else max([a.side for a in args if a.level == _SEQUENCE], default=0)

    def _make(
        self,
        op: str,
        args: tuple[Node, ...],
        level: Level,
        *,
        side: int = 0,
        boolean: bool = False,
        value: float | None = None,
        name: str | None = None,
        key: tuple[object, ...] = (),
    ) -> Node:
        full = (op, *key, *[a.id for a in args])
        found = self._nodes.get(full)
        if found is None:
            found = self._nodes[full] = Node(self, op, args, level, side, boolean, value, name)
            self.count += 1
        return found


def walk(roots: Iterable[Node], into: Callable[[Node], bool] = lambda _: True) -> Iterator[Node]:
    """The nodes that `roots` are made of, each once, arguments first; `into` says whose arguments to follow."""
    seen: dict[int, Node] = {}
    waiting = list(roots)
    while waiting:
        node = waiting.pop()
        if node.id not in seen:
            seen[node.id] = node
            if into(node):
                waiting.extend(node.args)
    yield from (seen[i] for i in sorted(seen))


def is_constant(x: Node, value: float | None = None) -> bool:
    """Whether `x` is a number of the formula (this one)."""
    return x.op == "constant" and (value is None or x.value == value)


def _python(x: Node) -> float:
    assert x.value is not None
    return bool(x.value) if x.boolean else x.value


def python_number(x: Any) -> Any:
    """`x`; NumPy's scalars and other real numbers as Python's."""
    if type(x).__module__ == "numpy" and getattr(x, "ndim", None) == 0:
        x = x.item()
    return float(x) if isinstance(x, Real) and not isinstance(x, int | float) else x


# ------------------------------------------------------------------------------------------------------------ messages
_EXTRA: Final = "; what the call knows comes as extra={...} and is read by t.extra(...), or is a parameter of the loss"
_HINTS: Final = {
    "Tensor": _EXTRA,
    "ndarray": _EXTRA,
    "Terms": "; take one of its terms, as in t.logprob",
    "PairTerms": "; take a term of one side, as in t.chosen.logprob",
    "Side": "; take one of its terms, as in t.chosen.logprob",
    "Definition": "; call it with its parameters, then with the terms, as in ppo()(t)",
    "Loss": "; call it with the terms, as in ppo()(t)",
}
#: What NumPy's functions of Python's signs are here.
_SIGNS: Final = {
    "add": "add",
    "subtract": "sub",
    "multiply": "mul",
    "divide": "div",
    "less": "lt",
    "less_equal": "le",
    "greater": "gt",
    "greater_equal": "ge",
    "equal": "eq",
    "not_equal": "ne",
}
#: What the methods and functions of arrays are called here.
_NAMES: Final = {
    "sum": "seq_sum, group_sum or batch_sum",
    "mean": "seq_mean, group_mean or batch_mean",
    "max": "seq_max, group_max or batch_max, of two terms maximum",
    "min": "seq_min, group_min or batch_min, of two terms minimum",
    "amax": "seq_max, group_max or batch_max",
    "amin": "seq_min, group_min or batch_min",
    "cumsum": "group_cumsum",
    "logsumexp": "group_logsumexp",
    "clamp": "clip",
    "absolute": "abs",
    "power": "x ** 2 or exp(y * log(x))",
    "pow": "x ** 2 or exp(y * log(x))",
    "detach": "stop_gradient",
    "log_sigmoid": "logsigmoid",
}


def described(x: object) -> str:
    """What came instead of a term, and what to do about it."""
    if x is None or isinstance(x, str | bool | int | float):
        return repr(x)
    return type(x).__name__ + _HINTS.get(type(x).__name__, "")


def _instead(name: str) -> str:
    from fastreward import losses  # all of it is there by the time that a loss is traced

    if name in losses.__all__:
        return f"use fastreward.losses.{name}"
    return f"use {_NAMES[name]}" if name in _NAMES else "help(fastreward.losses) says what there is"


def _given(args: Iterable[object]) -> str:
    """The hint for the first tensor or array among `args`."""
    arrays = (type(x).__name__ for x in map(python_number, args) if type(x).__name__ in ("Tensor", "ndarray"))
    return next((_HINTS[name] for name in arrays), "")


def _refuse_foreign(library: str, function: Any, args: Iterable[object]) -> NoReturn:
    name = getattr(function, "__name__", str(function))
    hint = _given(args) or f"; {_instead(name)}"
    raise TypeError(f"{origin()}: {library}'s {name} does not take terms{hint}")


def origin() -> str:
    """File and line of the innermost caller outside the language's own files."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        if os.path.dirname(frame.f_code.co_filename) != _HERE:
            break
        frame = frame.f_back
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}, in {frame.f_code.co_name}"


# ------------------------------------------------------------------------------------------------- simplification
# "drop(c, x)" below is where(c, 0, x): what derivatives of clips, maxima and where are made of. Drops are pushed
# outwards and merged, so that a clipped gradient costs one select.
def _drop(graph: Graph, condition: Node, x: Node) -> Node:
    return graph.call("where", condition, 0.0, x)


def _as_drop(graph: Graph, x: Node) -> tuple[Node, Node] | None:
    """(condition, value) where x is a drop, written either way round."""
    if x.op != "where":
        return None
    if is_constant(x.args[1], 0.0):
        return x.args[0], x.args[2]
    return (graph.call("not", x.args[0]), x.args[1]) if is_constant(x.args[2], 0.0) else None


def _simplify_add(graph: Graph, x: Node, y: Node) -> Node | None:
    if is_constant(x, 0.0):
        return y
    if is_constant(y, 0.0):
        return x
    if y.op == "neg":
        return graph.call("sub", x, y.args[0])
    if x.op == "neg":
        return graph.call("sub", y, x.args[0])
    first, second = _as_drop(graph, x), _as_drop(graph, y)
    if first is not None and second is not None and first[1].id == second[1].id:
        merged = _alternatives(graph, first[0], second[0])
        if merged is not None:
            return _drop(graph, merged, first[1])
    return graph.find("add", y, x)


def _alternatives(graph: Graph, c: Node, d: Node) -> Node | None:
    """c & d for conditions of which one always holds, since a member p of one is negated in the other; else None.

    c = s | ~p | q and d = s | p | r: s is common, and what is left is p & q where r is empty (as in a clipped maximum).
    """
    left, right = ({m.id: m for m in _members(x)} for x in (c, d))
    for one, other in ((left, right), (right, left)):
        for p in list(one.values()):
            negated = graph.call("not", p)
            if negated.id not in other:
                continue
            shared = [m for m in one.values() if m.id in other]
            r = [m for m in one.values() if m.id not in other and m.id != p.id]
            q = [m for m in other.values() if m.id not in one and m.id != negated.id]
            rest = graph.call("and", p, _any(graph, q)) if not r else None
            if rest is None and not q:
                rest = graph.call("and", negated, _any(graph, r))
            if rest is not None:
                return graph.call("or", _any(graph, shared), rest)
    return None


def _any(graph: Graph, conditions: Iterable[Node]) -> Node:
    result = graph.truth(0.0)
    for c in conditions:
        result = graph.call("or", result, c)
    return result


def _members(x: Node) -> Iterator[Node]:
    if x.op == "or":
        for a in x.args:
            yield from _members(a)
    else:
        yield x


def _simplify_sub(graph: Graph, x: Node, y: Node) -> Node | None:
    if is_constant(y, 0.0):
        return x
    if is_constant(x, 0.0):
        return graph.call("neg", y)
    if y.op == "neg":
        return graph.call("add", x, y.args[0])
    return graph.constant(0.0) if x.id == y.id else None


def _simplify_mul(graph: Graph, x: Node, y: Node) -> Node | None:
    for a, b in ((x, y), (y, x)):
        if is_constant(a, 0.0):
            return graph.constant(0.0)
        if is_constant(a, 1.0):
            return b
        if is_constant(a, -1.0):
            return graph.call("neg", b)
        dropped = _as_drop(graph, a) if a.level >= b.level else None  # a row's select stays the row's
        if dropped is not None:
            return _drop(graph, dropped[0], graph.call("mul", dropped[1], b))
    if x.op == "neg" and y.op == "neg":
        return graph.call("mul", x.args[0], y.args[0])
    found = graph.find("mul", y, x)
    return found if found is not None else _regroup(graph, x, y)


def _regroup(graph: Graph, x: Node, y: Node) -> Node | None:
    """(a * b) * y as a * (b * y) where b * y is there already, or is known once a row while a is a token's."""
    for product, other in ((x, y), (y, x)):
        if product.op != "mul":
            continue
        for a, b in (product.args, product.args[::-1]):
            there = graph.find("mul", b, other)
            if there is None:
                there = graph.find("mul", other, b)
            if there is None and max(b.level, other.level) < a.level and not is_constant(b):
                there = graph.call("mul", b, other)
            if there is not None:
                return graph.plain("mul", a, there)  # as it is: regrouping it again would undo this
    return None


def _simplify_div(graph: Graph, x: Node, y: Node) -> Node | None:
    if is_constant(y, 1.0):
        return x
    if is_constant(x, 0.0):
        return x
    if is_constant(y) and y.value and math.frexp(y.value)[0] in (0.5, -0.5):  # a power of two: exact
        return graph.call("mul", x, 1.0 / y.value)
    dropped = _as_drop(graph, x) if x.level >= y.level else None
    return None if dropped is None else _drop(graph, dropped[0], graph.call("div", dropped[1], y))


def _simplify_neg(graph: Graph, x: Node) -> Node | None:
    if x.op == "neg":
        return x.args[0]
    if x.op == "sub":
        return graph.call("sub", x.args[1], x.args[0])
    dropped = _as_drop(graph, x)
    return None if dropped is None else _drop(graph, dropped[0], graph.call("neg", dropped[1]))


def _simplify_where(graph: Graph, condition: Node, x: Node, y: Node) -> Node | None:
    if condition.op == "constant":
        return x if condition.value else y
    if x.id == y.id:
        return x
    if is_constant(x, 0.0):
        dropped = _as_drop(graph, y) if y.level >= condition.level else None
        return None if dropped is None else _drop(graph, graph.call("or", condition, dropped[0]), dropped[1])
    if is_constant(y, 0.0):
        return _drop(graph, graph.call("not", condition), x) if not is_constant(x) else None
    return graph.call("where", condition.args[0], y, x) if condition.op == "not" else None


def _simplify_clip(graph: Graph, x: Node, low: Node, high: Node) -> Node | None:
    below, above = is_constant(low, -math.inf), is_constant(high, math.inf)
    if below and above:
        return x
    if below:
        return graph.call("minimum", x, high)
    return graph.call("maximum", x, low) if above else None


def _simplify_extreme(graph: Graph, x: Node, y: Node) -> Node | None:
    return x if x.id == y.id else None


def _simplify_and(graph: Graph, x: Node, y: Node) -> Node | None:
    for a, b in ((x, y), (y, x)):
        if a.op == "constant":
            return b if a.value else a
    return x if x.id == y.id else graph.find("and", y, x)


def _simplify_or(graph: Graph, x: Node, y: Node) -> Node | None:
    for a, b in ((x, y), (y, x)):
        if a.op == "constant":
            return a if a.value else b
    return x if x.id == y.id else graph.find("or", y, x)


def _simplify_not(graph: Graph, x: Node) -> Node | None:
    return x.args[0] if x.op == "not" else None


_SIMPLIFY: Final[dict[str, Callable[..., Node | None]]] = {
    "add": _simplify_add,
    "sub": _simplify_sub,
    "mul": _simplify_mul,
    "div": _simplify_div,
    "neg": _simplify_neg,
    "where": _simplify_where,
    "clip": _simplify_clip,
    "minimum": _simplify_extreme,
    "maximum": _simplify_extreme,
    "and": _simplify_and,
    "or": _simplify_or,
    "not": _simplify_not,
}

assert not set(REDUCTIONS) & set(OPS)
