"""Rewards from likelihoods."""

from __future__ import annotations

import random
from functools import partial

from reference_credit import likelihood as reference

from credit_cases.case import ROWS, Arguments, Case, floats, logprobs, rollout_mask, scores
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
MARKS = {"likelihood_reward": "paper", "darl": "reconstructed", "prompt_echo": "reconstructed", "rlpt": "reconstructed"}
