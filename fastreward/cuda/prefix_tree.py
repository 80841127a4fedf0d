"""Raw functions of prefix trees on CUDA tensors. The kernels: csrc/cuda/prefix_tree.cu. They build no trees."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from fastreward._arguments.options import (
    PLACES,
    TOKEN_OPS,
    TREE_MODES,
    TREE_OPS,
    AdvantageOptions,
    AggregateOptions,
    Place,
    Rules,
    TokenOp,
)
from fastreward.cuda._launch import Member, countable, launch, pack

_SOURCE: Final = "prefix_tree"
# As in the sources.
_THREADS: Final = 128
_NODES: Final = 4
_CHUNK: Final = 1024
_UNIQUE, _NODE, _INDEX = (len(PLACES) + i for i in range(3))


# ----------------------------------------------------------------------------------------------------- values of nodes
def aggregate(
    values: Tensor,  # [B] f32 or f64
    weights: Tensor | None,  # [B] like values
    child_weights: Tensor | None,  # [nodes] like values
    nodes: Tensor,
    rows: Tensor,
    options: AggregateOptions,
) -> Tensor:
    """[nodes], the dtype of values."""
    out = values.new_empty(nodes.shape[1])
    _aggregate(values, weights, child_weights, nodes, rows, options, out=out)
    return out


def aggregate_backward(
    grad: Tensor,  # [nodes]
    values: Tensor,
    weights: Tensor | None,
    child_weights: Tensor | None,
    nodes: Tensor,
    rows: Tensor,
    options: AggregateOptions,
) -> Tensor:
    """Gradient for values, [B]; for mean, sum and logsumexp."""
    out = torch.empty_like(values)
    _aggregate(values, weights, child_weights, nodes, rows, options, torch.empty_like(grad), grad, out)
    return out


def advantages(values: Tensor, nodes: Tensor, rows: Tensor, options: AdvantageOptions) -> Tensor:
    """[nodes] from node values [nodes]; 0 for roots, without a value and with nothing to compare it with."""
    out = torch.empty_like(values)
    flags = (int(options.scale == "std"), int(options.singleton == "raw"))
    mode = TREE_MODES.index(options.mode)
    members = (*_forest(nodes, rows), *_floats(values, out), mode, *flags, options.ddof, *_number(options.eps))
    kernel = "prefix_tree_siblings" if options.mode == "sibling" else "prefix_tree_advantages"
    _launch(kernel, nodes.shape[1], _THREADS, nodes, members)
    return out


def propagate(scale: Tensor, shift: Tensor, nodes: Tensor, rows: Tensor, rules: Rules) -> Tensor:
    """x[root] = initial, x[n] = clamp(scale[n] * x[parent] + shift[n], low, high); [nodes]."""
    out = torch.zeros_like(scale)
    x = scale.new_empty(scale.shape, dtype=torch.float64)
    _launch("prefix_tree_propagate", rows.shape[1], 1, nodes, _recurrence(scale, shift, nodes, rows, rules, x, out))
    return out


def propagate_backward(
    grad: Tensor, scale: Tensor, shift: Tensor, nodes: Tensor, rows: Tensor, rules: Rules
) -> tuple[Tensor, Tensor]:
    """Gradients for scale and shift; none passes a bound that has cut, nor NaN."""
    grad_scale, grad_shift = torch.empty_like(scale), torch.empty_like(scale)
    x, passed = scale.new_empty((2, *scale.shape), dtype=torch.float64)
    back = (grad, passed, _counters(nodes), grad_scale, grad_shift)
    members = _recurrence(scale, shift, nodes, rows, rules, x, torch.empty_like(scale), *back)
    _launch("prefix_tree_propagate", rows.shape[1], 1, nodes, members)
    _launch("prefix_tree_propagate_backward", nodes.shape[1], _THREADS, nodes, members)
    return grad_scale, grad_shift


def _aggregate(
    values: Tensor,
    weights: Tensor | None,
    child_weights: Tensor | None,
    nodes: Tensor,
    rows: Tensor,
    o: AggregateOptions,
    out: Tensor,
    grad: Tensor | None = None,
    grad_values: Tensor | None = None,
) -> None:
    """Values of the nodes into `out` [nodes]; with `grad` also the gradient of `values`, into `grad_values`."""
    places = nodes.shape[1]
    # An extreme of extremes is one of all, so that children make no difference.
    children = o.over == "children" and o.op in ("mean", "sum", "logsumexp")
    totals = values.new_empty((3 if children else 2, places), dtype=torch.float64)
    members = (
        *_forest(nodes, rows), *_floats(values, weights, child_weights), TREE_OPS.index(o.op), int(o.normalized),
        int(children), *_number(o.scale), *_number(o.discount), totals[0], totals[1], totals[2] if children else None,
        _counters(nodes) if children else None, *_floats(out, grad, grad_values),
    )  # fmt: skip
    _launch("prefix_tree_sequences", places, _NODES, nodes, members)
    if children:
        _launch("prefix_tree_children", places, _THREADS, nodes, members)
    if grad is not None:
        _launch("prefix_tree_aggregate_backward", rows.shape[1], _THREADS, nodes, members)


def _recurrence(
    scale: Tensor,
    shift: Tensor,
    nodes: Tensor,
    rows: Tensor,
    rules: Rules,
    x: Tensor,
    out: Tensor,
    grad: Tensor | None = None,
    passed: Tensor | None = None,
    arrived: Tensor | None = None,
    grad_scale: Tensor | None = None,
    grad_shift: Tensor | None = None,
) -> tuple[Member, ...]:
    numbers = [member for rule in rules for member in _number(rule)]
    back = (*_floats(grad), passed, arrived, *_floats(grad_scale, grad_shift))
    return (*_forest(nodes, rows), *_floats(scale, shift), *numbers, x, *_floats(out), *back)


# ---------------------------------------------------------------------------------------------------- nodes and tokens
def broadcast_to_tokens(
    values: Tensor,
    nodes: Tensor,
    rows: Tensor,
    extents: Tensor,
    mask: Tensor | None,
    place: Place,
    count: int,
    row_values: Tensor | None = None,
) -> Tensor:
    """Node values [nodes] to flat tokens [count], to a whole edge or its start or end; 0 where there is no credit.

    row_values [B]: added on every token of a row that gets credit. NaN: the row gets 0, a node adds nothing.
    """
    out = values.new_empty(count)
    return _to_tokens(PLACES.index(place), values, nodes, rows, extents, mask, out, row_values)


def gather(unique: Tensor, nodes: Tensor, rows: Tensor, extents: Tensor, mask: Tensor | None, count: int) -> Tensor:
    """Values of unique tokens to flat tokens [count]; 0 outside of the sequences and where masked."""
    return _to_tokens(_UNIQUE, unique, nodes, rows, extents, mask, unique.new_empty(count))


def node_of_token(nodes: Tensor, rows: Tensor, extents: Tensor, count: int) -> Tensor:
    """i32 [count]: each token's node, -1 outside of the sequences."""
    return _to_tokens(_NODE, None, nodes, rows, extents, None, nodes.new_empty(count, dtype=torch.int32))


def unique_of_token(nodes: Tensor, rows: Tensor, extents: Tensor, count: int) -> Tensor:
    """i64 [count]: each token's unique token, -1 outside of the sequences."""
    return _to_tokens(_INDEX, None, nodes, rows, extents, None, nodes.new_empty(count))


def scatter_reduce(
    tokens: Tensor, nodes: Tensor, rows: Tensor, extents: Tensor, mask: Tensor | None, op: TokenOp, unique: int
) -> Tensor:
    """Flat tokens to unique tokens [unique]: sum, mean or first of those that count, 0 where none does."""
    return _from_tokens(tokens, nodes, rows, mask, TOKEN_OPS.index(op), _UNIQUE, tokens.new_empty(unique))


def collect(tokens: Tensor, nodes: Tensor, rows: Tensor, extents: Tensor, mask: Tensor | None, place: Place) -> Tensor:
    """The transpose of broadcast_to_tokens: flat tokens to node values [nodes], summed."""
    out = tokens.new_empty(nodes.shape[1])
    return _from_tokens(tokens, nodes, rows, mask, TOKEN_OPS.index("sum"), PLACES.index(place), out)


def _to_tokens(
    source: int,
    values: Tensor | None,
    nodes: Tensor,
    rows: Tensor,
    extents: Tensor,
    mask: Tensor | None,
    out: Tensor,
    row_values: Tensor | None = None,
) -> Tensor:
    if rows.shape[1] == 0:
        return out.zero_()
    unique = 0 if values is None else values.shape[0]
    members = (
        *_forest(nodes, rows), extents, *countable(mask), out.shape[0], source, *_floats(values), unique,
        *_floats(row_values), out,
    )  # fmt: skip
    _launch("prefix_tree_to_tokens", out.shape[0], _CHUNK, nodes, members)
    return out


def _from_tokens(
    tokens: Tensor, nodes: Tensor, rows: Tensor, mask: Tensor | None, op: int, target: int, out: Tensor
) -> Tensor:
    """`target`: unique tokens, or one of PLACES, of nodes."""
    if nodes.shape[1] == 0:
        return out.zero_()
    size = out.shape[0]
    given = (*_floats(tokens), *countable(mask), tokens.shape[0])
    members = (*_forest(nodes, rows), *given, op, target, *_floats(out), size)
    if target == _UNIQUE:
        _launch("prefix_tree_to_unique", size, _CHUNK, nodes, members)
    elif target == PLACES.index("broadcast"):
        _launch("prefix_tree_collect", size, _NODES, nodes, members)
    else:
        _launch("prefix_tree_to_ends", size, _THREADS, nodes, members)
    return out


# --------------------------------------------------------------------------------------------------------------- plans
def _launch(kernel: str, size: int, of_block: int, nodes: Tensor, members: tuple[Member, ...]) -> None:
    if size:
        launch(_SOURCE, kernel, -(-size // of_block), _THREADS, pack(*members), nodes.device)


def _forest(nodes: Tensor, rows: Tensor) -> tuple[Member, ...]:
    return nodes, nodes.stride(0), nodes.shape[1], rows, rows.shape[1]


def _floats(*tensors: Tensor | None) -> tuple[Member, ...]:
    """A pointer and a width for each."""
    return tuple(member for x in tensors for member in (x, int(x is not None and x.dtype == torch.float64)))


def _number(x: float | Tensor) -> tuple[Member, float]:
    return (x, 0.0) if isinstance(x, Tensor) else (None, float(x))


def _counters(nodes: Tensor) -> Tensor:
    """Of the children that are ready, one a node; the first kernel of a call sets them to 0."""
    return nodes.new_empty(nodes.shape[1], dtype=torch.int32)
