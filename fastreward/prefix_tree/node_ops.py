"""The custom ops on values of nodes: aggregate, advantages, propagate. They take the forest as those of ops.py do."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastreward._arguments.numbers import joined
from fastreward._arguments.options import OVERS, TREE_MODES, TREE_OPS, AdvantageOptions, AggregateOptions, Rules
from fastreward._runtime.custom_op import custom_op
from fastreward.prefix_tree.ops import kernels_of


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
    out: Tensor = kernels_of(backend).aggregate(values, weights, child_weights, nodes, rows, options)
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
    out: Tensor = kernels_of(backend).aggregate_backward(grad, values, weights, child_weights, nodes, rows, options)
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
    out: Tensor = kernels_of(backend).advantages(values, nodes, rows, options)
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
    out: Tensor = kernels_of(backend).propagate(scale, shift, nodes, rows, rules)
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
    grad_scale, grad_shift = kernels_of(backend).propagate_backward(grad, scale, shift, nodes, rows, rules)
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
) -> Rules:
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
