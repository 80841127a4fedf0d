"""Returns, GAE, lambda-returns and V-trace: y_t = x_t + c_t y_{t+1} along each row.

Fused: masks, moved rewards, next values, episode ends, the recurrence and both results in one launch. A program has a
row and goes through it in blocks, from its last valid token to the left (from its first one to the right where the
recurrence does): in each an associative scan of (c, x), then what came from the blocks before. Blocks are counted from
that token, so that no padding, on whichever side, changes a bit.

Next values and moved rewards skip masked tokens; a scan of its own brings them along. Minima and maxima without a
discount are scanned as sums are. Under one, and with logsumexp, they have no associative form: there a lane has a row
and goes token by token.

A few long rows leave the chip idle that way, so there each block has a program of its own, in several launches: where
the rows begin, what their blocks hand on over masked tokens (both only under a mask), each block's map y -> c y + x,
a row's blocks one after the other, and the results. Blocks are the same and are joined in the same order, and so the
bits are the same.

Bytes a token: 4 for each array that is read, 4 for each that is written, and the mask; neighbours come from L1. In
several launches what is read is read twice, and what masked tokens hand on a third time.

Raw function: `scan`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastreward._arguments.options import RETURNS_OPS, ReturnsInputs, ReturnsOptions
from fastreward._arguments.tokens import Tokens, few_and_long

from ._shared.launch import OPTIONS, mask_bytes, on_device_of

# --------------------------------------------------------------------------------------------------------- config
# 1024 tokens a block, four to a thread: with eight, V-trace does not fit into the registers.
BLOCK = 1024
WARPS = 8
LANES = 32  # rows of a program where they are gone through token by token
UNROLL = 32  # blocks whose maps are loaded at once where a row's blocks are joined

_SUM, _MIN, _MAX, _LOGSUMEXP = (tl.constexpr(i) for i in range(len(RETURNS_OPS)))
# What a program of `_scan_kernel` does: a row, a block's map, a block's results.
_ROW, _MAP, _RESULTS = (tl.constexpr(i) for i in range(3))
# Rows of `blocks`. Joining a row's blocks leaves what comes into each in the place of what it handed on.
_SEEN, _PENDING, _VALUE, _C, _X = (tl.constexpr(i) for i in range(5))


# --------------------------------------------------------------------------------------------------------- kernel
@triton.jit
def _compose(c, x, c_after, x_after):
    """y -> c y + x, then y -> c_after y + x_after; a 0 stays one beside a product beyond float32."""
    product = tl.where((c == 0.0) | (c_after == 0.0), 0.0, c * c_after)
    return product, tl.where(x == 0.0, x_after, tl.fma(c_after, x, x_after))


@triton.jit
def _lower(c, x, c_after, x_after):
    """y -> min(x, y), or x where c is 0; twice."""
    return c * c_after, tl.where((c_after != 0.0) & (x < x_after), x, x_after)


@triton.jit
def _higher(c, x, c_after, x_after):
    """y -> max(x, y), or x where c is 0; twice."""
    return c * c_after, tl.where((c_after != 0.0) & (x > x_after), x, x_after)


@triton.jit
def _mapped(c, x, y, OP: tl.constexpr):
    """The map's value at y."""
    if OP == _MIN:
        return tl.where((c != 0.0) & (y < x), y, x)
    if OP == _MAX:
        return tl.where((c != 0.0) & (y > x), y, x)
    return tl.where(y == 0.0, x, tl.fma(c, y, x))


@triton.jit
def _nothing(OP: tl.constexpr):
    """What the recurrence starts from where nothing lies beyond."""
    return float("inf") if OP == _MIN else float("-inf") if OP == _MAX else 0.0


@triton.jit
def _skip_masked(valid, pending, value, valid_after, pending_after, value_after):
    """What a run of tokens hands on: rewards since its last valid token, and that token's value."""
    here = valid_after != 0
    return (
        valid | valid_after,
        tl.where(here, pending_after, pending + pending_after),
        tl.where(here, value_after, value),
    )


@triton.jit
def _last(x, lane, BLOCK: tl.constexpr):
    """The block's last element."""
    return tl.sum(tl.where(lane == BLOCK - 1, x, 0.0), axis=0)


@triton.jit
def _bounds(cu_seqlens, row, T, PACKED: tl.constexpr):
    """A row's tokens: [start, end), i64."""
    if PACKED:
        return tl.load(cu_seqlens + row), tl.load(cu_seqlens + row + 1)
    return row * T, row * T + T


@triton.jit
def _first_valid(mask, start, end, k, REVERSE: tl.constexpr, BLOCK: tl.constexpr):
    """The first valid token in the k-th block of a row, counted from where the recurrence begins; else its length."""
    place = k * BLOCK + tl.arange(0, BLOCK)
    at = end - 1 - place if REVERSE else start + place
    inside = place < end - start
    valid = inside & (tl.load(mask + at, mask=inside, other=0) != 0)
    return tl.min(tl.where(valid, place, end - start), axis=0)


@triton.jit
def _masked_in_front(mask, start, end, REVERSE: tl.constexpr, BLOCK: tl.constexpr):
    """Tokens before the recurrence's first valid one; all of them without any."""
    front = end - start
    k = front * 0
    while k * BLOCK < front:  # which a valid token ends
        front = tl.minimum(front, _first_valid(mask, start, end, k, REVERSE, BLOCK))
        k += 1
    return front


@triton.jit
def _slot(cu_seqlens, row, T, PACKED: tl.constexpr, BLOCK: tl.constexpr):
    """Where a row's blocks begin among all rows': there is room for those on both sides of its first valid token."""
    if PACKED:
        return 2 * row + tl.load(cu_seqlens + row) // BLOCK
    return row * (T // BLOCK + 2)


@triton.jit
def _row_of(slot, cu_seqlens, B, T, PACKED: tl.constexpr, BLOCK: tl.constexpr):
    """The row that has a slot."""
    row = slot * 0
    if PACKED:
        last = row + B - 1
        while row < last:
            middle = (row + last + 1) // 2
            below = _slot(cu_seqlens, middle, T, PACKED, BLOCK) <= slot
            row = tl.where(below, middle, row)
            last = tl.where(below, last, middle - 1)
    else:
        row = slot // (T // BLOCK + 2)
    return row


@triton.jit
def _front_reward(rewards, first, k, front, REVERSE: tl.constexpr, BLOCK: tl.constexpr):
    """The sum over the k-th block of masked tokens in front, counted from the token `first` behind them."""
    place = k * BLOCK + tl.arange(0, BLOCK)
    at = first + 1 + place if REVERSE else first - 1 - place
    r = tl.load(rewards + at, mask=place < front, other=0.0)
    return tl.sum(tl.where(tl.abs(r) < float("inf"), r, 0.0), axis=0)


@triton.jit
def _handed_on(
    rewards, values, mask, first, k, length,
    REVERSE: tl.constexpr, MOVE: tl.constexpr, VALUED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What masked tokens hand on to each token of the k-th block, from those of the block alone and the one before."""
    place = k * BLOCK + tl.arange(0, BLOCK)
    before = first + 1 - place if REVERSE else first - 1 + place
    passed = (place < length) & (place > 0)
    valid = passed & (tl.load(mask + before, mask=passed, other=0) != 0)
    p = tl.zeros([BLOCK], tl.float32)
    if MOVE:
        p = tl.load(rewards + before, mask=passed & (valid == 0), other=0.0)
        p = tl.where(tl.abs(p) < float("inf"), p, 0.0)
    w = tl.zeros([BLOCK], tl.float32)
    if VALUED:
        w = tl.load(values + before, mask=valid, other=0.0)
    return tl.associative_scan((valid.to(tl.int32), p, w), 0, _skip_masked)


@triton.jit
def _coefficient(values, number, row, at, valid, MODE: tl.constexpr):
    """A number, or the row's, or the tokens'."""
    if MODE == 1:
        return tl.load(values + row)
    if MODE == 2:
        return tl.load(values + at, mask=valid, other=0.0)
    return number


@triton.jit
def _flag(flags, at, valid):
    """1.0 where set."""
    return tl.where(valid & (tl.load(flags + at, mask=valid, other=0) != 0), 1.0, 0.0)


@triton.jit(do_not_specialize=["B", "T"])
def _reach_kernel(
    mask,  # u8 [N]
    cu_seqlens,  # i64 [B + 1]
    reach,  # i64 [B], zero
    B, T, REVERSE: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block: how far the recurrence goes in its row, from the first valid token on, as far as the block knows."""
    slot = tl.program_id(0).to(tl.int64)
    row = _row_of(slot, cu_seqlens, B, T, PACKED, BLOCK)
    start, end = _bounds(cu_seqlens, row, T, PACKED)
    first = _first_valid(mask, start, end, slot - _slot(cu_seqlens, row, T, PACKED, BLOCK), REVERSE, BLOCK)
    if first < end - start:
        tl.atomic_max(reach + row, end - start - first)


@triton.jit(do_not_specialize=["B", "T", "slots"])
def _handed_on_kernel(
    rewards, values,  # f32 [N]
    mask,  # u8 [N]
    cu_seqlens,  # i64 [B + 1]
    reach,  # i64 [B]
    blocks,  # f32 [5, slots]
    B, T, slots,
    VALUED: tl.constexpr, REVERSE: tl.constexpr, MOVE: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block: what it hands on over masked tokens."""
    slot = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    row = _row_of(slot, cu_seqlens, B, T, PACKED, BLOCK)
    start, end = _bounds(cu_seqlens, row, T, PACKED)
    length = tl.load(reach + row)
    front = end - start - length
    first = start + length - 1 if REVERSE else end - length
    k = slot - _slot(cu_seqlens, row, T, PACKED, BLOCK)
    fronts = tl.cdiv(front, BLOCK)
    if k < fronts:
        tl.store(blocks + _SEEN * slots + slot, 0.0)
        if MOVE:
            tl.store(blocks + _PENDING * slots + slot, _front_reward(rewards, first, k, front, REVERSE, BLOCK))
    else:
        seen, p, w = _handed_on(
            rewards, values, mask, first, k - fronts, length, REVERSE, MOVE, VALUED, BLOCK
        )  # fmt: skip
        tl.store(blocks + _SEEN * slots + slot, tl.max(seen, axis=0).to(tl.float32))
        tl.store(blocks + _PENDING * slots + slot, _last(p, lane, BLOCK))
        tl.store(blocks + _VALUE * slots + slot, _last(w, lane, BLOCK))


@triton.jit(do_not_specialize=["T", "slots"])
def _join_kernel(
    blocks,  # f32 [5, slots]
    beyond,  # f32 [B]
    cu_seqlens,  # i64 [B + 1]
    reach,  # i64 [B]
    T, slots,
    HANDED_ON: tl.constexpr, OP: tl.constexpr, STATES: tl.constexpr, HAS_BEYOND: tl.constexpr,
    HAS_MASK: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """A row: what comes into each of its blocks, one after the other."""
    row = tl.program_id(0).to(tl.int64)
    start, end = _bounds(cu_seqlens, row, T, PACKED)
    length = end - start
    if HAS_MASK:
        length = tl.load(reach + row)
    fronts = tl.cdiv(end - start - length, BLOCK)
    count = fronts + tl.cdiv(length, BLOCK)
    own = blocks + _slot(cu_seqlens, row, T, PACKED, BLOCK)
    lane = tl.arange(0, UNROLL)
    after = 0.0 if STATES else _nothing(OP)
    if HAS_BEYOND:
        after = tl.load(beyond + row)
    if HANDED_ON:
        value = after
        pending = 0.0
        for k in range(0, count, UNROLL):
            pendings = tl.zeros([UNROLL], tl.float32)
            came = tl.zeros([UNROLL], tl.float32)
            for j in tl.static_range(UNROLL):
                there = k + j < count
                seen = tl.load(own + _SEEN * slots + k + j, mask=there, other=0.0)
                p = tl.load(own + _PENDING * slots + k + j, mask=there, other=0.0)
                w = tl.load(own + _VALUE * slots + k + j, mask=there, other=0.0)
                pendings = tl.where(lane == j, pending, pendings)
                came = tl.where(lane == j, value, came)
                pending = tl.where(seen != 0.0, p, p + pending)
                value = tl.where(seen != 0.0, w, value)
            tl.store(own + _PENDING * slots + k + lane, pendings, mask=k + lane < count)
            tl.store(own + _VALUE * slots + k + lane, came, mask=k + lane < count)
    else:
        y = 0.0 if STATES else after
        for k in range(fronts, count, UNROLL):
            came = tl.zeros([UNROLL], tl.float32)
            for j in tl.static_range(UNROLL):
                there = k + j < count
                c = tl.load(own + _C * slots + k + j, mask=there, other=0.0)
                x = tl.load(own + _X * slots + k + j, mask=there, other=0.0)
                came = tl.where(lane == j, y, came)
                y = _mapped(c, x, y, OP) + 0.0  # no -0, as from _last
            tl.store(own + _X * slots + k + lane, came, mask=k + lane < count)


@triton.jit(do_not_specialize=["B", "T", "slots", "gamma", "lam", "product", "rho_bar", "c_bar"])
def _scan_kernel(
    rewards, values, log_ratios, next_values,  # f32 [N]
    gammas, lams,  # f32 [N] or [B]
    terminated, done,  # bool [N]
    beyond,  # f32 [B]
    mask,  # u8 [N]
    cu_seqlens,  # i64 [B + 1]
    given,  # f64 [5]: gamma, lam, scale, rho_bar, c_bar, where the host does not know them
    out, second,  # f32 [N]
    reach,  # i64 [B]
    blocks,  # f32 [5, slots]
    B, T, slots, gamma, lam, product, rho_bar, c_bar,
    DOES: tl.constexpr, OP: tl.constexpr, GAE: tl.constexpr, LAMBDA: tl.constexpr, VTRACE: tl.constexpr,
    CARRY: tl.constexpr, TIMED: tl.constexpr, KEEP: tl.constexpr, REVERSE: tl.constexpr, MOVE: tl.constexpr,
    SKIP: tl.constexpr, HAS_NEXT: tl.constexpr, GAMMA: tl.constexpr, LAM: tl.constexpr, HAS_TERMINATED: tl.constexpr,
    HAS_DONE: tl.constexpr, HAS_BEYOND: tl.constexpr, HAS_MASK: tl.constexpr, PACKED: tl.constexpr,
    GIVEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row, one pass; or a block of one."""
    VALUED: tl.constexpr = GAE or VTRACE
    SHIFTED: tl.constexpr = VALUED and not (CARRY and HAS_MASK) and not (HAS_NEXT and not (TIMED and HAS_MASK))
    slot = tl.program_id(0).to(tl.int64)
    row = slot
    if DOES != _ROW:
        row = _row_of(slot, cu_seqlens, B, T, PACKED, BLOCK)
    lane = tl.arange(0, BLOCK)
    start, end = _bounds(cu_seqlens, row, T, PACKED)
    if GIVEN:
        gamma = tl.load(given).to(tl.float32)
        lam = tl.load(given + 1).to(tl.float32)
        product = (tl.load(given) * tl.load(given + 1)).to(tl.float32)
        rho_bar = tl.load(given + 3).to(tl.float32)
        c_bar = tl.load(given + 4).to(tl.float32)
    after = 0.0 if (VALUED or LAMBDA) else _nothing(OP)
    if HAS_BEYOND:
        after = tl.load(beyond + row)
    y = 0.0 if (VALUED or LAMBDA) else after
    value = after
    pending = 0.0
    front = (end - start) * 0
    if HAS_MASK:
        if DOES == _ROW:
            front = _masked_in_front(mask, start, end, REVERSE, BLOCK)
        else:
            front = end - start - tl.load(reach + row)
    length = end - start - front
    first = start + length - 1 if REVERSE else start + front
    # Its blocks: those of masked tokens in front, then those of the recurrence.
    fronts = tl.cdiv(front, BLOCK)
    front_from = fronts * 0
    front_to = fronts
    block_from = front_from
    block_to = tl.cdiv(length, BLOCK)
    if DOES != _ROW:
        front_from = slot - _slot(cu_seqlens, row, T, PACKED, BLOCK)
        front_to = tl.minimum(fronts, front_from + 1)
        block_from = tl.where(front_from < fronts, block_to, front_from - fronts)
        block_to = tl.minimum(block_to, block_from + 1)
        if SKIP:
            pending = tl.load(blocks + _PENDING * slots + slot)
            value = tl.load(blocks + _VALUE * slots + slot)
    if DOES == _RESULTS:
        y = tl.load(blocks + _X * slots + slot)
    if HAS_MASK and DOES != _MAP:
        # No results in front; rewards there move.
        for k in range(front_from, front_to):
            if MOVE and DOES == _ROW:
                pending += _front_reward(rewards, first, k, front, REVERSE, BLOCK)
            place = k * BLOCK + lane
            at = first + 1 + place if REVERSE else first - 1 - place
            tl.store(out + at, tl.zeros([BLOCK], tl.float32), mask=place < front)
            if VALUED:
                tl.store(second + at, tl.zeros([BLOCK], tl.float32), mask=place < front)
    for k in range(block_from, block_to):
        place = k * BLOCK + lane
        at = first - place if REVERSE else first + place
        before = at + 1 if REVERSE else at - 1  # what the recurrence has just been at
        inside = place < length
        valid = inside
        was_valid = inside & (place > 0)
        if HAS_MASK:
            valid = inside & (tl.load(mask + at, mask=inside, other=0) != 0)
            was_valid = was_valid & (tl.load(mask + before, mask=was_valid, other=0) != 0)
        r = tl.load(rewards + at, mask=valid, other=0.0)
        if SKIP:
            seen, p, w = _handed_on(rewards, values, mask, first, k, length, REVERSE, MOVE, VALUED, BLOCK)
            p = tl.where(seen != 0, p, p + pending)
            w = tl.where(seen != 0, w, value)
            pending = _last(p, lane, BLOCK)
            value = _last(w, lane, BLOCK)
            if MOVE:
                r = tl.where(valid, r + p, 0.0)
        reads = inside if TIMED else valid  # a coefficient per token, under the mask too where that takes time
        g = _coefficient(gammas, gamma, row, at, reads, GAMMA)
        x = r
        c = tl.zeros([BLOCK], tl.float32) + g
        v = tl.zeros([BLOCK], tl.float32)
        factor = v
        if GAE or LAMBDA or VTRACE:
            going_on = tl.zeros([BLOCK], tl.float32) + 1.0
            discount = c
            if HAS_TERMINATED:
                going_on = 1.0 - _flag(terminated, at, valid)
                discount = discount * going_on
            if HAS_DONE:
                going_on = going_on * (1.0 - _flag(done, at, valid))
            following = tl.zeros([BLOCK], tl.float32)
            if SKIP and VALUED and CARRY and not HAS_NEXT:
                following = w
            if SHIFTED:
                following = tl.load(values + before, mask=was_valid, other=0.0)
                following = tl.where(place == 0, after, following)
            if HAS_NEXT:
                following = tl.where(valid, tl.load(next_values + at, mask=valid, other=0.0), following)
            if LAMBDA:
                closed = place == 0
                if HAS_MASK and not (CARRY or TIMED):
                    closed = closed | (was_valid == 0)
                going_on = tl.where(closed, 0.0, going_on)
                traced = _coefficient(lams, lam, row, at, reads, LAM) * going_on
                x = tl.fma(discount * (1.0 - traced), following, r)
                c = c * traced
            else:
                v = tl.load(values + at, mask=valid, other=0.0)
                x = tl.fma(discount, following, r) - v
                if GAMMA == 0 and LAM == 0:
                    c = product * going_on
                else:
                    c = c * _coefficient(lams, lam, row, at, reads, LAM) * going_on
            if VTRACE:
                ratio = tl.exp(tl.load(log_ratios + at, mask=valid, other=0.0))
                rho = tl.where(ratio > rho_bar, rho_bar, ratio)
                x = rho * x
                c = c * tl.where(ratio > c_bar, c_bar, ratio)
                factor = rho * discount * going_on
        if OP != _SUM:  # gamma is 1
            x = tl.where(valid, x, _nothing(OP))
            c = tl.where(valid | (CARRY or TIMED), 1.0, 0.0)
            if OP == _MIN:
                products, sums = tl.associative_scan((c, x), 0, _lower)
            else:
                products, sums = tl.associative_scan((c, x), 0, _higher)
        else:
            if HAS_MASK and not TIMED:
                x = tl.where(valid, x, 0.0)
                c = tl.where(valid, c, 1.0 if CARRY else 0.0)
            products, sums = tl.associative_scan((c, x), 0, _compose)
        if DOES == _MAP:
            tl.store(blocks + _C * slots + slot, _last(products, lane, BLOCK))
            tl.store(blocks + _X * slots + slot, _last(sums, lane, BLOCK))
        else:
            came = y
            found = _mapped(products, sums, came, OP)
            y = _last(tl.where(inside, found, 0.0), lane, BLOCK)
            shown = inside if KEEP else valid
            if GAE:
                tl.store(out + at, tl.where(shown, found, 0.0), mask=inside)
                tl.store(second + at, tl.where(shown, found + v, 0.0), mask=inside)
            elif VTRACE:
                above = tl.gather(found, tl.where(lane > 0, lane - 1, 0), 0)
                above = tl.where(lane > 0, above, came)
                tl.store(out + at, tl.where(shown, found + v, 0.0), mask=inside)
                tl.store(second + at, tl.where(shown, tl.fma(factor, above, x), 0.0), mask=inside)
            else:
                tl.store(out + at, tl.where(shown, found, 0.0), mask=inside)


@triton.jit(do_not_specialize=["B", "T", "gamma", "scale"])
def _loop_kernel(
    rewards,  # f32 [N]
    gammas,  # f32 [N] or [B]
    beyond,  # f32 [B]
    mask,  # u8 [N]
    cu_seqlens,  # i64 [B + 1]
    given,  # f64 [5]
    out,  # f32 [N]
    B, T, gamma, scale,
    OP: tl.constexpr, CARRY: tl.constexpr, TIMED: tl.constexpr, KEEP: tl.constexpr, REVERSE: tl.constexpr,
    GAMMA: tl.constexpr, HAS_BEYOND: tl.constexpr, HAS_MASK: tl.constexpr, PACKED: tl.constexpr,
    GIVEN: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """y_t = op(x_t, c_t y_{t+1}), a row in each lane. `seen`: whether there is a y yet."""
    row = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    real = row < B
    if PACKED:
        start = tl.load(cu_seqlens + row, mask=real, other=0)
        end = tl.load(cu_seqlens + row + 1, mask=real, other=0)
    else:
        start = row * T
        end = tl.where(real, start + T, start)
    if GIVEN:
        gamma = tl.load(given).to(tl.float32)
        scale = tl.load(given + 2).to(tl.float32)
    y = tl.zeros([LANES], tl.float32)
    seen = row < 0
    if HAS_BEYOND:
        y = tl.load(beyond + row, mask=real, other=0.0)
        seen = real
    started = row < 0
    steps = tl.max(end - start, axis=0)
    for k in range(steps):
        at = end - 1 - k if REVERSE else start + k
        inside = k < end - start
        valid = inside
        if HAS_MASK:
            valid = inside & (tl.load(mask + at, mask=inside, other=0) != 0)
        started = started | valid
        x = tl.load(rewards + at, mask=valid, other=0.0)
        g = tl.zeros([LANES], tl.float32) + gamma
        if GAMMA == 1:
            g = tl.load(gammas + row, mask=real, other=0.0)
        if GAMMA == 2:
            g = tl.load(gammas + at, mask=inside, other=0.0)
        later = g * y
        if OP == _MIN:
            joined = tl.where(later < x, later, x)
        elif OP == _MAX:
            joined = tl.where(later > x, later, x)
        else:
            larger = tl.where(later > x, later, x)
            smaller = tl.where(later > x, x, later)
            soft = tl.log(1.0 + tl.exp((smaller - larger) / tl.abs(scale)))
            joined = tl.where(scale > 0.0, larger, smaller) + scale * soft
        new = tl.where(seen, joined, x)
        y_masked = y
        seen_masked = seen
        if TIMED:
            y_masked = tl.where(started, later, y)
        elif not CARRY:
            seen_masked = seen & (started == 0)
        y = tl.where(valid, new, tl.where(inside, y_masked, y))
        seen = tl.where(valid, True, seen_masked)
        shown = valid
        if KEEP:
            shown = inside & started
        tl.store(out + at, tl.where(shown, y, 0.0), mask=inside)


# --------------------------------------------------------------------------------------------------------- launch
def scan(
    inputs: ReturnsInputs,
    tokens: Tokens,
    numbers: Sequence[float] | Tensor,
    options: ReturnsOptions,
    out: Tensor,
    second: Tensor | None,
) -> None:
    """Writes the results of `options.kind`: one launch, or several where rows are few and long."""
    rows, columns = tokens.rows, tokens.shape[-1]
    if rows == 0 or out.numel() == 0:
        return
    mask, given = mask_bytes(tokens.mask), numbers if isinstance(numbers, Tensor) else None
    gamma, lam, scale, rho_bar, c_bar = [1.0] * 5 if isinstance(numbers, Tensor) else map(float, numbers)
    flavour: dict[str, Any] = {
        "OP": RETURNS_OPS.index(options.op), "CARRY": options.at_masked == "carry", "TIMED": options.timed,
        "KEEP": options.at_masked == "decay", "REVERSE": options.reverse, "GAMMA": _mode(inputs.gamma, tokens),
        "HAS_BEYOND": inputs.beyond is not None, "HAS_MASK": mask is not None,
        "PACKED": tokens.cu_seqlens is not None, "GIVEN": given is not None, **OPTIONS,
    }  # fmt: skip
    move = options.move and mask is not None
    skip = move or (options.kind in ("gae", "vtrace") and options.at_masked == "carry" and inputs.next_values is None)

    def run(does: tl.constexpr, programs: int, reach: Tensor | None, blocks: Tensor | None) -> None:
        _scan_kernel[(programs,)](
            inputs.rewards, inputs.values, inputs.log_ratios, inputs.next_values, inputs.gamma, inputs.lam,
            _bytes(inputs.terminated), _bytes(inputs.done), inputs.beyond, mask, tokens.cu_seqlens, given,
            out, second, reach, blocks, rows, columns, 0 if blocks is None else blocks.shape[1],
            gamma, lam, gamma * lam, rho_bar, c_bar,
            DOES=does.value, GAE=options.kind == "gae", LAMBDA=options.kind == "lambda",
            VTRACE=options.kind == "vtrace", MOVE=move, SKIP=skip and mask is not None,
            HAS_NEXT=inputs.next_values is not None, LAM=_mode(inputs.lam, tokens),
            HAS_TERMINATED=inputs.terminated is not None, HAS_DONE=inputs.done is not None,
            BLOCK=BLOCK, num_warps=WARPS, **flavour,
        )  # fmt: skip

    with on_device_of(out):
        if not options.scans(inputs, numbers):
            _loop_kernel[(triton.cdiv(rows, LANES),)](
                inputs.rewards, inputs.gamma, inputs.beyond, mask, tokens.cu_seqlens, given, out, rows, columns,
                gamma, scale, LANES=LANES, num_warps=1, **flavour,
            )  # fmt: skip
        elif few_and_long(tokens, BLOCK):
            _in_blocks(run, inputs, tokens, mask, options, move, skip)
        else:
            run(_ROW, rows, None, None)


def _in_blocks(
    run: Callable[[tl.constexpr, int, Tensor | None, Tensor | None], None],
    inputs: ReturnsInputs, tokens: Tokens, mask: Tensor | None, options: ReturnsOptions, move: bool, skip: bool,
) -> None:  # fmt: skip
    """A program for each block of each row."""
    rows, columns, bounds = tokens.rows, tokens.shape[-1], tokens.cu_seqlens
    slots = columns // BLOCK + 2 * rows if bounds is not None else rows * (columns // BLOCK + 2)
    blocks = inputs.rewards.new_empty((5, slots))
    reach = None if mask is None else torch.zeros(rows, dtype=torch.int64, device=mask.device)
    layout: dict[str, Any] = {"PACKED": bounds is not None, "BLOCK": BLOCK, **OPTIONS}

    def join(handed_on: bool) -> None:
        _join_kernel[(rows,)](
            blocks, inputs.beyond, bounds, reach, columns, slots, HANDED_ON=handed_on,
            OP=RETURNS_OPS.index(options.op), STATES=options.kind != "returns", HAS_BEYOND=inputs.beyond is not None,
            HAS_MASK=mask is not None, UNROLL=UNROLL, num_warps=1, **layout,
        )  # fmt: skip

    if mask is not None:
        _reach_kernel[(slots,)](mask, bounds, reach, rows, columns, REVERSE=options.reverse, num_warps=WARPS, **layout)
        if skip:
            _handed_on_kernel[(slots,)](
                inputs.rewards, inputs.values, mask, bounds, reach, blocks, rows, columns, slots,
                VALUED=inputs.values is not None, REVERSE=options.reverse, MOVE=move, num_warps=WARPS, **layout,
            )  # fmt: skip
            join(True)
    run(_MAP, slots, reach, blocks)
    join(False)
    run(_RESULTS, slots, reach, blocks)


def _bytes(flags: Tensor | None) -> Tensor | None:
    return None if flags is None else flags.view(torch.uint8)


def _mode(x: Tensor | None, tokens: Tokens) -> int:
    """0: a number, 1: one per row, 2: one per token."""
    return 0 if x is None else 2 if tuple(x.shape) == tokens.shape else 1
