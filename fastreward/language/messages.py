"""Messages of the language: where in the loss a mistake stands, and what to write instead."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from numbers import Real
from typing import Any, Final, NoReturn

_HERE: Final = os.path.dirname(os.path.abspath(__file__))
#: Names that fastreward.losses exports, put there by those that define them.
FUNCTIONS: Final[set[str]] = set()


def python_number(x: Any) -> Any:
    """`x`; NumPy's scalars and other real numbers as Python's."""
    if type(x).__module__ == "numpy" and getattr(x, "ndim", None) == 0:
        x = x.item()
    return float(x) if isinstance(x, Real) and not isinstance(x, int | float) else x


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
#: What the methods and functions of arrays are called here.
_NAMES: Final = {
    "sum": "seq_sum, group_sum or batch_sum",
    "mean": "seq_mean, group_mean or batch_mean",
    "max": "seq_max, group_max or batch_max, of two terms maximum",
    "min": "seq_min, group_min or batch_min, of two terms minimum",
    "amax": "seq_max, group_max or batch_max",
    "amin": "seq_min, group_min or batch_min",
    "cumsum": "seq_cumsum or group_cumsum",
    "logsumexp": "group_logsumexp",
    "clamp": "clip",
    "absolute": "abs",
    "power": "x ** 2 or exp(y * log(x))",
    "pow": "x ** 2 or exp(y * log(x))",
    "detach": "stop_gradient",
    "log_sigmoid": "logsigmoid",
}


def described(x: object) -> str:
    """Describe a value that came instead of a term, and what to do about it."""
    if x is None or isinstance(x, str | bool | int | float):
        return repr(x)
    return type(x).__name__ + _HINTS.get(type(x).__name__, "")


def instead(name: str) -> str:
    """The language's counterpart of an array's method or function of this name."""
    if name in FUNCTIONS:
        return f"use fastreward.losses.{name}"
    return f"use {_NAMES[name]}" if name in _NAMES else "help(fastreward.losses) says what there is"


def given(args: Iterable[object]) -> str:
    """Hint for the first tensor or array among `args`."""
    arrays = (type(x).__name__ for x in map(python_number, args) if type(x).__name__ in ("Tensor", "ndarray"))
    return next((_HINTS[name] for name in arrays), "")


def refuse_foreign(library: str, function: Any, args: Iterable[object]) -> NoReturn:
    """Raises a TypeError for another library's function on terms."""
    name = getattr(function, "__name__", str(function))
    hint = given(args) or f"; {instead(name)}"
    raise TypeError(f"{origin()}: {library}'s {name} does not take terms{hint}")


def origin() -> str:
    """File and line of the innermost caller outside the language's own files."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        if os.path.dirname(frame.f_code.co_filename) != _HERE:
            break
        frame = frame.f_back
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}, in {frame.f_code.co_name}"
