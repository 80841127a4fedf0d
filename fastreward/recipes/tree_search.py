"""Credit and values from trees that a search has grown (MCTS and its variants); see `fastreward.recipes.tree`."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.options import TreeOp
from fastreward.prefix_tree.tree import PrefixTree
from fastreward.recipes._catalogue.registry import recipe
from fastreward.recipes._shared.tree import (
    group_of,
    labelled,
    node_tokens,
    of_parent,
    per_node,
    per_row,
    rewards_of,
    row_tokens,
    scored,
    scored_count,
)

__all__ = ["diffusion_tree", "mcts_step_values", "propa", "rest_mcts", "tree_opo", "treerl"]


# ------------------------------------------------------------------------------------------------------------- TreeRL
@recipe("TreeRL (on-policy tree search)", "arXiv 2506.11902", code="THUDM/TreeRL tree_node.py, parallel_mcts.py")
def treerl(
    tree: PrefixTree,
    rewards: Tensor,
    *,
    reward: Literal["pure", "state_value", "value_only", "mix_all_ancestors"] = "pure",
    overall_norm: Literal["token", "step", "none"] = "token",
    reweight: Literal["none", "sqrt", "uniform"] = "none",
    selected: Tensor | None = None,
    average_one_generation: bool = False,
    fill_in: bool = True,
) -> Tensor:
    """A = V(n) - V(p), V the mean below of R - mean of the group's other R, minus its mean over the tree's tokens.

    Args:
        tree: a group for each search tree.
        rewards: [B].
        reward: "pure" V(n) - V(p); "state_value" that plus V(n); "value_only" V(n); "mix_all_ancestors" the mean of
            V(n) - V(a) over the ancestors a.
        overall_norm: the mean that is taken off every V is over "token" or "step" (nodes), weighted by the sequences
            through them; "none": none is.
        reweight: V(n) divided by the square root of the selected sequences through n ("sqrt"), or by their number
            ("uniform").
        selected: bool [B], the sequences that are trained on, for reweight; None: all.
        average_one_generation: V is the mean of the children's instead. (overall_norm then takes off the mean times
            the sequences through the node, as the code does.)
        fill_in: a node with V(n) = V(p) (to 1e-8) has V(n) - V(p) of the node above it, unless that is the root.

    Defaults are the functions' own. Its 14B run (scripts/treerl-qw14b.sh, as others quote it) has reward="state_value",
    overall_norm="none", reweight="sqrt". The variants "chain" and "orm", which add a terminal's value, are not here.
    """
    check.choice("reward", reward, ("pure", "state_value", "value_only", "mix_all_ancestors"))
    check.choice("overall_norm", overall_norm, ("token", "step", "none"))
    check.choice("reweight", reweight, ("none", "sqrt", "uniform"))
    if selected is not None and reweight == "none":
        raise ValueError("selected: needs reweight='sqrt' or 'uniform', which count them")
    outcomes = rewards_of(tree, rewards)
    count = scored_count(tree, outcomes)
    leaves, there = _against_others(tree, outcomes, count), scored(outcomes)
    if average_one_generation:
        total, divisor = tree.aggregate(leaves, over="children"), torch.ones_like(count)
    else:
        total, divisor = tree.aggregate(leaves, "sum"), count
    if overall_norm != "none":
        total = total - _overall_mean(tree, total, count, overall_norm) * count
    if reweight != "none":
        chosen = count if selected is None else tree.aggregate(_flags(tree, selected) + there, "sum")
        chosen = torch.where(chosen > 0, chosen, 1.0)
        total = total / (chosen.sqrt() if reweight == "sqrt" else chosen)
    values = total / divisor
    if reward == "value_only":
        return node_tokens(tree, values, row_values=there)
    if reward == "mix_all_ancestors":
        return node_tokens(tree, tree.advantages(values, "all-ancestors"), row_values=there)
    difference = tree.advantages(values, "td")
    if fill_in:
        difference = _filled(tree, difference)
    return node_tokens(tree, difference + values if reward == "state_value" else difference, row_values=there)


def _against_others(tree: PrefixTree, rewards: Tensor, count: Tensor) -> Tensor:
    """R minus the mean of the others of the tree; float64, as `fill_in` looks for differences of 0."""
    root = group_of(tree)
    others, total = count[root], tree.aggregate(rewards, "sum")[root]
    return (rewards * others - total) / (others - 1).clamp(min=1)


def _overall_mean(tree: PrefixTree, total: Tensor, count: Tensor, level: str) -> Tensor:
    """[nodes]: sum of a tree's totals over that of its counts, both times the node's tokens with level "token"."""
    size = tree.edge_length.double() if level == "token" else torch.ones_like(total)
    nodes = labelled(tree.root)
    present = torch.where(count > 0, total, 0.0)  # nothing scored below, or a place of a GPU without a node
    summed, counted = (nodes.aggregate(x * size, "sum")[nodes.leaf] for x in (present, count))
    return summed / torch.where(counted > 0, counted, 1.0)


def _filled(tree: PrefixTree, difference: Tensor) -> Tensor:
    keeps = difference.abs() >= 1e-8
    return tree.propagate((~keeps).double(), torch.where(keeps, difference, 0.0))


def _flags(tree: PrefixTree, selected: Tensor) -> Tensor:
    return per_row(tree, selected != 0 if isinstance(selected, Tensor) else selected, "selected")


# --------------------------------------------------------------------------------------------------------------- MCTS
@recipe(
    "PROPA (process-level reasoning optimization with interleaved policy alignment)",
    "arXiv 2511.10279",
    code="YanbeiJiang/PROPA create_GRPO_train_intern.py for x; its normalisation is assumed to be ms-swift's GRPO",
)
def propa(
    tree: PrefixTree,
    rewards: Tensor,
    *,
    visits: Tensor | None = None,
    boost: float | None = 10.0,
    min_range: float = 0.1,
    ddof: int = 1,
    eps: float = 1e-4,
) -> Tensor:
    """A = (x - mean) / (std + eps) over the siblings, x = log(1 + 10 V) / log(11), V = value / visits in [0, 1].

    Siblings whose x are within less than min_range of each other get 0.

    Args:
        tree: of steps (`PrefixTree.from_paths`).
        rewards: [B], the mean reward of the rollouts that ended as this sequence did.
        visits: [B], how many these were; None: 1. A node without any has V = 0.
        boost: the 10 of the formula; None: x = V.
        ddof, eps: ms-swift's, which is assumed to be the trainer.
    """
    outcomes = rewards_of(tree, rewards)
    counts = None if visits is None else _not_negative(per_row(tree, visits, "visits"), "visits")
    labels = tree.aggregate(outcomes, weights=counts)
    if counts is not None:  # no visits: 0 / 0
        labels = torch.where(scored_count(tree, outcomes) > 0, labels.nan_to_num(0.0), labels)
    if boost is not None:
        boost = check.positive("boost", boost)
        labels = torch.log1p(boost * labels.clamp(0.0, 1.0)) / math.log1p(boost)
    told_apart = of_parent(tree, _children_range(tree, labels)) >= min_range
    advantages = tree.advantages(labels, "sibling", ddof=ddof, eps=eps)
    return node_tokens(tree, torch.where(told_apart, advantages, 0.0), row_values=scored(outcomes))


def _children_range(tree: PrefixTree, node_values: Tensor) -> Tensor:
    """[nodes]: the largest difference between children that have a value, -inf where there are none."""
    to, has = tree.parent.clamp(min=0), (tree.parent >= 0) & ~node_values.isnan()
    low = torch.full_like(node_values, torch.inf)
    high = -low
    low = low.scatter_reduce(0, to, torch.where(has, node_values, torch.inf), "amin")
    return high.scatter_reduce(0, to, torch.where(has, node_values, -torch.inf), "amax") - low


def _not_negative(x: Tensor, name: str) -> Tensor:
    if check.values_checked(x):
        check.every(name, x >= 0, x, "numbers >= 0")
    return x


@recipe("ReST-MCTS* values", "arXiv 2406.03816", code="THUDM/ReST-MCTS MCTS/base.py", returns="values")
def rest_mcts(tree: PrefixTree, rewards: Tensor) -> Tensor:
    """V(n) = max(0, V(p) + (1 - V(p)) h / m), V(root) = 0, h = 1 where a correct answer lies below, else -1.

    m = steps (nodes) from n to the nearest correct end, n included; where none lies below, that of the nearest node
    above with one. R > 0 is correct. In a tree without a correct answer every value is 0. Targets for a value model, a
    step's on all of its tokens. Not here: the simple variant, along one final route.
    """
    outcomes = rewards_of(tree, rewards)
    correct = outcomes > 0
    ends = torch.where(correct, tree.depth[tree.leaf].double(), torch.inf)
    steps = tree.aggregate(ends, "min") - tree.depth + 1
    below = steps.isfinite()
    # A recurrence begins with one number for all roots; what a root would hand down is put on its children.
    known = below | (tree.depth <= 1)
    own = torch.where(below, steps, steps[tree.root])
    nearest = tree.propagate((~known).double(), torch.where(known, own, 0.0))
    gain = torch.where(below, 1.0, -1.0) / nearest
    return node_tokens(tree, tree.propagate(1.0 - gain, gain, low=0.0), row_values=scored(outcomes))


@recipe(
    "Step values from MCTS visits",
    "arXiv 2406.03816",
    code="THUDM/ReST-MCTS MCTS/mcts.py `back_propagate`; its PRM variant in MCTS/base.py",
    passes=("visits=node_visits",),
    returns="values",
)
def mcts_step_values(
    tree: PrefixTree, rewards: Tensor, visits: Tensor | None = None, *, backup: Literal["mean", "max"] = "mean"
) -> Tensor:
    """V(n) = mean of the children's V, weighted by their visits; at an end, R.

    Args:
        tree: of steps (`PrefixTree.from_paths`).
        rewards: [B], the value of each end. A sequence that ends at an inner node is one more child, with one visit.
        visits: [nodes], above 0 (leave out what was never visited; those of roots are not read); None: the sequences
            through each node, with which V is the mean over all of them.
        backup: "max": the largest of the children's instead (for process reward models).
    """
    check.choice("backup", backup, ("mean", "max"))
    ends = rewards_of(tree, rewards)
    counts = scored_count(tree, ends) if visits is None else per_node(tree, visits, "visits")
    if visits is not None and check.values_checked(visits):
        check.every("visits", (counts > 0) | (tree.parent < 0), visits, "numbers above 0")
    if backup == "max":
        values = tree.aggregate(ends, "max")
    else:
        values = tree.aggregate(ends, over="children", child_weights=counts)
    return node_tokens(tree, values, row_values=scored(ends))


@recipe(
    "Diffusion tree sampling's soft backup (DTS)",
    "arXiv 2506.20701",
    note='notes on the paper; the form "sum" is a port\'s',
    returns="node values",
)
def diffusion_tree(
    tree: PrefixTree, rewards: Tensor, *, scale: float = 1.0, form: Literal["mean", "sum"] = "mean"
) -> Tensor:
    """V(n) = log(mean of exp(scale V(child))) / scale, at an end R; form "sum": without dividing by the children.

    Returns [nodes], by which the search chooses (softmax of scale V over the children); `tree.to_tokens` gives them to
    tokens. NaN where nothing was scored below. scale: the inverse temperature lambda.
    """
    check.choice("form", form, ("mean", "sum"))
    scale = check.positive("scale", scale)
    values = rewards_of(tree, rewards)
    return tree.aggregate(values, "logsumexp", over="children", scale=scale, normalized=form == "mean").float()


@recipe(
    "Tree-OPO (off-policy Monte Carlo tree-guided advantage optimization)",
    "arXiv 2509.09284",
    note="notes on the paper; its details are unverified",
)
def tree_opo(
    tree: PrefixTree, rewards: Tensor, *, baseline: Literal["mean", "max", "min"] = "mean", prefix: Tensor | None = None
) -> Tensor:
    """A = R - V(the prefix that the response continues), V the mean, max or min of R below it.

    The paper's expectation, optimistic and pessimistic baselines; its projection onto the order of the tree, a
    quadratic program, is not here.

    Args:
        tree: of the teacher's prefixes with the responses behind them; mask out the prefixes' tokens.
        rewards: [B].
        prefix: integers [B], the node where each response begins; None: the parent of the node where it ends, which is
            right in a tree of tokens.
    """
    check.choice("baseline", baseline, ("mean", "max", "min"))
    outcomes = rewards_of(tree, rewards)
    if prefix is None:
        prefix = _above_leaf(tree)
    else:
        check.integers("prefix", prefix)
        check.shape("prefix", prefix, outcomes.shape, "one per sequence of the tree")
        check.same_device("prefix", prefix, "the tree", tree.leaf)
        if check.values_checked(prefix):
            size = tree.parent.shape[0]
            check.every("prefix", (prefix >= 0) & (prefix < size), prefix, f"nodes in [0, {size})")
    op: TreeOp = baseline
    return row_tokens(tree, outcomes - tree.aggregate(outcomes, op)[prefix.long()])


def _above_leaf(tree: PrefixTree) -> Tensor:
    """[B]: the node above a sequence's last, or the root where it has no tokens."""
    above = tree.parent[tree.leaf]
    return torch.where(above >= 0, above, tree.leaf)
