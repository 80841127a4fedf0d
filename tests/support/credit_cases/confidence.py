"""Rewards from distributions."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import torch
from reference_credit import confidence as reference
from torch import Tensor

from credit_cases.case import ROWS, Arguments, Case, floats, groups, logprobs, rollout_mask, scores
from fastreward import recipes


def _tokens(rng: random.Random, *names: str, **more: Any) -> Arguments:
    mask = rollout_mask(rng)
    arguments = {name: floats(rng, low=0.5, high=4.0, mask=mask) for name in names}
    return {**arguments, "mask": mask, **{name: make(rng) for name, make in more.items()}}


def _own(rng: random.Random) -> Arguments:
    mask = rollout_mask(rng)
    return {"old_logprobs": logprobs(rng, mask), "mask": mask}


def _telescopes(arguments: Arguments, result: Tensor) -> None:
    """To the sum of lp + V_1 - V_end."""
    for b, mask in enumerate(arguments["mask"]):
        if mask.any():
            label, value = arguments["label_logit"][b][mask], arguments["logsumexp"][b][mask]
            want = 2.0 * ((label - value).sum() + value[0] - arguments["final"][b])
            torch.testing.assert_close(result[b].sum(), want)


def _ids(rng: random.Random, name: str, *shape: int, **more: list[float]) -> Arguments:
    return {name: floats(rng, ROWS, *shape, low=-4.0), **{key: torch.tensor(x) for key, x in more.items()}}


def _wins_and_losses(arguments: Arguments, result: Tensor) -> None:
    """Of the two sides come to 1."""
    own, other = arguments["rating_logprobs"], arguments["other_logprobs"]
    torch.testing.assert_close(result + recipes.oprm_win_rate(other, other_logprobs=own), torch.ones(ROWS))


def _next_token(rng: random.Random) -> Arguments:
    ids = torch.tensor([rng.sample(range(7), 3) for _ in range(ROWS)])
    return {"logits": floats(rng, ROWS, 7), "values": floats(rng, ROWS, 3), "token_ids": ids}


def _scores(rng: random.Random, ref: bool = False) -> Arguments:
    names = ("score_logprobs", "ref_score_logprobs") if ref else ("score_logprobs",)
    return {name: floats(rng, low=-25.0, high=-10.0) for name in names}


def _mixed(rng: random.Random) -> Arguments:
    own = floats(rng, low=-0.2, high=1.3)
    return {"advantages": floats(rng), "scores": own, "group_ids": groups(rng)}


def _votes(rng: random.Random) -> Arguments:
    return {"answers": [rng.choice(["7", "12", "x", None]) for _ in range(ROWS)], "group_ids": groups(rng)}


_BINS = {"values": [0.0, 1.0], "lengths": [4.0, 8.0, 16.0]}
CASES = {
    "intuitor": Case(recipes.intuitor, reference.intuitor, lambda rng: _tokens(rng, "logsumexp", "mean_logit")),
    "shop_r1": Case(
        recipes.shop_r1, reference.shop_r1, lambda rng: _tokens(rng, "entropy", rewards=scores), {"vocab_size": 100}
    ),
    "shop_r1, alone": Case(
        recipes.shop_r1, reference.shop_r1, lambda rng: _tokens(rng, "entropy"), {"vocab_size": 9, "alpha": 1.0}
    ),
    "negative_entropy": Case(recipes.negative_entropy, reference.negative_entropy, lambda rng: _tokens(rng, "entropy")),
    "own_likelihood": Case(recipes.own_likelihood, reference.own_likelihood, _own),
    "own_likelihood, prob": Case(recipes.own_likelihood, reference.own_likelihood, _own, {"score": "prob"}),
    "endogenous": Case(recipes.endogenous, reference.endogenous, lambda rng: _tokens(rng, "label_logit", "logsumexp")),
    "endogenous, cut": Case(
        recipes.endogenous,
        reference.endogenous,
        lambda rng: _tokens(rng, "label_logit", "logsumexp", final=floats),
        {"alpha": 2.0},
        law=_telescopes,
    ),
    "oprm": Case(recipes.oprm, reference.oprm, lambda rng: _ids(rng, "rating_logprobs", 9)),
    "oprm, ratings": Case(
        recipes.oprm, reference.oprm, lambda rng: _ids(rng, "rating_logprobs", 3, ratings=[-1.0, 0.0, 4.0])
    ),
    "oprm_win_rate": Case(
        recipes.oprm_win_rate,
        reference.oprm_win_rate,
        lambda rng: _ids(rng, "rating_logprobs", 4) | _ids(rng, "other_logprobs", 4),
        law=_wins_and_losses,
    ),
    "zip_rc": Case(recipes.zip_rc, reference.zip_rc, lambda rng: _ids(rng, "bin_logprobs", 2, 3, values=[0.0, 1.0])),
    "zip_rc, cost": Case(
        recipes.zip_rc, reference.zip_rc, lambda rng: _ids(rng, "bin_logprobs", 2, 3, **_BINS), {"cost": 0.05}
    ),
    "laser_advantages": Case(recipes.laser_advantages, reference.laser_advantages, _mixed),
    "laser_advantages, sure": Case(
        recipes.laser_advantages, reference.laser_advantages, _mixed, {"weight": 1.0, "min_std": 0.5}
    ),
    "majority_vote": Case(recipes.majority_vote, reference.majority_vote, _votes),
    "laser_score": Case(recipes.laser_score, reference.laser_score, _scores),
    "laser_score, reference": Case(
        recipes.laser_score, reference.laser_score, partial(_scores, ref=True), {"temperature": 0.7}
    ),
    "value_augmented": Case(recipes.value_augmented, reference.value_augmented, _next_token),
}
MARKS = {
    "majority_vote": "note",
    "shop_r1": "note",
    "negative_entropy": "note",
    "own_likelihood": "note",
    "endogenous": "note",
    "oprm": "note",
    "oprm_win_rate": "reconstructed",
    "zip_rc": "note",
}
