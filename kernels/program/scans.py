"""Scans along a tile's rows, with what comes from the tiles before: y_t = x_t + c_t y_(t-1), and neighbours' values.

In f64, so that the order in which a tile's tokens are joined, which follows the tiling, is all but never seen in f32.
Tokens that do not count are the map y -> y. A c of 0 starts anew, whatever lies before.

What a tile makes of what comes into it is such a map too, a shift's of c = 0 or 1: `scan_map`, `shift_map`. Where
several programs share a row, a launch before keeps every tile's, and a program folds those before its own (`carried`),
one after the other as a program alone would have: the same bits.
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
def _scanned(x, c, valid, REVERSE: tl.constexpr):
    """The maps from before the tile, behind it where reversed, to each token: c and x, f64 [ROWS, TILE]."""
    maps = _flat(tl.where(valid, c, 1.0).to(tl.float64)), _flat(tl.where(valid, x, 0.0).to(tl.float64))
    return tl.associative_scan(maps, 1, _joined, reverse=REVERSE)


@triton.jit
def scan(
    x,  # [ROWS, STEPS, LANES, VEC], or one value for several
    c,  # the same
    valid,  # i1 [ROWS, STEPS, LANES, VEC]
    carry,  # f64 [ROWS]: the scan's value at the token before the tile, behind it where reversed
    REVERSE: tl.constexpr,
):
    """(the scan f32, like valid; the next tile's carry)."""
    products, sums = _scanned(x, c, valid, REVERSE)
    y = tl.where(products == 0.0, sums, tl.fma(products, carry[:, None], sums))
    return tl.reshape(y, valid.shape).to(tl.float32), _last(y, REVERSE)


@triton.jit
def scan_map(x, c, valid, REVERSE: tl.constexpr):
    """(c, x) f64 [ROWS]: the tile's own map."""
    products, sums = _scanned(x, c, valid, REVERSE)
    return _last(products, REVERSE), _last(sums, REVERSE)


@triton.jit
def _shifted(x, valid, REVERSE: tl.constexpr):
    """`_neighbours` of the tokens up to each, [ROWS, TILE]."""
    counts = _flat(valid.to(tl.int32))
    values = _flat(tl.where(valid, x, 0.0).to(tl.float32))
    runs = counts, values, tl.zeros_like(values)
    return tl.associative_scan(runs, 1, _neighbours, reverse=REVERSE)


@triton.jit
def shift(
    x,  # f32 [ROWS, STEPS, LANES, VEC], or one value for several
    valid,  # i1 [ROWS, STEPS, LANES, VEC]
    carry,  # f32 [ROWS]: the last value before the tile, behind it where reversed
    REVERSE: tl.constexpr,
):
    """(x of the valid token before, f32, like valid; the next tile's carry)."""
    count, last, before = _shifted(x, valid, REVERSE)
    y = tl.where(count > 1, before, carry[:, None])
    carry = tl.where(_last(count, REVERSE) > 0, _last(last, REVERSE), carry)
    return tl.reshape(y, valid.shape), carry


@triton.jit
def shift_map(x, valid, REVERSE: tl.constexpr):
    """(c, x) f64 [ROWS]: 0 and the tile's last value, or 1 and 0 where no token counts."""
    count, last, _ = _shifted(x, valid, REVERSE)
    empty = _last(count, REVERSE) == 0
    return tl.where(empty, 1.0, 0.0).to(tl.float64), tl.where(empty, 0.0, _last(last, REVERSE)).to(tl.float64)


# ------------------------------------------------------------------------------------------- rows that programs share
@triton.jit
def tile_slot(start, row, B, N, TILE: tl.constexpr):
    """(where the maps of a row's tiles begin, how many places there are for all rows'), i64."""
    return start // TILE + row, (N // TILE + B).to(tl.int64)


@triton.jit
def store_map(maps, WHICH: tl.constexpr, slots, slot, c, x, ok):
    """A tile's map, of scan WHICH of the pass; maps: f64 [scans, 2, slots]."""
    tl.store(maps + 2 * WHICH * slots + slot, c, mask=ok)
    tl.store(maps + (2 * WHICH + 1) * slots + slot, x, mask=ok)


@triton.jit
def carried(maps, WHICH: tl.constexpr, slots, slot, tiles, carry, ok):
    """`carry` as the row's first `tiles` tiles make it. Sixteen are loaded at once."""
    y = carry.to(tl.float64)
    for first in range(0, tiles, 16):
        for k in tl.static_range(16):
            at = slot + first + k
            there = ok & (at < slot + tiles)
            c = tl.load(maps + 2 * WHICH * slots + at, mask=there, other=1.0)
            x = tl.load(maps + (2 * WHICH + 1) * slots + at, mask=there, other=0.0)
            y = tl.where(there, tl.where(c == 0.0, x, tl.fma(c, y, x)), y)
    return y.to(carry.dtype)
