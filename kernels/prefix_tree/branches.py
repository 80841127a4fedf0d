"""From given branches to those of a prefix tree: each row to the first row that shares the most with it.

Given branches name any row as a parent, before or after its children, and any position of its path. The tree that they
make is looked at as it is, in sorted records: each row goes up its own path to the first place through which an earlier
row leads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._shared.launch import OPTIONS
from .forest import LENGTH, START, any_of, column, count_up_to, field, put
from .parents import groups_of
from .records import sorted_records
from .work import EARLIEST, FIRST, FOUND, HANGS, LOW, NONE, SHARED, WORK, cut_of, first_of

# --------------------------------------------------------------------------------------------------------- config
LANES = 128
WARPS = 4


# --------------------------------------------------------------------------------------------------------- kernel
@triton.jit
def _given_parent(parent_row, group, B, row, ok):
    """The row that each is said to branch off; -1 where none, or none of its group."""
    parent = tl.load(parent_row + row, mask=ok, other=-1)
    there = ok & (parent >= 0) & (parent < B)
    same = tl.load(group + parent, mask=there, other=0) == tl.load(group + row, mask=there, other=0)
    return tl.where(there & same, parent, -1)


@triton.jit(do_not_specialize=["B", "size"])
def _given_kernel(
    parent_row, branch_position,  # i64 [B]
    starts, lengths,  # i64 [B]
    group,  # i64 [B]
    table, slots,  # the groups' first rows
    rows,  # i64 [4, B], out: START, LENGTH
    work,  # i64 [WORK, B], out: FIRST, FOUND, SHARED
    B, size,
    LANES: tl.constexpr,
):  # fmt: skip
    """The branches as they are given; rows in a circle, and those that lead into one, hang off the root."""
    row = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    ok = row < B
    first = first_of(table, size, tl.load(slots + row, mask=ok, other=0), B, ok)
    parent = _given_parent(parent_row, group, B, row, ok)
    above, steps = parent, tl.full([], 0, tl.int64)
    while any_of(above >= 0) & (steps <= B):
        above = _given_parent(parent_row, group, B, above, above >= 0)
        steps += 1
    length = tl.maximum(tl.load(lengths + row, mask=ok, other=0), 0)
    hangs = ok & (parent >= 0) & (above < 0)
    position = tl.maximum(tl.load(branch_position + row, mask=hangs, other=0), 0)
    shared = tl.minimum(tl.minimum(position, length), tl.load(lengths + parent, mask=hangs, other=0))
    shared = tl.where(hangs, tl.maximum(shared, 0), 0)
    put(rows, B, START, row, tl.load(starts + row, mask=ok, other=0), ok)
    put(rows, B, LENGTH, row, length, ok)
    put(work, B, FIRST, row, first, ok)
    put(work, B, FOUND, row, tl.where(shared > 0, parent, -1), ok)
    put(work, B, SHARED, row, shared, ok)


@triton.jit(do_not_specialize=["B"])
def _earliest_kernel(
    work,  # i64 [WORK, B]: HANGS; EARLIEST zero, out
    B,
    LANES: tl.constexpr,
):  # fmt: skip
    """Tells every row above a row of it."""
    row = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    going = row < B
    above = row
    while any_of(going):
        tl.atomic_max(column(work, B, EARLIEST) + above, B - row, mask=going, sem="relaxed")
        above = tl.where(going, field(work, B, HANGS, above, going), above)
        going = going & (above >= 0)


@triton.jit(do_not_specialize=["B"])
def _order_kernel(
    keys, source,  # i64 [2 B]: sorted records, and which they are
    work,  # i64 [WORK, B]: EARLIEST
    places,  # i64 [2 B], out: sorted place of each record
    ranks,  # i64 [2 B], out: to be maximised over what comes before: row << 32 | B - earliest of the record
    B,
    LANES: tl.constexpr,
):  # fmt: skip
    """Earlier rows have higher ranks; those of the next row's records are higher still, so that its maximum is new."""
    i = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    inside = i < 2 * B
    key = tl.load(keys + i, mask=inside, other=NONE)
    record = tl.load(source + i, mask=inside, other=0)
    earliest = tl.where(record < B, field(work, B, EARLIEST, record, inside & (record < B)), B - (key >> 32))
    tl.store(places + record, i, mask=inside)
    tl.store(ranks + i, tl.where(key == NONE, NONE, ((key >> 32) << 32) | earliest), mask=inside)


@triton.jit(do_not_specialize=["B"])
def _first_sharer_kernel(
    keys,  # i64 [2 B]
    places,  # i64 [2 B]
    ranks,  # i64 [2 B], maximised
    rows,  # i64 [4, B]
    work,  # i64 [WORK, B]: FIRST, HANGS, SHARED as given; out: FOUND
    shared,  # i64 [B], out: SHARED as it shall be
    B,
    LANES: tl.constexpr,
):  # fmt: skip
    """Each row goes up its path, record by record, until an earlier row leads through."""
    row = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    ok = row < B
    own = field(rows, B, LENGTH, row, ok) > field(work, B, SHARED, row, ok)
    going = ok & (own | (field(work, B, HANGS, row, ok) >= 0))
    i = tl.load(places + tl.where(own, B + row, row), mask=going, other=0)
    found = row < 0
    while any_of(going):
        key = tl.load(keys + i, mask=going, other=0)
        holder = key >> 32
        here = tl.minimum(holder, B - (tl.load(ranks + i, mask=going, other=0) & LOW)) < row
        found = found | (going & here)
        going = going & (~here)
        further = going & (i + 1 < 2 * B)
        further = further & (tl.load(keys + i + 1, mask=further, other=NONE) >> 32 == holder)
        up = going & (~further)
        leads = up & (field(work, B, HANGS, holder, up) >= 0)
        i = tl.where(further, i + 1, tl.where(leads, tl.load(places + holder, mask=leads, other=0), i))
        going = further | leads
    key = tl.load(keys + i, mask=found, other=0)
    end = count_up_to(keys, key, i, tl.zeros_like(i) + tl.where(found, 2 * B, i))
    sharer = tl.minimum(key >> 32, B - (tl.load(ranks + end - 1, mask=found, other=0) & LOW))
    put(work, B, FOUND, row, tl.where(found, sharer, field(work, B, FIRST, row, ok)), ok)
    tl.store(shared + row, tl.where(found, cut_of(key), 0), mask=ok)


# --------------------------------------------------------------------------------------------------------- launch
def parents_of_branches(
    parent_row: Tensor,  # i64 [B]
    branch_position: Tensor,  # i64 [B]
    starts: Tensor,  # i64 [B]
    lengths: Tensor,  # i64 [B]
    group: Tensor,  # i64 [B]
    rows: Tensor,  # i64 [4, B], out: START and LENGTH
) -> Tensor:
    """work i64 [WORK, B]: FIRST, FOUND, SHARED."""
    count = group.shape[0]
    work = torch.zeros((WORK, count), dtype=torch.int64, device=group.device)
    table, size, slots = groups_of(group)
    options = {"LANES": LANES, "num_warps": WARPS, **OPTIONS}
    of_rows, of_records = (triton.cdiv(count, LANES),), (triton.cdiv(2 * count, LANES),)
    _given_kernel[of_rows](
        parent_row, branch_position, starts, lengths, group, table, slots, rows, work, count, size, **options
    )
    keys, source = sorted_records(rows, work, rooted=False)
    _earliest_kernel[of_rows](work, count, **options)
    places, ranks = torch.empty((2, 2 * count), dtype=torch.int64, device=group.device)
    _order_kernel[of_records](keys, source, work, places, ranks, count, **options)
    shared = torch.empty_like(group)
    _first_sharer_kernel[of_rows](keys, places, ranks.cummax(0).values, rows, work, shared, count, **options)
    work[SHARED.value] = shared
    return work
