"""Which tokens a loss treats apart, and how much: inputs of clip_cov, kl_cov and tw_grpo, made without a host read.

clip_cov and kl_cov select their tokens themselves where they are not passed any. tw_grpo can't make its weights: they
are of distributions over the vocabulary, at the same position of several sequences, where the loss language has one
log-prob per token and no way from a sequence's token to another's.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.arrays import accepts_arrays

__all__ = ["cov_mask", "tw_grpo_importance"]


@accepts_arrays
@torch.no_grad()
def cov_mask(
    logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    method: Literal["clip", "kl"],
    share: float = 0.0002,
    old_logprobs: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    cov_low: float = 1.0,
    cov_high: float = 5.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Tokens whose log-prob moves most with their advantage: bool in the shape of logprobs, for extra["selected"].

    cov = (A - mean A)(logprob - mean logprob) over the valid tokens. At most max(1, floor(share * tokens)) of them:
    "kl" those with the largest cov; "clip" a random choice among those with cov_low < cov < cov_high that PPO's clip
    leaves alone (old_logprobs, clip_low, clip_high), drawn from `generator`.

    "The Entropy Mechanism" (arXiv 2505.22617). Verified in code: verl core_algos.py; its draw is another one (randperm
    on the host).

    Args:
        logprobs, old_logprobs: [B, T] or packed [N].
        advantages: in the shape of logprobs, or [B].
        mask: in the shape of logprobs, bool, integer or float; nonzero = a token that counts.
        share, clip_low, clip_high, cov_low, cov_high: the paper's values by default.
        generator: of the device of logprobs, for "clip".

    Raises:
        TypeError, ValueError: wrong shape or name, no old_logprobs for "clip".
    """
    check.choice("method", method, ("clip", "kl"))
    check.positive("share", share)
    x = check.tensor("logprobs", logprobs)
    given = check.mask(mask, "logprobs", x)
    valid = torch.ones_like(x, dtype=torch.bool) if given is None else given != 0
    a = check.tensor("advantages", advantages)
    a = a.unsqueeze(-1) if a.ndim == 1 and x.ndim == 2 else a
    a, x = (torch.where(valid, v.double(), 0.0) for v in (a.expand_as(x), x))
    tokens = valid.sum()
    cov = (a - a.sum() / tokens.clamp(min=1)) * (x - x.sum() / tokens.clamp(min=1))
    limit = (share * tokens.double()).floor().clamp(min=1)
    if method == "kl":
        return _first(torch.where(valid, -cov, math.inf), limit) & valid
    if old_logprobs is None:
        raise ValueError("old_logprobs: needed for method='clip', which passes over tokens that PPO clips already")
    check.shape("old_logprobs", check.tensor("old_logprobs", old_logprobs), x.shape, "as logprobs")
    ratio = torch.exp(x - torch.where(valid, old_logprobs.double(), 0.0))
    clipped = ((ratio > 1 + clip_high) & (a > 0)) | ((ratio < 1 - clip_low) & (a < 0))
    candidates = valid & ~clipped & (cov > cov_low) & (cov < cov_high)
    lots = torch.rand(x.shape, dtype=torch.float64, device=x.device, generator=generator)
    return _first(torch.where(candidates, lots, math.inf), limit) & candidates


def _first(keys: Tensor, limit: Tensor) -> Tensor:
    """The `limit` smallest keys, bool in their shape; `limit` stays on its device."""
    order = keys.flatten().argsort(stable=True)
    chosen = torch.arange(keys.numel(), device=keys.device) < limit
    return torch.empty_like(chosen).scatter_(0, order, chosen).reshape(keys.shape)


@accepts_arrays
@torch.no_grad()
def tw_grpo_importance(logprobs: Tensor, mask: Tensor, *, group_size: int) -> Tensor:
    """How much a group's next-token distributions disagree at each position, in [0, 1]: float32 [B, T] for `tw_grpo`.

    With x the mean of the group's log-probs less a row's own, clamped to +-11: the mean over the group of
    sum over V of (e^x - x - 1), min-max scaled over the positions of each group. Masked-out positions take part as
    uniform distributions.

    TW-GRPO (arXiv 2505.24718). Verified in code: longmalongma/TW-GRPO grpo_trainer.py.

    Args:
        logprobs: [B, T, V] log-probs of the whole vocabulary, groups contiguous.
        mask: [B, T].
        group_size: rows of a group.

    Raises:
        ValueError: wrong shape, or B is no multiple of group_size.
    """
    if check.tensor("logprobs", logprobs).ndim != 3:
        raise ValueError(f"logprobs: expected shape [B, T, V], got {list(logprobs.shape)}")
    rows, length, vocabulary = logprobs.shape
    check.shape("mask", check.tensor("mask", mask), (rows, length), "[B, T] of logprobs")
    group_size = check.whole("group_size", group_size, "rows of a group")
    if group_size < 1 or rows % group_size:
        raise ValueError(f"group_size: expected a positive divisor of the {rows} rows, got {group_size}")
    kept = torch.where((mask != 0).unsqueeze(-1), logprobs.float(), -math.log(vocabulary))
    if not length:
        return kept.new_zeros((rows, 0))
    kept = kept.reshape(-1, group_size, length, vocabulary)
    x = (kept.mean(1, keepdim=True) - kept).clamp(-11, 11)
    divergence = (torch.expm1(x) - x).sum(-1).mean(1)  # [groups, T]
    low, high = divergence.amin(1, keepdim=True), divergence.amax(1, keepdim=True)
    return ((divergence - low) / (high - low + 1e-8)).repeat_interleave(group_size, 0)
