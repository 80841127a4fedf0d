"""Masked whitening: (x - mean) * rsqrt(var + eps) over the valid positions, 0 elsewhere.

Fused: one launch takes count, mean and the sum of squared deviations in one read of x (every tile is centred on its own
mean in registers, tiles and programs are merged pairwise-exactly, never E[x^2] - E[x]^2); its last program to arrive
finishes them on the device; one launch applies them. No host sync. Tiles belong to programs by their number and partial
results are merged in program order: the same call gives the same bits.

Bytes, m = bytes per mask element: statistics 4 + m a position, apply 8 + m; together 12 + 2m.

Raw functions: `forward`; `statistics` and `apply`, between which ranks merge their statistics.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._shared.device import inverse64, lane_columns, sum_all
from ._shared.launch import OPTIONS, arrival_counter, on_device_of

# --------------------------------------------------------------------------------------------------------- config
# 4096 positions a tile, 16 per thread in four 16-byte loads (four positions wide for every dtype, so that x and mask
# meet in the same thread). 1056 programs fill an H100 (132 SMs, 8 of 8 warps each).
BLOCK = 4096
WARPS = 8

PROGRAMS = 1056
MERGE = 1024  # partial results that the last program takes at once


def _tile(vec: int) -> dict[str, Any]:
    """A tile as [STEPS, LANES, VEC]: VEC divides the number of positions, which proves that a load may be that wide."""
    lanes = 32 * WARPS
    return {"STEPS": BLOCK // (lanes * vec), "LANES": lanes, "VEC": vec, "num_warps": WARPS, **OPTIONS}


# --------------------------------------------------------------------------------------------------------- kernel
@triton.jit
def _load_valid(x, mask, at, n, HAS_MASK: tl.constexpr):
    """(x f32, 0 where not valid; valid i1) at positions `at`."""
    valid = at < n
    value = tl.load(x + at, mask=valid, other=0.0).to(tl.float32)
    if HAS_MASK:
        valid = valid & (tl.load(mask + at, mask=valid, other=0) != 0)
    return tl.where(valid, value, 0.0), valid


@triton.jit(do_not_specialize=["units"])
def _statistics_kernel(
    x,  # [n], any float dtype
    mask,  # [n], any dtype, nonzero = valid
    partial,  # f64 [3, PROGRAMS], scratch
    counter,  # i32 [1], zero before and after
    statistics,  # f64 [3], out: count, mean, sum of squared deviations
    affine,  # f64 [3], out: mean, rsqrt(var + eps), what to add back
    units, ddof, eps,  # n = units * VEC
    SHIFT_MEAN: tl.constexpr, HAS_MASK: tl.constexpr, HAS_AFFINE: tl.constexpr,
    STEPS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, MERGE: tl.constexpr,
):  # fmt: skip
    """4 + m bytes a position; 24 bytes a program."""
    BLOCK: tl.constexpr = STEPS * LANES * VEC
    n = units * VEC
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    count = tl.full([], 0.0, tl.float64)
    mean = tl.full([], 0.0, tl.float64)
    m2 = tl.full([], 0.0, tl.float64)
    for tile in range(program, tl.cdiv(n, BLOCK), programs):
        at = tl.cast(tile, tl.int64) * BLOCK + lane_columns(STEPS, LANES, VEC)
        value, valid = _load_valid(x, mask, at, n, HAS_MASK)
        k = sum_all(valid.to(tl.int32)).to(tl.float64)
        if k > 0.0:
            value64 = value.to(tl.float64)
            tile_mean = sum_all(value64) * inverse64(k)
            off = tl.where(valid, value64 - tile_mean, 0.0)
            delta = tile_mean - mean
            share = k * inverse64(count + k)
            m2 += sum_all(off * off) + delta * delta * count * share
            mean += delta * share
            count += k
    tl.store(partial + program, count)
    tl.store(partial + programs + program, mean)
    tl.store(partial + 2 * programs + program, m2)
    tl.debug_barrier()  # every thread's stores come before the release below
    if tl.atomic_add(counter, 1, sem="acq_rel") == programs - 1:
        lanes = tl.arange(0, MERGE)
        total = tl.full([], 0.0, tl.float64)
        weighted = tl.full([], 0.0, tl.float64)
        for p in range(0, programs, MERGE):
            ok = p + lanes < programs
            k = tl.load(partial + p + lanes, mask=ok, other=0.0, cache_modifier=".cg")
            total += tl.sum(k, axis=0)
            weighted += tl.sum(
                k * tl.load(partial + programs + p + lanes, mask=ok, other=0.0, cache_modifier=".cg"), axis=0
            )
        centre = weighted * inverse64(tl.maximum(total, 1.0))
        squares = tl.full([], 0.0, tl.float64)
        for p in range(0, programs, MERGE):
            ok = p + lanes < programs
            k = tl.load(partial + p + lanes, mask=ok, other=0.0, cache_modifier=".cg")
            off = tl.load(partial + programs + p + lanes, mask=ok, other=0.0, cache_modifier=".cg") - centre
            own = tl.load(partial + 2 * programs + p + lanes, mask=ok, other=0.0, cache_modifier=".cg")
            squares += tl.sum(own + k * off * off, axis=0)
        # Equal values have no variance: what inverse64 leaves is below any that distinct f32 values can have.
        squares = tl.where(squares <= 1e-28 * total * centre * centre, 0.0, squares)
        tl.store(statistics, total)
        tl.store(statistics + 1, centre)
        tl.store(statistics + 2, squares)
        if HAS_AFFINE:
            tl.store(affine, centre)
            variance = tl.where(total > ddof, squares / (total - ddof), float("inf")) + eps
            tl.store(affine + 1, tl.where(variance == 0.0, 0.0, 1.0 / tl.sqrt(variance)))  # 0 / 0 is 0
            if SHIFT_MEAN:
                tl.store(affine + 2, 0.0)
            else:
                tl.store(affine + 2, centre)
        tl.store(counter, 0)


@triton.jit(do_not_specialize=["units"])
def _apply_kernel(
    x,  # [n]
    mask,  # [n], any dtype, nonzero = valid
    affine,  # f64 [3]
    out,  # [n], may be x
    units,  # n = units * VEC
    HAS_MASK: tl.constexpr, STEPS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """(x - affine[0]) * affine[1] + affine[2]: 8 + m bytes a position. The mean is subtracted in two f32 parts."""
    n = units * VEC
    at = tl.program_id(0).to(tl.int64) * (STEPS * LANES * VEC) + lane_columns(STEPS, LANES, VEC)
    value, valid = _load_valid(x, mask, at, n, HAS_MASK)
    mean = tl.load(affine)
    high = mean.to(tl.float32)
    low = (mean - high.to(tl.float64)).to(tl.float32)
    white = (value - high - low) * tl.load(affine + 1).to(tl.float32) + tl.load(affine + 2).to(tl.float32)
    tl.store(out + at, tl.where(valid, white, 0.0).to(out.dtype.element_ty), mask=at < n)


# --------------------------------------------------------------------------------------------------------- launch
def forward(
    x: Tensor,  # any shape, contiguous
    mask: Tensor | None,  # like x, any dtype, nonzero = valid
    shift_mean: bool,
    ddof: int,
    eps: float,
    out: Tensor,  # like x; may be x
) -> None:
    """Whitens x into `out`: two launches."""
    affine = torch.empty(3, dtype=torch.float64, device=x.device)
    if x.numel():
        _reduce(x, mask, affine, shift_mean, ddof, eps)
        apply(x, mask, affine, out)


def statistics(x: Tensor, mask: Tensor | None) -> Tensor:
    """(count, mean, sum of squared deviations) of the valid positions, f64 [3]; 0 where none is valid."""
    if not x.numel():
        return torch.zeros(3, dtype=torch.float64, device=x.device)
    return _reduce(x, mask, None, True, 0, 0.0)


def apply(
    x: Tensor,  # any shape, contiguous
    mask: Tensor | None,  # like x, any dtype, nonzero = valid
    affine: Tensor,  # f64 [3]
    out: Tensor,  # like x; may be x
) -> None:
    """(x - affine[0]) * affine[1] + affine[2] on the valid positions, 0 elsewhere."""
    n = x.numel()
    if n:
        vec = math.gcd(n, 4)
        with on_device_of(x):
            _apply_kernel[(triton.cdiv(n, BLOCK),)](
                x, mask, affine, out, n // vec, HAS_MASK=mask is not None, **_tile(vec)
            )


def _reduce(x: Tensor, mask: Tensor | None, affine: Tensor | None, shift_mean: bool, ddof: int, eps: float) -> Tensor:
    """One launch: statistics f64 [3], and `affine` where asked for."""
    n = x.numel()
    vec = math.gcd(n, 4)
    programs = min(triton.cdiv(n, BLOCK), PROGRAMS)
    result = torch.empty(3, dtype=torch.float64, device=x.device)
    partial = torch.empty((3, programs), dtype=torch.float64, device=x.device)
    with on_device_of(x):
        _statistics_kernel[(programs,)](
            x, mask, partial, arrival_counter(x), result, affine, n // vec, float(ddof), float(eps),
            SHIFT_MEAN=shift_mean, HAS_MASK=mask is not None, HAS_AFFINE=affine is not None,
            MERGE=MERGE, **_tile(vec),
        )  # fmt: skip
    return result
