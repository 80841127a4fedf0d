"""The public functions on the Triton backend under its interpreter: dispatch, custom ops, autograd and kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import public_checks
import pytest
import torch

import fastreward as fr

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def _backend() -> Iterator[None]:
    with fr.backend("triton"):
        yield


@pytest.mark.parametrize("inplace", [False, True])
def test_token_logprobs(inplace: bool) -> None:
    public_checks.check_token_logprobs("cpu", inplace=inplace)


@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "logit_scale": 0.7, "bias": True}], ids=["plain", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear(dtype: torch.dtype, options: dict[str, Any]) -> None:
    public_checks.check_linear("cpu", dtype, **options)


@pytest.mark.parametrize("packed", [False, True])
def test_policy_loss(packed: bool) -> None:
    public_checks.check_policy_loss("cpu", packed)


def test_group_and_whiten() -> None:
    public_checks.check_group("cpu")
    public_checks.check_whiten("cpu")


def test_messages() -> None:
    public_checks.check_messages("cpu")
