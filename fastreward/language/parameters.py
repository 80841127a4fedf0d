"""Parameters of a loss: numbers, tensors, terms of an enclosing loss, strings, True and False, None."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from numbers import Real
from typing import Any, Final

import torch
from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.arrays import as_tensor
from fastreward.language.messages import described, python_number
from fastreward.language.node import Node
from fastreward.language.terms import PairTerms, Terms

#: What a parameter can be: types, most special first, and words.
_KINDS: Final[dict[str, tuple[type, ...]]] = {
    "bool": (bool,),
    "number": (int, float),
    "term": (Tensor, Node),
    "string": (str,),
    "None": (type(None),),
}
_WORDS: Final = {
    "number": "a number",
    "term": "a [B] tensor",
    "string": "a string",
    "bool": "True or False",
    "None": "None",
}
_ANY: Final = frozenset(_KINDS)


def kinds(annotation: Any, default: Any, static: bool) -> frozenset[str]:
    """The kinds that a parameter may have, by its default and by its annotation, which is text or missing as a rule.

    A static one is known while the loss is traced: no term.
    """
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
    bare = annotation is inspect.Parameter.empty
    none = {"None"} if default is None or bare or "None" in text or "Optional" in text else set()
    if isinstance(default, bool):
        return frozenset({"bool", *none})
    if isinstance(default, str):
        return frozenset({"string", *none})
    numeric = isinstance(default, Real) or text.split(" ")[0] in ("float", "int")
    found = frozenset({"number", "term", *none}) if numeric else _ANY
    return found - {"term"} if static else found


def parameter(loss: str, name: str, value: Any, allowed: Collection[str]) -> Any:
    """`value` as a tensor, a term or Python's own, if it is of an allowed kind."""
    value = as_tensor(python_number(value))
    given = next((kind for kind, types in _KINDS.items() if isinstance(value, types)), "")
    if given not in allowed:
        words = [_WORDS[kind] for kind in _KINDS if kind in allowed]
        expected = " or ".join(", ".join(words).rsplit(", ", 1))
        fixed = " (it decides the formula)" if given == "term" else ""
        came = "a term" if isinstance(value, Node) else "a tensor" if given == "term" else described(value)
        came = f"the terms; write {loss}()(t)" if isinstance(value, Terms | PairTerms) else came
        raise TypeError(f"{loss}: {name}: expected {expected}{fixed}, got {came}")
    if isinstance(value, Tensor):
        if value.ndim > 1:
            raise ValueError(f"{loss}: {name}: expected a number or a [B] tensor, got shape {list(value.shape)}")
        return check.constant(f"{loss}: {name}", value)
    return value


def kind(value: Any) -> Any:
    """The part of a parameter that decides the formula."""
    if isinstance(value, Tensor):
        return "tensor", value.ndim
    return ("term", value.id) if isinstance(value, Node) else (type(value), value)


def same(a: object, b: object) -> bool:
    """Whether two parameters are equal, tensors value by value."""
    if a is b or isinstance(a, Node):
        return a is b
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.device == b.device and a.dtype == b.dtype and torch.equal(a, b)
    return bool(a == b)
