"""A row of logits in two sweeps: statistics, then the gradient through them. What the generated kernels call."""

from __future__ import annotations

import triton
import triton.language as tl

from .._shared.softmax import NEG_INF, gradient_scale, logit_at, scale_of, scan_row
from ..logprobs.backward import through_softmax


@triton.jit
def statistics(
    row, label, V, inverse64, ENTROPY: tl.constexpr, STEPS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr
):
    """(log-prob, entropy or 0, largest logit, its log-prob) of a row, f32: the bits of kernels/logprobs."""
    label_x = logit_at(row, label, V)
    top, total, weighted, _, _, _, _, _ = scan_row(
        row, row, V, scale_of(inverse64), label_x, ENTROPY, False, False, False, False, False,
        STEPS, LANES, VEC, "evict_last",
    )  # fmt: skip
    log_total = tl.log(total)
    logprob = (label_x.to(tl.float64) - top) * inverse64 - log_total
    entropy = tl.full([], 0.0, tl.float64)
    if ENTROPY:
        entropy = log_total - weighted * tl.exp(-log_total)
    top_logprob = tl.where(top == NEG_INF, float("nan"), -log_total)
    return logprob.to(tl.float32), entropy.to(tl.float32), top, top_logprob.to(tl.float32)


@triton.jit
def store_gradient(
    row, grad_row,  # pointers to V logits and gradients; may be the same
    label, V, inverse64,
    top, top_logprob, entropy,  # f32, of the row
    g_logprob, g_entropy,  # f32: upstream gradients
    STEPS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """p (-g_logprob - g_entropy (entropy + log p)) + g_logprob at the label, times 1 / temperature.

    From the last block to the first: what the statistics read last is the likeliest to be in the L2 cache still.
    """
    BLOCK: tl.constexpr = STEPS * LANES * VEC
    inverse = gradient_scale(inverse64)
    c0 = -g_logprob - g_entropy * entropy
    label = tl.where((label >= 0) & (label < V), label, -1).to(tl.int32)
    blocks = tl.cdiv(V, BLOCK)
    columns = tl.arange(0, BLOCK)
    here = (blocks - 1) * BLOCK + columns
    ahead = tl.load(row + here, mask=here < V, other=NEG_INF, eviction_policy="evict_first")
    for done in range(blocks):
        here = (blocks - 1 - done) * BLOCK + columns
        x = ahead.to(tl.float32)
        ahead = tl.load(row + (here - BLOCK), mask=here >= BLOCK, other=NEG_INF, eviction_policy="evict_first")
        dz = through_softmax(x, inverse, top, top_logprob, c0, -g_entropy, 0.0)
        dz = (dz + tl.where(here == label, g_logprob, 0.0)) * inverse
        tl.store(grad_row + here, dz.to(grad_row.dtype.element_ty), mask=here < V, eviction_policy="evict_first")


@triton.jit
def zero_row(grad_row, V, BLOCK: tl.constexpr):
    """V zeros."""
    columns = tl.arange(0, BLOCK)
    zeros = tl.zeros([BLOCK], grad_row.dtype.element_ty)
    for start in range(0, V, BLOCK):
        tl.store(grad_row + (start + columns), zeros, mask=start + columns < V, eviction_policy="evict_first")
