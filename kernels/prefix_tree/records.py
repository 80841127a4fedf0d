"""A prefix tree as sorted records: what each row has brought in, cut where others branch off it and where it ends.

Each row makes two records (row, cut): where it ends, and where it hangs off another row. Sorted (torch.sort), they are
the tree: a row's cuts come one after the other, the deepest first, and where rows hang off the same place, so do they.
The first record of each place is a node. Sums over what hangs there give the nodes their numbers
(`nodes.py`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._shared.launch import OPTIONS
from .forest import LENGTH, any_of, column, count_up_to, field, put
from .work import (
    BEGIN,
    END,
    FIRST,
    FOUND,
    GROUP,
    HANGS,
    NODES_BELOW,
    NONE,
    OWN,
    ROWS_BELOW,
    SHARED,
    TOKENS_BELOW,
    record_key,
)

# --------------------------------------------------------------------------------------------------------- config
LANES = 128
WARPS = 4

#: Columns i64 [COLUMNS, 2 B + 1], one entry for each record behind a zero; summed, each is what comes before a record.
COLUMNS = 10
NODES = tl.constexpr(0)  # that begin: the first record of each
BELOW = tl.constexpr(1)  # nodes of the row that hangs there, and of those below it
TOKENS = tl.constexpr(2)  # their tokens
ROWS = tl.constexpr(3)  # these rows
ENDS = tl.constexpr(4)  # rows that end there
BRANCHES = tl.constexpr(5)  # rows that hang there and bring in a node
GROUP_NODES = tl.constexpr(6)  # nodes of a group, at its rank
GROUP_TOKENS = tl.constexpr(7)
GROUP_ROWS = tl.constexpr(8)
GROUPS = tl.constexpr(9)

#: Runs i64 [3, 2 B].
SORTED_AT = tl.constexpr(0)  # sorted place of each record
RUN_BEGIN = tl.constexpr(1)  # where the records with the same key begin
RUN_END = tl.constexpr(2)  # and end


# --------------------------------------------------------------------------------------------------------- kernel
@triton.jit(do_not_specialize=["B"])
def _records_kernel(
    rows,  # i64 [4, B]
    work,  # i64 [WORK, B]: FIRST, FOUND, SHARED; out: HANGS
    keys,  # i64 [2 B], out: where each row hangs, then where each ends
    B,
    ROOTED: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Two records a row. ROOTED: the group's first row holds the root, as its node at 0 that all hang off."""
    row = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    ok = row < B
    shared, length = field(work, B, SHARED, row, ok), field(rows, B, LENGTH, row, ok)
    holder = field(work, B, FOUND, row, ok)
    # What lies before a row's own part is held further up.
    up = ok & (shared > 0) & (shared <= field(work, B, SHARED, holder, ok & (holder >= 0)))
    while any_of(up):
        holder = tl.where(up, field(work, B, FOUND, holder, up), holder)
        up = up & (shared <= field(work, B, SHARED, holder, up))
    put(work, B, HANGS, row, holder, ok)
    tl.store(keys + row, tl.where(holder >= 0, record_key(holder, shared), NONE), mask=ok)
    own = length > shared
    if ROOTED:
        own = own | (holder == row)
    tl.store(keys + B + row, tl.where(own, record_key(row, length), NONE), mask=ok)


@triton.jit(do_not_specialize=["B"])
def _runs_kernel(
    keys, source,  # i64 [2 B]: sorted records, and which they are
    runs,  # i64 [3, 2 B], out: sorted place of each record; begin and end of the records with the same key
    work,  # i64 [WORK, B], out: BEGIN, END, OWN
    B,
    LANES: tl.constexpr,
):  # fmt: skip
    """Which records make one node, and which belong to one row."""
    i = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    inside = i < 2 * B
    key = tl.load(keys + i, mask=inside, other=0)
    zero, end = tl.zeros_like(i), tl.zeros_like(i) + 2 * B
    begin = count_up_to(keys, key - 1, zero, end)
    put(runs, 2 * B, SORTED_AT, tl.load(source + i, mask=inside, other=0), i, inside)
    put(runs, 2 * B, RUN_BEGIN, i, begin, inside)
    put(runs, 2 * B, RUN_END, i, count_up_to(keys, key, begin, end), inside)
    tl.atomic_add(column(work, B, OWN) + (key >> 32), 1, mask=inside & (begin == i) & (key != NONE), sem="relaxed")
    ok = i < B
    put(work, B, BEGIN, i, count_up_to(keys, (i << 32) - 1, zero, end), ok)
    put(work, B, END, i, count_up_to(keys, ((i + 1) << 32) - 1, zero, end), ok)


@triton.jit(do_not_specialize=["B"])
def _below_kernel(
    rows,  # i64 [4, B]
    work,  # i64 [WORK, B]: FIRST, HANGS, SHARED, OWN; out: NODES_BELOW, TOKENS_BELOW, ROWS_BELOW
    B,
    LANES: tl.constexpr,
):  # fmt: skip
    """Adds what each row has brought in to itself and to all rows above it."""
    row = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    going = row < B
    own = field(work, B, OWN, row, going)
    tokens = field(rows, B, LENGTH, row, going) - field(work, B, SHARED, row, going)
    first = field(work, B, FIRST, row, going)
    above = row
    while any_of(going):
        tl.atomic_add(column(work, B, NODES_BELOW) + above, own, mask=going, sem="relaxed")
        tl.atomic_add(column(work, B, TOKENS_BELOW) + above, tokens, mask=going, sem="relaxed")
        tl.atomic_add(column(work, B, ROWS_BELOW) + above, tl.full([LANES], 1, tl.int64), mask=going, sem="relaxed")
        going = going & (above != first)
        above = tl.where(going, field(work, B, HANGS, above, going), above)


@triton.jit(do_not_specialize=["B"])
def _columns_kernel(
    keys, source,  # i64 [2 B]
    group,  # i64 [B], the groups' ranks where ORDERED
    rows,  # i64 [4, B]
    work,  # i64 [WORK, B]: FIRST, SHARED, HANGS, *_BELOW; out: GROUP
    runs,  # i64 [3, 2 B]
    columns,  # i64 [COLUMNS, 2 B + 1], zero; out
    B,
    ORDERED: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Each record's contribution to the sums."""
    i = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    inside = i < 2 * B
    width = 2 * B + 1
    record = inside & (tl.load(keys + i, mask=inside, other=NONE) != NONE)
    put(columns, width, NODES, i + 1, (field(runs, 2 * B, RUN_BEGIN, i, record) == i).to(tl.int64), record)
    row = tl.load(source + i, mask=inside, other=0)
    end = row >= B
    hangs = record & (row < B) & (field(work, B, HANGS, row, row < B) != row)
    empty = hangs & (field(rows, B, LENGTH, row, hangs) == field(work, B, SHARED, row, hangs))
    put(columns, width, BELOW, i + 1, field(work, B, NODES_BELOW, row, hangs), record)
    put(columns, width, TOKENS, i + 1, field(work, B, TOKENS_BELOW, row, hangs), record)
    put(columns, width, ROWS, i + 1, field(work, B, ROWS_BELOW, row, hangs), record)
    put(columns, width, ENDS, i + 1, (end | empty).to(tl.int64), record)
    put(columns, width, BRANCHES, i + 1, (hangs & (~empty)).to(tl.int64), record)
    # Groups come in the order of their first rows, unless their numbers are an order already.
    leads = (i < B) & (field(work, B, FIRST, i, i < B) == i)
    rank = i
    if ORDERED:
        rank = tl.minimum(tl.maximum(tl.load(group + i, mask=leads, other=0), 0), B - 1)
    put(work, B, GROUP, i, rank, leads)
    put(columns, width, GROUP_NODES, rank + 1, field(work, B, NODES_BELOW, i, leads), leads)
    put(columns, width, GROUP_TOKENS, rank + 1, field(work, B, TOKENS_BELOW, i, leads), leads)
    put(columns, width, GROUP_ROWS, rank + 1, field(work, B, ROWS_BELOW, i, leads), leads)
    put(columns, width, GROUPS, rank + 1, tl.full([LANES], 1, tl.int64), leads)


# --------------------------------------------------------------------------------------------------------- launch
def sorted_records(rows: Tensor, work: Tensor, *, rooted: bool) -> tuple[Tensor, Tensor]:
    """(keys, which record each is), i64 [2 B]; work gets HANGS."""
    count = rows.shape[1]
    keys = torch.empty(2 * count, dtype=torch.int64, device=rows.device)
    _records_kernel[(triton.cdiv(count, LANES),)](
        rows, work, keys, count, ROOTED=rooted, LANES=LANES, num_warps=WARPS, **OPTIONS
    )
    found = torch.sort(keys, stable=True)
    return found.values, found.indices


def summed_columns(
    keys: Tensor,  # i64 [2 B]
    source: Tensor,  # i64 [2 B]
    rows: Tensor,  # i64 [4, B]: LENGTH
    work: Tensor,  # i64 [WORK, B]: FIRST, HANGS, SHARED; the rest of what is above comes in
    group: Tensor,  # i64 [B]
    ordered_groups: bool,
) -> tuple[Tensor, Tensor]:
    """(runs i64 [3, 2 B], columns i64 [COLUMNS, 2 B + 1])."""
    count = rows.shape[1]
    runs = torch.empty((3, 2 * count), dtype=torch.int64, device=rows.device)
    columns = torch.zeros((COLUMNS, 2 * count + 1), dtype=torch.int64, device=rows.device)
    options = {"LANES": LANES, "num_warps": WARPS, **OPTIONS}
    of_records = (triton.cdiv(2 * count, LANES),)
    _runs_kernel[of_records](keys, source, runs, work, count, **options)
    _below_kernel[(triton.cdiv(count, LANES),)](rows, work, count, **options)
    _columns_kernel[of_records](
        keys, source, group, rows, work, runs, columns, count, ORDERED=ordered_groups, **options
    )
    return runs, columns.cumsum(1)
