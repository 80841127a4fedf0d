"""Shared parts of the recipes on groups."""

from __future__ import annotations

import torch
from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.groups import GroupIds, Groups, groups_of


def prompts(group_ids: GroupIds | None, group_size: int | None, count: int, name: str = "group_ids") -> Groups:
    """The groups of `count` responses, once for several operations."""
    if (group_ids is None) == (group_size is None):
        raise ValueError(f"{name}, group_size: expected exactly one of them")
    if group_ids is None:
        return Groups(group_size=group_size, count=count)
    groups = groups_of(name, group_ids)
    if tuple(groups.shape) != (count,):
        raise ValueError(f"{name}: expected {count} ids (one per response), got {list(groups.shape)}")
    return groups


def finite_or_nan(name: str, x: Tensor) -> Tensor:
    """Real numbers of any shape, a constant: finite, or NaN for what is not there."""
    x = check.constant(name, check.rewards(name, x))
    if check.values_checked(x):
        check.every(name, ~x.isinf(), x, "finite numbers, or NaN for what is not there")
    return x


def beside_rewards(name: str, x: Tensor, rewards: Tensor) -> Tensor:
    """Real numbers, one for each of the rewards [B], NaN where there is none; a constant."""
    x = finite_or_nan(name, x)
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
    x = finite_or_nan(name, x)
    if x.ndim != 1:
        raise ValueError(f"{name}: expected shape [B], got {list(x.shape)}")
    return x


def of_responses(name: str, x: Tensor) -> Tensor:
    """[B, M], a constant: several numbers of each response, such as the results of its comparisons; NaN = none."""
    x = finite_or_nan(name, x)
    if x.ndim not in (1, 2):
        raise ValueError(f"{name}: expected shape [B] or [B, M], got {list(x.shape)}")
    return x.unsqueeze(-1) if x.ndim == 1 else x


def sums(x: Tensor) -> Tensor:
    """[B] float64 from [B, M]: of what is there; NaN of nothing."""
    there = ~x.isnan()
    return torch.where(there.any(-1), x.double().nansum(-1), torch.nan)
