"""What the replacements share: which tensors are served, outcomes and groups of a batch, values over its tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from fastreward._arguments.groups import Groups
from fastreward._arguments.transforms import transformed
from fastreward._runtime.masks import zeros_and_ones
from fastreward._runtime.memory import empty
from fastreward.patch.verl.replacement import NotServed
from fastreward.rewards.token_rewards import token_rewards

_CACHED: Final = 1 << 20  # tokens: 4 MiB in float32; fewer, and threads are woken more often than it gains


def constants(*tensors: Any) -> None:
    """That these are plain float32 tensors through which no gradient flows; verl's own code takes all else."""
    recording = torch.is_grad_enabled()
    for x in tensors:
        if type(x) is not Tensor or x.dtype != torch.float32 or (recording and x.requires_grad):
            raise NotServed
    if transformed():
        raise NotServed


def flags(mask: Any, like: Tensor, counts: Tensor | None = None) -> Tensor:
    """A mask of 0 and 1 in the shape of `like` as bool, contiguous: an eighth of what int64 costs in every pass.

    counts, f32 [B], gets the tokens of each row. Whether it is one is looked at on the CPU; on a GPU, where the host
    would wait, only of what might be weights.
    """
    if type(mask) is not Tensor or mask.shape != like.shape or mask.device != like.device:
        raise NotServed  # verl multiplies, and broadcasts
    if mask.dtype == torch.bool and counts is None:
        return mask.contiguous()
    there = empty(mask.shape, torch.bool, mask.device)
    if mask.is_cpu and not transformed():
        good = zeros_and_ones(mask, flags=there, counts=counts)
    else:
        there.copy_(mask)
        if counts is not None:
            torch.sum(there, -1, dtype=counts.dtype, out=counts)
        good = not mask.dtype.is_floating_point or torch.equal(mask, there.to(mask.dtype))
    if not good:
        raise NotServed  # weights
    return there


def few_rows(like: Tensor) -> Iterator[slice]:
    """Slices of the rows of [B, ...], on a CPU so few at a time that what is made of them stays in the cache."""
    size = max(1, _CACHED // max(math.prod(like.shape[1:]), 1)) if like.is_cpu else max(len(like), 1)
    return (slice(first, first + size) for first in range(0, len(like), size))


def lengths(mask: Tensor) -> Tensor:
    """f32 [B]: the tokens of each row that count."""
    counts = torch.empty(len(mask), device=mask.device)
    if mask.is_cpu:
        zeros_and_ones(mask, counts=counts)
        return counts
    return torch.sum(mask, -1, dtype=torch.float32, out=counts)


def outcomes(token_level_rewards: Tensor, mask: Tensor) -> Tensor:
    """[B]: the sum of each row's rewards, under the mask too, as verl takes them; but a NaN there is none."""
    constants(token_level_rewards)
    if token_level_rewards.ndim != 2:
        raise NotServed
    scores = token_level_rewards.sum(-1)
    lost = scores.isnan()
    if bool(lost.any()):
        rows = token_level_rewards[lost]
        scores[lost] = rows.masked_fill(~mask[lost] & rows.isnan(), 0.0).sum(-1)
    if not bool(scores.isfinite().all()):
        raise NotServed
    return scores


def prompts(index: Any, rows: int) -> Groups:
    """The groups that `index` names: an array of uid strings, or of integers."""
    if not isinstance(index, np.ndarray) or index.shape != (rows,):
        raise NotServed
    if index.dtype.kind in "iu":
        return Groups(torch.from_numpy(index.astype(np.int64)))
    labels = index.tolist()
    if index.dtype.kind not in "OU" or not all(isinstance(label, str) for label in labels):
        raise NotServed  # what Python or NumPy makes of other labels is for them to say
    return Groups(labels)


def over_tokens(values: Tensor, mask: Tensor) -> Tensor:
    """[B, T]: a value for each row on all its tokens, 0 under the mask."""
    return token_rewards(values, mask, place="broadcast")


def number(x: Any) -> float:
    """A number, or a 0-d tensor of one, as a float."""
    if isinstance(x, bool) or not isinstance(x, int | float | np.number | Tensor):
        raise NotServed
    if isinstance(x, Tensor) and (x.ndim or x.requires_grad):
        raise NotServed
    return float(x)
