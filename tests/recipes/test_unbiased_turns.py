"""Baselines of turns where the policy decides when to stop, against the exact policy gradient of a small problem.

At each of at most four turns the policy goes on or stops; every turn has a reward, which depends on what it does there.
"""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor

import fastreward as fr
from fastreward import recipes

LOGITS = torch.tensor([0.8, -0.3, 0.5, 0.1], dtype=torch.float64)  # of going on
REWARDS = torch.tensor([[0.3, 1.0], [0.0, 1.0], [0.5, 0.7], [0.2, 1.5]], dtype=torch.float64)  # stopping, going on
TURNS, GROUP, GROUPS = len(LOGITS), 4, 5000


def exact() -> Tensor:
    """The gradient of the expected sum of rewards for the logits: every course of a dialogue, by its probability."""
    logits = LOGITS.clone().requires_grad_()
    value, reached = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    total = 0.0
    for k in range(TURNS):
        go = logits[k].sigmoid()
        value = value + reached * (1 - go) * (total + REWARDS[k, 0])
        reached, total = reached * go, total + float(REWARDS[k, 1])
    (gradient,) = torch.autograd.grad(value + reached * total, logits)
    return gradient


def sampled() -> tuple[Tensor, Tensor, Tensor]:
    """(rewards [B, turns], turn of each step or -1, d log pi / d logit of each turn)."""
    generator = torch.Generator().manual_seed(0)
    goes = torch.rand(GROUP * GROUPS, TURNS, generator=generator, dtype=torch.float64) < LOGITS.sigmoid()
    there = torch.ones_like(goes)
    there[:, 1:] = goes[:, :-1].cumprod(-1).bool()
    rewards = torch.where(goes, REWARDS[:, 1], REWARDS[:, 0])
    scores = torch.where(there, goes.double() - LOGITS.sigmoid(), 0.0)
    return rewards.float(), torch.where(there, torch.arange(TURNS), -1), scores


def errors(advantages: Tensor, scores: Tensor) -> Tensor:
    """Distance of the mean gradient from the exact one, in standard errors, [turns]."""
    of_group = (advantages.double() * scores).view(GROUPS, GROUP, TURNS).mean(1)
    return (of_group.mean(0) - exact()).abs() / (of_group.std(0) / GROUPS**0.5)


def test_returns_against_those_of_the_others_are_unbiased() -> None:
    rewards, turns, scores = sampled()
    advantages = recipes.turn_baseline(rewards, turns, group_size=GROUP)
    assert errors(advantages, scores).max() < 3
    assert errors(torch.where(turns >= 0, 2.0, 0.0), scores).min() > 10  # what is no advantage is seen to be none


@pytest.mark.parametrize("level", ["response", "turn"])
def test_a_baseline_of_others_that_have_the_turn_is_unbiased_as_well(level: Literal["response", "turn"]) -> None:
    rewards, turns, scores = sampled()
    assert errors(recipes.multi_turn_rloo(rewards, turns, group_size=GROUP, level=level), scores).max() < 3


def test_a_mean_with_the_response_itself_in_it_shrinks_turns_that_few_reach() -> None:
    rewards, turns, scores = sampled()
    advantages = recipes.multi_turn_grpo(rewards, turns, group_size=GROUP, level="turn", token_weighted=False)
    share = (advantages.double() * scores).mean(0) / exact()
    assert (share.diff() < 0).all()
    assert share[0] == pytest.approx((GROUP - 1) / GROUP, abs=0.02)


def test_normalised_rewards_added_up_are_biased() -> None:
    rewards, turns, scores = sampled()
    assert errors(recipes.igpo(rewards, turns, group_size=GROUP), scores).max() > 10


@pytest.mark.parametrize("center", ["mean", "leave-one-out"])
def test_normalising_turn_k_of_every_response_is_biased(center: str) -> None:
    """The baseline of a later turn is subtracted from those alone that get there: going on is worth nothing."""
    rewards, turns, scores = sampled()
    prompts = torch.arange(len(rewards)) // GROUP
    normalised = fr.group_advantages(rewards, fr.Groups.by(prompts, turns), center=center, scale="none")
    advantages = normalised.flip(-1).cumsum(-1).flip(-1)  # the sum from that turn on
    assert errors(advantages, scores).max() > 10
