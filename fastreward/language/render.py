"""How generated source writes an operator on operands that are written already; the dialects are columns of `OPS`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

from fastreward.language.ops import ATOM, OPS

Dialect = Literal["triton", "cuda"]
#: Text, and how tightly its outermost operator binds.
Part = tuple[str, int]
#: How tightly operands of conditions must bind: compilers warn of an && in an ||, and readers stumble.
_OF_CONDITIONS: Final = {1: (3, 3), 2: (3, 3), 3: (4, 4)}


def operator(op: str, parts: Sequence[Part], dialect: Dialect, **fields: str) -> Part:
    """The operator on `parts`; fields: what else a template of the dialect names ({f} and {real} in C++)."""
    spec = OPS[op]
    own: str | None = getattr(spec, dialect)
    if spec.symbol is None:
        call = own or f"{op}({', '.join(f'{{{k}}}' for k in range(spec.arity))})"
        return call.format(*(text for text, _ in parts), **fields), ATOM
    symbol = own or spec.symbol
    if spec.arity == 1:
        return f"{symbol}{_bracketed(parts[0], spec.binds + 1)}", spec.binds
    left, right = _OF_CONDITIONS.get(spec.binds, (spec.binds, spec.binds + 1))
    return f"{_bracketed(parts[0], left)} {symbol} {_bracketed(parts[1], right)}", spec.binds


def _bracketed(part: Part, least: int) -> str:
    text, binding = part
    return text if binding >= least else f"({text})"
