"""Recipes of rewards and credit on a real GPU, beside plain loops; nothing waits for it where all is there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from credit_cases import CASES
from credit_cases.case import Arguments, Case
from torch import Tensor

from fastreward import recipes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


def on_gpu(arguments: Arguments) -> Arguments:
    """Tensors there, and group ids as integers."""

    def moved(name: str, x: Any) -> Any:
        if name == "group_ids" and isinstance(x, list):
            x = torch.tensor([sorted(set(x)).index(label) for label in x])
        return x.cuda() if isinstance(x, Tensor) else x

    return {name: moved(name, x) for name, x in arguments.items()}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_is_the_loops(case: Case) -> None:
    arguments = case.arguments(6)
    there = on_gpu(arguments)
    case(there)  # compiles
    torch.cuda.synchronize()
    lists = any(isinstance(x, list | tuple) for x in there.values())
    waits = lists or case.recipe is recipes.effective_ranks  # for eigenvalues
    torch.cuda.set_sync_debug_mode("default" if waits else "error")
    try:
        got = case(there)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    tolerance = max(case.tolerance, 2e-6)
    torch.testing.assert_close(
        got.double().cpu(), case.expected(arguments), rtol=tolerance, atol=tolerance, equal_nan=True
    )
