"""Credit of an agent's turns: the plain estimators on turns, and judges of tool calls, steps and checklists.

Turns, segment_ids, group_ids and cu_seqlens as at the head of `fastreward.recipes.turn_credit`.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.groups import GroupIds, Groups
from fastreward._arguments.numbers import Number, number
from fastreward.group_statistics import group_statistics
from fastreward.recipes._catalogue.registry import recipe
from fastreward.recipes._shared.groups import finite_or_nan, prompts
from fastreward.recipes._shared.tokens import token_values
from fastreward.recipes._shared.turns import Norm, Turns, against, over_row, scores, turns_of
from fastreward.returns import gae
from fastreward.segments import scatter_rewards, segment_reduce
from fastreward.whiten import whiten

__all__ = [
    "cm2",
    "multi_turn_grpo",
    "multi_turn_ppo",
    "multi_turn_rloo",
    "scope",
    "trm",
]

Level = Literal["response", "turn"]


# ------------------------------------------------------------------------------------------------- the multi-turn guide
_GUIDE = "arXiv 2510.01132"


@recipe(
    "PPO of several turns (the practitioner's guide)",
    _GUIDE,
    code="pearls-lab/meow-tea-taro core_algos.py; level turn is Turn-PPO's, from its abstract",
)
def multi_turn_ppo(
    turn_rewards: Tensor,
    values: Tensor,
    segment_ids: Tensor,
    *,
    level: Literal["token", "turn"] = "token",
    gamma: Number = 1.0,
    lam: Number = 1.0,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """A = GAE(gamma, lam) of rewards at the turns' last tokens, whitened; what lies between turns is skipped.

    level "turn": a turn is one action. GAE is over turns, with the value of each turn's first token, and whitened over
    the tokens.

    Args:
        turn_rewards: [B, S], NaN = none.
        values: in the shape of segment_ids, of the critic; its returns are those of `fastreward.gae`.
        segment_ids, cu_seqlens: as at the head of `fastreward.recipes.turn_credit`.
        level: as above.
        gamma, lam: discounts, per token or per turn.
    """
    check.choice("level", level, ("token", "turn"))
    turns, rewards = turns_of("turn_rewards", turn_rewards, segment_ids, cu_seqlens)
    check.shape("values", check.tensor("values", values), segment_ids.shape, "as segment_ids")
    mask = segment_ids >= 0
    if level == "token":
        at_ends = scatter_rewards(rewards, segment_ids, cu_seqlens=cu_seqlens)
        return gae(at_ends, values, mask, gamma=gamma, lam=lam, whiten=True, cu_seqlens=cu_seqlens)[0]
    values = token_values("values", values, mask)
    first = segment_reduce(values, segment_ids, op="first", num_segments=rewards.shape[1], cu_seqlens=cu_seqlens)
    advantages, _ = gae(rewards.nan_to_num(0.0), first, turns.there, gamma=gamma, lam=lam)
    return whiten(turns.tokens(advantages), mask)


@recipe(
    "GRPO of several turns (the practitioner's guide)",
    _GUIDE,
    code="pearls-lab/meow-tea-taro core_algos.py `compute_grpo_multi_outcome_advantage`; level turn is ours",
    passes=("group_ids",),
)
def multi_turn_grpo(
    turn_rewards: Tensor,
    segment_ids: Tensor,
    group_ids: GroupIds | None = None,
    *,
    group_size: int | None = None,
    level: Level = "response",
    token_weighted: bool = True,
    norm: Norm = "mean",
    gamma: Number = 1.0,
    eps: Number = 1e-6,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """A = G - mean of G, weighted by the responses' tokens, G = sum of the rewards of all turns.

    token_weighted False: the plain mean. norm "mean-std": over std + eps. A response alone gets 0. level "turn": G_k =
    r_k + gamma G_{k+1}, against turn k of the responses that have one. As the mean has the response itself in it, turns
    that few reach get less, (n - 1) / n of n; and, weighted by tokens, it moves with when the response itself stops.

    Args:
        turn_rewards: [B, S], NaN = none.
        segment_ids, group_ids, group_size, cu_seqlens: as at the head of `fastreward.recipes.turn_credit`.
        level, token_weighted, norm, eps: as above.
        gamma: discount per turn, of level "turn".
    """
    turns, rewards = turns_of("turn_rewards", turn_rewards, segment_ids, cu_seqlens)
    lengths = turns.lengths().sum(-1)
    x, groups = _at_level(level, turns, rewards, prompts(group_ids, group_size, len(rewards)), gamma)
    weighted = check.flag("token_weighted", token_weighted)
    options: dict[str, Any] = {
        "center": "length-weighted" if weighted else "mean",
        "lengths": (lengths if x.ndim == 1 else lengths.unsqueeze(-1).expand(x.shape)) if weighted else None,
    }
    found = against(x, groups, norm, eps, singleton="zero", **options)
    return turns.tokens(found if x.ndim == 2 else turns.on_turns(found))


@recipe(
    "RLOO of several turns (the practitioner's guide)",
    _GUIDE,
    code="pearls-lab/meow-tea-taro core_algos.py; level turn is ours",
    passes=("group_ids",),
)
def multi_turn_rloo(
    turn_rewards: Tensor,
    segment_ids: Tensor,
    group_ids: GroupIds | None = None,
    *,
    group_size: int | None = None,
    level: Level = "response",
    gamma: Number = 1.0,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """A = G - mean of G of the other responses, G = sum of the rewards of all turns.

    A response alone keeps G. level "turn": G_k = r_k + gamma G_{k+1}, against turn k of the others that have one. Both
    are unbiased, also where the policy decides when to stop; `turn_baseline` counts those that have none as 0.

    Args:
        turn_rewards: [B, S], NaN = none.
        segment_ids, group_ids, group_size, cu_seqlens: as at the head of `fastreward.recipes.turn_credit`.
        level: as above.
        gamma: discount per turn, of level "turn".
    """
    turns, rewards = turns_of("turn_rewards", turn_rewards, segment_ids, cu_seqlens)
    x, groups = _at_level(level, turns, rewards, prompts(group_ids, group_size, len(rewards)), gamma)
    found = against(x, groups, "mean", 0.0, singleton="raw", center="leave-one-out")
    return turns.tokens(found if x.ndim == 2 else turns.on_turns(found))


def _at_level(level: Level, turns: Turns, rewards: Tensor, groups: Groups, gamma: Number) -> tuple[Tensor, Groups]:
    """Returns of responses [B], or from each turn on [B, S], and their groups."""
    check.choice("level", level, ("response", "turn"))
    if level == "response":
        return over_row(rewards, "sum"), groups
    return turns.returns(rewards, gamma), Groups.by(groups, turns.number)


# ------------------------------------------------------------------------------------------------- judged turns
@recipe(
    "TRM (a reward model of tool calls)",
    "Empowering LLM tool invocation with tool-call reward model (ICLR 2026), openreview.net/forum?id=LnBEASInVr",
    reconstructed="the abstract: a reward model's scores at turn level, beside the outcome; the norms are ours",
    passes=("group_ids",),
)
def trm(
    turn_rewards: Tensor,
    segment_ids: Tensor,
    rewards: Tensor,
    group_ids: GroupIds | None = None,
    *,
    group_size: int | None = None,
    weight: Number = 1.0,
    norm: Norm = "mean-std",
    eps: Number = 1e-6,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """A = norm of R over the responses + weight norm of r_k over all tool calls of the group, once, not summed up.

    norm "mean-std": (x - mean) / (std + eps); "mean": x - mean. Alone: 0. As scores are not summed over turns, calling
    fewer tools saves no penalty.

    Args:
        turn_rewards: [B, S], the reward model's, of a turn's tool call; NaN = no call, as of the answer: only R counts.
        segment_ids, group_ids, group_size, cu_seqlens: as at the head of `fastreward.recipes.turn_credit`.
        rewards: [B], of the outcomes; NaN = not scored.
        weight, norm, eps: as above.
    """
    turns, own = turns_of("turn_rewards", turn_rewards, segment_ids, cu_seqlens)
    groups = prompts(group_ids, group_size, len(own))
    outcome = against(turns.outcomes("rewards", rewards), groups, norm, eps, singleton="zero")
    call = against(own, turns.of_prompts(groups), norm, eps, singleton="zero")
    return turns.tokens(outcome.unsqueeze(-1) + number("weight", weight, own, check.finite) * call)


@recipe(
    "SCOPE (step-wise correction for on-policy exploration), its credit",
    "arXiv 2602.24110",
    reconstructed="the abstract: steps before the first wrong one are not to blame; the method also regenerates it",
    passes=("group_ids",),
)
def scope(
    turn_scores: Tensor,
    segment_ids: Tensor,
    rewards: Tensor,
    group_ids: GroupIds | None = None,
    *,
    group_size: int | None = None,
    threshold: Number = 0.5,
    blame: Number = 0.0,
    eps: Number = 1e-6,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """A = (R - mean) / (std + eps); where it is below 0, times blame before the first step with score < threshold.

    A response in which no step is wrong keeps A everywhere; one alone in its group gets 0.

    Args:
        turn_scores: [B, S], a process reward model's; NaN = not scored, not wrong.
        segment_ids, group_ids, group_size, cu_seqlens: as at the head of `fastreward.recipes.turn_credit`.
        rewards: [B], of the outcomes; NaN = not scored.
        threshold, blame, eps: as in the formula.
    """
    turns, own = turns_of("turn_scores", turn_scores, segment_ids, cu_seqlens)
    groups = prompts(group_ids, group_size, len(own))
    outcome = against(turns.outcomes("rewards", rewards), groups, "mean-std", eps, singleton="zero").unsqueeze(-1)
    wrong = own < number("threshold", threshold, own, check.finite)  # never of NaN
    spared = wrong.any(-1, keepdim=True) & (wrong.cumsum(-1) == 0) & (outcome < 0)
    blame = number("blame", blame, own, check.finite)
    return turns.tokens(torch.where(spared, outcome * blame, outcome.expand(own.shape)))


@recipe(
    "CM2 (checklist rewards)",
    "arXiv 2602.12268",
    code="namezhenzhang/CM2-RLCR-Tool-Agent checklist.py, reward_level step",
    passes=("open_criteria=open_criteria", "group_ids=group_ids"),
    settings={"min_scores": 2},
)
def cm2(
    criteria: Tensor,
    segment_ids: Tensor,
    *,
    open_criteria: Tensor,
    weights: Tensor | None = None,
    group_ids: GroupIds | None = None,
    group_size: int | None = None,
    min_scores: int = 5,
    normalize: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """A_k = sum over criteria c that are open at step k of w_c (x_c - mean of x_c over the responses).

    A criterion that fewer than min_scores responses have a score for counts nothing.

    Args:
        criteria: [B, C], 1 where the response meets the criterion in its turn, else 0, or eta^delay in (0, 1] after
            `delay` idle steps (the code's eta is 1); NaN = it never came up. Responses to a prompt share their
            criteria.
        segment_ids, group_ids, group_size, cu_seqlens: as at the head of `fastreward.recipes.turn_credit`; of steps.
        open_criteria: [B, S, C], nonzero = at this step the criterion is not met yet, and those that it depends on are.
            For whole turns as segments: the criteria of the turn.
        weights: [B, C], which sum to 1 over a turn's criteria; default 1.
        min_scores: as above.
        normalize: divides by the sum of w_c.
    """
    is_open = check.constant("open_criteria", check.tensor("open_criteria", open_criteria))
    if is_open.ndim != 3:
        raise ValueError(f"open_criteria: expected shape [B, S, C], got {list(is_open.shape)}")
    turns = Turns.of(segment_ids, is_open.shape[1], cu_seqlens)
    x = scores("criteria", criteria, turns.there)
    check.shape("open_criteria", is_open, (*turns.there.shape, x.shape[1]), "[B, S, C]")
    check.same_device("open_criteria", is_open, "criteria", x)
    numbers = torch.arange(x.shape[1], device=x.device).expand(x.shape)
    groups = Groups.by(prompts(group_ids, group_size, len(x)), numbers)
    count = group_statistics(x, groups, ("count",))["count"]
    enough = count >= check.whole("min_scores", min_scores, "responses with a score")
    weights = torch.ones_like(x) if weights is None else finite_or_nan("weights", weights).float()
    check.shape("weights", weights, x.shape, "as criteria")
    found = torch.where(enough, weights * against(x, groups, "mean", 0.0, singleton="zero"), 0.0)
    applies = (is_open != 0).double()
    advantages = (applies @ found.double().unsqueeze(-1)).squeeze(-1)
    if check.flag("normalize", normalize):
        total = (applies @ torch.where(x.isnan(), 0.0, weights).double().unsqueeze(-1)).squeeze(-1)
        advantages = torch.where(total != 0, advantages / total, 0.0)
    return turns.tokens(advantages.float())
