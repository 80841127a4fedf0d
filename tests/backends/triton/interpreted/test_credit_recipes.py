"""Recipes of rewards and credit on the Triton kernels in the interpreter, beside plain loops: one case of each.

Options of a recipe change the arithmetic around its operations, which the CPU's tests go through.
"""

from __future__ import annotations

import pytest
import torch
from credit_cases import CASES
from credit_cases.case import Case
from fastreward.kernels import returns, segments

import fastreward as fr

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def _short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interpreted scan goes through its block in Python; a row here has six tokens."""
    for kernels, name, value in (
        (returns, "BLOCK", 8),
        (returns, "LANES", 8),
        (segments, "BLOCK", 16),
        (segments, "SEGMENT", 8),
    ):
        monkeypatch.setattr(kernels, name, value)


ONE_OF_EACH = {case.recipe.__name__: case for case in reversed(CASES.values())}


@pytest.mark.parametrize("case", ONE_OF_EACH.values(), ids=ONE_OF_EACH.keys())
def test_is_the_loops(case: Case) -> None:
    arguments = case.arguments(5)
    with fr.backend("triton"):
        got = case(arguments)
    tolerance = max(case.tolerance, 2e-6)
    torch.testing.assert_close(got.double(), case.expected(arguments), rtol=tolerance, atol=tolerance, equal_nan=True)
