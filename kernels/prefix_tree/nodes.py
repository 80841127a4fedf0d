"""The numbered nodes of a prefix tree, from its sorted records: GPU, no host sync.

In pre-order, the nodes that a row has brought in come one after the other; behind them the rows that hang off it, those
at its deepest cut first. So every number is a sum: over what lies below each row (added up along the rows above it, in
integers, whose order is of no matter), over the records before it (torch.cumsum), and along the rows above it. The work
is linear in rows times the number of rows that a path leads through.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastreward._runtime.layout import NODES as NODE_FIELDS

from .._shared.launch import OPTIONS
from .forest import (
    CHILDREN,
    COUNT,
    DEPTH,
    EDGE_LENGTH,
    EDGE_START,
    FIRST_ROW,
    LEAF,
    LENGTH,
    ORDER,
    PARENT,
    ROOT,
    ROW_BEGIN,
    TOKEN_BEGIN,
    TOKEN_TOUT,
    TOUT,
    any_of,
    column,
    field,
    put,
)
from .records import (
    BELOW,
    BRANCHES,
    ENDS,
    GROUP_NODES,
    GROUP_ROWS,
    GROUP_TOKENS,
    GROUPS,
    NODES,
    ROWS,
    RUN_BEGIN,
    RUN_END,
    SORTED_AT,
    TOKENS,
    sorted_records,
    summed_columns,
)
from .work import (
    BEGIN,
    END,
    FIRST,
    GROUP,
    HANGS,
    LEVEL,
    NONE,
    NUMBER,
    OWN,
    PLACE,
    SHARED,
    TOKEN,
    cut_of,
)

# --------------------------------------------------------------------------------------------------------- config
LANES = 128
WARPS = 4


# --------------------------------------------------------------------------------------------------------- kernel
@triton.jit
def _between(columns, width, COLUMN: tl.constexpr, begin, end, ok):
    """Sum of the records begin to end - 1."""
    return field(columns, width, COLUMN, end, ok) - field(columns, width, COLUMN, begin, ok)


@triton.jit(do_not_specialize=["B"])
def _numbers_kernel(
    rows,  # i64 [4, B]
    work,  # i64 [WORK, B]: all that is above; out: NUMBER, TOKEN, LEVEL, PLACE
    runs,  # i64 [3, 2 B]
    columns,  # i64 [COLUMNS, 2 B + 1], summed
    B,
    LANES: tl.constexpr,
):  # fmt: skip
    """Where each row's own nodes, tokens and sequences begin: its group's begin, and what comes before on its path."""
    row = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    ok = row < B
    width = 2 * B + 1
    first = field(work, B, FIRST, row, ok)
    rank = field(work, B, GROUP, first, ok)
    number = field(columns, width, GROUP_NODES, rank, ok)
    token = field(columns, width, GROUP_TOKENS, rank, ok)
    place = field(columns, width, GROUP_ROWS, rank, ok)
    level = tl.zeros_like(row)
    below = row
    going = ok & (below != first)
    while any_of(going):
        holder = field(work, B, HANGS, below, going)
        i = field(runs, 2 * B, SORTED_AT, below, going)  # the record with which it hangs there
        run = field(runs, 2 * B, RUN_BEGIN, i, going)
        begin, end = field(work, B, BEGIN, holder, going), field(work, B, END, holder, going)
        own = field(work, B, OWN, holder, going)
        at = own - _between(columns, width, NODES, begin, i + 1, going)  # of the holder's nodes, from the top
        deeper = tl.where(at + 1 < own, 1 + _between(columns, width, ROWS, begin, run, going), 0)
        siblings = _between(columns, width, ROWS, run, i, going) - _between(columns, width, ENDS, run, i, going)
        number += tl.where(going, own + _between(columns, width, BELOW, begin, i, going), 0)
        held = field(rows, B, LENGTH, holder, going) - field(work, B, SHARED, holder, going)
        token += tl.where(going, held + _between(columns, width, TOKENS, begin, i, going), 0)
        level += tl.where(going, at + 1, 0)
        # Sequences that end at or above the node come first, then those through the holder's next node.
        place += tl.where(going, _between(columns, width, ENDS, run, end, going) + deeper + siblings, 0)
        below = tl.where(going, holder, below)
        going = going & (below != first)
    put(work, B, NUMBER, row, number, ok)
    put(work, B, TOKEN, row, token, ok)
    put(work, B, LEVEL, row, level, ok)
    put(work, B, PLACE, row, place, ok)


@triton.jit
def _node_of_record(work, runs, columns, B, row, ok):
    """(number of the node at which a row hangs, its place among its holder's nodes)."""
    holder = field(work, B, HANGS, row, ok)
    i = field(runs, 2 * B, SORTED_AT, row, ok)
    begin = field(work, B, BEGIN, holder, ok)
    at = field(work, B, OWN, holder, ok) - _between(columns, 2 * B + 1, NODES, begin, i + 1, ok)
    return field(work, B, NUMBER, holder, ok) + at


@triton.jit
def _store_nodes(keys, rows, work, runs, columns, nodes, stride, B, i):
    """The nodes whose last record is i."""
    width = 2 * B + 1
    inside = i < 2 * B
    key = tl.load(keys + i, mask=inside, other=NONE)
    ok = inside & (key != NONE) & (field(runs, 2 * B, RUN_END, i, inside) == i + 1)
    row, cut = key >> 32, cut_of(key)
    run = field(runs, 2 * B, RUN_BEGIN, i, ok)
    begin, end = field(work, B, BEGIN, row, ok), field(work, B, END, row, ok)
    own, shared = field(work, B, OWN, row, ok), field(work, B, SHARED, row, ok)
    at = own - _between(columns, width, NODES, begin, i + 1, ok)
    top = at == 0
    number = field(work, B, NUMBER, row, ok)
    token = field(work, B, TOKEN, row, ok)
    first = field(work, B, FIRST, row, ok)
    above = cut_of(tl.load(keys + i + 1, mask=ok & (~top), other=0))
    edge_start = tl.where(top, shared, above)
    parent = tl.where(row == first, -1, _node_of_record(work, runs, columns, B, row, ok & top & (row != first)))
    held = field(rows, B, LENGTH, row, ok) - shared
    children = _between(columns, width, BRANCHES, run, i + 1, ok) + (at + 1 < own).to(tl.int64)
    n = number + at
    put(nodes, stride, PARENT, n, tl.where(top, parent, n - 1), ok)
    put(nodes, stride, DEPTH, n, field(work, B, LEVEL, row, ok) + at, ok)
    put(nodes, stride, EDGE_START, n, edge_start, ok)
    put(nodes, stride, EDGE_LENGTH, n, cut - edge_start, ok)
    put(nodes, stride, COUNT, n, 1 + _between(columns, width, ROWS, begin, i + 1, ok), ok)
    put(nodes, stride, FIRST_ROW, n, row, ok)
    put(nodes, stride, TOUT, n, number + own + _between(columns, width, BELOW, begin, i + 1, ok), ok)
    put(nodes, stride, TOKEN_BEGIN, n, token + edge_start - shared, ok)
    put(nodes, stride, TOKEN_TOUT, n, token + held + _between(columns, width, TOKENS, begin, i + 1, ok), ok)
    put(nodes, stride, CHILDREN, n, children, ok)
    place = field(work, B, PLACE, row, ok) + _between(columns, width, ENDS, i + 1, end, ok)
    put(nodes, stride, ROW_BEGIN, n, place, ok)
    put(nodes, stride, ROOT, n, field(work, B, NUMBER, first, ok), ok)


@triton.jit
def _store_rows(rows, work, runs, columns, B, row):
    """Leaf and place of each row: at the end of its own nodes, else where it hangs, behind who ends there before it."""
    width = 2 * B + 1
    ok = row < B
    holder, own = field(work, B, HANGS, row, ok), field(work, B, OWN, row, ok)
    alone = own > 0
    i = field(runs, 2 * B, SORTED_AT, tl.where(alone, B + row, row), ok)
    keeper = tl.where(alone, row, holder)
    run, stop = field(runs, 2 * B, RUN_BEGIN, i, ok), field(runs, 2 * B, RUN_END, i, ok)
    above = _between(columns, width, ENDS, stop, field(work, B, END, keeper, ok), ok)
    # The row that has brought the node in is the first of those that end there, though the last of its records.
    keeper_ends = (field(rows, B, LENGTH, keeper, ok) == field(work, B, SHARED, row, ok)).to(tl.int64)
    among = tl.where(alone, 0, keeper_ends + _between(columns, width, ENDS, run, i, ok))
    hung = _node_of_record(work, runs, columns, B, row, ok & (~alone))
    put(rows, B, LEAF, row, tl.where(alone, field(work, B, NUMBER, row, ok) + own - 1, hung), ok)
    put(rows, B, ORDER, field(work, B, PLACE, keeper, ok) + above + among, row, ok)


@triton.jit
def _store_empty(nodes, stride, B, n, tokens, ok):
    """Places without a node."""
    zero = tl.zeros_like(n)
    put(nodes, stride, PARENT, n, zero - 1, ok)
    put(nodes, stride, DEPTH, n, zero, ok)
    put(nodes, stride, EDGE_START, n, zero, ok)
    put(nodes, stride, EDGE_LENGTH, n, zero, ok)
    put(nodes, stride, COUNT, n, zero, ok)
    put(nodes, stride, FIRST_ROW, n, zero, ok)
    put(nodes, stride, TOUT, n, n + 1, ok)
    put(nodes, stride, TOKEN_BEGIN, n, zero + tokens, ok)
    put(nodes, stride, TOKEN_TOUT, n, zero + tokens, ok)
    put(nodes, stride, CHILDREN, n, zero, ok)
    put(nodes, stride, ROW_BEGIN, n, zero + B, ok)
    put(nodes, stride, ROOT, n, n, ok)


@triton.jit(do_not_specialize=["B", "places"])
def _nodes_kernel(
    keys,  # i64 [2 B]
    rows,  # i64 [4, B], out: LEAF, ORDER
    work,  # i64 [WORK, B]
    runs,  # i64 [3, 2 B]
    columns,  # i64 [COLUMNS, 2 B + 1], summed
    nodes,  # i64 [F, places], out
    sizes,  # i64 [3], out: nodes, groups, unique tokens
    B, places,  # places >= 2 B
    LANES: tl.constexpr,
):  # fmt: skip
    """Every field, of nodes, rows and empty places."""
    lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    width = 2 * B + 1
    count = tl.load(column(columns, width, GROUP_NODES) + 2 * B)
    tokens = tl.load(column(columns, width, GROUP_TOKENS) + 2 * B)
    _store_nodes(keys, rows, work, runs, columns, nodes, places, B, lane)
    _store_rows(rows, work, runs, columns, B, lane)
    _store_empty(nodes, places, B, lane, tokens, (lane >= count) & (lane < places))
    if tl.program_id(0) == 0:
        tl.store(sizes, count)
        tl.store(sizes + 1, tl.load(column(columns, width, GROUPS) + 2 * B))
        tl.store(sizes + 2, tokens)


# --------------------------------------------------------------------------------------------------------- launch
def numbered(
    rows: Tensor,  # i64 [4, B]: START, LENGTH; out: LEAF, ORDER
    work: Tensor,  # i64 [WORK, B]: FIRST, FOUND (an earlier row of the group, or itself where it is the first), SHARED
    group: Tensor,  # i64 [B]
    ordered_groups: bool,
    places: int,  # of nodes, at least 2 B
) -> tuple[Tensor, Tensor]:
    """(nodes i64 [F, places], sizes i64 [3])."""
    count = rows.shape[1]
    keys, source = sorted_records(rows, work, rooted=True)
    runs, columns = summed_columns(keys, source, rows, work, group, ordered_groups)
    nodes = torch.empty((len(NODE_FIELDS), places), dtype=torch.int64, device=rows.device)
    sizes = torch.empty(3, dtype=torch.int64, device=rows.device)
    options = {"LANES": LANES, "num_warps": WARPS, **OPTIONS}
    _numbers_kernel[(triton.cdiv(count, LANES),)](rows, work, runs, columns, count, **options)
    _nodes_kernel[(triton.cdiv(places, LANES),)](
        keys, rows, work, runs, columns, nodes, sizes, count, places, **options
    )
    return nodes, sizes
