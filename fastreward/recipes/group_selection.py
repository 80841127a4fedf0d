"""Which responses are learned from, how much each counts, how many more are drawn: masks, weights and numbers [B].

R = rewards [B], NaN where a response was not scored: it is not kept. group_ids or group_size says which responses are
to the same prompt, as in `fastreward.group_advantages`, to whose mask= a mask goes, and to keep= of the loss.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.groups import GroupIds
from fastreward._arguments.numbers import Number, number
from fastreward.group_statistics import group_statistics
from fastreward.recipes._catalogue.registry import recipe
from fastreward.recipes._shared.groups import beside_rewards, given, prompts
from fastreward.recipes._shared.tokens import on_tokens
from fastreward.whiten import whiten

__all__ = ["dars", "pf_ppo", "prof", "raft_selection", "recap", "stable_reinforce_filter"]

Strategy = Literal["power", "max-min", "max-random"]
Spread = Literal["variance", "std"]
Schedule = Literal["equal", "hardness"]


# --------------------------------------------------------------------------------------------------------------- masks
@recipe(
    "RAFT's selection (best of n)",
    "arXiv 2304.06767",
    reconstructed="commonly known; no code or full text read",
    passes=("group_ids",),
)
def raft_selection(
    rewards: Tensor,
    group_ids: GroupIds | None = None,
    *,
    group_size: int | None = None,
    best: int = 1,
    at_least: float | None = None,
) -> Tensor:
    """keep = is among the `best` highest rewards of its group, of equal ones those that come first.

    at_least: and R is no less. For `recipes.sft(..., keep=keep)`; `recipes.raft` is the loss on a given selection.
    """
    wanted = check.whole("best", best, "responses of a group")
    if wanted < 1:
        raise ValueError(f"best: expected an integer of at least 1, got {best}")
    scored = given("rewards", rewards)
    place = group_statistics(-scored, group_ids, ("rank",), group_size=group_size, ties="ordinal")["rank"]
    keep = place < wanted
    return keep if at_least is None else keep & (scored >= check.finite("at_least", at_least))


@recipe(
    "PROF (process consistency filter)",
    "arXiv 2509.03403",
    note="the README of Chenluye99/PROF; how the numbers are balanced is reconstructed",
    passes=("group_ids",),
    settings={"kept": 1},
)
def prof(
    rewards: Tensor,
    process_rewards: Tensor,
    group_ids: GroupIds | None = None,
    *,
    kept: int,
    group_size: int | None = None,
) -> Tensor:
    """keep = the `kept` of a group that are right by good steps or wrong by bad ones, as many of both as there are.

    Right responses go out from the lowest process reward on, wrong ones from the highest. Of each kind half of `kept`
    stays (of an odd number one more right one), or what there is.

    Args:
        rewards: [B], right where above 0.
        process_rewards: [B], mean over the steps of a process reward model's; it serves for this alone.
        group_ids, group_size: as in `fastreward.group_advantages`.
        kept: responses that stay of each group.
    """
    wanted = check.whole("kept", kept, "responses of a group")
    if wanted < 1:
        raise ValueError(f"kept: expected an integer of at least 1, got {kept}")
    scored = given("rewards", rewards)
    quality = beside_rewards("process_rewards", process_rewards, scored)
    groups = prompts(group_ids, group_size, len(scored))

    def ranked(x: Tensor) -> tuple[Tensor, Tensor]:
        found = group_statistics(x, groups, ("rank", "count"), ties="ordinal")
        return found["rank"], found["count"]

    place_right, right = ranked((-quality).where(scored > 0, torch.nan))
    place_wrong, wrong = ranked(quality.where(scored <= 0, torch.nan))
    stays = torch.maximum(wanted - wrong, torch.full_like(wrong, (wanted + 1) // 2)).minimum(right)
    return (place_right < stays) | (place_wrong < wanted - stays)


# ---------------------------------------------------------------------------------------------------- weights, numbers
@recipe(
    "PF-PPO (policy filtration)",
    "arXiv 2409.06957",
    code="swtheing/PF-PPO-RLHF replay_buffer.py; verl core_algos.py",
    returns="response weights",
    passes=("group_ids",),
)
def pf_ppo(
    rewards: Tensor,
    group_ids: GroupIds | None = None,
    *,
    group_size: int | None = None,
    strategy: Strategy = "power",
    power: float = 2.0,
    eps: float = 1e-8,
) -> Tensor:
    """w = p n / sum of p over the batch of n, p = |R|^power + eps: reward models are reliable at both ends.

    The method draws responses anew, `torch.multinomial(w, n, replacement=True)`; weights= of the loss is what that
    gives on average.

    Args:
        rewards: [B].
        group_ids, group_size: as in `fastreward.group_advantages`; "power" has no use for them.
        strategy: "power"; or p = 1 for the highest and the lowest of each group, 0 between ("max-min"); or 0.4 for the
            highest, 0.1 for each other ("max-random").
        power, eps: as in the formula.
    """
    check.choice("strategy", strategy, get_args(Strategy))
    scored = given("rewards", rewards)
    there = ~scored.isnan()
    if strategy == "power":
        p = scored.double().abs() ** check.positive("power", power) + check.positive("eps", eps)
    else:
        groups = prompts(group_ids, group_size, len(scored))
        found = group_statistics(scored, groups, ("rank", "count"), ties="ordinal")
        best, worst = found["rank"] == found["count"] - 1, found["rank"] == 0
        p = (best | worst).double() if strategy == "max-min" else torch.where(best, 0.4, 0.1).double()
    p = torch.where(there, p, 0.0)
    return (p * (there.sum() / p.sum().clamp(min=torch.finfo(p.dtype).tiny))).float()


@recipe(
    "DARS (difficulty-adaptive rollout sampling)",
    "arXiv 2508.13755",
    code="yangzhch6/DARS ray_dars_trainer.py",
    returns="rollouts",
    passes=("group_ids",),
)
def dars(
    rewards: Tensor,
    group_ids: GroupIds | None = None,
    *,
    group_size: int | None = None,
    schedule: Schedule = "equal",
    spread: Spread = "variance",
    max_rollouts: int = 32,
) -> Tensor:
    """N_more = ceil((peak - N S) / S) where a < 1/2, else 0; S = 2 a (1 - a), peak = N / 2, a = share of right ones.

    As many more responses as bring the sum of |A| over the prompt to what it is at a = 1/2; then `recipes.dr_grpo` over
    all of them, which is 0 for a prompt that is always or never solved.

    Args:
        rewards: [B] of the first N responses to each prompt, right where above 0.
        group_ids, group_size: as in `fastreward.group_advantages`.
        schedule: "equal", or by "hardness": 2 (1 - a) peak in place of peak. Where none is right, a = 1 / (2 N).
        spread: "variance", or "std": S = 2 sqrt(a (1 - a)), peak = N.
        max_rollouts: of a prompt, the first ones among them.

    Returns:
        float32 [B]: how many more to draw for the prompt of each response.
    """
    check.choice("schedule", schedule, get_args(Schedule))
    check.choice("spread", spread, get_args(Spread))
    scored = given("rewards", rewards)
    right = torch.where(scored.isnan(), torch.nan, (scored > 0).double())
    found = group_statistics(right, group_ids, ("count", "mean"), group_size=group_size)
    n = found["count"].double()
    solved = (found["mean"].double() * n).round()
    a = torch.where(solved > 0, solved, 0.5) / n
    s = 2 * a * (1 - a) if spread == "variance" else 2 * (a * (1 - a)).sqrt()
    peak = n / 2 if spread == "variance" else n
    goal = 2 * (1 - a) * peak if schedule == "hardness" else peak
    more = ((goal - n * s) / s).ceil()
    room = (check.whole("max_rollouts", max_rollouts, "responses to a prompt") - n).clamp(min=0)
    return torch.where(a < 0.5, more.clamp(min=0).minimum(room), 0.0).float()


@recipe(
    "RECAP (replay of general tasks with weights)",
    "arXiv 2510.21978",
    note="the README; the normalisation of both scores is reconstructed",
    returns="response weights",
    settings={"window": 2},
)
def recap(
    losses: Tensor,
    objectives: Tensor,
    *,
    window: int = 10,
    temperature: float = 5.0,
    mix: float = 0.5,
    eps: float = 1e-8,
) -> Tensor:
    """w = softmax over k of s_k / temperature, of a response's objective k; s_k = mix c_k + (1 - mix) v_k.

    c = mean of the last `window` losses / mean of the `window` before: what no longer falls counts more. v = std / mean
    of the last: and so does what is restless.

    Args:
        losses: [K, at least 2 window], of each objective (task, reward) at the steps before, the latest last.
        objectives: integers [B] in [0, K): what a response is trained on; torch.arange(K) gives w itself.
        window, temperature, mix: as in the formulas.
        eps: added to the means that are divided by.
    """
    width = check.whole("window", window, "steps")
    history = check.constant("losses", check.reals("losses", losses)).double()
    if history.ndim != 2 or not 1 < width <= history.shape[1] // 2:
        raise ValueError(f"losses: expected shape [K, at least 2 * {width}], window > 1, got {list(history.shape)}")
    if check.values_checked(history):
        check.every("losses", history.isfinite(), history, "finite numbers")
    check.integers("objectives", objectives)
    if check.values_checked(objectives):
        known = (objectives >= 0) & (objectives < len(history))
        check.every("objectives", known, objectives, f"objectives in [0, {len(history)})")
    last, floor = history[:, -width:], check.positive("eps", eps)
    mean = last.mean(-1) + floor
    convergence = mean / (history[:, -2 * width : -width].mean(-1) + floor)
    share = check.not_negative("mix", mix)
    score = share * convergence + (1 - share) * last.std(-1) / mean
    return (score / check.positive("temperature", temperature)).softmax(0).float()[objectives.long()]


# ---------------------------------------------------------------------------------------------------------- advantages
@recipe(
    "StableReinforce's filter of advantages (R1-Reward)",
    "arXiv 2505.02835",
    code="yfzhang114/r1_reward replay_buffer.py",
    returns="advantages",
)
def stable_reinforce_filter(
    advantages: Tensor, mask: Tensor, *, sigmas: Number = 3.0, published_code: bool = False, largest: Number = 10.0
) -> Tensor:
    """A = z where |z| <= sigmas, else 0; z = (A - mean) / sqrt(var + 1e-8) over the tokens of the batch, not unbiased.

    Args:
        advantages: [B], or [B, T] per token.
        mask: [B, T].
        sigmas: as in the formula.
        published_code: True: as in the code, where z must lie within mean +- sigmas, mean that of A before (an
            oversight, it seems), and |z| be at most `largest`.
        largest: see there.

    The loss is `recipes.stable_reinforce`.
    """
    check.tensor("mask", mask)
    tokens = on_tokens("advantages", advantages, "mask", mask, mask).float()
    z = whiten(tokens, mask, ddof=0, eps=1e-8)
    bound = number("sigmas", sigmas, z, check.positive)
    if not check.flag("published_code", published_code):
        return torch.where(z.abs() <= bound, z, 0.0)
    count = (mask != 0).sum().clamp(min=1)
    mean = tokens.double().sum() / count
    kept = ((z - mean).abs() <= bound) & (z.abs() <= number("largest", largest, z, check.positive))
    return torch.where(kept, z, 0.0)
