"""The operators of the loss language: arity, value on plain floats, and what they give."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Op:
    """One elementwise operator. `python` is its value on floats (booleans are True and False)."""

    arity: int
    python: Callable[..., float]
    boolean: bool = False
    symbol: str | None = None  # how it is printed between its arguments; None: as a call


def _exp(x: float) -> float:
    return math.inf if x > 709.78 else math.exp(x)


def _expm1(x: float) -> float:
    return math.inf if x > 709.78 else math.expm1(x)


def _log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf if x == 0 else math.nan


def _log1p(x: float) -> float:
    return math.log1p(x) if x > -1 else -math.inf if x == -1 else math.nan


def _divide(x: float, y: float) -> float:
    if y:
        return x / y
    return math.nan if x == 0 or math.isnan(x) else math.copysign(math.inf, x) * math.copysign(1.0, y)


def _sign(x: float) -> float:
    return float(x > 0) - float(x < 0) if x == x else math.nan


def _minimum(x: float, y: float) -> float:
    return x if x < y or x != x else y


def _maximum(x: float, y: float) -> float:
    return x if x > y or x != x else y


def _clip(x: float, low: float, high: float) -> float:
    return low if x < low else high if x > high else x


def _logsigmoid(x: float) -> float:
    return min(x, 0.0) - math.log1p(_exp(-abs(x)))


#: Every operator that a backend has to know. NaN goes through all of them; comparisons with it are false.
OPS: Final[dict[str, Op]] = {
    "add": Op(2, lambda x, y: x + y, symbol="+"),
    "sub": Op(2, lambda x, y: x - y, symbol="-"),
    "mul": Op(2, lambda x, y: x * y, symbol="*"),
    "div": Op(2, _divide, symbol="/"),
    "neg": Op(1, lambda x: -x),
    "abs": Op(1, abs),
    "sign": Op(1, _sign),
    "sqrt": Op(1, lambda x: math.sqrt(x) if x >= 0 else math.nan),
    "exp": Op(1, _exp),
    "expm1": Op(1, _expm1),
    "log": Op(1, _log),
    "log1p": Op(1, _log1p),
    "tanh": Op(1, math.tanh),
    "sigmoid": Op(1, lambda x: _divide(1.0, 1.0 + _exp(-x))),
    "logsigmoid": Op(1, _logsigmoid),
    "minimum": Op(2, _minimum),
    "maximum": Op(2, _maximum),
    "clip": Op(3, _clip),
    "where": Op(3, lambda c, x, y: x if c else y),
    "lt": Op(2, lambda x, y: x < y, boolean=True, symbol="<"),
    "le": Op(2, lambda x, y: x <= y, boolean=True, symbol="<="),
    "gt": Op(2, lambda x, y: x > y, boolean=True, symbol=">"),
    "ge": Op(2, lambda x, y: x >= y, boolean=True, symbol=">="),
    "eq": Op(2, lambda x, y: x == y, boolean=True, symbol="=="),
    "ne": Op(2, lambda x, y: x != y, boolean=True, symbol="!="),
    "and": Op(2, lambda x, y: x and y, boolean=True, symbol="&"),
    "or": Op(2, lambda x, y: x or y, boolean=True, symbol="|"),
    "not": Op(1, lambda x: not x, boolean=True),
    # Its argument, and nothing to the derivative; gone before a backend sees the graph.
    "stop_gradient": Op(1, lambda x: x),
    # x < low or x > high: where clip(x, low, high) is flat. False for a NaN.
    "outside": Op(3, lambda x, low, high: x < low or x > high, boolean=True),
}
#: Over the counted tokens of a sequence; seq_count has no argument.
SEQ_REDUCTIONS: Final = ("seq_count", "seq_sum", "seq_max", "seq_min")
#: Over the sequences of the own group, given back to each of them. group_sum_before(x, key): over the members whose
#: key is above one's own, of equal keys those in earlier rows, and oneself; group_sum_after: below, later, and oneself.
#: group_sum_others: all members but oneself, added without a cancelling subtraction.
GROUP_REDUCTIONS: Final = (
    "group_sum",
    "group_max",
    "group_min",
    "group_sum_others",
    "group_sum_before",
    "group_sum_after",
)
#: Over all sequences: one BATCH value; but batch_permute(x, from, to), ROW, gives row j the x of the row i whose `from`
#: has the same rank among all rows as `to` of row j (ascending; equal ones in the order of the rows).
BATCH_REDUCTIONS: Final = ("batch_sum", "batch_max", "batch_min", "batch_permute")
REDUCTIONS: Final = (*SEQ_REDUCTIONS, *GROUP_REDUCTIONS, *BATCH_REDUCTIONS)
#: Arguments of these are not differentiated.
LEAVES: Final = ("constant", "parameter", "input")
