"""`Loss.evaluate`: a loss on numbers, in float64."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastreward._arrays import as_tensor
from fastreward.group import factorize
from fastreward.losses._define import Loss
from fastreward.losses._graph import Graph, Level, Node, walk
from fastreward.losses._objective import terms_asked, terms_read
from fastreward.losses._terms import PAIR_TERMS, TERMS, PairTerms, Terms
from fastreward.reference.program import Values

_SIDES = ("chosen_", "rejected_")


def evaluate(
    loss: Loss, mask: Any, group_ids: Any, arrays: Mapping[str, Any], dtype: torch.dtype = torch.float64
) -> Tensor:
    """See Loss.evaluate; in another dtype it is what plain torch would give."""
    tensors = {name: torch.as_tensor(as_tensor(x), dtype=dtype) for name, x in arrays.items()}
    masks = _masks(loss, mask, tensors)
    named: dict[tuple[str, int], Tensor] = {}
    for name, x in tensors.items():
        term = _split(loss, name)
        if term in named:
            raise ValueError(f"{name}: there is an array of this name for the pair and for its chosen side; rename one")
        named[term] = _shaped(name, x, masks[term[1]])
    _check_names(loss, named)
    levels = [{n: _level(x) for (n, side), x in named.items() if side == wanted} for wanted in (0, 1)]
    t = PairTerms(Graph(2), levels[0], (levels[0], levels[1])) if loss.definition.pairs else Terms(Graph(), levels[0])
    value = loss.trace(t)
    for name, x in loss.tensors.items():
        if x.ndim and len(x) != len(masks[0]):
            raise ValueError(
                f"{loss.name}: {name}: expected [{len(masks[0])}], one per sequence, got shape {list(x.shape)}"
            )
        named[f"parameter.{name}", 0] = x
    result = Values(named, masks, _groups(value, group_ids, masks[0]), loss.scalars, dtype).of(value)
    if value.level == Level.TOKEN:
        return torch.where(masks[value.side], result, 0.0)
    counted = torch.stack([side.any(-1) for side in masks]).any(0)
    return torch.where(counted, result.expand(masks[0].shape[0], 1).squeeze(-1), 0.0)


def _check_names(loss: Loss, named: Iterable[tuple[str, int]]) -> None:
    """Refuses what is neither a term nor read by the loss."""
    known = PAIR_TERMS if loss.definition.pairs else TERMS
    read, asked = terms_read(loss), terms_asked(loss)
    for name, side in named:
        if name not in known and name not in asked:
            argument = f"{_SIDES[side]}{name}" if loss.definition.pairs and side else name
            near = difflib.get_close_matches(name, {*known, *read}, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(f"{argument}: {loss.name} does not read it{hint}; it reads {', '.join(sorted(read))}")


def _split(loss: Loss, name: str) -> tuple[str, int]:
    """(term, side) of the argument `chosen_logprob`, or of `logprob`."""
    if loss.definition.pairs:
        for side, prefix in enumerate(_SIDES):
            if name.startswith(prefix):
                return name.removeprefix(prefix), side
    return name, 0


def _masks(loss: Loss, mask: Any, tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """The counted tokens of each side, bool [B, T]; everything where none are given."""
    sides = 2 if loss.definition.pairs else 1
    given: Sequence[Any] = mask if isinstance(mask, tuple | list) and sides == 2 else [mask] * sides
    masks = []
    for side in range(sides):
        shapes = [x.shape for name, x in tensors.items() if x.ndim == 2 and _split(loss, name)[1] == side]
        if given[side] is not None:
            masks.append(torch.as_tensor(as_tensor(given[side])) != 0)
        elif shapes:
            masks.append(torch.ones(shapes[0], dtype=torch.bool))
        else:
            raise ValueError(f"{loss.name}: expected a term per token ([B, T]) or a mask, to know the tokens")
    return masks


def _shaped(name: str, x: Tensor, mask: Tensor) -> Tensor:
    if tuple(x.shape) not in {(), (mask.shape[0],), tuple(mask.shape)}:
        raise ValueError(
            f"{name}: expected {list(mask.shape)}, [{mask.shape[0]}] or a number, got shape {list(x.shape)}"
        )
    return x


def _level(x: Tensor) -> Level:
    return (Level.BATCH, Level.ROW, Level.TOKEN)[x.ndim]


def _groups(node: Node, group_ids: Any, mask: Tensor) -> Tensor | None:
    if group_ids is None:
        if any(n.op.startswith("group_") for n in walk([node])):
            raise ValueError("group_ids: needed for a loss over groups")
        return None
    return factorize(group_ids, mask.shape[0], mask.device)
