"""Device functions that several operations share: tiles, sums, and arithmetic that Triton has only as a subroutine."""

from __future__ import annotations

import triton
import triton.language as tl

#: Whether Triton's interpreter runs the kernels, which has no inline PTX.
INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


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
