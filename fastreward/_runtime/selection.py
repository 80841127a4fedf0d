"""`threshold` on a GPU: torch's sort and sums, no value read by the host."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from fastreward._arguments.tokens import Tokens

_ROW: Final = 1024  # of a prefix sum: scans within rows of a matrix have a fixed order, those of one long row have not


def threshold(x: Tensor, bound: float | Tensor, tokens: Tokens, share: bool) -> Tensor:
    """The largest of the valid x up to which their mean is below the bound, the smallest where none is; f32 [].

    share: the smallest of the floor(bound * count) largest, at least of one. NaN are left out; inf of none.
    """
    counted = ~x.isnan() if tokens.mask is None else ~x.isnan() & (tokens.mask != 0)
    padded = torch.where(counted, x + 0.0, torch.inf).flatten()
    padded = torch.nn.functional.pad(padded, (0, _ROW - len(padded) % _ROW), value=torch.inf)
    ordered = padded.sort().values
    count = counted.sum()
    if share:
        largest = (count.double() * bound).floor().clamp(min=1).clamp(max=count).long()
        return ordered.gather(0, (count - largest).clamp(min=0).reshape(1)).reshape(())
    place = torch.arange(1, len(ordered) + 1, device=x.device)
    inside = place <= count
    means = _sums(torch.where(inside, ordered, 0.0).double()) / place
    ends = torch.cat([ordered[1:] != ordered[:-1], ordered[:1] == ordered[:1]])  # of a run of equal ones
    ends |= place == count
    last = torch.where(inside & ends & (means < bound), place, 1).amax()
    return ordered.gather(0, last.reshape(1) - 1).reshape(())


def _sums(x: Tensor) -> Tensor:
    """Prefix sums of [n * _ROW] f64."""
    rows = x.reshape(-1, _ROW).cumsum(1)
    totals = rows[:, -1]
    if len(totals) <= _ROW:
        totals = torch.nn.functional.pad(totals, (0, _ROW - len(totals))).expand(2, _ROW).cumsum(1)[0][: len(rows)]
    else:
        totals = _sums(torch.nn.functional.pad(totals, (0, -len(totals) % _ROW)))[: len(rows)]
    before = torch.cat([totals.new_zeros(1), totals[:-1]])
    return (rows + before.unsqueeze(1)).flatten()
