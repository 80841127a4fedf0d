"""The backward of `logprobs`: the joint gradient of log-prob, entropy, logsumexp, log-sum of squares, id log-probs.

Fused: with p_j recomputed from the logit and the row's maximum, the gradient of all five outputs is
    dz_j = p_j (c0 + c1 log p_j + c2 p_j) + upstream gradients at the label and at token_ids,
so a row is read once and written once, in place if asked, where autograd would combine several [N, V] tensors.
Bytes: 2 * (bytes per logit) * V a row (+ V with a keep mask); a masked row is only written. Gathers of K ids on top.
Kept ids: k gathered sectors, V gradients written.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .._shared.device import LOG2E
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
from .._shared.softmax import FLOOR, NEG_INF, gradient_scale, inverse_temperature, kept_ids_at, kept_logit_at

# --------------------------------------------------------------------------------------------------------- config
# As in the forward: 8 warps, 16-byte loads and stores, the next block's loads ahead of this block's arithmetic. The
# arithmetic (one ex2 and about ten other instructions a column) is half of what the bandwidth leaves room for.
WARPS = 8
BLOCK = 4096

# What no variant is compiled for.
_SIZES = ["N", "K", "vocab_units", "logits_units", "keep_units", "grad_units"]
_SIZES += ["inv_t_stride", "token_ids_stride", "grad_ids_stride"]
_ID_SIZES = ["N", "K", "k", "vocab_units", "logits_stride", "grad_units"]
_ID_SIZES += ["inv_t_stride", "token_ids_stride", "grad_ids_stride", "keep_ids_stride"]


# --------------------------------------------------------------------------------------------------------- kernel
@triton.jit
def _coefficients(values, grad_values, grad_ids_row, N, K, row, HAS_IDS: tl.constexpr, IDS: tl.constexpr):
    """(c0, c1, c2, upstream gradient at the label, largest logit, its log-prob) of a row: f32 scalars."""
    g_logprob = tl.load(grad_values + row)
    g_entropy = tl.load(grad_values + (N + row))
    g_lse = tl.load(grad_values + (2 * N + row))
    g_lss = tl.load(grad_values + (5 * N + row))
    c0 = g_lse - g_logprob - g_entropy * tl.load(values + (N + row)) - 2.0 * g_lss
    if HAS_IDS:
        j = tl.arange(0, IDS)
        c0 -= tl.sum(tl.load(grad_ids_row + j, mask=j < K, other=0.0), axis=0)
    c2 = tl.where(g_lss != 0.0, 2.0 * g_lss * tl.exp(-tl.load(values + (5 * N + row))), 0.0)
    return c0, -g_entropy, c2, g_logprob, tl.load(values + (7 * N + row)), tl.load(values + (6 * N + row))


@triton.jit
def through_softmax(x, inverse, top, top_logp, c0, c1, c2):
    """p (c0 + c1 log p + c2 p); exactly 0 where x = -inf."""
    logp = tl.fma(x - top, inverse, top_logp)
    p = tl.exp2(logp * LOG2E)
    return p * tl.fma(c2, p, tl.fma(c1, tl.maximum(logp, FLOOR), c0))


@triton.jit
def _to_logit(dz, x, inverse, inv_softcap, HAS_SOFTCAP: tl.constexpr):
    """From the gradient of the tempered (and soft-capped) logit to that of the raw one."""
    dx = dz * inverse
    if HAS_SOFTCAP:
        capped = x * inv_softcap
        dx = dx * (1.0 - capped * capped)
    return dx


@triton.jit
def _upstream_at(ids, token_ids_row, grad_ids_row, K):
    """Sum of the id gradients that name each of `ids`: [len(ids)] f32. Every K-th id is a scalar load from L1."""
    total = tl.zeros(ids.shape, tl.float32)
    for j in range(K):
        total += tl.where(ids == tl.load(token_ids_row + j), tl.load(grad_ids_row + j), 0.0)
    return total


@triton.jit
def _zero_row(grad_row, V, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    zeros = tl.zeros([BLOCK], grad_row.dtype.element_ty)
    for start in range(0, V, BLOCK):
        tl.store(grad_row + (start + columns), zeros, mask=start + columns < V)


@triton.jit(do_not_specialize=_SIZES)
def _backward_kernel(
    logits, logits_units,  # [N, V], unit column stride, row stride logits_units * LOGITS_UNIT
    labels,  # i64 [N]
    inv_t, inv_t_stride,  # f64 [N] (stride 0 allowed) or a number
    mask,  # i1 [N]
    keep, keep_units,  # i1 [N, V], row stride keep_units * KEEP_UNIT
    token_ids, token_ids_stride,  # i64 [N, K] (row stride 0 allowed)
    values,  # f32 [8, N]
    grad_values,  # f32 [8, N]
    grad_ids, grad_ids_stride,  # f32 [N, K]
    grad_logits, grad_units,  # [N, V], out; may be logits; row stride grad_units * GRAD_UNIT
    inv_softcap,
    N, vocab_units, K,  # V = vocab_units * VEC
    HAS_INV_T: tl.constexpr, HAS_MASK: tl.constexpr, HAS_KEEP: tl.constexpr, HAS_IDS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, IDS: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr,
    LOGITS_UNIT: tl.constexpr, KEEP_UNIT: tl.constexpr, GRAD_UNIT: tl.constexpr,
):  # fmt: skip
    """One row: V logits read, V gradients written. IDS: power of two >= K."""
    row = tl.program_id(0).to(tl.int64)
    V = vocab_units * VEC
    logits_row = logits + row * logits_units * LOGITS_UNIT
    grad_row = grad_logits + row * grad_units * GRAD_UNIT
    if HAS_MASK:  # noqa: SIM102  (`and` would load from a mask that is not there)
        if tl.load(mask + row) == 0:
            _zero_row(grad_row, V, BLOCK)
            return
    keep_row = keep
    if HAS_KEEP:
        keep_row = keep + row * keep_units * KEEP_UNIT
    token_ids_row = token_ids
    grad_ids_row = grad_ids
    if HAS_IDS:
        token_ids_row = token_ids + row * token_ids_stride
        grad_ids_row = grad_ids + row * grad_ids_stride
    inverse = gradient_scale(inverse_temperature(inv_t, inv_t_stride, row, HAS_INV_T))
    c0, c1, c2, g_label, top, top_logp = _coefficients(
        values, grad_values, grad_ids_row, N.to(tl.int64), K, row, HAS_IDS, IDS
    )
    label = tl.load(labels + row)
    label = tl.where((label >= 0) & (label < V), label, -1).to(tl.int32)
    if HAS_IDS:
        # The final gradients at the ids, from their logits before anything is overwritten. They are stored over what
        # the sweep below has written there; an id that occurs twice has the same sum, hence the same bits, twice.
        j = tl.arange(0, IDS)
        ids = tl.load(token_ids_row + j, mask=j < K, other=-1)
        ids_x = kept_logit_at(logits_row, keep_row, ids, V, HAS_KEEP)
        ids_dz = _upstream_at(ids, token_ids_row, grad_ids_row, K) + tl.where(ids == label, g_label, 0.0)
        ids_dz += through_softmax(ids_x, inverse, top, top_logp, c0, c1, c2)
        ids_dx = _to_logit(ids_dz, ids_x, inverse, inv_softcap, HAS_SOFTCAP)
        ids_ok = (ids >= 0) & (ids < V)
        if HAS_KEEP:
            ids_ok &= tl.load(keep_row + tl.where(ids_ok, ids, 0), mask=ids_ok, other=0) != 0
        tl.debug_barrier()
    columns = tl.arange(0, BLOCK)
    ahead = tl.load(logits_row + columns, mask=columns < V, other=NEG_INF, eviction_policy="evict_first")
    for start in range(0, V, BLOCK):
        here = start + columns
        x = ahead.to(tl.float32)
        ahead = tl.load(
            logits_row + (here + BLOCK), mask=here < V - BLOCK, other=NEG_INF, eviction_policy="evict_first"
        )
        if HAS_KEEP:
            kept = tl.load(keep_row + here, mask=here < V, other=0) != 0
            x = tl.where(kept, x, NEG_INF)
        dz = through_softmax(x, inverse, top, top_logp, c0, c1, c2) + tl.where(here == label, g_label, 0.0)
        dx = _to_logit(dz, x, inverse, inv_softcap, HAS_SOFTCAP)
        if HAS_KEEP:
            dx = tl.where(kept, dx, 0.0)
        tl.store(grad_row + here, dx.to(grad_row.dtype.element_ty), mask=here < V)
    if HAS_IDS:
        tl.debug_barrier()
        tl.store(grad_row + ids, ids_dx.to(grad_row.dtype.element_ty), mask=ids_ok)


@triton.jit(do_not_specialize=_ID_SIZES)
def _backward_ids_kernel(
    logits, logits_stride,  # [N, V], unit column stride; only the kept columns are read
    labels,  # i64 [N]
    inv_t, inv_t_stride,  # f64 [N] (stride 0 allowed) or a number
    mask,  # i1 [N]
    keep_ids, keep_ids_stride,  # i64 [N, k], unique within a row, negative = padding
    token_ids, token_ids_stride,  # i64 [N, K] (row stride 0 allowed)
    values,  # f32 [8, N]
    grad_values,  # f32 [8, N]
    grad_ids, grad_ids_stride,  # f32 [N, K]
    grad_logits, grad_units,  # [N, V], out; may be logits; row stride grad_units * GRAD_UNIT
    inv_softcap,
    N, vocab_units, K, k,  # V = vocab_units * VEC
    HAS_INV_T: tl.constexpr, HAS_MASK: tl.constexpr, HAS_IDS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    KEPT: tl.constexpr, IDS: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr, GRAD_UNIT: tl.constexpr,
):  # fmt: skip
    """One row: k logits gathered, V zeros and k gradients written. KEPT, IDS: powers of two >= k, K."""
    row = tl.program_id(0).to(tl.int64)
    V = vocab_units * VEC
    grad_row = grad_logits + row * grad_units * GRAD_UNIT
    if HAS_MASK:  # noqa: SIM102  (`and` would load from a mask that is not there)
        if tl.load(mask + row) == 0:
            _zero_row(grad_row, V, BLOCK)
            return
    token_ids_row = token_ids
    grad_ids_row = grad_ids
    if HAS_IDS:
        token_ids_row = token_ids + row * token_ids_stride
        grad_ids_row = grad_ids + row * grad_ids_stride
    inverse = gradient_scale(inverse_temperature(inv_t, inv_t_stride, row, HAS_INV_T))
    c0, c1, c2, g_label, top, top_logp = _coefficients(
        values, grad_values, grad_ids_row, N.to(tl.int64), K, row, HAS_IDS, IDS
    )
    kept = kept_ids_at(keep_ids + row * keep_ids_stride, tl.arange(0, KEPT), k, V)
    ok = kept < V
    x = tl.load(logits + row * logits_stride + kept, mask=ok, other=NEG_INF).to(tl.float32)
    dz = through_softmax(x, inverse, top, top_logp, c0, c1, c2) + tl.where(kept == tl.load(labels + row), g_label, 0.0)
    if HAS_IDS:
        dz += _upstream_at(kept, token_ids_row, grad_ids_row, K)
    dx = _to_logit(dz, x, inverse, inv_softcap, HAS_SOFTCAP)
    tl.debug_barrier()  # all kept logits are read before a zero lands on them
    _zero_row(grad_row, V, BLOCK)
    tl.debug_barrier()
    tl.store(grad_row + kept, dx.to(grad_row.dtype.element_ty), mask=ok)


# --------------------------------------------------------------------------------------------------------- launch
def backward(
    logits: Tensor,  # [N, V] f32, bf16 or f16, unit column stride
    labels: Tensor,  # [N] i64; outside [0, V) = no term for the label
    inv_temperature: Tensor | float,  # f64 [N], stride 0 allowed
    mask: Tensor | None,  # [N] bool
    keep_mask: Tensor | None,  # [N, V] bool
    keep_ids: Tensor | None,  # [N, k] i64
    token_ids: Tensor | None,  # [N, K] i64, row stride 0 allowed
    values: Tensor,  # [8, N] f32, contiguous
    id_logprobs: Tensor,  # [N, K] f32; not needed here
    grad_values: Tensor,  # [8, N] f32
    grad_ids: Tensor | None,  # [N, K] f32
    grad_logits: Tensor,  # [N, V], out, dtype of logits; may be logits
    inv_softcap: float = 0.0,
) -> None:
    """Writes every element of grad_logits: 0 in masked rows and in columns that are not kept."""
    del id_logprobs
    n, vocab = logits.shape
    if n == 0 or vocab == 0:
        return
    inv_t, inv_t_stride, has_inv_t = temperature_arguments(inv_temperature)
    count = 0 if token_ids is None or grad_ids is None else token_ids.shape[1]
    rows = (labels.contiguous(), inv_t, inv_t_stride, contiguous(mask))
    vec = load_width(logits)
    grad_units, grad_unit = in_units(grad_logits.stride(0), vec)
    rest = (
        contiguous_rows(token_ids), row_stride(token_ids), values.contiguous(), grad_values.contiguous(),
        contiguous_rows(grad_ids), row_stride(grad_ids), grad_logits, grad_units, float(inv_softcap),
        n, vocab // vec, count,
    )  # fmt: skip
    flavour = {
        "HAS_INV_T": has_inv_t,
        "HAS_MASK": mask is not None,
        "HAS_IDS": count > 0,
        "HAS_SOFTCAP": inv_softcap != 0.0,
        "IDS": triton.next_power_of_2(max(count, 1)),
        "BLOCK": BLOCK,
        "VEC": vec,
        "GRAD_UNIT": grad_unit,
        "num_warps": WARPS,
        **OPTIONS,
    }
    with on_device_of(logits):
        if keep_ids is not None:
            k = keep_ids.shape[1]
            _backward_ids_kernel[(n,)](
                logits, logits.stride(0), *rows, contiguous_rows(keep_ids), row_stride(keep_ids), *rest, k,
                KEPT=triton.next_power_of_2(max(k, 1)), **flavour,
            )  # fmt: skip
        else:
            units, unit = in_units(logits.stride(0), vec)
            keep_units, keep_unit = in_units(row_stride(keep_mask), vec)
            _backward_kernel[(n,)](
                logits, units, *rows, keep_mask, keep_units, *rest,
                HAS_KEEP=keep_mask is not None, LOGITS_UNIT=unit, KEEP_UNIT=keep_unit, **flavour,
            )  # fmt: skip
