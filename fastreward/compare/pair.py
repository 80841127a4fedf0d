"""Which token of one side belongs to which of the other, whatever the layout of each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastreward.compare.load import Side


@dataclass(frozen=True)
class Pairs:
    """N pairs of tokens, sequence by sequence."""

    a: Tensor  # i64 [N], places of A
    b: Tensor  # i64 [N], places of B
    sequence: Tensor  # i64 [N], rising
    sequences: int

    def __len__(self) -> int:
        return len(self.a)

    @property
    def cu_seqlens(self) -> Tensor:
        """Bounds of the sequences, i64 [B + 1]."""
        return torch.searchsorted(self.sequence, torch.arange(self.sequences + 1))

    @property
    def position(self) -> Tensor:
        """Which token of its sequence, i64 [N]."""
        return torch.arange(len(self)) - self.cu_seqlens[self.sequence]

    def shifted(self, by: int) -> Pairs:
        """Token j + by of A with token j of B."""
        count = len(self) - abs(by)
        if count <= 0:
            return self.where(torch.zeros(len(self), dtype=torch.bool))
        late, early = slice(abs(by), None), slice(0, count)
        of_a, of_b = (late, early) if by > 0 else (early, late)
        inside = self.sequence[late] == self.sequence[early]
        return Pairs(self.a[of_a][inside], self.b[of_b][inside], self.sequence[early][inside], self.sequences)

    def where(self, chosen: Tensor) -> Pairs:
        """Some of them."""
        return Pairs(self.a[chosen], self.b[chosen], self.sequence[chosen], self.sequences)


def pair(a: Side, b: Side) -> tuple[Pairs, tuple[str, ...]]:
    """The k-th token that counts in a sequence of A with the k-th of B, and what has to be said of it.

    A side that does not say which of its tokens count has them where the other has them, if their shapes agree.

    Raises:
        ValueError: another number of sequences.
    """
    count = len(a.bounds) - 1
    if len(b.bounds) - 1 != count:
        raise ValueError(f"B: expected {count} sequences, as A has, got {len(b.bounds) - 1}")
    alike = a.lead == b.lead and torch.equal(a.bounds, b.bounds)
    valid = [_valid(a, b if alike else None), _valid(b, a if alike else None)]
    notes: list[str] = []
    places = [x.nonzero().squeeze(-1) for x in valid]
    owners = [_owner(side, x) for side, x in zip((a, b), places, strict=True)]
    counts = [torch.bincount(owner, minlength=count) for owner in owners]
    differing = (counts[0] != counts[1]).nonzero().squeeze(-1)
    if len(differing) and alike:
        both = valid[0] & valid[1]
        notes.append(
            f"the masks of A and B differ in {len(differing)} sequences: {int(both.sum())} tokens that count in both "
            "are compared"
        )
        places, owners = [both.nonzero().squeeze(-1)] * 2, [_owner(a, both.nonzero().squeeze(-1))] * 2
    elif len(differing):
        first = int(differing[0])
        notes.append(
            f"{len(differing)} sequences have not as many tokens in A as in B (sequence {first}: "
            f"{int(counts[0][first])} and {int(counts[1][first])}): the first of both are compared"
        )
        least = torch.minimum(*counts)
        for side in (0, 1):
            inside = _rank(owners[side], counts[side]) < least[owners[side]]
            places[side], owners[side] = places[side][inside], owners[side][inside]
    return Pairs(places[0], places[1], owners[0], count), tuple(notes)


def _valid(side: Side, other: Side | None) -> Tensor:
    """bool [places]: the side's own, the other's where it has none, else all."""
    if side.valid is not None:
        return side.valid
    if other is not None and other.valid is not None:
        return other.valid
    return torch.ones(side.places, dtype=torch.bool)


def _owner(side: Side, places: Tensor) -> Tensor:
    """The sequence of each place."""
    return torch.searchsorted(side.bounds, places, right=True) - 1


def _rank(owner: Tensor, counts: Tensor) -> Tensor:
    return torch.arange(len(owner)) - (counts.cumsum(0) - counts)[owner]


def flipped(side: Side, places: Tensor, sequence: Tensor) -> Tensor | None:
    """The places with every sequence at the other end of its row; None where that changes nothing or can't be.

    A sequence that touches neither end of its row, or has a hole, stays where it is.
    """
    if len(side.lead) == 1 or not len(places):
        return None
    width, count = side.lead[1], side.lead[0]
    column = places - sequence * width
    lengths = torch.bincount(sequence, minlength=count)
    first = torch.full((count,), width).scatter_reduce(0, sequence, column, "amin")
    last = torch.full((count,), -1).scatter_reduce(0, sequence, column, "amax")
    solid = last - first + 1 == lengths
    by = torch.where(first == 0, width - lengths, torch.where(last == width - 1, -first, 0))
    by = torch.where(solid, by, 0)
    return None if not bool(by.any()) else places + by[sequence]
