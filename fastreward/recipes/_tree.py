"""What the recipes over prefix trees share: checked arguments, and values of sequences on their tokens.

Statistics stay float64 until they are handed out: many methods compare values that are equal on paper.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastreward import PrefixTree, _check
from fastreward import whiten as _whiten
from fastreward._options import Place


def rewards_of(tree: PrefixTree, rewards: Tensor, name: str = "rewards") -> Tensor:
    """[B] float64, a constant; finite, as one NaN would be in every value of its group."""
    if not isinstance(tree, PrefixTree):
        raise TypeError(f"tree: expected a fastreward.PrefixTree, got {type(tree).__name__}")
    _check.shape(name, _check.tensor(name, rewards), (tree.num_rows,), "one per sequence of the tree")
    return _constant(tree, rewards, name)


def per_node(tree: PrefixTree, values: Tensor, name: str) -> Tensor:
    """[nodes] float64, a constant; finite."""
    if not isinstance(tree, PrefixTree):
        raise TypeError(f"tree: expected a fastreward.PrefixTree, got {type(tree).__name__}")
    _check.shape(name, _check.tensor(name, values), tree.parent.shape, "one per node of the tree")
    return _constant(tree, values, name)


def _constant(tree: PrefixTree, x: Tensor, name: str) -> Tensor:
    _check.same_device(name, x, "the tree", tree.leaf)
    if _check.values_checked(x):
        _check.every(name, x.isfinite(), x, "finite numbers")
    return x.detach().double()


def group_of(tree: PrefixTree) -> Tensor:
    """[B]: the root of each sequence, a label of its group."""
    return tree.root[tree.leaf]


def of_parent(tree: PrefixTree, node_values: Tensor) -> Tensor:
    """[nodes]: the value of the node above; a root has that of some node."""
    return node_values[tree.parent.clamp(min=0)]


def labelled(*labels: Tensor) -> PrefixTree:
    """Things that have the same labels, integers [K] each, meet in one node: the `leaf` of each of the K.

    Aggregates of such a tree are those of the things with one label: no sort, no wait for the device, the same bits
    every time.
    """
    return PrefixTree.from_paths(torch.stack(labels, 1))


def node_tokens(
    tree: PrefixTree, node_values: Tensor, place: Place = "broadcast", row_values: Tensor | None = None
) -> Tensor:
    """Float32 in the shape of tokens: each node's value on its tokens, plus each sequence's own on all that count."""
    return tree.to_tokens(node_values.float(), place=place, row_values=row_values)


def row_tokens(tree: PrefixTree, row_values: Tensor) -> Tensor:
    """Float32 in the shape of tokens: each sequence's value on its credited tokens, [B] to the shape of tokens."""
    return node_tokens(tree, torch.zeros_like(tree.parent), row_values=row_values)


def credited(tree: PrefixTree) -> Tensor:
    """Bool in the shape of tokens: inside of a sequence, and counted by the mask."""
    return node_tokens(tree, torch.ones_like(tree.parent)) != 0


def in_last_node(tree: PrefixTree) -> Tensor:
    """Bool in the shape of tokens: in the node where its sequence ends."""
    return tree.node_of_token == beside_tokens(tree, tree.leaf)


def beside_tokens(tree: PrefixTree, row_values: Tensor) -> Tensor:
    """[B] in a shape that broadcasts against the tokens."""
    if len(tree.shape) == 2:
        return row_values.unsqueeze(1)
    return row_values.repeat_interleave(tree._sequences.extents.diff(), output_size=tree.shape[0])


def whitened(tree: PrefixTree, advantages: Tensor) -> Tensor:
    """Zero mean and unit variance over the credited tokens of the batch."""
    return _whiten(advantages, credited(tree))
