"""Rewards per token in float64 torch, one sequence at a time: the truth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def token_rewards(
    scores: Tensor,
    logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    tokens: Any,  # of the call: shape, mask, cu_seqlens, rows
    kl: str,
    place: str,
    numbers: Sequence[float] | Tensor,
    out: Tensor,
) -> None:
    """The scores at their place, less kl_coef * KL on valid tokens, into `out`; 0 elsewhere."""
    coef, clamp, value_clamp, low, high = (float(x) for x in numbers)
    for b in range(tokens.rows):
        row = _row(b, tokens.cu_seqlens)
        counted = torch.ones_like(out[row], dtype=torch.bool) if tokens.mask is None else tokens.mask[row] != 0
        rewards = torch.zeros(counted.shape, dtype=torch.float64, device=out.device)
        if logprobs is not None and ref_logprobs is not None:
            gap = (ref_logprobs[row].double() - logprobs[row].double()).clamp(-clamp, clamp)
            rewards = torch.where(counted, -coef * estimate(kl, gap).clamp(-value_clamp, value_clamp), 0.0)
        score = float(scores[b])
        if counted.any() and not math.isnan(score):
            valid = counted.nonzero().flatten()
            at = {"end": valid[-1:], "start": valid[:1], "broadcast": valid}[place]
            rewards[at] += min(max(score, low), high)
        out[row] = rewards.to(out.dtype)


def estimate(kl: str, gap: Tensor) -> Tensor:
    """Of KL(policy || reference) per token, from gap = ref_logprob - logprob."""
    return {
        "k1": lambda: -gap,
        "abs": lambda: gap.abs(),
        "k2": lambda: 0.5 * gap * gap,
        "k3": lambda: gap.expm1() - gap,
    }[kl]()


def _row(b: int, cu_seqlens: Tensor | None) -> int | slice:
    return b if cu_seqlens is None else slice(int(cu_seqlens[b]), int(cu_seqlens[b + 1]))
