"""Advantages of a prefix tree's nodes, and recurrences from its roots down, on the GPU.

A recurrence is one program for each group, block by block in pre-order and within a block level by level; its gradient
comes up as a sum over children (`aggregate.py`). Paths to the root are walked lane by lane. All in f64, in
an order that a group alone decides.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastreward._arguments.options import TREE_MODES, AdvantageOptions, Rules

from .._shared.launch import OPTIONS, numbers, on_device_of
from .aggregate import SUM, children_kernel
from .forest import CHILDREN, COUNT, DEPTH, PARENT, ROOT, TOUT, any_of, field, group_at, number

# --------------------------------------------------------------------------------------------------------- config
LANES = 128  # nodes of a program, or nodes of a group at a time: one per thread
WARPS = 4
MAXNREG = 64  # stated, because ptxas otherwise spills a scalar or two to get below the next step of occupancy

_TD, _SIBLING, _ROOT, _TD_ROOT, _ALL_ANCESTORS, _DEPTH_WEIGHTED = (tl.constexpr(i) for i in range(len(TREE_MODES)))
_NO_LEVEL = tl.constexpr(2**62)


# --------------------------------------------------------------------------------------------------------- kernel
@triton.jit(do_not_specialize=["stride", "places", "ddof"])
def _siblings_kernel(
    values,  # f32 or f64 [places]
    nodes,  # i64 [F, stride]
    mean, deviation, valued,  # f64 [places], out: of each node's children that have a value, and their number
    stride, places, ddof,
    LANES: tl.constexpr,
):  # fmt: skip
    """Two walks along the children of each node."""
    n = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    ok = n < places
    many = field(nodes, stride, CHILDREN, n, ok)
    centre = tl.zeros([LANES], tl.float64)
    squares = tl.zeros([LANES], tl.float64)
    counted = tl.zeros([LANES], tl.int64)
    for walk in tl.static_range(2):
        child = n + 1
        for j in range(tl.max(many, axis=0)):
            walking = j < many
            v = tl.load(values + child, mask=walking, other=0.0).to(tl.float64)
            there = walking & (v == v)
            if walk == 0:
                centre += tl.where(there, v, 0.0)
                counted += there.to(tl.int64)
            else:
                squares += tl.where(there, (v - centre) * (v - centre), 0.0)
            child = tl.where(walking, field(nodes, stride, TOUT, child, walking), child)
        if walk == 0:
            centre = centre / tl.maximum(counted, 1).to(tl.float64)
    tl.store(mean + n, centre, mask=ok)
    tl.store(deviation + n, tl.sqrt(squares / tl.maximum(counted - ddof, 0).to(tl.float64)), mask=ok)
    tl.store(valued + n, counted.to(tl.float64), mask=ok)


@triton.jit
def _against(values, v, other, ok):
    """V - V(other), 0 where that one has no value."""
    above = tl.load(values + other, mask=ok, other=0.0).to(tl.float64)
    return tl.where(above == above, v - above, 0.0)


@triton.jit(do_not_specialize=["stride", "places"])
def _advantages_kernel(
    values,  # f32 or f64 [places]
    nodes,  # i64 [F, stride]
    mean, deviation, valued,  # f64 [places], of each node's children that have a value, and their number
    out,  # f32 or f64 [places], out
    stride, places, eps: tl.float64, given,
    MODE: tl.constexpr, SCALE_STD: tl.constexpr, SINGLETON_RAW: tl.constexpr, GIVEN: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Each node against its parent, siblings, root or ancestors; those without a value (NaN) get 0 and do not count."""
    n = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    ok = n < places
    parent = tl.where(ok, field(nodes, stride, PARENT, n, ok), -1)
    ok = parent >= 0
    v = tl.load(values + n, mask=ok, other=0.0).to(tl.float64)
    ok = ok & (v == v)
    a = tl.zeros([LANES], tl.float64)
    if (MODE == _TD) or (MODE == _TD_ROOT):  # noqa: SIM109
        a += _against(values, v, parent, ok)
    if (MODE == _ROOT) or (MODE == _TD_ROOT):  # noqa: SIM109
        a += _against(values, v, field(nodes, stride, ROOT, n, ok), ok)
    if MODE == _SIBLING:
        a = v - tl.load(mean + parent, mask=ok, other=0.0)
        if SCALE_STD:
            a = a / (tl.load(deviation + parent, mask=ok, other=1.0) + number(eps, given, 0, GIVEN))
        alone = tl.load(valued + parent, mask=ok, other=0.0) == 1.0
        a = tl.where(alone, v if SINGLETON_RAW else tl.zeros_like(v), a)
    if (MODE == _ALL_ANCESTORS) or (MODE == _DEPTH_WEIGHTED):  # noqa: SIM109
        total = tl.zeros([LANES], tl.float64)
        weights = tl.zeros([LANES], tl.int64)
        above = n if MODE == _DEPTH_WEIGHTED else parent
        going = ok
        while any_of(going):
            value = tl.load(values + above, mask=going, other=0.0).to(tl.float64)
            there = going & (value == value)
            weight = there.to(tl.int64)
            if MODE == _DEPTH_WEIGHTED:
                weight = field(nodes, stride, COUNT, above, there)
            total += tl.where(there, weight.to(tl.float64) * value, 0.0)
            weights += weight
            above = field(nodes, stride, PARENT, above, going)
            going = going & (above >= 0)
        a = tl.where(weights > 0, v - total / tl.maximum(weights, 1).to(tl.float64), 0.0)
    tl.store(out + n, tl.where(ok, a, 0.0).to(out.dtype.element_ty), mask=n < places)


@triton.jit
def _clamped(y, low, high):
    return tl.where(y < low, low, tl.where(y > high, high, y))


@triton.jit(do_not_specialize=["stride", "B"])
def _propagate_kernel(
    scale, shift,  # f32 or f64 [places]
    nodes,  # i64 [F, stride]
    rows,  # i64 [4, B]
    x,  # f64 [places], out
    out,  # f32 or f64 [places], out: the same
    stride, B, initial: tl.float64, low: tl.float64, high: tl.float64, given,
    GIVEN: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One group from its root to its leaves."""
    initial, low, high = number(initial, given, 0, GIVEN), number(low, given, 1, GIVEN), number(high, given, 2, GIVEN)
    first, end = group_at(nodes, stride, rows, B, tl.program_id(0))
    lanes = tl.arange(0, LANES)
    for before in range(0, end - first, LANES):
        n = first + before + lanes
        depth = tl.where(n < end, field(nodes, stride, DEPTH, n, n < end), _NO_LEVEL)
        level = tl.min(depth, axis=0)
        while level < _NO_LEVEL:
            now = depth == level
            parent = field(nodes, stride, PARENT, n, now)
            inner = now & (parent >= 0)
            above = tl.load(x + parent, mask=inner, other=0.0)
            y = tl.load(scale + n, mask=inner, other=0.0).to(tl.float64) * above
            y = _clamped(y + tl.load(shift + n, mask=inner, other=0.0).to(tl.float64), low, high)
            y = tl.where(inner, y, initial)
            tl.store(x + n, y, mask=now)
            tl.store(out + n, y.to(out.dtype.element_ty), mask=now)
            tl.debug_barrier()  # the children read what was stored
            depth = tl.where(now, _NO_LEVEL, depth)
            level = tl.min(depth, axis=0)


@triton.jit(do_not_specialize=["stride", "places"])
def _passed_kernel(
    scale, shift,  # f32 or f64 [places]
    x,  # f64 [places], of the recurrence
    below,  # f64 [places]: gradients of x, with those of the nodes below; unused where FACTORS
    nodes,  # i64 [F, stride]
    factor,  # f64 [places], out where FACTORS: what a node's x counts in its gradient for its parent's
    grad_scale, grad_shift,  # f32 or f64 [places], out where not
    stride, places, low: tl.float64, high: tl.float64, given,
    GIVEN: tl.constexpr, FACTORS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Nothing passes where a bound has cut, where x is NaN, nor from a root."""
    low, high = number(low, given, 1, GIVEN), number(high, given, 2, GIVEN)
    n = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    ok = n < places
    parent = tl.where(ok, field(nodes, stride, PARENT, n, ok), -1)
    inner = parent >= 0
    a = tl.load(scale + n, mask=inner, other=0.0).to(tl.float64)
    above = tl.load(x + parent, mask=inner, other=0.0)
    y = a * above + tl.load(shift + n, mask=inner, other=0.0).to(tl.float64)
    passes = inner & (y >= low) & (y <= high)
    if FACTORS:
        tl.store(factor + n, tl.where(passes, a, 0.0), mask=ok)
    else:
        through = tl.load(below + n, mask=passes, other=0.0)
        slope = tl.where(passes, through * above, 0.0)
        tl.store(grad_scale + n, slope.to(grad_scale.dtype.element_ty), mask=ok)
        tl.store(grad_shift + n, through.to(grad_shift.dtype.element_ty), mask=ok)


# --------------------------------------------------------------------------------------------------------- launch
def advantages(values: Tensor, nodes: Tensor, rows: Tensor, options: AdvantageOptions) -> Tensor:
    """[nodes] from node values [nodes]; 0 for roots, without a value and with nothing to compare it with."""
    places, stride = nodes.shape[1], nodes.stride(0)
    out = torch.empty_like(values)
    if not places:
        return out
    siblings = options.mode == "sibling"
    statistics = torch.empty((3, places if siblings else 0), dtype=torch.float64, device=values.device)
    grid = (triton.cdiv(places, LANES),)
    (eps,), given = numbers(options.eps)
    with on_device_of(values):
        if siblings:
            _siblings_kernel[grid](
                values, nodes, *statistics, stride, places, options.ddof,
                LANES=LANES, num_warps=WARPS, maxnreg=MAXNREG, **OPTIONS,
            )  # fmt: skip
        _advantages_kernel[grid](
            values, nodes, *statistics, out, stride, places, eps, given, GIVEN=given is not None,
            MODE=TREE_MODES.index(options.mode), SCALE_STD=options.scale == "std",
            SINGLETON_RAW=options.singleton == "raw", LANES=LANES, num_warps=WARPS, **OPTIONS,
        )  # fmt: skip
    return out


def propagate(scale: Tensor, shift: Tensor, nodes: Tensor, rows: Tensor, rules: Rules) -> Tensor:
    """x[root] = initial, x[n] = clamp(scale[n] * x[parent] + shift[n], low, high); [nodes]."""
    out, _ = _recurrence(scale, shift, nodes, rows, rules)
    return out


def propagate_backward(
    grad: Tensor, scale: Tensor, shift: Tensor, nodes: Tensor, rows: Tensor, rules: Rules
) -> tuple[Tensor, Tensor]:
    """Gradients for scale and shift; none passes a bound that has cut, nor NaN."""
    places, count, stride = nodes.shape[1], rows.shape[1], nodes.stride(0)
    grad_scale, grad_shift = torch.empty_like(scale), torch.empty_like(scale)
    if not places:
        return grad_scale, grad_shift
    _, x = _recurrence(scale, shift, nodes, rows, rules)
    factor, below, unused = torch.empty((3, places), dtype=torch.float64, device=scale.device)
    total = grad.double()
    total = total.clone() if total is grad else total
    (_, *bounds), given = numbers(*rules)
    with on_device_of(scale):
        for factors in (True, False):
            _passed_kernel[(triton.cdiv(places, LANES),)](
                scale, shift, x, below, nodes, factor, grad_scale, grad_shift, stride, places, *bounds,
                given, GIVEN=given is not None, FACTORS=factors, LANES=LANES, num_warps=WARPS, **OPTIONS,
            )  # fmt: skip
            if factors:
                children_kernel[(count,)](
                    total, unused, factor, nodes, rows, below, below, stride, count, 0.0, 1.0, 1.0, None,
                    GIVEN=False, OP=SUM.value, NORMALIZED=False, HAS_WEIGHTS=True, DISCOUNTED=False, GRADIENT=True,
                    LANES=LANES, num_warps=WARPS, **OPTIONS,
                )  # fmt: skip
    return grad_scale, grad_shift


def _recurrence(scale: Tensor, shift: Tensor, nodes: Tensor, rows: Tensor, rules: Rules) -> tuple[Tensor, Tensor]:
    """(x in the dtype of scale, x in f64); 0 on empty places."""
    places, count = nodes.shape[1], rows.shape[1]
    out = torch.zeros_like(scale)
    x = torch.empty(places, dtype=torch.float64, device=scale.device)
    if count:
        known, given = numbers(*rules)
        with on_device_of(scale):
            _propagate_kernel[(count,)](
                scale, shift, nodes, rows, x, out, nodes.stride(0), count, *known, given, GIVEN=given is not None,
                LANES=LANES, num_warps=WARPS, **OPTIONS,
            )  # fmt: skip
    return out, x
