"""Advantages of responses against the others to the same prompt."""

from __future__ import annotations

import random

import torch
from reference_credit import group_advantage as reference
from torch import Tensor

from credit_cases.case import ROWS, Arguments, Case, floats, groups, rollout_mask, scores
from fastreward import recipes


def _scored(rng: random.Random) -> Arguments:
    return {"rewards": scores(rng, nan=True), "group_ids": groups(rng)}


def _binary(rng: random.Random) -> Arguments:
    return {"rewards": scores(rng, binary=True, nan=True), "group_ids": groups(rng)}


def _with_lengths(rng: random.Random) -> Arguments:
    return {**_scored(rng), "lengths": torch.tensor([float(rng.randrange(1, 99)) for _ in range(ROWS)])}


def _components(rng: random.Random) -> Arguments:
    rewards = torch.stack([scores(rng, nan=True), scores(rng), scores(rng, nan=True)], 1)
    return {"rewards": rewards, "group_ids": groups(rng), "component_weights": [1.0, 0.5, -2.0]}


def _greedy(rng: random.Random) -> Arguments:
    return {"rewards": scores(rng, nan=True), "greedy_rewards": scores(rng)}


def _rewarded(rng: random.Random) -> Arguments:
    mask = rollout_mask(rng)
    return {"token_rewards": floats(rng, mask=mask), "mask": mask}


def _on_tokens(rng: random.Random) -> Arguments:
    return {"rewards": scores(rng), "mask": rollout_mask(rng), "group_ids": groups(rng)}


def _sums_to_zero(arguments: Arguments, result: Tensor) -> None:
    """Over each group but those of one."""
    for label in set(arguments["group_ids"]) - {"c"}:
        own = torch.tensor([g == label for g in arguments["group_ids"]])
        if int((own & ~arguments["rewards"].isnan()).sum()) > 1:
            assert abs(float(result[own].sum())) < 1e-5


MARKS: dict[str, str] = {}
SHIFT: dict[str, tuple[str, ...]] = {"unmoved_by_shift": ("rewards",)}
CASES = {
    "grpo": Case(recipes.grpo, reference.grpo, _scored, law=_sums_to_zero),
    **{
        f"grpo, {trainer}": Case(recipes.grpo, reference.grpo, _scored, {"trainer": trainer})
        for trainer in ("trl", "trl-async", "openrlhf", "slime", "nemo-rl")
    },
    "dr_grpo": Case(recipes.dr_grpo, reference.dr_grpo, _scored, scales_with=("rewards",), law=_sums_to_zero, **SHIFT),
    "rloo": Case(recipes.rloo, reference.rloo, _scored, scales_with=("rewards",), law=_sums_to_zero),
    "opo": Case(recipes.opo, reference.opo, _with_lengths, scales_with=("rewards",)),
    "lite_ppo": Case(recipes.lite_ppo, reference.lite_ppo, _scored, of_the_batch=True),
    "prpo": Case(recipes.prpo, reference.prpo, lambda rng: {"rewards": scores(rng, nan=True)}, of_the_batch=True),
    "remax": Case(recipes.remax, reference.remax, _greedy, unmoved_by_shift=("rewards", "greedy_rewards")),
    "gpg": Case(recipes.gpg, reference.gpg, _scored, {"f_norm": 2.0}, scales_with=("rewards",), of_the_batch=True),
    "gdpo": Case(recipes.gdpo, reference.gdpo, _components, of_the_batch=True),
    "gdpo, without the batch": Case(recipes.gdpo, reference.gdpo, _components, {"batch_eps": None}),
    "reinforce_plus_plus": Case(
        recipes.reinforce_plus_plus, reference.reinforce_plus_plus, _rewarded, {"gamma": 0.9}, of_the_batch=True
    ),
    "reinforce_plus_plus_baseline": Case(
        recipes.reinforce_plus_plus_baseline, reference.reinforce_plus_plus_baseline, _on_tokens, of_the_batch=True
    ),
    "pass_at_k": Case(recipes.pass_at_k, reference.pass_at_k, _scored, **SHIFT),
    "pass_at_k, not scaled": Case(
        recipes.pass_at_k, reference.pass_at_k, _scored, {"scale": "none"}, scales_with=("rewards",), **SHIFT
    ),
    "pass_at_k_training": Case(recipes.pass_at_k_training, reference.pass_at_k_training, _binary, {"k": 2}),
    "maxrl": Case(recipes.maxrl, reference.maxrl, _scored, unmoved_by_scale=("rewards",)),
    "bnpo": Case(recipes.bnpo, reference.bnpo, _binary, of_the_batch=True, tolerance=1e-5),
}
