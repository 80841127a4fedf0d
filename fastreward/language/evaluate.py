"""`Loss.evaluate`: a loss on numbers, in float64."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastreward._arguments.arrays import as_tensor
from fastreward._arguments.groups import factorize
from fastreward.language.graph import Graph
from fastreward.language.node import Level, Node, walk
from fastreward.language.objective import inputs_asked
from fastreward.language.terms import PAIR_TERMS, TERMS, PairTerms, Terms
from fastreward.language.traced import TracedLoss
from fastreward.reference.program import Values

_SIDES = ("chosen_", "rejected_")


def evaluate(
    loss: TracedLoss, mask: Any, group_ids: Any, arrays: Mapping[str, Any], dtype: torch.dtype = torch.float64
) -> Tensor:
    """See Loss.evaluate; in another dtype it is what plain torch would give."""
    tensors = {name: torch.as_tensor(as_tensor(x), dtype=dtype) for name, x in arrays.items()}
    numbers = mask is None and all(x.ndim == 0 for x in tensors.values())
    masks, single = _masks(loss, mask, tensors)
    named: dict[tuple[str, int], Tensor] = {}
    for name, x in tensors.items():
        term = _split(loss, name)
        if term in named:
            raise ValueError(f"{name}: there is an array of this name for the pair and for its chosen side; rename one")
        x = _shaped(name, x, masks[term[1]])
        lifted = single[term[1]] and x.ndim == (0 if numbers else 1) and _per_token(loss, *term)
        named[term] = x.reshape(-1, 1) if lifted else x
    _check_names(loss, named)
    levels = [{n: _level(x) for (n, side), x in named.items() if side == wanted} for wanted in (0, 1)]
    t = PairTerms(Graph(2), levels[0], (levels[0], levels[1])) if loss.pairs else Terms(Graph(), levels[0])
    t.graph.by_term = True
    value = loss.trace(t)
    for name, x in loss.tensors.items():
        if x.ndim and len(x) != len(masks[0]):
            raise ValueError(
                f"{loss.name}: {name}: expected [{len(masks[0])}], one per sequence, got shape {list(x.shape)}"
            )
        named[f"parameter.{name}", 0] = x
    result = Values(named, masks, _groups(value, group_ids, masks[0]), loss.scalars, dtype).of(value)
    if value.level == Level.TOKEN:
        tokens = torch.where(masks[value.side], result, 0.0)
        return tokens.reshape(()) if numbers else tokens.squeeze(-1) if single[value.side] else tokens
    valid = torch.stack([side.any(-1) for side in masks]).any(0)
    per_sequence = torch.where(valid, result.expand(masks[0].shape[0], 1).squeeze(-1), 0.0)
    return per_sequence.reshape(()) if numbers else per_sequence


def _check_names(loss: TracedLoss, named: Iterable[tuple[str, int]]) -> None:
    """Refuses what is neither a term nor read by the loss."""
    known = PAIR_TERMS if loss.pairs else TERMS
    asked = {name for name, _, _ in inputs_asked(loss)}
    for name, side in named:
        if name not in known and name not in asked:
            argument = f"{_SIDES[side]}{name}" if loss.pairs and side else name
            near = difflib.get_close_matches(name, {*known, *asked}, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(f"{argument}: {loss.name} does not read it{hint}; it reads {loss.reading()}")


def _split(loss: TracedLoss, name: str) -> tuple[str, int]:
    """(term, side) of the argument `chosen_logprob`, or of `logprob`."""
    if loss.pairs:
        for side, prefix in enumerate(_SIDES):
            if name.startswith(prefix):
                return name.removeprefix(prefix), side
    return name, 0


def _per_token(loss: TracedLoss, term: str, side: int) -> bool:
    """Whether the loss reads this term once per token, or not at all."""
    levels = [level for name, level, of in inputs_asked(loss) if (name, of) == (term, side)]
    return max(levels, default=Level.TOKEN) == Level.TOKEN


def _masks(loss: TracedLoss, mask: Any, tensors: Mapping[str, Tensor]) -> tuple[list[Tensor], list[bool]]:
    """The valid tokens of each side, bool [B, T], everything where none are given.

    And of each side whether it has one token a sequence because neither a mask nor any [B, T] says otherwise.
    """
    sides = 2 if loss.pairs else 1
    given: Sequence[Any] = mask if isinstance(mask, tuple | list) and sides == 2 else [mask] * sides
    masks: list[Tensor | None] = [None if m is None else torch.as_tensor(as_tensor(m)) != 0 for m in given]
    for m in masks:
        if m is not None and m.ndim != 2:
            raise ValueError(f"mask: expected [B, T], got shape {list(m.shape)}")
    for side in range(sides):
        shapes = [x.shape for name, x in tensors.items() if x.ndim == 2 and _split(loss, name)[1] == side]
        if masks[side] is None and shapes:
            masks[side] = torch.ones(shapes[0], dtype=torch.bool)
    known = [*(m for m in masks if m is not None), *(x for x in tensors.values() if x.ndim == 1)]
    one = torch.ones(len(known[0]) if known else 1, 1, dtype=torch.bool)
    return [one if m is None else m for m in masks], [m is None for m in masks]


def _shaped(name: str, x: Tensor, mask: Tensor) -> Tensor:
    if tuple(x.shape) not in {(), (mask.shape[0],), tuple(mask.shape)}:
        raise ValueError(
            f"{name}: expected {list(mask.shape)}, [{mask.shape[0]}] or a number, got shape {list(x.shape)}"
        )
    return x


def _level(x: Tensor) -> Level:
    return (Level.BATCH, Level.SEQUENCE, Level.TOKEN)[x.ndim]


def _groups(node: Node, group_ids: Any, mask: Tensor) -> Tensor | None:
    if group_ids is None:
        if any(n.op.startswith("group_") for n in walk([node])):
            raise ValueError("group_ids: needed for a loss over groups")
        return None
    return factorize(group_ids, mask.shape[0], mask.device)
