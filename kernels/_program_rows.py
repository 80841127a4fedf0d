"""What the generated work per sequence of loss programs shares: columns of f64, reductions over groups and the batch.

One program does this work, the last of a launch to arrive, so that no other launch has to wait for it. What other
programs or other threads have written is read past the L1 cache (.cg). Sums are in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._program_math import INF, maximum, minimum

SUM: tl.constexpr = tl.constexpr(0)
MAX: tl.constexpr = tl.constexpr(1)
MIN: tl.constexpr = tl.constexpr(2)
_CHUNKS: tl.constexpr = tl.constexpr(8)  # partial results of a row taken at once
_CUMULATED: tl.constexpr = tl.constexpr(64)  # rows whose cumulative sum is taken at once


# --------------------------------------------------------------------------------------------------------- columns
@triton.jit
def column(columns, row, ok, B, COLUMN: tl.constexpr):
    """Values of a column of f64 [COLUMNS, B], 0 where a row does not exist."""
    return tl.load(columns + (COLUMN * B.to(tl.int64) + row), mask=ok, other=0.0, cache_modifier=".cg")


@triton.jit
def store_column(columns, row, ok, B, value, COLUMN: tl.constexpr):
    """Into a column of f64 [COLUMNS, B]."""
    tl.store(columns + (COLUMN * B.to(tl.int64) + row), value, mask=ok)


# ------------------------------------------------------------------------------------------------------ reductions
@triton.jit
def largest(x, axis: tl.constexpr):
    """Maximum along an axis, NaN where there is one: `tl.max` would lose it."""
    bad = tl.max((x != x).to(tl.int32), axis=axis)
    return tl.where(bad > 0, float("nan"), tl.max(tl.where(x == x, x, -INF), axis=axis))


@triton.jit
def smallest(x, axis: tl.constexpr):
    """Minimum along an axis, NaN where there is one."""
    return -largest(-x, axis)


@triton.jit
def _nothing(KIND: tl.constexpr):
    """The reduction of nothing."""
    if KIND == SUM:
        return tl.full([], 0.0, tl.float64)
    elif KIND == MAX:
        return tl.full([], -INF, tl.float64)
    else:
        return tl.full([], INF, tl.float64)


@triton.jit
def _combined(x, y, KIND: tl.constexpr):
    """Elementwise sum, maximum or minimum."""
    if KIND == SUM:
        return x + y
    elif KIND == MAX:
        return maximum(x, y)
    else:
        return minimum(x, y)


@triton.jit
def _reduced(x, KIND: tl.constexpr):
    """[N, M] to [N]."""
    if KIND == SUM:
        return tl.sum(x, axis=1)
    elif KIND == MAX:
        return largest(x, 1)
    else:
        return smallest(x, 1)


@triton.jit
def merge_chunks(
    columns,  # f64 [COLUMNS, B], then [reductions, B, chunks]
    B, chunks,
    COLUMN: tl.constexpr, COUNT: tl.constexpr, FIRST: tl.constexpr, COLUMNS: tl.constexpr, KIND: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Columns COLUMN, COLUMN + 1, ... (COUNT of them) from the programs' shares of them, in order."""
    B = B.to(tl.int64)
    shares = columns + (COLUMNS + (COLUMN - FIRST) * chunks) * B
    lane = tl.arange(0, _CHUNKS)[None, :]
    for first in range(0, COUNT * B, ROWS):
        row = first + tl.arange(0, ROWS)
        total = tl.zeros([ROWS, _CHUNKS], tl.float64) + _nothing(KIND)
        for c in range(0, chunks, _CHUNKS):
            ok = (row[:, None] < COUNT * B) & (c + lane < chunks)
            x = tl.load(shares + row[:, None] * chunks + (c + lane), mask=ok, other=0.0, cache_modifier=".cg")
            total = _combined(total, tl.where(ok, x, _nothing(KIND)), KIND)
        result = _reduced(total, KIND)
        tl.store(columns + COLUMN * B + row, result, mask=row < COUNT * B)


# ---------------------------------------------------------------------------------------------------------- groups
@triton.jit
def _group(starts, g, ok):
    """(first position, size) of groups in the order of their sequences."""
    first = tl.load(starts + g, mask=ok, other=0)
    return first, tl.load(starts + g + 1, mask=ok, other=0) - first


@triton.jit
def _reduce_groups(source, target, order, starts, groups, KIND: tl.constexpr, RUNS: tl.constexpr, LANES: tl.constexpr):
    """RUNS groups at a time, LANES members of each."""
    lane = tl.arange(0, LANES)[None, :]
    for g0 in range(0, groups, RUNS):
        g = g0 + tl.arange(0, RUNS)
        first, size = _group(starts, g, g < groups)
        total = tl.zeros([RUNS, LANES], tl.float64) + _nothing(KIND)
        for j in range(0, tl.max(size, axis=0), LANES):
            ok = j + lane < size[:, None]
            member = tl.load(order + (first[:, None] + j + lane), mask=ok, other=0)
            x = tl.load(source + member, mask=ok, other=0.0, cache_modifier=".cg")
            total = _combined(total, tl.where(ok, x, _nothing(KIND)), KIND)
        result = _reduced(total, KIND)
        for j in range(0, tl.max(size, axis=0), LANES):
            ok = j + lane < size[:, None]
            member = tl.load(order + (first[:, None] + j + lane), mask=ok, other=0)
            tl.store(target + member, tl.zeros([RUNS, LANES], tl.float64) + result[:, None], mask=ok)


@triton.jit
def group_reduce(
    columns,  # f64 [COLUMNS, B]
    order,  # i64 [B]: rows, sorted by group
    starts,  # i64 [B + 1]: where each group starts in `order`
    group_of_row,  # i64 [B]
    B,
    SOURCE: tl.constexpr, TARGET: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Column TARGET: the sum, maximum or minimum of column SOURCE over the row's group. Every value is read once."""
    B = B.to(tl.int64)
    tl.debug_barrier()  # other threads have written SOURCE
    last = tl.load(order + B - 1, mask=B > 0, other=0)
    groups = tl.where(B > 0, tl.minimum(tl.load(group_of_row + last, mask=B > 0, other=0) + 1, B), 0)
    source = columns + SOURCE * B
    target = columns + TARGET * B
    if groups * 32 < B:
        _reduce_groups(source, target, order, starts, groups, KIND, 4, 128)
    else:
        _reduce_groups(source, target, order, starts, groups, KIND, 32, 16)
    tl.debug_barrier()


@triton.jit
def group_cumulate(
    columns,  # f64 [COLUMNS, B]
    order,  # i64 [B]: rows, sorted by group
    starts,  # i64 [B + 1]: where each group starts in `order`
    group_of_row,  # i64 [B]
    B,
    SOURCE: tl.constexpr, KEY: tl.constexpr, TARGET: tl.constexpr, AFTER: tl.constexpr,
):  # fmt: skip
    """Column TARGET: the sum of SOURCE over the members of the row's group with a larger KEY, of equal ones those in
    earlier rows, and oneself; AFTER: with a smaller one, later rows, and oneself.
    """
    B = B.to(tl.int64)
    tl.debug_barrier()  # other threads have written SOURCE and KEY
    lane = tl.arange(0, 8)[None, :]
    for r0 in range(0, B, _CUMULATED):
        row = r0 + tl.arange(0, _CUMULATED)
        ok = row < B
        g = tl.load(group_of_row + row, mask=ok, other=0)
        first, size = _group(starts, tl.minimum(tl.maximum(g, 0), B - 1), ok)
        own = tl.load(columns + KEY * B + row, mask=ok, other=0.0, cache_modifier=".cg")
        total = tl.zeros([_CUMULATED, 8], tl.float64)
        for j in range(0, tl.max(size, axis=0), 8):
            inside = j + lane < size[:, None]
            member = tl.load(order + (first[:, None] + j + lane), mask=inside, other=0)
            key = tl.load(columns + KEY * B + member, mask=inside, other=0.0, cache_modifier=".cg")
            x = tl.load(columns + SOURCE * B + member, mask=inside, other=0.0, cache_modifier=".cg")
            if AFTER:
                taken = (key < own[:, None]) | ((key == own[:, None]) & (member >= row[:, None]))
            else:
                taken = (key > own[:, None]) | ((key == own[:, None]) & (member <= row[:, None]))
            total += tl.where(inside & taken, x, 0.0)
        tl.store(columns + TARGET * B + row, tl.sum(total, axis=1), mask=ok)
    tl.debug_barrier()
