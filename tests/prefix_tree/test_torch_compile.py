"""PrefixTree in torch.library's own checks, and compiled in one graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from drawn_tree import DRAWN, LEAF_VALUES, padded, tree_of
from prefix_tree_checks import (
    branches_of,
)
from torch import Tensor

from fastreward import PrefixTree


def test_opcheck() -> None:
    tree = PrefixTree(torch.tensor([[1, 2, 3], [1, 2, 4], [1, 5, 0]]), torch.tensor([[1, 0, 1], [1, 1, 1], [1, 1, 0]]))
    s, ops = tree.forest.sequences, torch.ops.fastreward
    forest = (tree.forest.nodes, tree.forest.rows)
    place = (*forest, s.extents, s.credit)
    rows, nodes, one = torch.randn(3), torch.randn(tree.num_nodes), torch.ones((), dtype=torch.float64)
    flat, unique = torch.randn(9), torch.randn(tree.num_tokens)

    def check(op: Any, *args: Any) -> None:
        torch.library.opcheck(op, args)

    for span in ((None, s.credit, None), (s.credit, s.credit, None), (None, None, tree.lengths), (None, None, None)):
        check(ops.prefix_tree_build, s.tokens, None, None, s.extents, *span, s.group, False, True, "cpu")
    for modes in ("mean|sequences|", "sum|children|", "logsumexp|children|normalized"):
        grad_rows = rows.clone().requires_grad_()
        check(ops.prefix_tree_aggregate, grad_rows, rows.abs(), nodes.abs(), *forest, modes, 2.0, 1.0, None, one, "cpu")
        args = (nodes, rows, rows.abs(), None, *forest, modes, 0.0, 1.0, one, None, "cpu")
        check(ops.prefix_tree_aggregate_backward, *args)
    check(ops.prefix_tree_advantages, nodes, *forest, "sibling|std|zero", 1, 0.0, one, "cpu")
    leaf = nodes.clone().requires_grad_()
    check(ops.prefix_tree_propagate, leaf, nodes.clone().requires_grad_(), *forest, 0.5, None, 1.0, *3 * (None,), "cpu")
    given = (0.5, -1.0, None, None, -one, one)
    check(ops.prefix_tree_propagate_backward, nodes, nodes, nodes, *forest, *given, "cpu")
    check(ops.prefix_tree_broadcast_to_tokens, leaf, rows, *place, "start", 9, "cpu")
    check(ops.prefix_tree_collect, flat, *place, "end", "cpu")
    check(ops.prefix_tree_gather, unique.requires_grad_(), *place, 9, "cpu")
    for op in ("sum", "mean"):
        check(ops.prefix_tree_scatter_reduce, flat.clone().requires_grad_(), *place, op, tree.num_tokens, "cpu")
    check(ops.prefix_tree_node_of_token, *forest, s.extents, 9, "cpu")
    check(ops.prefix_tree_unique_of_token, *forest, s.extents, 9, "cpu")
    check(ops.prefix_tree_layout, s.tokens, *forest, tree.num_tokens, "cpu")


def compiled_in_one_graph(function: Any, *args: Tensor) -> None:
    """Compiled without a break it gives the same."""
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*args), function(*args))


def test_operations_compile_in_one_graph() -> None:
    tree = tree_of(DRAWN)

    def credit(rewards: Tensor) -> Tensor:
        return tree.to_tokens(tree.advantages(tree.aggregate(rewards), "td"))

    def folded(x: Tensor) -> Tensor:
        return tree.unique_to_tokens(tree.from_tokens(x, "mean")) + tree.node_of_token

    compiled_in_one_graph(credit, LEAF_VALUES)
    compiled_in_one_graph(folded, torch.randn(6, 4))


def test_gradients_compile_in_one_graph() -> None:
    tree = tree_of(DRAWN)

    def loss(x: Tensor) -> Tensor:
        return tree.to_tokens(tree.aggregate(x, "logsumexp")).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    x = LEAF_VALUES.clone().requires_grad_()
    assert torch.equal(*(torch.autograd.grad(f(x), x)[0] for f in (compiled, loss)))


@pytest.mark.parametrize("kind", ["lengths", "left-padded", "uids", "paths", "branches"])
def test_building_compiles_in_one_graph(kind: str) -> None:
    tokens, lengths = padded(DRAWN)
    mask = torch.arange(4) < lengths.unsqueeze(1)
    branches = branches_of(tree_of(DRAWN))

    def credit(tokens: Tensor, mask: Tensor, rewards: Tensor) -> Tensor:
        if kind == "lengths":
            tree = PrefixTree(tokens, group_size=6, lengths=lengths)
        elif kind == "left-padded":
            tree = PrefixTree(tokens, mask, attention_mask=mask, ignore_masked=True)
        elif kind == "uids":
            tree = PrefixTree(tokens, mask, ["a", "b", "a", "b", "c", "c"])
        elif kind == "paths":
            tree = PrefixTree.from_paths(tokens, segment_ids=torch.zeros_like(tokens))
        else:
            tree = PrefixTree.from_branches(**branches, mask=mask)
        return tree.to_tokens(tree.advantages(tree.aggregate(rewards), "td"))

    compiled_in_one_graph(credit, tokens, mask, LEAF_VALUES)
