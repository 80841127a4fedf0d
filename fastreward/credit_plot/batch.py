"""A batch on the host: its sequences' tokens one after the other, and what is known of each of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.arrays import as_tensor
from fastreward._arguments.groups import GroupIds, Groups
from fastreward._arguments.tokens import Tokens, one_per_token, token_bounds

#: Token id -> its text, or what makes text of ids, such as a tokenizer's `decode`.
Texts = Mapping[int, str] | Callable[[list[int]], str]


@dataclass(frozen=True, eq=False)
class Batch:
    """Sequences of tokens. N counts the shown tokens of all sequences, row by row.

    values: by name, with "advantages" first; NaN where the token is masked out. kinds: by name, what they are values of
    (the names of credit_page's arguments).
    """

    ids: NDArray[np.int64]  # [N]
    lengths: NDArray[np.int64]  # [B]
    counted: NDArray[np.bool_]  # [N]
    values: dict[str, NDArray[np.float32]]  # [N] each
    kinds: dict[str, str]
    rewards: list[float] | None
    groups: list[str]  # [B] names

    @property
    def starts(self) -> NDArray[np.int64]:
        """[B + 1]: where each sequence's tokens begin among the N."""
        return np.concatenate([[0], self.lengths.cumsum()])


def batch_of(
    tokens: Any,
    mask: Any,
    named: Mapping[str, Mapping[str, Any]],
    *,
    rewards: Any = None,
    group_ids: GroupIds | None = None,
    lengths: Any = None,
    attention_mask: Any = None,
    cu_seqlens: Any = None,
) -> Batch:
    """The batch of a call. named: by kind, values by name: per token, or per sequence.

    Raises:
        TypeError, ValueError: wrong dtypes or shapes, a name given twice.
    """
    ids = check.tensor("tokens", as_tensor(tokens))
    check.integers("tokens", ids)
    bounds = token_bounds(as_tensor(cu_seqlens), ids, "tokens")
    if bounds is None and ids.ndim != 2:
        raise ValueError(f"tokens: expected [B, T], or [N] with cu_seqlens, got shape {list(ids.shape)}")
    shape = Tokens(tuple(ids.shape), None, bounds)
    counted = check.mask(as_tensor(mask), "tokens", ids)
    shown, per_row = _shown(shape, counted, as_tensor(lengths), as_tensor(attention_mask), ids)
    counts = torch.ones(shown.shape, dtype=torch.bool) if counted is None else counted.cpu() != 0
    counts = counts[shown]
    values: dict[str, NDArray[np.float32]] = {}
    kinds: dict[str, str] = {}
    for kind, given in named.items():
        for name, x in given.items():
            if name in values:
                raise ValueError(f"{name}: given twice, as {kinds[name]} and as {kind}")
            values[name] = _values(_argument(kind, name), x, shape)[shown].masked_fill(~counts, float("nan")).numpy()
            kinds[name] = kind
    return Batch(
        ids.cpu().long()[shown].numpy(),
        per_row.numpy(),
        counts.numpy(),
        values,
        kinds,
        _rewards(rewards, shape.rows),
        _groups(group_ids, shape.rows),
    )


def _argument(kind: str, name: str) -> str:
    return kind if kind == name else f"{kind}[{name!r}]"


def _shown(
    tokens: Tokens, mask: Tensor | None, lengths: Tensor | None, attention_mask: Tensor | None, ids: Tensor
) -> tuple[Tensor, Tensor]:
    """(bool in the tokens' shape: what is shown, i64 [B]: how many). As PrefixTree: a sequence runs to its last valid
    token, or as lengths or attention_mask say."""
    if tokens.cu_seqlens is not None:
        for name, x in (("lengths", lengths), ("attention_mask", attention_mask)):
            if x is not None:
                raise ValueError(f"{name}: expected None beside cu_seqlens, which say where sequences end")
        return torch.ones(tokens.shape, dtype=torch.bool), tokens.cu_seqlens.diff().cpu()
    if lengths is not None and attention_mask is not None:
        raise ValueError("lengths, attention_mask: expected at most one of them")
    rows, width = tokens.shape
    at = torch.arange(width)
    begin, end = torch.zeros(rows, dtype=torch.long), torch.full((rows,), width)
    attended = check.mask(attention_mask, "tokens", ids, "attention_mask")
    if lengths is not None:
        end = torch.as_tensor(lengths).cpu()
        check.integers("lengths", end)
        check.shape("lengths", end, (rows,), "one per sequence")
        check.every("lengths", (end >= 0) & (end <= width), end, f"numbers in [0, {width}]")
        end = end.long()
    elif (given := mask if attended is None else attended) is not None:
        there = given.cpu() != 0
        end = torch.where(there, at + 1, 0).amax(-1) if width else end
        if attended is not None:
            begin = torch.where(there, at, width).amin(-1).minimum(end) if width else begin
    return (at >= begin[:, None]) & (at < end[:, None]), end - begin


def _values(name: str, x: Any, tokens: Tokens) -> Tensor:
    """f32 in the tokens' shape, on the CPU."""
    given = check.reals(name, as_tensor(x)).detach().cpu().float()
    bounds = None if tokens.cu_seqlens is None else tokens.cu_seqlens.cpu()
    if one_per_token(name, given, tokens.shape, bounds):
        return given
    if tuple(given.shape) != (tokens.rows,):
        raise ValueError(
            f"{name}: expected shape {list(tokens.shape)} (one per token) or [{tokens.rows}] (one per sequence), "
            f"got {list(given.shape)}"
        )
    return Tokens(tokens.shape, None, bounds).broadcast(given)


def _rewards(rewards: Any, rows: int) -> list[float] | None:
    if rewards is None:
        return None
    given = check.reals("rewards", as_tensor(rewards))
    check.shape("rewards", given, (rows,), "one per sequence")
    numbers: list[float] = given.detach().double().tolist()
    return numbers


def _groups(group_ids: GroupIds | None, rows: int) -> list[str]:
    """The group of each sequence, by its name."""
    given: list[Hashable] = [""] * rows if group_ids is None else _labels(group_ids)
    if len(given) != rows:
        raise ValueError(f"group_ids: expected one for each of the {rows} sequences, got {len(given)}")
    return [str(name) for name in given]


def _labels(group_ids: GroupIds) -> list[Hashable]:
    """What each sequence's group is called; "" where it is in none."""
    if isinstance(group_ids, Groups):
        called = group_ids.labels
        return [called[k] if k >= 0 else "" for k in group_ids.index.flatten().tolist()]
    return list(group_ids.tolist() if hasattr(group_ids, "tolist") else group_ids)
