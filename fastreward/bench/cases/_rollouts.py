"""Batches of rollouts that share prefixes, with the tree that must be found in them."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

_VOCAB = 150_000

Edges = Counter[tuple[int, int, int]]  # (tokens before it, tokens, sequences) of every node but the roots


@dataclass(frozen=True)
class Rollouts:
    """A case's rollouts, and the tree that it must find."""

    tokens: Tensor  # [B, T] i64
    mask: Tensor  # [B, T] bool: one turn of four, each of 32 tokens, is a tool's
    group_ids: Tensor  # [B]
    rewards: Tensor  # [B]
    edges: Edges

    @property
    def unique(self) -> int:
        """Unique tokens."""
        return sum(length * times for (_, length, _), times in self.edges.items())


def rollouts(rows: int, length: int, group: int, share: float, device: str) -> Rollouts:
    """Groups of `group` rows that split in two `log2(group)` times; `share` of the tokens is saved."""
    group = min(group, rows & -rows)  # where that does not divide the rows, a smaller one that does
    levels = int(math.log2(group))
    # With splits evenly over the first `reach` of a row, the saved share is reach * (1 - (G - 1) / (levels * G)).
    reach = min(1.0, share / (1 - (group - 1) / (levels * group))) if levels else 0.0
    cuts = [round(length * reach * k / max(levels, 1)) for k in range(levels + 1)] + [length]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(group, _VOCAB, (rows, length), generator=generator)
    place = torch.arange(rows) % group
    edges: Edges = Counter()
    for level, (begin, end) in enumerate(pairwise(cuts)):
        size = group >> level  # rows that still go together
        leader = torch.arange(rows) - place % size
        tokens[:, begin:end] = tokens[leader, begin:end]
        if end > begin:
            tokens[:, begin] = place // size  # siblings differ at once, and never by chance alone
            counts = Counter(leader.tolist())
            edges.update((begin, end - begin, count) for count in counts.values())
    turn = torch.arange(length) // 32
    group_ids = torch.arange(rows) // group
    tokens[:, 0] = group + group_ids  # areal knows no groups: they must not share a first token
    return Rollouts(
        tokens.to(device),
        (turn % 4 != 1).expand(rows, length).contiguous().to(device),
        group_ids.to(device),
        torch.rand(rows, generator=generator).to(device),
        edges,
    )
