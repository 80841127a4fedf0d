"""The CPU's raw log-prob kernels on the adversarial inputs that the GPU's get too."""

from __future__ import annotations

import pytest
import raw_checks
import torch

from fastreward.cpu import logprobs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", raw_checks.CASES)
def test_values_and_gradients(kind: str, dtype: torch.dtype) -> None:
    """Four blocks of columns; of `empty_block` one or two hold nothing but -inf."""
    case = raw_checks.logits_case(kind, dtype, 4, 12_301)
    raw_checks.check_logprobs_forward(logprobs, "cpu", case)
    raw_checks.check_logprobs_backward(logprobs, "cpu", case)
    raw_checks.check_logprobs_backward(logprobs, "cpu", case, in_place=True)


@pytest.mark.parametrize("kind", ["plain", "infinities", "empty_block"])
def test_slices_of_the_vocabulary(kind: str) -> None:
    case = raw_checks.logits_case(kind, torch.float32, 4, 12_301)
    raw_checks.check_accumulate(logprobs, "cpu", case, 4096, known_labels=True)
