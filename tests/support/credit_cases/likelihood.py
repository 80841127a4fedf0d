"""Rewards from likelihoods."""

from __future__ import annotations

import random
from functools import partial

import torch
from reference_credit import likelihood as reference
from torch import Tensor

from credit_cases.case import ROWS, Arguments, Case, floats, groups, logprobs, rollout_mask, scores, segments
from fastreward import recipes


def _answers(rng: random.Random, *, of: str = "answer") -> Arguments:
    mask = rollout_mask(rng, 5)
    return {f"{of}_logprobs": logprobs(rng, mask), f"{of}_mask": mask}


def _gains(rng: random.Random) -> Arguments:
    return {**_answers(rng), "baseline": floats(rng, low=0.2, high=0.6)}


def _gains_and_format(rng: random.Random) -> Arguments:
    return {**_gains(rng), "format_rewards": scores(rng, binary=True)}


def _two_answers(rng: random.Random) -> Arguments:
    own = rollout_mask(rng, 4)
    return {**_answers(rng), "own_logprobs": logprobs(rng, own), "own_mask": own}


def _responses(rng: random.Random, first: str, second: str, rewards: bool = False) -> Arguments:
    mask = rollout_mask(rng)
    arguments = {first: logprobs(rng, mask), second: logprobs(rng, mask), "mask": mask}
    return {**arguments, "rewards": scores(rng)} if rewards else arguments


def _follow_ups(rng: random.Random) -> Arguments:
    return {"positive": floats(rng, ROWS, 3, low=-9.0), "negative": floats(rng, ROWS, 4, low=-9.0)}


def _verdicts(rng: random.Random) -> Arguments:
    return {"verdict_logprobs": floats(rng, ROWS, 2, low=-3.0, high=0.0)}


def _grouped(rng: random.Random) -> Arguments:
    return {**_answers(rng), "group_ids": groups(rng)}


def _spread(rng: random.Random) -> Arguments:
    return {"rewards": scores(rng, nan=True), "group_ids": groups(rng)}


def _turns(rng: random.Random) -> Arguments:
    mask = rollout_mask(rng)
    return {"likelihoods": floats(rng, ROWS, 7, low=0.0), "segment_ids": segments(rng, mask), "rewards": scores(rng)}


def _gains_telescope(arguments: Arguments, result: Tensor) -> None:
    """All but the last turn's sum to the likelihood before the last turn, less that before the first."""
    p, last = arguments["likelihoods"], arguments["segment_ids"].amax(-1)
    for b, k in enumerate(last.tolist()):
        want = p[b, k] - p[b, 0] + arguments["rewards"][b] if k >= 0 else torch.tensor(0.0)
        torch.testing.assert_close(result[b].sum(), want)


def _steps(rng: random.Random, formed: bool = False) -> Arguments:
    gains = floats(rng, ROWS, 3, 4)
    gains[torch.tensor([[[rng.random() < 0.3 for _ in range(4)] for _ in range(3)] for _ in range(ROWS)])] = torch.nan
    gains[2, 1] = torch.nan
    ids = groups(rng)
    rewards = torch.tensor([float(g == "a" and rng.random() < 0.5) for g in ids])
    arguments = {"gains": gains, "answer_scores": floats(rng, low=-3.0), "rewards": rewards, "group_ids": ids}
    return {**arguments, "well_formed": scores(rng, binary=True)} if formed else arguments


_sar = partial(_responses, first="logprobs", second="alone_logprobs")
_cdr = partial(_responses, first="strong_logprobs", second="weak_logprobs")
CASES = {
    **{
        f"likelihood_reward, {score}": Case(
            recipes.likelihood_reward, reference.likelihood_reward, _answers, {"score": score}
        )
        for score in ("sum", "mean", "prob", "mean-prob", "geometric")
    },
    "verifree_reward": Case(recipes.verifree_reward, reference.verifree_reward, _answers),
    "rlpr": Case(recipes.rlpr, reference.rlpr, _gains),
    "rlpr, format": Case(recipes.rlpr, reference.rlpr, _gains_and_format, {"threshold": None, "score": "geometric"}),
    "rlpr_filter": Case(
        recipes.rlpr_filter, reference.rlpr_filter, _spread, {"running_std": 1.6}, unmoved_by_shift=("rewards",)
    ),
    "jepo_advantages": Case(recipes.jepo_advantages, reference.jepo_advantages, _grouped),
    "igpo_gain": Case(recipes.igpo_gain, reference.igpo_gain, _turns, law=_gains_telescope),
    "p2s": Case(recipes.p2s, reference.p2s, _steps),
    "p2s, malformed": Case(recipes.p2s, reference.p2s, partial(_steps, formed=True), {"steepness": 0.0}),
    "darl": Case(recipes.darl, reference.darl, _two_answers, {"gamma": 1.5, "diversity": 0.5}),
    "sar": Case(recipes.sar, reference.sar, partial(_sar, rewards=True)),
    "sar, alone": Case(recipes.sar, reference.sar, _sar, {"weight": 1.0}),
    "cdr": Case(recipes.cdr, reference.cdr, _cdr),
    "cdr, per token": Case(recipes.cdr, reference.cdr, _cdr, {"per_token": True}),
    "prompt_echo": Case(recipes.prompt_echo, reference.prompt_echo, partial(_answers, of="prompt")),
    "flr": Case(recipes.flr, reference.flr, _follow_ups),
    "rlpt": Case(recipes.rlpt, reference.rlpt, _verdicts),
    "rlpt, soft": Case(recipes.rlpt, reference.rlpt, _verdicts, {"soft": True}),
}
MARKS = {
    "likelihood_reward": "paper",
    "jepo_advantages": "paper",
    "p2s": "reconstructed",
    "darl": "reconstructed",
    "prompt_echo": "reconstructed",
    "rlpt": "reconstructed",
}
