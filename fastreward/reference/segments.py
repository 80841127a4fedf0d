"""Segments in float64 torch, one segment at a time: the truth."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor


def segment_ids(
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    marks: Tensor | None = None,
    tail: bool = True,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Each token's segment in its row, -1 = none: runs of the mask or of equal labels, or what ends at marks."""
    like = next(x for x in (marks, labels, mask) if x is not None)
    out = torch.full(like.shape, -1, dtype=torch.int32).reshape(-1)
    counted = torch.ones(out.shape) if mask is None else mask.cpu().reshape(-1)
    names = torch.zeros(out.shape) if labels is None else labels.cpu().reshape(-1)
    for begin, end in _rows(like, cu_seqlens):
        if marks is None:
            segment, before = -1, None
            for t in range(begin, end):
                own = names[t].item() if counted[t] and names[t] >= 0 else None
                segment += own is not None and own != before
                out[t] = -1 if own is None else segment
                before = own
            continue
        ends = marks.cpu().reshape(-1)[begin:end].long()
        for t in range(begin, end):
            segment = int(ends[: t - begin].sum())
            if counted[t] and (tail or segment < ends.sum()):
                out[t] = segment
    return out.reshape(like.shape)


def segment_reduce(
    x: Tensor,
    ids: Tensor | None,
    *,
    op: str = "sum",
    weights: Tensor | None = None,
    num_segments: int,
    temperature: float = 1.0,
    empty: float = 0.0,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """[B, S] in float64, differentiable for x; arguments as fastreward's."""
    values = x.double().reshape(-1)
    w = _weights(x, weights)
    rows = []
    for row in _tokens(x, ids, w, num_segments, cu_seqlens):
        rows.append([_reduce(values[own], w[own], op, temperature, empty) for own in row])
    if not rows or not num_segments:
        return torch.zeros((len(rows), num_segments), dtype=torch.float64)
    return torch.stack([torch.stack(row) for row in rows])


def _reduce(x: Tensor, w: Tensor, op: str, temperature: float, empty: float) -> Tensor:
    if op == "count":
        return w.sum()
    if op == "sum":
        return (w * x).sum()
    if not len(x):
        return torch.tensor(empty, dtype=torch.float64)
    if op == "mean":
        return (w * x).sum() / w.sum()
    if op in ("min", "max"):
        return x[x.argmin() if op == "min" else x.argmax()]
    if op in ("first", "last"):
        return x[0 if op == "first" else -1]
    if op == "mean-exp":
        return (w * x.exp()).sum() / w.sum()
    if op == "logsumexp":
        return (x + w.log()).logsumexp(0)
    p = _soft_weights(x, w, temperature)
    return torch.where(p == 0, 0.0, p * x).sum()


def _soft_weights(x: Tensor, w: Tensor, temperature: float) -> Tensor:
    """Of softmin; those of -inf share everything."""
    lowest = x == -torch.inf
    return (-x / temperature + w.log()).softmax(0) if not lowest.any() else w * lowest / (w * lowest).sum()


def segment_adjoint(
    values: Tensor,
    x: Tensor | None,
    ids: Tensor | None,
    *,
    op: str = "sum",
    weights: Tensor | None = None,
    temperature: float = 1.0,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The reduction's derivative for x times values [B, S], in float64: for linear ops, the values on their tokens."""
    like = next(t for t in (x, ids, weights) if t is not None)
    points = torch.zeros(like.shape, dtype=torch.float64) if x is None else x.double()
    flat, out, w = points.reshape(-1), torch.zeros(like.numel(), dtype=torch.float64), _weights(like, weights)
    upstream = values.double()
    for b, row in enumerate(_tokens(like, ids, w, values.shape[1], cu_seqlens)):
        for s, own in enumerate(row):
            if len(own):
                out[own] = upstream[b, s] * _derivatives(flat[own], w[own], op, temperature)
    return out.reshape(like.shape)


def _derivatives(x: Tensor, w: Tensor, op: str, temperature: float) -> Tensor:
    """Of _reduce for each token."""
    if op == "count":
        return torch.zeros_like(x)
    if op == "sum":
        return w
    if op == "mean":
        return w / w.sum()
    if op in ("first", "last", "min", "max"):
        chosen = {"first": 0, "last": len(x) - 1, "min": int(x.argmin()), "max": int(x.argmax())}[op]
        return torch.nn.functional.one_hot(torch.tensor(chosen), len(x)).double()
    if op == "mean-exp":
        return w * x.exp() / w.sum()
    if op == "logsumexp":
        return (x + w.log()).softmax(0)
    p = _soft_weights(x, w, temperature)
    soft = torch.where(p == 0, 0.0, p * x).sum()
    return torch.where(p == 0, 0.0, p * (1 - torch.where(x == soft, 0.0, x - soft) / temperature))


def scatter_rewards(
    values: Tensor,
    ids: Tensor | None,
    *,
    place: str = "end",
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """[B, T] in float64, differentiable for values [B, S]; arguments as fastreward's."""
    like = next(t for t in (ids, mask) if t is not None)
    out = torch.zeros(like.numel(), dtype=torch.float64)
    w = _weights(like, None if mask is None else mask != 0)
    for b, row in enumerate(_tokens(like, ids, w, values.shape[1], cu_seqlens)):
        for s, own in enumerate(row):
            if len(own):
                at = {"end": own[-1:], "start": own[:1]}.get(place, own)
                share = values[b, s].double() / (len(own) if place == "spread" else 1)
                out = out.index_put((at,), share.expand(len(at)))
    return out.reshape(like.shape)


def _rows(tokens: Tensor, cu_seqlens: Tensor | None) -> Iterator[tuple[int, int]]:
    """(begin, end) of each row in the flat tokens."""
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        yield from itertools.pairwise(bounds)
        return
    for b in range(tokens.shape[0]):
        yield b * tokens.shape[1], (b + 1) * tokens.shape[1]


def _weights(like: Tensor, weights: Tensor | None) -> Tensor:
    return torch.ones(like.numel()).double() if weights is None else weights.cpu().double().reshape(-1)


def _tokens(
    like: Tensor, ids: Tensor | None, w: Tensor, segments: int, cu_seqlens: Tensor | None
) -> Iterator[list[Tensor]]:
    """For each row the tokens of its segments, by flat index, those of weight 0 left out."""
    own = torch.zeros(like.numel(), dtype=torch.int64) if ids is None else ids.cpu().reshape(-1).long()
    for begin, end in _rows(like, cu_seqlens):
        counted = [t for t in range(begin, end) if w[t] != 0]
        by: dict[int, list[int]] = {}
        for t in counted:
            by.setdefault(int(own[t]), []).append(t)
        yield [torch.tensor(by.get(s, []), dtype=torch.int64) for s in range(segments)]


# ----------------------------------------------------------------------------------------------------------- raw form
class _Options(Protocol):
    """The fields of fastreward's SegmentOptions read here (the reference imports nothing but torch)."""

    @property
    def op(self) -> str: ...
    @property
    def temperature(self) -> float | Tensor: ...
    @property
    def empty(self) -> float | Tensor: ...


def ids(
    mask: Tensor | None, labels: Tensor | None, marks: Tensor | None, tail: bool, cu_seqlens: Tensor | None
) -> Tensor:
    """Raw form: each token's segment, i32."""
    like = next(x for x in (marks, labels, mask) if x is not None)
    return segment_ids(mask, labels, marks, tail, cu_seqlens).to(like.device)


def reduce(
    x: Tensor,
    segment_ids: Tensor | None,
    weights: Tensor | None,
    cu_seqlens: Tensor | None,
    segments: int,
    options: _Options,
    checked: bool,
) -> Tensor:
    """Raw form: f32 [B, segments]."""
    out = segment_reduce(
        x.detach().cpu(), segment_ids, op=options.op, weights=weights, num_segments=segments,
        temperature=float(options.temperature), empty=float(options.empty), cu_seqlens=cu_seqlens,
    )  # fmt: skip
    return out.float().to(x.device)


def adjoint(
    values: Tensor,
    x: Tensor | None,
    segment_ids: Tensor | None,
    weights: Tensor | None,
    cu_seqlens: Tensor | None,
    options: _Options,
    out: Tensor,
) -> None:
    """Raw form: into `out`."""
    found = segment_adjoint(
        values.detach().cpu(), None if x is None else x.detach().cpu(), segment_ids, op=options.op, weights=weights,
        temperature=float(options.temperature), cu_seqlens=cu_seqlens,
    )  # fmt: skip
    out.copy_(found)
