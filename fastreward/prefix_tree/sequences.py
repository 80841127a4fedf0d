"""Sequences that a prefix tree is built from: their places in flat memory, groups, and tokens that get credit."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.arrays import array_kind, as_tensor
from fastreward._arguments.groups import GroupIds, factorize, group_labels
from fastreward._arguments.options import Place
from fastreward._arguments.tokens import token_bounds
from fastreward._runtime.dispatch import implementation


@dataclass(frozen=True, slots=True)
class Sequences:
    """B sequences, each inside of its row's extent [extents[b], extents[b + 1]) of a flat memory.

    A sequence begins with its row, or with the first nonzero position of `first`. It has `lengths` tokens, or ends with
    the last nonzero position of `last`, or with its row.

    place: for each token of the caller where it lies in the flat memory, None where the two are the same.
    """

    shape: tuple[int, ...]  # of the caller's tokens
    extents: Tensor  # [B + 1] i64
    group: Tensor  # [B] i64
    first: Tensor | None = None  # flat mask
    last: Tensor | None = None  # flat mask
    lengths: Tensor | None = None  # [B] i64
    credit: Tensor | None = None  # flat mask
    tokens: Tensor | None = None  # flat, i64 or i32
    parent_row: Tensor | None = None  # [B] i64
    branch_position: Tensor | None = None  # [B] i64
    ordered_groups: bool = False  # group has the numbers 0, 1, ... in the order of the roots
    place: Tensor | None = None  # caller's shape, i64; negative: nowhere
    flat: int = 0  # tokens of the flat memory
    packable: bool = True  # its tokens are all that a sequence has
    one_to_one: bool = True  # `place` moves tokens, and no two to the same
    shown: Tensor | None = None  # where not one to one: mask in the caller's shape of what gets credit

    def to_flat(self, x: Tensor) -> Tensor:
        """Values in the caller's shape to flat memory."""
        flat = x.reshape(-1)
        if self.place is None:
            return flat
        if not self.one_to_one:
            raise ValueError("from_tokens: a tree from_paths with segment_ids has no unique tokens; it has steps")
        return torch.empty_like(flat).scatter(0, self.place.reshape(-1), flat)

    def from_flat(self, x: Tensor, none: Any) -> Tensor:
        """Flat memory to values in the caller's shape; `none` for tokens that lie nowhere."""
        if self.place is None:
            return x.view(self.shape)
        if x.numel() == 0:
            x = torch.cat([x, x.new_full((1,), none)])  # no new tensor: gradients flow, if only of nothing
        there = self.place >= 0
        return torch.where(there, x[self.place.clamp(min=0)], none)

    def credited(self, x: Tensor) -> Tensor:
        """from_flat of values that have 0 where `credit` says so; and where `shown` does."""
        out = self.from_flat(x, 0.0)
        return out if self.shown is None else torch.where(self.shown != 0, out, 0.0)

    def ends_of_steps(self, which: Place) -> Tensor:
        """Where not one to one, bool in the caller's shape: whether a token is the first ("start") or last of its step.

        Tokens that lie nowhere are in no step; their answer means nothing.
        """
        assert self.place is not None
        column = torch.arange(self.shape[-1], device=self.place.device).expand(self.shape)
        step = torch.where(self.place >= 0, self.place, self.flat)
        found = column.new_zeros(self.flat + 1).scatter_reduce(
            0, step.reshape(-1), column.reshape(-1), "amin" if which == "start" else "amax", include_self=False
        )
        return column == found[step]


# ------------------------------------------------------------------------------------------------------------ tokens
def token_sequences(
    tokens: Tensor,
    mask: Tensor | None,
    group_ids: GroupIds | None,
    group_size: int | None,
    lengths: Tensor | Sequence[int] | None,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    ignore_masked: bool,
    backend: str,
) -> Sequences:
    """Sequences of tokens [B, T], or [N] with cu_seqlens."""
    check.integers("tokens", tokens)
    extents = _extents(tokens, cu_seqlens)
    credit = _flat(check.mask(mask, "tokens", tokens))
    attended = _flat(check.mask(attention_mask, "tokens", tokens, name="attention_mask"))
    if tokens.dtype not in (torch.int32, torch.int64):
        tokens = tokens.to(torch.int64 if tokens.dtype in (torch.uint32, torch.uint64) else torch.int32)
    made = Sequences(
        tuple(tokens.shape),
        extents,
        groups_of(group_ids, group_size, extents.shape[0] - 1, tokens.device),
        first=attended,
        last=credit if attended is None else attended,
        lengths=None if lengths is None else _lengths(lengths, extents, attended, backend),
        credit=credit,
        tokens=tokens.contiguous().reshape(-1),
        flat=tokens.numel(),
    )
    if not ignore_masked:
        return made
    if mask is None:
        raise ValueError("ignore_masked: needs a mask")
    return _without_masked(made)


def _flat(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.reshape(-1)


def _without_masked(s: Sequences) -> Sequences:
    """The credited tokens of each sequence moved to the front of its row, in their order; the others behind them."""
    assert s.credit is not None
    assert s.tokens is not None
    row, at = rows_of_tokens(s.extents, s.flat), torch.arange(s.flat, device=s.extents.device)
    starts, ends = (s.extents[:-1], s.extents[1:]) if s.first is None else _span(s.first, s.extents)
    if s.lengths is not None:
        ends = starts + s.lengths
    kept = (s.credit != 0) & (at >= starts[row]) & (at < ends[row])
    before = torch.cat([row.new_zeros(1), kept.cumsum(0)])  # kept tokens before each place
    counts = before[s.extents[1:]] - before[s.extents[:-1]]
    begin = s.extents[:-1][row]
    rank = before[:-1] - before[begin]
    place = torch.where(kept, begin + rank, begin + counts[row] + (at - begin - rank))
    tokens = torch.empty_like(s.tokens).scatter_(0, place, s.tokens)
    return Sequences(
        s.shape,
        s.extents,
        s.group,
        lengths=counts,
        tokens=tokens,
        place=place.reshape(s.shape),
        flat=s.flat,
        packable=False,
    )


def _span(mask: Tensor, extents: Tensor) -> tuple[Tensor, Tensor]:
    """[B] each: where the nonzero positions of a flat mask begin and end in each row; the row's begin without any."""
    seen = (mask != 0).cumsum(0)
    before, begins = torch.nn.functional.pad(seen, (1, 0))[extents], extents[:-1]
    some = before[1:] > before[:-1]
    first, last = torch.searchsorted(seen, before[:-1], right=True), torch.searchsorted(seen, before[1:])
    return torch.where(some, first, begins), torch.where(some, last + 1, begins)


# ------------------------------------------------------------------------------------------------- paths and branches
def path_sequences(
    path_ids: Tensor | Sequence[Sequence[Hashable]],
    group_ids: GroupIds | None,
    group_size: int | None,
    segment_ids: Tensor | None,
    mask: Tensor | None,
) -> tuple[Sequences, Tensor]:
    """Sequences of steps, and a tensor on their device."""
    paths = _path_tensor(path_ids)
    count, steps = paths.shape
    lengths = ((paths >= 0).cumprod(1)).sum(1)
    if segment_ids is not None and array_kind(segment_ids) is not None:
        segment_ids = as_tensor(segment_ids)
    shape, place = (count, steps), None
    if segment_ids is not None:
        check.integers("segment_ids", segment_ids)
        if segment_ids.ndim != 2 or segment_ids.shape[0] != count:
            raise ValueError(f"segment_ids: expected shape [{count}, T], got {list(segment_ids.shape)}")
        check.same_device("segment_ids", segment_ids, "path_ids", paths)
        if check.values_checked(segment_ids):
            good = segment_ids < lengths.unsqueeze(1)
            check.every("segment_ids", good, segment_ids, "a place in the row's path (negative = none)")
        shape = (count, segment_ids.shape[1])
        first = torch.arange(count, device=paths.device).unsqueeze(1) * steps
        place = torch.where(segment_ids >= 0, segment_ids.long() + first, -1)
    named = "path_ids" if place is None else "segment_ids"
    credit = check.mask(as_tensor(mask), named, torch.empty(shape, device=paths.device))
    extents = torch.arange(count + 1, device=paths.device) * steps
    return Sequences(
        shape,
        extents,
        groups_of(group_ids, group_size, count, paths.device),
        lengths=lengths,
        credit=_flat(credit) if place is None else None,
        tokens=paths.contiguous().reshape(-1),
        place=place,
        flat=count * steps,
        packable=False,
        one_to_one=place is None,
        shown=None if place is None else credit,
    ), paths


def _path_tensor(path_ids: Tensor | Sequence[Sequence[Hashable]]) -> Tensor:
    """[B, D] i64, negative behind a path's end; hashables are numbered."""
    given = as_tensor(path_ids)
    if isinstance(given, Tensor):
        check.integers("path_ids", given)
        if given.ndim != 2:
            raise ValueError(f"path_ids: expected shape [B, D], got {list(given.shape)}")
        return given.long()
    rows = [as_tensor(path) for path in given]
    if rows and all(isinstance(row, Tensor) and row.ndim == 1 for row in rows):
        for row in rows:
            check.integers("path_ids", row)
        return torch.nn.utils.rnn.pad_sequence([row.long() for row in rows], batch_first=True, padding_value=-1)
    if any(isinstance(row, str | bytes) for row in rows):
        raise TypeError("path_ids: expected a sequence of ids for each path, got a string")
    paths = [list(row) for row in rows]
    counts, ids = torch.tensor([len(path) for path in paths], dtype=torch.int64), [x for path in paths for x in path]
    numbers = factorize(ids, len(ids), torch.device("cpu"), "path_ids")
    if any(isinstance(x, Integral | Tensor) and x < 0 for x in ids):
        raise ValueError(
            "path_ids: expected no negative numbers in lists of ids, got some: there a path ends with its list, and "
            "numbers that begin below 0 are better given as strings"
        )
    there = torch.arange(max(map(len, paths), default=0)) < counts.unsqueeze(1)
    return torch.full(there.shape, -1).masked_scatter(there, numbers)


def branch_sequences(
    parent: Tensor,
    branch_position: Tensor,
    lengths: Tensor,
    group_ids: GroupIds | None,
    group_size: int | None,
    mask: Tensor | None,
) -> Sequences:
    """Sequences that branch off each other; their tokens are not known."""
    check.integers("parent", parent)
    if parent.ndim != 1:
        raise ValueError(f"parent: expected shape [B], got {list(parent.shape)}")
    for name, x in (("branch_position", branch_position), ("lengths", lengths)):
        check.integers(name, x)
        check.shape(name, x, parent.shape, "one per sequence")
        check.same_device(name, x, "parent", parent)
    parent, position, length = parent.long(), branch_position.long(), lengths.long()
    count = parent.shape[0]
    group = groups_of(group_ids, group_size, count, parent.device)
    if check.values_checked(parent):
        _check_branches(parent, position, length, group)
    if mask is None:
        columns = int(length.max()) if count else 0  # the one thing that no argument says
    elif mask.ndim == 2 and mask.shape[0] == count:
        columns = mask.shape[1]
    else:
        raise ValueError(f"mask: expected shape [{count}, T], got {list(mask.shape)}")
    extents = torch.arange(count + 1, device=parent.device) * columns
    if check.values_checked(length):
        check.every("lengths", length <= columns, length, f"at most {columns}, the columns of mask")
    return Sequences(
        (count, columns),
        extents,
        group,
        lengths=length.contiguous(),
        credit=None if mask is None else _flat(check.mask(mask, "mask", mask)),
        parent_row=parent.contiguous(),
        branch_position=position.contiguous(),
        flat=count * columns,
        packable=False,
    )


def _check_branches(parent: Tensor, position: Tensor, length: Tensor, group: Tensor) -> None:
    count = parent.shape[0]
    check.every("lengths", length >= 0, length, "integers >= 0")
    check.every("parent", (parent >= -1) & (parent < count), parent, f"rows in [0, {count}), or -1")
    has, of = parent >= 0, parent.clamp(min=0)
    if count == 0:
        return
    check.every("parent", ~has | (group[of] == group), parent, "a row of the same group")
    inside = ~has | ((position >= 0) & (position <= length) & (position <= length[of]))
    check.every("branch_position", inside, position, "a position in both rows")


# ------------------------------------------------------------------------------------------------------------- pieces
def groups_of(group_ids: GroupIds | None, group_size: int | None, count: int, device: torch.device) -> Tensor:
    """i64 [B]: a number per group; one group where neither argument is given."""
    labels = group_labels(group_ids, group_size, count, device)
    return torch.zeros(count, dtype=torch.int64, device=device) if labels is None else labels


def _extents(tokens: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """i64 [B + 1]: where the rows begin and end."""
    bounds = token_bounds(cu_seqlens, tokens, "tokens")
    if bounds is not None:
        return bounds
    if tokens.ndim != 2:
        raise ValueError(f"tokens: expected shape [B, T], or [N] with cu_seqlens, got {list(tokens.shape)}")
    return torch.arange(tokens.shape[0] + 1, device=tokens.device) * tokens.shape[1]


def _lengths(lengths: Tensor | Sequence[int], extents: Tensor, first: Tensor | None, backend: str) -> Tensor:
    if not isinstance(lengths, Tensor):
        lengths = torch.as_tensor(lengths, device=extents.device)
    check.integers("lengths", lengths)
    check.shape("lengths", lengths, (extents.shape[0] - 1,), "one per sequence")
    check.same_device("lengths", lengths, "tokens", extents)
    length = lengths.long().contiguous()
    if check.values_checked(length):
        starts = extents[:-1] if first is None else implementation("prefix_tree_build", backend).starts(first, extents)
        good = (length >= 0) & (length <= extents[1:] - starts)
        check.every("lengths", good, length, "at most the row's tokens")
    return length


def rows_of_tokens(extents: Tensor, flat: int) -> Tensor:
    """i64 [flat]: the row that each token of the flat memory belongs to."""
    rows = torch.arange(extents.shape[0] - 1, device=extents.device)
    return rows.repeat_interleave(extents.diff(), output_size=flat)
