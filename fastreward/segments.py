"""Segments of responses (turns, steps, thoughts): ids of tokens, one value for each segment, and back to the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.arrays import accepts_arrays
from fastreward._arguments.numbers import Number, anything, is_number, number, split
from fastreward._arguments.options import (
    SEGMENT_BYS,
    SEGMENT_DIFFS,
    SEGMENT_OPS,
    SEGMENT_PLACES,
    SegmentBy,
    SegmentDiff,
    SegmentOp,
    SegmentPlace,
)
from fastreward._arguments.tokens import token_bounds
from fastreward._runtime import segments as ops
from fastreward._runtime.dispatch import select

#: Scattering is the derivative of a reduction, and the other way round: which one is whose.
_REDUCTION: Final[dict[SegmentPlace, SegmentOp]] = {
    "end": "last",
    "start": "first",
    "broadcast": "sum",
    "spread": "mean",
}
_LONGEST: Final = 2**31 - 1  # tokens of a sequence: ids are i32, as are places in it


# --------------------------------------------------------------------------------------------------------------- ids
@accepts_arrays
def segment_ids(
    x: Tensor,
    *,
    by: SegmentBy = "runs",
    separators: int | Sequence[int] | Tensor | None = None,
    ends: Tensor | None = None,
    bounds: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The segment of each token, numbered 0, 1, ... in its row; -1 = none.

    Args:
        x: [B, T], or [N] with cu_seqlens. What it is depends on how segments are told apart:
            by="runs": a mask; a segment (turn) is a run of nonzero positions, whatever lies between belongs to none.
            by="labels": integers; a segment (thought) is a run of one label, labels below 0 are none. Neighbouring
                steps with equal labels [B, S] become one thought so.
            separators: token ids; a segment (step) ends at a separator, which belongs to it, and what comes after the
                last one is a segment of its own. Separators that `mask` leaves out end nothing.
            ends or bounds: a mask; only the shape counts where `mask` is given too.
        separators: an id, or several.
        ends: where segments end: positions [B, K] that never decrease, -1 after the last one ([K] into [N] where
            packed), so that segment k ends at ends[:, k]; or truth values in x's shape. What comes after the last end
            belongs to none.
        bounds: [K + 1], packed sequences only: segments as cu_seqlens has sequences, none across two of those. As with
            ends an empty one has its number too, but for one before the first token of its sequence.
        mask: x's shape, nonzero = may be in a segment. For runs and labels it cuts them.
        cu_seqlens: integers [B + 1]: sequence b is tokens cu_seqlens[b] to cu_seqlens[b + 1].

    Returns:
        int32 in the shape of x.

    Raises:
        TypeError, ValueError: wrong dtype, shape or device, more than one way of telling; on the CPU also ends outside
            of the tokens or in another order.
    """
    check.choice("by", by, SEGMENT_BYS)
    cu_seqlens = _checked_tokens("x", check.tensor("x", x), cu_seqlens)
    given = [name for name, v in (("separators", separators), ("ends", ends), ("bounds", bounds)) if v is not None]
    if len(given) > 1 or (given and by != "runs"):
        raise ValueError(f"{', '.join(given)}: expected one way to tell segments, got {[*given, f'by={by!r}']}")
    counted = _counted("mask", mask, "x", x)
    labels = marks = None
    tail = separators is not None
    if separators is not None:
        check.integers("x", x)
        marks = torch.isin(x, _separators(separators, x))  # in their common dtype: none of them wraps
        marks = marks if counted is None else marks & counted
    elif by == "labels":
        check.integers("x", x)
        labels = x.contiguous() if x.dtype == torch.int32 else x.long().contiguous()
    else:
        own = _counted("x", x, "x", x) if counted is None or not given else None
        counted = own if counted is None else counted if own is None else own & counted
    if ends is not None:
        marks = _marks(ends, x, cu_seqlens)
    if bounds is not None:
        marks = _marks_of_bounds(bounds, x, cu_seqlens)
    result: Tensor = ops.ids(counted, labels, marks, tail, cu_seqlens, select("segments", x))
    return result


def _separators(separators: int | Sequence[int] | Tensor, x: Tensor) -> Tensor:
    found = separators if isinstance(separators, Tensor) else torch.as_tensor(separators, device=x.device)
    if found.numel():
        check.integers("separators", found)
    check.same_device("separators", found, "x", x)
    return found.reshape(-1)


def _marks(ends: Tensor, x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """How many segments end at each token, as some may be empty: i32, or bool where that was given."""
    check.same_device("ends", check.tensor("ends", ends), "x", x)
    if ends.dtype == torch.bool:
        check.shape("ends", ends, x.shape, "as x; or integer positions")
        return ends.contiguous()
    check.integers("ends", ends)
    length = x.shape[-1]
    if ends.ndim != x.ndim or ends.shape[:-1] != x.shape[:-1]:
        shape = "[K]" if cu_seqlens is not None else f"[{x.shape[0]}, K]"
        raise ValueError(f"ends: expected positions {shape}, or truth values as x, got {list(ends.shape)}")
    places = torch.where(ends < 0, length, ends.long())
    if check.values_checked(ends):
        check.every("ends", (ends >= -1) & (ends < length), ends, f"positions in [0, {length}), or -1 after the last")
        in_order = torch.ones_like(places, dtype=torch.bool)
        in_order[..., 1:] = places.diff(dim=-1) >= 0
        check.every("ends", in_order, ends, "positions that never decrease, -1 after the last")
    counts = torch.zeros((*x.shape[:-1], length + 1), dtype=torch.int32, device=x.device)
    counts.scatter_add_(-1, places.clamp(max=length), torch.ones_like(places, dtype=torch.int32))
    return counts[..., :length].contiguous()


def _marks_of_bounds(bounds: Tensor, x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    if cu_seqlens is None:
        raise ValueError("bounds: expected packed tokens, with cu_seqlens; for padded ones give ends")
    lasts = token_bounds(bounds, x, "x", "bounds")
    assert lasts is not None
    counts = torch.zeros(x.shape[0] + 1, dtype=torch.int32, device=x.device)
    counts.scatter_add_(0, torch.where(lasts > 0, lasts - 1, x.shape[0]), torch.ones_like(lasts, dtype=torch.int32))
    if check.values_checked(x):
        inside = (cu_seqlens <= 0) | (counts[(cu_seqlens - 1).clamp(min=0)] > 0)
        check.every("bounds", inside, cu_seqlens, "every bound of cu_seqlens among the segments' own; without")
    return counts[:-1].contiguous()


# --------------------------------------------------------------------------------------------------------- reduction
@accepts_arrays
def segment_reduce(
    x: Tensor,
    segment_ids: Tensor,
    *,
    op: SegmentOp = "sum",
    weights: Tensor | None = None,
    num_segments: int | None = None,
    temperature: Number | None = None,
    empty: Number = 0.0,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """One value for each segment of each row: out[b, s] over the tokens t with segment_ids[b, t] = s.

    Args:
        x: [B, T], or [N] with cu_seqlens; any real dtype, computed in float32. NaN where a segment counts is an error.
        segment_ids: integers in x's shape, -1 = none. In any order; runs, as `segment_ids` makes them, are fastest.
        op: "sum" of w x, "mean" (sum of w x by sum of w), "count" (sum of w), "min", "max", "first", "last",
            "logsumexp" (log of the sum of w exp(x)), "mean-exp" (mean of exp(x): of probabilities, from log-probs; for
            the geometric mean take mean and then exp), "softmin" (mean of x with weights w exp(-x / temperature):
            PURE, arXiv 2504.15275).
        weights: [B, T] as x, at least 0, default 1; a mask will do. A token of weight 0 is not there. Constants.
        num_segments: S, the columns of the result. Default: the largest id + 1, over all rows; on a GPU and in
            torch.compile, where nobody may look at that, it has to be given. (A bound is enough.)
        temperature: of softmin, above 0, and needed there.
        empty: what a segment without a token gives, whatever the op; sum and count always give 0. NaN will do, which
            `group_advantages` takes for "not there".
        cu_seqlens: integers [B + 1]: sequence b is tokens cu_seqlens[b] to cu_seqlens[b + 1].

    Returns:
        float32 [B, S]. On the CPU sums are float64, over a segment's own tokens in their order. The gradient flows to
        x; that of min and max to the first token that has the extreme.

    Raises:
        TypeError, ValueError: wrong dtype, shape, name or device; on the CPU also ids outside of [-1, S), NaN in x
            where it counts, and weights below 0 or not finite.
    """
    check.choice("op", op, SEGMENT_OPS)
    x = check.reals("x", x)
    cu_seqlens = _checked_tokens("x", x, cu_seqlens)
    ids = _checked_ids(segment_ids, "x", x)
    if (temperature is not None) != (op == "softmin"):
        raise ValueError("temperature: needed for op='softmin', and only for it")
    backend = select("segments", x)
    counted = _weights(weights, x)
    segments = _segments(num_segments, ids)
    if backend != "cpu" and check.values_checked(x):  # which sees it in the pass that reduces
        check.segment_ids("segment_ids", ids, segments)
        there = ids >= 0 if counted is None else (ids >= 0) & (counted != 0)
        check.every("x", ~x.detach().isnan() | ~there | (op == "count"), x, "numbers where a segment counts")
    values: Tensor = ops.reduce(
        x.contiguous(),
        ids,
        counted,
        cu_seqlens,
        segments,
        op,
        *split(1.0 if temperature is None else number("temperature", temperature, x, check.positive)),
        *split(number("empty", empty, x, _any_number)),
        True,
        backend,
    )
    return values


def _any_number(name: str, value: object) -> float:
    if not is_number(value):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    return anything(name, value)


def _weights(weights: Tensor | None, x: Tensor) -> Tensor | None:
    """Bool or f32, contiguous."""
    if weights is None:
        return None
    check.shape("weights", check.tensor("weights", weights), x.shape, "as x")
    check.same_device("weights", weights, "x", x)
    weights = check.constant("weights", weights)
    if weights.dtype == torch.bool:
        return weights.contiguous()
    weights = check.reals("weights", weights).contiguous()
    if check.values_checked(weights):
        low, high = weights.aminmax() if weights.numel() else (weights.new_zeros(()), weights.new_zeros(()))
        if not (float(low) >= 0 and float(high) < torch.inf):
            check.every("weights", (weights >= 0) & (weights < torch.inf), weights, "finite weights of at least 0")
    return weights


def _segments(num_segments: int | None, ids: Tensor) -> int:
    if num_segments is not None:
        num_segments = check.whole("num_segments", num_segments, "columns of the result")
        if num_segments < 0:
            raise ValueError(f"num_segments: expected at least 0, got {num_segments}")
        return num_segments
    if torch.compiler.is_compiling() or not ids.is_cpu:
        raise ValueError(
            "num_segments: has to be given on a GPU and in torch.compile, where the largest of segment_ids can't be "
            "looked at; any number above it will do"
        )
    return int(ids.max()) + 1 if ids.numel() else 0


# ------------------------------------------------------------------------------------------------------- differences
@accepts_arrays
def segment_diff(
    values: Tensor,
    *,
    mode: SegmentDiff = "backward",
    mask: Tensor | None = None,
    drop_last: bool = False,
    first: str | Number | Tensor = "zero",
    last: str | Number | Tensor = "value",
    rewards: Tensor | None = None,
    decay: Number = 0.7,
    horizon: int = 4,
    threshold: Number = 1e-5,
) -> Tensor:
    """Differences of the values of neighbouring segments: what a step has added to a potential.

    Args:
        values: [B, S], any real dtype, as float32.
        mode: "backward": v[k] - v[k - 1] (SPO-chain, arXiv 2505.23564; SPAE).
            "forward": v[k + 1] - v[k] (VinePPO, arXiv 2410.01679, with `rewards`; Delta, arXiv 2410.15115, is its
            negative with drop_last).
            "lookahead": v[k + 1] - v[k] where that is at least `threshold` in size; else the first of the next
            `horizon` differences that is, times decay^steps; 0 where none is; and where the row ends before, v[last] -
            v[k] times decay^steps (VSRM, arXiv 2508.10293). 0 for the last segment.
        mask: [B, S], nonzero = the segment is there (`segment_reduce(op="count")` says which); neighbours are the
            nearest that are. Others give 0 and are not read.
        drop_last: the last segment that is there is taken out first: it gives 0, and is nobody's neighbour.
        first: of "backward", before the first segment: "zero" (its difference is 0), "value" (its difference is its
            value), or the value before it, a number or [B].
        last: of "forward", after the last one: "value" (a terminal value of 0), "zero", or the value after it.
        rewards: [B, S], added where the segment is there.
        decay, horizon, threshold: of "lookahead".

    Returns:
        float32 [B, S]. Gradients flow to values, rewards, first and last.

    Raises:
        TypeError, ValueError: wrong dtype, shape or name.
    """
    check.choice("mode", mode, SEGMENT_DIFFS)
    v = check.reals("values", values)
    if v.ndim != 2:
        raise ValueError(f"values: expected [B, S], got {list(v.shape)}")
    there = torch.ones_like(v, dtype=torch.bool) if mask is None else _counted("mask", mask, "values", v)
    assert there is not None
    columns = torch.arange(v.shape[1], device=v.device)
    if check.flag("drop_last", drop_last):
        final = torch.where(there, columns, -1).amax(-1, keepdim=True) if v.shape[1] else there
        there = there & (columns != final)
    v = torch.where(there, v, 0.0)
    if mode == "backward":
        difference = v - _neighbour(v, _before(there), first, "first")
    elif mode == "forward":
        difference = _neighbour(v, _after(there), last, "last") - v
    else:
        bound = number("threshold", threshold, v, check.not_negative)
        horizon = check.whole("horizon", horizon, "differences to look ahead")
        difference = _lookahead(v, _after(there), number("decay", decay, v, check.finite), horizon, bound)
    if rewards is not None:
        check.shape("rewards", check.tensor("rewards", rewards), v.shape, "as values")
        check.same_device("rewards", rewards, "values", v)
        difference = difference + check.reals("rewards", rewards)
    return torch.where(there, difference, 0.0)


def _before(there: Tensor) -> Tensor:
    """The nearest column before each that is there, -1 = none; [B, S]."""
    columns = torch.arange(there.shape[1], device=there.device)
    own = torch.nn.functional.pad(torch.where(there, columns, -1), (1, 0), value=-1)
    return own.cummax(-1).values[:, :-1]


def _after(there: Tensor) -> Tensor:
    """The nearest column after each that is there, -1 = none."""
    before = _before(there.flip(-1)).flip(-1)
    return torch.where(before < 0, -1, there.shape[1] - 1 - before)


def _neighbour(v: Tensor, place: Tensor, edge: str | Number | Tensor, name: str) -> Tensor:
    """The neighbour's value at `place`, and at the edge what `edge` says."""
    if isinstance(edge, str):
        check.choice(name, edge, ("zero", "value"))
        beyond: Tensor | Number = v if edge == "zero" else 0.0
    elif isinstance(edge, Tensor) and edge.ndim:
        check.shape(name, edge, v.shape[:1], "one per row")
        check.same_device(name, edge, "values", v)
        beyond = check.reals(name, edge).unsqueeze(-1)
    else:
        beyond = number(name, edge, v, check.finite)
    found = v.gather(-1, place.clamp(min=0)) if v.shape[1] else v
    if isinstance(beyond, Tensor):
        return torch.where(place < 0, beyond.to(v.dtype), found)
    return torch.where(place < 0, beyond, found)


def _lookahead(v: Tensor, after: Tensor, decay: Number, horizon: int, threshold: Number) -> Tensor:
    if not v.shape[1]:
        return v
    following = _neighbour(v, after, "zero", "last") - v
    at = torch.arange(v.shape[1], device=v.device).expand(v.shape)
    result, open_ = torch.zeros_like(v), torch.ones_like(v, dtype=torch.bool)
    factor: Number = 1.0
    for _ in range(horizon + 1):
        difference, ended = following.gather(-1, at), after.gather(-1, at) < 0
        found = open_ & (ended | (difference.abs() >= threshold))
        own = torch.where(ended, v.gather(-1, at) - v, difference) * factor
        result, open_ = torch.where(found, own.to(v.dtype), result), open_ & ~found
        at = after.gather(-1, at).clamp(min=0)
        factor = factor * decay
    return result


# ----------------------------------------------------------------------------------------------------------- scatter
@accepts_arrays
def scatter_rewards(
    values: Tensor,
    segment_ids: Tensor | None = None,
    *,
    place: SegmentPlace = "end",
    ends: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Values of segments, or of whole responses, on their tokens; 0 on all others.

    Args:
        values: [B, S] with segment_ids or ends, one for each segment; or [B], one for each response, whose tokens are
            those of `mask`. Any real dtype, as float32. NaN (not scored) is put nowhere.
        segment_ids: integers in the tokens' shape, [B, T] or [N], -1 = none.
        place: "end" (on the last valid token of the segment), "start" (the first), "broadcast" (all of them), "spread"
            (all of them, divided by how many they are).
        ends: instead of segment_ids, where the segments end, as for `segment_ids`.
        mask: the tokens' shape, nonzero = valid; needed without segment_ids. A segment without a valid token gets
            nothing, and its value is lost.
        cu_seqlens: integers [B + 1], for packed tokens [N].
        out: where the result goes, float32, contiguous, memory of its own. No gradient flows through it.

    Returns:
        float32 [B, T] or [N]. The gradient flows to values.

    Raises:
        TypeError, ValueError: wrong dtype, shape, name or device; on the CPU also ids outside of [-1, S).
    """
    check.choice("place", place, SEGMENT_PLACES)
    values = check.reals("values", values)
    if segment_ids is not None and ends is not None:
        raise ValueError("segment_ids, ends: expected at most one of them")
    like = _shape_of_tokens(segment_ids, ends, mask)
    cu_seqlens = _checked_tokens("mask" if segment_ids is None else "segment_ids", like, cu_seqlens)
    counted = _counted("mask", mask, "segment_ids" if segment_ids is not None else "ends", like)
    backend = select("segments", values)
    check.same_device("values", values, "mask" if segment_ids is None else "segment_ids", like)
    if segment_ids is not None:
        ids: Tensor | None = _checked_ids(segment_ids, "mask", like)
    elif ends is not None:
        ids = ops.ids(counted, None, _marks(ends, like, cu_seqlens), False, cu_seqlens, backend)
    else:
        ids = None
    rows = like.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    flat = segment_ids is None and ends is None
    if values.ndim != (1 if flat else 2) or values.shape[0] != rows:
        raise ValueError(f"values: expected [{rows}{']' if flat else ', S]'}, got {list(values.shape)}")
    values = (values.unsqueeze(-1) if flat else values).contiguous()
    values = torch.where(values.isnan(), 0.0, values)
    op = _REDUCTION[place]
    if ids is not None and check.values_checked(values) and backend != "cpu":  # which looks at them itself
        check.segment_ids("segment_ids", ids, values.shape[1])
    if out is not None:
        check.output("scatter_rewards", "out", out, like, "the tokens")
        check.own_memory("out", out, (values, ids, counted, cu_seqlens))
        ops.scatter_(check.constant("values", values), ids, counted, cu_seqlens, op, out, backend)
        return out
    result: Tensor = ops.adjoint(values, None, ids, counted, cu_seqlens, op, 1.0, None, backend)
    return result


def _shape_of_tokens(segment_ids: Tensor | None, ends: Tensor | None, mask: Tensor | None) -> Tensor:
    if segment_ids is not None:
        return check.tensor("segment_ids", segment_ids)
    if mask is not None:
        return check.tensor("mask", mask)
    if ends is not None and check.tensor("ends", ends).dtype == torch.bool:
        return ends
    raise ValueError("mask: needed without segment_ids, to know the tokens")


# ------------------------------------------------------------------------------------------------------------ tokens
def _checked_tokens(name: str, x: Tensor, cu_seqlens: Tensor | None) -> Tensor | None:
    """[B, T], or [N] with bounds, which are returned as i64."""
    if cu_seqlens is None and x.ndim != 2:
        raise ValueError(f"{name}: expected [B, T], or packed [N] with cu_seqlens, got {list(x.shape)}")
    bounds = token_bounds(cu_seqlens, x, name)
    if x.shape[-1] > _LONGEST and (bounds is None or check.values_checked(x)):
        longest = x.shape[-1] if bounds is None else int(bounds.diff().max())
        if longest > _LONGEST:
            raise ValueError(f"{name}: expected sequences of less than 2^31 tokens, got {longest}")
    return bounds


def _checked_ids(segment_ids: Tensor, reference: str, like: Tensor) -> Tensor:
    """I32 or i64, contiguous."""
    check.integers("segment_ids", segment_ids)
    check.shape("segment_ids", segment_ids, like.shape, f"as {reference}")
    check.same_device("segment_ids", segment_ids, reference, like)
    return (segment_ids if segment_ids.dtype == torch.int32 else segment_ids.long()).contiguous()


def _counted(name: str, mask: Tensor | None, reference: str, like: Tensor) -> Tensor | None:
    """A mask as truth values."""
    mask = check.mask(mask, reference, like, name)
    return mask if mask is None or mask.dtype == torch.bool else mask != 0
