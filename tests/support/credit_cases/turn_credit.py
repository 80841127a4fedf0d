"""Credit of turns."""

from __future__ import annotations

import random
from functools import partial

import torch
from reference_credit import turn_credit as reference

from credit_cases.case import COLUMNS, ROWS, Arguments, Case, floats, groups, logprobs, rollout_mask, scores, segments
from fastreward import recipes

TURNS = COLUMNS + 1  # one that nobody has


def turns(rng: random.Random, name: str = "turn_rewards") -> Arguments:
    """Values of turns, one of them not there, and whose tokens are which turn's."""
    values = floats(rng, ROWS, TURNS)
    values[2, 1] = float("nan")
    return {name: values, "segment_ids": segments(rng, rollout_mask(rng)), "group_ids": groups(rng)}


def with_outcomes(rng: random.Random, name: str = "turn_rewards") -> Arguments:
    return {"rewards": scores(rng, nan=True), **turns(rng, name)}


def labelled(rng: random.Random, name: str, text: bool = False, outcomes: bool = True) -> Arguments:
    """Labels of turns: few, so that they meet again; -1 or None: none."""
    labels = torch.tensor([[rng.choice([0, 0, 1, 1, 5, -1]) for _ in range(TURNS)] for _ in range(ROWS)])
    given = [[None if x < 0 else f"s{x}" for x in row] for row in labels.tolist()] if text else labels
    return {**(with_outcomes(rng) if outcomes else turns(rng)), name: given}


def _implicit(rng: random.Random) -> Arguments:
    ids = segments(rng, rollout_mask(rng))
    models = {name: logprobs(rng, ids >= 0) for name in ("prm_logprobs", "old_logprobs")}
    return {"rewards": scores(rng), "segment_ids": ids, **models, "group_ids": groups(rng)}


def _called(rng: random.Random) -> Arguments:
    """Up to three calls, beside up to two of the reference."""
    call_scores = floats(rng, ROWS, 3, 2, low=-0.2)
    call_turns = torch.tensor([[rng.randrange(-1, 4) for _ in range(3)] for _ in range(ROWS)])
    call_scores[call_turns < 0] = float("nan")
    call_scores[2, :, 1] = float("nan")
    call_scores[3] = float("nan")
    ids = segments(rng, rollout_mask(rng))
    return {"rewards": scores(rng), "call_scores": call_scores, "call_turns": call_turns, "segment_ids": ids}


def _states(rng: random.Random) -> Arguments:
    return labelled(rng, "states", outcomes=False)


MARKS = {"turn_baseline": "reconstructed", "igpo": "note"}
CASES = {
    "turn_baseline": Case(recipes.turn_baseline, reference.turn_baseline, turns, scales_with=("turn_rewards",)),
    "turn_baseline, discounted": Case(recipes.turn_baseline, reference.turn_baseline, turns, {"gamma": 0.5}),
    "match_tir": Case(recipes.match_tir, reference.match_tir, turns),
    "match_tir_rewards": Case(recipes.match_tir_rewards, reference.match_tir_rewards, _called, {"num_segments": TURNS}),
    "match_tir_rewards, soft": Case(
        recipes.match_tir_rewards,
        reference.match_tir_rewards,
        _called,
        {"assignment": "soft", "iterations": 20, "num_segments": TURNS},
    ),
    "igpo": Case(recipes.igpo, reference.igpo, turns, tolerance=1e-5, unmoved_by_shift=("turn_rewards",)),
    "igpo, separate": Case(recipes.igpo, reference.igpo, turns, {"norm": "separate", "gamma": 0.5}, tolerance=1e-4),
    "gigpo": Case(
        recipes.gigpo, reference.gigpo, partial(labelled, name="states"), scales_with=("rewards", "turn_rewards")
    ),
    "gigpo, std": Case(
        recipes.gigpo,
        reference.gigpo,
        partial(labelled, name="states", text=True),
        {"norm": "mean-std", "weight": 0.5, "gamma": 1.0, "across_turns": False},
    ),
    "hgpo": Case(recipes.hgpo, reference.hgpo, _states, tolerance=1e-5),
    "hgpo, with the outcome": Case(
        recipes.hgpo,
        reference.hgpo,
        partial(labelled, name="states", text=True),
        {"norm": "mean", "history": 1, "alpha": 2.0, "gamma": 0.5},
    ),
    "rlvmr": Case(recipes.rlvmr, reference.rlvmr, partial(labelled, name="tags"), {"weight": 0.5}),
    "rlvmr, std": Case(
        recipes.rlvmr,
        reference.rlvmr,
        partial(labelled, name="tags", text=True),
        {"norm": "mean-std", "across_turns": False},
    ),
    "istar": Case(recipes.istar, reference.istar, _implicit, {"num_segments": TURNS}, tolerance=1e-5),
    "istar, mean": Case(
        recipes.istar, reference.istar, _implicit, {"norm": "mean", "alpha": 0.3, "num_segments": TURNS}
    ),
    "pro_rag": Case(recipes.pro_rag, reference.pro_rag, with_outcomes, tolerance=1e-5),
}
