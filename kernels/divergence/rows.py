"""Two rows of logits side by side: what the generated kernels of a divergence call.

`scan_pair` reads both once, for the softmax statistics of each (_shared/softmax.py) and the moments of one over the
other: e (t - u) and f (t - u) for their exponentials e, f and exponents t, u in bits, relative to bases that are moved
as maxima grow. `log_prob` is for sums that need the normalisers first, on a second read.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._shared.device import INTERPRETED, LN2, LOG2E, lane_columns, over_lane
from .._shared.softmax import (
    FLOOR,
    NEG_INF,
    exponents,
    first_maximum,
    gradient_scale,
    inverse_temperature,
    logit_at,
    merge_lanes,
    scale_of,
    store_values,
    to_row,
)

#: Log-probs below this count as this: what a forbidden token costs stays finite.
LOWEST: tl.constexpr = tl.constexpr(-1.0e4)
#: Exponents so far apart, in bits, may be of log-probs below LOWEST, which the moments don't cut: read again.
FAR: tl.constexpr = tl.constexpr(9000.0)


@triton.jit
def lane_units(STEPS: tl.constexpr, LANES: tl.constexpr):
    """Numbers of a block's loads, i32 [STEPS, LANES, 1]."""
    return (tl.arange(0, STEPS)[:, None, None] * LANES) + tl.arange(0, LANES)[None, :, None]


@triton.jit
def scan_pair(
    x_row, y_row,  # pointers to logits [V], unit stride
    V,
    x_scale2, y_scale2,
    P: tl.constexpr, Q: tl.constexpr,  # which moments: sum p (log p - log q), sum q (log p - log q)
    P_LOG: tl.constexpr, Q_LOG: tl.constexpr,  # sum p log p, sum q log q
    ARGMAX: tl.constexpr,
    EVICTION: tl.constexpr, STEPS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Both rows' (max, sum_exp, sum_t_exp, argmax), then (of_p, of_q, far), each row read once.

    of_p, of_q: the moments before they are normalised, in nats, relative to the maxima. far: whether log-probs below
    LOWEST may be among them.
    """
    BLOCK: tl.constexpr = STEPS * LANES * VEC
    columns = lane_columns(STEPS, LANES, VEC)
    x_peak = tl.full([LANES], NEG_INF, tl.float32)
    y_peak = tl.full([LANES], NEG_INF, tl.float32)
    x_base2 = tl.zeros([LANES], tl.float32)
    y_base2 = tl.zeros([LANES], tl.float32)
    x_total = tl.zeros([LANES], tl.float32)
    y_total = tl.zeros([LANES], tl.float32)
    x_weighted = tl.zeros([LANES], tl.float32)
    y_weighted = tl.zeros([LANES], tl.float32)
    of_p = tl.zeros([LANES], tl.float32)
    of_q = tl.zeros([LANES], tl.float32)
    above = tl.full([LANES], NEG_INF, tl.float32)  # largest t - u, and largest u - t
    below = tl.full([LANES], NEG_INF, tl.float32)
    x_first = tl.zeros([LANES], tl.int32)
    y_first = tl.zeros([LANES], tl.int32)
    x_ahead = tl.load(x_row + columns, mask=columns < V, other=NEG_INF, eviction_policy=EVICTION)
    y_ahead = tl.load(y_row + columns, mask=columns < V, other=NEG_INF, eviction_policy=EVICTION)
    for start in range(0, V, BLOCK):
        next_block = start + BLOCK + columns
        x = x_ahead.to(tl.float32)
        y = y_ahead.to(tl.float32)
        x_ahead = tl.load(x_row + next_block, mask=next_block < V, other=NEG_INF, eviction_policy=EVICTION)
        y_ahead = tl.load(y_row + next_block, mask=next_block < V, other=NEG_INF, eviction_policy=EVICTION)
        x_before = x_peak
        y_before = y_peak
        x_peak, x_base2, x_shift2, t2 = exponents(x, x_peak, x_base2, x_scale2)
        y_peak, y_base2, y_shift2, u2 = exponents(y, y_peak, y_base2, y_scale2)
        if ARGMAX:
            x_first = tl.where(x_peak > x_before, start, x_first)
            y_first = tl.where(y_peak > y_before, start, y_first)
        x_decay = tl.exp2(x_shift2)
        y_decay = tl.exp2(y_shift2)
        e = tl.exp2(t2)
        f = tl.exp2(u2)
        if P_LOG:
            t2 = tl.maximum(t2, FLOOR)
        if Q_LOG:
            u2 = tl.maximum(u2, FLOOR)
        if P or Q:
            moved = x_shift2 - y_shift2
            apart = t2 - u2
            if P:  # an infinite one is far, and those of e = 0 are any finite number
                near = apart if P_LOG and Q_LOG else tl.maximum(apart, FLOOR)
                of_p = tl.fma(x_decay, tl.fma(moved, x_total, of_p), over_lane(e * near))
                above = tl.maximum(above + moved, tl.max(tl.max(near, axis=2), axis=0))
            if Q:
                near = -apart if P_LOG and Q_LOG else tl.maximum(-apart, FLOOR)
                of_q = tl.fma(y_decay, tl.fma(moved, y_total, of_q), -over_lane(f * near))
                below = tl.maximum(below - moved, tl.max(tl.max(near, axis=2), axis=0))
        if P_LOG:
            x_weighted = tl.fma(x_decay, tl.fma(x_shift2, x_total, x_weighted), over_lane(t2 * e))
        if Q_LOG:
            y_weighted = tl.fma(y_decay, tl.fma(y_shift2, y_total, y_weighted), over_lane(u2 * f))
        x_total = tl.fma(x_decay, x_total, over_lane(e))
        y_total = tl.fma(y_decay, y_total, over_lane(f))
    moment_p, moment_q, far = _to_nats(
        x_peak, x_base2, x_scale2, x_total, y_peak, y_base2, y_scale2, y_total, of_p, of_q, above, below
    )
    none = tl.zeros([LANES], tl.float32)
    x_top, x_sum, x_sum_t, _, _, _ = merge_lanes(x_peak, x_base2, x_total, x_weighted, none, none, x_first, x_scale2)
    y_top, y_sum, y_sum_t, _, _, _ = merge_lanes(y_peak, y_base2, y_total, y_weighted, none, none, y_first, y_scale2)
    x_argmax = 0
    y_argmax = 0
    if ARGMAX:
        x_argmax = first_maximum(x_row, x_row, x_peak, x_first, x_top, V, False, STEPS, LANES, VEC)
        y_argmax = first_maximum(y_row, y_row, y_peak, y_first, y_top, V, False, STEPS, LANES, VEC)
    return x_top, x_sum, x_sum_t, x_argmax, y_top, y_sum, y_sum_t, y_argmax, moment_p, moment_q, far


@triton.jit
def _to_nats(
    x_peak, x_base2, x_scale2, x_total, y_peak, y_base2, y_scale2, y_total,  # [LANES] but the scales
    of_p, of_q, above, below,  # [LANES]
):  # fmt: skip
    """The lanes' moments as f64 scalars relative to the maxima, and whether any exponents were FAR apart."""
    _, x_shift2, x_back2 = to_row(x_peak, x_base2, x_scale2)
    _, y_shift2, y_back2 = to_row(y_peak, y_base2, y_scale2)
    x_decay = tl.exp2(x_shift2)
    y_decay = tl.exp2(y_shift2)
    moved = x_shift2 - y_shift2
    back2 = x_back2 - y_back2
    p = tl.sum((x_decay * tl.fma(moved, x_total, of_p)).to(tl.float64), axis=0)
    q = tl.sum((y_decay * tl.fma(moved, y_total, of_q)).to(tl.float64), axis=0)
    p += back2 * tl.sum((x_decay * x_total).to(tl.float64), axis=0)
    q += back2 * tl.sum((y_decay * y_total).to(tl.float64), axis=0)
    far = tl.maximum(tl.max(above + moved, axis=0), tl.max(below - moved, axis=0)) > FAR
    return p * tl.exp(x_back2 * LN2) * LN2, q * tl.exp(y_back2 * LN2) * LN2, far


@triton.jit
def pair_statistics(
    x_row, y_row,  # pointers to logits [V], unit stride
    label, V, x_inverse64, y_inverse64,
    student, teacher, agreement,  # pointers to f32 [8, N], f32 [8, N], f32 [N]
    N, row,  # i64
    P: tl.constexpr, Q: tl.constexpr, P_LOG: tl.constexpr, Q_LOG: tl.constexpr, STATISTICS: tl.constexpr,
    EVICTION: tl.constexpr, STEPS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Stores the statistics of both rows, with STATISTICS entropies and agreement too.

    Returns what `log_prob` takes of either, the four moments f64, in nats (0 where not asked for), far of scan_pair.
    """
    x_top, x_sum, x_sum_t, x_argmax, y_top, y_sum, y_sum_t, y_argmax, of_p, of_q, far = scan_pair(
        x_row, y_row, V, scale_of(x_inverse64), scale_of(y_inverse64),
        P, Q, P_LOG or STATISTICS, Q_LOG or STATISTICS, STATISTICS, EVICTION, STEPS, LANES, VEC,
    )  # fmt: skip
    x_label = logit_at(x_row, label, V).to(tl.float64)
    y_label = logit_at(y_row, label, V).to(tl.float64)
    store_values(
        student, N, row, True, x_top, x_sum, x_sum_t, 1.0, 0.0, V, x_label, x_inverse64, STATISTICS, False, False
    )
    store_values(
        teacher, N, row, True, y_top, y_sum, y_sum_t, 1.0, 0.0, V, y_label, y_inverse64, STATISTICS, False, False
    )
    same = 0.0
    if STATISTICS:
        same = tl.where(x_argmax == y_argmax, 1.0, 0.0)
    tl.store(agreement + row, same)
    x_log = tl.log(x_sum)
    y_log = tl.log(y_sum)
    log_p = tl.full([], 0.0, tl.float64)
    log_q = tl.full([], 0.0, tl.float64)
    if P:
        of_p = of_p * tl.exp(-x_log) + (y_log - x_log)
    if Q:
        of_q = of_q * tl.exp(-y_log) + (y_log - x_log)
    if P_LOG:
        log_p = x_sum_t * tl.exp(-x_log) - x_log
    if Q_LOG:
        log_q = y_sum_t * tl.exp(-y_log) - y_log
    x_top_logprob = tl.where(x_top == NEG_INF, float("nan"), -x_log).to(tl.float32)
    y_top_logprob = tl.where(y_top == NEG_INF, float("nan"), -y_log).to(tl.float32)
    return (
        x_top, gradient_scale(x_inverse64), x_top_logprob, y_top, gradient_scale(y_inverse64), y_top_logprob,
        of_p, of_q, log_p, log_q, far,
    )  # fmt: skip


@triton.jit
def store_masked_pair(student, teacher, agreement, outputs, N, row, OUTPUTS: tl.constexpr):
    """All outputs of a masked row are 0."""
    for i in tl.static_range(8):
        tl.store(student + (i * N + row), 0.0)
        tl.store(teacher + (i * N + row), 0.0)
    for i in tl.static_range(OUTPUTS):
        tl.store(outputs + (i * N + row), 0.0)
    tl.store(agreement + row, 0.0)


@triton.jit
def shape_of(values, N, row, inv_t, inv_t_stride, HAS_INV_T: tl.constexpr):
    """(largest logit, 1 / temperature, log-prob of the largest) of a row, f32: what `log_prob` takes."""
    inverse = gradient_scale(inverse_temperature(inv_t, inv_t_stride, row, HAS_INV_T))
    return tl.load(values + (7 * N + row)), inverse, tl.load(values + (6 * N + row))


@triton.jit
def log_prob(x, top, inverse, top_logprob):
    """(log-prob, at least LOWEST, and probability) of logits x in a row of largest logit `top`.

    A log-prob is good to 2^-23 of itself, hence p to |log p| times that; quick_exp and quick_log do not add to it.
    """
    log = tl.fma(x - top, inverse, top_logprob)
    return tl.maximum(log, LOWEST, propagate_nan=tl.PropagateNan.ALL), tl.exp2(log * LOG2E)


@triton.jit
def quick_exp(x):
    """e^x without correction for the rounding of x in bits."""
    return tl.exp2(x * LOG2E)


@triton.jit
def quick_log(x):
    """Natural logarithm, near 1 good to 2^-22 absolutely and no more: of what is weighted by a probability.

    The unit for log2 and one multiplication, where `tl.log` and `tl.log2` are polynomials of 26 instructions.
    """
    if INTERPRETED:
        return tl.log(x)
    log2 = tl.inline_asm_elementwise("lg2.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return log2 * LN2
