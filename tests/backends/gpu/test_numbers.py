"""Numbers that lie on a GPU: kernels read them there, nothing waits, and they count as floats do. `pytest -m gpu`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from operation_rows import ROWS, Row, as_tensors, evaluated, name_of
from torch import Tensor

import fastreward as fr
import fastreward.cuda

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


def on_gpu(x: Any) -> Any:
    """A copy of the arguments there, leaves as leaves."""
    if isinstance(x, dict):
        return {k: on_gpu(v) for k, v in x.items()}
    return x.detach().cuda().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("row", [row for row in ROWS if row.numbers], ids=name_of)
def test_numbers_on_the_device(row: Row, backend: Any) -> None:
    reason = fastreward.cuda.missing() if backend == "cuda" else None
    if reason is not None:
        pytest.skip(f"cuda: {reason}")
    arguments = row.make(4, 5)
    if row.operation.startswith("linear"):
        arguments.pop("mask", None)  # counting its tokens is a synchronisation, as documented
    with fr.backend(backend):
        expected = evaluated(row, on_gpu(arguments))
        evaluated(row, on_gpu(as_tensors(arguments)))  # compiles
        given = on_gpu(as_tensors(arguments))
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = evaluated(row, given)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6, equal_nan=True)
