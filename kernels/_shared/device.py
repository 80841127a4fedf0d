"""Device functions that several operations share: tiles, sums, and arithmetic that Triton has only as a subroutine."""

from __future__ import annotations

import triton
import triton.language as tl

LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
_LOG2E_F32: tl.constexpr = tl.constexpr(1.4426950216293335)  # log2(e) as f32, and what that leaves out
_LOG2E_REST: tl.constexpr = tl.constexpr(1.92596299112661e-08)


@triton.jit
def lane_columns(STEPS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr):
    """Columns of a block, i32 [STEPS, LANES, VEC]."""
    step = tl.arange(0, STEPS)[:, None, None]
    lane = tl.arange(0, LANES)[None, :, None]
    return (step * LANES + lane) * VEC + tl.arange(0, VEC)[None, None, :]


@triton.jit
def over_lane(x):
    """Sum of [STEPS, LANES, VEC] within each lane: [LANES]; no data leaves a thread."""
    return tl.sum(tl.sum(x, axis=2), axis=0)


@triton.jit
def sum_all(x):
    """Sum of [A, B, C] to a scalar: within lanes, then across them."""
    return tl.sum(over_lane(x), axis=0)


@triton.jit
def inverse64(x):
    """1 / x in f64 for x in the range of f32: two Newton steps. A division would be a subroutine, and spill."""
    y = (1.0 / x.to(tl.float32)).to(tl.float64)
    y = y * (2.0 - x * y)
    return y * (2.0 - x * y)


@triton.jit
def exp32(x):
    """exp(x) in f32 to about 1 ulp: exp2 of x * log2(e) with the product's rounding error put back.

    `tl.exp` is ex2(x * log2(e)), off by |x| * 1e-7: too much where a loss compares exp(x) with x.
    """
    high = x * _LOG2E_F32
    low = tl.fma(x, _LOG2E_F32, -high) + x * _LOG2E_REST
    return tl.exp2(high) * (1.0 + low * LN2)


@triton.jit
def exp_minus_1_minus(x, exp_x):
    """exp(x) - 1 - x without the cancellation near 0; exp_x = exp(x)."""
    series = 1.0 + x * (1.0 / 7.0) * (1.0 + x * (1.0 / 8.0))
    series = 1.0 + x * (1.0 / 5.0) * (1.0 + x * (1.0 / 6.0) * series)
    series = 1.0 + x * (1.0 / 3.0) * (1.0 + x * (1.0 / 4.0) * series)
    return tl.where(tl.abs(x) < 0.5, 0.5 * x * x * series, exp_x - 1.0 - x)
