"""Segments: ids of tokens, one value for each segment of a row, and back to the tokens.

Any ids are right, and no float is ever added atomically: where a segment begins and ends in its row is found first,
through integer atomics at the ends of runs, whose order is of no consequence. Then one program reduces one segment: it
reads the tokens between those two, in blocks that count from the first, and leaves out what is not its own. Ids in
runs, as they nearly always are, are read twice so, and x once; the more segments are interleaved, the more is read
again.
The adjoint takes what it needs of a segment (weight, position, exponents) from the same reduction, and one more launch
writes every token.

Bytes a token: spans 4, reduction 8 + w, adjoint of sum 8 + w; w = bytes of a weight. Launches: spans and reduction two
(and a memset of 8 bytes a segment), adjoint of a sum one, of others three, ids one.

Raw functions: `ids`, `reduce`, `adjoint`.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastreward._arguments.options import SEGMENT_OPS, SegmentOptions

from ._shared.device import inverse64
from ._shared.launch import OPTIONS, numbers, on_device_of

# --------------------------------------------------------------------------------------------------------- config
BLOCK = 1024  # tokens at a time, of a row
SEGMENT = 256  # of a segment
WARPS = 4
MOST = 65_535  # programs along a grid's second dimension
PROGRAMS = 4224  # packed rows, whose lengths the host does not know, get this many programs together

_SUM, _MEAN, _MIN, _MAX, _FIRST, _LAST, _COUNT, _LOGSUMEXP, _MEAN_EXP, _SOFTMIN = (
    tl.constexpr(i) for i in range(len(SEGMENT_OPS))
)
#: What an op collects of a segment: sums of weights and values, a position, an extreme value, sums of exponentials.
_SUMS, _PLACE, _EXTREME, _EXPONENTIALS = (tl.constexpr(i) for i in range(4))
_KINDS = {
    "sum": _SUMS, "mean": _SUMS, "count": _SUMS, "mean-exp": _SUMS, "first": _PLACE, "last": _PLACE, "min": _EXTREME,
    "max": _EXTREME, "logsumexp": _EXPONENTIALS, "softmin": _EXPONENTIALS,
}  # fmt: skip


# --------------------------------------------------------------------------------------------------------- kernel
@triton.jit
def _row(cu_seqlens, columns, row, PACKED: tl.constexpr):
    """(first token, token after the last) of a row."""
    if PACKED:
        return tl.load(cu_seqlens + row), tl.load(cu_seqlens + row + 1)
    else:
        begin = row * columns
        return begin, begin + columns


@triton.jit
def _weight(weights, at, ok, WEIGHTS: tl.constexpr):
    """Weights f32, 0 where not ok."""
    if WEIGHTS == 0:
        return ok.to(tl.float32)
    elif WEIGHTS == 1:
        return (tl.load(weights + at, mask=ok, other=0) != 0).to(tl.float32)
    else:
        return tl.load(weights + at, mask=ok, other=0.0)


@triton.jit(do_not_specialize=["segments"])
def _spans_kernel(
    ids,  # i32 or i64, tokens
    cu_seqlens, columns,  # i64 [B + 1], or the tokens of a row
    spans,  # i32 [2, B * segments], 0 before: from the first token to the row's end, from its begin to after the last
    segments,
    PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    begin, end = _row(cu_seqlens, columns, row, PACKED)
    count = tl.num_programs(0).to(tl.int64) * segments
    for start in range(begin + tl.program_id(1) * BLOCK, end, tl.num_programs(1) * BLOCK):
        at = start + tl.arange(0, BLOCK)
        own = tl.load(ids + at, mask=at < end, other=-1)
        before = tl.load(ids + at - 1, mask=(at > begin) & (at < end), other=-1)
        after = tl.load(ids + at + 1, mask=at + 1 < end, other=-1)
        legal = (own >= 0) & (own < segments)
        place = spans + row * segments + tl.where(legal, own, 0)
        tl.atomic_max(place, (end - at).to(tl.int32), mask=legal & (before != own), sem="relaxed")
        tl.atomic_max(place + count, (at + 1 - begin).to(tl.int32), mask=legal & (after != own), sem="relaxed")


@triton.jit
def _own(ids, weights, at, last, segment, HAS_IDS: tl.constexpr, WEIGHTS: tl.constexpr):
    """Weights of the segment's own tokens, 0 for others."""
    ok = at < last
    if HAS_IDS:
        ok = ok & (tl.load(ids + at, mask=ok, other=-1) == segment)
    return _weight(weights, at, ok, WEIGHTS)


@triton.jit
def _exponent(x, inverse, OP: tl.constexpr):
    if OP == _SOFTMIN:
        return x.to(tl.float64) * -inverse
    else:
        return x.to(tl.float64)


@triton.jit
def _inverse_temperature(high, low, given, HAS_GIVEN: tl.constexpr):
    if HAS_GIVEN:
        return inverse64(tl.load(given))
    else:
        return tl.cast(high, tl.float64) + tl.cast(low, tl.float64)


@triton.jit(do_not_specialize=["segments"])
def _reduce_kernel(
    x,  # f32, tokens
    ids, weights,  # tokens
    cu_seqlens, columns,
    spans,  # i32 [2, B * segments]
    out,  # f32 [B, segments]; or
    state,  # f64 [3, B, segments]
    inverse_high, inverse_low,  # 1 / temperature, as the sum of two f32
    empty,
    given,  # f64 [2], temperature and empty: instead of them
    segments,
    OP: tl.constexpr, KIND: tl.constexpr, HAS_IDS: tl.constexpr, WEIGHTS: tl.constexpr, PACKED: tl.constexpr,
    HAS_GIVEN: tl.constexpr, HAS_STATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One segment a program: state is (weight or largest exponent, sum of exponentials or position, soft minimum)."""
    which = tl.program_id(0).to(tl.int64)
    row, segment = which // segments, which % segments
    begin, end = _row(cu_seqlens, columns, row, PACKED)
    first, last = begin, end
    if HAS_IDS:
        first = end - tl.load(spans + which)
        last = begin + tl.load(spans + tl.num_programs(0).to(tl.int64) + which)
    lanes = tl.arange(0, BLOCK)
    weight = tl.full([], 0.0, tl.float64)
    total = tl.full([], 0.0, tl.float64)
    top = tl.full([], float("-inf"), tl.float64)
    inverse = _inverse_temperature(inverse_high, inverse_low, given, HAS_GIVEN)
    place = tl.full([], -1, tl.int64)
    if KIND == _SUMS:
        sums = tl.zeros([BLOCK], tl.float64)
        counts = tl.zeros([BLOCK], tl.float64)
        for start in range(first, last, BLOCK):
            at = start + lanes
            w = _own(ids, weights, at, last, segment, HAS_IDS, WEIGHTS)
            counts += w.to(tl.float64)
            if OP != _COUNT and not HAS_STATE:  # the derivative needs the weight alone
                value = tl.load(x + at, mask=w != 0, other=0.0).to(tl.float64)
                if OP == _MEAN_EXP:
                    value = tl.exp(value)
                sums += tl.where(w != 0, w.to(tl.float64) * value, 0.0)
        weight = tl.sum(counts, axis=0)
        total = tl.sum(sums, axis=0)
    elif KIND == _PLACE:
        for start in range(first, last, BLOCK):
            at = start + lanes
            w = _own(ids, weights, at, last, segment, HAS_IDS, WEIGHTS)
            if OP == _LAST:
                place = tl.maximum(place, tl.max(tl.where(w != 0, at, -1), axis=0))
            else:
                found = tl.min(tl.where(w != 0, at, end), axis=0)
                place = tl.where((place < 0) & (found < end), found, place)
    else:  # the smallest or largest value, or the largest exponent, and the first token that has it
        nan = tl.full([], 0, tl.int32)
        for start in range(first, last, BLOCK):
            at = start + lanes
            w = _own(ids, weights, at, last, segment, HAS_IDS, WEIGHTS)
            value = tl.load(x + at, mask=w != 0, other=0.0)
            nan = tl.maximum(nan, tl.max(((value != value) & (w != 0)).to(tl.int32), axis=0))
            if OP == _MIN:
                value = -value
            y = tl.where(w != 0, _exponent(value, inverse, OP), float("-inf"))
            best = tl.max(y, axis=0)
            found = tl.min(tl.where((w != 0) & (y == best), at, end), axis=0)
            better = (found < end) & ((place < 0) | (best > top))
            place = tl.where(better, found, place)
            top = tl.where(better, best, top)
        if nan != 0:
            top = tl.full([], float("nan"), tl.float64)
            place = tl.where(place < 0, first, place)  # where nothing else is
    there = (place >= 0) | (weight > 0.0)
    soft = tl.full([], 0.0, tl.float64)
    if KIND == _EXPONENTIALS:
        parts = tl.zeros([BLOCK], tl.float64)
        shifted = tl.zeros([BLOCK], tl.float64)
        for start in range(first, last, BLOCK):
            at = start + lanes
            w = _own(ids, weights, at, last, segment, HAS_IDS, WEIGHTS)
            value = tl.load(x + at, mask=w != 0, other=0.0)
            y = _exponent(value, inverse, OP)
            part = w.to(tl.float64) * tl.where(y == top, 1.0, tl.exp(y - top))
            part = tl.where((w == 0) | (y == float("-inf")), 0.0, part)
            parts += part
            shifted += tl.where(part == 0.0, 0.0, part * value.to(tl.float64))
        total = tl.sum(parts, axis=0)
        soft = tl.where(total == 0.0, float("inf"), tl.sum(shifted, axis=0) / total)
    if HAS_STATE:
        count = tl.num_programs(0).to(tl.int64)
        if KIND == _SUMS:
            tl.store(state + which, weight)
        elif KIND == _EXPONENTIALS:
            tl.store(state + which, top)
            tl.store(state + count + which, total)
            tl.store(state + 2 * count + which, soft)
        else:
            tl.store(state + which, (place - begin).to(tl.float64))
    else:
        if OP == _COUNT:
            result = weight
        elif OP == _SUM:
            result = total
        elif KIND == _SUMS:
            result = total / tl.where(weight > 0.0, weight, 1.0)
        elif KIND == _PLACE:
            result = tl.load(x + tl.maximum(place, begin), mask=there, other=0.0).to(tl.float64)
        elif OP == _MIN:
            result = -top
        elif OP == _MAX:
            result = top
        elif OP == _LOGSUMEXP:
            result = tl.where(total == 0.0, float("-inf"), top + tl.log(tl.where(total == 0.0, 1.0, total)))
        else:
            result = soft
        if OP != _SUM and OP != _COUNT:
            none = tl.load(given + 1).to(tl.float32) if HAS_GIVEN else empty
            result = tl.where(there, result, none)
        tl.store(out + which, result.to(tl.float32))


@triton.jit(do_not_specialize=["segments"])
def _adjoint_kernel(
    values,  # f32 [B, segments]
    x,  # f32, tokens
    ids, weights,  # tokens
    cu_seqlens, columns,
    state,  # f64 [3, B, segments]
    out,  # f32, tokens
    inverse_high, inverse_low,
    given,  # f64 [2]
    segments,
    OP: tl.constexpr, KIND: tl.constexpr, HAS_IDS: tl.constexpr, WEIGHTS: tl.constexpr, PACKED: tl.constexpr,
    HAS_GIVEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What each token gets of its segment's value: 8 + w bytes, and 8 of state in the caches."""
    row = tl.program_id(0).to(tl.int64)
    begin, end = _row(cu_seqlens, columns, row, PACKED)
    count = tl.num_programs(0).to(tl.int64) * segments
    inverse = _inverse_temperature(inverse_high, inverse_low, given, HAS_GIVEN)
    for start in range(begin + tl.program_id(1) * BLOCK, end, tl.num_programs(1) * BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < end
        legal = inside
        own = row * segments + tl.zeros([BLOCK], tl.int64)
        if HAS_IDS:
            segment = tl.load(ids + at, mask=inside, other=-1)
            legal = (segment >= 0) & (segment < segments)
            own += tl.where(legal, segment, 0)
        w = _weight(weights, at, legal, WEIGHTS)
        legal = legal & (w != 0)
        g = tl.load(values + own, mask=legal, other=0.0)
        if OP == _SUM:
            share = g * w
        elif OP == _MEAN:
            weight = tl.load(state + own, mask=legal, other=1.0)
            share = (g * w).to(tl.float64) * inverse64(weight)
        elif OP == _COUNT:
            share = tl.zeros([BLOCK], tl.float32)
        elif KIND == _PLACE or KIND == _EXTREME:  # noqa: SIM109  (no `in` of constants)
            place = tl.load(state + own, mask=legal, other=-1.0).to(tl.int64)
            share = tl.where(place == at - begin, g, 0.0)
        else:
            value = tl.load(x + at, mask=legal, other=0.0)
            y = _exponent(value, inverse, OP)
            if OP == _MEAN_EXP:
                part = tl.exp(y) / tl.load(state + own, mask=legal, other=1.0)
            else:
                top = tl.load(state + own, mask=legal, other=0.0)
                total = tl.load(state + count + own, mask=legal, other=1.0)
                part = tl.where(y == top, 1.0, tl.exp(y - top)) / tl.where(total == 0.0, 1.0, total)
                part = tl.where(y == float("-inf"), 0.0, part)
            if OP == _SOFTMIN:
                soft = tl.load(state + 2 * count + own, mask=legal, other=0.0)
                gap = value.to(tl.float64) - soft
                slope = 1.0 - tl.where(value == soft, 0.0, gap) * inverse  # both may be infinite
                part = tl.where(part == 0.0, 0.0, part * slope)
            share = (g * w).to(tl.float64) * part
        tl.store(out + at, tl.where(legal, share, 0.0).to(tl.float32), mask=inside)


@triton.jit
def _ids_kernel(
    mask,  # u8, tokens
    labels,  # i32 or i64, tokens
    marks,  # u8 or i32, tokens
    cu_seqlens, columns,
    out,  # i32, tokens
    HAS_MASK: tl.constexpr, HAS_LABELS: tl.constexpr, HAS_MARKS: tl.constexpr, TAIL: tl.constexpr,
    PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row a program: how many segments have begun, or ended before, at each token."""
    row = tl.program_id(0).to(tl.int64)
    begin, end = _row(cu_seqlens, columns, row, PACKED)
    lanes = tl.arange(0, BLOCK)
    tail = begin
    if HAS_MARKS and not TAIL:
        for start in range(begin, end, BLOCK):
            at = start + lanes
            marked = tl.load(marks + at, mask=at < end, other=0) != 0
            tail = tl.maximum(tail, tl.max(tl.where(marked, at + 1, begin), axis=0))
    seen = tl.full([], 0, tl.int32)
    for start in range(begin, end, BLOCK):
        at = start + lanes
        inside, past = at < end, (at > begin) & (at < end)
        here = inside
        if HAS_MASK:
            here = tl.load(mask + at, mask=inside, other=0) != 0
        if HAS_MARKS:
            step = tl.load(marks + at, mask=inside, other=0).to(tl.int32)
            if not TAIL:
                here = here & (at < tail)
            segment = seen + tl.cumsum(step, axis=0) - step
        else:
            before = past
            if HAS_MASK:
                before = tl.load(mask + at - 1, mask=past, other=0) != 0
            if HAS_LABELS:
                own = tl.load(labels + at, mask=inside, other=-1)
                left = tl.load(labels + at - 1, mask=past, other=-1)
                here = here & (own >= 0)
                before = before & (left == own)
            step = (here & (before == 0)).to(tl.int32)
            segment = seen + tl.cumsum(step, axis=0) - 1
        seen += tl.sum(step, axis=0)
        tl.store(out + at, tl.where(here, segment, -1), mask=inside)


# --------------------------------------------------------------------------------------------------------- launch
def ids(
    mask: Tensor | None,  # bool, tokens
    labels: Tensor | None,  # i32 or i64, tokens
    marks: Tensor | None,  # bool or i32, tokens
    tail: bool,
    cu_seqlens: Tensor | None,  # i64 [B + 1]
) -> Tensor:
    """Each token's segment, i32."""
    like = next(x for x in (marks, labels, mask) if x is not None)
    out = torch.empty(like.shape, dtype=torch.int32, device=like.device)
    rows = _rows(like, cu_seqlens)
    if rows and out.numel():
        with on_device_of(like):
            _ids_kernel[(rows,)](
                _bytes(mask), labels, _bytes(marks), cu_seqlens, like.shape[-1], out,
                HAS_MASK=mask is not None, HAS_LABELS=labels is not None, HAS_MARKS=marks is not None, TAIL=tail,
                PACKED=cu_seqlens is not None, BLOCK=BLOCK, num_warps=WARPS, **OPTIONS,
            )  # fmt: skip
    return out


def reduce(
    x: Tensor,  # f32, tokens
    segment_ids: Tensor | None,  # i32 or i64, tokens
    weights: Tensor | None,  # bool or f32, tokens
    cu_seqlens: Tensor | None,
    segments: int,
    options: SegmentOptions,
    checked: bool,
) -> Tensor:
    """Values of segments, f32 [B, segments]: two launches."""
    out = torch.empty((_rows(x, cu_seqlens), segments), dtype=torch.float32, device=x.device)
    _launch_reduction(x, x, segment_ids, weights, cu_seqlens, segments, options, out, None)
    return out


def adjoint(
    values: Tensor,  # f32 [B, segments]
    x: Tensor | None,
    segment_ids: Tensor | None,
    weights: Tensor | None,
    cu_seqlens: Tensor | None,
    options: SegmentOptions,
    out: Tensor,  # f32, tokens
) -> None:
    """Values of segments to tokens, into `out`."""
    rows, segments = values.shape
    if not out.numel():
        return
    if not rows or not segments:
        out.zero_()
        return
    state = None
    if options.op not in ("sum", "count"):
        state = torch.empty((3, rows, segments), dtype=torch.float64, device=out.device)
        _launch_reduction(out, x, segment_ids, weights, cu_seqlens, segments, options, None, state)
    (temperature, _), given = numbers(options.temperature, options.empty)
    inverse = _two_floats(0.0 if given is not None else 1.0 / temperature)
    with on_device_of(out):
        _adjoint_kernel[_grid(out, cu_seqlens)](
            values, x, segment_ids, _bytes(weights), cu_seqlens, out.shape[-1], state, out, *inverse, given, segments,
            **_constants(segment_ids, weights, cu_seqlens, options, given), BLOCK=BLOCK,
        )  # fmt: skip


def _launch_reduction(
    like: Tensor,
    x: Tensor | None,
    segment_ids: Tensor | None,
    weights: Tensor | None,
    cu_seqlens: Tensor | None,
    segments: int,
    options: SegmentOptions,
    out: Tensor | None,
    state: Tensor | None,
) -> None:
    """`out` [B, segments], or `state` [3, B, segments]."""
    rows = _rows(like, cu_seqlens)
    if not rows or not segments:
        return
    (temperature, empty), given = numbers(options.temperature, options.empty)
    inverse = _two_floats(0.0 if given is not None else 1.0 / temperature)
    spans = None
    with on_device_of(like):
        if segment_ids is not None:
            spans = torch.zeros((2, rows, segments), dtype=torch.int32, device=like.device)
            _spans_kernel[_grid(like, cu_seqlens)](
                segment_ids, cu_seqlens, like.shape[-1], spans, segments, PACKED=cu_seqlens is not None, BLOCK=BLOCK,
                num_warps=WARPS, **OPTIONS,
            )  # fmt: skip
        _reduce_kernel[(rows * segments,)](
            x, segment_ids, _bytes(weights), cu_seqlens, like.shape[-1], spans, out, state, *inverse, empty, given,
            segments,
            **_constants(segment_ids, weights, cu_seqlens, options, given), HAS_STATE=state is not None, BLOCK=SEGMENT,
        )  # fmt: skip


def _constants(
    segment_ids: Tensor | None,
    weights: Tensor | None,
    cu_seqlens: Tensor | None,
    options: SegmentOptions,
    given: Tensor | None,
) -> dict[str, Any]:
    return {
        "OP": SEGMENT_OPS.index(options.op),
        "KIND": _KINDS[options.op].value,
        "HAS_IDS": segment_ids is not None,
        "WEIGHTS": 0 if weights is None else 1 if weights.dtype == torch.bool else 2,
        "PACKED": cu_seqlens is not None,
        "HAS_GIVEN": given is not None,
        "num_warps": WARPS,
        **OPTIONS,
    }


def _two_floats(x: float) -> tuple[float, float]:
    """A number as the sum of two that f32 has: a kernel gets numbers as f32."""
    high = ctypes.c_float(x).value
    return high, x - high


def _rows(tokens: Tensor, cu_seqlens: Tensor | None) -> int:
    return tokens.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _grid(tokens: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int]:
    """(rows, programs of a row)."""
    rows = max(_rows(tokens, cu_seqlens), 1)
    blocks = triton.cdiv(tokens.shape[-1], BLOCK)
    return rows, max(min(blocks, MOST if cu_seqlens is None else triton.cdiv(PROGRAMS, rows)), 1)


def _bytes(x: Tensor | None) -> Tensor | None:
    """Truth values by the name of bytes; all else as it is."""
    return x.view(torch.uint8) if x is not None and x.dtype == torch.bool else x
