"""Raw functions of segments on CUDA tensors. The kernels: csrc/cuda/segments.cu."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from fastreward._arguments.options import INTEGER_KINDS, MARK_KINDS, SEGMENT_OPS, WEIGHT_KINDS, SegmentOptions
from fastreward.cuda._launch import launch, pack

_SOURCE: Final = "segments"
# As in the source.
_THREADS: Final = 256
_WARPS: Final = 8
#: Blocks of packed rows together, whose lengths the host does not know.
_BLOCKS: Final = 4224
_PER_THREAD: Final = 4  # tokens, of padded rows


def ids(
    mask: Tensor | None, labels: Tensor | None, marks: Tensor | None, tail: bool, cu_seqlens: Tensor | None
) -> Tensor:
    """Each token's segment, i32."""
    like = next(x for x in (marks, labels, mask) if x is not None)
    out = torch.empty(like.shape, dtype=torch.int32, device=like.device)
    rows = _rows(like, cu_seqlens)
    if rows and out.numel():
        arguments = pack(
            mask,
            *_pointer(labels, INTEGER_KINDS),
            *_pointer(marks, MARK_KINDS),
            int(tail),
            like.shape[-1],
            cu_seqlens,
            out,
        )
        launch(_SOURCE, "segments_ids", rows, _THREADS, arguments, like.device)
    return out


def reduce(
    x: Tensor,
    segment_ids: Tensor | None,
    weights: Tensor | None,
    cu_seqlens: Tensor | None,
    segments: int,
    options: SegmentOptions,
    checked: bool,
) -> Tensor:
    """Values of segments, f32 [B, segments]."""
    out = torch.empty((_rows(x, cu_seqlens), segments), dtype=torch.float32, device=x.device)
    _reduce(x, x, segment_ids, weights, cu_seqlens, segments, options, out, None)
    return out


def adjoint(
    values: Tensor,
    x: Tensor | None,
    segment_ids: Tensor | None,
    weights: Tensor | None,
    cu_seqlens: Tensor | None,
    options: SegmentOptions,
    out: Tensor,
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
        _reduce(out, x, segment_ids, weights, cu_seqlens, segments, options, None, state)
    chunks = _chunks(out, cu_seqlens)
    temperature, _, given = _numbers(options)
    arguments = pack(
        values, x, *_pointer(segment_ids, INTEGER_KINDS), *_pointer(weights, WEIGHT_KINDS), out.shape[-1], cu_seqlens,
        rows, segments, chunks, state, SEGMENT_OPS.index(options.op), temperature, given, out,
    )  # fmt: skip
    launch(_SOURCE, "segments_adjoint", rows * chunks, _THREADS, arguments, out.device)


def _reduce(
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
    numbered, tokens = _pointer(segment_ids, INTEGER_KINDS), (like.shape[-1], cu_seqlens, rows, segments)
    spans = None
    if segment_ids is not None:
        spans = torch.zeros((2, rows, segments), dtype=torch.int32, device=like.device)
        chunks = _chunks(like, cu_seqlens)
        launch(
            _SOURCE, "segments_spans", rows * chunks, _THREADS, pack(*numbered, *tokens, chunks, spans), like.device
        )  # fmt: skip
    arguments = pack(
        x, *numbered, *_pointer(weights, WEIGHT_KINDS), *tokens, spans, SEGMENT_OPS.index(options.op),
        *_numbers(options), out, state,
    )  # fmt: skip
    launch(_SOURCE, "segments_reduce", -(-rows * segments // _WARPS), _THREADS, arguments, like.device)


def _numbers(options: SegmentOptions) -> tuple[float, float, Tensor | None]:
    """(temperature, empty; f64 [2] in their place, where the host does not know both)."""
    pair = (options.temperature, options.empty)
    tensors = [x for x in pair if isinstance(x, Tensor)]
    if not tensors:
        return float(pair[0]), float(pair[1]), None
    return 1.0, 0.0, torch.stack([x if isinstance(x, Tensor) else tensors[0].new_full((), x) for x in pair])


def _rows(tokens: Tensor, cu_seqlens: Tensor | None) -> int:
    return tokens.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _chunks(tokens: Tensor, cu_seqlens: Tensor | None) -> int:
    """Blocks of a row."""
    rows = max(_rows(tokens, cu_seqlens), 1)
    if cu_seqlens is None:
        return max(1, -(-tokens.shape[-1] // (_THREADS * _PER_THREAD)))
    return max(1, min(-(-tokens.shape[0] // _THREADS), _BLOCKS // rows))


def _pointer(x: Tensor | None, kinds: dict[torch.dtype, int]) -> tuple[Tensor | None, int]:
    return (None, 0) if x is None else (x, kinds[x.dtype])
