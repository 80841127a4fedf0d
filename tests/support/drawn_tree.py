"""The prefix tree that is drawn by hand, and trees of rows of tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastreward import PrefixTree


def padded(rows: list[list[int]], columns: int | None = None, filler: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens [B, T] and lengths [B]."""
    width = max(map(len, rows), default=0) if columns is None else columns
    tokens = [row + [filler] * (width - len(row)) for row in rows]
    return torch.tensor(tokens).reshape(len(rows), width), torch.tensor([len(row) for row in rows], dtype=torch.int64)


def tree_of(rows: list[list[int]], **options: Any) -> PrefixTree:
    tokens, lengths = padded(rows)
    return PrefixTree(tokens, lengths=lengths, **options)


#: Duplicates (0 and 4), a prefix of others (2), an empty sequence (5):
#:
#:   0 -- 1 [1 2] -- 2 [3 4]   rows 0, 4
#:    \     row 2 \- 3 [5]     row 1
#:     4 [7 8] row 3           (row 5 ends at the root)
DRAWN = [[1, 2, 3, 4], [1, 2, 5], [1, 2], [7, 8], [1, 2, 3, 4], []]
LEAF_VALUES = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
NODE_VALUES = torch.tensor([3.5, 2.75, 3.0, 2.0, 4.0])
