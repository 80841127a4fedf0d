"""The formula of a loss as it was when the loss was made.

What a loss's function reads beside its arguments (globals, closures) is part of the formula. A digest of the traced
formula, in every case that `t.has` distinguishes, tells whether that has changed since.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from threading import local
from typing import Final

from fastreward.language.graph import Graph
from fastreward.language.node import Level, Node
from fastreward.language.program import digest
from fastreward.language.terms import PairTerms, Terms, asked

#: The loss's value as an expression of fresh terms.
Trace = Callable[[Terms | PairTerms], Node]

_FAILED: Final = "!"  # begins the digest of what can't be traced
_TRACING: Final = local()  # .now: whether a loss's function runs in this thread


def in_a_trace() -> bool:
    """Whether a loss's function is running in this thread."""
    return getattr(_TRACING, "now", False)


@contextmanager
def tracing() -> Iterator[None]:
    """While a loss's function runs."""
    outer, _TRACING.now = in_a_trace(), True
    try:
        yield
    finally:
        _TRACING.now = outer


def fresh_terms(pairs: bool, optional: bool | Collection[str], highest: Level) -> Terms | PairTerms:
    """Terms on a fresh graph, where everything that a loss reads is there; optional: of what t.has(...) is so."""
    if pairs:
        return PairTerms(Graph(sides=2), optional=optional, highest=highest)
    return Terms(Graph(), optional=optional, highest=highest)


def first_digest(trace: Trace, pairs: bool) -> tuple[str, Level]:
    """(digest, highest): what may be per sequence is so if only such a formula can be traced."""
    found = formula_digest(trace, pairs, Level.TOKEN)
    if found.startswith(_FAILED):
        lower = formula_digest(trace, pairs, Level.SEQUENCE)
        if not lower.startswith(_FAILED):
            return lower, Level.SEQUENCE
    return found, Level.TOKEN


def formula_digest(trace: Trace, pairs: bool, highest: Level) -> str:
    """A digest of the formula as it would be now, by what `t.has` may say of the terms that it asks for.

    All there, none, all but one, and one alone: every case where it asks for three at most.
    """
    text, names = _digest_with(trace, fresh_terms(pairs, True, highest))
    if not names:
        return text
    least, more = _digest_with(trace, fresh_terms(pairs, False, highest))
    names |= more
    some = {frozenset(x) for name in names for x in ({name}, names - {name})} - {names, frozenset()}
    others = (fresh_terms(pairs, x, highest) for x in sorted(some, key=sorted))
    return " ".join((text, least, *(_digest_with(trace, t)[0] for t in others)))


def _digest_with(trace: Trace, t: Terms | PairTerms) -> tuple[str, frozenset[str]]:
    """(digest of the formula on these terms, those that it asked for)."""
    try:
        value = trace(t)
        text = " ".join((digest([value, *t.reports.values()]), *t.reports))
    except Exception as error:  # whoever calls the loss will see it
        text = f"{_FAILED}{type(error).__name__}"
    return text, asked(t)
