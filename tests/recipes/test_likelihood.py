"""Recipes of likelihoods, distributions and distillation: what is refused, and answers that are written out."""

from __future__ import annotations

import math

import pytest
import torch
from credit_cases import confidence, distillation, likelihood
from credit_cases.case import Case
from torch import Tensor

import fastreward as fr
from fastreward import recipes

CASES = {**likelihood.CASES, **confidence.CASES, **distillation.CASES}
every = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def of_tokens(case: Case) -> dict[str, str]:
    """What has a mask -> its mask."""
    arguments = case.arguments(0)
    return {
        name: mask
        for mask in arguments
        for name, x in arguments.items()
        if mask.endswith("mask") and isinstance(x, Tensor) and x.is_floating_point()
        if x.shape == arguments[mask].shape
    }


@every
def test_a_nan_that_counts_is_an_error_by_name_and_index(case: Case) -> None:
    for name, mask in of_tokens(case).items():
        arguments = case.arguments(0)
        index = arguments[mask].nonzero()[1].tolist()
        arguments[name][tuple(index)] = torch.nan
        with pytest.raises(
            ValueError, match=rf"^{name}: expected finite .* got nan at index \[{index[0]}, {index[1]}\]"
        ):
            case(arguments)


@every
def test_masks_of_another_shape_and_variables_are_refused(case: Case) -> None:
    arguments = case.arguments(0)
    for name, mask in of_tokens(case).items():
        with pytest.raises(ValueError, match=rf"^{mask}: expected shape"):
            case(arguments | {mask: arguments[mask][:, 1:]})
        if name != "logprobs":  # of the policy: read as constants
            with pytest.raises(ValueError, match=rf"^{name}: expected a constant"):
                case(arguments | {name: arguments[name].clone().requires_grad_()})


def test_the_two_directions_of_self_certainty() -> None:
    """KL(uniform || p) and KL(p || uniform), of the same logits, from one pass."""
    logits, labels = 3 * torch.randn(2, 5, 11), torch.zeros(2, 5, dtype=torch.int64)
    stats = fr.token_logprobs(logits, labels, outputs=("logsumexp", "mean_logit", "entropy"))
    uniform, p = torch.full((11,), 1 / 11).double(), logits.double().softmax(-1)
    forward = (uniform * (uniform / p).log()).sum(-1).mean(-1)
    backward = (p * (p / uniform).log()).sum(-1).mean(-1)
    near = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(
        recipes.intuitor(stats.logsumexp, stats.mean_logit).double(), forward + math.log(11), **near
    )
    torch.testing.assert_close(recipes.shop_r1(stats.entropy, vocab_size=11, alpha=1.0).double(), backward, **near)


def test_endogenous_rewards_at_a_temperature() -> None:
    """alpha lp + V_t - V_{t+1}, V = alpha logsumexp(z / alpha)."""
    logits, labels, alpha = torch.randn(1, 3, 7), torch.tensor([[2, 0, 6]]), 0.5
    names = ("label_logit", "logsumexp", "logprobs")
    label, upper, lp = fr.token_logprobs(logits, labels, temperature=alpha, outputs=names)
    value = alpha * (logits / alpha).logsumexp(-1)
    want = alpha * lp + value - torch.cat([value[:, 1:], torch.zeros(1, 1)], 1)
    torch.testing.assert_close(recipes.endogenous(label, upper, alpha=alpha), want)
    raw = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(alpha * label, raw)


def test_sdar_has_the_gradient_of_its_loss() -> None:
    """-A lp under REINFORCE, of sg(sigmoid(beta gap)) (t - lp)."""
    lp = (-torch.rand(2, 4)).requires_grad_()
    teacher = -torch.rand(2, 4)
    (want,) = torch.autograd.grad(((5.0 * (teacher - lp)).sigmoid().detach() * (teacher - lp)).mean(), lp)
    advantages = recipes.sdar(lp, teacher)
    loss = fr.policy_loss(lp, lp.detach(), advantages, loss=fr.losses.reinforce(), aggregation="token-mean").loss
    torch.testing.assert_close(torch.autograd.grad(loss, lp)[0], want)


def test_jepo_s_advantages_are_those_of_its_loss() -> None:
    """The gradient of recipes.jepo on the reasoning's tokens, which are one each here."""
    ids, answer = ["a", "a", "b", "a", "c"], torch.tensor([[0, 1, 1]]).expand(5, 3)
    lp = (-9 * torch.rand(5, 3)).requires_grad_()
    advantages = recipes.jepo_advantages(lp.detach(), answer, group_ids=ids)
    loss = recipes.jepo(lp, lp.detach(), answer, group_ids=ids, sft_coef=0.0).loss
    (gradient,) = torch.autograd.grad(loss, lp)
    torch.testing.assert_close(gradient[:, 0] / gradient[0, 0], advantages / advantages[0], rtol=1e-5, atol=1e-5)


def test_the_majority_is_the_first_of_several() -> None:
    answers = [3, 5, 5, 3, -1, 7, -1, -1]
    assert recipes.majority_vote(answers, group_size=4).tolist() == [1, 0, 0, 1, 0, 1, 0, 0]
    assert recipes.majority_vote(torch.tensor(answers), ["g"] * 8).tolist() == [1, 0, 0, 1, 0, 0, 0, 0]
    with pytest.raises(ValueError, match="expected exactly one"):
        recipes.majority_vote(answers)


def test_value_augmented_sampling_leaves_other_tokens_alone() -> None:
    logits = torch.tensor([[0.0, -math.inf, 2.0, 1.0]])
    steered = recipes.value_augmented(logits, torch.tensor([[0.25, 0.75]]), token_ids=torch.tensor([[3, 2]]), beta=2.0)
    assert steered.tolist() == [[0.0, -math.inf, 2.5, 0.5]]
    with pytest.raises(ValueError, match=r"^token_ids: expected ids in \[0, 4\), got 4 at index \[0, 1\]"):
        recipes.value_augmented(logits, torch.zeros(1, 2), token_ids=torch.tensor([[0, 4]]))
