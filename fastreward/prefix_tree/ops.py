"""The custom ops behind `PrefixTree`: each takes the forest as its tensors `nodes` and `rows` (see _layout.py)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastreward._arguments.numbers import Number, joined
from fastreward._arguments.options import (
    OVERS,
    PLACES,
    TOKEN_OPS,
    TREE_MODES,
    TREE_OPS,
    AdvantageOptions,
    AggregateOptions,
    Place,
)
from fastreward._runtime.custom_op import custom_op
from fastreward._runtime.dispatch import implementation
from fastreward._runtime.layout import NODES, ROWS
from fastreward._runtime.protocols import PrefixTreeKernels


def _kernels(backend: str) -> PrefixTreeKernels:
    return implementation("prefix_tree", backend)


# ------------------------------------------------------------------------------------------------------------- build
@custom_op("prefix_tree_starts")
def starts(mask: Tensor, extents: Tensor, backend: str) -> Tensor:  # [B] i64
    out: Tensor = _kernels(backend).starts(mask, extents)
    return out


@starts.register_fake
def _(mask: Tensor, extents: Tensor, backend: str) -> Tensor:
    return extents.new_empty((extents.shape[0] - 1,))


@custom_op("prefix_tree_lengths")
def lengths(mask: Tensor, extents: Tensor, starts: Tensor, backend: str) -> Tensor:  # [B] i64
    out: Tensor = _kernels(backend).lengths(mask, extents, starts)
    return out


@lengths.register_fake
def _(mask: Tensor, extents: Tensor, starts: Tensor, backend: str) -> Tensor:
    return torch.empty_like(starts)


@custom_op("prefix_tree_build")
def build(
    tokens: Tensor | None,  # flat i64 or i32, or
    parent_row: Tensor | None,  # [B] i64
    branch_position: Tensor | None,  # [B] i64
    starts: Tensor,  # [B] i64
    lengths: Tensor,  # [B] i64
    group: Tensor,  # [B] i64
    ordered_groups: bool,
    compress: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # nodes i64 [F, nodes], rows i64 [4, B], sizes i64 [3]
    nodes, rows, sizes = _kernels(backend).build(
        tokens, parent_row, branch_position, starts, lengths, group, ordered_groups, compress
    )
    return nodes, rows, sizes


@build.register_fake
def _(
    tokens: Tensor | None,
    parent_row: Tensor | None,
    branch_position: Tensor | None,
    starts: Tensor,
    lengths: Tensor,
    group: Tensor,
    ordered_groups: bool,
    compress: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    size = torch.library.get_ctx().new_dynamic_size()
    return (
        starts.new_empty((len(NODES), size)),
        starts.new_empty((len(ROWS), starts.shape[0])),
        starts.new_empty((3,)),
    )


# --------------------------------------------------------------------------------------------------------- aggregate
def _aggregate_options(
    modes: str, scale: float, discount: float, given_scale: Tensor | None, given_discount: Tensor | None, backend: str
) -> AggregateOptions:
    op, over, form = modes.split("|")
    return AggregateOptions(
        next(o for o in TREE_OPS if o == op),
        next(o for o in OVERS if o == over),
        form == "normalized",
        joined(scale, given_scale, backend),
        joined(discount, given_discount, backend),
    )


@custom_op("prefix_tree_aggregate")
def aggregate(
    values: Tensor,  # [B] f32 or f64
    weights: Tensor | None,  # [B]
    child_weights: Tensor | None,  # [nodes]
    nodes: Tensor,
    rows: Tensor,
    modes: str,  # op, over and "normalized" or "", joined by "|"
    scale: float,
    discount: float,
    given_scale: Tensor | None,  # f64 []: instead of scale, where the host does not know it
    given_discount: Tensor | None,
    backend: str,
) -> Tensor:  # [nodes]
    options = _aggregate_options(modes, scale, discount, given_scale, given_discount, backend)
    out: Tensor = _kernels(backend).aggregate(values, weights, child_weights, nodes, rows, options)
    return out


@aggregate.register_fake
def _(values: Tensor, weights: Any, child_weights: Any, nodes: Tensor, *_: Any) -> Tensor:
    return values.new_empty((nodes.shape[1],))


@custom_op("prefix_tree_aggregate_backward")
def _aggregate_backward(
    grad: Tensor,
    values: Tensor,
    weights: Tensor | None,
    child_weights: Tensor | None,
    nodes: Tensor,
    rows: Tensor,
    modes: str,
    scale: float,
    discount: float,
    given_scale: Tensor | None,
    given_discount: Tensor | None,
    backend: str,
) -> Tensor:  # [B]
    options = _aggregate_options(modes, scale, discount, given_scale, given_discount, backend)
    out: Tensor = _kernels(backend).aggregate_backward(grad, values, weights, child_weights, nodes, rows, options)
    return out


@_aggregate_backward.register_fake
def _(grad: Tensor, values: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(values)


_aggregate_backward.refuse_double_backward()


def _aggregate_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5], *inputs[8:10])
    ctx.options, ctx.backend = inputs[5:8], inputs[10]


def _aggregate_gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    *tensors, scale, discount = ctx.saved_tensors
    return _aggregate_backward(grad.contiguous(), *tensors, *ctx.options, scale, discount, ctx.backend), *[None] * 10


aggregate.register_autograd(_aggregate_gradient, setup_context=_aggregate_context)


# -------------------------------------------------------------------------------------------------------- advantages
@custom_op("prefix_tree_advantages")
def advantages(
    values: Tensor,  # [nodes] f32 or f64
    nodes: Tensor,
    rows: Tensor,
    modes: str,  # mode, scale and singleton, joined by "|"
    ddof: int,
    eps: float,
    given_eps: Tensor | None,
    backend: str,
) -> Tensor:  # [nodes]
    mode, scale, singleton = modes.split("|")
    options = AdvantageOptions(
        next(m for m in TREE_MODES if m == mode),
        "std" if scale == "std" else "none",
        ddof,
        joined(eps, given_eps, backend),
        "raw" if singleton == "raw" else "zero",
    )
    out: Tensor = _kernels(backend).advantages(values, nodes, rows, options)
    return out


@advantages.register_fake
def _(values: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(values)


# --------------------------------------------------------------------------------------------------------- propagate
@custom_op("prefix_tree_propagate")
def propagate(
    scale: Tensor,  # [nodes] f32 or f64
    shift: Tensor,  # [nodes]
    nodes: Tensor,
    rows: Tensor,
    initial: float,
    low: float | None,
    high: float | None,
    given_initial: Tensor | None,  # f64 []: instead of initial, low and high, where the host does not know them
    given_low: Tensor | None,
    given_high: Tensor | None,
    backend: str,
) -> Tensor:  # [nodes]
    rules = _propagate_rules(initial, low, high, given_initial, given_low, given_high, backend)
    out: Tensor = _kernels(backend).propagate(scale, shift, nodes, rows, *rules)
    return out


@propagate.register_fake
def _(scale: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(scale)


@custom_op("prefix_tree_propagate_backward")
def _propagate_backward(
    grad: Tensor,
    scale: Tensor,
    shift: Tensor,
    nodes: Tensor,
    rows: Tensor,
    initial: float,
    low: float | None,
    high: float | None,
    given_initial: Tensor | None,
    given_low: Tensor | None,
    given_high: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    rules = _propagate_rules(initial, low, high, given_initial, given_low, given_high, backend)
    grad_scale, grad_shift = _kernels(backend).propagate_backward(grad, scale, shift, nodes, rows, *rules)
    return grad_scale, grad_shift


@_propagate_backward.register_fake
def _(grad: Tensor, scale: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(scale), torch.empty_like(scale)


_propagate_backward.refuse_double_backward()


def _propagate_rules(
    initial: float,
    low: float | None,
    high: float | None,
    given_initial: Tensor | None,
    given_low: Tensor | None,
    given_high: Tensor | None,
    backend: str,
) -> tuple[Number, Number, Number]:
    """The initial value and the bounds, infinite where there are none."""
    return (
        joined(initial, given_initial, backend),
        joined(-math.inf if low is None else low, given_low, backend),
        joined(math.inf if high is None else high, given_high, backend),
    )


def _propagate_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4], *inputs[7:10])
    ctx.options, ctx.backend = inputs[4:7], inputs[10]


def _propagate_gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    *tensors, initial, low, high = ctx.saved_tensors
    args = (*tensors, *ctx.options, initial, low, high, ctx.backend)
    return *_propagate_backward(grad.contiguous(), *args), *[None] * 9


propagate.register_autograd(_propagate_gradient, setup_context=_propagate_context)


# ------------------------------------------------------------------------------------------------ nodes and tokens
@custom_op("prefix_tree_broadcast_to_tokens")
def broadcast_to_tokens(
    values: Tensor,  # [nodes] f32 or f64
    row_values: Tensor | None,  # [B], a constant; NaN: the row gets nothing
    nodes: Tensor,
    rows: Tensor,
    extents: Tensor,  # [B + 1] i64
    mask: Tensor | None,  # flat
    place: str,
    count: int,
    backend: str,
) -> Tensor:  # [count]
    out: Tensor = _kernels(backend).broadcast_to_tokens(
        values, nodes, rows, extents, mask, _place(place), count, row_values
    )
    return out


@broadcast_to_tokens.register_fake
def _(
    values: Tensor,
    row_values: Tensor | None,
    nodes: Tensor,
    rows: Tensor,
    extents: Tensor,
    mask: Tensor | None,
    place: str,
    count: int,
    backend: str,
) -> Tensor:
    return values.new_empty((count,))


@custom_op("prefix_tree_collect")
def _collect(
    tokens: Tensor, nodes: Tensor, rows: Tensor, extents: Tensor, mask: Tensor | None, place: str, backend: str
) -> Tensor:  # [nodes]
    out: Tensor = _kernels(backend).collect(tokens, nodes, rows, extents, mask, _place(place))
    return out


@_collect.register_fake
def _(tokens: Tensor, nodes: Tensor, *_: Any) -> Tensor:
    return tokens.new_empty((nodes.shape[1],))


_collect.refuse_double_backward()


def _place(name: str) -> Place:
    return next(p for p in PLACES if p == name)


def _broadcast_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.place, ctx.backend = inputs[6], inputs[-1]


def _broadcast_gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    values, row_values, *forest, extents, mask = ctx.saved_tensors
    if row_values is not None:
        absent = row_values.isnan().repeat_interleave(extents.diff(), output_size=grad.shape[0])
        grad = torch.where(absent, 0.0, grad)
    collected = _collect(grad.contiguous(), *forest, extents, mask, ctx.place, ctx.backend)
    return torch.where(values.isnan(), 0.0, collected), *[None] * 8


broadcast_to_tokens.register_autograd(_broadcast_gradient, setup_context=_broadcast_context)


# ----------------------------------------------------------------------------------------- unique tokens and tokens
@custom_op("prefix_tree_gather")
def gather(
    unique: Tensor,  # [U] f32 or f64
    nodes: Tensor,
    rows: Tensor,
    extents: Tensor,
    mask: Tensor | None,
    count: int,
    backend: str,
) -> Tensor:  # [count]
    out: Tensor = _kernels(backend).gather(unique, nodes, rows, extents, mask, count)
    return out


@gather.register_fake
def _(unique: Tensor, nodes: Tensor, rows: Tensor, extents: Tensor, mask: Any, count: int, backend: str) -> Tensor:
    return unique.new_empty((count,))


@custom_op("prefix_tree_scatter_reduce")
def scatter_reduce(
    tokens: Tensor,  # flat f32 or f64
    nodes: Tensor,
    rows: Tensor,
    extents: Tensor,
    mask: Tensor | None,
    op: str,
    unique: int,
    backend: str,
) -> Tensor:  # [unique]
    name = next(o for o in TOKEN_OPS if o == op)
    out: Tensor = _kernels(backend).scatter_reduce(tokens, nodes, rows, extents, mask, name, unique)
    return out


@scatter_reduce.register_fake
def _(
    tokens: Tensor, nodes: Tensor, rows: Tensor, extents: Tensor, mask: Any, op: str, unique: int, backend: str
) -> Tensor:
    return tokens.new_empty((unique,))


def _gather_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:5])
    ctx.unique, ctx.backend = inputs[0].shape[0], inputs[-1]


def _gather_gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return scatter_reduce(grad.contiguous(), *ctx.saved_tensors, "sum", ctx.unique, ctx.backend), *[None] * 6


gather.register_autograd(_gather_gradient, setup_context=_gather_context)


def _scatter_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:5])
    ctx.op, ctx.unique, ctx.backend, ctx.count = inputs[5], inputs[6], inputs[7], inputs[0].shape[0]


def _scatter_gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    if ctx.op == "first":
        raise NotImplementedError("from_tokens: op='first' has no gradient; use 'sum' or 'mean'")
    if ctx.op == "mean":
        ones = grad.new_ones(ctx.count)
        grad = grad / scatter_reduce(ones, *ctx.saved_tensors, "sum", ctx.unique, ctx.backend).clamp(min=1)
    return gather(grad.contiguous(), *ctx.saved_tensors, ctx.count, ctx.backend), *[None] * 7


scatter_reduce.register_autograd(_scatter_gradient, setup_context=_scatter_context)


# --------------------------------------------------------------------------------------------------------- constants
@custom_op("prefix_tree_node_of_token")
def node_of_token(nodes: Tensor, rows: Tensor, extents: Tensor, count: int, backend: str) -> Tensor:  # [count] i32
    out: Tensor = _kernels(backend).node_of_token(nodes, rows, extents, count)
    return out


@node_of_token.register_fake
def _(nodes: Tensor, rows: Tensor, extents: Tensor, count: int, backend: str) -> Tensor:
    return nodes.new_empty((count,), dtype=torch.int32)


@custom_op("prefix_tree_unique_of_token")
def unique_of_token(nodes: Tensor, rows: Tensor, extents: Tensor, count: int, backend: str) -> Tensor:  # [count] i64
    out: Tensor = _kernels(backend).unique_of_token(nodes, rows, extents, count)
    return out


@unique_of_token.register_fake
def _(nodes: Tensor, rows: Tensor, extents: Tensor, count: int, backend: str) -> Tensor:
    return nodes.new_empty((count,))


@custom_op("prefix_tree_layout")
def layout(
    tokens: Tensor, nodes: Tensor, rows: Tensor, unique: int, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # [unique] i64 each
    ids, positions, parent, tout, multiplicity, source = _kernels(backend).layout(tokens, nodes, rows, unique)
    return ids, positions, parent, tout, multiplicity, source


@layout.register_fake
def _(tokens: Tensor, nodes: Tensor, rows: Tensor, unique: int, backend: str) -> tuple[Tensor, ...]:
    return tuple(nodes.new_empty((unique,)) for _ in range(6))
