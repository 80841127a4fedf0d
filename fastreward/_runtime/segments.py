"""Custom ops of segments, with their gradients: a reduction's is its adjoint, and the other way round."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from fastreward._arguments.numbers import Number, joined
from fastreward._arguments.options import SEGMENT_OPS, SegmentOptions
from fastreward._arguments.transforms import refuse_double_backward
from fastreward._runtime.custom_op import custom_op
from fastreward._runtime.dispatch import implementation
from fastreward._runtime.memory import empty

#: Reductions whose derivative does not depend on what is reduced.
_LINEAR: Final = ("sum", "mean", "first", "last", "count")


@custom_op("segment_ids")
def ids(
    mask: Tensor | None,  # bool, tokens
    labels: Tensor | None,  # i32 or i64, tokens
    marks: Tensor | None,  # bool or i32, tokens
    tail: bool,
    cu_seqlens: Tensor | None,
    backend: str,
) -> Tensor:  # i32, tokens
    result: Tensor = implementation("segments", backend).ids(mask, labels, marks, tail, cu_seqlens)
    return result


@ids.register_fake
def _(mask: Tensor | None, labels: Tensor | None, marks: Tensor | None, *_: Any) -> Tensor:
    like = next(x for x in (marks, labels, mask) if x is not None)
    return like.new_empty(like.shape, dtype=torch.int32)


@custom_op("segment_reduce")
def reduce(
    x: Tensor,  # f32, tokens
    segment_ids: Tensor | None,  # i32 or i64, tokens; None: all in segment 0
    weights: Tensor | None,  # bool or f32, tokens
    cu_seqlens: Tensor | None,
    segments: int,
    op: str,
    temperature: float,
    given_temperature: Tensor | None,  # f64 []: instead of it, where the host does not know it
    empty_value: float,
    given_empty: Tensor | None,
    checked: bool,
    backend: str,
) -> Tensor:  # f32 [B, segments]
    options = _options(op, joined(temperature, given_temperature, backend), joined(empty_value, given_empty, backend))
    kernels = implementation("segments", backend)
    result: Tensor = kernels.reduce(x, segment_ids, weights, cu_seqlens, segments, options, checked)
    return result


@reduce.register_fake
def _(x: Tensor, segment_ids: Any, weights: Any, cu_seqlens: Tensor | None, segments: int, *_: Any) -> Tensor:
    return x.new_empty((x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1, segments))


@custom_op("segment_adjoint")
def adjoint(
    values: Tensor,  # f32 [B, segments]
    x: Tensor | None,  # f32, tokens; one of these three is there
    segment_ids: Tensor | None,
    weights: Tensor | None,
    cu_seqlens: Tensor | None,
    op: str,
    temperature: float,
    given_temperature: Tensor | None,
    backend: str,
) -> Tensor:  # f32, tokens
    out = empty(_tokens_like(x, segment_ids, weights).shape, torch.float32, values.device)
    options = _options(op, joined(temperature, given_temperature, backend))
    implementation("segments", backend).adjoint(values, x, segment_ids, weights, cu_seqlens, options, out)
    return out


@adjoint.register_fake
def _(values: Tensor, x: Tensor | None, segment_ids: Tensor | None, weights: Tensor | None, *_: Any) -> Tensor:
    return values.new_empty(_tokens_like(x, segment_ids, weights).shape)


@custom_op("segment_scatter_", mutates_args=("out",))
def scatter_(
    values: Tensor,
    segment_ids: Tensor | None,
    weights: Tensor | None,
    cu_seqlens: Tensor | None,
    op: str,
    out: Tensor,
    backend: str,
) -> None:
    implementation("segments", backend).adjoint(values, None, segment_ids, weights, cu_seqlens, _options(op), out)
    torch.autograd.graph.increment_version(out)


@scatter_.register_fake
def _(*_: Any) -> None:
    return None


def _options(op: str, temperature: Number = 1.0, empty_value: Number = 0.0) -> SegmentOptions:
    return SegmentOptions(next(o for o in SEGMENT_OPS if o == op), temperature, empty_value)


def _tokens_like(*tokens: Tensor | None) -> Tensor:
    return next(x for x in tokens if x is not None)


def _reduce_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, segment_ids, weights, cu_seqlens, _, op, temperature, given, *_, backend = inputs
    ctx.save_for_backward(None if op in _LINEAR and segment_ids is not None else x, segment_ids, weights, cu_seqlens)
    ctx.options, ctx.given, ctx.backend = (op, temperature), given, backend


def _reduce_gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    gradient = adjoint(grad.contiguous(), *ctx.saved_tensors, *ctx.options, ctx.given, ctx.backend)
    return gradient, *[None] * 11


def _adjoint_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, _, *tokens, op, _, _, ctx.backend = inputs
    ctx.save_for_backward(*tokens)
    ctx.shape, ctx.op = values.shape, op


def _adjoint_gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    if ctx.op == "count":  # the one adjoint that is 0, whatever the values are
        return grad.new_zeros(ctx.shape), *[None] * 8
    if ctx.op not in _LINEAR:
        refuse_double_backward()
    numbers = (1.0, None, 0.0, None)
    values = reduce(grad.contiguous(), *ctx.saved_tensors, ctx.shape[1], ctx.op, *numbers, False, ctx.backend)
    return values, *[None] * 8


reduce.register_autograd(_reduce_gradient, setup_context=_reduce_context)
adjoint.register_autograd(_adjoint_gradient, setup_context=_adjoint_context)
