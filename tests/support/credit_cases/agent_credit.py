"""Credit of an agent's turns, and rewards of its trajectories."""

from __future__ import annotations

import random
from functools import partial

import torch
from reference_credit import agent_credit as reference

from credit_cases.case import ROWS, Arguments, Case, floats, groups, scores
from credit_cases.turn_credit import TURNS, turns, with_outcomes
from fastreward import recipes


def _valued(rng: random.Random) -> Arguments:
    arguments = turns(rng)
    del arguments["group_ids"]
    return {**arguments, "values": floats(rng, mask=arguments["segment_ids"] >= 0)}


def _with_holes(rng: random.Random, *names: str) -> Arguments:
    """[B, 3] in [0, 1] each, of which some are not there, in one response none."""
    found = {}
    for name in names:
        x = floats(rng, ROWS, 3, low=0.0)
        x[rng.randrange(ROWS)] = float("nan")
        x[rng.randrange(ROWS), rng.randrange(3)] = float("nan")
        found[name] = x
    return found


def _checklist(rng: random.Random) -> Arguments:
    criteria = torch.tensor([[rng.choice([0.0, 1.0, 1.0, float("nan")]) for _ in range(4)] for _ in range(ROWS)])
    shape = (ROWS, TURNS, 4)
    is_open = torch.tensor([rng.randrange(2) for _ in range(ROWS * TURNS * 4)]).view(shape)
    ids = turns(rng)["segment_ids"]
    return {"criteria": criteria, "segment_ids": ids, "open_criteria": is_open, "group_ids": groups(rng)}


def _weighted(rng: random.Random) -> Arguments:
    return {**_checklist(rng), "weights": floats(rng, ROWS, 4, low=0.1)}


def _searched(rng: random.Random, formed: bool = False) -> Arguments:
    arguments = with_outcomes(rng)
    del arguments["group_ids"]
    return {**arguments, "well_formed": floats(rng, ROWS, TURNS) > -0.5} if formed else arguments


def _evidence(rng: random.Random, *names: str) -> Arguments:
    return {"rewards": scores(rng, nan=True), **_with_holes(rng, *names)}


def _sub_searched(rng: random.Random) -> Arguments:
    return {**_evidence(rng, "answerability", "decomposition"), "format_rewards": floats(rng, low=0.0, high=0.4)}


def _rubrics(rng: random.Random) -> Arguments:
    rewards = scores(rng, binary=True, nan=True)
    return {"rewards": rewards, "rubrics": scores(rng, nan=True), "group_ids": groups(rng)}


MARKS = dict.fromkeys(("trm", "scope", "search_r2", "chat_r1", "medsam_agent"), "reconstructed")
CASES = {
    "multi_turn_ppo": Case(
        recipes.multi_turn_ppo,
        reference.multi_turn_ppo,
        _valued,
        {"gamma": 0.9, "lam": 0.8},
        tolerance=1e-5,
        unmoved_by_scale=("turn_rewards", "values"),
        of_the_batch=True,
    ),
    "multi_turn_ppo, turns": Case(
        recipes.multi_turn_ppo,
        reference.multi_turn_ppo,
        _valued,
        {"level": "turn"},
        tolerance=1e-5,
        of_the_batch=True,
    ),
    "multi_turn_grpo": Case(recipes.multi_turn_grpo, reference.multi_turn_grpo, turns, scales_with=("turn_rewards",)),
    "multi_turn_grpo, turns": Case(
        recipes.multi_turn_grpo,
        reference.multi_turn_grpo,
        turns,
        {"level": "turn", "token_weighted": False, "norm": "mean-std", "gamma": 0.5},
        tolerance=1e-5,
    ),
    "multi_turn_rloo": Case(recipes.multi_turn_rloo, reference.multi_turn_rloo, turns),
    "multi_turn_rloo, turns": Case(
        recipes.multi_turn_rloo, reference.multi_turn_rloo, turns, {"level": "turn", "gamma": 0.5}
    ),
    "trm": Case(recipes.trm, reference.trm, with_outcomes, {"weight": 0.5}, tolerance=1e-5),
    "trm, mean": Case(
        recipes.trm, reference.trm, with_outcomes, {"norm": "mean"}, scales_with=("rewards", "turn_rewards")
    ),
    "scope": Case(recipes.scope, reference.scope, partial(with_outcomes, name="turn_scores"), tolerance=1e-5),
    "scope, some blame": Case(
        recipes.scope,
        reference.scope,
        partial(with_outcomes, name="turn_scores"),
        {"threshold": -0.5, "blame": 0.25},
        tolerance=1e-5,
    ),
    "cm2": Case(recipes.cm2, reference.cm2, _checklist, {"min_scores": 3}),
    "cm2, weighted": Case(recipes.cm2, reference.cm2, _weighted, {"min_scores": 2, "normalize": True}),
    "r3_rag": Case(recipes.r3_rag, reference.r3_rag, _searched),
    "r3_rag, malformed": Case(
        recipes.r3_rag, reference.r3_rag, partial(_searched, formed=True), {"wrong_final": -1.0, "right_factor": 2.0}
    ),
    "search_r2": Case(
        recipes.search_r2, reference.search_r2, lambda rng: _evidence(rng, "evidence"), scales_with=("rewards",)
    ),
    "sub_search": Case(
        recipes.sub_search,
        reference.sub_search,
        lambda rng: _evidence(rng, "answerability", "decomposition"),
        {"high": 1.5},
    ),
    "sub_search, with format": Case(recipes.sub_search, reference.sub_search, _sub_searched),
    "chat_r1": Case(recipes.chat_r1, reference.chat_r1, lambda rng: _evidence(rng, "intents")),
    "long_trace_rl": Case(recipes.long_trace_rl, reference.long_trace_rl, _rubrics, unmoved_by_scale=("rubrics",)),
    **{
        f"long_trace_rl, {mode}": Case(recipes.long_trace_rl, reference.long_trace_rl, _rubrics, {"mode": mode})
        for mode in ("negative", "always", "longrlvr")
    },
    "medsam_agent": Case(
        recipes.medsam_agent, reference.medsam_agent, lambda rng: _with_holes(rng, "turn_scores"), {"turn_cost": 0.01}
    ),
}
