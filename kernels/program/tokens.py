"""Shared parts of the generated token passes of loss programs: tiles of tokens, running sums, partial results.

A tile is [ROWS, STEPS, LANES, VEC] tokens. VEC neighbours are one load; sums run over STEPS and VEC within a thread and
cross threads when a program is done. A row's partial results are [chunks] f64 each, one per program that worked on
the row; where there is one program a row they are the final ones.
"""

from __future__ import annotations

import triton
import triton.language as tl

NEG_INF: tl.constexpr = tl.constexpr(float("-inf"))
NAN_BITS: tl.constexpr = tl.constexpr(0x7FC00000)
NOTHING: tl.constexpr = tl.constexpr(-2139095041)  # `most` of nothing: -inf


# ---------------------------------------------------------------------------------------------------------- places
@triton.jit
def row_bounds(cu_seqlens, row, ok, N, T, B, PACKED: tl.constexpr):
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
def before(t, bound, row_ok, T, PACKED: tl.constexpr):
    """t < bound of the row; padded, as t < T, from which the compiler sees that VEC neighbours go together."""
    return (t < wide(bound)) if PACKED else ((t < T) & wide(row_ok))


@triton.jit
def tile_columns(STEPS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr):
    """Offsets of a tile along its rows, i32 [1, STEPS, LANES, VEC]."""
    step = tl.arange(0, STEPS)[None, :, None, None]
    lane = tl.arange(0, LANES)[None, None, :, None]
    return (step * LANES + lane) * VEC + tl.arange(0, VEC)[None, None, None, :]


@triton.jit
def wide(x):
    """[ROWS] to [ROWS, 1, 1, 1]."""
    return x[:, None, None, None]


# ---------------------------------------------------------------------------------------- running sums, [ROWS, LANES]
@triton.jit
def add(lane, x, valid):
    """Running sums plus what counts of x [ROWS, STEPS, LANES, VEC], in the type of the sums."""
    return lane + tl.sum(tl.sum(tl.where(valid, x, 0.0).to(lane.dtype), axis=3), axis=1)


@triton.jit
def count(lane, valid):
    """Running counts, i32."""
    return lane + tl.sum(tl.sum(valid.to(tl.int32), axis=3), axis=1)


@triton.jit
def most(lane, x, valid):
    """Running maxima of what counts, i32 as `ordered` has them."""
    return tl.maximum(lane, tl.max(tl.max(_ordered(tl.where(valid, x, NEG_INF)), axis=3), axis=1))


@triton.jit
def sum_of(lane):
    """[ROWS] f64 of running sums or counts."""
    return tl.sum(lane.to(tl.float64), axis=1)


@triton.jit
def most_of(lane):
    """[ROWS] f64 of running maxima."""
    key = tl.max(lane, axis=1)
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True).to(tl.float64)


@triton.jit
def _ordered(x):
    """f32 as i32 in the same order with NaN on top: integer maxima keep a NaN, those of floats lose it."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x == x, bits ^ ((bits >> 31) & 0x7FFFFFFF), NAN_BITS)


# ------------------------------------------------------------------------------------------------- partial results
@triton.jit
def store_partial(
    columns,  # f64 [COLUMNS, B], then [reductions, B, chunks]
    value,  # f64 [ROWS]
    row, ok, B, chunk, chunks,
    COLUMN: tl.constexpr, FIRST: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A program's share of COLUMN, or all where one program does the whole row. FIRST: the pass's first column."""
    B = B.to(tl.int64)
    share = COLUMNS * B + ((COLUMN - FIRST) * B + row) * chunks + chunk
    tl.store(columns + tl.where(chunks > 1, share, COLUMN * B + row), value, mask=ok)


@triton.jit
def is_last(counter, programs):
    """Whether all other programs have stored their results; true for one of them. That one resets the counter."""
    tl.debug_barrier()  # every thread's stores come before the release below
    return tl.atomic_add(counter, 1, sem="acq_rel") == programs - 1
