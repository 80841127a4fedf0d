"""The operators of the loss language, one row each: arity, value on plain floats, and how each generator writes it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

#: How tightly an operand binds that needs no parentheses; a sign before one binds as PREFIX.
ATOM: Final = 9
PREFIX: Final = 6


@dataclass(frozen=True, slots=True)
class Op:
    """One elementwise operator. `python` is its value on floats (booleans are True and False).

    symbol: how print(loss) and Triton write it between its arguments, or before its only one; None: as a call.
    binds: how tightly; a call binds like an atom. triton, cuda: templates of calls in the arguments {0}, {1}, {2}, or a
    symbol of C++; in C++ {f} is the ending of CUDA's f32 functions, nothing in f64, and {real} is float or double. What
    is not said is a call of a function of the operator's own name in kernels/program/math.py or csrc/cuda/program.cuh.
    costly: of many instructions, so that its value is rather kept than computed again.
    """

    arity: int
    python: Callable[..., float]
    symbol: str | None = None
    binds: int = ATOM
    triton: str | None = None
    cuda: str | None = None
    boolean: bool = False
    costly: bool = False


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
    "add": Op(2, lambda x, y: x + y, "+", 4),
    "sub": Op(2, lambda x, y: x - y, "-", 4),
    "mul": Op(2, lambda x, y: x * y, "*", 5),
    "div": Op(2, _divide, "/", 5, costly=True),
    "neg": Op(1, lambda x: -x, "-", PREFIX),
    "abs": Op(1, abs, triton="tl.abs({0})", cuda="fabs{f}({0})"),
    "sign": Op(1, _sign),
    "sqrt": Op(
        1, lambda x: math.sqrt(x) if x >= 0 else math.nan, triton="tl.sqrt({0})", cuda="sqrt{f}({0})", costly=True
    ),
    "exp": Op(1, _exp, cuda="exp{f}({0})", costly=True),
    "expm1": Op(1, _expm1, cuda="expm1{f}({0})", costly=True),
    "log": Op(1, _log, cuda="log{f}({0})", costly=True),
    "log1p": Op(1, _log1p, cuda="log1p{f}({0})", costly=True),
    "tanh": Op(1, math.tanh, cuda="tanh{f}({0})", costly=True),
    "sigmoid": Op(1, lambda x: _divide(1.0, 1.0 + _exp(-x)), costly=True),
    "logsigmoid": Op(1, _logsigmoid, costly=True),
    "minimum": Op(2, _minimum),
    "maximum": Op(2, _maximum),
    "clip": Op(3, _clip),
    "where": Op(3, lambda c, x, y: x if c else y, triton="tl.where({0}, {1}, {2})", cuda="({0} ? {1} : {2})"),
    "lt": Op(2, lambda x, y: x < y, "<", 3, boolean=True),
    "le": Op(2, lambda x, y: x <= y, "<=", 3, boolean=True),
    "gt": Op(2, lambda x, y: x > y, ">", 3, boolean=True),
    "ge": Op(2, lambda x, y: x >= y, ">=", 3, boolean=True),
    "eq": Op(2, lambda x, y: x == y, "==", 3, boolean=True),
    "ne": Op(2, lambda x, y: x != y, "!=", 3, boolean=True),
    "and": Op(2, lambda x, y: x and y, "&", 2, cuda="&&", boolean=True),
    "or": Op(2, lambda x, y: x or y, "|", 1, cuda="||", boolean=True),
    "not": Op(1, lambda x: not x, "~", PREFIX, cuda="!", boolean=True),
    # Its argument, and nothing to the derivative; gone before a backend sees the graph.
    "stop_gradient": Op(1, lambda x: x),
    # x < low or x > high: where clip(x, low, high) is flat. False for a NaN.
    "outside": Op(3, lambda x, low, high: x < low or x > high, boolean=True),
}


def words(backend: Literal["triton", "cuda"]) -> frozenset[str]:
    """The identifiers that the operators take in generated source: no value may be called so."""
    texts = ((name, getattr(op, backend)) for name, op in OPS.items() if op.symbol is None)
    called = " ".join(
        name if text is None else text.replace("{f}", "") + text.replace("{f}", "f") for name, text in texts
    )
    return frozenset(re.findall(r"[A-Za-z_]\w*", called))


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
#: Over all sequences: one BATCH value; but batch_permute(x, from, to), SEQUENCE, gives sequence j the x of that i whose
#: `from` has the same rank among all sequences as `to` of j (ascending; equal ones in the order of the batch).
BATCH_REDUCTIONS: Final = ("batch_sum", "batch_max", "batch_min", "batch_permute")
REDUCTIONS: Final = (*SEQ_REDUCTIONS, *GROUP_REDUCTIONS, *BATCH_REDUCTIONS)
#: Arguments of these are not differentiated.
LEAVES: Final = ("constant", "parameter", "input")
