"""Credit of steps."""

from __future__ import annotations

import random
from functools import partial

import torch
from reference_credit import steps as reference
from torch import Tensor

from credit_cases.case import (
    COLUMNS,
    ROWS,
    Arguments,
    Case,
    floats,
    groups,
    logprobs,
    rollout_mask,
    scores,
    segments,
)
from fastreward import recipes

STEPS = COLUMNS + 1  # at most one step per token; the last is in no response


def _steps(rng: random.Random, name: str, *, grouped: bool = True, nan: bool = True, rewards: bool = True) -> Arguments:
    """Scores [8, 7] of which NaN are those of steps that are not there."""
    mask = rollout_mask(rng)
    ids = segments(rng, mask)
    there = torch.stack([(ids == k).any(1) for k in range(STEPS)], 1)
    arguments = {name: floats(rng, ROWS, STEPS).masked_fill(~there, torch.nan), "segment_ids": ids, "mask": mask}
    more = {"rewards": scores(rng, nan=nan)} if rewards else {}
    return {**arguments, **more, **({"group_ids": groups(rng)} if grouped else {})}


_scores = partial(_steps, name="step_scores")
_values = partial(_steps, name="step_values", grouped=False)


def _plateaus(rng: random.Random) -> Arguments:
    """Values of which many follow each other without a change."""
    arguments = _values(rng)
    return {**arguments, "step_values": (arguments["step_values"] > 0.5).float()}


def _verdicts(rng: random.Random) -> Arguments:
    arguments = _steps(rng, "verdicts")
    return {**arguments, "verdicts": arguments["verdicts"] > 0}


def _right_or_wrong(rng: random.Random) -> Arguments:
    """Rewards 1 and -1."""
    arguments = _verdicts(rng)
    return {**arguments, "rewards": 2 * scores(rng, binary=True) - 1}


def _models(rng: random.Random, ref: bool = True) -> Arguments:
    mask = rollout_mask(rng)
    names = ("rm_logprobs", "ref_logprobs") if ref else ("rm_logprobs",)
    found = {**{name: logprobs(rng, mask) for name in names}, "segment_ids": segments(rng, mask), "mask": mask}
    return {**found, "num_segments": STEPS}


def _unsure(rng: random.Random, start: bool = False) -> Arguments:
    arguments = _values(rng)
    old = floats(rng, low=-0.3, high=0.0, mask=arguments["mask"])
    return {**arguments, "old_logprobs": old, **({"start_values": floats(rng)} if start else {})}


def _not_estimated(rng: random.Random) -> Arguments:
    arguments = _values(rng)
    values = arguments["step_values"]
    return {**arguments, "step_values": values.masked_fill(floats(rng, ROWS, STEPS) > 0.6, torch.nan)}


def _own(rng: random.Random) -> Arguments:
    mask = rollout_mask(rng)
    return {"old_logprobs": floats(rng, low=-0.3, high=0.0, mask=mask), "mask": mask}


def _probes(rng: random.Random) -> Arguments:
    arguments = _steps(rng, "accuracies")
    return {
        **arguments,
        "accuracies": arguments["accuracies"].abs().sqrt(),
        "confidences": floats(rng, ROWS, STEPS, low=0.3),
    }


def _several(rng: random.Random, kinds: int = 3) -> Arguments:
    mask = rollout_mask(rng)
    found = {name: floats(rng, low=-1.0, mask=mask) for name in ("values", "old_logprobs", "ref_logprobs")}
    for kind in ("relevance", "factuality")[:kinds]:
        found |= {kind: floats(rng, ROWS, STEPS) > 0, f"{kind}_ids": segments(rng, mask)}
    return {**found, "mask": mask, **({"completeness": floats(rng)} if kinds > 2 else {})}


def _telescopes(arguments: Arguments, result: Tensor) -> None:
    """Over the steps to R - V_0; each token has its step's."""
    for b, reward in enumerate(arguments["rewards"].tolist()):
        ids = arguments["segment_ids"][b]
        steps = sorted({int(k) for k in ids if k >= 0})
        if steps and reward == reward:
            total = sum(result[b][ids == k][0] for k in steps)
            torch.testing.assert_close(total, reward - arguments["step_values"][b][steps[0]])


def _bounded(arguments: Arguments, result: Tensor) -> None:
    """The sum of a response's rewards is the clipped score of its first step, where it has another one."""
    for b in range(ROWS):
        ids = arguments["segment_ids"][b]
        clipped = (arguments["step_scores"][b] - arguments["eta"]).clamp(max=0.0)
        first = clipped[0] if (ids > 0).any() else torch.zeros(())
        torch.testing.assert_close(result[b].sum(), first)


_pure = partial(Case, recipes.pure, reference.pure, _scores, unmoved_by_shift=("rewards",))
_verl = partial(Case, recipes.pure_verl, reference.pure_verl, _scores)
_without_outcome = partial(_scores, rewards=False)
_clip = partial(_scores, grouped=False)
CASES = {
    # rewards
    "implicit_prm": Case(recipes.implicit_prm, reference.implicit_prm, _models, {"coef": 0.1}),
    "implicit_prm, accumulative": Case(
        recipes.implicit_prm, reference.implicit_prm, partial(_models, ref=False), {"form": "accumulative"}
    ),
    **{
        f"implicit_prm_score, {op}": Case(
            recipes.implicit_prm_score, reference.implicit_prm_score, _models, {"op": op, "coef": 0.1, "form": form}
        )
        for op, form in (("min", "single"), ("mean", "accumulative"), ("sum", "single"))
    },
    "clip_delta": Case(
        recipes.clip_delta, reference.clip_delta, partial(_clip, rewards=False), {"eta": 0.3}, law=_bounded
    ),
    "clip_delta, clip": Case(recipes.clip_delta, reference.clip_delta, _clip, {"eta": 0.5, "mode": "clip"}),
    "clip_delta, delta": Case(
        recipes.clip_delta, reference.clip_delta, _clip, {"eta": 0.5, "mode": "delta", "alpha": 2.0}
    ),
    "ppr": Case(recipes.ppr, reference.ppr, _clip),
    "g_ra": Case(recipes.g_ra, reference.g_ra, _clip, {"threshold": 0.5}),
    "vsrm": Case(recipes.vsrm, reference.vsrm, _plateaus),
    "vsrm, short": Case(recipes.vsrm, reference.vsrm, _plateaus, {"horizon": 1, "decay": 0.5}),
    "lare": Case(recipes.lare, reference.lare, partial(_clip, rewards=False)),
    "lare, as it is": Case(recipes.lare, reference.lare, partial(_clip, rewards=False), {"per_step": False}),
    "lare, uniform": Case(
        recipes.lare,
        reference.lare,
        lambda rng: {k: v for k, v in _clip(rng).items() if k != "step_scores"},
        {"num_segments": STEPS},
    ),
    # advantages
    "pure": _pure(),
    "pure, step": _pure({"baseline": "step", "keep_ends": True, "temperature": 0.5}),
    "pure, even": _pure({"weighted": False, "outcome_coef": 0.5}),
    "pure, no outcome": Case(recipes.pure, reference.pure, _without_outcome, {"keep_ends": True}),
    "pure_verl": _verl(),
    "pure_verl, released": _verl({"capped": True, "columns": 6.0, "whiten": True}, of_the_batch=True, tolerance=1e-5),
    "pure_verl, sum": _verl({"form": "sum", "outcome_coef": 2.0}),
    "pure_verl, no outcome": Case(recipes.pure_verl, reference.pure_verl, _without_outcome),
    "tp_grpo": Case(recipes.tp_grpo, reference.tp_grpo, _right_or_wrong, {"alpha": 0.5}),
    "tp_grpo, not all": Case(recipes.tp_grpo, reference.tp_grpo, _verdicts),
    "spark": Case(recipes.spark, reference.spark, _verdicts, unmoved_by_shift=("rewards",)),
    "spark, augmented": Case(recipes.spark, reference.spark, _verdicts, {"variant": "augmented"}),
    "fine_grained_rlhf": Case(
        recipes.fine_grained_rlhf, reference.fine_grained_rlhf, _several, of_the_batch=True, tolerance=1e-5
    ),
    "fine_grained_rlhf, by the std": Case(
        recipes.fine_grained_rlhf,
        reference.fine_grained_rlhf,
        partial(_several, kinds=1),
        {"by_root_of_std": False, "gamma": 0.9},
        of_the_batch=True,
        tolerance=1e-5,
    ),
    # values
    "spo_chain": Case(recipes.spo_chain, reference.spo_chain, _unsure, of_the_batch=True, tolerance=1e-5),
    "spo_chain, start": Case(
        recipes.spo_chain, reference.spo_chain, partial(_unsure, start=True), {"whiten": False, "prob_threshold": 0.8}
    ),
    "spo_chain, all sure": Case(
        recipes.spo_chain, reference.spo_chain, _unsure, {"prob_threshold": 0.5}, of_the_batch=True
    ),
    "spo_mask": Case(recipes.spo_mask, reference.spo_mask, _own),
    "spo_cuts": Case(recipes.spo_cuts, reference.spo_cuts, _own, {"interval": 2}),
    "spo_cuts, every one": Case(recipes.spo_cuts, reference.spo_cuts, _own, {"interval": 1, "prob_threshold": 0.8}),
    "vine_ppo": Case(recipes.vine_ppo, reference.vine_ppo, _values, law=_telescopes),
    "vine_ppo, not all": Case(recipes.vine_ppo, reference.vine_ppo, _not_estimated),
    "spae": Case(
        recipes.spae, reference.spae, _probes, of_the_batch=True, unmoved_by_shift=("rewards",), tolerance=1e-5
    ),
    "spae, as it is": Case(
        recipes.spae, reference.spae, _probes, {"whiten": False, "saturation": 0.4}, of_the_batch=True
    ),
}
MARKS = {
    "clip_delta": "note",
    "ppr": "reconstructed",
    "g_ra": "note",
    "tp_grpo": "note",
    "spark": "note",
    "spae": "note",
}
