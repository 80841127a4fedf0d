"""Which earlier row each row of tokens branches off, and after how many tokens: GPU, no host sync, no sort of tokens.

Every prefix of a whole number of blocks of 32 tokens is entered into a hash table that keeps the first row with that
prefix. A binary search over its own blocks tells a row how many of them an earlier row has, too; whoever differs from
the group's earlier rows within the same block meets there, token by token, in the same table, and the one row that
knew the blocks before is compared with directly. So the parent is the first row of the longest shared prefix.

Hashes only propose: each row is compared with its parent token by token, and shares what is equal. A collision of 64
bits (or a poor hash) therefore costs sharing, never correctness.

Bytes: a token once for the hashes, shared tokens twice more for the comparison.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._shared.launch import OPTIONS
from .forest import LENGTH, START, any_of, column, field, put
from .work import (
    BLOCKS,
    FIRST,
    FOUND,
    NEAR,
    RUN,
    SHARED,
    WORK,
    enter,
    first_of,
    mix,
    prefix_key,
    token_hash,
)

# --------------------------------------------------------------------------------------------------------- config
BLOCK = 32  # tokens
STEP = 128  # blocks that a program hashes at a time: one per thread
COMPARED = 2048  # tokens that a program compares at a time
ROWS = 32  # rows that a program takes to their first different block
LANES = 128  # rows of other kernels
WARPS = 4
KEY_BITS = 64  # tests have fewer

_BLOCK = tl.constexpr(BLOCK)
_PROBES = tl.constexpr(512)  # many more than a table that is half full needs; only rows that overlap could fill one


# --------------------------------------------------------------------------------------------------------- kernel
@triton.jit(do_not_specialize=["B", "size"])
def _groups_kernel(
    group,  # i64 [B], any labels
    table,  # i64 [2, size + 1], zero
    slots,  # i64 [B], out
    B, size,
    LANES: tl.constexpr,
):  # fmt: skip
    """Each group's first row. A label's key is a bijection of it: different groups never meet. 16 bytes a row."""
    row = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    ok = row < B
    label = tl.load(group + row, mask=ok, other=0)
    tl.store(slots + row, enter(table, size, size, mix(label.to(tl.uint64, bitcast=True)), row, B, ok), mask=ok)


@triton.jit(do_not_specialize=["count", "B", "group_size", "size"])
def _prefixes_kernel(
    tokens,  # i32 or i64 [count]
    starts, lengths,  # i64 [B]
    group_table, group_slots,  # of _groups_kernel
    rows,  # i64 [4, B], out: START, LENGTH
    work,  # i64 [WORK, B], out: FIRST
    sums, slots,  # i64 [count // BLOCK + B], out: hash and slot of each prefix of whole blocks
    table,  # i64 [2, size + 1], zero
    count, B, group_size, size,
    BITS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One row: 4 or 8 bytes a token, 32 a block of them."""
    row = tl.program_id(0).to(tl.int64)
    # Whatever the caller says, a row lies in the tokens and ends before the next one begins.
    start = tl.minimum(tl.maximum(tl.load(starts + row), 0), count)
    behind = tl.load(starts + row + 1, mask=row + 1 < B, other=count)
    room = tl.maximum(tl.minimum(behind, count) - start, 0)
    length = tl.minimum(tl.maximum(tl.load(lengths + row), 0), room)
    first = first_of(group_table, group_size, tl.load(group_slots + row), B, True)
    tl.store(column(rows, B, START) + row, start)
    tl.store(column(rows, B, LENGTH) + row, length)
    tl.store(column(work, B, FIRST) + row, first)

    base = start // _BLOCK + row  # rows get places of their own for their blocks: those of a row are counted from 1
    blocks = tl.arange(0, STEP).to(tl.int64)
    lanes = blocks[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    total = tl.full([], 0, tl.int64)
    for t in range(0, length, STEP * _BLOCK):
        position = t + lanes
        inside = position < length
        token = tl.load(tokens + start + position, mask=inside, other=0)
        hashes = tl.sum(tl.where(inside, token_hash(token, position), 0), axis=1)
        prefix = total + tl.cumsum(hashes, axis=0)
        number = t // _BLOCK + blocks + 1
        whole = number * _BLOCK <= length
        slot = enter(table, size, _PROBES, prefix_key(prefix, number * _BLOCK, first, BITS), row, B, whole)
        tl.store(sums + base + number, prefix, mask=whole)
        tl.store(slots + base + number, slot, mask=whole)
        total += tl.sum(hashes, axis=0)


@triton.jit(do_not_specialize=["B", "size"])
def _blocks_kernel(
    tokens,  # i32 or i64 [count]
    rows,  # i64 [4, B]
    work,  # i64 [WORK, B]: FIRST; out: NEAR, BLOCKS, RUN
    sums, slots,  # of _prefixes_kernel
    near_slots,  # i64 [B, BLOCK], out: slots of the prefixes that end in the first block that is not shared
    table,  # as _prefixes_kernel has left it
    B, size,
    BITS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS rows, each to the first block that no earlier row of its group shares; this one's tokens are entered."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    ok = row < B
    start, length = field(rows, B, START, row, ok), field(rows, B, LENGTH, row, ok)
    first = field(work, B, FIRST, row, ok)
    base = start // _BLOCK + row
    low, high = tl.zeros_like(row), length // _BLOCK  # blocks that are shared: at least, at most
    open_ = low < high
    while any_of(open_):
        middle = (low + high + 1) // 2
        shared = first_of(table, size, tl.load(slots + base + middle, mask=open_, other=0), B, open_) < row
        low = tl.where(open_ & shared, middle, low)
        high = tl.where(open_ & (~shared), middle - 1, high)
        open_ = low < high
    some = ok & (low > 0)
    near = tl.where(some, first_of(table, size, tl.load(slots + base + low, mask=some, other=0), B, some), first)
    total = tl.load(sums + base + low, mask=some, other=0)

    lane = tl.arange(0, _BLOCK)[None, :]
    position = low[:, None] * _BLOCK + lane
    inside = position < length[:, None]  # 0 where not ok
    both = inside & (position < field(rows, B, LENGTH, near, ok)[:, None])
    token = tl.load(tokens + start[:, None] + position, mask=inside, other=0)
    other = tl.load(tokens + field(rows, B, START, near, ok)[:, None] + position, mask=both, other=0)
    run = tl.min(tl.where(both & (token == other), _BLOCK, lane), axis=1)
    prefix = total[:, None] + tl.cumsum(token_hash(token, position), axis=1)
    key = prefix_key(prefix, position + 1, first[:, None], BITS)
    row_of_lane = tl.zeros_like(position) + row[:, None]
    tl.store(
        near_slots + row_of_lane * _BLOCK + lane, enter(table, size, _PROBES, key, row_of_lane, B, inside), mask=inside
    )
    put(work, B, NEAR, row, near, ok)
    put(work, B, BLOCKS, row, low, ok)
    put(work, B, RUN, row, run.to(tl.int64), ok)


@triton.jit(do_not_specialize=["B", "size"])
def _compare_kernel(
    tokens,  # i32 or i64 [count]
    rows,  # i64 [4, B]
    work,  # i64 [WORK, B]: FIRST, NEAR, BLOCKS, RUN; out: FOUND, SHARED
    near_slots,  # i64 [B, BLOCK]
    table,  # as _blocks_kernel has left it
    B, size,
    COMPARED: tl.constexpr,
):  # fmt: skip
    """One row: its parent, and how many tokens they really share. Up to 16 bytes a shared token."""
    row = tl.program_id(0).to(tl.int64)
    start, length = tl.load(column(rows, B, START) + row), tl.load(column(rows, B, LENGTH) + row)
    first = tl.load(column(work, B, FIRST) + row)
    before = tl.load(column(work, B, BLOCKS) + row) * _BLOCK
    run = tl.load(column(work, B, RUN) + row)
    lane = tl.arange(0, _BLOCK).to(tl.int64)
    inside = before + lane < length
    holder = first_of(table, size, tl.load(near_slots + row * _BLOCK + lane, mask=inside, other=0), B, inside)
    met = tl.min(tl.where(inside & (holder < row), _BLOCK, lane), axis=0)
    near = tl.load(column(work, B, NEAR) + row)
    parent = tl.where(met > run, tl.sum(tl.where(lane == met - 1, holder, 0), axis=0), near)
    shared = tl.minimum(before + tl.maximum(met, run), tl.load(column(rows, B, LENGTH) + parent))
    shared = tl.where((row == first) | (tl.load(column(work, B, FIRST) + parent) != first), 0, shared)

    other = tl.load(column(rows, B, START) + parent)
    lanes = tl.arange(0, COMPARED)
    t = tl.zeros_like(shared)
    while t < shared:
        position = t + lanes
        there = position < shared
        mine = tl.load(tokens + start + position, mask=there, other=0)
        theirs = tl.load(tokens + other + position, mask=there, other=0)
        shared = tl.min(tl.where(there & (mine != theirs), position, shared), axis=0)
        t += COMPARED
    tl.store(column(work, B, FOUND) + row, tl.where(shared > 0, parent, first))
    tl.store(column(work, B, SHARED) + row, shared)


# --------------------------------------------------------------------------------------------------------- launch
def table_of(entries: int, like: Tensor) -> tuple[Tensor, int]:
    """(an empty hash table for so many keys, its size): at most half full."""
    size = triton.next_power_of_2(max(2 * entries, 2))
    return torch.zeros((2, size + 1), dtype=torch.int64, device=like.device), size


def groups_of(group: Tensor) -> tuple[Tensor, int, Tensor]:
    """(table, its size, slots [B]): the first row of each row's group, by `first_of`."""
    count = group.shape[0]
    table, size = table_of(count, group)
    slots = torch.empty_like(group)
    _groups_kernel[(triton.cdiv(count, LANES),)](
        group, table, slots, count, size, LANES=LANES, num_warps=WARPS, **OPTIONS
    )
    return table, size, slots


def parents_of_tokens(
    tokens: Tensor,  # i32 or i64 [count]
    starts: Tensor,  # i64 [B]
    lengths: Tensor,  # i64 [B]
    group: Tensor,  # i64 [B]
    rows: Tensor,  # i64 [4, B], out: START and LENGTH
) -> Tensor:
    """work i64 [WORK, B]: FIRST, FOUND, SHARED; the other fields are zero, or done with."""
    count, tokens_count = group.shape[0], tokens.shape[0]
    work = torch.zeros((WORK, count), dtype=torch.int64, device=group.device)
    group_table, group_size, group_slots = groups_of(group)
    near = min(count * BLOCK, tokens_count)
    table, size = table_of(tokens_count // BLOCK + near, group)
    sums, slots = torch.empty((2, tokens_count // BLOCK + count), dtype=torch.int64, device=group.device)
    near_slots = torch.empty((count, BLOCK), dtype=torch.int64, device=group.device)
    _prefixes_kernel[(count,)](
        tokens, starts, lengths, group_table, group_slots, rows, work, sums, slots, table,
        tokens_count, count, group_size, size, BITS=KEY_BITS, STEP=STEP, num_warps=WARPS, **OPTIONS,
    )  # fmt: skip
    _blocks_kernel[(triton.cdiv(count, ROWS),)](
        tokens, rows, work, sums, slots, near_slots, table, count, size,
        BITS=KEY_BITS, ROWS=ROWS, num_warps=WARPS, **OPTIONS,
    )  # fmt: skip
    _compare_kernel[(count,)](
        tokens, rows, work, near_slots, table, count, size, COMPARED=COMPARED, num_warps=WARPS, **OPTIONS
    )
    return work
