"""Baselines that outlive a batch: a moving average of rewards for each key, such as a game's role."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.arrays import accepts_arrays
from fastreward._arguments.groups import GroupIds, Groups, groups_of
from fastreward.returns import discounted_returns

When = Literal["after", "before"]


class EmaBaseline:
    """Exponential moving averages b = decay b + (1 - decay) R of rewards, one per key.

    `rewards - baseline(rewards, roles)` is the advantage of role-conditioned self-play (RAE, arXiv 2506.24119). It
    lives with the trainer: `state_dict()` goes into a checkpoint.

    Args:
        decay: in [0, 1).
        initial: what a key begins with.

    Attributes:
        values: {key: its average}.
    """

    def __init__(self, decay: float = 0.95, *, initial: float = 0.0) -> None:
        self.decay, self.initial = check.not_negative("decay", decay), check.finite("initial", initial)
        if self.decay >= 1:
            raise ValueError(f"decay: expected a number in [0, 1), got {decay!r}")
        self.values: dict[Hashable, float] = {}

    def __call__(self, rewards: Tensor, keys: GroupIds, *, when: When = "after") -> Tensor:
        """Each reward's baseline, float32 [B]; the averages take the rewards in, in the order of the batch.

        Args:
            rewards: [B], or in the shape of Groups; NaN = not scored: no average takes it, and its baseline is 0.
            keys: integers or hashables [B], or Groups; an entry in no group has the baseline 0.
            when: the average "after" it has taken the reward itself in (as published), or "before".

        Raises:
            TypeError, ValueError: wrong dtype, shape or name, values that are not finite. On a GPU the host waits.
        """
        check.choice("when", when, get_args(When))
        return self._baselines(rewards, groups_of("keys", keys), when)

    @accepts_arrays
    def _baselines(self, rewards: Tensor, groups: Groups, when: When) -> Tensor:
        rewards = check.constant("rewards", check.reals("rewards", rewards))
        check.shape("rewards", rewards, groups.shape, "one per key")
        if check.values_checked(rewards):
            expected = "finite numbers, or NaN for what is not scored"
            check.every("rewards", ~rewards.isinf() | (groups.index < 0), rewards, expected)
        index = groups.index.flatten().to(rewards.device)
        order = index.argsort(stable=True)[int((index < 0).sum()) :]  # key by key, each in the order of the batch
        own = rewards.flatten()[order]
        there = ~own.isnan()
        bounds = torch.nn.functional.pad(groups.sizes.to(rewards.device).cumsum(0), (1, 0))
        kept = [self.values.get(label, self.initial) for label in groups.labels]
        before = torch.tensor(kept, dtype=torch.float32, device=rewards.device)
        averages = discounted_returns(
            torch.where(there, (1 - self.decay) * own, 0.0),
            gamma=torch.where(there, self.decay, 1.0),  # what was not scored leaves the average as it is
            reverse=False,
            initial=before,
            cu_seqlens=bounds,
        )
        self._keep(groups.labels, averages, there, bounds)
        if when == "before":
            key = index[order]
            begins = torch.arange(len(order), device=order.device) == bounds[key]
            averages = torch.where(begins, before[key], averages.roll(1))
        baselines = torch.zeros(rewards.numel(), dtype=torch.float32, device=rewards.device)
        baselines[order] = torch.where(there, averages, 0.0)
        return baselines.view(rewards.shape)

    def _keep(self, labels: list[Any], averages: Tensor, there: Tensor, bounds: Tensor) -> None:
        """The last scored one of each key."""
        places = torch.where(there, torch.arange(len(there), device=there.device), -1).cummax(0).values
        last = places[bounds[1:] - 1].tolist()
        values = averages.tolist()
        for label, place, begin in zip(labels, last, bounds.tolist(), strict=False):
            if place >= begin:
                self.values[label] = values[place]

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"decay": self.decay, "initial": self.initial, "values": dict(self.values)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a `state_dict`; raises ValueError, and changes nothing, where it is none."""
        if missing := [name for name in self.state_dict() if name not in state]:
            raise ValueError(f"state: expected what state_dict() gave, got no {missing[0]!r}")
        restored = EmaBaseline(state["decay"], initial=state["initial"])
        restored.values = {key: check.finite(f"values[{key!r}]", x) for key, x in dict(state["values"]).items()}
        self.__dict__ |= restored.__dict__

    def __repr__(self) -> str:
        """Decay and how many keys there are."""
        return f"EmaBaseline(decay={self.decay:g}, {len(self.values)} keys)"
