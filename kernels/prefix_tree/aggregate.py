"""Aggregates over prefix trees on the GPU: each node from the sequences below it, or level by level; their gradients.

Over sequences a node's part of `order` is one interval, so that no node waits for another. Over children one does: one
program takes a group's nodes block by block in reverse pre-order, and within a block level by level, in as many steps
as the block has levels, never more than nodes. A gradient is walked from each leaf to its root. All in f64, in an order
that a group alone decides: the bits depend neither on the other groups nor on scheduling. A part that is NaN is not
there; a node without parts has the weight NaN and the value NaN.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastreward._arguments.options import TREE_OPS, AggregateOptions

from .._shared.launch import OPTIONS, numbers, on_device_of
from .forest import (
    CHILDREN,
    COUNT,
    DEPTH,
    EDGE_LENGTH,
    EDGE_START,
    LEAF,
    LENGTH,
    ORDER,
    PARENT,
    ROW_BEGIN,
    TOUT,
    any_of,
    field,
    group_at,
    number,
)

# --------------------------------------------------------------------------------------------------------- config
NODES, SEQUENCES = 16, 32  # over sequences: nodes of a program, sequences of each at a time
LANES = 128  # rows of a program, or nodes of a group at a time: one per thread
WARPS = 4
SEQUENCES_MAXNREG = 128  # over sequences; and else:
MAXNREG = 64  # stated, because ptxas otherwise spills a scalar or two to get below the next step of occupancy

_MEAN, _SUM, _MAX, _MIN, _LOGSUMEXP, _ANY = (tl.constexpr(i) for i in range(len(TREE_OPS)))
SUM = _SUM


# --------------------------------------------------------------------------------------------------------- kernel
@triton.jit
def _power(log2_base, odd, exponent):
    """f64: a base to the power of whole numbers; `odd` is the sign of the base."""
    power = tl.where(exponent == 0, 1.0, tl.exp2(exponent.to(tl.float64) * log2_base))
    return tl.where(exponent % 2 == 1, power * odd, power)


@triton.jit
def _weighted(log_part, weight):
    """The log of a part times its weight."""
    return tl.where(weight == 1.0, log_part, log_part + tl.log(weight))


@triton.jit
def _share(log_part, log_whole):
    """exp(difference), where nothing minus nothing is nothing."""
    return tl.where(tl.abs(log_whole) == float("inf"), 0.0, tl.exp(log_part - log_whole))


@triton.jit
def _log_add(a, b):
    high, low = tl.maximum(a, b), tl.minimum(a, b)
    both = tl.where(tl.abs(high) == float("inf"), high, high + tl.log(1.0 + tl.exp(low - high)))
    return tl.where((a != a) | (b != b), a + b, both)


@triton.jit
def _load64(x, at, ok, PRESENT: tl.constexpr):
    """A value as f64, or 1 where there is no such tensor."""
    if PRESENT:
        return tl.load(x + at, mask=ok, other=1.0).to(tl.float64)
    else:
        return tl.where(ok, tl.full([], 1.0, tl.float64), tl.full([], 1.0, tl.float64))


@triton.jit
def _result(total, weight, scale, OP: tl.constexpr, NORMALIZED: tl.constexpr):
    """A node's value, from what its parts add up to; NaN without parts."""
    if OP == _MEAN:
        total = total / weight
    elif OP == _LOGSUMEXP:
        if NORMALIZED:
            total -= tl.log(weight)
        total = total / scale
    return tl.where(weight == weight, total, float("nan"))


@triton.jit
def _sequence_tile(values, weights, nodes, stride, rows, B, begin, many, end, k, log2_discount, odd, scale,
                   OP: tl.constexpr, HAS_WEIGHTS: tl.constexpr, DISCOUNTED: tl.constexpr):  # fmt: skip
    """(what the sequences k of each node add, their weights, which are there): [NODES, SEQUENCES]."""
    there = k < many[:, None]
    row = field(rows, B, ORDER, begin[:, None] + k, there)
    x = tl.load(values + row, mask=there, other=0.0).to(tl.float64)
    there = there & (x == x)
    w = tl.where(there, _load64(weights, row, there, HAS_WEIGHTS), 0.0)
    if OP == _ANY:
        x = tl.where(x != 0.0, 1.0, 0.0)
    if DISCOUNTED:
        x *= _power(log2_discount, odd, field(rows, B, LENGTH, row, there) - end[:, None])
    if (OP == _MEAN) or (OP == _SUM):  # noqa: SIM109  (constexpr has no `in`)
        x *= w
    if OP == _LOGSUMEXP:
        x = _weighted(scale * x, w)
    return x, w, there


@triton.jit(do_not_specialize=["stride", "B", "places"])
def _sequences_kernel(
    values, weights,  # f32 or f64 [B]
    nodes,  # i64 [F, stride]
    rows,  # i64 [4, B]
    total, weight,  # f64 [places], out: what the parts add up to (logsumexp: its log), and their weights
    out,  # f32 or f64 [places], out
    stride, B, places, log2_discount: tl.float64, odd: tl.float64, scale: tl.float64, given,
    OP: tl.constexpr, NORMALIZED: tl.constexpr, HAS_WEIGHTS: tl.constexpr, DISCOUNTED: tl.constexpr,
    GIVEN: tl.constexpr, ENDS: tl.constexpr, NODES: tl.constexpr, SEQUENCES: tl.constexpr,
):  # fmt: skip
    """NODES nodes over the sequences below each, or (ENDS) over those that end there, which come first."""
    log2_discount, odd = number(log2_discount, given, 0, GIVEN), number(odd, given, 1, GIVEN)
    scale = number(scale, given, 2, GIVEN)
    n = tl.program_id(0).to(tl.int64) * NODES + tl.arange(0, NODES)
    ok = n < places
    begin, many = field(nodes, stride, ROW_BEGIN, n, ok), field(nodes, stride, COUNT, n, ok)
    if ENDS:
        inner = ok & (field(nodes, stride, CHILDREN, n, ok) > 0)
        many = tl.where(inner, field(nodes, stride, ROW_BEGIN, n + 1, inner) - begin, many)
    end = field(nodes, stride, EDGE_START, n, ok) + field(nodes, stride, EDGE_LENGTH, n, ok)
    lanes = tl.arange(0, SEQUENCES)[None, :]
    longest = tl.max(many, axis=0)
    top = tl.full([NODES], float("-inf"), tl.float64)
    parts = tl.zeros([NODES], tl.int32)
    sums = tl.zeros([NODES], tl.float64)
    w_sum = tl.zeros([NODES], tl.float64)
    for j in range(0, longest, SEQUENCES):
        x, w, there = _sequence_tile(values, weights, nodes, stride, rows, B, begin, many, end, j + lanes,
                                     log2_discount, odd, scale, OP, HAS_WEIGHTS, DISCOUNTED and not ENDS)  # fmt: skip
        if OP == _MIN:
            x = -x
        w_sum += tl.sum(w, axis=1)
        parts += tl.sum(there.to(tl.int32), axis=1)
        if (OP == _MEAN) or (OP == _SUM):  # noqa: SIM109
            sums += tl.sum(tl.where(there, x, 0.0), axis=1)
        else:
            top = tl.maximum(top, tl.max(tl.where(there, x, float("-inf")), axis=1))
    if OP == _LOGSUMEXP:
        high = tl.where(tl.abs(top) == float("inf"), 0.0, top)
        for j in range(0, longest, SEQUENCES):
            x, w, there = _sequence_tile(values, weights, nodes, stride, rows, B, begin, many, end, j + lanes,
                                         log2_discount, odd, scale, OP, HAS_WEIGHTS, False)  # fmt: skip
            sums += tl.sum(tl.where(there, tl.exp(x - high[:, None]), 0.0), axis=1)
        sums = high + tl.log(sums)
    elif OP == _MIN:
        sums = -top
    elif OP == _ANY:
        sums = tl.maximum(top, 0.0)
    elif OP == _MAX:
        sums = top
    w_sum = tl.where(parts > 0, w_sum, float("nan"))
    tl.store(total + n, sums, mask=ok)
    tl.store(weight + n, w_sum, mask=ok)
    value = tl.where(many > 0, _result(sums, w_sum, scale, OP, NORMALIZED), 0.0)
    tl.store(out + n, value.to(out.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["stride", "B"])
def children_kernel(
    total, weight,  # f64 [places]: of what ends at each node; out: with what its children add
    child_weights,  # f32 or f64 [places]
    nodes,  # i64 [F, stride]
    rows,  # i64 [4, B]
    result,  # f64 [places], out
    out,  # f32 or f64 [places], out: the same
    stride, B, log2_discount: tl.float64, odd: tl.float64, scale: tl.float64, given,
    OP: tl.constexpr, NORMALIZED: tl.constexpr, HAS_WEIGHTS: tl.constexpr, DISCOUNTED: tl.constexpr,
    GIVEN: tl.constexpr, GRADIENT: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One group from its leaves to its root. GRADIENT: NaN is NaN, but nothing comes through a weight of 0."""
    log2_discount, odd = number(log2_discount, given, 0, GIVEN), number(odd, given, 1, GIVEN)
    scale = number(scale, given, 2, GIVEN)
    first, end = group_at(nodes, stride, rows, B, tl.program_id(0))
    lanes = tl.arange(0, LANES)
    for behind in range(0, end - first, LANES):
        n = end - 1 - behind - lanes
        depth = tl.where(n >= first, field(nodes, stride, DEPTH, n, n >= first), -1)
        level = tl.max(depth, axis=0)
        while level >= 0:
            now = depth == level
            many = field(nodes, stride, CHILDREN, n, now)
            sums, w_sum = tl.load(total + n, mask=now, other=0.0), tl.load(weight + n, mask=now, other=0.0)
            child = n + 1
            for j in range(tl.max(many, axis=0)):
                walking = now & (j < many)
                w = _load64(child_weights, child, walking, HAS_WEIGHTS)
                x = tl.load(result + child, mask=walking, other=0.0)
                there = walking if GRADIENT else walking & (x == x)
                if OP == _LOGSUMEXP:
                    sums = tl.where(there, _log_add(sums, _weighted(scale * x, w)), sums)
                else:
                    if DISCOUNTED:
                        x *= _power(log2_discount, odd, field(nodes, stride, EDGE_LENGTH, child, there))
                    if GRADIENT:
                        x = tl.where(w == 0.0, 0.0, x)
                    sums = tl.where(there, sums + w * x, sums)
                w_sum = tl.where(there, tl.where(w_sum == w_sum, w_sum + w, w), w_sum)
                child = tl.where(walking, field(nodes, stride, TOUT, child, walking), child)
            value = sums if GRADIENT else _result(sums, w_sum, scale, OP, NORMALIZED)
            tl.store(total + n, sums, mask=now)
            tl.store(weight + n, w_sum, mask=now)
            tl.store(result + n, value, mask=now)
            tl.store(out + n, value.to(out.dtype.element_ty), mask=now)
            tl.debug_barrier()  # the parents read what was stored
            depth = tl.where(now, -1, depth)
            level = tl.max(depth, axis=0)


@triton.jit(do_not_specialize=["stride", "B"])
def _aggregate_backward_kernel(
    grad,  # f32 or f64 [places]
    values, weights,  # f32 or f64 [B]
    child_weights,  # f32 or f64 [places]
    total, weight,  # f64 [places], of the forward pass
    nodes,  # i64 [F, stride]
    rows,  # i64 [4, B]
    out,  # f32 or f64 [B], out
    stride, B, log2_discount: tl.float64, odd: tl.float64, scale: tl.float64, given,
    OP: tl.constexpr, NORMALIZED: tl.constexpr, HAS_WEIGHTS: tl.constexpr, HAS_CHILD_WEIGHTS: tl.constexpr,
    DISCOUNTED: tl.constexpr, GIVEN: tl.constexpr, CHILDREN_ALIKE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Each sequence's part of every node on its path, times that node's gradient; none of a value that is NaN."""
    log2_discount, odd = number(log2_discount, given, 0, GIVEN), number(odd, given, 1, GIVEN)
    scale = number(scale, given, 2, GIVEN)
    row = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    ok = row < B
    n = tl.where(ok, field(rows, B, LEAF, row, ok), -1)
    w = _load64(weights, row, ok, HAS_WEIGHTS)
    length = field(rows, B, LENGTH, row, ok)
    value = tl.load(values + row, mask=ok, other=0.0)
    part = w  # of the node in hand
    x = tl.zeros([LANES], tl.float64)  # logsumexp: log of the part, before it is divided by the whole
    if OP == _LOGSUMEXP:
        x = _weighted(scale * value.to(tl.float64), w)
        part = tl.full([LANES], 1.0, tl.float64)
    gradient = tl.zeros([LANES], tl.float64)
    going = ok & (value == value)
    while any_of(going):
        whole = tl.load(total + n, mask=going, other=0.0)
        counted = tl.load(weight + n, mask=going, other=1.0)
        g = tl.load(grad + n, mask=going, other=0.0).to(tl.float64)
        result = _result(whole, counted, scale, OP, NORMALIZED)
        there = going & (result == result)
        if OP == _LOGSUMEXP:
            here = part * _share(x, whole)
        elif OP == _MEAN:
            here = part / counted
        else:
            here = part
        edge = field(nodes, stride, EDGE_LENGTH, n, going)
        if DISCOUNTED and not CHILDREN_ALIKE:
            here *= _power(log2_discount, odd, length - field(nodes, stride, EDGE_START, n, going) - edge)
        gradient += tl.where(there, here * g, 0.0)
        if CHILDREN_ALIKE:  # the node is a part of its parent
            going = there
            w = _load64(child_weights, n, going, HAS_CHILD_WEIGHTS)
            part = here
            if OP == _LOGSUMEXP:
                x = _weighted(whole - tl.log(counted) if NORMALIZED else whole, w)
            else:
                part *= w
                if DISCOUNTED:
                    part *= _power(log2_discount, odd, edge)
        n = field(nodes, stride, PARENT, n, going)
        going = going & (n >= 0)
    tl.store(out + row, gradient.to(out.dtype.element_ty), mask=ok)


# --------------------------------------------------------------------------------------------------------- launch
def aggregate(
    values: Tensor,  # [B] f32 or f64
    weights: Tensor | None,  # [B] like values
    child_weights: Tensor | None,  # [nodes] like values
    nodes: Tensor,
    rows: Tensor,
    options: AggregateOptions,
) -> Tensor:
    """[nodes], the dtype of values."""
    out, _ = _totals(values, weights, child_weights, nodes, rows, options)
    return out


def aggregate_backward(
    grad: Tensor,  # [nodes]
    values: Tensor,
    weights: Tensor | None,
    child_weights: Tensor | None,
    nodes: Tensor,
    rows: Tensor,
    options: AggregateOptions,
) -> Tensor:
    """Gradient for values, [B]; for mean, sum and logsumexp."""
    _, totals = _totals(values, weights, child_weights, nodes, rows, options)
    count = rows.shape[1]
    out = torch.empty_like(values)
    if count:
        with on_device_of(values):
            _aggregate_backward_kernel[(triton.cdiv(count, LANES),)](
                grad, values, weights, child_weights, totals[0], totals[1], nodes, rows, out,
                nodes.stride(0), count, *_numbers(options), **_rules(options), HAS_WEIGHTS=weights is not None,
                HAS_CHILD_WEIGHTS=child_weights is not None, CHILDREN_ALIKE=_level_by_level(options),
                LANES=LANES, num_warps=WARPS, maxnreg=MAXNREG, **OPTIONS,
            )  # fmt: skip
    return out


def _level_by_level(o: AggregateOptions) -> bool:
    """Whether children make a difference: an extreme of extremes is one of all."""
    return o.over == "children" and o.op in ("mean", "sum", "logsumexp")


def _numbers(o: AggregateOptions) -> tuple[float | Tensor | None, ...]:
    """log2 of the discount's magnitude, its sign, and the scale; f64 [3] instead where it must be read."""
    if isinstance(o.discount, Tensor):
        discount: tuple[float | Tensor, ...] = o.discount.abs().log2(), o.discount.sign()
    else:
        discount = math.log2(abs(o.discount)) if o.discount else -math.inf, math.copysign(1.0, o.discount)
    known, given = numbers(*discount, o.scale)
    return *known, given


def _rules(o: AggregateOptions) -> dict[str, Any]:
    on_device = isinstance(o.discount, Tensor)
    return {
        "OP": TREE_OPS.index(o.op),
        "NORMALIZED": o.normalized,
        "DISCOUNTED": on_device or o.discount != 1.0,
        "GIVEN": on_device or isinstance(o.scale, Tensor),
    }


def _totals(
    values: Tensor,
    weights: Tensor | None,
    child_weights: Tensor | None,
    nodes: Tensor,
    rows: Tensor,
    options: AggregateOptions,
) -> tuple[Tensor, Tensor]:
    """(values of the nodes, [nodes]; what they are made of, f64 [3, nodes]: sums, weights, and scratch)."""
    places, count = nodes.shape[1], rows.shape[1]
    out = torch.empty(places, dtype=values.dtype, device=values.device)
    totals = torch.empty((3, places), dtype=torch.float64, device=values.device)
    if not places:
        return out, totals
    children = _level_by_level(options)
    shared: tuple[Any, ...] = (nodes.stride(0), count)
    with on_device_of(values):
        _sequences_kernel[(triton.cdiv(places, NODES),)](
            values, weights, nodes, rows, totals[0], totals[1], out, *shared, places, *_numbers(options),
            **_rules(options), HAS_WEIGHTS=weights is not None, ENDS=children, NODES=NODES, SEQUENCES=SEQUENCES,
            num_warps=WARPS, maxnreg=SEQUENCES_MAXNREG, **OPTIONS,
        )  # fmt: skip
        if children:
            children_kernel[(count,)](
                totals[0], totals[1], child_weights, nodes, rows, totals[2], out, *shared, *_numbers(options),
                **_rules(options), HAS_WEIGHTS=child_weights is not None, GRADIENT=False,
                LANES=LANES, num_warps=WARPS, **OPTIONS,
            )  # fmt: skip
    return out, totals
