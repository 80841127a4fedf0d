"""value_loss and the trainers' own: verl's compute_value_loss, OpenRLHF's ValueLoss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from openrlhf_models import models
from torch import Tensor

import fastreward as fr

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

B, T = 5, 61


def inputs(seed: int = 0) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    old = torch.randn(B, T, generator=g)
    return {
        "values": old + 0.4 * torch.randn(B, T, generator=g),
        "old_values": old,
        "returns": old + 3 + torch.randn(B, T, generator=g),
        "mask": torch.arange(T) < torch.tensor([61, 1, 0, 30, 17]).unsqueeze(-1),
    }


def run(given: dict[str, Any], **options: Any) -> tuple[fr.PolicyLoss, Tensor]:
    leaf = given["values"].clone().requires_grad_()
    result = fr.value_loss(**(given | {"values": leaf}), **options)
    return result, torch.autograd.grad(result.loss, leaf)[0]


@pytest.mark.parametrize("clip", [0.5, 0.1])
def test_verl(clip: float) -> None:
    algos = pytest.importorskip("verl.trainer.ppo.core_algos")
    given = inputs()
    for aggregation in ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean"):
        leaf = given["values"].clone().requires_grad_()
        arguments = (leaf, given["returns"], given["old_values"], given["mask"], clip)
        want, fraction = algos.compute_value_loss(*arguments, loss_agg_mode=aggregation)
        result, grad = run(given, clip=clip, aggregation=aggregation)
        torch.testing.assert_close(result.loss, want, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(grad, torch.autograd.grad(want, leaf)[0], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(result.metrics["clip_fraction"], fraction)


@pytest.fixture(scope="module")
def openrlhf() -> Iterator[Any]:
    with models() as found:
        yield found.loss


@pytest.mark.parametrize("clip", [0.5, None])
@pytest.mark.parametrize("token_level", [True, False])
def test_openrlhf(clip: float | None, token_level: bool, openrlhf: Any) -> None:
    given = inputs()
    leaf = given["values"].clone().requires_grad_()
    theirs = openrlhf.ValueLoss(clip, token_level_loss=token_level)
    want = theirs(leaf, given["old_values"], given["returns"], given["mask"].float())
    result, grad = run(given, clip=clip, aggregation="token-mean" if token_level else "seq-mean-token-mean")
    torch.testing.assert_close(result.loss, want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad, torch.autograd.grad(want, leaf)[0], rtol=1e-5, atol=1e-7)
