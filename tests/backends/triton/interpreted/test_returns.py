"""kernels/returns.py under Triton's interpreter, against the float64 reference."""

from __future__ import annotations

import pytest
import returns_checks
from fastreward.kernels import returns as kernels

from fastreward._arguments.options import ReturnsOptions

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def _short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a few tokens take several blocks."""
    monkeypatch.setattr(kernels, "BLOCK", 16)
    monkeypatch.setattr(kernels, "LANES", 4)
    monkeypatch.setattr(kernels, "UNROLL", 2)


@pytest.mark.parametrize("form", range(6))
def test_numbers(form: int) -> None:
    for k, chosen in enumerate(returns_checks.options()):
        if (k + form) % 6 == 0:
            returns_checks.check_numbers(kernels, "cpu", (3, 21), chosen, packed=k % 4 < 2, form=form)


@pytest.mark.parametrize("chosen", [ReturnsOptions("gae", move=True), ReturnsOptions("vtrace", "zero")], ids=str)
def test_bits(chosen: ReturnsOptions) -> None:
    returns_checks.check_bits(kernels, "cpu", (3, 37), chosen)


@pytest.mark.parametrize(("chosen", "packed", "form"), returns_checks.BLOCKS, ids=str)
def test_blocks(chosen: ReturnsOptions, packed: bool, form: int) -> None:
    returns_checks.check_blocks(kernels, "cpu", 61, chosen, packed, form)


def test_products_beyond_float32() -> None:
    returns_checks.check_products_beyond_float32(kernels, "cpu")
