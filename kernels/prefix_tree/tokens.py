"""Values of prefix trees' tokens, from nodes and from unique tokens, on the GPU; where rows begin and end.

A program takes a block of consecutive tokens. A search of the block's two ends finds its rows, and from each row's leaf
it goes up to the edge that holds a token: by one step for the whole block as long as that concerns all of it, then lane
by lane. Mostly a block lies in one row and few edges.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastreward._arguments.options import PLACES, Place

from .._shared.launch import OPTIONS, mask_bytes, on_device_of
from .forest import (
    EDGE_LENGTH,
    EDGE_START,
    LEAF,
    LENGTH,
    START,
    TOKEN_BEGIN,
    climb,
    column,
    field,
    lanes_in,
)

# --------------------------------------------------------------------------------------------------------- config
BLOCK = 512  # tokens of a program
SCAN = 2048  # lengths and starts: positions at a time
WARPS = 4
MAXNREG = 64  # of tokens; stated, because ptxas otherwise spills a scalar or two for more occupancy

# What a token gets: one of PLACES, or
UNIQUE, NODE, INDEX = (tl.constexpr(len(PLACES) + i) for i in range(3))
BROADCAST, BEGINS, ENDS = (tl.constexpr(i) for i in range(len(PLACES)))


# --------------------------------------------------------------------------------------------------------- kernel
@triton.jit(do_not_specialize=["count"])
def _lengths_kernel(
    mask,  # u8 [count]
    extents,  # i64 [B + 1]
    starts,  # i64 [B]
    out,  # i64 [B]
    count,
    SCAN: tl.constexpr,
):  # fmt: skip
    """One row, from its end down to the last valid position."""
    row = tl.program_id(0)
    begin = tl.minimum(tl.maximum(tl.load(starts + row), 0), count)
    end = tl.minimum(tl.load(extents + row + 1), count)
    lanes = tl.arange(0, SCAN)
    last = begin
    while end > last:
        at = end - 1 - lanes
        inside = at >= begin
        valid = inside & (tl.load(mask + at, mask=inside, other=0) != 0)
        last = tl.max(tl.where(valid, at + 1, begin), axis=0)
        end -= SCAN
    tl.store(out + row, last - begin)


@triton.jit(do_not_specialize=["count"])
def _starts_kernel(
    mask,  # u8 [count]
    extents,  # i64 [B + 1]
    out,  # i64 [B]
    count,
    SCAN: tl.constexpr,
):  # fmt: skip
    """One row, up to the first valid position."""
    row = tl.program_id(0)
    begin = tl.minimum(tl.maximum(tl.load(extents + row), 0), count)
    end = tl.minimum(tl.load(extents + row + 1), count)
    lanes = tl.arange(0, SCAN)
    t, first = begin, end
    while t < first:
        at = t + lanes
        inside = at < end
        valid = inside & (tl.load(mask + at, mask=inside, other=0) != 0)
        first = tl.min(tl.where(valid, at, end), axis=0)
        t += SCAN
    tl.store(out + row, tl.where(first < end, first, begin))


@triton.jit(do_not_specialize=["stride", "B", "count", "limit"])
def _tokens_kernel(
    values,  # f32 or f64, of nodes or of unique tokens [limit]; unused for numbers
    row_values,  # f32 or f64 [B], added to what nodes give; NaN: the row gets nothing
    mask,  # u8 [count]
    nodes,  # i64 [F, stride]
    rows,  # i64 [4, B]
    extents,  # i64 [B + 1]
    out,  # [count]
    stride, B, count, limit,
    WHAT: tl.constexpr, HAS_ROW_VALUES: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Value of each token, from its node or its unique token; 0, or -1 for numbers, where there is no credit."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    at = first + tl.arange(0, BLOCK)
    last = tl.minimum(first + BLOCK, count) - 1
    ends = tl.where(tl.arange(0, 2) == 0, first, last)
    guess = ends * B // count  # right where all rows are as long as each other
    begin = tl.load(extents + guess)
    right = (begin <= ends) & (ends < tl.load(extents + guess + 1))
    row, low, high = lanes_in(
        extents, ends, at, tl.where(right, guess + 1, 0), tl.where(right, guess + 1, tl.zeros_like(guess) + B)
    )
    inside = at < count
    position = at - field(rows, B, START, row, inside)
    inside = inside & (position >= 0) & (position < field(rows, B, LENGTH, row, inside))
    n = field(rows, B, LEAF, row, inside)
    furthest = tl.max(tl.where(inside, position, -1), axis=0)
    one = tl.zeros_like(tl.arange(0, 1).to(tl.int64))  # of all the block, where that is one row's
    leaf = climb(nodes, stride, one + tl.load(column(rows, B, LEAF) + high), one + furthest, one + furthest >= 0)
    n = tl.where(low == high, tl.sum(leaf, axis=0), n)
    n = climb(nodes, stride, n, position, inside)
    if HAS_MASK:
        inside = inside & (tl.load(mask + at, mask=inside, other=0) != 0)
    if WHAT == NODE:
        value = tl.where(inside, n, -1)
    else:
        place = position - field(nodes, stride, EDGE_START, n, inside)
        if WHAT == INDEX:
            value = tl.where(inside, field(nodes, stride, TOKEN_BEGIN, n, inside) + place, -1)
        elif WHAT == UNIQUE:
            index = field(nodes, stride, TOKEN_BEGIN, n, inside) + place
            value = tl.load(values + index, mask=inside & (index < limit), other=0.0)
        else:
            there = inside
            if WHAT == BEGINS:
                there = inside & (place == 0)
            elif WHAT == ENDS:
                there = inside & (place == field(nodes, stride, EDGE_LENGTH, n, inside) - 1)
            value = tl.load(values + n, mask=there, other=0.0)
            value = tl.where(value == value, value, 0.0)
            if HAS_ROW_VALUES:
                own = tl.load(row_values + row, mask=inside, other=0.0)
                value = tl.where(own == own, value + own, 0.0)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=at < count)


# --------------------------------------------------------------------------------------------------------- launch
def lengths(mask: Tensor, extents: Tensor, starts: Tensor | None) -> Tensor:
    """Tokens from each row's start to its last valid one, i64 [B]; extents i64 [B + 1], starts i64 [B]."""
    count = extents.shape[0] - 1
    out = torch.empty(count, dtype=torch.int64, device=extents.device)
    if count:
        with on_device_of(extents):
            _lengths_kernel[(count,)](
                mask_bytes(mask), extents, extents if starts is None else starts, out, mask.shape[0],
                SCAN=SCAN, num_warps=WARPS, **OPTIONS,
            )  # fmt: skip
    return out


def starts(mask: Tensor, extents: Tensor) -> Tensor:
    """Flat index of each row's first valid token, i64 [B]; where its extent begins if there is none."""
    count = extents.shape[0] - 1
    out = torch.empty(count, dtype=torch.int64, device=extents.device)
    if count:
        with on_device_of(extents):
            _starts_kernel[(count,)](
                mask_bytes(mask), extents, out, mask.shape[0], SCAN=SCAN, num_warps=WARPS, **OPTIONS
            )
    return out


def broadcast_to_tokens(
    values: Tensor,
    nodes: Tensor,
    rows: Tensor,
    extents: Tensor,
    mask: Tensor | None,
    place: Place,
    count: int,
    row_values: Tensor | None = None,
) -> Tensor:
    """Node values [nodes] to flat tokens [count], to a whole edge or its start or end; 0 where there is no credit.

    row_values [B]: added on every token of a row that gets credit. NaN: the row gets 0, a node adds nothing.
    """
    out = torch.empty(count, dtype=values.dtype, device=values.device)
    return _to_tokens(PLACES.index(place), values, nodes, rows, extents, mask, out, row_values)


def gather(unique: Tensor, nodes: Tensor, rows: Tensor, extents: Tensor, mask: Tensor | None, count: int) -> Tensor:
    """Values of unique tokens to flat tokens [count]; 0 outside of the sequences and where masked."""
    out = torch.empty(count, dtype=unique.dtype, device=unique.device)
    return _to_tokens(UNIQUE.value, unique, nodes, rows, extents, mask, out)


def node_of_token(nodes: Tensor, rows: Tensor, extents: Tensor, count: int) -> Tensor:
    """i32 [count]: each token's node, -1 outside of the sequences."""
    out = torch.empty(count, dtype=torch.int32, device=nodes.device)
    return _to_tokens(NODE.value, None, nodes, rows, extents, None, out)


def unique_of_token(nodes: Tensor, rows: Tensor, extents: Tensor, count: int) -> Tensor:
    """i64 [count]: each token's unique token, -1 outside of the sequences."""
    out = torch.empty(count, dtype=torch.int64, device=nodes.device)
    return _to_tokens(INDEX.value, None, nodes, rows, extents, None, out)


def _to_tokens(
    what: int,
    values: Tensor | None,
    nodes: Tensor,
    rows: Tensor,
    extents: Tensor,
    mask: Tensor | None,
    out: Tensor,
    row_values: Tensor | None = None,
) -> Tensor:
    count, sequences = out.shape[0], rows.shape[1]
    if count == 0 or sequences == 0:
        return out.zero_()
    with on_device_of(out):
        _tokens_kernel[(triton.cdiv(count, BLOCK),)](
            values, row_values, mask_bytes(mask), nodes, rows, extents, out, nodes.stride(0), sequences, count,
            0 if values is None else values.shape[0],
            WHAT=what, HAS_ROW_VALUES=row_values is not None, HAS_MASK=mask is not None, BLOCK=BLOCK,
            num_warps=WARPS, maxnreg=MAXNREG, **OPTIONS,
        )  # fmt: skip
    return out
