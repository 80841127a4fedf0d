"""The operators of the loss language, one row each: value, derivative, and how each generator writes it.

A row is `_row(...)`, or the same as the decorator of the function that fastreward.losses exports. Besides its row an
operator has a line in reference/program.py and one in csrc/cpu/program/program.hpp.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal, ParamSpec

from fastreward.language.messages import FUNCTIONS, described, origin
from fastreward.language.node import Node, Nodes

P = ParamSpec("P")
Value = Node | float
#: From upstream gradient, node and arguments to what one of the arguments gets.
Derivative = Callable[..., Node]
#: How tightly an operand binds that needs no parentheses; a sign before one binds as PREFIX.
ATOM: Final = 9
PREFIX: Final = 6


@dataclass(frozen=True, slots=True)
class Op:
    """One elementwise operator. `value`: on floats (booleans are True and False).

    derivatives: by argument; None, or none at all: flat. symbol: how print(loss) and Triton write it between its
    arguments, or before its only one; None: as a call. binds: how tightly; a call binds like an atom. triton, cuda:
    templates of calls in the arguments {0}, {1}, {2}, or a symbol of C++; in C++ {f} is the ending of CUDA's f32
    functions, nothing in f64, and {real} is float or double. What is not said is a call of a function of the operator's
    own name in kernels/program/math.py or csrc/cuda/program.cuh. costly: of many instructions, so that its value is
    rather kept than computed again.
    """

    arity: int
    value: Callable[..., float]
    derivatives: tuple[Derivative | None, ...] = ()
    symbol: str | None = None
    binds: int = ATOM
    triton: str | None = None
    cuda: str | None = None
    boolean: bool = False
    costly: bool = False


#: Every operator that a backend has to know. NaN goes through all of them; comparisons with it are false.
OPS: Final[dict[str, Op]] = {}


def _row(name: str, arity: int, value: Callable[..., float], *derivatives: Derivative | None, **texts: Any) -> None:
    OPS[name] = Op(arity, value, derivatives, **texts)


def _function(
    arity: int, value: Callable[..., float], *derivatives: Derivative | None, **texts: Any
) -> Callable[[Callable[P, Node]], Callable[P, Node]]:
    """Row of the operator that has the name of the decorated function."""

    def row(function: Callable[P, Node]) -> Callable[P, Node]:
        _row(function.__name__, arity, value, *derivatives, **texts)
        FUNCTIONS.add(function.__name__)
        return function

    return row


def call(op: str, *args: Value) -> Node:
    """The operator on terms and numbers, at least one of them a term."""
    return graph_of(op, *args).call(op, *args)


def graph_of(name: str, *args: Value) -> Nodes:
    """The graph of the first term among the arguments of the function `name`."""
    for x in args:
        if isinstance(x, Node):
            return x.graph
    raise TypeError(
        f"{origin()}: {name}: expected a term of the loss (t.logprob, ...), got {', '.join(map(described, args))}"
    )


# ------------------------------------------------------------------------------------------------- values on floats
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


def _sqrt(x: float) -> float:
    return math.sqrt(x) if x >= 0 else math.nan


def _sign(x: float) -> float:
    return float(x > 0) - float(x < 0) if x == x else math.nan


def _minimum(x: float, y: float) -> float:
    return x if x < y or x != x else y


def _maximum(x: float, y: float) -> float:
    return x if x > y or x != x else y


def _clip(x: float, low: float, high: float) -> float:
    return low if x < low else high if x > high else x


def _sigmoid(x: float) -> float:
    return _divide(1.0, 1.0 + _exp(-x))


def _logsigmoid(x: float) -> float:
    return min(x, 0.0) - math.log1p(_exp(-math.fabs(x)))


# ------------------------------------------------------------------------------------------------------------ signs
_row("add", 2, lambda x, y: x + y, lambda g, z, x, y: g, lambda g, z, x, y: g, symbol="+", binds=4)
_row("sub", 2, lambda x, y: x - y, lambda g, z, x, y: g, lambda g, z, x, y: -g, symbol="-", binds=4)
_row("mul", 2, lambda x, y: x * y, lambda g, z, x, y: g * y, lambda g, z, x, y: g * x, symbol="*", binds=5)
_row("div", 2, _divide, lambda g, z, x, y: g / y, lambda g, z, x, y: -(g * z / y), symbol="/", binds=5, costly=True)
_row("neg", 1, lambda x: -x, lambda g, y, x: -g, symbol="-", binds=PREFIX)
_row("lt", 2, lambda x, y: x < y, symbol="<", binds=3, boolean=True)
_row("le", 2, lambda x, y: x <= y, symbol="<=", binds=3, boolean=True)
_row("gt", 2, lambda x, y: x > y, symbol=">", binds=3, boolean=True)
_row("ge", 2, lambda x, y: x >= y, symbol=">=", binds=3, boolean=True)
_row("eq", 2, lambda x, y: x == y, symbol="==", binds=3, boolean=True)
_row("ne", 2, lambda x, y: x != y, symbol="!=", binds=3, boolean=True)
_row("and", 2, lambda x, y: x and y, symbol="&", binds=2, cuda="&&", boolean=True)
_row("or", 2, lambda x, y: x or y, symbol="|", binds=1, cuda="||", boolean=True)
_row("not", 1, lambda x: not x, symbol="~", binds=PREFIX, cuda="!", boolean=True)
# x < low or x > high: where clip(x, low, high) is flat. False for a NaN.
_row("outside", 3, lambda x, low, high: x < low or x > high, boolean=True)
# Between bounds that are crossed the value is low.
_row(
    "clip",
    3,
    _clip,
    lambda g, y, x, low, high: call("where", call("outside", x, low, high), 0.0, g),
    lambda g, y, x, low, high: call("where", x < low, g, 0.0),
    lambda g, y, x, low, high: call("where", (x > high) & ~(x < low), g, 0.0),
)


# -------------------------------------------------------------------------------------------------------- functions
@_function(1, _exp, lambda g, y, x: g * y, cuda="exp{f}({0})", costly=True)
def exp(x: Value) -> Node:
    """e^x."""
    return call("exp", x)


@_function(1, _expm1, lambda g, y, x: g * exp(x), cuda="expm1{f}({0})", costly=True)
def expm1(x: Value) -> Node:
    """e^x - 1, accurate near 0."""
    return call("expm1", x)


@_function(1, _log, lambda g, y, x: g / x, cuda="log{f}({0})", costly=True)
def log(x: Value) -> Node:
    """Natural logarithm: -inf at 0, NaN below."""
    return call("log", x)


@_function(1, _log1p, lambda g, y, x: g / (x + 1.0), cuda="log1p{f}({0})", costly=True)
def log1p(x: Value) -> Node:
    """log(1 + x), accurate near 0."""
    return call("log1p", x)


@_function(1, _sqrt, lambda g, y, x: g * 0.5 / y, triton="tl.sqrt({0})", cuda="sqrt{f}({0})", costly=True)
def sqrt(x: Value) -> Node:
    """Square root."""
    return call("sqrt", x)


@_function(1, math.tanh, lambda g, y, x: g * (1.0 - y * y), cuda="tanh{f}({0})", costly=True)
def tanh(x: Value) -> Node:
    """Hyperbolic tangent."""
    return call("tanh", x)


@_function(1, _sigmoid, lambda g, y, x: g * (y * (1.0 - y)), costly=True)
def sigmoid(x: Value) -> Node:
    """1 / (1 + e^-x)."""
    return call("sigmoid", x)


@_function(1, _logsigmoid, lambda g, y, x: g * sigmoid(-x), costly=True)
def logsigmoid(x: Value) -> Node:
    """log(sigmoid(x)) without overflow."""
    return call("logsigmoid", x)


@_function(
    1,
    lambda x: _log(-_expm1(x)) if x > -0.5 else _log1p(-_exp(x)),
    lambda g, y, x: -g / expm1(-x),
    triton="tl.where({0} > -0.5, log(-expm1({0})), log1p(-exp({0})))",
    cuda="({0} > {real}(-0.5) ? log{f}(-expm1{f}({0})) : log1p{f}(-exp{f}({0})))",
    costly=True,
)
def log1mexp(x: Value) -> Node:
    """log(1 - e^x), of a log-prob that of the complement, accurate near 0 and far below; -inf at 0, NaN above."""
    return call("log1mexp", x)


@_function(1, math.fabs, lambda g, y, x: g * call("sign", x), triton="tl.abs({0})", cuda="fabs{f}({0})")
def abs(x: Value) -> Node:
    """|x|; gradient 0 at 0."""
    return call("abs", x)


@_function(1, _sign)
def sign(x: Value) -> Node:
    """-1, 0 or 1; gradient 0."""
    return call("sign", x)


@_function(
    2, _minimum, lambda g, z, x, y: call("where", x > y, 0.0, g), lambda g, z, x, y: call("where", x > y, g, 0.0)
)
def minimum(x: Value, y: Value) -> Node:
    """The smaller; the gradient goes to x where they are equal."""
    return call("minimum", x, y)


@_function(
    2, _maximum, lambda g, z, x, y: call("where", x < y, 0.0, g), lambda g, z, x, y: call("where", x < y, g, 0.0)
)
def maximum(x: Value, y: Value) -> Node:
    """The larger; the gradient goes to x where they are equal."""
    return call("maximum", x, y)


@_function(
    3,
    lambda c, x, y: x if c else y,
    None,
    lambda g, z, c, x, y: call("where", c, g, 0.0),
    lambda g, z, c, x, y: call("where", c, 0.0, g),
    triton="tl.where({0}, {1}, {2})",
    cuda="({0} ? {1} : {2})",
)
def where(condition: Value, x: Value, y: Value) -> Node:
    """x where the condition holds (is not 0), else y; both are computed."""
    return call("where", condition, x, y)


@_function(1, lambda x: x)
def stop_gradient(x: Value) -> Node:
    """x as a constant."""
    return call("stop_gradient", x)  # gone before a backend sees the graph


def words(backend: Literal["triton", "cuda"]) -> frozenset[str]:
    """The identifiers that the operators take in generated source: no value may be called so."""
    texts = ((name, getattr(op, backend)) for name, op in OPS.items() if op.symbol is None)
    called = " ".join(
        name if text is None else text.replace("{f}", "") + text.replace("{f}", "f") for name, text in texts
    )
    return frozenset(re.findall(r"[A-Za-z_]\w*", called))


#: Over the valid tokens of a sequence; seq_count has no argument.
SEQ_REDUCTIONS: Final = ("seq_count", "seq_sum", "seq_max", "seq_min")
#: Over the sequences of the same group, given back to each of them. group_sum_before(x, key): over the members whose
#: key is above one's own, of equal keys earlier sequences', and oneself; group_sum_after: below, later, and oneself.
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
#: One value per token, made of its sequence's valid tokens in order. scan(x, c): y_t = x_t + c_t y_(t-1), where a c
#: of 0 starts anew whatever lies before; shift(x): the token before's, 0 at the first. The others run from the last.
SCANS: Final = ("scan", "scan_reverse", "shift", "shift_reverse")
BACKWARDS: Final = ("scan_reverse", "shift_reverse")
SHIFTS: Final = ("shift", "shift_reverse")
#: segment_sum(x, ids): the sum over the run of equal ids that the token is in, 0 where ids are below 0. Made of scans
#: before a backend sees the graph.
ALONG_TOKENS: Final = (*SCANS, "segment_sum")
#: batch_threshold(x, bound): the largest x of all valid tokens up to which their mean stays below the bound, the
#: smallest where it does not; batch_largest(x, share): the smallest of that share of the largest. BATCH, without a
#: gradient. A call computes them before its program (thresholds.py).
THRESHOLDS: Final = ("batch_threshold", "batch_largest")
#: What a token's value may depend on other tokens by.
OF_OTHERS: Final = (*REDUCTIONS, *ALONG_TOKENS, *THRESHOLDS)
#: Arguments of these are not differentiated.
LEAVES: Final = ("constant", "parameter", "input")
