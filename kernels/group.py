"""Group-normalised advantages: every group's statistics and its members' advantages in one launch.

Fused: a grouped mean, a two-pass deviation, the centring variants and the division; written out in torch that is a
dozen launches and a host sync to count the groups. Here groups that lie together are found by arithmetic; groups named
by labels are sorted on the device, and the program that owns a run's first position does the whole run, so that nobody
has to know how many groups there are. All in f64, members in order: the same call gives the same bits.

Bytes: 8 to 12 a reward and 4 an advantage, once from memory and twice more from L1; at a few thousand rewards the
launch is the cost. Labels add a torch.sort; several components a combining pass; batch-std one program over the batch.

Statistics alone are the same sweeps, written out for every member. Raw functions: `forward`, `statistics`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastreward._arguments.options import CENTERS, SCALES, GroupOptions
from fastreward._runtime.layout import GROUP_STATISTICS

from ._shared.launch import OPTIONS, on_device_of

# --------------------------------------------------------------------------------------------------------- config
# A program owns RUNS possible groups and reads MEMBERS of each at a time. Groups of one size get tiles of about that
# size. Under labels any position may begin a group, of any size.
WARPS = 4
LABELLED = (4, 128)
MAXNREG = 168  # stated, because ptxas otherwise spills a scalar or two to get below the next step of occupancy
ROWS = 512  # combine: rows per program
BATCH = 2048  # batch-std: rows at a time

_NONE, _MEAN, _LOO, _WEIGHTED, _SECOND, _TENSOR = (tl.constexpr(i) for i in range(len(CENTERS)))
_NO_SCALE, _STD, _BATCH_STD, _MAX, _SCALE_TENSOR = (tl.constexpr(i) for i in range(len(SCALES)))


def _tile(group_size: int) -> tuple[int, int]:
    """(runs per program, members at a time)."""
    if not group_size:
        return LABELLED
    return (32, 16) if group_size <= 16 else (8, 64) if group_size <= 64 else (1, 512)


# --------------------------------------------------------------------------------------------------------- kernel
@triton.jit(do_not_specialize=["B", "K", "row_stride", "column_stride"])
def _combine_kernel(
    rewards, row_stride, column_stride,  # f32 or f64 [B, K], NaN = not scored
    weights,  # f32 [K]
    out,  # f64 [B]
    B, K,
    HAS_WEIGHTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Weighted sum of a row's scored components, NaN where none is: 4 K or 8 K bytes in, 8 out."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    ok = row < B
    total = tl.zeros([ROWS], tl.float64)
    scored = tl.zeros([ROWS], tl.int32)
    for k in range(K):
        r = tl.load(rewards + row * row_stride + k * column_stride, mask=ok, other=0.0).to(tl.float64)
        if HAS_WEIGHTS:
            total += tl.where(r == r, r * tl.load(weights + k).to(tl.float64), 0.0)
        else:
            total += tl.where(r == r, r, 0.0)
        scored += (r == r).to(tl.int32)
    tl.store(out + row, tl.where(scored > 0, total, float("nan")), mask=ok)


@triton.jit
def _known(eps, EPS_ON_DEVICE: tl.constexpr):
    """A number that the host knows, or has on the device, f64 []."""
    if EPS_ON_DEVICE:
        eps = tl.load(eps)
    return eps


@triton.jit
def _deviation(squares, n, ddof, eps, EPS_INSIDE: tl.constexpr):
    """The std that divides, from a sum of squared deviations of n values: f64; infinite without degrees of freedom."""
    variance = tl.where(n > ddof, squares / (n - ddof), float("inf"))
    return tl.sqrt(variance + eps) if EPS_INSIDE else tl.sqrt(variance) + eps


@triton.jit(do_not_specialize=["B", "row_stride", "column_stride"])
def _batch_scale_kernel(
    x, row_stride, column_stride,  # f32 or f64 [B, K]
    scale,  # f64 [K], out
    B, ddof, eps,
    EPS_ON_DEVICE: tl.constexpr, EPS_INSIDE: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    """The std of every scored reward of a component, one program each: two passes, 4 B or 8 B bytes each."""
    k = tl.program_id(0)
    lanes = tl.arange(0, BATCH)
    column = x + k * column_stride
    total = tl.zeros([BATCH], tl.float64)
    count = tl.zeros([BATCH], tl.int32)
    for b in range(0, B, BATCH):
        row = tl.cast(b, tl.int64) + lanes
        r = tl.load(column + row * row_stride, mask=row < B, other=float("nan")).to(tl.float64)
        total += tl.where(r == r, r, 0.0)
        count += (r == r).to(tl.int32)
    n = tl.sum(count, axis=0).to(tl.float64)
    mean = tl.sum(total, axis=0) / n
    squares = tl.zeros([BATCH], tl.float64)
    for b in range(0, B, BATCH):
        row = tl.cast(b, tl.int64) + lanes
        r = tl.load(column + row * row_stride, mask=row < B, other=float("nan")).to(tl.float64)
        squares += tl.where(r == r, (r - mean) * (r - mean), 0.0)
    tl.store(scale + k, _deviation(tl.sum(squares, axis=0), n, ddof, _known(eps, EPS_ON_DEVICE), EPS_INSIDE))


@triton.jit
def _runs(labels, run, B, group_size, halvings, LABELLED: tl.constexpr):
    """(first position, length) of the groups that begin at or are numbered `run`; length 0 where none does."""
    if LABELLED:
        ok = run < B
        mine = tl.load(labels + run, mask=ok, other=0)
        before = tl.load(labels + run - 1, mask=ok & (run > 0), other=0)
        begins = ok & ((run == 0) | (mine != before))
        first = run
        inside = run  # the last position known to carry the label, and the first known not to
        beyond = tl.zeros_like(run) + B
        for _ in range(tl.where(tl.max(begins.to(tl.int32), axis=0) > 0, halvings, 0)):
            middle = (inside + beyond) // 2
            same = tl.load(labels + middle, mask=begins & (middle < B), other=0) == mine
            inside = tl.where(same & (middle < beyond), middle, inside)
            beyond = tl.where(same, beyond, middle)
            beyond = tl.maximum(beyond, inside + 1)
        length = tl.where(begins, beyond - first, 0)
    else:
        first = run * group_size
        length = tl.maximum(tl.minimum(B - first, group_size), 0)
    return first, length


@triton.jit
def _members(order, first, length, j, LABELLED: tl.constexpr):
    """(rows of the batch, which exist) of the members j of each run: [RUNS, MEMBERS]."""
    inside = j < length[:, None]
    at = first[:, None] + j
    if LABELLED:
        at = tl.load(order + at, mask=inside, other=0)
    return at, inside


@triton.jit
def _origin(r):
    """Some scored reward of each run, 0 where these members have none: f64 [RUNS]. Sums are taken relative to it."""
    highest = tl.max(tl.where(r == r, r, float("-inf")), axis=1)
    return tl.where(highest > float("-inf"), highest, 0.0)


@triton.jit
def _sums(
    column, row_stride,  # f32 or f64 [B], NaN = not scored
    order,  # i64 [B]
    lengths,  # f32 [B]
    first, length, longest,  # the runs
    LABELLED: tl.constexpr, WEIGHTED: tl.constexpr, TOP: tl.constexpr, RUNS: tl.constexpr, MEMBERS: tl.constexpr,
):  # fmt: skip
    """Statistics of each run's scored rewards, [RUNS]: (count, origin, sum, mean by length, largest, next, ties).

    sum and mean by length are relative to origin, the latter NaN without any length; next is below the largest, which
    `ties` rewards have.
    """
    lanes = tl.arange(0, MEMBERS)[None, :]
    n = tl.zeros([RUNS], tl.float64)
    total = tl.zeros([RUNS], tl.float64)
    weighted = tl.zeros([RUNS], tl.float64)
    weight_sum = tl.zeros([RUNS], tl.float64)
    top = tl.full([RUNS], float("-inf"), tl.float64)
    second = tl.full([RUNS], float("-inf"), tl.float64)
    ties = tl.zeros([RUNS], tl.int32)
    at, inside = _members(order, first, length, lanes, LABELLED)
    origin = _origin(tl.load(column + at * row_stride, mask=inside, other=float("nan")).to(tl.float64))
    for j in range(0, longest, MEMBERS):
        at, inside = _members(order, first, length, j + lanes, LABELLED)
        r = tl.load(column + at * row_stride, mask=inside, other=float("nan")).to(tl.float64)
        scored = r == r
        n += tl.sum(scored.to(tl.int32), axis=1).to(tl.float64)
        shifted = tl.where(scored, r - origin[:, None], 0.0)
        total += tl.sum(shifted, axis=1)
        if WEIGHTED:
            w = tl.load(lengths + at, mask=scored, other=0.0).to(tl.float64)
            weighted += tl.sum(w * shifted, axis=1)
            weight_sum += tl.sum(w, axis=1)
        if TOP:
            high = tl.max(tl.where(scored, r, float("-inf")), axis=1)
            here = tl.sum((scored & (r == high[:, None])).to(tl.int32), axis=1)
            below = tl.max(tl.where(scored & (r < high[:, None]), r, float("-inf")), axis=1)
            second = tl.where(high > top, tl.maximum(top, below), tl.maximum(second, tl.where(high < top, high, below)))
            ties = tl.where(high > top, here, tl.where(high == top, ties + here, ties))
            top = tl.maximum(top, high)
    if WEIGHTED:
        weighted = tl.where(weight_sum > 0.0, weighted / weight_sum, float("nan"))
    return n, origin, total, weighted, top, second, ties


@triton.jit
def _centred(r, at, scored, center_values, n, origin, total, weighted, top, ties, second, CENTER: tl.constexpr):
    """Rewards less their center: f64 [RUNS, MEMBERS], from the statistics [RUNS] of each group.

    total and weighted are relative to origin: equal rewards are exactly their mean, whatever their rounding.
    """
    if CENTER == _MEAN:
        d = (r - origin[:, None]) - (total / n)[:, None]
    elif CENTER == _LOO:
        shifted = r - origin[:, None]
        d = shifted - (total[:, None] - shifted) * (1.0 / (n - 1.0))[:, None]
    elif CENTER == _WEIGHTED:  # NaN: no tokens, no baseline
        d = tl.where((weighted == weighted)[:, None], (r - origin[:, None]) - weighted[:, None], 0.0)
    elif CENTER == _SECOND:
        d = r - tl.where((r == top[:, None]) & (ties[:, None] == 1), second[:, None], top[:, None])
    elif CENTER == _TENSOR:
        d = r - tl.load(center_values + at, mask=scored, other=0.0).to(tl.float64)
    else:
        d = r
    return d


@triton.jit(do_not_specialize=["B", "K", "group_size", "halvings", "row_stride", "column_stride"])
def _normalize_kernel(
    x, row_stride, column_stride,  # f32 or f64 [B, K], NaN = not scored
    labels, order,  # i64 [B]: sorted labels, and where each stood before; unused without LABELLED
    lengths, center_values, scale_values,  # f32 [B]
    weights,  # f32 [K]
    batch_scale,  # f64 [K]
    out,  # f32 [B], or f64 [B] where K > 1 components are added up
    B, K, group_size, halvings, ddof, eps,  # 2^halvings > B
    LABELLED: tl.constexpr, HAS_WEIGHTS: tl.constexpr, CENTER: tl.constexpr, SCALE: tl.constexpr,
    EPS_ON_DEVICE: tl.constexpr, EPS_INSIDE: tl.constexpr, SINGLETON: tl.constexpr,
    RUNS: tl.constexpr, MEMBERS: tl.constexpr,
):  # fmt: skip
    """RUNS groups, three sweeps over their members for each component: sums, deviations, advantages."""
    run = tl.program_id(0).to(tl.int64) * RUNS + tl.arange(0, RUNS)
    first, length = _runs(labels, run, B, group_size, halvings, LABELLED)
    longest = tl.max(length, axis=0)
    lanes = tl.arange(0, MEMBERS)[None, :]
    for k in range(K):
        column = x + k * column_stride
        n, origin, total, weighted, top, second, ties = _sums(
            column, row_stride, order, lengths, first, length, longest,
            LABELLED=LABELLED, WEIGHTED=CENTER == _WEIGHTED, TOP=CENTER == _SECOND, RUNS=RUNS, MEMBERS=MEMBERS,
        )  # fmt: skip
        squares = tl.zeros([RUNS], tl.float64)
        widest = tl.zeros([RUNS], tl.float64)
        if (SCALE == _STD) or (SCALE == _MAX):  # noqa: SIM109  (constexpr has no `in`)
            mean = total / n
            for j in range(0, longest, MEMBERS):
                at, inside = _members(order, first, length, j + lanes, LABELLED)
                r = tl.load(column + at * row_stride, mask=inside, other=float("nan")).to(tl.float64)
                scored = r == r
                if SCALE == _STD:
                    d = (r - origin[:, None]) - mean[:, None]
                    squares += tl.sum(tl.where(scored, d * d, 0.0), axis=1)
                else:
                    d = _centred(
                        r, at, scored, center_values, n, origin, total, weighted, top, ties, second, CENTER
                    )  # fmt: skip
                    widest = tl.maximum(widest, tl.max(tl.where(scored, tl.abs(d), 0.0), axis=1))
        if SCALE == _STD:
            scale = _deviation(squares, n, ddof, _known(eps, EPS_ON_DEVICE), EPS_INSIDE)
        elif SCALE == _MAX:
            scale = widest + _known(eps, EPS_ON_DEVICE)
        elif SCALE == _BATCH_STD:
            scale = tl.zeros([RUNS], tl.float64) + tl.load(batch_scale + k)
        else:
            scale = tl.full([RUNS], 1.0, tl.float64)
        inverse = 1.0 / scale
        for j in range(0, longest, MEMBERS):
            at, inside = _members(order, first, length, j + lanes, LABELLED)
            r = tl.load(column + at * row_stride, mask=inside, other=float("nan")).to(tl.float64)
            scored = r == r
            d = _centred(r, at, scored, center_values, n, origin, total, weighted, top, ties, second, CENTER)
            if SCALE == _SCALE_TENSOR:
                y = d / tl.load(scale_values + at, mask=scored, other=1.0).to(tl.float64)
            else:
                y = d * inverse[:, None]
            y = tl.where(d == 0.0, 0.0, y)  # 0 / 0 is 0
            alone = n[:, None] == 1.0  # and of one there is no statistic; without a rule none is used
            if SINGLETON == 0:
                y = tl.where(alone, 0.0, y)
            elif SINGLETON == 1:
                y = tl.where(alone, r, y)
            elif SINGLETON == 2:
                y = tl.where(alone, float("nan"), y)
            if HAS_WEIGHTS:
                y *= tl.load(weights + k).to(tl.float64)
            y = tl.where(scored, y, 0.0)
            if k > 0:
                y += tl.load(out + at, mask=inside, other=0.0).to(tl.float64)
            tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)
        tl.debug_barrier()  # the next component adds to what was stored here


@triton.jit(do_not_specialize=["B", "group_size", "halvings", "stride"])
def _group_statistics_kernel(
    x, stride,  # f32 or f64 [B], NaN = not there
    labels, order,  # i64 [B]: sorted labels, and where each stood before; unused without LABELLED
    weights,  # f32 [B]
    out,  # f64 [8, B]: layout.GROUP_STATISTICS
    B, group_size, halvings,  # 2^halvings > B
    LABELLED: tl.constexpr, HAS_WEIGHTS: tl.constexpr, EXPONENTIALS: tl.constexpr,
    RUNS: tl.constexpr, MEMBERS: tl.constexpr,
):  # fmt: skip
    """RUNS groups, three sweeps over their members: sums, deviations and exponentials, the results: 64 B bytes out."""
    run = tl.program_id(0).to(tl.int64) * RUNS + tl.arange(0, RUNS)
    first, length = _runs(labels, run, B, group_size, halvings, LABELLED)
    longest = tl.max(length, axis=0)
    lanes = tl.arange(0, MEMBERS)[None, :]
    n, origin, total, weighted, top, below, ties = _sums(
        x, stride, order, weights, first, length, longest,
        LABELLED=LABELLED, WEIGHTED=HAS_WEIGHTS, TOP=True, RUNS=RUNS, MEMBERS=MEMBERS,
    )  # fmt: skip
    second = tl.where(ties > 1, top, below)
    mean = total / n
    squares = tl.zeros([RUNS], tl.float64)
    lowest = tl.full([RUNS], float("inf"), tl.float64)
    rest = tl.maximum(ties - 1, 0).to(tl.float64)  # the other largest, each exp(0)
    for j in range(0, longest, MEMBERS):
        at, inside = _members(order, first, length, j + lanes, LABELLED)
        r = tl.load(x + at * stride, mask=inside, other=float("nan")).to(tl.float64)
        scored = r == r
        d = (r - origin[:, None]) - mean[:, None]
        squares += tl.sum(tl.where(scored, d * d, 0.0), axis=1)
        lowest = tl.minimum(lowest, tl.min(tl.where(scored, r, float("inf")), axis=1))
        if EXPONENTIALS:
            rest += tl.sum(tl.where(scored & (r < top[:, None]), tl.exp(r - second[:, None]), 0.0), axis=1)
    if not HAS_WEIGHTS:
        weighted = tl.full([RUNS], float("nan"), tl.float64)
    if EXPONENTIALS:
        rest = second + tl.log(rest)
    for j in range(0, longest, MEMBERS):
        at, inside = _members(order, first, length, j + lanes, LABELLED)
        to = out + at
        step = tl.cast(B, tl.int64)
        tl.store(to, tl.broadcast_to(n[:, None], [RUNS, MEMBERS]), mask=inside)
        tl.store(to + step, tl.broadcast_to((origin + mean)[:, None], [RUNS, MEMBERS]), mask=inside)
        tl.store(to + 2 * step, tl.broadcast_to(squares[:, None], [RUNS, MEMBERS]), mask=inside)
        tl.store(to + 3 * step, tl.broadcast_to((origin + weighted)[:, None], [RUNS, MEMBERS]), mask=inside)
        tl.store(to + 4 * step, tl.broadcast_to(top[:, None], [RUNS, MEMBERS]), mask=inside)
        tl.store(to + 5 * step, tl.broadcast_to(second[:, None], [RUNS, MEMBERS]), mask=inside)
        tl.store(to + 6 * step, tl.broadcast_to(lowest[:, None], [RUNS, MEMBERS]), mask=inside)
        tl.store(to + 7 * step, tl.broadcast_to(rest[:, None], [RUNS, MEMBERS]), mask=inside)


# --------------------------------------------------------------------------------------------------------- launch
def forward(
    rewards: Tensor,  # f32 or f64 [B, K], NaN = not scored
    group_index: Tensor | None,  # i64 [B], any labels
    group_size: int,  # > 0: groups of so many neighbours
    lengths: Tensor | None,  # f32 [B]
    component_weights: Tensor | None,  # f32 [K]
    center_values: Tensor | None,  # f32 [B]
    scale_values: Tensor | None,  # f32 [B]
    options: GroupOptions,
) -> Tensor:
    """Advantages f32 [B]."""
    rows, components = rewards.shape
    if rows == 0 or components == 0:
        return torch.zeros(rows, dtype=torch.float32, device=rewards.device)
    with on_device_of(rewards):
        if options.normalize == "sum-then-normalize" and (components > 1 or component_weights is not None):
            rewards, component_weights = _combined(rewards, component_weights), None
            components = 1
        labels = order = None
        if group_index is not None:
            labels, order = torch.sort(group_index, stable=True)
        out = torch.empty(rows, dtype=torch.float32 if components == 1 else torch.float64, device=rewards.device)
        runs, members = _tile(0 if group_index is not None else group_size)
        count = rows if group_index is not None else triton.cdiv(rows, group_size)
        on_device = isinstance(options.eps, Tensor)
        eps = options.eps if on_device else float(options.eps)
        inside = {"EPS_INSIDE": options.eps_inside, "EPS_ON_DEVICE": on_device}
        center, scale, singleton = options.numbers(center_values, scale_values)
        rules: dict[str, Any] = {
            "CENTER": center,
            "SCALE": scale,
            **inside,
            "SINGLETON": singleton,
        }
        strides = (rewards.stride(0), rewards.stride(1))
        batch_scale = None
        if scale_values is None and options.scale == "batch-std":
            batch_scale = torch.empty(components, dtype=torch.float64, device=rewards.device)
            _batch_scale_kernel[(components,)](
                rewards, *strides, batch_scale, rows, float(options.ddof), eps,
                **inside, BATCH=BATCH, num_warps=WARPS, **OPTIONS,
            )  # fmt: skip
        _normalize_kernel[(triton.cdiv(count, runs),)](
            rewards, *strides, labels, order, lengths, center_values, scale_values, component_weights, batch_scale,
            out, rows, components, group_size, rows.bit_length() + 1, float(options.ddof), eps,
            LABELLED=group_index is not None, HAS_WEIGHTS=component_weights is not None, **rules,
            RUNS=runs, MEMBERS=members, num_warps=WARPS, maxnreg=MAXNREG, **OPTIONS,
        )  # fmt: skip
    return out.float()


def _combined(rewards: Tensor, weights: Tensor | None) -> Tensor:
    """f64 [B, 1]: the weighted sum of each row's scored components."""
    rows, components = rewards.shape
    out = torch.empty((rows, 1), dtype=torch.float64, device=rewards.device)
    _combine_kernel[(triton.cdiv(rows, ROWS),)](
        rewards, rewards.stride(0), rewards.stride(1), weights, out, rows, components,
        HAS_WEIGHTS=weights is not None, ROWS=ROWS, num_warps=WARPS, **OPTIONS,
    )  # fmt: skip
    return out


def statistics(
    x: Tensor,  # f32 or f64 [N], NaN = not there
    group_index: Tensor | None,  # i64 [N], any labels
    group_size: int,  # > 0: groups of so many neighbours
    weights: Tensor | None,  # f32 [N]
    exponentials: bool,
) -> Tensor:
    """f64 [8, N]: layout.GROUP_STATISTICS of each entry's group."""
    rows = x.shape[0]
    out = torch.empty((len(GROUP_STATISTICS), rows), dtype=torch.float64, device=x.device)
    if rows == 0:
        return out
    with on_device_of(x):
        labels = order = None
        if group_index is not None:
            labels, order = torch.sort(group_index, stable=True)
        runs, members = _tile(0 if group_index is not None else group_size)
        count = rows if group_index is not None else triton.cdiv(rows, group_size)
        _group_statistics_kernel[(triton.cdiv(count, runs),)](
            x, x.stride(0), labels, order, weights, out, rows, group_size, rows.bit_length() + 1,
            LABELLED=group_index is not None, HAS_WEIGHTS=weights is not None, EXPONENTIALS=exponentials,
            RUNS=runs, MEMBERS=members, num_warps=WARPS, maxnreg=MAXNREG, **OPTIONS,
        )  # fmt: skip
    return out
