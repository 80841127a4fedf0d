"""The PPO family's policy loss: loss, metrics and the token gradient in one launch, the scaled gradient in another.

Fused: some fifty elementwise operations and reductions of the written-out loss. The forward stores every token's
gradient before aggregation; what aggregation multiplies it with (1 / tokens, 1 / (sequences * length), ...) is known
only when all programs are done, so the program that arrives last adds up the others' partial sums in a fixed order, and
writes loss, metrics and one weight per row. The backward multiplies. No host sync, and the same bits every time.

Bytes a token, m = bytes per mask element: forward 12 + m (logprob, old, gradient) + 4 for each of per-token advantages,
ref, entropy, weights, token loss; backward 8 (+ 4 + m with an entropy bonus).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastreward._layout import METRICS
from fastreward._options import AGGREGATIONS, KLS, PolicyOptions

from ._device import exp32, exp_minus_1_minus
from ._launch import OPTIONS, arrival_counter, on_device_of
from ._policy_finish import finish

# --------------------------------------------------------------------------------------------------------- config
# A tile is [ROWS, STEPS, LANES, VEC] tokens: 1 row of 1024, 8 of 64 or 8 of 32, by the mean length. VEC = 4 (16-byte
# loads) where T is a multiple of 4; else, and for packed rows, which start anywhere, 1. Sums run over STEPS and VEC in
# a thread, and cross threads when a program is done. A long row is dealt, tile by tile, to as many programs as fill the
# machine.
WARPS = 4
FILL = 1056  # programs that fill an H100: 132 SMs, 8 programs each
MOST_CHUNKS = 64  # programs that may share a row
MERGE = 256  # rows or programs that the last program takes at once

_NAMED_SUMS = (*METRICS[:8], "entropy_mean")  # partial sums, in this order; then min, max, longest row
_PARTIALS = len(_NAMED_SUMS) + 3


def _tiling(rows: int, tokens: int, longest: int) -> tuple[int, int, int]:
    """(rows per tile, columns of a tile, programs per group of rows) for `rows` rows that hold `tokens` tokens."""
    mean = tokens / rows
    if mean < 64:
        return 8, 32, 1
    if mean < 512:
        return 8, 64, 1
    return 1, 1024, max(1, min(triton.cdiv(FILL, rows), triton.cdiv(longest, 1024), MOST_CHUNKS))


def _shape(together: int, columns: int, vec: int) -> dict[str, Any]:
    """The tile of `together` rows."""
    lanes = min(32 * WARPS, columns // vec) if together == 1 else min(32, columns // vec)
    steps = columns // (lanes * vec)
    # Left alone, ptxas spills a scalar of the 8-row kernels to get down to 64 or 80 registers; they need about 110.
    registers = {"maxnreg": 128} if together > 1 else {}
    return {"ROWS": together, "STEPS": steps, "LANES": lanes, "VEC": vec, "num_warps": WARPS, **registers, **OPTIONS}


# --------------------------------------------------------------------------------------------------------- kernel
@triton.jit
def _row_bounds(cu_seqlens, row, ok, N, T, B, PACKED: tl.constexpr):
    """(first token, length, tokens to write) of each row; offsets from the device are never trusted to lie in [0, N].

    The last row also writes whatever lies behind it, so that no output stays unwritten.
    """
    if PACKED:
        start = tl.load(cu_seqlens + row, mask=ok, other=0)
        stop = tl.load(cu_seqlens + row + 1, mask=ok, other=0)
        start = tl.minimum(tl.maximum(start, 0), N)
        length = tl.maximum(tl.minimum(stop, N) - start, 0)
        extent = tl.where(row == B - 1, N - start, length)
    else:
        start = row * T
        length = tl.where(ok, T, 0)
        extent = length
    return start, length, extent


@triton.jit
def _before(t, bound, row_ok, T, PACKED: tl.constexpr):
    """t < bound of the row; padded, as t < T, from which the compiler sees that VEC neighbours go together."""
    return (t < _wide(bound)) if PACKED else ((t < T) & _wide(row_ok))


@triton.jit
def _clipped(x, low, high):
    """x within [low, high]; NaN stays NaN."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def _surrogate(lp, old, adv, low, high, dual_clip, delta, log_ratio_clamp):
    """(loss, its gradient for lp, log ratio, ratio, whether the dual clip binds) per token.

    Ties between the clipped and the unclipped branch go to the unclipped one. Comparisons are arranged so that a NaN
    comes out as NaN.
    """
    raw = lp - old
    d = _clipped(raw, -log_ratio_clamp, log_ratio_clamp)
    ratio = exp32(d)
    unclipped = -adv * tl.where(ratio > delta, delta, ratio)
    clipped = -adv * _clipped(ratio, low, high)
    loss = tl.where(unclipped < clipped, clipped, unclipped)
    cap = -adv * dual_clip
    dual = (adv < 0.0) & (loss > cap)
    in_range = (ratio >= low) & (ratio <= high)
    flat = tl.where(unclipped < clipped, ~in_range, ratio > delta) | dual | (tl.abs(raw) > log_ratio_clamp)
    return tl.where(dual, cap, loss), tl.where(flat, 0.0, -adv * ratio), d, ratio, dual


@triton.jit
def _add(lane, x, counted):
    """[ROWS, LANES] running sums plus what counts of x [ROWS, STEPS, LANES, VEC]."""
    return lane + _over_lane(tl.where(counted, x, 0.0))


@triton.jit
def _over_lane(x):
    return tl.sum(tl.sum(x, axis=3), axis=1)


@triton.jit
def _lane_max(x):
    return tl.max(tl.max(x, axis=3), axis=1)


@triton.jit
def _columns(STEPS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr):
    """Offsets of a tile along its rows, i32 [1, STEPS, LANES, VEC]."""
    step = tl.arange(0, STEPS)[None, :, None, None]
    lane = tl.arange(0, LANES)[None, None, :, None]
    return (step * LANES + lane) * VEC + tl.arange(0, VEC)[None, None, None, :]


@triton.jit
def _wide(x):
    """[ROWS] to [ROWS, 1, 1, 1]."""
    return x[:, None, None, None]


@triton.jit
def _store_sum(partial, k, programs, program, lane):
    tl.store(partial + (k * programs + program), tl.sum(tl.sum(lane, axis=1), axis=0).to(tl.float64))


@triton.jit(do_not_specialize=["N", "row_units", "B", "chunks"])
def _forward_kernel(
    logprobs, old_logprobs,  # f32 [B, T] or [N]
    advantages,  # f32 like logprobs, or [B]
    mask,  # like logprobs, any dtype, nonzero = counted
    ref_logprobs, entropy, weights,  # f32 like logprobs
    cu_seqlens,  # i64 [B + 1]
    normalizer,  # f32 []
    low, high, dual_clip, delta, log_ratio_clamp, kl_coef, entropy_coef,
    loss,  # f32 [], out
    metrics,  # f32 [12], out
    saved,  # f32 like logprobs, out: gradient of the token's loss before aggregation
    row_weight,  # f32 [B], out
    token_loss,  # f32 like logprobs, out
    row_sums, row_counts,  # f64 and i32 [B, chunks], scratch
    partial,  # f64 [12, programs], scratch
    counter,  # i32 [1], zero before and after
    N, row_units, B, chunks,  # T = row_units * VEC
    PACKED: tl.constexpr, PER_ROW_ADVANTAGE: tl.constexpr, HAS_MASK: tl.constexpr, HAS_REF: tl.constexpr,
    HAS_ENTROPY: tl.constexpr, HAS_WEIGHTS: tl.constexpr, HAS_NORMALIZER: tl.constexpr, WANT_TOKEN_LOSS: tl.constexpr,
    KL: tl.constexpr, AGGREGATION: tl.constexpr, SUMS: tl.constexpr,
    ROWS: tl.constexpr, STEPS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, MERGE: tl.constexpr,
):  # fmt: skip
    """ROWS rows, every chunks-th tile of them."""
    T = row_units * VEC
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    row = (program // chunks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_ok = row < B
    start, length, extent = _row_bounds(cu_seqlens, row, row_ok, N, T, B, PACKED)
    TILE: tl.constexpr = STEPS * LANES * VEC
    columns = _columns(STEPS, LANES, VEC)
    row_sum = tl.zeros([ROWS, LANES], tl.float32)
    row_count = tl.zeros([ROWS, LANES], tl.int32)
    s_low = tl.zeros([ROWS, LANES], tl.float32)
    s_high = tl.zeros([ROWS, LANES], tl.float32)
    s_dual = tl.zeros([ROWS, LANES], tl.float32)
    s_old_k1 = tl.zeros([ROWS, LANES], tl.float32)
    s_old_k3 = tl.zeros([ROWS, LANES], tl.float32)
    s_ref_k1 = tl.zeros([ROWS, LANES], tl.float32)
    s_ref_k3 = tl.zeros([ROWS, LANES], tl.float32)
    s_ratio = tl.zeros([ROWS, LANES], tl.float32)
    s_entropy = tl.zeros([ROWS, LANES], tl.float32)
    least = tl.full([ROWS, LANES], float("-inf"), tl.float32)  # of the negated ratio: a maximum, like the other
    most = tl.full([ROWS, LANES], float("-inf"), tl.float32)
    for t0 in range((program % chunks) * TILE, tl.max(extent, axis=0), chunks * TILE):
        t = t0 + columns
        inside = _before(t, extent, row_ok, T, PACKED)
        counted = _before(t, length, row_ok, T, PACKED)
        at = _wide(start) + t
        if HAS_MASK:
            counted = counted & (tl.load(mask + at, mask=inside, other=0) != 0)
        lp = tl.load(logprobs + at, mask=inside, other=0.0)
        old = tl.load(old_logprobs + at, mask=inside, other=0.0)
        if PER_ROW_ADVANTAGE:
            adv = tl.load(advantages + row, mask=row_ok, other=0.0)[:, None, None, None]
        else:
            adv = tl.load(advantages + at, mask=inside, other=0.0)
        token, grad, d, ratio, dual = _surrogate(lp, old, adv, low, high, dual_clip, delta, log_ratio_clamp)
        if HAS_WEIGHTS:
            weight = tl.load(weights + at, mask=inside, other=0.0)
            token *= weight
            grad *= weight
        if HAS_REF:
            raw = tl.load(ref_logprobs + at, mask=inside, other=0.0) - lp
            gap = _clipped(raw, -20.0, 20.0)
            moves = tl.abs(raw) <= 20.0
            k3 = exp_minus_1_minus(gap, exp32(gap))
            if KL == 1:
                token -= kl_coef * gap
                grad += tl.where(moves, kl_coef, 0.0)
            if KL == 2:
                token += kl_coef * 0.5 * gap * gap
                grad -= tl.where(moves, kl_coef * gap, 0.0)
            if KL == 3:
                token += kl_coef * k3
                grad -= tl.where(moves, kl_coef * (k3 + gap), 0.0)
            s_ref_k1 = _add(s_ref_k1, -gap, counted)
            s_ref_k3 = _add(s_ref_k3, k3, counted)
        if HAS_ENTROPY:
            h = tl.load(entropy + at, mask=inside, other=0.0)
            token -= tl.where(entropy_coef != 0.0, entropy_coef * h, 0.0)
            s_entropy = _add(s_entropy, h, counted)
        tl.store(saved + at, tl.where(counted, grad, 0.0), mask=inside)
        if WANT_TOKEN_LOSS:
            tl.store(token_loss + at, tl.where(counted, token, 0.0), mask=inside)
        row_sum = _add(row_sum, token, counted)
        row_count += _over_lane(counted.to(tl.int32))
        s_low = _add(s_low, ((ratio < low) & (adv < 0.0)).to(tl.float32), counted)
        s_high = _add(s_high, ((ratio > high) & (adv > 0.0)).to(tl.float32), counted)
        s_dual = _add(s_dual, dual.to(tl.float32), counted)
        s_old_k1 = _add(s_old_k1, -d, counted)
        s_old_k3 = _add(s_old_k3, exp_minus_1_minus(d, ratio), counted)
        s_ratio = _add(s_ratio, ratio, counted)
        least = tl.maximum(least, _lane_max(tl.where(counted, -ratio, float("-inf"))))
        most = tl.maximum(most, _lane_max(tl.where(counted, ratio, float("-inf"))))
    chunk_at = row * chunks + program % chunks
    tl.store(row_sums + chunk_at, tl.sum(row_sum.to(tl.float64), axis=1), mask=row_ok)
    tl.store(row_counts + chunk_at, tl.sum(row_count, axis=1), mask=row_ok)
    _store_sum(partial, 0, programs, program, s_low)
    _store_sum(partial, 1, programs, program, s_high)
    _store_sum(partial, 2, programs, program, s_dual)
    _store_sum(partial, 3, programs, program, s_old_k1)
    _store_sum(partial, 4, programs, program, s_old_k3)
    _store_sum(partial, 5, programs, program, s_ref_k1)
    _store_sum(partial, 6, programs, program, s_ref_k3)
    _store_sum(partial, 7, programs, program, s_ratio)
    _store_sum(partial, 8, programs, program, s_entropy)
    tl.store(partial + (SUMS * programs + program), tl.max(tl.max(least, axis=1), axis=0).to(tl.float64))
    tl.store(partial + ((SUMS + 1) * programs + program), tl.max(tl.max(most, axis=1), axis=0).to(tl.float64))
    tl.store(partial + ((SUMS + 2) * programs + program), tl.max(length, axis=0).to(tl.float64))
    tl.debug_barrier()  # every thread's stores come before the release below
    if tl.atomic_add(counter, 1, sem="acq_rel") == programs - 1:
        finish(
            row_sums, row_counts, partial, normalizer, loss, metrics, row_weight, B, T, chunks, programs,
            PACKED, HAS_NORMALIZER, AGGREGATION, SUMS, MERGE,
        )  # fmt: skip
        tl.store(counter, 0)


@triton.jit(do_not_specialize=["N", "row_units", "B", "chunks"])
def _backward_kernel(
    saved,  # f32 [B, T] or [N]
    mask,  # like saved, any dtype, nonzero = counted; read with HAS_ENTROPY alone
    row_weight,  # f32 [B]
    grad_loss,  # f32 []
    cu_seqlens,  # i64 [B + 1]
    entropy_coef,
    grad_logprobs,  # f32 like saved, out
    grad_entropy,  # f32 like saved, out
    N, row_units, B, chunks,  # T = row_units * VEC
    PACKED: tl.constexpr, HAS_MASK: tl.constexpr, HAS_ENTROPY: tl.constexpr,
    ROWS: tl.constexpr, STEPS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """8 bytes a token (+ 4 + m for the entropy). A gradient of 0 stays 0 whatever the upstream one is."""
    T = row_units * VEC
    program = tl.program_id(0)
    row = (program // chunks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_ok = row < B
    start, length, extent = _row_bounds(cu_seqlens, row, row_ok, N, T, B, PACKED)
    scale = tl.load(row_weight + row, mask=row_ok, other=0.0) * tl.load(grad_loss).to(tl.float32)
    scale = _wide(scale)
    TILE: tl.constexpr = STEPS * LANES * VEC
    columns = _columns(STEPS, LANES, VEC)
    for t0 in range((program % chunks) * TILE, tl.max(extent, axis=0), chunks * TILE):
        t = t0 + columns
        inside = _before(t, extent, row_ok, T, PACKED)
        at = _wide(start) + t
        grad = tl.load(saved + at, mask=inside, other=0.0)
        tl.store(grad_logprobs + at, tl.where(grad == 0.0, 0.0, grad * scale), mask=inside)
        if HAS_ENTROPY:
            counted = _before(t, length, row_ok, T, PACKED)
            if HAS_MASK:
                counted = counted & (tl.load(mask + at, mask=inside, other=0) != 0)
            tl.store(grad_entropy + at, tl.where(counted, -entropy_coef * scale, 0.0), mask=inside)


# --------------------------------------------------------------------------------------------------------- launch
def forward(
    logprobs: Tensor,  # f32 [B, T] or packed [N], contiguous, as all below
    old_logprobs: Tensor,  # f32 like logprobs
    advantages: Tensor,  # f32 like logprobs, or [B]
    mask: Tensor | None,  # like logprobs, any dtype, nonzero = counted
    ref_logprobs: Tensor | None,  # f32 like logprobs
    entropy: Tensor | None,  # f32 like logprobs
    weights: Tensor | None,  # f32 like logprobs
    cu_seqlens: Tensor | None,  # i64 [B + 1]
    options: PolicyOptions,
    want_token_loss: bool,
    normalizer: Tensor | None,  # f32 []
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss f32 [], metrics f32 [12], saved f32 like logprobs, row_weight f32 [B], token_loss like logprobs or [0])."""
    rows, tokens, longest = _extent(logprobs, cu_seqlens)
    loss, metrics = logprobs.new_empty(()), logprobs.new_empty(len(METRICS))
    saved, row_weight = torch.empty_like(logprobs), logprobs.new_empty(rows)
    token_loss = torch.empty_like(logprobs) if want_token_loss else logprobs.new_empty(0)
    if rows == 0 or tokens == 0:
        return loss.zero_(), metrics.zero_(), saved, row_weight.zero_(), token_loss
    together, columns, chunks = _tiling(rows, tokens, longest)
    vec = 4 if cu_seqlens is None and longest % 4 == 0 else 1
    programs = triton.cdiv(rows, together) * chunks
    row_sums = torch.empty((rows, chunks), dtype=torch.float64, device=logprobs.device)
    row_counts = torch.empty((rows, chunks), dtype=torch.int32, device=logprobs.device)
    partial = torch.empty((_PARTIALS, programs), dtype=torch.float64, device=logprobs.device)
    limits = (
        1.0 - options.clip_low, 1.0 + options.clip_high,
        *(math.inf if x is None else float(x) for x in (options.dual_clip, options.delta, options.log_ratio_clamp)),
        float(options.kl_coef), float(options.entropy_coef),
    )  # fmt: skip
    with on_device_of(logprobs):
        _forward_kernel[(programs,)](
            logprobs, old_logprobs, advantages, mask, ref_logprobs, entropy, weights, cu_seqlens, normalizer,
            *limits, loss, metrics, saved, row_weight, token_loss, row_sums, row_counts, partial,
            arrival_counter(logprobs), tokens, longest // vec, rows, chunks,
            PACKED=cu_seqlens is not None,
            PER_ROW_ADVANTAGE=advantages.shape != logprobs.shape,
            HAS_MASK=mask is not None, HAS_REF=ref_logprobs is not None, HAS_ENTROPY=entropy is not None,
            HAS_WEIGHTS=weights is not None, HAS_NORMALIZER=normalizer is not None, WANT_TOKEN_LOSS=want_token_loss,
            KL=0 if options.kl is None else 1 + KLS.index(options.kl),
            AGGREGATION=AGGREGATIONS.index(options.aggregation), SUMS=len(_NAMED_SUMS),
            MERGE=MERGE, **_shape(together, columns, vec),
        )  # fmt: skip
    return loss, metrics, saved, row_weight, token_loss


def backward(
    saved: Tensor,  # f32 [B, T] or [N]
    mask: Tensor | None,  # like saved
    row_weight: Tensor,  # f32 [B]
    grad_loss: Tensor,  # f32 []
    cu_seqlens: Tensor | None,  # i64 [B + 1]
    options: PolicyOptions,
) -> tuple[Tensor, Tensor]:
    """Gradients for logprobs and entropy ([0] without an entropy bonus), like saved."""
    rows, tokens, longest = _extent(saved, cu_seqlens)
    bonus = options.entropy_coef != 0
    grad = torch.empty_like(saved)
    grad_entropy = torch.empty_like(saved) if bonus else saved.new_empty(0)
    if rows == 0 or tokens == 0:
        return grad, grad_entropy
    together, columns, chunks = _tiling(rows, tokens, longest)
    vec = 4 if cu_seqlens is None and longest % 4 == 0 else 1
    with on_device_of(saved):
        _backward_kernel[(triton.cdiv(rows, together) * chunks,)](
            saved, mask, row_weight, grad_loss, cu_seqlens, float(options.entropy_coef), grad, grad_entropy,
            tokens, longest // vec, rows, chunks,
            PACKED=cu_seqlens is not None, HAS_MASK=mask is not None, HAS_ENTROPY=bonus,
            **_shape(together, columns, vec),
        )  # fmt: skip
    return grad, grad_entropy


def _extent(x: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int, int]:
    """(rows, tokens, longest row as far as the host knows)."""
    if cu_seqlens is None:
        return x.shape[0], x.numel(), x.shape[1]
    return cu_seqlens.shape[0] - 1, x.numel(), x.shape[0]
