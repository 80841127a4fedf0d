"""Shared parts of the recipes over steps: which tokens a step has, and values that go from steps to tokens and back.

A response whose reward is NaN was not scored: here it has no token, so it is in no statistic and gets 0 everywhere.
Values of steps stay float64 until they are put on tokens. What a step without a token has for a score never matters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.groups import GroupIds, group_labels
from fastreward._arguments.numbers import Number
from fastreward._arguments.options import SegmentPlace
from fastreward._arguments.tokens import Tokens, token_bounds
from fastreward.group import group_advantages
from fastreward.group_statistics import group_statistics
from fastreward.recipes._shared.tokens import total
from fastreward.segments import scatter_rewards, segment_reduce
from fastreward.whiten import whiten


# ------------------------------------------------------------------------------------------------------------- tokens
@dataclass(frozen=True, slots=True)
class Responses:
    """Tokens of responses that are there and scored: mask bool, [B, T], or [N] with cu_seqlens [B + 1]."""

    mask: Tensor
    rewards: Tensor | None  # [B] float64; NaN: not scored
    cu_seqlens: Tensor | None

    @property
    def outcomes(self) -> Tensor:
        """The rewards, where a recipe needs them."""
        if self.rewards is None:
            raise ValueError("rewards: expected one per response, got None")
        return self.rewards

    @property
    def rows(self) -> int:
        """How many responses."""
        return self.mask.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    def on_tokens(self, x: Tensor) -> Tensor:
        """[B] on the tokens of each response, float32; NaN on none."""
        return scatter_rewards(x, mask=self.mask, place="broadcast", cu_seqlens=self.cu_seqlens)

    def at_end(self, x: Tensor) -> Tensor:
        """[B] on the last token of each response, float32."""
        return scatter_rewards(x, mask=self.mask, place="end", cu_seqlens=self.cu_seqlens)

    def is_last(self) -> Tensor:
        """Bool in the shape of tokens: the last one of its response."""
        return self.at_end(torch.ones(self.rows, device=self.mask.device)) != 0

    def total(self, x: Tensor) -> Tensor:
        """[B] float64: sums over the tokens of each response."""
        return total(x.masked_fill(~self.mask, 0.0), "mask", self.cu_seqlens)

    def lengths(self) -> Tensor:
        """[B] float64: tokens."""
        return total(self.mask, "mask", self.cu_seqlens)

    def means(self, x: Tensor) -> Tensor:
        """[B] float64; NaN, as what is not scored, without a token."""
        return self.total(x) / self.lengths()

    def normalized(
        self, x: Tensor, group_ids: GroupIds | None, group_size: int | None, *, ddof: int, eps: Number
    ) -> Tensor:
        """(x - mean) / (std + eps) over all tokens of the group, 0 where no token is; float32."""
        labels = group_labels(group_ids, group_size, self.rows, x.device)
        if labels is None:
            raise ValueError("group_ids, group_size: expected exactly one of them")
        of_tokens = Tokens(tuple(x.shape), None, self.cu_seqlens).broadcast(labels)
        counted = x.masked_fill(~self.mask, torch.nan)
        return group_advantages(counted.flatten(), of_tokens.flatten(), ddof=ddof, eps=eps).view(x.shape)


def responses_of(
    name: str, like: Tensor, mask: Tensor | None, rewards: Tensor | None, cu_seqlens: Tensor | None
) -> Responses:
    """The tokens of a call, of which the argument `name` has one value each."""
    bounds = token_bounds(cu_seqlens, like, name)
    if bounds is None and like.ndim != 2:
        raise ValueError(f"{name}: expected shape [B, T], or [N] with cu_seqlens, got {list(like.shape)}")
    mask = check.mask(mask, name, like)
    counted = torch.ones_like(like, dtype=torch.bool) if mask is None else mask.bool()
    if rewards is None:
        return Responses(counted, None, bounds)
    rows = like.shape[0] if bounds is None else bounds.shape[0] - 1
    rewards = check.constant("rewards", check.rewards("rewards", rewards)).double()
    check.shape("rewards", rewards, (rows,), "one per response")
    check.same_device("rewards", rewards, name, like)
    if check.values_checked(rewards):
        check.every("rewards", ~rewards.isinf(), rewards, "finite numbers, or NaN (not scored)")
    scored = Tokens(tuple(like.shape), None, bounds).broadcast(~rewards.isnan())
    return Responses(counted & scored, rewards, bounds)


# -------------------------------------------------------------------------------------------------------------- steps
@dataclass(frozen=True, slots=True)
class Steps(Responses):
    """The steps of responses: ids as `fastreward.segment_ids` has them; lengths [B, K], their tokens that count."""

    ids: Tensor
    tokens: Tensor

    @property
    def there(self) -> Tensor:
        """Bool [B, K]: which steps have a token."""
        return self.tokens > 0

    @property
    def count(self) -> Tensor:
        """[B, 1] float64: how many steps are there."""
        return self.there.sum(-1, keepdim=True).double()

    @property
    def final(self) -> Tensor:
        """Bool [B, K]: the last step of each response."""
        ahead = self.there.flip(-1).cumsum(-1).flip(-1)
        return self.there & (ahead == 1)

    @property
    def in_step(self) -> Tensor:
        """Bool in the shape of tokens: one that counts, of a step."""
        return self.mask & (self.ids >= 0)

    def values(self, name: str, x: Tensor, *, among: Tensor | None = None) -> Tensor:
        """[B, K] float64, a constant: finite where a step is there (and in `among`), 0 where it is not."""
        x = check.constant(name, check.reals(name, x)).double()
        check.shape(name, x, self.tokens.shape, "one for each step of each response")
        check.same_device(name, x, "segment_ids", self.ids)
        counted = self.there if among is None else self.there & among
        if check.values_checked(x):
            check.every(name, x.isfinite() | ~counted, x, "finite numbers where the step has a token")
        return torch.where(counted, x, 0.0)

    def scatter(self, values: Tensor, place: SegmentPlace = "broadcast") -> Tensor:
        """[B, K] on the tokens of the steps, float32."""
        return scatter_rewards(values, self.ids, place=place, mask=self.mask, cu_seqlens=self.cu_seqlens)

    def sums(self, x: Tensor) -> Tensor:
        """[B, K] float64: sums over the tokens of each step."""
        columns = self.tokens.shape[1]
        return segment_reduce(x, self.ids, weights=self.mask, num_segments=columns, cu_seqlens=self.cu_seqlens).double()


def steps_of(
    name: str,
    scores: Tensor | int | None,
    segment_ids: Tensor,
    mask: Tensor | None,
    rewards: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Steps:
    """The steps of a call; the argument `name` has scores [B, K] of them, or is K (None: as many as there are)."""
    check.integers("segment_ids", check.tensor("segment_ids", segment_ids))
    responses = responses_of("segment_ids", segment_ids, mask, rewards, cu_seqlens)
    if scores is not None and not isinstance(scores, int):
        if check.tensor(name, scores).ndim != 2:
            raise ValueError(f"{name}: expected shape [B, K], K steps at most, got {list(scores.shape)}")
        scores = scores.shape[1]
    counts = segment_reduce(
        responses.mask, segment_ids, op="count", weights=responses.mask, num_segments=scores, cu_seqlens=cu_seqlens
    )
    return Steps(responses.mask, responses.rewards, responses.cu_seqlens, segment_ids, counts.double())


# --------------------------------------------------------------------------------------------------------- statistics
def of_others(x: Tensor, group_ids: GroupIds | None, group_size: int | None) -> Tensor:
    """[B] float64: the mean over the others of the group; NaN where there are none. NaN in x: not there."""
    found = group_statistics(x, group_ids, ("leave-one-out",), group_size=group_size)
    return found["leave-one-out"].double()


def whitened(x: Tensor, mask: Tensor, *, shift_mean: bool = True, ddof: int = 1) -> Tensor:
    """As `fastreward.whiten`, where there may be no tokens, or one, which does not differ from the mean."""
    if check.values_checked(x) and int(mask.sum()) < 2:
        return torch.zeros_like(x) if shift_mean else torch.where(mask, x, 0.0)
    return whiten(x, mask, shift_mean=shift_mean, ddof=ddof)
