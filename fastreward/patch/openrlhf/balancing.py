"""openrlhf.utils.seqlen_balancing: sequences to micro-batches by largest differencing, with the very parts it gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch

from fastreward.balance import differenced
from fastreward.patch.openrlhf.serving import Serving, need

#: Sums of whole numbers below this are exact in float64 too, in which OpenRLHF's replay buffer has its lengths.
_EXACT: Final = 2**53


def karmarkar_karp(
    serving: Serving, seqlen_list: Sequence[Any], k_partitions: int, equal_size: bool
) -> list[list[int]]:
    """karmarkar_karp: the indices of each part, the largest first, in the order of the merges."""
    lengths = list(seqlen_list)
    need(type(k_partitions) is int and 1 <= k_partitions <= len(lengths))
    need(all(type(x) is int or (type(x) is float and x.is_integer()) for x in lengths))
    need(min(lengths) >= 0 and sum(lengths) < _EXACT and not (equal_size and len(lengths) % k_partitions))
    return differenced(torch.tensor([int(x) for x in lengths]), k_partitions, bool(equal_size))


def no_tokens(*_: Any, **__: Any) -> int:
    """Lengths are dealt out here, and no token is looked at."""
    return 0
