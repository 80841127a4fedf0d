"""Gradient defects of liger-kernel 0.8.5 (github.com/linkedin/Liger-Kernel), as cases that fastreward passes.

Each case is compared with float64 autograd of the loss written out, values and gradients; where liger's defect is in
its reduction, the same reduction is an aggregation here.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastreward as fr
from fastreward import losses


def ragged(rows: int = 5, width: int = 9) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs, old log-probs [B, T], advantages [B], a ragged mask [B, T]."""
    old = -torch.rand(rows, width) * 2
    mask = torch.arange(width) < torch.tensor([9, 6, 3, 1, 7]).unsqueeze(-1)
    return old + 0.2 * torch.randn(rows, width), old, torch.randn(rows), mask


def clipped(ratio: Tensor, advantages: Tensor, low: float = 0.2, high: float = 0.2) -> Tensor:
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high))


def compare(result: fr.PolicyLoss, leaf: Tensor, expected: Tensor, exact: Tensor) -> None:
    (actual,) = torch.autograd.grad(result.loss, leaf)
    (grad,) = torch.autograd.grad(expected, exact)
    torch.testing.assert_close(result.loss.detach().double(), expected.detach(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(actual.double(), grad, rtol=1e-5, atol=1e-7)


def test_luspo_by_token() -> None:
    """LUSPO multiplies a sequence's mean by its length. Liger reads its gradient out of bounds here."""
    logprobs, old, advantages, mask = ragged()
    exact, leaf = logprobs.double().requires_grad_(), logprobs.requires_grad_()
    token = clipped((exact - old).exp(), advantages.unsqueeze(-1)) * mask
    expected = (token.sum(-1) / mask.sum(-1) * mask.sum(-1)).mean()
    compare(fr.policy_loss(leaf, old, advantages, mask, aggregation="seq-mean-token-sum"), leaf, expected, exact)


def test_luspo_by_sequence() -> None:
    """Liger's gradient is too small here by exactly the sequence's length."""
    logprobs, old, advantages, mask = ragged()
    exact, leaf = logprobs.double().requires_grad_(), logprobs.requires_grad_()
    ratio = (((exact - old) * mask).sum(-1) / mask.sum(-1)).exp()
    expected = (clipped(ratio, advantages) * mask.sum(-1)).mean()
    loss = losses.gspo(clip_low=0.2, clip_high=0.2)
    compare(
        fr.policy_loss(leaf, old, advantages, mask, loss=loss, aggregation="seq-mean-token-sum"), leaf, expected, exact
    )


def test_unreduced_sequence_loss_then_mean() -> None:
    """reduce=False and .mean(), a ragged mask: Liger's gradient is off by 81 %, the mask never reaches it."""
    logprobs, old, advantages, mask = ragged()
    exact, leaf = logprobs.double().requires_grad_(), logprobs.requires_grad_()
    ratio = (((exact - old) * mask).sum(-1) / mask.sum(-1)).exp()
    per_token = clipped(ratio, advantages).unsqueeze(-1) * mask
    loss = losses.gspo(clip_low=0.2, clip_high=0.2)
    result = fr.policy_loss(
        leaf, old, advantages, mask, loss=loss, aggregation="token-sum", normalizer=mask.numel(), return_token_loss=True
    )
    compare(result, leaf, per_token.mean(), exact)
    torch.testing.assert_close(result.token_loss.double(), per_token.detach(), rtol=1e-5, atol=1e-6)


def test_first_vocabulary_block_of_minus_infinity() -> None:
    """A kept set or a padded vocabulary: Liger's log-prob is NaN."""
    logits = torch.randn(3, 40_000)
    logits[:, :33_000] = -torch.inf
    labels = torch.tensor([33_001, 39_999, 35_000])
    expected = torch.log_softmax(logits.double(), -1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    stats = fr.token_logprobs(logits, labels)
    torch.testing.assert_close(stats.logprobs.double(), expected, rtol=1e-6, atol=1e-6)
    leaf, exact = logits.clone().unsqueeze(0).requires_grad_(), logits.double().unsqueeze(0).requires_grad_()
    old, advantages = expected.float().unsqueeze(0) - 0.1, torch.tensor([[1.0, -1.0, 0.5]])
    result = fr.logits_policy_loss(leaf, labels.unsqueeze(0), old, advantages)
    logprobs = torch.log_softmax(exact, -1).gather(-1, labels.view(1, 3, 1)).squeeze(-1)
    compare(result, leaf, clipped((logprobs - old).exp(), advantages).mean(), exact)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_log_ratio_of_200(sign: float) -> None:
    """A < 0 and a log-ratio of +200: Liger's loss is inf and its gradient not finite. Clamped at 20 both are."""
    logprobs, old = torch.tensor([[0.0, -1.0]]), torch.tensor([[-200.0, -1.1]])
    leaf = logprobs.requires_grad_()
    result = fr.policy_loss(leaf, old, torch.tensor([sign]), loss=losses.ppo())
    (grad,) = torch.autograd.grad(result.loss, leaf)
    assert torch.isfinite(result.loss)
    assert torch.isfinite(grad).all()
    assert grad[0, 0] == 0.0  # outside the clamp, or cut by the clip
    assert grad[0, 1] != 0.0
