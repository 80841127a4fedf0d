"""The statistics of a softmax row, streamed: device functions that the logprobs kernels share.

A row is read in blocks of [STEPS, LANES, VEC] columns. A lane is one thread; VEC neighbouring columns are its load (16
bytes where V is a multiple of that), and STEPS such loads make its share of a block. Every lane keeps its own running
maximum and sums, so that a block costs no shuffle, no barrier, and one rescaling per lane instead of one per column;
lanes are merged once, when the row is done, in an order that depends on their number alone. Hence bitwise batch
invariance at no cost.

Units: scale2 = inv_temperature * log2(e), so that exp((x - max) / temperature) is one ex2. A lane's sums are relative
to 2^base2, base2 = its maximum * scale2 rounded UP TO AN INTEGER: then x * scale2 - base2 is one FMA with one rounding,
and rescaling a sum multiplies it by a power of two, exactly. With the maximum itself as the base, x - max and the
scaling would be two instructions, or one FMA that is off by the rounding of max * scale2. `merge_lanes` returns to the
maximum. Where max * scale2 is so large that float32 holds no fractions of it (cold rows), what its rounding has cut
off is taken from every exponent: `_residual`, else 0. A column costs 9 instructions in bf16 (11 with the entropy) where
an H100 has room for 17 at full bandwidth.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import LN2, LOG2E, lane_columns, over_lane

#: Below any exponent whose exp2 is not 0: what -inf is replaced by where it would meet a 0 (-inf * 0 = NaN).
FLOOR: tl.constexpr = tl.constexpr(-1.0e4)
#: Between these a scale in float32 tells -inf from 0 and keeps products finite: distinct logits of which a colder
#: temperature makes something else than 0 and 1 do not exist, nor do those that a hotter one tells apart.
HOTTEST: tl.constexpr = tl.constexpr(2.0**-120)
COLDEST: tl.constexpr = tl.constexpr(2.0**95)
LARGEST: tl.constexpr = tl.constexpr(1.6e38)
INTEGERS: tl.constexpr = tl.constexpr(2.0**24)  # float32 has no fractions from here on
NEG_INF: tl.constexpr = tl.constexpr(float("-inf"))
INF: tl.constexpr = tl.constexpr(float("inf"))


@triton.jit
def inverse_temperature(inv_t, inv_t_stride, row, HAS_INV_T: tl.constexpr):
    """f64 scalar, from f64 [N] or a number (a plain float under the interpreter, f32 elsewhere)."""
    return tl.load(inv_t + row * inv_t_stride).to(tl.float64) if HAS_INV_T else tl.full([], inv_t, tl.float64)


@triton.jit
def scale_of(inverse64):
    """scale2 of a row, f32."""
    return tl.minimum(tl.maximum(inverse64, HOTTEST), COLDEST).to(tl.float32) * LOG2E


@triton.jit
def gradient_scale(inverse64):
    """1 / temperature in f32, finite: an infinite one times 0 would be NaN."""
    return tl.minimum(tl.maximum(inverse64, HOTTEST), LARGEST).to(tl.float32)


@triton.jit
def logit_at(logits_row, index, V):
    """Raw logit f32 of column(s) `index`; NaN, and nothing read, outside [0, V)."""
    inside = (index >= 0) & (index < V)
    x = tl.load(logits_row + tl.where(inside, index, 0), mask=inside, other=0).to(tl.float32)
    return tl.where(inside, x, float("nan"))


@triton.jit
def kept_logit_at(logits_row, keep_row, index, V, HAS_KEEP: tl.constexpr):
    """`logit_at`, -inf where the column is not kept."""
    x = logit_at(logits_row, index, V)
    if HAS_KEEP:
        inside = (index >= 0) & (index < V)
        dropped = inside & (tl.load(keep_row + tl.where(inside, index, 0), mask=inside, other=1) == 0)
        x = tl.where(dropped, NEG_INF, x)
    return x


@triton.jit
def kept_ids_at(keep_ids_row, j, k, V):
    """Kept ids at positions j of the row, V where there is none (padding, or outside the vocabulary)."""
    ids = tl.load(keep_ids_row + j, mask=j < k, other=-1)
    return tl.where((ids >= 0) & (ids < V), ids, V)


@triton.jit
def exponents(x, peak, base2, scale2):
    """(new maxima and bases of the lanes, shift of their sums to these, exponents t2 of a block x), in bits."""
    new_peak = tl.maximum(peak, tl.max(tl.max(x, axis=2), axis=0))
    new_base2 = _base2(new_peak, scale2)
    rest = _residual(new_peak, new_base2, scale2)
    shift2 = _shift2(peak, base2, _residual(peak, base2, scale2), new_base2, rest)
    t2 = tl.fma(x, scale2, -new_base2[None, :, None]) - rest[None, :, None]
    return new_peak, new_base2, shift2, t2


@triton.jit
def lane_step(
    x,  # f32 [STEPS, LANES, VEC], -inf where a column does not exist or is not kept
    real,  # i1, like x: columns that count for the mean
    peak, base2, total, weighted, squares, logit_sum, above,  # [LANES], running
    scale2,  # f32: inv_temperature * log2(e)
    label_x,  # f32: raw logit that rank counts against
    ENTROPY: tl.constexpr, SQUARES: tl.constexpr, MEAN: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """Folds one block into the lanes."""
    new_peak, new_base2, shift2, t2 = exponents(x, peak, base2, scale2)
    decay = tl.exp2(shift2)
    e = tl.exp2(t2)
    if ENTROPY:
        weighted = tl.fma(decay, tl.fma(shift2, total, weighted), over_lane(tl.maximum(t2, FLOOR) * e))
    if SQUARES:
        squares = tl.fma(decay * decay, squares, over_lane(e * e))
    if MEAN:
        logit_sum += over_lane(tl.where(real, x, 0.0))
    if RANK:
        above += over_lane((x > label_x).to(tl.int32))
    total = tl.fma(decay, total, over_lane(e))
    return new_peak, new_base2, total, weighted, squares, logit_sum, above


@triton.jit
def _base2(peak, scale2):
    """The integer that sums under this maximum are relative to; 0 where the maximum is -inf: never -inf - -inf."""
    return tl.where(peak == NEG_INF, 0.0, tl.ceil(peak * scale2))


@triton.jit
def _residual(peak, base2, scale2):
    """peak * scale2 - base2, exactly, where base2 is no integer above it but its rounding; else 0."""
    return tl.where(tl.abs(base2) < INTEGERS, 0.0, tl.fma(peak, scale2, -base2))


@triton.jit
def _shift2(peak, base2, rest, new_base2, new_rest):
    """Shift of old sums, in bits, at least FLOOR; a maximum of -inf has sums of 0 and any finite shift will do."""
    return tl.where(peak == NEG_INF, FLOOR, tl.maximum((base2 - new_base2) + (rest - new_rest), FLOOR))


@triton.jit
def to_row(peak, base2, scale2):
    """(maximum of a row, shift of the lanes' sums to one base in bits [LANES], from that to the maximum, f64)."""
    top = tl.max(peak, axis=0)
    top2 = _base2(top, scale2)
    rest = _residual(top, top2, scale2)
    shift2 = _shift2(peak, base2, _residual(peak, base2, scale2), top2, rest)
    # From 2^top2 to the maximum: 0 <= back2 < 1.
    back2 = tl.where(top == NEG_INF, 0.0, (top2.to(tl.float64) - top.to(tl.float64) * scale2) + rest)
    return top, shift2, back2


@triton.jit
def merge_lanes(peak, base2, total, weighted, squares, logit_sum, above, scale2):
    """[LANES] accumulators to f64 scalars relative to the maximum; `weighted` comes back in nats."""
    top, shift2, back2 = to_row(peak, base2, scale2)
    decay = tl.exp2(shift2)
    weighted = decay * (weighted + shift2 * total)
    total64 = tl.sum((decay * total).to(tl.float64), axis=0)
    weighted64 = tl.sum(weighted.to(tl.float64), axis=0)
    squares64 = tl.sum((decay * decay * squares).to(tl.float64), axis=0)
    back = tl.exp(back2 * LN2)
    return (
        top,
        back * total64,
        back * (weighted64 + back2 * total64) * LN2,
        back * back * squares64,
        tl.sum(logit_sum.to(tl.float64), axis=0),
        tl.sum(above, axis=0),
    )


@triton.jit
def first_maximum(
    row, keep_row, peak, first, top, V,
    HAS_KEEP: tl.constexpr, STEPS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """The first column that holds the row's maximum; 0 in a row of NaN. first: the block of each lane's maximum."""
    here = tl.min(tl.where(peak == top, first, V), axis=0) + lane_columns(STEPS, LANES, VEC)
    real = here < V
    x = tl.load(row + here, mask=real, other=NEG_INF).to(tl.float32)
    if HAS_KEEP:
        x = tl.where(tl.load(keep_row + here, mask=real, other=0) != 0, x, NEG_INF)
    argmax = tl.min(tl.min(tl.min(tl.where((x == top) & real, here, V), axis=2), axis=0), axis=0)
    return tl.where(argmax < V, argmax, 0)


@triton.jit
def scan_row(
    row,  # pointer to logits [V], unit stride
    keep_row,  # pointer to i1 [V]; unused without HAS_KEEP
    V,
    scale2, label_x,
    ENTROPY: tl.constexpr, SQUARES: tl.constexpr, MEAN: tl.constexpr, ARGMAX: tl.constexpr, RANK: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    STEPS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
    EVICTION: tl.constexpr,  # no default: Triton 3.6 takes no text for one
):  # fmt: skip
    """(max, sum_exp, sum_t_exp, sum_sq_exp, sum_logit, above, kept, argmax) of a row, which is read once.

    The next block is asked for before this one is folded: the loads of a whole block are always in flight. For the
    argmax a lane remembers only the block of its first maximum; the one block that holds the row's is read again.
    EVICTION: what becomes of the row in the caches; "evict_last" where it is soon read again.
    """
    BLOCK: tl.constexpr = STEPS * LANES * VEC
    columns = lane_columns(STEPS, LANES, VEC)
    peak = tl.full([LANES], NEG_INF, tl.float32)
    base2 = tl.zeros([LANES], tl.float32)
    total = tl.zeros([LANES], tl.float32)
    weighted = tl.zeros([LANES], tl.float32)
    squares = tl.zeros([LANES], tl.float32)
    logit_sum = tl.zeros([LANES], tl.float32)
    above = tl.zeros([LANES], tl.int32)
    kept = tl.zeros([LANES], tl.int32)
    first = tl.zeros([LANES], tl.int32)
    ahead = tl.load(row + columns, mask=columns < V, other=NEG_INF, eviction_policy=EVICTION)
    for start in range(0, V, BLOCK):
        here = start + columns
        x = ahead.to(tl.float32)
        ahead = tl.load(row + (here + BLOCK), mask=here < V - BLOCK, other=NEG_INF, eviction_policy=EVICTION)
        real = here < V
        if HAS_KEEP:
            real = tl.load(keep_row + here, mask=real, other=0) != 0
            x = tl.where(real, x, NEG_INF)
            if MEAN:
                kept += over_lane(real.to(tl.int32))
        before = peak
        peak, base2, total, weighted, squares, logit_sum, above = lane_step(
            x, real, peak, base2, total, weighted, squares, logit_sum, above,
            scale2, label_x, ENTROPY, SQUARES, MEAN, RANK,
        )  # fmt: skip
        if ARGMAX:
            first = tl.where(peak > before, start, first)
    top, total64, weighted64, squares64, sum64, rank = merge_lanes(
        peak, base2, total, weighted, squares, logit_sum, above, scale2
    )
    count = V
    if HAS_KEEP and MEAN:
        count = tl.sum(kept, axis=0)
    argmax = 0
    if ARGMAX:
        argmax = first_maximum(row, keep_row, peak, first, top, V, HAS_KEEP, STEPS, LANES, VEC)
    return top, total64, weighted64, squares64, sum64, rank, count, argmax


@triton.jit
def store_values(
    values,  # pointer to f32 [8, N]
    N,  # i64
    row, ok,  # which row(s), and which of them exist: scalars or [R]
    top, total, weighted, squares, logit_sum, count,  # f64 (count: any), scalars or [R]
    label_x, inv_t,  # f64
    ENTROPY: tl.constexpr, SQUARES: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """From sums to outputs: the layout of fastreward._runtime.layout.VALUES. 32 bytes a row.

    a / b is a * exp(-log b): a division in f64 is a subroutine, and around its call ptxas spills.
    """
    log_total = tl.log(total)
    empty = top == NEG_INF
    tl.store(values + row, ((label_x - top) * inv_t - log_total).to(tl.float32), mask=ok)
    if ENTROPY:
        tl.store(values + (N + row), (log_total - weighted * tl.exp(-log_total)).to(tl.float32), mask=ok)
    else:
        tl.store(values + (N + row), 0.0, mask=ok)
    tl.store(values + (2 * N + row), tl.where(tl.abs(top) == INF, top, top * inv_t + log_total).to(tl.float32), mask=ok)
    tl.store(values + (3 * N + row), (label_x * inv_t).to(tl.float32), mask=ok)
    if MEAN:
        tl.store(
            values + (4 * N + row), (logit_sum * tl.exp(-tl.log(count.to(tl.float64))) * inv_t).to(tl.float32), mask=ok
        )
    else:
        tl.store(values + (4 * N + row), 0.0, mask=ok)
    if SQUARES:
        tl.store(values + (5 * N + row), (tl.log(squares) - 2.0 * log_total).to(tl.float32), mask=ok)
    else:
        tl.store(values + (5 * N + row), 0.0, mask=ok)
    tl.store(values + (6 * N + row), tl.where(empty, float("nan"), -log_total).to(tl.float32), mask=ok)
    tl.store(values + (7 * N + row), top.to(tl.float32), mask=ok)


@triton.jit
def store_row(
    values, indices,  # pointers to f32 [8, N], i64 [2, N]
    N, row, ok, top, total, weighted, squares, logit_sum, count, label_x, inv_t,  # as of store_values
    argmax, rank,
    ENTROPY: tl.constexpr, SQUARES: tl.constexpr, MEAN: tl.constexpr, ARGMAX: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """`store_values`, and fastreward._runtime.layout.INDICES: 48 bytes a row."""
    store_values(
        values, N, row, ok, top, total, weighted, squares, logit_sum, count, label_x, inv_t, ENTROPY, SQUARES, MEAN
    )
    if ARGMAX:
        tl.store(indices + row, argmax.to(tl.int64), mask=ok)
    else:
        tl.store(indices + row, 0, mask=ok)
    if RANK:
        tl.store(indices + (N + row), rank.to(tl.int64), mask=ok)
    else:
        tl.store(indices + (N + row), 0, mask=ok)


@triton.jit
def store_masked_row(values, indices, N, row):
    """All outputs of a masked row are 0."""
    for i in tl.static_range(8):
        tl.store(values + (i * N + row), 0.0)
    tl.store(indices + row, 0)
    tl.store(indices + (N + row), 0)
