"""Groups of rollouts, turns or sequences: ids of any kind, or equal contiguous groups of a size, as numbers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.arrays import as_tensor
from fastreward._arguments.labels import Labels, listed, numbered, renumbered


class Groups:
    """Which rollouts, or turns of rollouts, belong together, worked out once: goes wherever group_ids= is taken.

    `Groups(uids)` numbers B rollouts; `Groups.by(uid, turn)` makes groups of those that agree in every key, such as
    prompt and turn, prompt and tag, or prompt and anchor state (GiGPO). Strings are looked at once, however often the
    groups are used.

    Args:
        group_ids: integers [B], or any sequence of B hashables (uid strings). Integers on a GPU are not waited for.
        group_size, count: instead of group_ids, `count` entries in equal contiguous groups of this size.
        mask: nonzero = the entry is there; others are in no group.

    Attributes:
        shape: [B], or [B, S] where a key has one label for each of S turns. Operations take values of this shape.
        index: i64 in `shape`: the groups' numbers 0, 1, ... in first-seen order, -1 where an entry is in no group.
        count, sizes, first, labels: how many groups there are; i64 [count], the entries of each; i64 [count], the
            position of each one's first entry (in the flattened shape); a list of what each was called. On a GPU these
            four wait for the device.
        parent: Groups of these groups, [count], by all keys but the last: groups inside groups (hierarchical GRPO).

    Raises:
        TypeError, ValueError: labels that do not compare by value, wrong shapes, both or none of group_ids and
            group_size.
    """

    shape: torch.Size
    index: Tensor
    group_size: int  # 0: not contiguous groups of one size
    partial: bool  # whether entries may be in no group; known for certain on the CPU

    def __init__(
        self,
        group_ids: GroupIds | None = None,
        *,
        group_size: int | None = None,
        count: int | None = None,
        mask: Tensor | None = None,
    ) -> None:
        if (group_ids is None) == (group_size is None) or (group_size is None) != (count is None):
            raise ValueError("group_ids, group_size: expected group_ids, or group_size and count")
        if isinstance(group_ids, Groups):
            raise TypeError("group_ids: expected ids, got Groups; Groups.by(...) takes them as a key")
        if group_size is None:
            self._set([_key("group_ids", group_ids, absent=False)], mask)
            return
        total = check.whole("count", count, "entries in all")
        size = checked_group_size(group_size, total, "entries")
        self._set([_key("group_ids", torch.arange(total).div(size, rounding_mode="floor"), absent=False)], mask)
        self.group_size = 0 if self.partial else size

    @classmethod
    def by(cls, *keys: GroupIds, mask: Tensor | None = None) -> Groups:
        """Groups of the entries that agree in every key.

        Args:
            keys: each as group_ids, other Groups, or with one label for each of S turns: integers [B, S], or B lists
                of labels (shorter ones end early). A key [B] counts for all turns. -1 and None: the entry is in no
                group.
            mask: [B] or [B, S], nonzero = the entry is there.
        """
        if not keys:
            raise ValueError("keys: expected at least one")
        groups = cls.__new__(cls)
        groups._set([_key(f"keys[{k}]", key, absent=True) for k, key in enumerate(keys)], mask)
        return groups

    def _set(self, keys: list[_Key], mask: Tensor | None) -> None:
        self.group_size, self._keys, self._outer = 0, keys, None
        self.shape = next((key.index.shape for key in keys if key.index.ndim == 2), keys[0].index.shape)
        device = next((key.index.device for key in keys if not key.index.is_cpu), keys[0].index.device)
        index = _spread(keys[0].name, keys[0].index, self.shape).to(device)
        for key in keys[1:]:
            self._outer = index.flatten()
            inner = _spread(key.name, key.index, self.shape).to(device)
            both = index * max(1, key.index.numel()) + inner
            index = renumbered(torch.where((index < 0) | (inner < 0), -1, both).flatten()).view(self.shape)
        if mask is not None:
            there = _spread("mask", check.constant("mask", check.tensor("mask", as_tensor(mask))), self.shape).to(
                device
            )
            index = renumbered(torch.where(there != 0, index, -1).flatten()).view(self.shape)
        self.index = index.contiguous()
        self.partial = mask is not None or any(key.partial for key in keys)
        if self.partial and check.values_checked(index):
            self.partial = bool((index < 0).any())

    @cached_property
    def count(self) -> int:
        """How many groups there are."""
        return int(self.index.max()) + 1 if self.index.numel() else 0

    @cached_property
    def sizes(self) -> Tensor:
        """i64 [count]: the entries of each."""
        return torch.bincount(self.index[self.index >= 0], minlength=self.count)

    @cached_property
    def first(self) -> Tensor:
        """i64 [count]: the position of each group's first entry, in the flattened shape."""
        positions = torch.arange(self.index.numel(), device=self.index.device)
        there = self.index.flatten() >= 0
        first = positions.new_empty(self.count)
        return first.scatter_reduce_(0, self.index.flatten()[there], positions[there], "amin", include_self=False)

    @cached_property
    def labels(self) -> list[Any]:
        """What each group was called: a label, or a tuple of them where there are several keys."""
        rows = self.first.tolist()
        columns = [key.labels_at(rows, self.shape) for key in self._keys]
        return columns[0] if len(columns) == 1 else list(zip(*columns, strict=True))

    @cached_property
    def parent(self) -> Groups:
        """Groups of these groups, [count], by all keys but the last."""
        if self._outer is None:
            raise ValueError("parent: expected groups of several keys, got one")
        parent = Groups.__new__(Groups)
        outer = [key.at(self.first, self.shape) for key in self._keys[:-1]]
        parent._set(outer, None)
        return parent

    def to(self, device: torch.device | str) -> Groups:
        """The same groups on another device."""
        moved = Groups.__new__(Groups)
        moved.__dict__ |= {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.__dict__.items()}
        moved.__dict__.pop("parent", None)
        return moved

    def __repr__(self) -> str:
        """How many and how large; on a GPU only their shape, as the rest would wait for it."""
        if not check.values_checked(self.index):
            return f"Groups({list(self.shape)} on {self.index.device})"
        sizes = sorted({int(size) for size in (self.sizes.aminmax() if self.count else ())})
        of = f" of {' to '.join(map(str, sizes))}" if sizes else ""
        none = int((self.index < 0).sum())
        return f"Groups({self.count} groups{of} in {list(self.shape)}{f', {none} in none' if none else ''})"


#: What names the groups of B rollouts.
GroupIds = Labels | Groups


def groups_of(name: str, ids: GroupIds) -> Groups:
    """The groups of an argument of this name."""
    if isinstance(ids, Groups):
        return ids
    groups = Groups.__new__(Groups)
    groups._set([_key(name, ids, absent=False)], None)
    return groups


@dataclass(frozen=True, slots=True)
class _Key:
    """One key: numbers of its labels, i64 [B] or [B, S], -1 where there is none; the labels themselves."""

    name: str
    index: Tensor
    labels: Any  # a tensor or a list, flat; or Groups
    partial: bool

    def labels_at(self, rows: list[int], shape: torch.Size) -> list[Any]:
        """The labels of entries, by their position in the flattened shape."""
        turns = 1 if self.index.shape == shape else shape[1]
        at = [row // turns for row in rows]
        if isinstance(self.labels, Groups):
            numbers, names = self.labels.index.flatten().tolist(), self.labels.labels
            return [names[numbers[k]] for k in at]
        values = self.labels.tolist() if isinstance(self.labels, Tensor) else self.labels
        return [values[k] for k in at]

    def at(self, rows: Tensor, shape: torch.Size) -> _Key:
        """The key of some entries only, [len(rows)]."""
        positions = rows.tolist()
        index = _spread(self.name, self.index, shape).flatten()[rows.to(self.index.device)]
        return _Key(self.name, renumbered(index), self.labels_at(positions, shape), partial=False)


def _key(name: str, given: Any, *, absent: bool) -> _Key:
    """A key as numbers; `absent`: -1 and None name no group."""
    given = as_tensor(given)
    if isinstance(given, Groups):
        return _Key(name, given.index, given, given.partial)
    labels = given if isinstance(given, Tensor) else listed(given, name)
    if isinstance(labels, list):
        return _key_of_list(name, labels, absent=absent)
    check.integers(name, labels)
    if labels.ndim not in ((1, 2) if absent else (1,)):
        raise ValueError(f"{name}: expected shape [B]{' or [B, S]' if absent else ''}, got {list(labels.shape)}")
    flat = labels.flatten().long().contiguous()
    return _Key(name, renumbered(flat, absent=absent).view(labels.shape), flat, absent)


def _key_of_list(name: str, labels: list[Any], *, absent: bool) -> _Key:
    rows, turns = len(labels), None
    if absent and labels and all(isinstance(row, list) for row in labels):
        turns = max(map(len, labels))
        labels = [label for row in labels for label in (*row, *[None] * (turns - len(row)))]
    index = numbered(labels, len(labels), torch.device("cpu"), name)
    nothing = [index[labels.index(label)] for label in (None, -1) if label in labels] if absent else []
    for number in nothing:
        index = torch.where(index == number, -1, index)
    index = renumbered(index) if nothing else index
    return _Key(name, index if turns is None else index.view(rows, turns), labels, bool(nothing))


def _spread(name: str, x: Tensor, shape: torch.Size) -> Tensor:
    """x [B] or [B, S] over the whole shape."""
    if x.shape == shape:
        return x
    if x.ndim != 1 or x.shape[0] != shape[0]:
        either = f"{[shape[0]]}" if len(shape) == 1 else f"{[shape[0]]} or {list(shape)}"
        raise ValueError(f"{name}: expected shape {either}, as the other keys have, got {list(x.shape)}")
    return x.unsqueeze(-1).expand(shape)


# ----------------------------------------------------------------------------------------------------- of an operation
@dataclass(frozen=True, slots=True)
class Membership:
    """The groups of an operation's values, of any shape: numbers or labels of each entry, or their common size."""

    shape: torch.Size  # of the values, without their components
    index: Tensor | None  # i64 [N], any labels; or
    group_size: int  # > 0: contiguous groups of so many
    partial: bool  # whether entries are in no group, where index is -1


def membership(group_ids: GroupIds | None, group_size: int | None, x: Tensor, name: str) -> Membership:
    """Of the values x [B] of the argument `name`, or with more dimensions behind; given Groups, in their shape."""
    if x.ndim == 0:
        raise ValueError(f"{name}: expected at least one dimension, [B], got a single number")
    if (group_ids is None) == (group_size is None):
        raise ValueError("group_ids, group_size: expected exactly one of them")
    rows = x.shape[:1]
    if isinstance(group_ids, Groups):
        index = None if group_ids.group_size else group_ids.index.to(x.device).flatten()
        return Membership(group_ids.shape, index, group_ids.group_size, group_ids.partial)
    if group_ids is not None:
        return Membership(rows, factorize(group_ids, rows[0], x.device), 0, partial=False)
    return Membership(rows, None, checked_group_size(group_size, rows[0], "rollouts"), partial=False)


def group_labels(group_ids: GroupIds | None, group_size: int | None, count: int, device: torch.device) -> Tensor | None:
    """Group ids of `count` sequences, i64 [B]; None where neither argument is given."""
    if group_ids is not None and group_size is not None:
        raise ValueError("group_ids, group_size: expected at most one of them")
    if group_size is not None:
        size = checked_group_size(group_size, count, "sequences")
        return torch.arange(count, device=device).div(size, rounding_mode="floor")
    return None if group_ids is None else factorize(group_ids, count, device)


def numbered_groups(group_ids: GroupIds | None, group_size: int | None, count: int, like: Tensor) -> Tensor | None:
    """Renumber group ids as 0, 1, ..."""
    labels = group_labels(group_ids, group_size, count, like.device)
    return labels if labels is None or group_size is not None or isinstance(group_ids, Groups) else dense(labels)


def dense(labels: Tensor) -> Tensor:
    """Numbers 0, 1, ... in the order of the labels i64 [B], without a host synchronisation."""
    ordered, order = labels.sort(stable=True)
    steps = (ordered != ordered.roll(1)).long()
    if steps.shape[0]:
        steps[:1] = 0
    return torch.empty_like(labels).scatter_(0, order, steps.cumsum(0))


def checked_group_size(group_size: object, count: int, what: str) -> int:
    """A group size that divides the `count` rollouts, sequences, ... (`what`)."""
    size = check.whole("group_size", group_size, f"{what} of a group")
    if size < 1 or count % size:
        raise ValueError(f"group_size: expected a positive divisor of the {count} {what}, got {size}")
    return size


def factorize(group_ids: GroupIds, count: int, device: torch.device, name: str = "group_ids") -> Tensor:
    """Group labels i64 [B], contiguous: integers as they are, other labels as 0, 1, ... in first-seen order."""
    if not isinstance(group_ids, Groups):
        return numbered(group_ids, count, device, name)
    if tuple(group_ids.shape) != (count,):
        raise ValueError(f"{name}: expected groups of {count} entries, got {group_ids!r}")
    if group_ids.partial and check.values_checked(group_ids.index):
        where = group_ids.index >= 0
        check.every(name, where, group_ids.index, "every entry in a group, as numbers of at least 0")
    return group_ids.index.to(device)
