"""Shared parts of the recipes over prefix trees: checked arguments, and values of sequences on their tokens.

Statistics stay float64 until they are handed out: many methods compare values that are equal on paper. A reward of NaN
was not scored: its sequence is in no statistic (the tree's values know that), and `scored` keeps its tokens at 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.groups import GroupIds
from fastreward._arguments.options import Place
from fastreward.group import group_advantages
from fastreward.prefix_tree.tree import PrefixTree
from fastreward.whiten import whiten


def rewards_of(tree: PrefixTree, rewards: Tensor) -> Tensor:
    """[B] float64, a constant: finite, or NaN where a sequence was not scored."""
    return _checked(tree, rewards, "rewards", "sequence", unscored=True)


def per_row(tree: PrefixTree, values: Tensor, name: str) -> Tensor:
    """[B] float64, a constant; finite."""
    return _checked(tree, values, name, "sequence")


def step_rewards_of(tree: PrefixTree, step_rewards: Tensor) -> Tensor:
    """[nodes] float64, a constant: finite, or NaN where a step was not scored."""
    return _checked(tree, step_rewards, "step_rewards", "node", unscored=True)


def per_node(tree: PrefixTree, values: Tensor, name: str) -> Tensor:
    """[nodes] float64, a constant; finite."""
    return _checked(tree, values, name, "node")


def _checked(tree: PrefixTree, x: Tensor, name: str, per: str, unscored: bool = False) -> Tensor:
    if not isinstance(tree, PrefixTree):
        raise TypeError(f"tree: expected a fastreward.PrefixTree, got {type(tree).__name__}")
    shape = tree.leaf.shape if per == "sequence" else tree.parent.shape
    check.shape(name, check.tensor(name, x), shape, f"one per {per} of the tree")
    check.same_device(name, x, "the tree", tree.leaf)
    x = check.constant(name, x).double()
    if check.values_checked(x):
        expected = "finite numbers, or NaN (not scored)" if unscored else "finite numbers"
        check.every(name, ~x.isinf() if unscored else x.isfinite(), x, expected)
    return x


def scored(rewards: Tensor) -> Tensor:
    """[B]: 0, or NaN without a reward. As row_values it keeps all tokens of such a sequence at 0."""
    return torch.where(rewards.isnan(), torch.nan, 0.0)


def scored_count(tree: PrefixTree, rewards: Tensor) -> Tensor:
    """[nodes] float64: the scored sequences through each node."""
    if check.values_checked(rewards) and not bool(rewards.isnan().any()):
        return tree.count.double()
    return tree.aggregate((~rewards.isnan()).double(), "sum")


def normalized(rewards: Tensor, group_ids: GroupIds | None, **options: Any) -> Tensor:
    """[B] float64: `group_advantages`, NaN where a reward is."""
    return torch.where(rewards.isnan(), torch.nan, group_advantages(rewards, group_ids, **options).double())


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
    """Float32 in the shape of tokens: each node's value on its tokens, plus each sequence's own on all that count.

    What is NaN is not there: a node gives nothing, a sequence gets 0.
    """
    return tree.to_tokens(node_values.float(), place=place, row_values=row_values)


def row_tokens(tree: PrefixTree, row_values: Tensor) -> Tensor:
    """Float32 in the shape of tokens: each sequence's value on its credited tokens, [B] to the shape of tokens."""
    return node_tokens(tree, torch.zeros_like(tree.parent), row_values=row_values)


def credited(tree: PrefixTree, rewards: Tensor) -> Tensor:
    """Bool in the shape of tokens: inside of a scored sequence, and counted by the mask."""
    return node_tokens(tree, torch.ones_like(tree.parent), row_values=scored(rewards)) != 0


def in_last_node(tree: PrefixTree) -> Tensor:
    """Bool in the shape of tokens: in the node where its sequence ends."""
    return tree.node_of_token == beside_tokens(tree, tree.leaf)


def beside_tokens(tree: PrefixTree, row_values: Tensor) -> Tensor:
    """[B] in a shape that broadcasts against the tokens."""
    if len(tree.shape) == 2:
        return row_values.unsqueeze(1)
    return row_values.repeat_interleave(tree.forest.sequences.extents.diff(), output_size=tree.shape[0])


def whitened(advantages: Tensor, counted: Tensor, rewards: Tensor) -> Tensor:
    """Zero mean and unit variance over the valid tokens; as they are (0) where no sequence was scored."""
    if check.values_checked(rewards) and bool(rewards.isnan().all()):
        return advantages
    return whiten(advantages, counted)
