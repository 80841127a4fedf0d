"""Rollouts that are split over ranks, so that a group's may lie on several: gathered in rank order, then cut again."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastreward._arguments.groups import GroupIds, Groups
from fastreward.distributed.ranks import Ranks


class Rollouts:
    """The rollouts of every rank: `values` and `columns` of all, one rank behind the other; or this rank's part.

    Rows rather than statistics cross: a reward is no larger than a group's count, mean and squares, and everything that
    one process computes from a batch (ranks inside a group, second maxima, whatever rule) is computed as there.
    """

    def __init__(
        self,
        name: str,
        ranks: Ranks,
        values: Tensor,
        columns: Mapping[str, Tensor | None],
        same: Mapping[str, object],
    ) -> None:
        """values: [rows, ...] f32 or f64, called `name` in messages; columns: [rows, ...], by the names of arguments.

        same: what else has to be the same on every rank.
        """
        rows, width = values.shape[0], math.prod(values.shape[1:])
        given = {key: None if x is None else "one per rollout" for key, x in columns.items()}
        said: list[list[int]] = ranks.meet(rows, width, values.element_size(), same={**given, **same}).tolist()
        self._ranks, self._rows = ranks, rows
        self._counts = [count for count, _, _ in said]
        wide = {(width, size) for count, width, size in said if count}
        if len(wide) > 1:
            raise ValueError(
                f"{name}: expected as many components and the same dtype on every rank, got "
                + ", ".join(f"{width} of {8 * size} bits" for width, size in sorted(wide))
            )
        if wide and not rows:  # nothing has no kind of its own
            width, size = wide.pop()
            dtype = torch.float64 if size == 8 else torch.float32
            values = values.new_empty((0, width) if values.ndim > 1 else (0,), dtype=dtype)
        self.values = self._joined(values)
        self.columns = [None if x is None else self._joined(x) for x in columns.values()]

    def own(self, x: Tensor) -> Tensor:
        """This rank's part of what was gathered."""
        start = sum(self._counts[: self._ranks.rank])
        return x[start : start + self._rows]

    def _joined(self, x: Tensor) -> Tensor:
        padded = x.new_zeros((max(self._counts), *x.shape[1:]))
        padded[: x.shape[0]] = x
        parts = self._ranks.gather(padded)
        return torch.cat([part[:count] for part, count in zip(parts, self._counts, strict=True)])


def labels_of_all_ranks(index: Tensor | None, group_ids: GroupIds | None) -> Tensor | None:
    """Labels i64 that every rank gives the same group: integers are their own, others are hashed, each name once."""
    if index is None or group_ids is None or isinstance(group_ids, Tensor):
        return index
    groups = group_ids if isinstance(group_ids, Groups) else Groups(group_ids)
    if not groups.count:
        return index
    hashed = torch.tensor([_hash(label) for label in groups.labels], device=index.device)
    number = groups.index.flatten().to(index.device)
    return torch.where(number < 0, index, hashed[number])


def _hash(label: Any) -> int:
    """64 bits that are the same in every process, which Python's own hash of a string is not."""
    if isinstance(label, int) and -(2**63) <= label < 2**63:
        return int(label)
    if not _same_everywhere(label):
        raise TypeError(f"group_ids: expected integers, strings or tuples of them over a process group, got {label!r}")
    digest = hashlib.blake2b(repr(label).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _same_everywhere(label: Any) -> bool:
    if isinstance(label, tuple):
        return all(map(_same_everywhere, label))
    return label is None or isinstance(label, str | bytes | int)
