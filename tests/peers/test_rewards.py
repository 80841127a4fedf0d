"""token_rewards and the trainers' own: verl's kl_penalty and apply_kl_penalty, OpenRLHF's compute_reward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from openrlhf_models import models

import fastreward as fr

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

B, T = 5, 11
KL_COEF = 0.05


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    logprobs = -torch.rand(B, T, generator=g) * 3
    return {
        "scores": torch.randn(B, generator=g) * 4,
        "mask": torch.arange(T) < torch.tensor([11, 1, 7, 4, 10]).unsqueeze(-1),
        "logprobs": logprobs,
        "ref_logprobs": logprobs + 6 * torch.randn(B, T, generator=g),  # beyond the clamp of +-10 here and there
    }


@pytest.mark.parametrize(
    ("kl", "clamps"),
    [
        ("k1", {"kl_clamp": None}),
        ("abs", {"kl_clamp": None}),
        ("k2", {"kl_clamp": None}),
        ("k3", {"kl_value_clamp": 10.0}),
    ],
)
def test_verl(kl: Any, clamps: dict[str, Any], batch: dict[str, torch.Tensor]) -> None:
    algos = pytest.importorskip("verl.trainer.ppo.core_algos")
    mask = batch["mask"]
    placed = torch.zeros(B, T)
    placed[torch.arange(B), mask.sum(-1) - 1] = batch["scores"]
    want = placed - KL_COEF * algos.kl_penalty(batch["logprobs"], batch["ref_logprobs"], kl_penalty=kl) * mask
    got = fr.token_rewards(**batch, kl=kl, kl_coef=KL_COEF, **clamps)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def openrlhf() -> Iterator[Any]:
    with models() as found:
        yield found.utils


@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_openrlhf(kl: Any, openrlhf: Any, batch: dict[str, torch.Tensor]) -> None:
    """It penalises tokens under the mask too, which nobody reads, and puts a score into a row without a token."""
    estimate = openrlhf.compute_approx_kl(batch["logprobs"], batch["ref_logprobs"], kl_estimator=kl)
    want = openrlhf.compute_reward(batch["scores"], KL_COEF, estimate, batch["mask"], (-2.0, 3.0))
    clamps: dict[str, Any] = {"kl_clamp": None, "kl_value_clamp": 10.0, "clip": (-2.0, 3.0)}
    got = fr.token_rewards(**batch, kl=kl, kl_coef=KL_COEF, **clamps)
    torch.testing.assert_close(got, want * batch["mask"], rtol=1e-6, atol=1e-6)
