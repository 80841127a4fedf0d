"""Log-probs and the other per-token statistics of a row of logits: forward, whole or by slices of the vocabulary.

Fused: log-softmax, gather, entropy, mean, log-sum of squares, rank and argmax of a row in one read of its logits,
where torch reads and writes [N, V] several times; their joint gradient is in backward.py. One program per row,
blocks of the row in a fixed order (_shared/softmax.py): a row's bits depend on V and nothing else. The next block's
loads are issued before this block is folded, so that memory never waits for arithmetic.

Bytes, with e = bytes per logit: forward e*V + 44 a row (+ one block of e*4096 for argmax, + V with a keep mask);
kept ids: a 32-byte sector per id; accumulate: e*Vc + 128 a row; finish: 108 a row.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastreward._runtime.layout import FLAG, INDICES, VALUES

from .._shared.launch import (
    OPTIONS,
    contiguous,
    contiguous_rows,
    in_units,
    load_width,
    on_device_of,
    row_stride,
    temperature_arguments,
)
from .._shared.softmax import (
    FLOOR,
    NEG_INF,
    inverse_temperature,
    kept_ids_at,
    kept_logit_at,
    lane_step,
    logit_at,
    merge_lanes,
    scale_of,
    scan_row,
    store_masked_row,
    store_row,
)

# --------------------------------------------------------------------------------------------------------- config
# 8 warps, a block of 4096 columns: 16 or 32 bytes per thread and load group in flight, with the next block's on top,
# 8 to 16 KiB a program. At up to 64 registers four programs or more share an SM: 32 KiB and more in flight, where an
# H100 needs about 18 KiB (3.35 TB/s / 132 SMs * 0.7 us). No run-time tuning: a choice by timing would change the order
# of sums. No size is specialised on: V is passed as a multiple of the load's width, which tells the compiler all it
# needs for 16-byte loads, so that one binary serves all vocabularies, row counts and strides.
WARPS = 8
LANES = 32 * WARPS
BLOCK = 4096
ID_LANES = 128  # kept ids and token ids: gathers, one per thread
ID_MAXNREG = 128  # stated, because ptxas otherwise spills a scalar to get below the next step of occupancy
ROWS = 128  # finish: rows per program

# What no variant is compiled for.
_SIZES = ["N", "K", "vocab_units", "logits_units", "keep_units", "inv_t_stride", "token_ids_stride"]
_ID_SIZES = ["N", "V", "K", "k", "logits_stride", "keep_ids_stride", "inv_t_stride", "token_ids_stride"]
_FOLD_SIZES = ["vocab_units", "vocab_start", "logits_units", "inv_t_stride"]


def _flags(flags: int) -> dict[str, bool]:
    return {
        "ENTROPY": bool(flags & FLAG["entropy"]),
        "SQUARES": bool(flags & FLAG["log_sum_sq_probs"]),
        "MEAN": bool(flags & FLAG["mean_logit"]),
        "ARGMAX": bool(flags & FLAG["argmax"]),
        "RANK": bool(flags & FLAG["rank"]),
    }


def _tile(vec: int) -> dict[str, Any]:
    """A block as [STEPS, LANES, VEC]."""
    return {"STEPS": BLOCK // (LANES * vec), "LANES": LANES, "VEC": vec, "num_warps": WARPS, **OPTIONS}


# --------------------------------------------------------------------------------------------------------- kernel
@triton.jit(do_not_specialize=_SIZES)
def _forward_kernel(
    logits, logits_units,  # [N, V], unit column stride, row stride logits_units * LOGITS_UNIT
    labels,  # i64 [N]
    inv_t, inv_t_stride,  # f64 [N] (stride 0 allowed) or a number
    mask,  # i1 [N]
    keep, keep_units,  # i1 [N, V], row stride keep_units * KEEP_UNIT
    token_ids, token_ids_stride,  # i64 [N, K] (row stride 0 allowed)
    values,  # f32 [8, N], out
    indices,  # i64 [2, N], out
    id_logprobs,  # f32 [N, K], out
    N, vocab_units, K,  # V = vocab_units * VEC
    HAS_INV_T: tl.constexpr, HAS_MASK: tl.constexpr, HAS_KEEP: tl.constexpr, HAS_IDS: tl.constexpr,
    ENTROPY: tl.constexpr, SQUARES: tl.constexpr, MEAN: tl.constexpr, ARGMAX: tl.constexpr, RANK: tl.constexpr,
    STEPS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, ID_LANES: tl.constexpr,
    LOGITS_UNIT: tl.constexpr, KEEP_UNIT: tl.constexpr,
):  # fmt: skip
    """One row: one read of its V logits, K + 1 gathers, 44 + 4 K bytes out. A masked row reads nothing but its mask."""
    row = tl.program_id(0).to(tl.int64)
    V = vocab_units * VEC
    if HAS_MASK:  # noqa: SIM102  (`and` would load from a mask that is not there)
        if tl.load(mask + row) == 0:
            store_masked_row(values, indices, N.to(tl.int64), row)
            if HAS_IDS:
                for j0 in range(0, K, ID_LANES):
                    j = j0 + tl.arange(0, ID_LANES)
                    tl.store(id_logprobs + (row * K + j), 0.0, mask=j < K)
            return
    logits_row = logits + row * logits_units * LOGITS_UNIT
    keep_row = keep
    if HAS_KEEP:
        keep_row = keep + row * keep_units * KEEP_UNIT
    inverse64 = inverse_temperature(inv_t, inv_t_stride, row, HAS_INV_T)
    label_x = kept_logit_at(logits_row, keep_row, tl.load(labels + row), V, HAS_KEEP)
    top, total, weighted, squares, logit_sum, rank, count, argmax = scan_row(
        logits_row, keep_row, V, scale_of(inverse64), label_x,
        ENTROPY, SQUARES, MEAN, ARGMAX, RANK, HAS_KEEP, STEPS, LANES, VEC, "evict_first",
    )  # fmt: skip
    store_row(
        values, indices, N.to(tl.int64), row, True, top, total, weighted, squares, logit_sum, count,
        label_x.to(tl.float64), inverse64, argmax, rank, ENTROPY, SQUARES, MEAN, ARGMAX, RANK,
    )  # fmt: skip
    if HAS_IDS:
        log_total = tl.log(total)
        for j0 in range(0, K, ID_LANES):
            j = j0 + tl.arange(0, ID_LANES)
            ids = tl.load(token_ids + row * token_ids_stride + j, mask=j < K, other=-1)
            x = kept_logit_at(logits_row, keep_row, ids, V, HAS_KEEP)
            logp = (x - top).to(tl.float64) * inverse64 - log_total
            tl.store(id_logprobs + (row * K + j), logp.to(tl.float32), mask=j < K)


@triton.jit(do_not_specialize=_ID_SIZES)
def _forward_ids_kernel(
    logits, logits_stride,  # [N, V], unit column stride; only the kept columns, label and token ids are read
    labels,  # i64 [N]
    inv_t, inv_t_stride,  # f64 [N] (stride 0 allowed) or a number
    mask,  # i1 [N]
    keep_ids, keep_ids_stride,  # i64 [N, k], unique within a row, negative = padding
    token_ids, token_ids_stride,  # i64 [N, K] (row stride 0 allowed)
    values,  # f32 [8, N], out
    indices,  # i64 [2, N], out
    id_logprobs,  # f32 [N, K], out
    N, V, K, k,
    HAS_INV_T: tl.constexpr, HAS_MASK: tl.constexpr, HAS_IDS: tl.constexpr,
    ENTROPY: tl.constexpr, SQUARES: tl.constexpr, MEAN: tl.constexpr, ARGMAX: tl.constexpr, RANK: tl.constexpr,
    ID_LANES: tl.constexpr,
):  # fmt: skip
    """One row of a softmax over k listed columns: k gathers of a 32-byte sector, no pass over V."""
    row = tl.program_id(0).to(tl.int64)
    if HAS_MASK:  # noqa: SIM102  (`and` would load from a mask that is not there)
        if tl.load(mask + row) == 0:
            store_masked_row(values, indices, N.to(tl.int64), row)
            if HAS_IDS:
                for j0 in range(0, K, ID_LANES):
                    j = j0 + tl.arange(0, ID_LANES)
                    tl.store(id_logprobs + (row * K + j), 0.0, mask=j < K)
            return
    logits_row = logits + row * logits_stride
    keep_row = keep_ids + row * keep_ids_stride
    inverse64 = inverse_temperature(inv_t, inv_t_stride, row, HAS_INV_T)
    scale2 = scale_of(inverse64)
    lanes = tl.arange(0, ID_LANES)
    label = tl.load(labels + row)
    found = tl.zeros([ID_LANES], tl.int32)
    for j0 in range(0, k, ID_LANES):
        found |= (kept_ids_at(keep_row, j0 + lanes, k, V) == label).to(tl.int32)
    label_x = logit_at(logits_row, label, V)
    legal = (label >= 0) & (label < V)
    label_x = tl.where(legal & (tl.max(found, axis=0) == 0), NEG_INF, label_x)

    peak = tl.full([ID_LANES], NEG_INF, tl.float32)
    base2 = tl.zeros([ID_LANES], tl.float32)
    total = tl.zeros([ID_LANES], tl.float32)
    weighted = tl.zeros([ID_LANES], tl.float32)
    squares = tl.zeros([ID_LANES], tl.float32)
    logit_sum = tl.zeros([ID_LANES], tl.float32)
    above = tl.zeros([ID_LANES], tl.int32)
    kept = tl.zeros([ID_LANES], tl.int32)
    for j0 in range(0, k, ID_LANES):
        ids = kept_ids_at(keep_row, j0 + lanes, k, V)
        real = ids < V
        x = tl.load(logits_row + ids, mask=real, other=NEG_INF).to(tl.float32)[None, :, None]
        kept += real.to(tl.int32)
        peak, base2, total, weighted, squares, logit_sum, above = lane_step(
            x, real[None, :, None], peak, base2, total, weighted, squares, logit_sum, above,
            scale2, label_x, ENTROPY, SQUARES, MEAN, RANK,
        )  # fmt: skip
    top, total64, weighted64, squares64, sum64, rank = merge_lanes(
        peak, base2, total, weighted, squares, logit_sum, above, scale2
    )
    argmax = V
    if ARGMAX:  # the smallest of the ids that hold the maximum: the list may be in any order
        best = tl.full([ID_LANES], 0, tl.int64) + V
        for j0 in range(0, k, ID_LANES):
            ids = kept_ids_at(keep_row, j0 + lanes, k, V)
            x = tl.load(logits_row + ids, mask=ids < V, other=float("nan")).to(tl.float32)
            best = tl.minimum(best, tl.where(x == top, ids, V))
        argmax = tl.min(best, axis=0)
        argmax = tl.where((argmax < V) & (top != NEG_INF), argmax, 0)
    store_row(
        values, indices, N.to(tl.int64), row, True, top, total64, weighted64, squares64, sum64, tl.sum(kept, axis=0),
        label_x.to(tl.float64), inverse64, argmax, rank, ENTROPY, SQUARES, MEAN, ARGMAX, RANK,
    )  # fmt: skip
    if HAS_IDS:
        log_total = tl.log(total64)
        for j0 in range(0, K, ID_LANES):
            j = j0 + lanes
            ids = tl.load(token_ids + row * token_ids_stride + j, mask=j < K, other=-1)
            member = tl.zeros([ID_LANES], tl.int32)
            for i in range(k):
                member |= (tl.load(keep_row + i) == ids).to(tl.int32)
            x = logit_at(logits_row, ids, V)
            x = tl.where((ids >= 0) & (ids < V) & (member == 0), NEG_INF, x)
            logp = (x - top).to(tl.float64) * inverse64 - log_total
            tl.store(id_logprobs + (row * K + j), logp.to(tl.float32), mask=j < K)


@triton.jit(do_not_specialize=_FOLD_SIZES)
def _accumulate_kernel(
    logits, logits_units,  # [N, Vc], unit column stride, row stride logits_units * LOGITS_UNIT
    labels,  # i64 [N], in the whole vocabulary
    inv_t, inv_t_stride,  # f64 [N] (stride 0 allowed) or a number
    state,  # f64 [N, 8] (fastreward._runtime.layout.STATE), in and out
    label_logits,  # f32 [N]
    vocab_units, vocab_start,  # Vc = vocab_units * VEC
    HAS_INV_T: tl.constexpr, HAS_LABEL_LOGITS: tl.constexpr,
    ENTROPY: tl.constexpr, SQUARES: tl.constexpr, MEAN: tl.constexpr, ARGMAX: tl.constexpr, RANK: tl.constexpr,
    STEPS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, LOGITS_UNIT: tl.constexpr,
):  # fmt: skip
    """One row of a slice of the vocabulary, merged into the row's state: one read of Vc logits, 128 bytes of state."""
    row = tl.program_id(0).to(tl.int64)
    V = vocab_units * VEC
    logits_row = logits + row * logits_units * LOGITS_UNIT
    inverse64 = inverse_temperature(inv_t, inv_t_stride, row, HAS_INV_T)
    local = tl.load(labels + row) - vocab_start
    here_x = logit_at(logits_row, local, V)  # NaN where the label lies in another slice; rank then counts nothing
    threshold = here_x
    if HAS_LABEL_LOGITS:
        threshold = tl.load(label_logits + row)
    top, total, weighted, squares, logit_sum, rank, _, argmax = scan_row(
        logits_row, logits, V, scale_of(inverse64), threshold,
        ENTROPY, SQUARES, MEAN, ARGMAX, RANK, False, STEPS, LANES, VEC, "evict_first",
    )  # fmt: skip
    s = state + row * 8
    old = tl.load(s)
    tile = top.to(tl.float64)
    new = tl.maximum(old, tile)
    base = tl.where(new == NEG_INF, 0.0, new)
    # A side whose maximum is -inf holds nothing: its shift is FLOOR, its sums are 0.
    old_shift = tl.where(old == NEG_INF, FLOOR, tl.maximum((old - base) * inverse64, FLOOR))
    new_shift = tl.where(tile == NEG_INF, FLOOR, tl.maximum((tile - base) * inverse64, FLOOR))
    old_scale = tl.exp(old_shift)
    new_scale = tl.exp(new_shift)
    old_total = tl.load(s + 1)
    tl.store(s, new)
    tl.store(s + 1, old_scale * old_total + new_scale * total)
    if ENTROPY:
        moved = old_scale * (tl.load(s + 2) + old_shift * old_total)
        tl.store(s + 2, moved + new_scale * (weighted + new_shift * total))
    if SQUARES:
        tl.store(s + 3, old_scale * old_scale * tl.load(s + 3) + new_scale * new_scale * squares)
    if MEAN:
        tl.store(s + 4, tl.load(s + 4) + logit_sum)
    if (local >= 0) & (local < V):
        tl.store(s + 5, here_x.to(tl.float64))
    if ARGMAX:  # noqa: SIM102
        if tile > old:
            tl.store(s + 6, (argmax + vocab_start).to(tl.float64))
    if RANK:
        tl.store(s + 7, tl.load(s + 7) + rank)


@triton.jit(do_not_specialize=["N", "inv_t_stride", "vocab_size"])
def _finish_kernel(
    state,  # f64 [N, 8]
    inv_t, inv_t_stride,  # f64 [N] (stride 0 allowed) or a number
    values,  # f32 [8, N], out
    indices,  # i64 [2, N], out
    N, vocab_size,
    HAS_INV_T: tl.constexpr,
    ENTROPY: tl.constexpr, SQUARES: tl.constexpr, MEAN: tl.constexpr, ARGMAX: tl.constexpr, RANK: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS rows per program, 64 bytes of state in and 44 bytes out for each."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    ok = row < N
    if HAS_INV_T:
        inverse = tl.load(inv_t + row * inv_t_stride, mask=ok, other=1.0).to(tl.float64)
    else:
        inverse = tl.full([], inv_t, tl.float64)
    s = state + row * 8
    store_row(
        values, indices, N.to(tl.int64), row, ok,
        tl.load(s, mask=ok, other=0.0), tl.load(s + 1, mask=ok, other=1.0), tl.load(s + 2, mask=ok, other=0.0),
        tl.load(s + 3, mask=ok, other=1.0), tl.load(s + 4, mask=ok, other=0.0), vocab_size,
        tl.load(s + 5, mask=ok, other=0.0), inverse,
        tl.load(s + 6, mask=ok, other=0.0), tl.load(s + 7, mask=ok, other=0.0),
        ENTROPY, SQUARES, MEAN, ARGMAX, RANK,
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------- launch
def forward(
    logits: Tensor,  # [N, V] f32, bf16 or f16, unit column stride
    labels: Tensor,  # [N] i64
    inv_temperature: Tensor | float,  # f64 [N], stride 0 allowed
    mask: Tensor | None,  # [N] bool
    keep_mask: Tensor | None,  # [N, V] bool
    keep_ids: Tensor | None,  # [N, k] i64
    token_ids: Tensor | None,  # [N, K] i64, row stride 0 allowed
    flags: int,  # fastreward._runtime.layout.FLAG
) -> tuple[Tensor, Tensor, Tensor]:
    """(values f32 [8, N], indices i64 [2, N], id_logprobs f32 [N, K])."""
    n, vocab = logits.shape
    count = 0 if token_ids is None else token_ids.shape[1]
    values = torch.empty((len(VALUES), n), dtype=torch.float32, device=logits.device)
    indices = torch.empty((len(INDICES), n), dtype=torch.int64, device=logits.device)
    id_logprobs = torch.empty((n, count), dtype=torch.float32, device=logits.device)
    if n == 0:
        return values, indices, id_logprobs
    inv_t, inv_t_stride, has_inv_t = temperature_arguments(inv_temperature)
    rows = (labels.contiguous(), inv_t, inv_t_stride, contiguous(mask))
    ids = (contiguous_rows(token_ids), row_stride(token_ids))
    flavour = {"HAS_INV_T": has_inv_t, "HAS_MASK": mask is not None, "HAS_IDS": count > 0, "ID_LANES": ID_LANES}
    with on_device_of(logits):
        if keep_ids is not None:
            keep = (contiguous_rows(keep_ids), row_stride(keep_ids))
            _forward_ids_kernel[(n,)](
                logits, logits.stride(0), *rows, *keep, *ids, values, indices, id_logprobs,
                n, vocab, count, keep_ids.shape[1],
                **flavour, **_flags(flags), num_warps=ID_LANES // 32, maxnreg=ID_MAXNREG, **OPTIONS,
            )  # fmt: skip
        else:
            vec = load_width(logits)
            units, unit = in_units(logits.stride(0), vec)
            keep_units, keep_unit = in_units(row_stride(keep_mask), vec)
            _forward_kernel[(n,)](
                logits, units, *rows, keep_mask, keep_units, *ids, values, indices, id_logprobs, n, vocab // vec, count,
                HAS_KEEP=keep_mask is not None, LOGITS_UNIT=unit, KEEP_UNIT=keep_unit,
                **flavour, **_flags(flags), **_tile(vec),
            )  # fmt: skip
    return values, indices, id_logprobs


def accumulate(
    logits: Tensor,  # [N, Vc], unit column stride
    labels: Tensor,  # [N] i64, in the whole vocabulary
    vocab_start: int,
    inv_temperature: Tensor | float,  # f64 [N], stride 0 allowed
    state: Tensor,  # f64 [N, 8], contiguous, in and out
    flags: int,
    label_logits: Tensor | None,  # f32 [N]
) -> None:
    """Merges columns vocab_start .. vocab_start + Vc of every row into `state`."""
    n, columns = logits.shape
    if n == 0 or columns == 0:
        return
    inv_t, inv_t_stride, has_inv_t = temperature_arguments(inv_temperature)
    vec = load_width(logits)
    units, unit = in_units(logits.stride(0), vec)
    with on_device_of(logits):
        _accumulate_kernel[(n,)](
            logits, units, labels.contiguous(), inv_t, inv_t_stride, state, contiguous(label_logits),
            columns // vec, vocab_start,
            HAS_INV_T=has_inv_t, HAS_LABEL_LOGITS=label_logits is not None, LOGITS_UNIT=unit,
            **_flags(flags), **_tile(vec),
        )  # fmt: skip


def finish(
    state: Tensor,  # f64 [N, 8], contiguous
    inv_temperature: Tensor | float,  # f64 [N], stride 0 allowed
    vocab_size: int,
    flags: int,
) -> tuple[Tensor, Tensor]:
    """(values f32 [8, N], indices i64 [2, N]) from the merged state."""
    n = state.shape[0]
    values = torch.empty((len(VALUES), n), dtype=torch.float32, device=state.device)
    indices = torch.empty((len(INDICES), n), dtype=torch.int64, device=state.device)
    if n == 0:
        return values, indices
    inv_t, inv_t_stride, has_inv_t = temperature_arguments(inv_temperature)
    with on_device_of(state):
        _finish_kernel[(triton.cdiv(n, ROWS),)](
            state, inv_t, inv_t_stride, values, indices, n, vocab_size,
            HAS_INV_T=has_inv_t, **_flags(flags), ROWS=ROWS, num_warps=ROWS // 32, **OPTIONS,
        )  # fmt: skip
    return values, indices
