"""Recipes of rewards and credit on the Triton kernels in the interpreter, beside plain loops."""

from __future__ import annotations

import pytest
import torch
from credit_cases import CASES
from credit_cases.case import Case

import fastreward as fr
from fastreward._runtime.errors import BackendError

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_is_the_loops(case: Case) -> None:
    arguments = case.arguments(5)
    try:
        with fr.backend("triton"):
            got = case(arguments)
    except BackendError as reason:
        if "no GPU kernels of it yet" not in str(reason):
            raise
        pytest.skip(str(reason))
    tolerance = max(case.tolerance, 2e-6)
    torch.testing.assert_close(got.double(), case.expected(arguments), rtol=tolerance, atol=tolerance, equal_nan=True)
