"""Credit of tokens."""

from __future__ import annotations

import random
from functools import partial

import torch
from reference_credit import token_credit as reference
from torch import Tensor

from credit_cases.case import ROWS, Arguments, Case, floats, groups, logprobs, rollout_mask, scores
from fastreward import recipes


def _scored(rng: random.Random, nan: bool = True) -> Arguments:
    return {"mask": rollout_mask(rng), "rewards": scores(rng, nan=nan), "group_ids": groups(rng)}


def _two_models(rng: random.Random) -> Arguments:
    common = _scored(rng)
    return {**common, "rm_logprobs": logprobs(rng, common["mask"]), "ref_logprobs": logprobs(rng, common["mask"])}


def _deviations(rng: random.Random, equal: bool = False) -> Arguments:
    common = _scored(rng)
    found = floats(rng, low=0.0, mask=common["mask"])
    return {**common, "deviations": (found * 6).round() / 6 if equal else found}


def _errors(rng: random.Random, critiques: int | None = None) -> Arguments:
    common = _scored(rng)
    shape = () if critiques is None else (critiques,)
    errors = floats(rng, *shape, mask=common["mask"])
    return {**common, "errors": torch.where(errors < 0, 0.0, errors)}


def _ranks(rng: random.Random, of_tokens: bool = False) -> Arguments:
    mask = rollout_mask(rng)
    advantages = floats(rng, mask=mask) if of_tokens else floats(rng)
    averages = torch.tensor([1.5, -0.2, 0.01])
    return {"advantages": advantages, "ranks": floats(rng, ROWS, 3, low=-2.0, high=4.0), "mask": mask,
            "averages": averages}  # fmt: skip


def _hidden(rng: random.Random) -> Arguments:
    common = _scored(rng)
    more = {"residuals": floats(rng, 4, mask=common["mask"]), "hidden": floats(rng, 3, mask=common["mask"])}
    return {**common, **more, "advantages": floats(rng)}


def _states(rng: random.Random) -> Arguments:
    mask = rollout_mask(rng)
    return {"hidden": floats(rng, 4, mask=mask), "mask": mask}


def _vocabulary(rng: random.Random) -> Arguments:
    mask = rollout_mask(rng)
    return {"vocab_logprobs": floats(rng, 5, low=-4.0, mask=mask), "mask": mask}


def _only_grows(arguments: Arguments, result: Tensor) -> None:
    """By no more than half of |A|."""
    base = arguments["advantages"].unsqueeze(-1) * arguments["mask"]
    assert (result >= base).all()
    assert (result - base <= base.abs() / 2 + 1e-6).all()


def _within_1_and_alpha(_: Arguments, result: Tensor) -> None:
    assert result.max() <= 1.4 + 1e-6
    assert result[result > 0].min() >= 1.0


_prime = partial(
    Case, recipes.prime, reference.prime, _two_models, of_the_batch=True, unmoved_by_shift=("rewards",), tolerance=1e-5
)
CASES = {
    "prime": _prime(),
    "prime, whole": _prime({"granularity": "whole", "lam": 0.5}),
    "prime, use_gt": _prime({"use_gt": True, "lam": 0.5}, unmoved_by_shift=()),
    "prime, first code": _prime({"keep_last": True, "batch_norm": False, "lam": 0.9}),
    "rlfr": Case(recipes.rlfr, reference.rlfr, _deviations, unmoved_by_shift=("rewards",)),
    "rlfr, two": Case(
        recipes.rlfr, reference.rlfr, partial(_deviations, equal=True), {"top": 2, "threshold": 0.1, "weight": 0.5}
    ),
    "verl_shaping": Case(recipes.verl_shaping, reference.verl_shaping, _ranks, law=_only_grows),
    "verl_shaping, all tokens": Case(
        recipes.verl_shaping, reference.verl_shaping, partial(_ranks, of_tokens=True), {"place": "broadcast"}
    ),
    "effective_ranks": Case(recipes.effective_ranks, reference.effective_ranks, _states, {"stride": 1}),
    "effective_ranks, short": Case(
        recipes.effective_ranks, reference.effective_ranks, _states, {"stride": 2, "max_tokens": 4}
    ),
    "tw_grpo_weights": Case(
        recipes.tw_grpo_weights,
        reference.tw_grpo_weights,
        _vocabulary,
        {"group_size": 4},
        law=_within_1_and_alpha,
        rows_matter=True,
        places_matter=True,
    ),
    "capo": Case(recipes.capo, reference.capo, _errors),
    **{
        f"capo, {vote}": Case(recipes.capo, reference.capo, partial(_errors, critiques=3), {"vote": vote})
        for vote in ("intersection", "majority", "union", "average", "first")
    },
    "nthr": Case(recipes.nthr, reference.nthr, _hidden, scales_with=("advantages",)),
    "thr": Case(recipes.thr, reference.thr, _hidden, {"beta": 0.5}, scales_with=("advantages",)),
}
MARKS = {"capo": "note", "nthr": "note", "thr": "reconstructed"}
