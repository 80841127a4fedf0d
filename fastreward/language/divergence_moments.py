"""Which divergences one read of a row gives: those that are sums of a few moments of the two distributions.

Sums of p and q times log p and log q need no normaliser before they are begun: like the softmax's own sum they are
kept relative to the largest logit so far, and normalised when the row is done. The KLs are such, and what is made of
them by scaling and adding; the logarithm of a mixture, as in Jensen-Shannon's, is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Final, NamedTuple

from fastreward.language.divergence_programs import PER_TOKEN
from fastreward.language.node import Level, Node, walk
from fastreward.language.ops import OPS
from fastreward.language.program import Program

#: A polynomial: what each product of inputs (by their names, in order) is multiplied by.
_Terms = dict[tuple[str, ...], float]
#: The products whose sum over the vocabulary is known or a moment.
_SUMMED: Final = (("p",), ("q",), ("log_p", "p"), ("log_q", "p"), ("log_p", "q"), ("log_q", "q"))


class Moments(NamedTuple):
    """A sum over the vocabulary as relative_p * sum p (log p - log q) + relative_q * sum q (log p - log q)
    + log_p * sum p log p + log_q * sum q log q + constant."""

    relative_p: float
    relative_q: float
    log_p: float
    log_q: float
    constant: float


@lru_cache(maxsize=1024)
def moments(program: Program, scalars: tuple[float, ...]) -> tuple[Moments, ...] | None:
    """The sums of a divergence's `values`, by the values of its scalars; None where it takes more than moments."""
    sums = [_moments(terms) for terms in _polynomials([n.args[0] for n in program.outputs], program, scalars)]
    return tuple(m for m in sums if m is not None) if None not in sums else None


class Product(NamedTuple):
    """A term of a gradient: what p, q, p log p, p log q, q log p or q log q is multiplied by."""

    of_p: bool  # else of q
    log: str | None  # "log_p" or "log_q"
    factor: float
    inputs: tuple[str, ...]  # per row, by their names


@lru_cache(maxsize=1024)
def products(program: Program, scalars: tuple[float, ...]) -> tuple[Product, ...] | None:
    """A gradient per token as a sum of products; None where it takes more."""
    (terms,) = _polynomials(program.outputs, program, scalars)
    found = []
    for names, factor in (terms or {}).items():
        of_token = tuple(name for name in names if name in PER_TOKEN)
        if factor and of_token not in _SUMMED:
            return None
        if factor:
            log = of_token[0] if len(of_token) > 1 else None
            rest = tuple(name for name in names if name not in PER_TOKEN)
            found.append(Product(of_token[-1] == "p", log, factor, rest))
    return tuple(found) or None


def _polynomials(nodes: Sequence[Node], program: Program, scalars: tuple[float, ...]) -> list[_Terms | None]:
    """Each node as a sum of products of inputs; None where it is not one."""
    numbers = {n.id: x for n, x in zip(program.scalars, scalars, strict=True)}
    found: dict[int, _Terms | None] = {}
    for node in walk(nodes):
        found[node.id] = _terms(node, [found[a.id] for a in node.args], numbers)
    return [found[n.id] for n in nodes]


def _terms(node: Node, args: list[_Terms | None], numbers: dict[int, float]) -> _Terms | None:
    if node.op == "constant" or node.id in numbers:
        value = numbers[node.id] if node.value is None else node.value
        return {(): value}
    if node.op == "input" and node.level in (Level.TOKEN, Level.SEQUENCE):
        return {(node.name or "",): 1.0}
    if node.level == Level.SCALAR:  # of numbers alone, on the way to those that the program is given
        known = [None if a is None else a.get((), 0.0) for a in args]
        return {(): float(OPS[node.op].value(*known))} if None not in known and args else None
    if node.op not in ("add", "sub", "neg", "mul") or None in args:
        return None
    x, *rest = (a for a in args if a is not None)
    if node.op == "neg":
        return _scaled(x, -1.0)
    return _product(x, rest[0]) if node.op == "mul" else _sum(x, _scaled(rest[0], -1.0 if node.op == "sub" else 1.0))


def _scaled(x: _Terms, factor: float) -> _Terms:
    return {product: factor * amount for product, amount in x.items()}


def _sum(x: _Terms, y: _Terms) -> _Terms:
    return {product: x.get(product, 0.0) + y.get(product, 0.0) for product in (*x, *y)}


def _product(x: _Terms, y: _Terms) -> _Terms:
    made: _Terms = {}
    for a, first in x.items():
        for b, second in y.items():
            made = _sum(made, {tuple(sorted((*a, *b))): first * second})
    return made


def _moments(terms: _Terms | None) -> Moments | None:
    if terms is None or any(amount and product not in _SUMMED for product, amount in terms.items()):
        return None
    p, q, own_p, other_p, other_q, own_q = (terms.get(product, 0.0) for product in _SUMMED)
    # p log q = p log p - p (log p - log q): the difference is small where the distributions are alike.
    return Moments(-other_p, other_q, own_p + other_p, own_q + other_q, p + q)
