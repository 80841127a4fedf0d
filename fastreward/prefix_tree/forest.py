"""The forest that a batch of sequences makes, as the tensors that every operation takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, overload

import torch
from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.numbers import Number, number
from fastreward._arguments.options import TreeOp
from fastreward._runtime.dispatch import Backend, select
from fastreward._runtime.layout import NODES, ROWS
from fastreward.prefix_tree import ops
from fastreward.prefix_tree.sequences import Sequences

T = TypeVar("T")


class computed_once(Generic[T]):
    """functools.cached_property as Python 3.12 has it: without the lock, which torch.compile can't trace."""

    def __init__(self, function: Callable[[Any], T]) -> None:
        self.function, self.__doc__ = function, function.__doc__

    @overload
    def __get__(self, owner: None, kind: type) -> computed_once[T]: ...
    @overload
    def __get__(self, owner: object, kind: type) -> T: ...

    def __get__(self, owner: object | None, kind: type) -> computed_once[T] | T:
        if owner is None:
            return self
        value = self.function(owner)
        setattr(owner, self.function.__name__, value)  # found before this descriptor from now on
        return value


@dataclass(eq=False)
class Forest:
    """Sequences, and the nodes that they make."""

    sequences: Sequences
    nodes: Tensor  # i64 [F, places], see NODES
    rows: Tensor  # i64 [4, B], see ROWS
    sizes: Tensor  # i64 [3]: nodes, groups, unique tokens
    maker: Backend  # which has built it

    @property
    def backend(self) -> Backend:
        """What serves a call on it."""
        return select("prefix_tree", self.nodes, self.maker)

    @property
    def builder(self) -> Backend:
        """What builds a tree out of it, or packs it."""
        return select("prefix_tree_build", self.nodes, self.maker)

    @property
    def places(self) -> int:
        """Places for nodes: as many as there are on the CPU, the most that there can be on a GPU."""
        return self.nodes.shape[1]

    @property
    def unique_places(self) -> int:
        """Places for unique tokens: as many as there are on the CPU, the most that there can be on a GPU."""
        return self.num_tokens if self.nodes.device.type == "cpu" else self.sequences.flat

    @computed_once
    def num_nodes(self) -> int:
        """Nodes, roots included."""
        return self.places if self.nodes.device.type == "cpu" else int(self.sizes[0])

    @computed_once
    def num_groups(self) -> int:
        """Groups."""
        return int(self.sizes[1])

    @computed_once
    def num_tokens(self) -> int:
        """Unique tokens."""
        return int(self.sizes[2])

    def node(self, field: str) -> Tensor:
        """A field of NODES, i64 [places]."""
        return self.nodes[NODES.index(field)]

    def row(self, field: str) -> Tensor:
        """A field of ROWS, i64 [B]."""
        return self.rows[ROWS.index(field)]

    def per_row(self, name: str, x: Tensor) -> Tensor:
        """An argument of a value for each sequence, checked."""
        check.shape(name, check.tensor(name, x), (self.rows.shape[1],), "one per sequence")
        check.same_device(name, x, "the tree", self.rows)
        return check.rewards(name, x).contiguous()

    def per_node(self, name: str, x: Tensor) -> Tensor:
        """An argument of a value for each node, checked."""
        check.shape(name, check.tensor(name, x), (self.places,), "one per node")
        check.same_device(name, x, "the tree", self.nodes)
        return check.rewards(name, x).contiguous()

    def everywhere(self, name: str, x: Number, dtype: torch.dtype) -> Tensor:
        """A number for every node; a 0-d tensor keeps its gradient."""
        value = x if isinstance(x, Tensor) and x.requires_grad else number(name, x, self.nodes, check.finite)
        if not isinstance(value, Tensor):
            return torch.full((self.places,), value, dtype=dtype, device=self.nodes.device)
        return value.to(device=self.nodes.device, dtype=dtype).expand(self.places).contiguous()

    def row_weights(self, weights: Tensor, op: TreeOp) -> Tensor:
        """Weights of sequences, checked."""
        w = check.constant("weights", self.per_row("weights", weights))
        _check_weights("weights", w, op)
        return w

    def child_weights(self, weights: Tensor, op: TreeOp) -> Tensor:
        """Weights of nodes among their siblings, checked; those of roots are not read."""
        w = check.constant("child_weights", self.per_node("child_weights", weights))
        _check_weights("child_weights", torch.where(self.node("parent") < 0, 1.0, w), op)
        return w


def _check_weights(name: str, weights: Tensor, op: TreeOp) -> None:
    if check.values_checked(weights):
        check.every(name, weights.isfinite(), weights, "finite numbers")
        if op == "logsumexp":
            check.every(name, weights >= 0, weights, "numbers >= 0 with op='logsumexp'")


def grow(s: Sequences, backend: Backend, *, compress: bool = True) -> Forest:
    """The forest of sequences; without `compress` each of their tokens is a node."""
    masks = (s.first, s.last, s.lengths)
    nodes, rows, sizes = ops.build(
        s.tokens, s.parent_row, s.branch_position, s.extents, *masks, s.group, s.ordered_groups, compress, backend
    )
    forest = Forest(s, nodes, rows, sizes, backend)
    if forest.sizes.device.type == "cpu" and not torch.compiler.is_compiling():
        _ = forest.num_tokens  # known from now on: a compiled function can't read it off a tensor
    return forest
