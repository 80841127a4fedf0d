"""What the last program of a policy loss to arrive does: all rows' and programs' partial sums, in a fixed order.

Device functions of policy_loss.py. Partial sums were written by other programs of the same launch: they are read past
the L1 cache (.cg), after the acquire on the arrival counter.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._device import inverse64


@triton.jit
def _merged(partial, k, programs, MERGE: tl.constexpr):
    """Sum of partial result k over the programs, in a fixed order: f64."""
    lanes = tl.arange(0, MERGE)
    total = tl.zeros([MERGE], tl.float64)
    for p in range(0, programs, MERGE):
        total += tl.load(
            partial + (k * programs + p + lanes), mask=p + lanes < programs, other=0.0, cache_modifier=".cg"
        )
    return tl.sum(total, axis=0)


@triton.jit
def _merged_max(partial, k, programs, MERGE: tl.constexpr):
    lanes = tl.arange(0, MERGE)
    most = tl.full([MERGE], float("-inf"), tl.float64)
    for p in range(0, programs, MERGE):
        x = tl.load(
            partial + (k * programs + p + lanes), mask=p + lanes < programs, other=float("-inf"), cache_modifier=".cg"
        )
        most = tl.maximum(most, x)
    return tl.max(most, axis=0)


@triton.jit
def _row_totals(row_sums, row_counts, row, ok, chunks):
    """(sum of token losses f64, counted tokens i64) of rows, their chunks in order."""
    total = tl.zeros(row.shape, tl.float64)
    count = tl.zeros(row.shape, tl.int64)
    for c in range(chunks):
        total += tl.load(row_sums + (row * chunks + c), mask=ok, other=0.0, cache_modifier=".cg")
        count += tl.load(row_counts + (row * chunks + c), mask=ok, other=0, cache_modifier=".cg")
    return total, count


@triton.jit
def finish(
    row_sums, row_counts, partial, normalizer, loss, metrics, row_weight,
    B, T, chunks, programs,
    PACKED: tl.constexpr, HAS_NORMALIZER: tl.constexpr, AGGREGATION: tl.constexpr, SUMS: tl.constexpr,
    MERGE: tl.constexpr,
):  # fmt: skip
    """The last program: 12 bytes per row and chunk, 96 per program, in; 4 per row out."""
    lanes = tl.arange(0, MERGE)
    total = tl.zeros([MERGE], tl.float64)
    tokens = tl.zeros([MERGE], tl.int64)
    sequences = tl.zeros([MERGE], tl.int64)
    for b in range(0, B, MERGE):
        row = tl.cast(b, tl.int64) + lanes
        own, count = _row_totals(row_sums, row_counts, row, row < B, chunks)
        if AGGREGATION == 1:  # seq-mean-token-mean
            own *= inverse64(tl.maximum(count, 1))
        total += own
        tokens += count
        sequences += (count > 0).to(tl.int64)
    n_tokens = tl.sum(tokens, axis=0).to(tl.float64)
    denominator = n_tokens
    if AGGREGATION != 0:
        denominator = tl.sum(sequences, axis=0).to(tl.float64)
    if AGGREGATION == 3:  # seq-mean-token-sum-norm
        if PACKED:
            denominator *= _merged_max(partial, SUMS + 2, programs, MERGE)
        else:
            denominator *= tl.cast(T, tl.float64)
    if HAS_NORMALIZER:
        denominator = tl.load(normalizer).to(tl.float64)
    denominator = tl.where(n_tokens > 0.0, denominator, tl.maximum(denominator, 1.0))
    scale = inverse64(denominator)
    tl.store(loss, (tl.sum(total, axis=0) * scale).to(tl.float32))
    for b in range(0, B, MERGE):
        row = tl.cast(b, tl.int64) + lanes
        weight = tl.zeros([MERGE], tl.float64) + scale
        if AGGREGATION == 1:
            _, count = _row_totals(row_sums, row_counts, row, row < B, chunks)
            weight *= inverse64(tl.maximum(count, 1))
        tl.store(row_weight + row, weight.to(tl.float32), mask=row < B)
    share = inverse64(tl.maximum(n_tokens, 1.0))
    for k in range(SUMS):
        mean = (_merged(partial, k, programs, MERGE) * share).to(tl.float32)
        tl.store(metrics + tl.where(k == SUMS - 1, 10, k), mean)  # the entropy's mean comes after the ratio's bounds
    lowest = -_merged_max(partial, SUMS, programs, MERGE)
    highest = _merged_max(partial, SUMS + 1, programs, MERGE)
    tl.store(metrics + 8, tl.where(n_tokens > 0.0, lowest, 0.0).to(tl.float32))
    tl.store(metrics + 9, tl.where(n_tokens > 0.0, highest, 0.0).to(tl.float32))
    tl.store(metrics + 11, n_tokens.to(tl.float32))
