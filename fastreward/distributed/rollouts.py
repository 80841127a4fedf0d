"""Rollouts that are split over ranks, so that a group's may lie on several: gathered in rank order, then cut again."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastreward._arguments.groups import GroupIds, Groups
from fastreward._arguments.transforms import transformed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Ranks:
    """The rows of every rank of a process group: all of them, or this rank's among all.

    Rows rather than statistics cross: a reward is no larger than a group's count, mean and squares, and everything that
    one process computes from a batch (ranks inside a group, second maxima, whatever rule) is computed as there.
    """

    def __init__(self, group: ProcessGroup, rows: int) -> None:
        if transformed():
            raise NotImplementedError(
                "fastreward: process_group is not available under torch.func or with dual tensors"
            )
        self._group, self._rows = group, rows
        self._counts: list[int] = []

    def gather(self, columns: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Tensors [rows, ...] of every rank, one behind the other."""
        device = next(x.device for x in columns if x is not None)
        self._counts = torch.stack(self._all(torch.tensor(self._rows, device=device))).tolist()
        return [None if x is None else self._joined(x) for x in columns]

    def own(self, x: Tensor) -> Tensor:
        """This rank's part of what was gathered."""
        start = sum(self._counts[: dist.get_rank(self._group)])
        return x[start : start + self._rows]

    def _joined(self, x: Tensor) -> Tensor:
        padded = x.new_zeros((max(self._counts), *x.shape[1:]))
        padded[: x.shape[0]] = x
        return torch.cat([part[:count] for part, count in zip(self._all(padded), self._counts, strict=True)])

    def _all(self, x: Tensor) -> list[Tensor]:
        out = [torch.empty_like(x) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(out, x, group=self._group)
        return out


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
