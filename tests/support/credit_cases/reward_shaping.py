"""Combined and shaped rewards."""

from __future__ import annotations

import random
from functools import partial

import torch
from reference_credit import reward_shaping as reference
from torch import Tensor

from credit_cases.case import ROWS, Arguments, Case, floats, groups, rollout_mask, scores
from fastreward import recipes


def _components(rng: random.Random, columns: int = 3, *, low: float = -1.0, nan: bool = True) -> Tensor:
    x = floats(rng, ROWS, columns, low=low)
    if nan:
        x[rng.randrange(ROWS), rng.randrange(columns)] = torch.nan
        x[rng.randrange(ROWS)] = torch.nan
    return x


def _ensemble(rng: random.Random) -> Arguments:
    return {"components": _components(rng)}


def _beside_reference(rng: random.Random) -> Arguments:
    return {
        "components": _components(rng),
        "mean": torch.tensor([0.1, -0.2, 0.0]),
        "std": torch.tensor([0.5, 1.0, 2.0]),
    }


def _responses_of_the_reference(rng: random.Random) -> Arguments:
    return {"rewards": scores(rng, nan=True), "reference_rewards": _components(rng, 4)}


def _constraints(rng: random.Random) -> Arguments:
    return {"rewards": scores(rng), "constrained": floats(rng, ROWS, 2), "multipliers": [0.3, 0.6]}


def _grouped(rng: random.Random) -> Arguments:
    return {"components": floats(rng, ROWS, 3), "group_ids": groups(rng)}


def _several(rng: random.Random) -> Arguments:
    return {"components": _components(rng, 2, nan=False)}


def _gated(rng: random.Random) -> Arguments:
    return {"bottom_line": floats(rng, ROWS, 2, low=0.0), "utilities": _components(rng)}


def _episodes(rng: random.Random) -> Arguments:
    return {"progress": scores(rng), "factors": floats(rng, ROWS, 3, low=0.2), "failed": scores(rng, binary=True)}


def _concise(rng: random.Random) -> Arguments:
    return {"rewards": scores(rng), "conciseness": floats(rng, low=0.1), "difficulty": floats(rng, low=0.0)}


def _items(rng: random.Random) -> Arguments:
    return {"components": floats(rng, ROWS, 3, low=0.0), "veto": torch.tensor([True, False, False])}


def _calls(rng: random.Random) -> Arguments:
    return {"format_rewards": scores(rng, binary=True), "matches": floats(rng, low=0.0)}


def _routed(rng: random.Random) -> Arguments:
    return {"format_rewards": scores(rng, binary=True) - 1, "rewards": scores(rng), "costs": floats(rng, low=0.0)}


def _lengths(rng: random.Random) -> Arguments:
    return {"rewards": scores(rng), "lengths": torch.tensor([rng.randrange(60, 130) for _ in range(ROWS)])}


def _texts(rng: random.Random) -> Arguments:
    mask = rollout_mask(rng, 9)
    tokens = torch.tensor([[rng.randrange(2) for _ in range(9)] for _ in range(ROWS)])
    return {"relevance": scores(rng), "length_incentive": floats(rng, low=0.0), "tokens": tokens, "mask": mask}


def _bounded(arguments: Arguments, result: Tensor) -> None:
    """Rewards of a probability, and of components that are not above 1."""
    assert not (result > 1.0).any()


_weighted = {"weights": [0.5, 1.0, 2.0]}
CASES = {
    "par": Case(recipes.par, reference.par, _responses_of_the_reference, law=_bounded),
    "par, steep": Case(recipes.par, reference.par, _responses_of_the_reference, {"scale": 3.0}),
    "lsc": Case(recipes.lsc, reference.lsc, _beside_reference, law=_bounded),
    "wco": Case(recipes.wco, reference.wco, _ensemble, scales_with=("components",)),
    "uwo": Case(recipes.uwo, reference.uwo, _ensemble),
    "uwo, best of n": Case(recipes.uwo, reference.uwo, _ensemble, {"penalty": 0.5, "ddof": 0}),
    "quark": Case(recipes.quark, reference.quark, _beside_reference, _weighted),
    "constrained_rlhf": Case(
        recipes.constrained_rlhf, reference.constrained_rlhf, _constraints,
        unmoved_by_scale=("rewards",), of_the_batch=True,
    ),
    "sd_e2": Case(recipes.sd_e2, reference.sd_e2, _grouped, unmoved_by_shift=("components",)),
    "sd_e2, weighted": Case(recipes.sd_e2, reference.sd_e2, _grouped, _weighted),
    "parrot": Case(recipes.parrot, reference.parrot, _several, scales_with=("components",), of_the_batch=True),
    "searchllm": Case(recipes.searchllm, reference.searchllm, _gated, scales_with=("utilities",)),
    "searchllm, weighted": Case(recipes.searchllm, reference.searchllm, _gated, _weighted | {"smoothing": 0.2}),
    "carl": Case(recipes.carl, reference.carl, _episodes),
    "chat_shop_buddy": Case(recipes.chat_shop_buddy, reference.chat_shop_buddy, _ensemble, {"thresholds": -0.2}),
    "crf": Case(recipes.crf, reference.crf, _concise, {"alpha": 0.3, "annealed": 0.7}, scales_with=("rewards",)),
    "rubric": Case(recipes.rubric, reference.rubric, _items, law=_bounded),
    "rubric, saturated": Case(recipes.rubric, reference.rubric, _items, _weighted | {"saturation": 0.6}, law=_bounded),
    "toolrl": Case(recipes.toolrl, reference.toolrl, _calls),
    "router_r1": Case(recipes.router_r1, reference.router_r1, _routed),
    "ssl_tiers": Case(recipes.ssl_tiers, reference.ssl_tiers, partial(lambda rng: {"rewards": scores(rng, nan=True)})),
    "dapo_overlong": Case(
        recipes.dapo_overlong, reference.dapo_overlong, _lengths, {"max_length": 110, "buffer": 30}
    ),
    "dapo_overlong, verl": Case(
        recipes.dapo_overlong, reference.dapo_overlong, _lengths,
        {"max_length": 90, "buffer": 20, "factor": 0.5, "floor": None},
    ),
    "r3": Case(recipes.r3, reference.r3, _texts, scales_with=("relevance",)),
}  # fmt: skip
MARKS = {
    "quark": "reconstructed",
    "sd_e2": "reconstructed",
    "parrot": "reconstructed",
    "searchllm": "note",
    "carl": "reconstructed",
    "chat_shop_buddy": "reconstructed",
    "crf": "note",
    "rubric": "reconstructed",
    "toolrl": "reconstructed",
    "router_r1": "reconstructed",
    "ssl_tiers": "reconstructed",
    "r3": "note",
}
