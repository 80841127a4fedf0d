"""Shared parts of the recipes on groups."""

from __future__ import annotations

import torch
from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.groups import GroupIds, Groups


def prompts(group_ids: GroupIds | None, group_size: int | None, like: Tensor) -> Groups:
    """The groups of B responses, one for each row of `like`, once for several operations."""
    if isinstance(group_ids, Groups) and group_size is None:
        return group_ids
    if (group_ids is None) == (group_size is None):
        raise ValueError("group_ids, group_size: expected exactly one of them")
    return Groups(group_ids, group_size=group_size, count=None if group_size is None else like.shape[0])


def beside_rewards(name: str, x: Tensor, rewards: Tensor) -> Tensor:
    """Real numbers, one for each of the rewards [B], NaN where there is none; a constant."""
    x = check.constant(name, check.rewards(name, x))
    check.shape(name, x, rewards.shape, "as rewards")
    check.same_device(name, x, "rewards", rewards)
    return x


def truths(name: str, x: Tensor, rewards: Tensor) -> Tensor:
    """bool [B], from truth values or numbers."""
    check.shape(name, check.tensor(name, x), rewards.shape[:1], "one per response")
    check.same_device(name, x, "rewards", rewards)
    return check.constant(name, x) != 0


def given(name: str, x: Tensor) -> Tensor:
    """Rewards [B], a constant; NaN = not scored."""
    x = check.constant(name, check.rewards(name, x))
    if x.ndim != 1:
        raise ValueError(f"{name}: expected shape [B], got {list(x.shape)}")
    return x


def of_responses(name: str, x: Tensor) -> Tensor:
    """[B, M], a constant: several numbers of each response, such as the results of its comparisons; NaN = none."""
    x = check.constant(name, check.rewards(name, x))
    if x.ndim not in (1, 2):
        raise ValueError(f"{name}: expected shape [B] or [B, M], got {list(x.shape)}")
    return x.unsqueeze(-1) if x.ndim == 1 else x


def sums(x: Tensor) -> Tensor:
    """[B] float64 from [B, M]: of what is there; NaN of nothing."""
    there = ~x.isnan()
    return torch.where(there.any(-1), x.double().nansum(-1), torch.nan)
