"""Group advantages from other baselines and from comparisons, rewards that need the group, selections."""

from __future__ import annotations

import random
from typing import Any

import torch
from reference_credit import group_baseline as baseline
from reference_credit import group_pairwise as pairwise
from reference_credit import group_rewards as shaped
from reference_credit import group_selection as selection
from torch import Tensor

import fastreward as fr
from credit_cases.case import COLUMNS, ROWS, Arguments, Case, floats, groups, logprobs, rollout_mask, scores, segments
from fastreward import recipes

NAN = float("nan")


def _with_nan(x: Tensor, rng: random.Random, count: int = 2) -> Tensor:
    """`x` with a few numbers that are not there."""
    flat = x.flatten()
    flat[rng.sample(range(len(flat)), count)] = NAN
    return flat.view(x.shape)


def _scored(rng: random.Random, *, binary: bool = False, **more: Any) -> Arguments:
    return {"rewards": scores(rng, binary=binary, nan=True), "group_ids": groups(rng), **more}


def _distinct(rng: random.Random) -> Tensor:
    """[B], no two alike, two not there."""
    return _with_nan(floats(rng, ROWS), rng)


def _flags(rng: random.Random) -> Tensor:
    return torch.tensor([rng.random() < 0.5 for _ in range(ROWS)])


def _signals(rng: random.Random) -> Arguments:
    """Three of each response, a few not there; one response without any."""
    signals = _with_nan(floats(rng, ROWS, 3), rng, 3)
    signals[rng.randrange(ROWS)] = NAN
    return {"signals": signals, "group_ids": groups(rng)}


def _whole(rng: random.Random, below: int) -> Tensor:
    return torch.tensor([rng.randrange(below) for _ in range(ROWS)])


def _results(rng: random.Random) -> Tensor:
    """[B, 3] of 0, 0.5 and 1; a row without any."""
    results = torch.tensor([[rng.randrange(3) / 2 for _ in range(3)] for _ in range(ROWS)])
    results = _with_nan(results, rng, 4)
    results[rng.randrange(ROWS)] = NAN
    return results


# ----------------------------------------------------------------------------------------------------- other baselines
def _tokens(rng: random.Random) -> Arguments:
    mask = rollout_mask(rng)
    lp = logprobs(rng, mask)
    return {
        "token_rewards": floats(rng, mask=mask),
        "old_logprobs": lp,
        "log_sum_sq_probs": lp * floats(rng, low=0.3, high=1.9, mask=mask),
        "mask": mask,
        "group_ids": groups(rng),
    }


def _weighted_tokens(rng: random.Random) -> Arguments:
    arguments = _tokens(rng)
    return {**arguments, "weights": floats(rng, low=0.5, high=2.0, mask=arguments["mask"])}


def _tests(rng: random.Random) -> Arguments:
    ids = segments(rng, rollout_mask(rng))
    passed = torch.tensor(
        [[[float(rng.random() < 0.5) for _ in range(3)] for _ in range(COLUMNS + 1)] for _ in range(ROWS)]
    )
    for b, last in enumerate(ids.amax(1).tolist()):
        passed[b, max(last + 1, 1) :] = NAN
    return {"passed": passed, **_scored(rng), "segment_ids": ids}


def _bundles(rng: random.Random) -> Arguments:
    return _scored(rng, bundle_ids=rng.sample("xxxyyzzz", ROWS))


def _played(rng: random.Random) -> Arguments:
    return {"rewards": scores(rng, nan=True), "roles": _whole(rng, 2)}


def _proposed(rng: random.Random) -> Arguments:
    return _scored(rng, roles=_whole(rng, 2), problem_ids=_whole(rng, 3) - 1)


def _answered(rng: random.Random) -> Arguments:
    return _scored(rng, binary=True, answers=[rng.choice("pqr") for _ in range(ROWS)])


def _difficulty(rng: random.Random) -> Arguments:
    return _scored(rng, hardness=floats(rng, ROWS), reward_gaps=_distinct(rng))


# -------------------------------------------------------------------------------------------------------- comparisons
def _won(rng: random.Random) -> Arguments:
    return {"wins": _results(rng), "group_ids": groups(rng)}


def _swiss(rng: random.Random) -> Arguments:
    return {"wins": _whole(rng, 3) / 2, "tie_breaks": _whole(rng, 3) / 2, "group_ids": groups(rng)}


def _ties_share_the_better_place(arguments: Arguments, result: Tensor) -> None:
    places = fr.group_advantages(torch.tensor([1.0, 2 / 3, 2 / 3, 0.0]), group_size=4)
    torch.testing.assert_close(recipes.arena_rl(torch.tensor([3.0, 1.5, 1.5, 0.0]), group_size=4), places)


def _rated(rng: random.Random) -> Arguments:
    return {"comparisons": _results(rng), "group_ids": groups(rng)}


def _rated_and_scored(rng: random.Random) -> Arguments:
    return {
        **_rated(rng),
        "rewards": _with_nan(floats(rng, ROWS, 2), rng),
        "component_weights": torch.tensor([1, 9, -2]),
    }


def _differences(rng: random.Random) -> Arguments:
    d = _with_nan(torch.tensor([[float(rng.randrange(-3, 4)) for _ in range(4)] for _ in range(ROWS)]), rng, 6)
    d[rng.randrange(ROWS)] = NAN
    return {"differences": d, "group_ids": groups(rng)}


def _grpo_of_differences(arguments: Arguments, result: Tensor) -> None:
    """Of rewards' differences it is GRPO's advantage, with eps inside the root."""
    rewards, labels = torch.arange(8.0).square(), list("aaabbbbb")
    same = torch.tensor([[g == h for h in labels] for g in labels])
    d = torch.where(same, rewards[:, None] - rewards, NAN)
    want = fr.group_advantages(rewards, labels, eps_inside=True)
    torch.testing.assert_close(recipes.think_rm(d, labels), want, rtol=1e-5, atol=1e-6)


def _rubric(rng: random.Random) -> Arguments:
    d = torch.tensor([[float(rng.randrange(-3, 4)) for _ in range(4)] for _ in range(ROWS)])
    d[2, 1:] = torch.tensor([NAN, 0.0, 0.0])
    return {
        "criteria": d,
        "criterion_weights": torch.tensor([5.0, 2.0, 1.0, 5.0]),
        "critical": torch.tensor([False, False, False, True]),
        "verified": torch.tensor([0.0, 0.0, NAN, 1.0, 0.0, -1.0, 0.0, 0.0]),
    }


def _votes(rng: random.Random) -> Arguments:
    votes = _with_nan(
        torch.tensor([[rng.choice([-1.0, 0.0, 1.0, 1.0]) for _ in range(2)] for _ in range(ROWS)]), rng, 4
    )
    return {"votes": votes, "reference": _flags(rng)}


# ------------------------------------------------------------------------------------------------- rewards, selections
def _thought(rng: random.Random) -> Arguments:
    return {**_scored(rng), "rewards": _with_nan(_whole(rng, 11) / 10, rng), "thinking_rewards": _whole(rng, 11) / 10}


def _sampled(rng: random.Random) -> Arguments:
    mask = rollout_mask(rng)
    return _scored(rng, old_logprobs=logprobs(rng, mask), mask=mask)


def _questions(rng: random.Random) -> Arguments:
    forms = groups(rng)
    other = {"a": "b", "b": "a", "c": "nowhere"}
    answers = [rng.choice(["p", "q", None]) for _ in range(ROWS)]
    return {"answers": answers, "group_ids": forms, "partner_ids": [other[form] for form in forms]}


def _meant(rng: random.Random) -> Arguments:
    return _scored(rng, semantic_rewards=_distinct(rng))


def _sentences(rng: random.Random) -> Arguments:
    image = _with_nan(floats(rng, ROWS, 3), rng, 5)
    image[rng.randrange(ROWS)] = NAN
    return {"image_scores": image, "text_scores": torch.where(image.isnan(), NAN, floats(rng, ROWS, 3))}


def _ordered(rng: random.Random) -> Arguments:
    return {"rewards": _distinct(rng), "group_ids": groups(rng)}


def _processed(rng: random.Random) -> Arguments:
    return _scored(rng, binary=True, process_rewards=floats(rng, ROWS))


def _histories(rng: random.Random) -> Arguments:
    return {"losses": floats(rng, 3, 7, low=0.5, high=2.0), "objectives": _whole(rng, 3), "window": 3}


def _advantages(rng: random.Random) -> Arguments:
    mask = rollout_mask(rng)
    advantages = floats(rng, mask=mask)
    advantages[mask & (floats(rng, *mask.shape) > 0.9)] = 20.0
    return {"advantages": advantages, "mask": mask}


MARKS = {
    "armed": "reconstructed", "brpo": "note", "copo": "note", "grpo_s": "note", "heron": "reconstructed",
    "noise_correction": "paper",
    "prof": "note", "raft_selection": "reconstructed", "recap": "note", "verpo": "note",
    "weighted_grpo": "reconstructed",
}  # fmt: skip
_SCALE: dict[str, tuple[str, ...]] = {"scales_with": ("rewards",)}
CASES = {
    "otb": Case(recipes.otb, baseline.otb, _tokens, scales_with=("token_rewards",)),
    "otb, by tokens": Case(recipes.otb, baseline.otb, _weighted_tokens, {"positions": "token"}),
    "verpo": Case(recipes.verpo, baseline.verpo, _tests),
    "riskpo": Case(recipes.riskpo, baseline.riskpo, _bundles, of_the_batch=True),
    "riskpo, std": Case(
        recipes.riskpo, baseline.riskpo, _bundles, {"credit": "std", "normalized": True}, of_the_batch=True
    ),
    "riskpo, score": Case(
        recipes.riskpo,
        baseline.riskpo,
        _bundles,
        {"credit": "score", "quantiles": torch.tensor([0.0, 1.5]), "weight": 0.0},
        of_the_batch=True,
    ),
    "rae": Case(recipes.rae, baseline.rae, _played, rows_matter=True, scales_with=("rewards",)),
    "rae, after": Case(recipes.rae, baseline.rae, _played, {"when": "after", "decay": 0.5}, rows_matter=True),
    "hierarchical_grpo": Case(recipes.hierarchical_grpo, baseline.hierarchical_grpo, _proposed, **_SCALE),
    "copo": Case(recipes.copo, baseline.copo, _answered, {"rho": 0.6}, of_the_batch=True),
    "grpo_s": Case(
        recipes.grpo_s, baseline.grpo_s, _difficulty, {"category_ids": list("uvuvuvuv")}, of_the_batch=True
    ),
    "weighted_grpo": Case(
        recipes.weighted_grpo,
        baseline.weighted_grpo,
        lambda rng: _scored(rng, binary=True, easy=_flags(rng)),
        {"success": 2.0, "failure": 0.5},
    ),
    "arena_rl": Case(recipes.arena_rl, pairwise.arena_rl, _won, law=_ties_share_the_better_place),
    "arena_rl, elimination": Case(recipes.arena_rl, pairwise.arena_rl, _won, {"tournament": "elimination"}),
    "arena_rl, swiss": Case(recipes.arena_rl, pairwise.arena_rl, _swiss, {"tournament": "swiss"}),
    "pref_grpo": Case(recipes.pref_grpo, pairwise.pref_grpo, _rated),
    "pref_grpo, several": Case(recipes.pref_grpo, pairwise.pref_grpo, _rated_and_scored),
    "think_rm": Case(recipes.think_rm, pairwise.think_rm, _differences, law=_grpo_of_differences),
    "brpo": Case(recipes.brpo, pairwise.brpo, _votes),
    "heron": Case(recipes.heron, pairwise.heron, _signals, unmoved_by_shift=("signals",)),
    "heron, margins": Case(recipes.heron, pairwise.heron, _signals, {"margins": 0.4}),
    "openrs": Case(
        recipes.openrs, pairwise.openrs, _rubric, fixed=(), unmoved_by_scale=("criterion_weights",)
    ),
    "trust_grpo": Case(recipes.trust_grpo, shaped.trust_grpo, _thought, {"step": 100}),
    "unlikeliness": Case(recipes.unlikeliness, shaped.unlikeliness, _sampled, unmoved_by_scale=("rewards",)),
    "fapo": Case(
        recipes.fapo,
        shaped.fapo,
        lambda rng: _scored(rng, binary=True, flawed=_flags(rng)),
        {"penalty": 0.75},
        unmoved_by_scale=("rewards",),
    ),
    **{
        f"noise_correction, {'forward' if forward else 'backward'}": Case(
            recipes.noise_correction,
            shaped.noise_correction,
            lambda rng: _scored(rng, binary=True),
            {"false_positive": 0.1, "false_negative": 0.3, "forward": forward},
            unmoved_by_shift=("rewards",),
            **_SCALE,
        )
        for forward in (False, True)
    },
    "co_reward": Case(recipes.co_reward, shaped.co_reward, _questions, rows_matter=True),
    "armed": Case(recipes.armed, shaped.armed, _meant, {"weight": 0.5}, unmoved_by_scale=("semantic_rewards",)),
    "csr": Case(recipes.csr, shaped.csr, _sentences, scales_with=("image_scores", "text_scores")),
    "raft_selection": Case(recipes.raft_selection, selection.raft_selection, _ordered, {"best": 2, "at_least": -0.5}),
    "prof": Case(recipes.prof, selection.prof, _processed, {"kept": 3}),
    "prof, of two": Case(recipes.prof, selection.prof, _processed, {"kept": 2}),
    "pf_ppo": Case(recipes.pf_ppo, selection.pf_ppo, _ordered, of_the_batch=True),
    **{
        f"pf_ppo, {strategy}": Case(
            recipes.pf_ppo, selection.pf_ppo, _ordered, {"strategy": strategy}, of_the_batch=True
        )
        for strategy in ("max-min", "max-random")
    },
    "dars": Case(recipes.dars, selection.dars, lambda rng: _scored(rng, binary=True)),
    "dars, hardness": Case(
        recipes.dars,
        selection.dars,
        lambda rng: {"rewards": torch.tensor([1.0] + [0.0] * 7), "group_ids": rng.sample("aaaaaabb", ROWS)},
        {"schedule": "hardness", "spread": "std", "max_rollouts": 8},
    ),
    "recap": Case(recipes.recap, selection.recap, _histories, {"mix": 0.25, "temperature": 0.5}),
    "stable_reinforce_filter": Case(
        recipes.stable_reinforce_filter, selection.stable_reinforce_filter, _advantages, {"sigmas": 1.5},
        of_the_batch=True,
    ),
    "stable_reinforce_filter, as in the code": Case(
        recipes.stable_reinforce_filter, selection.stable_reinforce_filter, _advantages,
        {"sigmas": 1.5, "published_code": True}, of_the_batch=True,
    ),
}  # fmt: skip
