"""Shared parts of the recipes on turns: which turns there are, their values and returns, and advantages in groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.groups import Groups
from fastreward._arguments.numbers import Number
from fastreward._arguments.options import SegmentOp, Singleton
from fastreward._arguments.tokens import token_bounds
from fastreward.group import group_advantages
from fastreward.returns import discounted_returns
from fastreward.segments import scatter_rewards, segment_reduce

#: What is done to the values of a group: x - mean, or (x - mean) / (std + eps).
Norm = Literal["mean", "mean-std"]
#: Labels of turns: integers [B, S], or B sequences of labels; -1 and None are none.
TurnLabels = Tensor | Sequence[Sequence[Any]] | Groups


@dataclass(frozen=True)
class Turns:
    """The turns of responses: those up to the last one that has a token. Values of what lies beyond are NaN, or 0."""

    segment_ids: Tensor  # integers [B, T], or [N] with
    cu_seqlens: Tensor | None
    there: Tensor  # bool [B, S]

    @classmethod
    def of(cls, segment_ids: Tensor, count: int, cu_seqlens: Tensor | None) -> Turns:
        """`count`: S, more than any id."""
        check.integers("segment_ids", segment_ids)
        if cu_seqlens is None and segment_ids.ndim != 2:
            shape = list(segment_ids.shape)
            raise ValueError(f"segment_ids: expected shape [B, T], or [N] with cu_seqlens, got {shape}")
        token_bounds(cu_seqlens, segment_ids, "segment_ids")
        last = _largest(segment_ids, cu_seqlens)
        if check.values_checked(segment_ids) and (last >= count).any():
            check.segment_ids("segment_ids", segment_ids, count)
        return cls(segment_ids, cu_seqlens, torch.arange(count, device=segment_ids.device) <= last)

    @property
    def number(self) -> Tensor:
        """I64 [B, S]: 0, 1, ... in each response."""
        return torch.arange(self.there.shape[1], device=self.there.device).expand(self.there.shape)

    @property
    def last(self) -> Tensor:
        """Bool [B, S]: the last turn of each response."""
        return self.there & ~torch.nn.functional.pad(self.there, (0, 1))[:, 1:]

    def values(self, name: str, x: Tensor) -> Tensor:
        """[B, S] float32, constants; NaN where there is none."""
        x = check.constant(name, check.reals(name, x))
        check.shape(name, x, self.there.shape, "a row for each response, a value for each turn")
        check.same_device(name, x, "segment_ids", self.segment_ids)
        if check.values_checked(x):
            good = x.isfinite() | x.isnan() | ~self.there
            check.every(name, good, x, "finite numbers, or NaN for no value")
        return torch.where(self.there, x, torch.nan)

    def outcomes(self, name: str, x: Tensor) -> Tensor:
        """[B] float32, constants; NaN: not scored."""
        return outcomes(name, x, self.there)

    def returns(self, x: Tensor, gamma: Number) -> Tensor:
        """[B, S]: x_k + gamma x_{k+1} + ..., of values; NaN where there is no turn."""
        found = discounted_returns(x.nan_to_num(0.0), self.there, gamma=gamma)
        return torch.where(self.there, found, torch.nan)

    def on_turns(self, x: Tensor) -> Tensor:
        """Values of responses [B] at each of their turns [B, S]; NaN where there is no turn."""
        return torch.where(self.there, x.unsqueeze(-1), torch.nan)

    def lengths(self) -> Tensor:
        """[B, S]: tokens of each turn."""
        ones = torch.ones_like(self.segment_ids, dtype=torch.float32)
        count = self.there.shape[1]
        return segment_reduce(ones, self.segment_ids, op="count", num_segments=count, cu_seqlens=self.cu_seqlens)

    def tokens(self, x: Tensor) -> Tensor:
        """[B, T] or [N]: values of turns on all of their tokens; 0 elsewhere, and where there is no value."""
        return scatter_rewards(x, self.segment_ids, place="broadcast", cu_seqlens=self.cu_seqlens)

    def of_prompts(self, groups: Groups, *keys: TurnLabels | Tensor) -> Groups:
        """Groups [B, S] of the turns of responses to one prompt that agree in every other key."""
        return Groups.by(groups, torch.zeros_like(self.number), *keys)

    def labels(self, name: str, x: TurnLabels) -> Groups:
        """Labels [B, S] as Groups."""
        if isinstance(x, Tensor | Groups):
            if tuple(x.shape) != tuple(self.there.shape):
                raise ValueError(f"{name}: expected shape {list(self.there.shape)}, got {list(x.shape)}")
            return Groups.by(x)
        if not isinstance(x, Sequence) or isinstance(x, str):
            raise TypeError(f"{name}: expected integers [B, S], or B lists of labels, got {type(x).__name__}")
        rows, turns = [list(row) for row in x], self.there.shape[1]
        if len(rows) != self.there.shape[0] or any(len(row) > turns for row in rows):
            shape = f"{len(rows)} of up to {max(map(len, rows), default=0)}"
            raise ValueError(f"{name}: expected {self.there.shape[0]} rows of at most {turns} labels, got {shape}")
        if not rows or not turns:
            return Groups.by(torch.zeros_like(self.number))
        padded: list[Any] = [row + [None] * (turns - len(row)) for row in rows]
        return Groups.by(padded)


def _largest(segment_ids: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """[B, 1]: the last turn that has a token, -1 = none."""
    if cu_seqlens is None:
        width = segment_ids.shape[1]
        return segment_ids.amax(-1, keepdim=True) if width else segment_ids.new_full((len(segment_ids), 1), -1)
    row = segment_ids.clamp(max=0)  # all turns as one segment
    return segment_reduce(segment_ids, row, op="max", num_segments=1, empty=-1.0, cu_seqlens=cu_seqlens)


def turns_of(name: str, x: Tensor, segment_ids: Tensor, cu_seqlens: Tensor | None) -> tuple[Turns, Tensor]:
    """The turns, and their values: an argument [B, S]."""
    if check.tensor(name, x).ndim != 2:
        raise ValueError(f"{name}: expected shape [B, S], got {list(x.shape)}")
    turns = Turns.of(segment_ids, x.shape[1], cu_seqlens)
    return turns, turns.values(name, x)


def outcomes(name: str, x: Tensor, like: Tensor) -> Tensor:
    """[B] float32, constants, one for each row of `like`; NaN: not scored."""
    x = check.constant(name, check.reals(name, x))
    check.shape(name, x, like.shape[:1], "one per response")
    check.same_device(name, x, "the call", like)
    if check.values_checked(x):
        check.every(name, x.isfinite() | x.isnan(), x, "finite numbers, or NaN for not scored")
    return x


def scores(name: str, x: Tensor, like: Tensor) -> Tensor:
    """[B, K] float32, constants, as many as a response has; NaN: there is none."""
    x = check.constant(name, check.reals(name, x))
    if x.ndim != 2 or x.shape[0] != like.shape[0]:
        raise ValueError(f"{name}: expected shape [{like.shape[0]}, K], got {list(x.shape)}")
    check.same_device(name, x, "the call", like)
    if check.values_checked(x):
        check.every(name, x.isfinite() | x.isnan(), x, "finite numbers, or NaN for none")
    return x


def over_row(x: Tensor, op: SegmentOp, empty: float = torch.nan) -> Tensor:
    """[B]: an operation of `segment_reduce` over what is there of [B, K], NaN: not there; `empty` over nothing."""
    there = ~x.isnan()
    found = segment_reduce(x, torch.where(there, 0, -1), op=op, num_segments=1).squeeze(-1)
    return torch.where(there.any(-1), found, empty)


def against(
    x: Tensor, groups: Groups, norm: Norm, eps: Number, *, singleton: Singleton, ddof: int = 1, **options: Any
) -> Tensor:
    """Values in the groups' shape, less their mean, over their std; NaN: not there, and 0."""
    check.choice("norm", norm, ("mean", "mean-std"))
    scale = "none" if norm == "mean" else "std"
    return group_advantages(x, groups, scale=scale, eps=eps, singleton=singleton, ddof=ddof, **options)
