"""What a loss reads beside its terms and parameters: globals and closures, its own and those of functions it calls.

The values of the moment when a loss is made belong to its formula. They are found without running it, by the names in
the bytecode, so that making a loss stays cheap; what can't be judged that way (an object of a class of one's own that
is used as a whole) shows in the formula only, so that such a loss is traced when it is made.
"""

from __future__ import annotations

import dis
import functools
import itertools
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from enum import Enum
from numbers import Number
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any, Final

from fastreward.losses._graph import Node
from fastreward.losses._terms import PairTerms, Side, Terms

if TYPE_CHECKING:
    from fastreward.losses._define import Definition, Loss

#: Packages whose functions and constants stay what they are.
_FIXED: Final = frozenset(
    {"fastreward", "torch", "numpy", "builtins", "math", "cmath", "operator", "functools", "itertools"}
    | {"collections", "dataclasses", "enum", "fractions", "numbers", "statistics", "typing"}
)
_ANYTHING: Final = frozenset({"eval", "exec", "globals", "vars", "__import__", "open", "input"})
_KINDS: Final = {
    "LOAD_GLOBAL": "global",
    "LOAD_NAME": "global",
    "LOAD_DEREF": "free",
    "LOAD_CLASSDEREF": "free",
    "LOAD_FROM_DICT_OR_DEREF": "free",
    "IMPORT_NAME": "import",
}
_ATTRIBUTES: Final = frozenset({"LOAD_ATTR", "LOAD_METHOD"})
_LARGEST: Final = 256  # entries of a container that are looked at each time
_NOTHING: Final = object()


@dataclass(frozen=True)
class Surroundings:
    """values: by name; numbers and strings as (type, repr). others: names of what `formula` alone tells about."""

    values: Mapping[str, Hashable]
    others: tuple[str, ...] = ()
    formula: str = ""

    @functools.cached_property
    def key(self) -> Hashable:
        """Equal where every value is."""
        return tuple(self.values.items()), self.formula

    @property
    def plain(self) -> dict[str, Hashable]:
        """Numbers and strings, which mean the same in another process."""
        return {name: value for name, value in self.values.items() if isinstance(value, tuple)}

    def change(self, now: Surroundings, then: str, here: str) -> str | None:
        """What is another value in `now`, in words that tell one time or place from the other; else None."""
        for name in (*self.values, *now.values):
            before, after = self.values.get(name, _NOTHING), now.values.get(name, _NOTHING)
            if before is not after and before != after:
                if isinstance(before, tuple) and isinstance(after, tuple):
                    return f"{name} was {before[-1]} {then} and is {after[-1]} {here}"
                return f"{name} is not {here} what it was {then}"
        if self.formula != now.formula:
            return f"{' or '.join(self.others)} is not {here} what it was {then}"
        return None


def surroundings(function: FunctionType) -> Surroundings | None:
    """What `function` reads from outside as it is now; None for the package's own losses, which read nothing."""
    if _fixed(function.__module__):
        return None
    walk = _Walk()
    walk.body(function, "")
    return Surroundings(walk.values, tuple(walk.others))


def _fixed(module: str | None) -> bool:
    return module is not None and module.partition(".")[0] in _FIXED


class _Walk:
    """Gathers values by name; each function is entered once."""

    def __init__(self) -> None:
        self.values: dict[str, Hashable] = {}
        self.others: list[str] = []
        self._entered: set[int] = set()
        self._where = ""  # whose surroundings they are, where not the loss's own

    def body(self, function: FunctionType, where: str) -> None:
        """The code and what it reads."""
        self._entered.add(id(function))
        outer, self._where = self._where, where
        code = function.__code__
        if where:
            self.values[where.removeprefix(" in ")] = code
        cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
        for kind, name, attributes in _reads(code):
            if kind == "import":
                if not _fixed(name):
                    self._other(name)
            elif name in cells:
                self._path(name, _contents(cells[name]), attributes)
            elif kind == "global" and name in function.__globals__:
                self._path(name, function.__globals__[name], attributes)
            elif kind == "global" and name in _ANYTHING:
                self._other(f"{name}()")
        self._where = outer

    def _found(self, name: str, value: Hashable) -> None:
        self.values[name + self._where] = value

    def _other(self, name: str) -> None:
        self.others.append(name + self._where)

    def _path(self, name: str, x: Any, attributes: tuple[str, ...]) -> None:
        """`x` as it is read: of modules and objects the attribute alone."""
        for attribute in attributes:
            if not _opaque(x):
                break
            try:
                name, x = f"{name}.{attribute}", getattr(x, attribute)
            except Exception:  # whatever it is, the loss will meet it too
                return
        if x is not _NOTHING:
            self._value(name, x)

    def _value(self, name: str, x: Any) -> None:
        """What `x` is, in a form that compares; functions and containers with what is in them."""
        if _plain(x):
            self._found(name, (type(x).__name__, repr(x)))
        elif isinstance(x, Node):
            self._found(name, ("term", f"{id(x.graph)} {x.id}"))
        elif isinstance(x, Terms | PairTerms | Side | _loss()) or _constant(x):
            self._found(name, x)
        elif isinstance(x, _definition()):
            self._function(name, x.function)
        elif isinstance(x, FunctionType):
            self._function(name, x)
        elif isinstance(x, MethodType):
            self._value(name, x.__func__)
            self._value(f"{name}.__self__", x.__self__)
        elif isinstance(x, functools.partial):
            for part, v in (("func", x.func), ("args", x.args), ("keywords", x.keywords)):
                self._value(f"{name}.{part}", v)
        elif isinstance(x, _CONTAINERS):
            self._container(name, x)
        else:
            self._other(name)

    def _function(self, name: str, function: FunctionType) -> None:
        if _fixed(function.__module__):
            self._found(name, function)
        elif id(function) not in self._entered:
            self.body(function, f" in {name}{self._where}")
            defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
            for k, default in enumerate(defaults):
                self._value(f"default {k + 1} of {name}", default)

    def _container(self, name: str, x: Any) -> None:
        if id(x) in self._entered or len(x) > _LARGEST:
            self._other(name)
            return
        self._entered.add(id(x))
        self._found(name, (type(x).__name__, f"{len(x)} entries"))
        entries = (
            x.items() if isinstance(x, dict) else enumerate(x if isinstance(x, list | tuple) else sorted(x, key=repr))
        )
        for key, v in entries:
            self._value(f"{name}[{key!r}]", v)
        self._entered.discard(id(x))


_CONTAINERS: Final = (dict, list, tuple, set, frozenset)


def _opaque(x: object) -> bool:
    """Whether `x` is asked for attributes, since nothing else can be said of it."""
    if isinstance(x, ModuleType):
        return not _fixed(x.__name__)
    known = (FunctionType, MethodType, functools.partial, Node, Terms, PairTerms, Side, *_CONTAINERS)
    return not (isinstance(x, (*known, _loss(), _definition())) or _plain(x) or _constant(x))


def _plain(x: object) -> bool:
    return x is None or isinstance(x, str | bytes | Number | Enum | range)


def _constant(x: Any) -> bool:
    """Modules, functions and classes that stay what they are: which of them it is, is all there is to know."""
    if isinstance(x, ModuleType):
        return _fixed(x.__name__)
    if isinstance(x, BuiltinFunctionType):
        return x.__self__ is None or isinstance(x.__self__, ModuleType)
    if isinstance(x, type | FunctionType):
        return _fixed(x.__module__)
    return type(x).__module__ == "numpy" and type(x).__name__ == "ufunc"


def _definition() -> type[Definition[Any]]:
    from fastreward.losses._define import Definition

    return Definition


def _loss() -> type[Loss]:
    from fastreward.losses._define import Loss

    return Loss


def _contents(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not set yet
        return _NOTHING


@functools.lru_cache(maxsize=1024)
def _reads(code: CodeType) -> tuple[tuple[str, str, tuple[str, ...]], ...]:
    """(kind, name, attributes asked one of the other) for each read of a "global" or "free" name and each "import".

    Functions, lambdas and comprehensions inside are read too.
    """
    found: dict[tuple[str, str, tuple[str, ...]], None] = {}
    instructions = list(dis.get_instructions(code))
    for k, instruction in enumerate(instructions):
        kind = _KINDS.get(instruction.opname)
        if kind is not None:
            rest = itertools.takewhile(lambda i: i.opname in _ATTRIBUTES, instructions[k + 1 :])
            found[kind, instruction.argval, tuple(i.argval for i in rest)] = None
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found |= dict.fromkeys(_reads(constant))
    return tuple(found)
