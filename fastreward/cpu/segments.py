"""CPU backend of `segments`: torch tensors to pointers for csrc/cpu/segments.cpp. Inputs are validated already.

What only a pass over the tokens can see, an illegal id or a NaN that counts, is seen in the pass that does the work.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastreward import _core
from fastreward._arguments import check
from fastreward._arguments.options import INTEGER_KINDS, MARK_KINDS, SEGMENT_OPS, WEIGHT_KINDS, SegmentOptions
from fastreward._runtime.addresses import address
from fastreward._runtime.memory import empty

_ILLEGAL_ID, _NAN = 1, 2


def ids(
    mask: Tensor | None, labels: Tensor | None, marks: Tensor | None, tail: bool, cu_seqlens: Tensor | None
) -> Tensor:
    """Each token's segment, i32."""
    like = next(x for x in (marks, labels, mask) if x is not None)
    out = empty(like.shape, torch.int32)
    _core.segment_ids(
        *_rows(like, cu_seqlens), address(mask), *_pointer(labels, INTEGER_KINDS), *_pointer(marks, MARK_KINDS), tail,
        out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
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
    """Segments' values, f32 [B, segments]."""
    rows = _rows(x, cu_seqlens)
    out = torch.empty((rows[0], segments), dtype=torch.float32, device="cpu")
    fault = _core.segment_reduce(
        *rows, segments, address(x), *_pointer(segment_ids, INTEGER_KINDS), *_pointer(weights, WEIGHT_KINDS),
        SEGMENT_OPS.index(options.op), float(options.temperature), float(options.empty), out.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    if fault & _ILLEGAL_ID and segment_ids is not None:
        check.segment_ids("segment_ids", segment_ids, segments)
    if fault & _NAN and checked:
        _refuse_nan(x, segment_ids, weights)
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
    rows, segments = _rows(out, cu_seqlens), values.shape[1]
    fault = _core.segment_adjoint(
        *rows, segments, address(x), *_pointer(segment_ids, INTEGER_KINDS), *_pointer(weights, WEIGHT_KINDS),
        SEGMENT_OPS.index(options.op), float(options.temperature), address(values), out.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    if fault and segment_ids is not None:
        check.segment_ids("segment_ids", segment_ids, segments)


def _rows(tokens: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int, int]:
    """(rows, columns, address of bounds)."""
    if cu_seqlens is None:
        return tokens.shape[0], tokens.shape[1], 0
    return cu_seqlens.shape[0] - 1, 0, cu_seqlens.data_ptr()


def _pointer(x: Tensor | None, kinds: dict[torch.dtype, int]) -> tuple[int, int]:
    return (0, 0) if x is None else (x.data_ptr(), kinds[x.dtype])


def _refuse_nan(x: Tensor, segment_ids: Tensor | None, weights: Tensor | None) -> None:
    counted = torch.ones_like(x, dtype=torch.bool)
    counted = counted if segment_ids is None else segment_ids >= 0
    counted = counted if weights is None else counted & (weights != 0)
    check.every("x", ~x.isnan() | ~counted, x, "numbers where a segment counts")
    raise ValueError("x: expected values whose sum is a number, got infinities of both signs in one segment")
