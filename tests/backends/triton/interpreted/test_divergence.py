"""kernels/divergence under Triton's interpreter, against the float64 reference."""

from __future__ import annotations

import divergence_checks as checks
import pytest
import raw_checks
import torch
from fastreward.kernels import divergence

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of what lies under the mask


@pytest.fixture(autouse=True)
def _truncation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter truncates f32 to bf16, where the GPU rounds to nearest: one bit more."""
    monkeypatch.setitem(raw_checks.STEP, torch.bfloat16, 2.0**-7)
    monkeypatch.setattr(checks, "STEP", raw_checks.STEP)


@pytest.mark.parametrize("name", checks.DIVERGENCES)
def test_rows_of_every_kind(name: str) -> None:
    """Every kind for one divergence of moments and one of two reads, some for each of the others."""
    kinds = checks.KINDS if name in ("reverse_kl", "jsd") else checks.FEW_KINDS
    for i, kind in enumerate(kinds):
        k = i + list(checks.DIVERGENCES).index(name)
        dtypes = (checks.DTYPES[k % 3], checks.DTYPES[k // 3 % 3])
        case = checks.make_case(name, kind, dtypes, 3, 9000 if kind == "empty_block" else 1003)
        checks.check_forward(divergence, "cpu", case, statistics=k % 2 == 0, sums=k % 3)
        checks.check_backward(divergence, "cpu", case, in_place=k % 4 == 0)


@pytest.mark.parametrize("name", ["reverse_kl", "jsd"])
def test_sizes_slices_and_bits(name: str) -> None:
    for vocab in (1, 3, 8, 4097):
        case = checks.make_case(name, "plain", (torch.float32, torch.float32), 2, vocab)
        checks.check_forward(divergence, "cpu", case, statistics=True)
        checks.check_backward(divergence, "cpu", case)
    checks.check_slices(divergence, "cpu", checks.make_case(name, "masked", (torch.bfloat16,) * 2, 4, 5000), 1700)
    checks.check_bits(divergence, "cpu", checks.make_case(name, "infinities", (torch.float32,) * 2, 4, 5000))
