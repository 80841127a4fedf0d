"""Scans along a tile's rows, with what comes from the tiles before: y_t = x_t + c_t y_(t-1), and neighbours' values.

In f64, so that the order in which a tile's tokens are joined, which follows the tiling, is all but never seen in f32.
Tokens that do not count are the map y -> y. A c of 0 starts anew, whatever lies before.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _joined(c, x, c_after, x_after):
    """y -> c y + x, then y -> c_after y + x_after."""
    return c * c_after, tl.where(c_after == 0.0, x_after, tl.fma(c_after, x, x_after))


@triton.jit
def _neighbours(count, last, before, count_after, last_after, before_after):
    """Of two runs of tokens: how many count, up to two, the last one's value and that of the one before it."""
    return (
        tl.minimum(count + count_after, 2),
        tl.where(count_after > 0, last_after, last),
        tl.where(count_after > 1, before_after, tl.where(count_after == 1, last, before)),
    )


@triton.jit
def _flat(x):
    """[ROWS, STEPS, LANES, VEC] to [ROWS, TILE]."""
    return tl.reshape(x, [x.shape[0], x.shape[1] * x.shape[2] * x.shape[3]])


@triton.jit
def _last(x, REVERSE: tl.constexpr):
    """[ROWS]: what a row's scan has come to."""
    END: tl.constexpr = 0 if REVERSE else x.shape[1] - 1
    return tl.sum(tl.where(tl.arange(0, x.shape[1])[None, :] == END, x, tl.zeros_like(x)), axis=1)


@triton.jit
def scan(
    x,  # [ROWS, STEPS, LANES, VEC], or one value for several
    c,  # the same
    valid,  # i1 [ROWS, STEPS, LANES, VEC]
    carry,  # f64 [ROWS]: the scan's value at the token before the tile, behind it where reversed
    REVERSE: tl.constexpr,
):
    """(the scan f32, like valid; the next tile's carry)."""
    maps = _flat(tl.where(valid, c, 1.0).to(tl.float64)), _flat(tl.where(valid, x, 0.0).to(tl.float64))
    products, sums = tl.associative_scan(maps, 1, _joined, reverse=REVERSE)
    y = tl.where(products == 0.0, sums, tl.fma(products, carry[:, None], sums))
    return tl.reshape(y, valid.shape).to(tl.float32), _last(y, REVERSE)


@triton.jit
def shift(
    x,  # f32 [ROWS, STEPS, LANES, VEC], or one value for several
    valid,  # i1 [ROWS, STEPS, LANES, VEC]
    carry,  # f32 [ROWS]: the last value before the tile, behind it where reversed
    REVERSE: tl.constexpr,
):
    """(x of the valid token before, f32, like valid; the next tile's carry)."""
    counts = _flat(valid.to(tl.int32))
    values = _flat(tl.where(valid, x, 0.0).to(tl.float32))
    runs = counts, values, tl.zeros_like(values)
    count, last, before = tl.associative_scan(runs, 1, _neighbours, reverse=REVERSE)
    y = tl.where(count > 1, before, carry[:, None])
    carry = tl.where(_last(count, REVERSE) > 0, _last(last, REVERSE), carry)
    return tl.reshape(y, valid.shape), carry
