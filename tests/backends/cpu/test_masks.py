"""Whether a mask is of zeros and ones, as truth values, and how many of each row count: one read of any dtype."""

from __future__ import annotations

import pytest
import torch

from fastreward._runtime.masks import zeros_and_ones

DTYPES = (torch.bool, torch.uint8, torch.int32, torch.int64, torch.float32, torch.int16, torch.float64)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (3, 7), (37, 4113)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_flags_and_counts(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    there = torch.rand(shape) < 0.6
    mask = there.to(dtype)
    flags, counts = torch.empty(shape, dtype=torch.bool), torch.empty(shape[0])
    assert zeros_and_ones(mask, flags=flags, counts=counts)
    assert torch.equal(flags, there)
    assert torch.equal(counts, there.sum(-1).float())
    assert zeros_and_ones(mask)
    assert zeros_and_ones(mask.t().contiguous().t())


@pytest.mark.parametrize("place", [0, 4112, -1])
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.bool])
def test_one_other_number(place: int, dtype: torch.dtype) -> None:
    others = {-1, 2, 256, 257, 65536, 1 << 32, (1 << 32) + 1} if not dtype.is_floating_point else {0.5, torch.nan, 2.0}
    for other in others:
        mask = torch.ones((5, 4113), dtype=dtype)
        try:
            mask.view(-1)[place] = other
        except RuntimeError:  # more than the dtype holds
            continue
        if mask.view(-1)[place] not in (0, 1):
            assert not zeros_and_ones(mask)
