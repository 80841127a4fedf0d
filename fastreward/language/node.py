"""Nodes of expression graphs, and the store that keeps equal ones once (common subexpressions)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator
from enum import IntEnum
from typing import Any, Final, NoReturn

from fastreward.language.messages import described, given, instead, origin, python_number, refuse_foreign

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
        graph: Nodes,
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
        raise AttributeError(f"{origin()}: a term has no .{name}; {instead(name)}")

    @classmethod
    def __torch_function__(cls, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        refuse_foreign("torch", function, args)

    def __array_function__(self, function: Any, _: Any, args: Any, kwargs: Any) -> NoReturn:
        refuse_foreign("NumPy", function, args)

    def __array_ufunc__(self, ufunc: Any, _: str, *inputs: Any, **__: Any) -> Node:
        if ufunc.__name__ not in _SIGNS or given(inputs):
            refuse_foreign("NumPy", ufunc, inputs)
        return self.graph.call(_SIGNS[ufunc.__name__], *inputs)  # a NumPy scalar left of a sign

    def __array__(self, *_: object, **__: object) -> NoReturn:
        self.fail("a term is no array while the loss is traced; use the functions of fastreward.losses, not NumPy's")

    def fail(self, message: str) -> NoReturn:
        """Raises a TypeError that names the line of the loss."""
        raise TypeError(f"{origin()}: {message}")

    def __repr__(self) -> str:
        return self.graph.text(self)


class Nodes(ABC):
    """The nodes of one graph, equal ones once: leaves, and what the graph makes of them."""

    def __init__(self, sides: int = 1, on_device: Collection[str] = ()) -> None:
        self.sides = sides  # 2 for losses over pairs of sequences
        self.on_device = frozenset(on_device)  # parameters whose values the host does not know
        self.reader = "the loss"  # whose formula it is, for messages
        self.by_term = False  # whether its terms are passed by their own names, for messages
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
        """An input: the value of one of the call's tensors for the token or the sequence."""
        return self._make("input", (), level, side=side, name=name, key=(name, level, side))

    def node(self, x: object) -> Node:
        """`x`, or the constant it is."""
        if isinstance(x, Node):
            if x.graph is not self:
                x.fail("terms of two different calls are mixed in one expression")
            return x
        if type(x) is not float:  # most are, and asking what a number may be else takes longer
            x = python_number(x)
        if isinstance(x, int | float):
            return self.constant(x)
        raise TypeError(f"{origin()}: expected a term or a number, got {described(x)}")

    def length(self, side: int = 0) -> Node:
        """Valid tokens of the sequence."""
        return self.reduce("seq_count", side=side)

    def valid(self) -> Node:
        """Whether the sequence (the pair) has a valid token: others do not count in any mean."""
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

    # --------------------------------------------------------------------------------------------- what a graph adds
    @abstractmethod
    def call(self, op: str, *operands: object) -> Node:
        """An elementwise operator on terms and numbers."""

    @abstractmethod
    def plain(self, op: str, *args: Node) -> Node:
        """The operator on these nodes, not simplified."""

    @abstractmethod
    def reduce(self, op: str, *args: Node, side: int = 0) -> Node:
        """A reduction over tokens or sequences."""

    @abstractmethod
    def along(self, op: str, x: object, by: object = None, *, side: int = 0) -> Node:
        """A value per token that is made of its sequence's other tokens."""

    @abstractmethod
    def threshold(self, op: str, x: Node, bound: Node) -> Node:
        """A value that some of all tokens' are above."""

    @abstractmethod
    def text(self, node: Node) -> str:
        """The node as a formula."""


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
