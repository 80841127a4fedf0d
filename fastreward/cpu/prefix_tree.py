"""CPU backend of `prefix_tree`: tensors to pointers for csrc/cpu/prefix_tree/. Inputs are validated already."""

from __future__ import annotations

import torch
from torch import Tensor

from fastreward import _core
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
from fastreward._runtime.addresses import address, mask_arguments
from fastreward._runtime.layout import NODES, ROWS
from fastreward._runtime.memory import empty

_Forest = tuple[int, int, int, int, int, int]


def lengths(mask: Tensor, extents: Tensor, starts: Tensor | None) -> Tensor:
    """Tokens from each row's start to its last valid one, i64 [B]; extents i64 [B + 1], starts i64 [B]."""
    out = extents.new_empty(extents.shape[0] - 1)
    _core.prefix_tree_lengths(
        *mask_arguments(mask), address(extents), address(starts), len(out), address(out), torch.get_num_threads()
    )
    return out


def starts(mask: Tensor, extents: Tensor) -> Tensor:
    """Flat index of each row's first valid token, i64 [B]; where its extent begins if there is none."""
    out = extents.new_empty(extents.shape[0] - 1)
    _core.prefix_tree_starts(*mask_arguments(mask), address(extents), len(out), address(out), torch.get_num_threads())
    return out


def build(
    tokens: Tensor | None,  # flat, i64 or i32
    parent_row: Tensor | None,  # [B] i64, or
    branch_position: Tensor | None,  # [B] i64
    starts: Tensor,  # [B] i64
    lengths: Tensor,  # [B] i64
    group: Tensor,  # [B] i64
    ordered_groups: bool,
    compress: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """nodes i64 [F, nodes], rows i64 [4, B], sizes i64 [3]: nodes, groups, unique tokens."""
    rows = torch.empty((len(ROWS), starts.shape[0]), dtype=torch.int64)
    rows[ROWS.index("start")] = starts
    rows[ROWS.index("length")] = lengths
    growth = _core.PrefixTreeGrowth(
        address(tokens),
        tokens is None or tokens.dtype == torch.int64,
        address(parent_row),
        address(branch_position),
        address(group),
        ordered_groups,
        address(rows),
        rows.shape[1],
        compress,
        torch.get_num_threads(),
    )
    if not growth.grown:
        raise ValueError("parent: expected rows that lead to a row without parent (-1), got rows that form a cycle")
    nodes = torch.empty((len(NODES), growth.size), dtype=torch.int64)
    growth.number(address(nodes), growth.size)
    return nodes, rows, torch.tensor([growth.size, growth.groups, growth.tokens])


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
    given = (*_floats(values), address(weights), address(child_weights))
    _core.prefix_tree_aggregate(_forest(nodes, rows), _aggregation(options), *given, *_out(out))
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
    given = (*_floats(values), address(weights), address(child_weights), address(grad))
    _core.prefix_tree_aggregate_backward(_forest(nodes, rows), _aggregation(options), *given, *_out(out))
    return out


def advantages(values: Tensor, nodes: Tensor, rows: Tensor, options: AdvantageOptions) -> Tensor:
    """[nodes] from node values [nodes]; 0 for roots, without a value and with nothing to compare it with."""
    out = torch.empty_like(values)
    flags = (options.scale == "std", options.singleton == "raw")
    how = (TREE_MODES.index(options.mode), *flags, options.ddof, float(options.eps))
    _core.prefix_tree_advantages(_forest(nodes, rows), how, *_floats(values), *_out(out))
    return out


def propagate(scale: Tensor, shift: Tensor, nodes: Tensor, rows: Tensor, rules: Rules) -> Tensor:
    """x[root] = initial, x[n] = clamp(scale[n] * x[parent] + shift[n], low, high); [nodes]."""
    out = torch.empty_like(scale)
    _core.prefix_tree_propagate(_forest(nodes, rows), _numbers(rules), *_floats(scale), address(shift), *_out(out))
    return out


def propagate_backward(
    grad: Tensor, scale: Tensor, shift: Tensor, nodes: Tensor, rows: Tensor, rules: Rules
) -> tuple[Tensor, Tensor]:
    """Gradients for scale and shift; none passes a bound that has cut, nor NaN."""
    grad_scale, grad_shift = torch.empty_like(scale), torch.empty_like(scale)
    grads = (address(grad), address(grad_scale), address(grad_shift))
    forest, threads = _forest(nodes, rows), torch.get_num_threads()
    _core.prefix_tree_propagate_backward(forest, _numbers(rules), *_floats(scale), address(shift), *grads, threads)
    return grad_scale, grad_shift


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
    out = empty((count,), values.dtype)
    where = (_forest(nodes, rows), _span(extents, mask), PLACES.index(place))
    _core.prefix_tree_broadcast_to_tokens(*where, *_floats(values), address(row_values), *_out(out))
    return out


def collect(tokens: Tensor, nodes: Tensor, rows: Tensor, extents: Tensor, mask: Tensor | None, place: Place) -> Tensor:
    """The transpose of broadcast_to_tokens: flat tokens to node values [nodes], summed."""
    out = tokens.new_empty(nodes.shape[1])
    where = (_forest(nodes, rows), _span(extents, mask), PLACES.index(place))
    _core.prefix_tree_collect(*where, *_floats(tokens), *_out(out))
    return out


def gather(unique: Tensor, nodes: Tensor, rows: Tensor, extents: Tensor, mask: Tensor | None, count: int) -> Tensor:
    """Values of unique tokens to flat tokens [count]; 0 outside of the sequences and where masked."""
    out = empty((count,), unique.dtype)
    _core.prefix_tree_gather(_forest(nodes, rows), _span(extents, mask), *_floats(unique), *_out(out))
    return out


def scatter_reduce(
    tokens: Tensor, nodes: Tensor, rows: Tensor, extents: Tensor, mask: Tensor | None, op: TokenOp, unique: int
) -> Tensor:
    """Flat tokens to unique tokens [unique]: sum, mean or first of those that count, 0 where none does."""
    out = empty((unique,), tokens.dtype)
    where = (_forest(nodes, rows), _span(extents, mask), TOKEN_OPS.index(op))
    _core.prefix_tree_scatter_reduce(*where, *_floats(tokens), *_out(out))
    return out


def node_of_token(nodes: Tensor, rows: Tensor, extents: Tensor, count: int) -> Tensor:
    """i32 [count]: each token's node, -1 outside of the sequences."""
    out = empty((count,), torch.int32)
    _core.prefix_tree_node_of_token(_forest(nodes, rows), address(extents), *_out(out))
    return out


def unique_of_token(nodes: Tensor, rows: Tensor, extents: Tensor, count: int) -> Tensor:
    """i64 [count]: each token's unique token, -1 outside of the sequences."""
    out = empty((count,), torch.int64)
    _core.prefix_tree_unique_of_token(_forest(nodes, rows), address(extents), *_out(out))
    return out


def layout(tokens: Tensor, nodes: Tensor, rows: Tensor, unique: int) -> tuple[Tensor, ...]:
    """i64 [unique] each: token id, position, parent (-1: none), end of the subtree, sequences, flat index."""
    out = tuple(empty((unique,), torch.int64) for _ in range(6))
    ids, positions, parent, tout, multiplicity, source = map(address, out)
    given, threads = (address(tokens), tokens.dtype == torch.int64), torch.get_num_threads()
    forest = _forest(nodes, rows, unique)
    _core.prefix_tree_layout(forest, *given, ids, positions, parent, tout, multiplicity, source, threads)
    return out


def bins(nodes: Tensor, rows: Tensor, max_tokens: int, by_rows: bool) -> tuple[Tensor, int]:
    """(bin of each row i64 [B], bins); or bins = -1 - b where row b is longer than max_tokens."""
    out = rows.new_zeros(rows.shape[1])
    return out, _core.prefix_tree_bins(_forest(nodes, rows), max_tokens, by_rows, address(out))


def blocks(tout: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """kv blocks of each q block: counts i32 [n], indices i32 [n, n] of partial ones, then of full ones."""
    n = -(-tout.shape[0] // block)
    counts, full_counts = torch.empty(n, dtype=torch.int32), torch.empty(n, dtype=torch.int32)
    indices, full_indices = torch.zeros((n, n), dtype=torch.int32), torch.zeros((n, n), dtype=torch.int32)
    lists = (address(counts), address(indices), address(full_counts), address(full_indices))
    _core.prefix_tree_blocks(address(tout), tout.shape[0], block, *lists)
    return counts, indices, full_counts, full_indices


def _forest(nodes: Tensor, rows: Tensor, unique: int = 0) -> _Forest:
    """The fields of a PrefixForest, in the order of the bindings."""
    return address(nodes), nodes.stride(0), nodes.shape[1], address(rows), rows.shape[1], unique


def _span(extents: Tensor, mask: Tensor | None) -> tuple[int, int, int]:
    return address(extents), *mask_arguments(mask)


def _aggregation(o: AggregateOptions) -> tuple[int, bool, bool, float, float]:
    return TREE_OPS.index(o.op), o.over == "children", o.normalized, float(o.scale), float(o.discount)


def _numbers(rules: Rules) -> tuple[float, float, float]:
    initial, low, high = rules
    return float(initial), float(low), float(high)


def _floats(x: Tensor) -> tuple[bool, int]:
    return x.dtype == torch.float64, address(x)


def _out(out: Tensor) -> tuple[int, int]:
    return address(out), torch.get_num_threads()
