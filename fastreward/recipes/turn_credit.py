"""Credit of turns: what each turn of a dialogue, or each call of a tool, was worth.

Turns are segments of the response, from `fastreward.segment_ids`. Recipes return advantages per token, [B, T], which
are the same on all tokens of a turn, 0 elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.groups import GroupIds, Groups
from fastreward.group import group_advantages
from fastreward.recipes._catalogue.registry import recipe
from fastreward.segments import scatter_rewards

__all__ = ["turn_baseline"]


@recipe(
    "Returns from a turn on, against those of the other responses",
    "J. Schulman et al., High-dimensional continuous control (arxiv.org/abs/1506.02438), with RLOO's baseline",
    reconstructed="policy gradient with a baseline that does not depend on the response itself",
    passes=("group_ids",),
)
def turn_baseline(
    turn_rewards: Tensor,
    segment_ids: Tensor,
    group_ids: GroupIds | None = None,
    *,
    group_size: int | None = None,
    gamma: float = 1.0,
) -> Tensor:
    """A = G_k - mean of G_k over the other responses to the prompt, G_k = r_k + gamma G_{k+1}, 0 of an ended one.

    Unbiased where the policy decides when to stop: the baseline is made of other responses only, all of them, however
    many turns they have. Normalising over "turn k of every response" is not: the baseline is then taken only from
    responses that go on, and so the number of turns itself carries reward.

    Args:
        turn_rewards: [B, S], finite; NaN = no reward. What lies beyond a response's last turn does not count.
        segment_ids: integers [B, T] in [-1, S): the turn of each token, numbered from 0 in each response; -1 = none.
        gamma: discount per turn.
    """
    rewards = check.constant("turn_rewards", check.reals("turn_rewards", turn_rewards))
    check.integers("segment_ids", segment_ids)
    if rewards.ndim != 2 or segment_ids.ndim != 2 or rewards.shape[0] != segment_ids.shape[0]:
        raise ValueError(
            f"turn_rewards, segment_ids: expected shapes [B, S] and [B, T], got {list(rewards.shape)} and "
            f"{list(segment_ids.shape)}"
        )
    gamma = check.not_negative("gamma", gamma)
    count, turns = rewards.shape
    numbers = torch.arange(turns, device=rewards.device)
    last = segment_ids.amax(-1, keepdim=True) if segment_ids.shape[1] else segment_ids.new_full((count, 1), -1)
    reached = (numbers <= last) & ~rewards.isnan()
    if check.values_checked(rewards):
        check.every("turn_rewards", rewards.isfinite() | ~reached, rewards, "finite numbers, or NaN for no reward")
    returns = torch.where(reached, rewards, 0.0).double()
    for k in range(turns - 2, -1, -1):
        returns[:, k] += gamma * returns[:, k + 1]
    prompts = Groups(group_ids) if group_ids is not None else Groups(group_size=group_size, count=count)
    advantages = group_advantages(
        returns, Groups.by(prompts, numbers.expand(count, turns)), center="leave-one-out", scale="none", singleton="raw"
    )
    return scatter_rewards(advantages, segment_ids, place="broadcast")
