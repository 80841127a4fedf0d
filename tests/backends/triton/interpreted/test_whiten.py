"""kernels/whiten.py under Triton's interpreter, against float64 torch written out here."""

from __future__ import annotations

import pytest
import raw_checks
import torch
from fastreward.kernels import whiten as kernels
from torch import Tensor

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def case(shape: tuple[int, ...], kind: torch.dtype | None) -> tuple[Tensor, Tensor | None, Tensor]:
    """(x, mask, counted): NaN where not counted."""
    g = torch.Generator().manual_seed(len(shape))
    x = torch.randn(shape, generator=g) * 0.3 + 100
    if kind is None:
        return x, None, torch.ones(shape, dtype=torch.bool)
    counted = torch.rand(shape, generator=g) < 0.6
    return torch.where(counted, x, torch.nan), counted.to(kind), counted


@pytest.mark.parametrize(
    ("shape", "kind", "shift_mean"),
    [
        ((9,), torch.int64, True),
        ((4, 3000), None, True),
        ((4, 3000), torch.bool, False),
        ((3, 4001), torch.float32, True),
    ],
    ids=str,
)
def test_against_float64(
    shape: tuple[int, ...], kind: torch.dtype | None, shift_mean: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "PROGRAMS", 2)  # more tiles than programs
    x, mask, counted = case(shape, kind)
    out = torch.full_like(x, 7.0)
    kernels.forward(x, mask, shift_mean, 1, 1e-8, out)
    values = x.double()[counted]
    white = (x.double() - values.mean()) / (values.var() + 1e-8).sqrt()
    want = torch.where(counted, white if shift_mean else white + values.mean(), 0.0)
    torch.testing.assert_close(out.double(), want, rtol=1e-6, atol=1e-6)
    again = torch.empty_like(x)
    kernels.forward(x, mask, shift_mean, 1, 1e-8, again)
    assert torch.equal(out, again)
    kernels.forward(x, mask, shift_mean, 1, 1e-8, x)
    assert torch.equal(out, x)


def test_statistics_and_apply() -> None:
    x, mask, counted = case((5, 4000), torch.bool)
    values = x.double()[counted]
    count, mean, squares = kernels.statistics(x, mask)
    assert count == counted.sum()
    torch.testing.assert_close(mean, values.mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(squares, ((values - values.mean()) ** 2).sum(), rtol=1e-12, atol=0)
    out = torch.empty_like(x)
    kernels.apply(x, mask, torch.tensor([99.0, 2.0, 5.0], dtype=torch.float64), out)
    torch.testing.assert_close(out, torch.where(counted, (x - 99) * 2 + 5, 0.0), rtol=1e-6, atol=1e-6)


def test_nothing_counted_and_a_far_outlier() -> None:
    x = torch.randn(40)
    out = torch.empty_like(x)
    kernels.forward(x, torch.zeros(40), True, 1, 1e-8, out)
    assert not out.any()
    assert kernels.statistics(x, torch.zeros(40)).tolist() == [0, 0, 0]
    assert kernels.statistics(x[:0], None).tolist() == [0, 0, 0]
    kernels.forward(x[:0], None, True, 1, 1e-8, out[:0])
    x[0] = 1e8
    values = x.double()
    got = kernels.statistics(x, None)
    torch.testing.assert_close(got[2], ((values - values.mean()) ** 2).sum(), rtol=1e-9, atol=0)


def test_corners() -> None:
    raw_checks.check_whiten_corners(kernels, "cpu")
