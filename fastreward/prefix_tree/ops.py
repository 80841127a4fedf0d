"""The custom ops that build a forest and lead from nodes to tokens and back (node_ops.py has those on nodes alone).

Each takes the forest as its tensors `nodes` and `rows` (see NODES and ROWS in _runtime/layout.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastreward._arguments.options import PLACES, TOKEN_OPS, Place
from fastreward._runtime.custom_op import custom_op
from fastreward._runtime.dispatch import implementation
from fastreward._runtime.layout import NODES, ROWS
from fastreward._runtime.protocols import PrefixTreeBuildKernels, PrefixTreeKernels


def kernels_of(backend: str) -> PrefixTreeKernels:
    """The raw functions of a backend on values."""
    return implementation("prefix_tree", backend)


def builders_of(backend: str) -> PrefixTreeBuildKernels:
    """Those that build and pack."""
    return implementation("prefix_tree_build", backend)


# ------------------------------------------------------------------------------------------------------------- build
@custom_op("prefix_tree_build")
def build(
    tokens: Tensor | None,  # flat i64 or i32, or
    parent_row: Tensor | None,  # [B] i64
    branch_position: Tensor | None,  # [B] i64
    extents: Tensor,  # [B + 1] i64
    first: Tensor | None,  # flat mask: where a sequence begins, if not with its row
    last: Tensor | None,  # flat mask: where it ends, if not with its row
    lengths: Tensor | None,  # [B] i64, instead of last
    group: Tensor,  # [B] i64
    ordered_groups: bool,
    compress: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # nodes i64 [F, nodes], rows i64 [4, B], sizes i64 [3]
    kernels = builders_of(backend)
    starts = extents[:-1].contiguous() if first is None else kernels.starts(first, extents)
    if lengths is None:
        lengths = extents[1:] - starts if last is None else kernels.lengths(last, extents, starts)
    nodes, rows, sizes = kernels.build(
        tokens, parent_row, branch_position, starts, lengths, group, ordered_groups, compress
    )
    return nodes, rows, sizes


@build.register_fake
def _(tokens: Any, parent_row: Any, branch_position: Any, extents: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    size = torch.library.get_ctx().new_dynamic_size()
    return (
        extents.new_empty((len(NODES), size)),
        extents.new_empty((len(ROWS), extents.shape[0] - 1)),
        extents.new_empty((3,)),
    )


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
    out: Tensor = kernels_of(backend).broadcast_to_tokens(
        values, nodes, rows, extents, mask, _place(place), count, row_values
    )
    return out


@broadcast_to_tokens.register_fake
def _(
    values: Tensor,
    row_values: Any,
    nodes: Tensor,
    rows: Tensor,
    extents: Tensor,
    mask: Any,
    place: str,
    count: int,
    backend: str,
) -> Tensor:
    return values.new_empty((count,))


@custom_op("prefix_tree_collect")
def _collect(
    tokens: Tensor, nodes: Tensor, rows: Tensor, extents: Tensor, mask: Tensor | None, place: str, backend: str
) -> Tensor:  # [nodes]
    out: Tensor = kernels_of(backend).collect(tokens, nodes, rows, extents, mask, _place(place))
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
    out: Tensor = kernels_of(backend).gather(unique, nodes, rows, extents, mask, count)
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
    out: Tensor = kernels_of(backend).scatter_reduce(tokens, nodes, rows, extents, mask, name, unique)
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
    out: Tensor = kernels_of(backend).node_of_token(nodes, rows, extents, count)
    return out


@node_of_token.register_fake
def _(nodes: Tensor, rows: Tensor, extents: Tensor, count: int, backend: str) -> Tensor:
    return nodes.new_empty((count,), dtype=torch.int32)


@custom_op("prefix_tree_unique_of_token")
def unique_of_token(nodes: Tensor, rows: Tensor, extents: Tensor, count: int, backend: str) -> Tensor:  # [count] i64
    out: Tensor = kernels_of(backend).unique_of_token(nodes, rows, extents, count)
    return out


@unique_of_token.register_fake
def _(nodes: Tensor, rows: Tensor, extents: Tensor, count: int, backend: str) -> Tensor:
    return nodes.new_empty((count,))


@custom_op("prefix_tree_layout")
def layout(
    tokens: Tensor, nodes: Tensor, rows: Tensor, unique: int, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # [unique] i64 each
    ids, positions, parent, tout, multiplicity, source = builders_of(backend).layout(tokens, nodes, rows, unique)
    return ids, positions, parent, tout, multiplicity, source


@layout.register_fake
def _(tokens: Tensor, nodes: Tensor, rows: Tensor, unique: int, backend: str) -> tuple[Tensor, ...]:
    return tuple(nodes.new_empty((unique,)) for _ in range(6))
