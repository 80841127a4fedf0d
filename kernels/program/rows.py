"""Shared parts of loss programs' work per sequence: columns of f64, reductions over groups and the batch.

One program does this work, the last of a launch to arrive, so that no other launch has to wait for it. What other
programs or other threads have written is read past the L1 cache (.cg). Sums are in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .math import INF, maximum

SUM: tl.constexpr = tl.constexpr(0)
MAX: tl.constexpr = tl.constexpr(1)
MIN: tl.constexpr = tl.constexpr(2)
OTHERS: tl.constexpr = tl.constexpr(3)
BEFORE: tl.constexpr = tl.constexpr(4)
AFTER: tl.constexpr = tl.constexpr(5)
_CHUNKS: tl.constexpr = tl.constexpr(8)  # partial results of a row taken at once
_GROUPS: tl.constexpr = tl.constexpr(16)  # groups reduced at once,
_LANES: tl.constexpr = tl.constexpr(32)  # and how many members of each
_OWNERS: tl.constexpr = tl.constexpr(64)  # rows that look through others at once,
_MEMBERS: tl.constexpr = tl.constexpr(8)  # how many members of their groups,
_RANKED: tl.constexpr = tl.constexpr(32)  # and how many of all rows


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
def merge_chunks(
    columns,  # f64 [COLUMNS, B], then [COUNT, B, chunks]
    B, chunks,
    FIRST: tl.constexpr, COUNT: tl.constexpr, SUMS: tl.constexpr, MAXIMA: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Columns FIRST, FIRST + 1, ... (COUNT) from the programs' shares: SUMS sums, then MAXIMA maxima, then minima."""
    B = B.to(tl.int64)
    lane = tl.arange(0, _CHUNKS)[None, :]
    for first in range(0, COUNT * B, ROWS):
        place = first + tl.arange(0, ROWS)  # of a sequence in a column
        exists = place < COUNT * B
        sign = tl.where(place < (SUMS + MAXIMA) * B, 1.0, -1.0)[:, None]  # a minimum is a maximum, turned round
        total = tl.zeros([ROWS, _CHUNKS], tl.float64)
        most = tl.full([ROWS, _CHUNKS], -INF, tl.float64)
        for c in range(0, chunks, _CHUNKS):
            ok = exists[:, None] & (c + lane < chunks)
            at = COLUMNS * B + place[:, None] * chunks + (c + lane)
            x = tl.load(columns + at, mask=ok, other=0.0, cache_modifier=".cg")
            total += x
            most = maximum(most, tl.where(ok, sign * x, -INF))
        extreme = largest(most, 1) * tl.where(place < (SUMS + MAXIMA) * B, 1.0, -1.0)
        result = tl.where(place < SUMS * B, tl.sum(total, axis=1), extreme)
        tl.store(columns + FIRST * B + place, result, mask=exists)


# ---------------------------------------------------------------------------------------------------------- groups
@triton.jit
def group_reduce(
    columns,  # f64 [COLUMNS, B]
    order,  # i64 [B]: rows, sorted by group
    starts,  # i64 [B + 1]: where each group starts in `order`
    groups,  # i64 [B]: of the rows
    B,
    SOURCE: tl.constexpr, TARGET: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Column TARGET, by group: sum, maximum or minimum of column SOURCE over its rows."""
    B = B.to(tl.int64)
    tl.debug_barrier()  # other threads have written SOURCE
    last = tl.load(order + B - 1, mask=B > 0, other=0)
    count = tl.minimum(tl.load(groups + last, mask=B > 0, other=-1) + 1, B)
    sign = -1.0 if KIND == MIN else 1.0  # a minimum is a maximum, turned round
    lane = tl.arange(0, _LANES)[None, :]
    for g0 in range(0, count, _GROUPS):
        g = g0 + tl.arange(0, _GROUPS)
        first, size = _group(starts, g, g < count)
        total = tl.full([_GROUPS, _LANES], 0.0 if KIND == SUM else -INF, tl.float64)
        for j in range(0, tl.max(size, axis=0), _LANES):
            ok = j + lane < size[:, None]
            member = tl.load(order + (first[:, None] + j + lane), mask=ok, other=0)
            x = tl.load(columns + SOURCE * B + member, mask=ok, other=0.0, cache_modifier=".cg")
            if KIND == SUM:
                total += tl.where(ok, x, 0.0)
            else:
                total = maximum(total, tl.where(ok, sign * x, -INF))
        result = tl.sum(total, axis=1) if KIND == SUM else sign * largest(total, 1)
        tl.store(columns + TARGET * B + g, result, mask=g < count)
    tl.debug_barrier()


@triton.jit
def _group(starts, g, ok):
    """(first position, size) of groups in the order of their sequences."""
    first = tl.load(starts + g, mask=ok, other=0)
    return first, tl.load(starts + g + 1, mask=ok, other=0) - first


@triton.jit
def group_select(
    columns,  # f64 [COLUMNS, B]
    order,  # i64 [B]: rows, sorted by group
    starts,  # i64 [B + 1]: where each group starts in `order`
    groups,  # i64 [B]: of the rows
    B,
    SOURCE: tl.constexpr, KEY: tl.constexpr, TARGET: tl.constexpr, WHICH: tl.constexpr,
):  # fmt: skip
    """Column TARGET: the sum of SOURCE over some members of the row's group, which each row looks through.

    OTHERS: all but oneself. BEFORE: those with a larger KEY, of equal ones those in earlier rows, and oneself. AFTER:
    those with a smaller one, later rows, and oneself.
    """
    B = B.to(tl.int64)
    tl.debug_barrier()  # other threads have written SOURCE and KEY
    lane = tl.arange(0, _MEMBERS)[None, :]
    for r0 in range(0, B, _OWNERS):
        row = r0 + tl.arange(0, _OWNERS)
        ok = row < B
        g = tl.load(groups + row, mask=ok, other=0)
        first, size = _group(starts, tl.minimum(tl.maximum(g, 0), B - 1), ok)
        own = tl.load(columns + KEY * B + row, mask=ok, other=0.0, cache_modifier=".cg")[:, None]
        total = tl.zeros([_OWNERS, _MEMBERS], tl.float64)
        for j in range(0, tl.max(size, axis=0), _MEMBERS):
            inside = j + lane < size[:, None]
            member = tl.load(order + (first[:, None] + j + lane), mask=inside, other=0)
            x = tl.load(columns + SOURCE * B + member, mask=inside, other=0.0, cache_modifier=".cg")
            if WHICH == OTHERS:
                taken = member != row[:, None]
            else:
                key = tl.load(columns + KEY * B + member, mask=inside, other=0.0, cache_modifier=".cg")
                if WHICH == BEFORE:
                    taken = (key > own) | ((key == own) & (member <= row[:, None]))
                else:
                    taken = (key < own) | ((key == own) & (member >= row[:, None]))
            total += tl.where(inside & taken, x, 0.0)
        tl.store(columns + TARGET * B + row, tl.sum(total, axis=1), mask=ok)
    tl.debug_barrier()


# ----------------------------------------------------------------------------------------------------------- ranks
@triton.jit
def _rank(key, row, ok, B, LANES: tl.constexpr):
    """How many rows come before each of `row` in ascending order of key [B]; NaN last, equal ones as the rows are."""
    own = tl.load(key + row, mask=ok, other=0.0, cache_modifier=".cg")[:, None]
    rank = tl.zeros([row.shape[0], LANES], tl.int32)
    for first in range(0, B, LANES):
        other = first + tl.arange(0, LANES)[None, :]
        x = tl.load(key + other, mask=other < B, other=0.0, cache_modifier=".cg")
        below = (x < own) | ((x == x) & (own != own))
        equal = (x == own) | ((x != x) & (own != own))
        rank += ((other < B) & (below | (equal & (other < row[:, None])))).to(tl.int32)
    return tl.sum(rank, axis=1).to(tl.int64)


@triton.jit
def batch_permute(
    columns,  # f64 [COLUMNS, B]
    B,
    SOURCE: tl.constexpr, FROM: tl.constexpr, TO: tl.constexpr, SORTED: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """Column TARGET: SOURCE of the row whose FROM has the rank that the own TO has. Ranks are counted: B^2 comparisons.

    Column SORTED holds SOURCE in the order of FROM.
    """
    B = B.to(tl.int64)
    tl.debug_barrier()  # other threads have written the columns
    for r0 in range(0, B, _OWNERS):
        row = r0 + tl.arange(0, _OWNERS)
        ok = row < B
        x = tl.load(columns + SOURCE * B + row, mask=ok, other=0.0, cache_modifier=".cg")
        tl.store(columns + SORTED * B + _rank(columns + FROM * B, row, ok, B, _RANKED), x, mask=ok)
    tl.debug_barrier()
    for r0 in range(0, B, _OWNERS):
        row = r0 + tl.arange(0, _OWNERS)
        ok = row < B
        rank = _rank(columns + TO * B, row, ok, B, _RANKED)
        x = tl.load(columns + SORTED * B + rank, mask=ok, other=0.0, cache_modifier=".cg")
        tl.store(columns + TARGET * B + row, x, mask=ok)
    tl.debug_barrier()
