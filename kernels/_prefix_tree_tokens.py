"""Between the nodes, the unique tokens and the tokens of prefix trees, on the GPU.

A program takes a block of consecutive tokens. A search of the block's two ends finds its rows, and from each row's leaf
it goes up to the edge that holds a token: by one step for the whole block as long as that concerns all of it, then lane
by lane. Mostly a block lies in one row and few edges.

Sums go the other way without atomics: a unique token's lane reads the sequences of its node one after the other, in
the order of the tree, in f64. So its bits depend on its group alone.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastreward._options import PLACES, TOKEN_OPS, Place, TokenOp

from ._launch import OPTIONS, mask_bytes, on_device_of
from ._prefix_tree_forest import (
    COUNT,
    EDGE_LENGTH,
    EDGE_START,
    FIRST_ROW,
    LEAF,
    LENGTH,
    ORDER,
    PARENT,
    ROW_BEGIN,
    START,
    TOKEN_BEGIN,
    TOKEN_TOUT,
    climb,
    field,
    lanes_in,
    put,
)

# --------------------------------------------------------------------------------------------------------- config
BLOCK = 512  # tokens of a program
SEQUENCES, FOLDED = 4, 256  # fold: sequences at a time, unique tokens of a program
NODES, EDGE = 8, 128  # collect: nodes of a program, unique tokens of each at a time
SCAN = 2048  # lengths and starts: positions at a time
WARPS = 4
MAXNREG = 168  # of fold; stated, because ptxas otherwise spills a scalar or two for the next step of occupancy

# What a token gets: one of PLACES, or
_UNIQUE, _NODE, _INDEX = (tl.constexpr(len(PLACES) + i) for i in range(3))
_BROADCAST, _BEGINS, _ENDS = (tl.constexpr(i) for i in range(len(PLACES)))
_SUM, _MEAN, _FIRST = (tl.constexpr(i) for i in range(len(TOKEN_OPS)))


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
    """One row, from its end down to the last counted position."""
    row = tl.program_id(0)
    begin = tl.minimum(tl.maximum(tl.load(starts + row), 0), count)
    end = tl.minimum(tl.load(extents + row + 1), count)
    lanes = tl.arange(0, SCAN)
    last = begin
    while end > last:
        at = end - 1 - lanes
        inside = at >= begin
        counted = inside & (tl.load(mask + at, mask=inside, other=0) != 0)
        last = tl.max(tl.where(counted, at + 1, begin), axis=0)
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
    """One row, up to the first counted position."""
    row = tl.program_id(0)
    begin = tl.minimum(tl.maximum(tl.load(extents + row), 0), count)
    end = tl.minimum(tl.load(extents + row + 1), count)
    lanes = tl.arange(0, SCAN)
    t, first = begin, end
    while t < first:
        at = t + lanes
        inside = at < end
        counted = inside & (tl.load(mask + at, mask=inside, other=0) != 0)
        first = tl.min(tl.where(counted, at, end), axis=0)
        t += SCAN
    tl.store(out + row, tl.where(first < end, first, begin))


@triton.jit(do_not_specialize=["stride", "B", "count", "limit"])
def _tokens_kernel(
    values,  # f32 or f64, of nodes or of unique tokens [limit]; unused for numbers
    mask,  # u8 [count]
    nodes,  # i64 [F, stride]
    rows,  # i64 [4, B]
    extents,  # i64 [B + 1]
    out,  # [count]
    stride, B, count, limit,
    WHAT: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What each token gets from its node or its unique token; 0, or -1 for numbers, where there is no credit."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    at = first + tl.arange(0, BLOCK)
    last = tl.minimum(first + BLOCK, count) - 1
    row, low, high = lanes_in(extents, first, last, at, B)
    inside = at < count
    position = at - field(rows, B, START, row, inside)
    inside = inside & (position >= 0) & (position < field(rows, B, LENGTH, row, inside))
    n = field(rows, B, LEAF, row, inside)
    furthest = tl.max(tl.where(inside, position, -1), axis=0)
    one = tl.zeros_like(tl.arange(0, 1).to(tl.int64))  # of all the block, where that is one row's
    leaf = climb(nodes, stride, one + tl.load(rows + LEAF * B + high), one + furthest, one + furthest >= 0)
    n = tl.where(low == high, tl.sum(leaf, axis=0), n)
    n = climb(nodes, stride, n, position, inside)
    if HAS_MASK:
        inside = inside & (tl.load(mask + at, mask=inside, other=0) != 0)
    if WHAT == _NODE:
        value = tl.where(inside, n, -1)
    else:
        place = position - field(nodes, stride, EDGE_START, n, inside)
        if WHAT == _INDEX:
            value = tl.where(inside, field(nodes, stride, TOKEN_BEGIN, n, inside) + place, -1)
        elif WHAT == _UNIQUE:
            index = field(nodes, stride, TOKEN_BEGIN, n, inside) + place
            value = tl.load(values + index, mask=inside & (index < limit), other=0.0)
        else:
            if WHAT == _BEGINS:
                inside = inside & (place == 0)
            elif WHAT == _ENDS:
                inside = inside & (place == field(nodes, stride, EDGE_LENGTH, n, inside) - 1)
            value = tl.load(values + n, mask=inside, other=0.0)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=at < count)


@triton.jit
def _unique_lanes(nodes, stride, unique, BLOCK: tl.constexpr):
    """(unique tokens of this program, their nodes, their places on the edges, which exist)."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    u = first + tl.arange(0, BLOCK)
    last = tl.minimum(first + BLOCK, unique) - 1
    n, _, _ = lanes_in(nodes + TOKEN_BEGIN * stride, first, last, u, stride)
    place = u - field(nodes, stride, TOKEN_BEGIN, n, u < unique)
    return u, n, place, (u < unique) & (place < field(nodes, stride, EDGE_LENGTH, n, u < unique))


@triton.jit(do_not_specialize=["stride", "B", "count", "places"])
def _fold_kernel(
    tokens,  # f32 or f64 [count]
    mask,  # u8 [count]
    nodes,  # i64 [F, stride]
    rows,  # i64 [4, B]
    out,  # f32 or f64 [places]: unique tokens, or nodes
    stride, B, count, places,
    OP: tl.constexpr, OF: tl.constexpr, HAS_MASK: tl.constexpr, SEQUENCES: tl.constexpr, FOLDED: tl.constexpr,
):  # fmt: skip
    """A lane sums what the sequences of a node have at one position: each unique token, or a node's first or last."""
    if OF == _UNIQUE:
        u, n, place, ok = _unique_lanes(nodes, stride, places, FOLDED)
    else:
        u = tl.program_id(0).to(tl.int64) * FOLDED + tl.arange(0, FOLDED)
        n = u
        ok = (u < places) & (field(nodes, stride, EDGE_LENGTH, n, u < places) > 0)
        place = tl.zeros_like(u)
        if OF == _ENDS:
            place += field(nodes, stride, EDGE_LENGTH, n, ok) - 1
    position = field(nodes, stride, EDGE_START, n, ok) + place
    begin, many = field(nodes, stride, ROW_BEGIN, n, ok), field(nodes, stride, COUNT, n, ok)
    total = tl.zeros([FOLDED], tl.float64)
    counted = tl.zeros([FOLDED], tl.int32)
    earliest = tl.zeros_like(u) + B
    for j in range(0, tl.max(many, axis=0), SEQUENCES):
        k = j + tl.arange(0, SEQUENCES)[:, None]
        there = k < many[None, :]
        row = field(rows, B, ORDER, begin[None, :] + k, there)
        at = field(rows, B, START, row, there) + position[None, :]
        there = there & (at < count)
        if HAS_MASK:
            there = there & (tl.load(mask + at, mask=there, other=0) != 0)
        value = tl.load(tokens + at, mask=there, other=0.0).to(tl.float64)
        if OP == _FIRST:
            row = tl.where(there, row, B)
            lowest = tl.min(row, axis=0)
            value = tl.sum(tl.where(there & (row == lowest[None, :]), value, 0.0), axis=0)
            total = tl.where(lowest < earliest, value, total)
            earliest = tl.minimum(lowest, earliest)
        else:
            total += tl.sum(value, axis=0)
            counted += tl.sum(there.to(tl.int32), axis=0)
    if OP == _MEAN:
        total = total / tl.maximum(counted, 1).to(tl.float64)
    tl.store(out + u, total.to(out.dtype.element_ty), mask=u < places)


@triton.jit(do_not_specialize=["stride", "places", "limit"])
def _edges_kernel(
    unique,  # f64 [limit]: values of the unique tokens
    nodes,  # i64 [F, stride]
    out,  # f32 or f64 [places]
    stride, places, limit,
    NODES: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Sums over the edges of NODES nodes: 8 bytes a unique token."""
    n = tl.program_id(0).to(tl.int64) * NODES + tl.arange(0, NODES)
    ok = n < places
    begin, length = field(nodes, stride, TOKEN_BEGIN, n, ok), field(nodes, stride, EDGE_LENGTH, n, ok)
    length = tl.minimum(length, limit - begin)
    total = tl.zeros([NODES], tl.float64)
    lanes = tl.arange(0, EDGE)[None, :]
    for j in range(0, tl.max(length, axis=0), EDGE):
        inside = j + lanes < length[:, None]
        total += tl.sum(tl.load(unique + begin[:, None] + j + lanes, mask=inside, other=0.0), axis=1)
    tl.store(out + n, total.to(out.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["stride", "B", "unique"])
def _layout_kernel(
    tokens,  # i32 or i64, flat
    nodes,  # i64 [F, stride]
    rows,  # i64 [4, B]
    out,  # i64 [6, unique]: token id, position, parent, end of the subtree, sequences, flat index
    stride, B, unique,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Each unique token: up to 8 bytes in, 48 out."""
    u, n, place, ok = _unique_lanes(nodes, stride, unique, BLOCK)
    position = tl.where(ok, field(nodes, stride, EDGE_START, n, ok) + place, 0)
    source = position + field(rows, B, START, field(nodes, stride, FIRST_ROW, n, ok), ok)
    top = ok & (place == 0)
    above = field(nodes, stride, PARENT, n, top)
    length = field(nodes, stride, EDGE_LENGTH, above, top)
    last = tl.where(length > 0, field(nodes, stride, TOKEN_BEGIN, above, top) + length - 1, -1)
    inside = u < unique
    token = tl.load(tokens + source, mask=ok, other=0).to(tl.int64)
    put(out, unique, 0, u, token, inside)
    put(out, unique, 1, u, position, inside)
    put(out, unique, 2, u, tl.where(top, last, tl.where(ok, u - 1, 0)), inside)
    put(out, unique, 3, u, field(nodes, stride, TOKEN_TOUT, n, ok), inside)
    put(out, unique, 4, u, field(nodes, stride, COUNT, n, ok), inside)
    put(out, unique, 5, u, source, inside)


# --------------------------------------------------------------------------------------------------------- launch
def lengths(mask: Tensor, extents: Tensor, starts: Tensor | None) -> Tensor:
    """Tokens from each row's start to its last counted one, i64 [B]; extents i64 [B + 1], starts i64 [B]."""
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
    """Flat index of each row's first counted token, i64 [B]; where its extent begins if there is none."""
    count = extents.shape[0] - 1
    out = torch.empty(count, dtype=torch.int64, device=extents.device)
    if count:
        with on_device_of(extents):
            _starts_kernel[(count,)](
                mask_bytes(mask), extents, out, mask.shape[0], SCAN=SCAN, num_warps=WARPS, **OPTIONS
            )
    return out


def spread(
    values: Tensor, nodes: Tensor, rows: Tensor, extents: Tensor, mask: Tensor | None, place: Place, count: int
) -> Tensor:
    """Node values [nodes] to flat tokens [count], to a whole edge or its start or end; 0 where there is no credit."""
    out = torch.empty(count, dtype=values.dtype, device=values.device)
    return _to_tokens(PLACES.index(place), values, nodes, rows, extents, mask, out)


def unfold(unique: Tensor, nodes: Tensor, rows: Tensor, extents: Tensor, mask: Tensor | None, count: int) -> Tensor:
    """Values of unique tokens to flat tokens [count]; 0 outside of the sequences and where masked."""
    out = torch.empty(count, dtype=unique.dtype, device=unique.device)
    return _to_tokens(_UNIQUE.value, unique, nodes, rows, extents, mask, out)


def node_of_token(nodes: Tensor, rows: Tensor, extents: Tensor, count: int) -> Tensor:
    """i32 [count]: each token's node, -1 outside of the sequences."""
    out = torch.empty(count, dtype=torch.int32, device=nodes.device)
    return _to_tokens(_NODE.value, None, nodes, rows, extents, None, out)


def unique_of_token(nodes: Tensor, rows: Tensor, extents: Tensor, count: int) -> Tensor:
    """i64 [count]: each token's unique token, -1 outside of the sequences."""
    out = torch.empty(count, dtype=torch.int64, device=nodes.device)
    return _to_tokens(_INDEX.value, None, nodes, rows, extents, None, out)


def _to_tokens(
    what: int, values: Tensor | None, nodes: Tensor, rows: Tensor, extents: Tensor, mask: Tensor | None, out: Tensor
) -> Tensor:
    count, sequences = out.shape[0], rows.shape[1]
    if count == 0 or sequences == 0:
        return out.zero_()
    with on_device_of(out):
        _tokens_kernel[(triton.cdiv(count, BLOCK),)](
            values, mask_bytes(mask), nodes, rows, extents, out, nodes.stride(0), sequences, count,
            0 if values is None else values.shape[0],
            WHAT=what, HAS_MASK=mask is not None, BLOCK=BLOCK, num_warps=WARPS, **OPTIONS,
        )  # fmt: skip
    return out


def fold(
    tokens: Tensor, nodes: Tensor, rows: Tensor, extents: Tensor, mask: Tensor | None, op: TokenOp, unique: int
) -> Tensor:
    """Flat tokens to unique tokens [unique]: sum, mean or first of those that count, 0 where none does."""
    out = torch.empty(unique, dtype=tokens.dtype, device=tokens.device)
    return _fold(tokens, nodes, rows, mask, TOKEN_OPS.index(op), _UNIQUE.value, out)


def collect(tokens: Tensor, nodes: Tensor, rows: Tensor, extents: Tensor, mask: Tensor | None, place: Place) -> Tensor:
    """The transpose of spread: flat tokens to node values [nodes], summed."""
    count = nodes.shape[1]
    out = torch.empty(count, dtype=tokens.dtype, device=tokens.device)
    if place != "broadcast":
        return _fold(tokens, nodes, rows, mask, _SUM.value, PLACES.index(place), out)
    unique = torch.empty(tokens.shape[0], dtype=torch.float64, device=tokens.device)
    _fold(tokens, nodes, rows, mask, _SUM.value, _UNIQUE.value, unique)
    if count:
        with on_device_of(out):
            _edges_kernel[(triton.cdiv(count, NODES),)](
                unique, nodes, out, nodes.stride(0), count, unique.shape[0],
                NODES=NODES, EDGE=EDGE, num_warps=WARPS, **OPTIONS,
            )  # fmt: skip
    return out


def _fold(tokens: Tensor, nodes: Tensor, rows: Tensor, mask: Tensor | None, op: int, of: int, out: Tensor) -> Tensor:
    places = out.shape[0]
    if places == 0 or nodes.shape[1] == 0:
        return out
    rules: dict[str, Any] = {"OP": op, "OF": of, "HAS_MASK": mask is not None}
    with on_device_of(out):
        _fold_kernel[(triton.cdiv(places, FOLDED),)](
            tokens, mask_bytes(mask), nodes, rows, out, nodes.stride(0), rows.shape[1], tokens.shape[0], places,
            **rules, SEQUENCES=SEQUENCES, FOLDED=FOLDED,
            num_warps=WARPS, maxnreg=MAXNREG, **OPTIONS,
        )  # fmt: skip
    return out


def layout(tokens: Tensor, nodes: Tensor, rows: Tensor, unique: int) -> tuple[Tensor, ...]:
    """i64 [unique] each: token id, position, parent (-1: none), end of the subtree, sequences, flat index."""
    out = torch.empty((6, unique), dtype=torch.int64, device=nodes.device)
    if unique and rows.shape[1]:
        with on_device_of(out):
            _layout_kernel[(triton.cdiv(unique, BLOCK),)](
                tokens, nodes, rows, out, nodes.stride(0), rows.shape[1], unique,
                BLOCK=BLOCK, num_warps=WARPS, **OPTIONS,
            )  # fmt: skip
    return tuple(out.unbind())
