"""How the function of a loss reaches another process.

pickle and its relatives (cloudpickle, Ray, joblib, dill) know one thing that travels both ways: a function. By name
where its name leads to it, else by value where the pickler can do that. Of a decorated function the name leads to the
loss, and from there on to `.function`: so that is what the function calls itself while it is pickled.

Where a function comes from and what it reads there, for messages.
"""

from __future__ import annotations

import functools
import inspect
import operator
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pickle import UnpicklingError
from types import CodeType, FunctionType, ModuleType
from typing import Any, Final
from uuid import uuid4

_KEPT: Final = "fastreward_loss"  # the function's attribute that has the options


@dataclass(frozen=True, slots=True)
class Options:
    """Arguments of `define`, on the function, so that they travel with it. token: of a definition and its copies."""

    qualname: str
    pairs: bool
    static: frozenset[str]
    aggregation: str
    check: Callable[..., None] | None
    token: str = field(default_factory=lambda: uuid4().hex)


def carrier(function: Callable[..., Any], options: Options) -> FunctionType:
    """A copy of `function` with `options`; of another callable a function that calls it."""
    if isinstance(function, FunctionType):
        copied = FunctionType(
            function.__code__,
            function.__globals__,
            function.__name__,
            function.__defaults__,
            function.__closure__,
        )
        functools.update_wrapper(copied, function)
        copied.__kwdefaults__ = function.__kwdefaults__
        del copied.__wrapped__  # type: ignore[attr-defined]
    else:

        @functools.wraps(function)
        def copied(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        called = _called(function)
        copied.__module__, copied.__qualname__ = called.__module__, named(function)
        copied.__name__ = copied.__qualname__.rpartition(".")[-1]

    setattr(copied, _KEPT, options)
    return copied


def named(function: Any) -> str:
    """The qualified name of a function, of what a `functools.partial` calls, else of a callable object's class."""
    called = _called(function)
    return str(getattr(called, "__qualname__", type(called).__qualname__))


def _called(function: Any) -> Any:
    """The function that is called in the end: a partial object says nothing about itself."""
    return _called(function.func) if isinstance(function, functools.partial) else function


def options_of(function: FunctionType) -> Options:
    """The options that `carrier` has put there."""
    options = getattr(function, _KEPT, None)
    if not isinstance(options, Options):
        raise UnpicklingError(f"{function.__name__}: a loss that reads its own name can't be carried by value")
    return options


def by_name(definition: Any, protocol: int) -> str | None:
    """Gives the function the name that pickle looks it up by; of old protocols, which have no dots, the loss's own."""
    name, function = _name(definition), definition.function
    if protocol < 4 and name is not None:
        return name
    function.__qualname__ = (
        f"{definition.name} (a loss that no module holds by name: cloudpickle carries it, or define it in a module)"
        if name is None
        else f"{name}.function"
    )
    return None


def _name(definition: Any) -> str | None:
    """The name under which its module holds the definition."""
    module = sys.modules.get(definition.__module__)
    try:
        if operator.attrgetter(definition.__qualname__)(module) is definition:
            return str(definition.__qualname__)
    except AttributeError:
        pass
    return next((name for name, x in vars(module).items() if x is definition), None) if module is not None else None


def place(function: FunctionType) -> str:
    """As in `(file.py:12)` after a blank, of a function that `carrier` has made; else nothing."""
    code = _code(function)
    return "" if code is None else f" ({os.path.basename(code.co_filename)}:{code.co_firstlineno})"


def names_outside(function: FunctionType) -> list[str]:
    """Closures and globals that a function reads, without what stays the same."""
    code = _code(function)
    if code is None:
        return []
    values = inspect.unwrap(function).__globals__
    found = [name for name in code.co_names if name in values and not _stays(values[name])]
    return [*code.co_freevars, *found]


def _code(function: FunctionType) -> CodeType | None:
    code = getattr(inspect.unwrap(function), "__code__", None)
    return code if isinstance(code, CodeType) else None


def _stays(x: object) -> bool:
    """Whether `x` is a module, class or function of a package that stays what it is."""
    name = x.__name__ if isinstance(x, ModuleType) else getattr(x, "__module__", None) if callable(x) else None
    return str(name).partition(".")[0] in ("fastreward", "torch", "numpy", "math")
