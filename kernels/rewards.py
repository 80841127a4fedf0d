"""Rewards per token: a score on the sequence's last (or first) valid token, or on all, less kl_coef * KL on each.

Fused: one launch, one read of log-probs, reference log-probs and mask, one write. A program takes tiles of a sequence.
Whether its last valid token is the sequence's own last one it sees from the mask of the tiles behind: it looks until
one of them has a valid token, which is the next but at the end of a sequence and before a hole, so no mask is read more
than twice.

Bytes, m = bytes per mask element: 12 + m a token (4 + m without the penalty).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastreward._arguments.options import PLACES, REWARD_KLS, Place, RewardKL
from fastreward._arguments.tokens import Tokens

from ._shared.launch import OPTIONS, mask_bytes, on_device_of
from .program.math import expm1_minus

# --------------------------------------------------------------------------------------------------------- config
# 2048 tokens a tile, 16 per thread in four 16-byte loads of each array.
BLOCK = 2048
WARPS = 4


# --------------------------------------------------------------------------------------------------------- kernel
@triton.jit
def _estimate(x, KL: tl.constexpr):
    """KL(policy || reference) from x = ref_logprob - logprob."""
    if KL == 0:
        return -x
    elif KL == 1:
        return tl.abs(x)
    elif KL == 2:
        return 0.5 * x * x
    else:
        return expm1_minus(x)


@triton.jit
def _within(x, low, high):
    """`x` clamped; a NaN stays one."""
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


@triton.jit
def _any_valid(mask, first, column, length, BLOCK: tl.constexpr):
    """1 if a token of the tile that begins at `column` counts, else 0."""
    at = column + tl.arange(0, BLOCK)
    return tl.max((tl.load(mask + first + at, mask=at < length, other=0) != 0).to(tl.int32), axis=0)


@triton.jit
def _last(valid, mask, first, start, length, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr):
    """Column of the sequence's last valid token if it is in this tile, else -1."""
    own = tl.max(tl.where(valid, start + tl.arange(0, BLOCK), -1), axis=0)
    if HAS_MASK:
        behind = start + BLOCK
        done = (own < 0).to(tl.int32)
        while (done == 0) & (behind < length):
            done = _any_valid(mask, first, behind, length, BLOCK)
            behind += BLOCK
        own = tl.where(done == 1, -1, own)
    else:
        own = tl.where(own == length - 1, own, -1)
    return own


@triton.jit
def _first(valid, mask, first, start, length, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr):
    """The same of its first."""
    own = tl.min(tl.where(valid, start + tl.arange(0, BLOCK), length), axis=0)
    if HAS_MASK:
        before = start - BLOCK
        done = (own == length).to(tl.int32)
        while (done == 0) & (before >= 0):
            done = _any_valid(mask, first, before, length, BLOCK)
            before -= BLOCK
        own = tl.where(done == 1, -1, own)
    else:
        own = tl.where(own == 0, own, -1)
    return own


@triton.jit
def _token_rewards_kernel(
    scores,  # f32 [B], NaN = not scored
    logprobs,  # f32 [B, T] or [N]
    ref_logprobs,  # the same
    mask,  # u8, nonzero = valid
    cu_seqlens,  # i64 [B + 1]
    given,  # f64 [5]: the numbers, in place of those below
    out,  # f32, out
    columns, splits,
    kl_coef, kl_clamp, kl_value_clamp, low, high,
    KL: tl.constexpr,  # -1: no penalty
    PLACE: tl.constexpr,
    HAS_MASK: tl.constexpr, PACKED: tl.constexpr, ON_DEVICE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """12 + m bytes a token."""
    program = tl.program_id(0).to(tl.int64)
    row = program // splits
    if PACKED:
        first = tl.load(cu_seqlens + row)
        length = tl.load(cu_seqlens + row + 1) - first
    else:
        first = row * columns
        length = tl.cast(columns, tl.int64)
    if ON_DEVICE:
        kl_coef = tl.load(given).to(tl.float32)
        kl_clamp = tl.load(given + 1).to(tl.float32)
        kl_value_clamp = tl.load(given + 2).to(tl.float32)
        low = tl.load(given + 3).to(tl.float32)
        high = tl.load(given + 4).to(tl.float32)
    score = tl.load(scores + row)
    score = tl.where(score == score, _within(score, low, high), 0.0)
    for start in range((program % splits) * BLOCK, length, splits * BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < length
        valid = inside
        if HAS_MASK:
            valid = tl.load(mask + first + column, mask=inside, other=0) != 0
        if PLACE == 0:
            reward = tl.zeros([BLOCK], tl.float32) + score
        else:
            if PLACE == 1:
                place = _first(valid, mask, first, start, length, HAS_MASK, BLOCK)
            else:
                place = _last(valid, mask, first, start, length, HAS_MASK, BLOCK)
            reward = tl.where(column == place, score, 0.0)
        if KL >= 0:
            gap = tl.load(ref_logprobs + first + column, mask=valid, other=0.0)
            gap -= tl.load(logprobs + first + column, mask=valid, other=0.0)
            kl = _within(_estimate(_within(gap, -kl_clamp, kl_clamp), KL), -kl_value_clamp, kl_value_clamp)
            reward -= kl_coef * kl
        tl.store(out + first + column, tl.where(valid, reward, 0.0), mask=inside)


# --------------------------------------------------------------------------------------------------------- launch
def token_rewards(
    scores: Tensor,  # f32 [B], NaN = not scored
    logprobs: Tensor | None,  # f32 as the tokens, contiguous
    ref_logprobs: Tensor | None,
    tokens: Tokens,
    kl: RewardKL,
    place: Place,
    numbers: Sequence[float] | Tensor,  # layout.REWARD_NUMBERS; f64 [5]
    out: Tensor,  # f32 as the tokens, contiguous
) -> None:
    """The scores at their place, less kl_coef * KL on valid tokens, into `out`: one launch."""
    rows, count = tokens.rows, out.numel()
    if rows == 0 or count == 0:
        return
    splits = triton.cdiv(triton.cdiv(count, rows), BLOCK)
    on_device = isinstance(numbers, Tensor)
    known: Any = (0.0,) * 5 if isinstance(numbers, Tensor) else numbers
    with on_device_of(out):
        _token_rewards_kernel[(rows * splits,)](
            scores, logprobs, ref_logprobs, mask_bytes(tokens.mask), tokens.cu_seqlens,
            numbers if on_device else None, out, tokens.shape[-1], splits, *(float(x) for x in known),
            KL=-1 if logprobs is None else REWARD_KLS.index(kl), PLACE=PLACES.index(place),
            HAS_MASK=tokens.mask is not None, PACKED=tokens.cu_seqlens is not None, ON_DEVICE=on_device,
            BLOCK=BLOCK, num_warps=WARPS, **OPTIONS,
        )  # fmt: skip
