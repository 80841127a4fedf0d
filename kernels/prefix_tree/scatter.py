"""From the tokens of prefix trees to unique tokens and nodes, on the GPU, and what the unique tokens are.

No atomics: a unique token's lane reads the sequences of its node one after the other, in the order of the tree, in f64.
So its bits depend on its group alone.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastreward._arguments.options import PLACES, TOKEN_OPS, Place, TokenOp

from .._shared.launch import OPTIONS, mask_bytes, on_device_of
from .forest import (
    COUNT,
    EDGE_LENGTH,
    EDGE_START,
    FIRST_ROW,
    ORDER,
    PARENT,
    ROW_BEGIN,
    START,
    TOKEN_BEGIN,
    TOKEN_TOUT,
    column,
    field,
    lanes_in,
    put,
)
from .tokens import ENDS, UNIQUE

# --------------------------------------------------------------------------------------------------------- config
SEQUENCES, UNIQUES = 4, 256  # scatter_reduce: sequences at a time, unique tokens of a program
NODES, EDGE = 8, 128  # collect: nodes of a program, unique tokens of each at a time
BLOCK = 512  # layout: unique tokens of a program
WARPS = 4
MAXNREG = 168  # of scatter_reduce; stated, because ptxas otherwise spills a scalar or two for more occupancy

_SUM, _MEAN, _FIRST = (tl.constexpr(i) for i in range(len(TOKEN_OPS)))


# --------------------------------------------------------------------------------------------------------- kernel
@triton.jit
def _unique_lanes(nodes, stride, unique, BLOCK: tl.constexpr):
    """(unique tokens of this program, their nodes, their places on the edges, which exist)."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    u = first + tl.arange(0, BLOCK)
    last = tl.minimum(first + BLOCK, unique) - 1
    ends = tl.where(tl.arange(0, 2) == 0, first, last)
    zero = tl.zeros_like(ends)
    n, _, _ = lanes_in(column(nodes, stride, TOKEN_BEGIN), ends, u, zero, zero + stride)
    place = u - field(nodes, stride, TOKEN_BEGIN, n, u < unique)
    return u, n, place, (u < unique) & (place < field(nodes, stride, EDGE_LENGTH, n, u < unique))


@triton.jit(do_not_specialize=["stride", "B", "count", "places"])
def _scatter_reduce_kernel(
    tokens,  # f32 or f64 [count]
    mask,  # u8 [count]
    nodes,  # i64 [F, stride]
    rows,  # i64 [4, B]
    out,  # f32 or f64 [places]: unique tokens, or nodes
    stride, B, count, places,
    OP: tl.constexpr, OF: tl.constexpr, HAS_MASK: tl.constexpr, SEQUENCES: tl.constexpr, UNIQUES: tl.constexpr,
):  # fmt: skip
    """A lane sums what the sequences of a node have at one position: each unique token, or a node's first or last."""
    if OF == UNIQUE:
        u, n, place, ok = _unique_lanes(nodes, stride, places, UNIQUES)
    else:
        u = tl.program_id(0).to(tl.int64) * UNIQUES + tl.arange(0, UNIQUES)
        n = u
        ok = (u < places) & (field(nodes, stride, EDGE_LENGTH, n, u < places) > 0)
        place = tl.zeros_like(u)
        if OF == ENDS:
            place += field(nodes, stride, EDGE_LENGTH, n, ok) - 1
    position = field(nodes, stride, EDGE_START, n, ok) + place
    begin, many = field(nodes, stride, ROW_BEGIN, n, ok), field(nodes, stride, COUNT, n, ok)
    total = tl.zeros([UNIQUES], tl.float64)
    counted = tl.zeros([UNIQUES], tl.int32)
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
def scatter_reduce(
    tokens: Tensor, nodes: Tensor, rows: Tensor, extents: Tensor, mask: Tensor | None, op: TokenOp, unique: int
) -> Tensor:
    """Flat tokens to unique tokens [unique]: sum, mean or first of those that count, 0 where none does."""
    out = torch.empty(unique, dtype=tokens.dtype, device=tokens.device)
    return _reduce(tokens, nodes, rows, mask, TOKEN_OPS.index(op), UNIQUE.value, out)


def collect(tokens: Tensor, nodes: Tensor, rows: Tensor, extents: Tensor, mask: Tensor | None, place: Place) -> Tensor:
    """The transpose of broadcast_to_tokens: flat tokens to node values [nodes], summed."""
    count = nodes.shape[1]
    out = torch.empty(count, dtype=tokens.dtype, device=tokens.device)
    if place != "broadcast":
        return _reduce(tokens, nodes, rows, mask, _SUM.value, PLACES.index(place), out)
    unique = torch.empty(tokens.shape[0], dtype=torch.float64, device=tokens.device)
    _reduce(tokens, nodes, rows, mask, _SUM.value, UNIQUE.value, unique)
    if count:
        with on_device_of(out):
            _edges_kernel[(triton.cdiv(count, NODES),)](
                unique, nodes, out, nodes.stride(0), count, unique.shape[0],
                NODES=NODES, EDGE=EDGE, num_warps=WARPS, **OPTIONS,
            )  # fmt: skip
    return out


def _reduce(tokens: Tensor, nodes: Tensor, rows: Tensor, mask: Tensor | None, op: int, of: int, out: Tensor) -> Tensor:
    places = out.shape[0]
    if places == 0 or nodes.shape[1] == 0:
        return out
    rules: dict[str, Any] = {"OP": op, "OF": of, "HAS_MASK": mask is not None}
    with on_device_of(out):
        _scatter_reduce_kernel[(triton.cdiv(places, UNIQUES),)](
            tokens, mask_bytes(mask), nodes, rows, out, nodes.stride(0), rows.shape[1], tokens.shape[0], places,
            **rules, SEQUENCES=SEQUENCES, UNIQUES=UNIQUES,
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
