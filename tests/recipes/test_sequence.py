"""Sequence- and group-level recipes: each is the operation's call that it says it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from reference_losses import policy as reference
from torch import Tensor

from fastreward import PolicyLoss, group_statistics, losses, policy_loss, recipes

GRPO: Any = {"aggregation": "seq-mean-token-mean"}
GROUPS: Any = {"group_ids": ["p", "p", "q", "q", "q"]}


@dataclass(frozen=True)
class Batch:
    """Five responses to two prompts, [5, 7], ragged; answer: the last two counted tokens."""

    lp: Tensor
    old: Tensor
    adv: Tensor
    mask: Tensor
    ref: Tensor
    rewards: Tensor
    answer: Tensor

    @property
    def common(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.lp, self.old, self.adv, self.mask

    @property
    def rewarded(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.lp, self.old, self.rewards, self.mask


def batch(spread: float = 0.05) -> Batch:
    lengths = torch.tensor([[7], [4], [3], [6], [5]])
    place = torch.arange(7)
    lp = -1 - torch.rand(5, 7)
    return Batch(
        lp=lp.requires_grad_(),
        old=lp.detach() + spread * torch.randn(5, 7),
        adv=torch.tensor([1.1, -0.9, 0.7, -0.6, 0.2]),
        mask=place < lengths,
        ref=lp.detach() + 0.3 * torch.randn(5, 7),
        rewards=torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0]),
        answer=(place >= lengths - 2) & (place < lengths),
    )


def optimal_values(rewards: Tensor, beta: float) -> Tensor:
    """beta log mean exp(R / beta) over the prompt's rollouts, as `group_statistics` rounds it."""
    found = group_statistics(rewards / beta, GROUPS["group_ids"], ("logsumexp", "count"))
    return beta * (found["logsumexp"] - found["count"].log())


SAME: dict[str, tuple[Callable[[Batch], PolicyLoss], Callable[[Batch], PolicyLoss]]] = {
    "gspo": (
        lambda d: recipes.gspo(*d.common, clip_high=0.01, log_ratio_max=None),
        lambda d: policy_loss(
            *d.common, loss=losses.gspo(3e-4, 0.01, log_ratio_max=None), aggregation="seq-mean-token-mean"
        ),
    ),
    "gspo_token": (
        lambda d: recipes.gspo_token(*d.common, clip_low=0.02),
        lambda d: policy_loss(*d.common, loss=losses.gspo_token(0.02, 4e-4), aggregation="seq-mean-token-mean"),
    ),
    "luspo": (
        lambda d: recipes.luspo(*d.common, clip_low=0.02, clip_high=0.03),
        lambda d: policy_loss(
            *d.common, loss=losses.gspo(0.02, 0.03, log_ratio_max=None), aggregation="seq-mean-token-sum"
        ),
    ),
    "gmpo": (
        lambda d: recipes.gmpo(*d.common, clip_low=0.03, weights=torch.full((5, 7), 1.5)),
        lambda d: policy_loss(*d.common, loss=losses.gmpo(0.03), weights=torch.full((5, 7), 1.5)),
    ),
    "laser": (
        lambda d: recipes.laser(d.lp, d.old, d.rewards, d.answer, d.mask, beta=0.2, temperature=0.7),
        lambda d: policy_loss(
            d.lp,
            d.old,
            torch.zeros(5),
            d.mask,
            loss=losses.laser(0.2, 0.7),
            extra={"score_token": d.answer, "reward": d.rewards},
        ),
    ),
    "laser against the reference": (
        lambda d: recipes.laser(d.lp, d.old, d.rewards, d.answer, d.mask, constant=None, ref_logprobs=d.ref),
        lambda d: policy_loss(
            d.lp,
            d.old,
            torch.zeros(5),
            d.mask,
            loss=losses.laser(constant=None),
            ref_logprobs=d.ref,
            extra={"score_token": d.answer, "reward": d.rewards},
        ),
    ),
    "verifree": (
        lambda d: recipes.verifree(d.lp, d.old, d.rewards, d.answer, d.mask, **GROUPS),
        lambda d: policy_loss(
            d.lp,
            d.old,
            torch.tensor([1.0, -1.0, -1.0, 0.5, 0.5]),
            d.mask,
            loss=losses.verifree(),
            aggregation="seq-mean-token-sum",
            extra={"answer": d.answer, "reward": d.rewards},
        ),
    ),
    "gvpo": (
        lambda d: recipes.gvpo(*d.common, beta=0.4, **GROUPS),
        lambda d: policy_loss(*d.common, loss=losses.gvpo(0.4), **GROUPS),
    ),
    "flowrl": (
        lambda d: recipes.flowrl(d.lp, d.old, d.adv, d.rewards, d.mask, beta=2.0, weight_low=0.8, ref_logprobs=d.ref),
        lambda d: policy_loss(
            *d.common, loss=losses.flowrl(2.0, 0.8), ref_logprobs=d.ref, extra={"log_z": d.rewards}, **GRPO
        ),
    ),
    "flowrl by keywords": (
        lambda d: recipes.flowrl(d.lp, d.old, d.adv, mask=d.mask, log_z=d.rewards, ref_logprobs=d.ref),
        lambda d: policy_loss(*d.common, loss=losses.flowrl(), ref_logprobs=d.ref, extra={"log_z": d.rewards}, **GRPO),
    ),
    "a2po": (
        lambda d: recipes.a2po(d.lp, d.rewards, d.mask, beta1=0.7, beta2=0.2, ref_logprobs=d.ref, **GROUPS),
        lambda d: policy_loss(
            d.lp, None, d.rewards - optimal_values(d.rewards, 0.7), d.mask, loss=losses.a2po(0.2), ref_logprobs=d.ref
        ),
    ),
    "a2po with values from before": (
        lambda d: recipes.a2po(d.lp, d.rewards, d.mask, optimal_values=d.adv, ref_logprobs=d.ref),
        lambda d: policy_loss(d.lp, None, d.rewards - d.adv, d.mask, loss=losses.a2po(), ref_logprobs=d.ref),
    ),
    "kto": (
        lambda d: recipes.kto(
            d.lp, d.rewards > 0, d.mask, beta=0.3, reference_point=0.2, undesirable_weight=1.5, ref_logprobs=d.ref
        ),
        lambda d: policy_loss(d.lp, None, d.rewards, d.mask, loss=losses.kto(0.3, 0.2, 1.0, 1.5), ref_logprobs=d.ref),
    ),
    "jepo": (
        lambda d: recipes.jepo(d.lp, d.old, d.answer, d.mask, sft_coef=0.5, **GROUPS),
        lambda d: policy_loss(
            d.lp, d.old, torch.zeros(5), d.mask, loss=losses.jepo(0.5), extra={"answer": d.answer}, **GROUPS
        ),
    ),
    "real": (
        lambda d: recipes.real(*d.rewarded, tau=0.8, **GROUPS),
        lambda d: policy_loss(*d.rewarded, loss=losses.real(0.8), aggregation="group-mean", **GROUPS),
    ),
    "real with each sequence's own loss": (
        lambda d: recipes.real(*d.rewarded, variant="bce", **GROUPS),
        lambda d: policy_loss(*d.rewarded, loss=losses.real(variant="bce"), **GROUPS),
    ),
    "pacs": (
        lambda d: recipes.pacs(*d.rewarded, beta=2.0, center="std", balanced=False, **GROUPS),
        lambda d: policy_loss(*d.rewarded, loss=losses.pacs(2.0, center="std", balanced=False), **GROUPS),
    ),
    "brain": (
        lambda d: recipes.brain(*d.rewarded, gamma=0.7, ref_logprobs=d.ref, **GROUPS),
        lambda d: policy_loss(*d.rewarded, loss=losses.brain(0.7), ref_logprobs=d.ref, **GROUPS),
    ),
    "gdro": (
        lambda d: recipes.gdro(*d.rewarded, beta=0.4, tau=0.5, ref_logprobs=d.ref, **GROUPS),
        lambda d: policy_loss(*d.rewarded, loss=losses.gdro(0.4, 0.5), ref_logprobs=d.ref, **GROUPS),
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_is_the_operation_s_call(name: str) -> None:
    made = []
    for call in SAME[name]:
        torch.manual_seed(1)
        data = batch()
        result = call(data)
        (gradient,) = torch.autograd.grad(1.7 * result.loss, data.lp)
        made.append((result.loss.detach(), gradient, result.metrics.values_tensor, result.metrics.names))
    for a, b in zip(made[0][:3], made[1][:3], strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())
    assert made[0][3] == made[1][3]
    assert made[0][1].abs().sum() > 0


def test_every_recipe_is_compared() -> None:
    of_the_file = {r.name for r in recipes.RECIPES.values() if r.family == "sequence"}
    assert {name.partition(" ")[0] for name in SAME} == of_the_file


def test_luspo_weighs_a_sequence_by_its_length() -> None:
    d = batch()
    each = reference.gspo(d.lp, d.old, d.adv, d.mask, clip_low=0.02, clip_high=0.03, log_ratio_max=None)
    want = (each * d.mask.sum(-1)).mean()
    got = recipes.luspo(*d.common, clip_low=0.02, clip_high=0.03)
    torch.testing.assert_close(got.loss.double(), want, rtol=1e-6, atol=1e-6)


def test_verifree_is_the_estimator_of_its_paper() -> None:
    """E[R (grad log pi(z) + grad log pi(y))], the first term with the leave-one-out baseline, written out."""
    d = batch()
    reward = (d.old * d.answer).sum(-1).exp()
    groups = torch.tensor([0, 0, 1, 1, 1])
    baseline = torch.stack(
        [(reward[groups == g].sum() - r) / ((groups == g).sum() - 1) for g, r in zip(groups, reward, strict=True)]
    )
    reasoning = (d.lp * (d.mask & ~d.answer)).sum(-1)
    answer = (d.lp * d.answer).sum(-1)
    want = -((reward - baseline) * reasoning + reward * answer).mean()
    got = recipes.verifree(d.lp, d.old, reward, d.answer, d.mask, group_ids=groups)
    torch.testing.assert_close(got.loss, want)
    torch.testing.assert_close(*(torch.autograd.grad(x, d.lp)[0] for x in (got.loss, want)))


def test_losses_over_groups_say_what_they_need() -> None:
    d = batch()
    with pytest.raises(ValueError, match="group_ids: real is a loss over groups"):
        recipes.real(*d.rewarded)
    with pytest.raises(ValueError, match="ref_logprobs"):
        recipes.gdro(*d.rewarded, **GROUPS)
    with pytest.raises(ValueError, match="group_ids, group_size: expected exactly one"):
        recipes.verifree(d.lp, d.old, d.rewards, d.answer, d.mask)
