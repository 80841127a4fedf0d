"""Protocol of a traced loss, all that the language's files need of one; `define` makes them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Protocol

from torch import Tensor

from fastreward.language.node import Node
from fastreward.language.terms import PairTerms, Terms


class TracedLoss(Protocol):
    """A loss with its parameters, which may be traced."""

    @property
    def name(self) -> str:
        """The name of the function that defines it."""

    @property
    def place(self) -> str:
        """Where that function is, for messages."""

    @property
    def pairs(self) -> bool:
        """Whether it is over chosen and rejected sequences."""

    @property
    def aggregation(self) -> str:
        """How its token losses become one number."""

    @property
    def parameters(self) -> Mapping[str, Any]:
        """All parameters, by name."""

    @property
    def scalars(self) -> dict[str, float]:
        """Those that are numbers at run time."""

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Those given once per sequence."""

    @property
    def structure(self) -> tuple[Any, ...]:
        """Key of the formula: losses with equal ones share kernels."""

    def terms(self, optional: bool | Collection[str] = True) -> Terms | PairTerms:
        """Terms on a fresh graph."""

    def trace(self, t: Terms | PairTerms) -> Node:
        """The loss as an expression of `t`."""

    def reading(self) -> str:
        """Names of what it asks for, for messages."""
