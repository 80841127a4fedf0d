"""Where slime's tokens lie: packed sequences, of which a rank of a context-parallel group holds two slices each.

slime cuts a sequence into 2 * size chunks of equal width; rank r holds chunk r and the r-th from behind, one after the
other (zigzag: every rank has as much to attend to). A response's log-prob of token k stands at the logit before it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True, slots=True)
class Parallel:
    """Megatron's groups as this rank sees them; (None, 1, 0, None) where Megatron is not loaded."""

    vocabulary: ProcessGroup | None = None
    contexts: int = 1
    context: int = 0
    context_group: ProcessGroup | None = None


def parallel() -> Parallel:
    """Of this process. slime has imported Megatron by the time it calls a function of ours."""
    mpu: Any = getattr(sys.modules.get("megatron.core"), "mpu", None)
    if mpu is None:
        return Parallel()
    group = mpu.get_tensor_model_parallel_group()
    split = group is not None and dist.get_world_size(group) > 1
    contexts = int(mpu.get_context_parallel_world_size())
    if contexts == 1:
        return Parallel(group if split else None)
    return Parallel(
        group if split else None, contexts, mpu.get_context_parallel_rank(), mpu.get_context_parallel_group()
    )


@dataclass(frozen=True, slots=True)
class Layout:
    """The responses of a batch: which of their tokens this rank holds, and at which of its logits.

    lengths: of the whole responses. own: per sample, the (start, end) in its response of each slice that is here. rows:
    per sample and slice, the first logit of it.
    """

    lengths: list[int]
    own: list[list[tuple[int, int]]]
    rows: list[list[int]]
    group: ProcessGroup | None

    @classmethod
    def of(cls, total_lengths: Sequence[int], response_lengths: Sequence[int], ranks: Parallel) -> Layout:
        """From slime's lists."""
        own, rows, base = [], [], 0
        for i, (total, length) in enumerate(zip(map(int, total_lengths), map(int, response_lengths), strict=True)):
            if not 0 <= length < total:
                raise ValueError(
                    f"response_lengths: expected less than total_lengths (a prompt of one token at least), "
                    f"got {length} of {total} at [{i}]"
                )
            before = total - length - 1  # the logit of the response's first token
            slices, starts = [], []
            for first, last, at in _chunks(total, ranks, base):
                low, high = max(first, before), min(last, total - 1)
                if low < high:
                    slices.append((low - before, high - before))
                    starts.append(at + low - first)
            own.append(slices)
            rows.append(starts)
            base += total if ranks.contexts == 1 else 2 * _width(total, ranks)
        return cls([int(n) for n in response_lengths], own, rows, ranks.context_group)

    @property
    def counts(self) -> list[int]:
        """Response tokens of each sample that are here."""
        return [sum(end - start for start, end in slices) for slices in self.own]

    @property
    def is_cut(self) -> bool:
        """Whether sequences are spread over ranks."""
        return self.group is not None

    def bounds(self, device: torch.device) -> Tensor:
        """cu_seqlens of the response tokens here."""
        return _bounds(self.counts, device)

    def filled_bounds(self, device: torch.device) -> Tensor:
        """The same without samples that have no token here: what is per token can't be taken for one per sample."""
        return _bounds([n for n in self.counts if n], device)

    def whole_bounds(self, device: torch.device) -> Tensor:
        """cu_seqlens of the whole responses."""
        return _bounds(self.lengths, device)

    def logit_rows(self, device: torch.device) -> Tensor:
        """Indices [N] of the logits that predict the response tokens here."""
        runs = [
            torch.arange(row, row + end - start)
            for slices, rows in zip(self.own, self.rows, strict=True)
            for (start, end), row in zip(slices, rows, strict=True)
        ]
        return torch.cat([torch.arange(0), *runs]).to(device, non_blocking=True)

    def labels(self, tokens: Sequence[Tensor]) -> Tensor:
        """The response tokens here, [N], of whole sequences (prompt and response)."""
        return self.local([x[x.shape[0] - n :] for x, n in zip(tokens, self.lengths, strict=True)])

    def local(self, whole: Sequence[Tensor]) -> Tensor:
        """What is here of one tensor [response length] per sample, concatenated."""
        return torch.cat(
            [x[start:end] for x, slices in zip(whole, self.own, strict=True) for start, end in slices]
            or [whole[0][:0] if len(whole) else torch.empty(0)]
        )

    def split(self, packed: Tensor) -> list[Tensor]:
        """[N] of the tokens here, per sample."""
        return list(torch.split(packed, self.counts))

    def whole(self, local: Sequence[Tensor]) -> Tensor:
        """The whole responses, concatenated, of each sample's tokens here: every rank adds what it holds."""
        held = joined(local)
        if self.group is None:
            return held
        out, at, taken = held.new_zeros(sum(self.lengths)), 0, 0
        for length, slices in zip(self.lengths, self.own, strict=True):
            for start, end in slices:
                out[at + start : at + end] = held[taken : taken + end - start]
                taken += end - start
            at += length
        dist.all_reduce(out, group=self.group)
        return out

    def own_part(self, whole: Tensor) -> Tensor:
        """[N] of the tokens here, of whole responses that are concatenated."""
        return self.local(torch.split(whole, self.lengths)) if self.is_cut else whole


def joined(parts: Sequence[Tensor], device: torch.device | None = None) -> Tensor:
    """One behind the other; nothing, on the device, of a batch without samples."""
    return torch.cat(tuple(parts)) if len(parts) else torch.empty(0, device=device)


def _width(total: int, ranks: Parallel) -> int:
    return -(-total // (2 * ranks.contexts))


def _chunks(total: int, ranks: Parallel, base: int) -> list[tuple[int, int, int]]:
    """(first and last position of a chunk in its sequence, this rank's logit of the first)."""
    if ranks.contexts == 1:
        return [(0, total, base)]
    width = _width(total, ranks)
    numbers = (ranks.context, 2 * ranks.contexts - ranks.context - 1)
    return [(n * width, (n + 1) * width, base + k * width) for k, n in enumerate(numbers)]


def _bounds(lengths: list[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(device, non_blocking=True)
