"""Returns, GAE, lambda-returns and V-trace: y_t = x_t + c_t y_{t+1} along each row.

Fused: masks, moved rewards, next values, episode ends, the recurrence and both results in one launch. A program has a
row and goes through it in blocks, from its last valid token to the left (from its first one to the right where the
recurrence does): in each an associative scan of (c, x), then what came from the blocks before. Blocks are counted from
that token, so that no padding, on whichever side, changes a bit.

Next values and moved rewards skip masked tokens; a scan of its own brings them along. Recurrences that are no sums
(minimum, maximum, logsumexp) have no associative form under a discount: there a lane has a row and goes token by token.

Bytes a token: 4 for each array that is read, 4 for each that is written, and the mask; neighbours come from L1.

Raw function: `scan`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastreward._arguments.options import RETURNS_OPS, ReturnsInputs, ReturnsOptions
from fastreward._arguments.tokens import Tokens

from ._shared.launch import OPTIONS, mask_bytes, on_device_of

# --------------------------------------------------------------------------------------------------------- config
# 1024 tokens a block, eight to a thread.
BLOCK = 1024
WARPS = 4
LANES = 32  # rows of a program where they are gone through token by token

_SUM, _MIN, _MAX, _LOGSUMEXP = (tl.constexpr(i) for i in range(len(RETURNS_OPS)))


# --------------------------------------------------------------------------------------------------------- kernel
@triton.jit
def _compose(c, x, c_after, x_after):
    """y -> c y + x, then y -> c_after y + x_after."""
    return c * c_after, tl.fma(c_after, x, x_after)


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
def _first_valid(mask, start, end, REVERSE: tl.constexpr, BLOCK: tl.constexpr):
    """Where the recurrence begins: the row's last valid token, or its first; `end` without any."""
    lane = tl.arange(0, BLOCK)
    found = end
    done = 0
    blocks = tl.cdiv(end - start, BLOCK)
    k = blocks * 0
    while (k < blocks) & (done == 0):
        at = end - 1 - k * BLOCK - lane if REVERSE else start + k * BLOCK + lane
        inside = (at >= start) & (at < end)
        valid = inside & (tl.load(mask + at, mask=inside, other=0) != 0)
        if tl.max(valid.to(tl.int32), axis=0) != 0:
            done = 1
            found = tl.max(tl.where(valid, at, start), axis=0) if REVERSE else tl.min(tl.where(valid, at, end), axis=0)
        k += 1
    return found


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


@triton.jit(do_not_specialize=["T", "gamma", "lam", "product", "rho_bar", "c_bar"])
def _scan_kernel(
    rewards, values, log_ratios, next_values,  # f32 [N]
    gammas, lams,  # f32 [N] or [B]
    terminated, done,  # bool [N]
    beyond,  # f32 [B]
    mask,  # u8 [N]
    cu_seqlens,  # i64 [B + 1]
    given,  # f64 [5]: gamma, lam, scale, rho_bar, c_bar, where the host does not know them
    out, second,  # f32 [N]
    T, gamma, lam, product, rho_bar, c_bar,
    GAE: tl.constexpr, LAMBDA: tl.constexpr, VTRACE: tl.constexpr,
    CARRY: tl.constexpr, TIMED: tl.constexpr, KEEP: tl.constexpr, REVERSE: tl.constexpr, MOVE: tl.constexpr,
    HAS_NEXT: tl.constexpr, GAMMA: tl.constexpr, LAM: tl.constexpr, HAS_TERMINATED: tl.constexpr,
    HAS_DONE: tl.constexpr, HAS_BEYOND: tl.constexpr, HAS_MASK: tl.constexpr, PACKED: tl.constexpr,
    GIVEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row: one pass."""
    VALUED: tl.constexpr = GAE or VTRACE
    SKIP: tl.constexpr = HAS_MASK and (MOVE or (VALUED and CARRY and not HAS_NEXT))
    SHIFTED: tl.constexpr = VALUED and not (CARRY and HAS_MASK) and not (HAS_NEXT and not (TIMED and HAS_MASK))
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    start, end = _bounds(cu_seqlens, row, T, PACKED)
    if GIVEN:
        gamma = tl.load(given).to(tl.float32)
        lam = tl.load(given + 1).to(tl.float32)
        product = (tl.load(given) * tl.load(given + 1)).to(tl.float32)
        rho_bar = tl.load(given + 3).to(tl.float32)
        c_bar = tl.load(given + 4).to(tl.float32)
    after = 0.0
    if HAS_BEYOND:
        after = tl.load(beyond + row)
    y = 0.0 if (VALUED or LAMBDA) else after
    value = after
    pending = 0.0
    origin = end - 1 if REVERSE else start
    if HAS_MASK:
        origin = _first_valid(mask, start, end, REVERSE, BLOCK)
        # Beyond it there are no results; rewards there move.
        low = origin + 1 if REVERSE else start
        high = end if REVERSE else origin
        if origin == end:  # no valid token at all
            low = start
            high = end
        for k in range(tl.cdiv(high - low, BLOCK)):
            at = low + k * BLOCK + lane
            inside = at < high
            if MOVE:
                r = tl.load(rewards + at, mask=inside, other=0.0)
                pending += tl.sum(tl.where(tl.abs(r) < float("inf"), r, 0.0), axis=0)
            tl.store(out + at, tl.zeros([BLOCK], tl.float32), mask=inside)
            if VALUED:
                tl.store(second + at, tl.zeros([BLOCK], tl.float32), mask=inside)
    length = origin - start + 1 if REVERSE else end - origin
    if HAS_MASK:
        length = tl.where(origin == end, 0, length)
    for k in range(tl.cdiv(length, BLOCK)):
        place = k * BLOCK + lane
        at = origin - place if REVERSE else origin + place
        before = at + 1 if REVERSE else at - 1  # what the recurrence has just been at
        inside = place < length
        valid = inside
        was_valid = inside & (place > 0)
        if HAS_MASK:
            valid = inside & (tl.load(mask + at, mask=inside, other=0) != 0)
            was_valid = was_valid & (tl.load(mask + before, mask=was_valid, other=0) != 0)
        r = tl.load(rewards + at, mask=valid, other=0.0)
        if SKIP:
            passed = inside & (place > 0)
            p = tl.zeros([BLOCK], tl.float32)
            if MOVE:
                p = tl.load(rewards + before, mask=passed & (was_valid == 0), other=0.0)
                p = tl.where(tl.abs(p) < float("inf"), p, 0.0)
            w = tl.zeros([BLOCK], tl.float32)
            if VALUED:
                w = tl.load(values + before, mask=was_valid, other=0.0)
            seen, p, w = tl.associative_scan((was_valid.to(tl.int32), p, w), 0, _skip_masked)
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
        if HAS_MASK and not TIMED:
            x = tl.where(valid, x, 0.0)
            c = tl.where(valid, c, 1.0 if CARRY else 0.0)
        products, sums = tl.associative_scan((c, x), 0, _compose)
        came = y
        found = tl.fma(products, came, sums)
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
        if OP == 1:
            joined = tl.where(later < x, later, x)
        elif OP == 2:
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
    """Writes the results of `options.kind`: one launch."""
    rows = tokens.rows
    if rows == 0 or out.numel() == 0:
        return
    mask, given = mask_bytes(tokens.mask), numbers if isinstance(numbers, Tensor) else None
    gamma, lam, scale, rho_bar, c_bar = [1.0] * 5 if isinstance(numbers, Tensor) else numbers
    flavour: dict[str, Any] = {
        "CARRY": options.at_masked == "carry", "TIMED": options.timed, "KEEP": options.at_masked == "decay",
        "REVERSE": options.reverse, "GAMMA": _mode(inputs.gamma, tokens), "HAS_BEYOND": inputs.beyond is not None,
        "HAS_MASK": mask is not None, "PACKED": tokens.cu_seqlens is not None, "GIVEN": given is not None, **OPTIONS,
    }  # fmt: skip
    with on_device_of(out):
        if options.op != "sum":
            _loop_kernel[(triton.cdiv(rows, LANES),)](
                inputs.rewards, inputs.gamma, inputs.beyond, mask, tokens.cu_seqlens, given, out,
                rows, tokens.shape[-1], float(gamma), float(scale),
                OP=RETURNS_OPS.index(options.op), LANES=LANES, num_warps=1, **flavour,
            )  # fmt: skip
            return
        _scan_kernel[(rows,)](
            inputs.rewards, inputs.values, inputs.log_ratios, inputs.next_values, inputs.gamma, inputs.lam,
            _bytes(inputs.terminated), _bytes(inputs.done), inputs.beyond, mask, tokens.cu_seqlens, given,
            out, second, tokens.shape[-1], float(gamma), float(lam), float(gamma) * float(lam), float(rho_bar),
            float(c_bar),
            GAE=options.kind == "gae", LAMBDA=options.kind == "lambda", VTRACE=options.kind == "vtrace",
            MOVE=options.move and mask is not None, HAS_NEXT=inputs.next_values is not None,
            LAM=_mode(inputs.lam, tokens), HAS_TERMINATED=inputs.terminated is not None,
            HAS_DONE=inputs.done is not None, BLOCK=BLOCK, num_warps=WARPS, **flavour,
        )  # fmt: skip


def _bytes(flags: Tensor | None) -> Tensor | None:
    return None if flags is None else flags.view(torch.uint8)


def _mode(x: Tensor | None, tokens: Tokens) -> int:
    """0: a number, 1: one per row, 2: one per token."""
    return 0 if x is None else 2 if tuple(x.shape) == tokens.shape else 1
