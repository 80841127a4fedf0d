"""The same tokens padded left or right, packed, transposed, masked, in any integers: the same PrefixTree."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from criterion import MASK_DTYPES
from drawn_tree import DRAWN, LEAF_VALUES, padded, tree_of
from prefix_tree_checks import (
    branches_of,
    random_batch,
    same_tree,
)

from fastreward import PrefixTree
from fastreward._arguments.options import TOKEN_OPS
from fastreward._runtime.layout import NODES, ROWS
from fastreward.reference import prefix_tree as reference


def test_the_reference_has_the_layout_of_all_backends() -> None:
    assert reference.NODES == NODES
    assert reference.ROWS == ROWS


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.uint32])
def test_tokens_of_any_integers(dtype: torch.dtype) -> None:
    top = min(torch.iinfo(dtype).max, 2**31 - 1)
    tokens = torch.tensor([[top, top - 1, 0], [top, top - 1, 1], [top - 1, top, 0]])
    same_tree(PrefixTree(tokens.to(dtype)), PrefixTree(tokens))


def test_large_and_negative_ids_stay_apart() -> None:
    """Ids that agree in their lower 32 bits, or in their hash's."""
    ids = torch.tensor([0, 2**32, -(2**32), 2**63 - 1, -(2**63), 2**31 - 1, -1, 2**31])
    tree = PrefixTree(ids.unsqueeze(1))
    assert tree.num_nodes == 1 + len(ids)
    assert tree.leaf.tolist() == list(range(1, 9))


@pytest.mark.parametrize("dtype", MASK_DTYPES)
def test_masks_of_any_dtype(dtype: torch.dtype) -> None:
    r = random.Random(3)
    tokens = torch.tensor([[r.randrange(2) for _ in range(9)] for _ in range(12)])
    mask = torch.rand(12, 9) < 0.5
    for name in ("mask", "attention_mask"):
        tree, same = (PrefixTree(tokens, **{name: m}) for m in (mask, mask.to(dtype)))
        same_tree(same, tree)
        values = torch.randn(tree.num_nodes)
        assert torch.equal(same.to_tokens(values), tree.to_tokens(values))
        x = torch.randn(12, 9)
        for op in TOKEN_OPS:
            assert torch.equal(same.from_tokens(x, op), tree.from_tokens(x, op))


def test_left_padding() -> None:
    """A prompt that ends at column 4 and its response: the same tree as without the padding."""
    prompts, responses = [[1, 2], [1, 2, 3], [1]], [[4, 5], [4, 5, 6], [7]]
    rows = [p + a for p, a in zip(prompts, responses, strict=True)]
    tokens, attention, mask = (torch.zeros(3, 7, dtype=torch.int64) for _ in range(3))
    for b, (p, a) in enumerate(zip(prompts, responses, strict=True)):
        tokens[b, 3 - len(p) : 3 + len(a)] = torch.tensor(rows[b])
        attention[b, 3 - len(p) : 3 + len(a)] = 1
        mask[b, 3 : 3 + len(a)] = 1
    tree, plain = PrefixTree(tokens, mask, attention_mask=attention), tree_of(rows)
    for name in ("parent", "edge_length", "leaf", "lengths", "count"):
        assert torch.equal(getattr(tree, name), getattr(plain, name)), name
    inside = attention != 0
    assert torch.equal(tree.node_of_token[inside], plain.node_of_token[plain.node_of_token >= 0])
    assert (tree.node_of_token[~inside] == -1).all()
    assert torch.equal(tree.to_tokens(torch.ones(tree.num_nodes)), mask.float())


def test_packed_tokens_are_the_padded_ones() -> None:
    tokens, lengths = padded(DRAWN)
    keep = torch.arange(tokens.shape[1]) < lengths.unsqueeze(1)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    for dtype in (torch.int64, torch.int32):
        tree, packed = tree_of(DRAWN), PrefixTree(tokens[keep], cu_seqlens=offsets.to(dtype))
        assert packed.shape == (15,)
        for name in ("node_of_token", "unique_of_token"):
            assert torch.equal(getattr(packed, name), getattr(tree, name)[keep])
        assert torch.equal(packed.forest.nodes, tree.forest.nodes)
        assert torch.equal(packed.leaf, tree.leaf)
        x = torch.randn(tokens.shape)
        assert torch.equal(packed.from_tokens(x[keep]), tree.from_tokens(x))
        values = torch.randn(5)
        assert torch.equal(packed.to_tokens(values), tree.to_tokens(values)[keep])


def test_lengths_as_a_list() -> None:
    tokens, lengths = padded(DRAWN)
    same_tree(PrefixTree(tokens, lengths=lengths.tolist()), tree_of(DRAWN))


def test_transposed_memory() -> None:
    tokens, lengths = padded(DRAWN)
    same_tree(PrefixTree(tokens.t().contiguous().t(), lengths=lengths), tree_of(DRAWN))


def test_branches_of_a_tree_give_the_tree() -> None:
    for seed in range(20):
        batch = random_batch(random.Random(seed), 20, 6)
        tree = PrefixTree(batch["tokens"])
        same_tree(PrefixTree.from_branches(**branches_of(tree), mask=torch.ones(tree.shape)), tree)


def test_numpy() -> None:
    tokens, lengths = padded(DRAWN)
    tree = PrefixTree(tokens.numpy(), lengths=lengths.numpy())
    same_tree(tree, tree_of(DRAWN))
    values = tree.aggregate(LEAF_VALUES.numpy())
    assert isinstance(values, np.ndarray)
    assert values.dtype == np.float32
    advantages = tree.advantages(values)
    assert isinstance(advantages, np.ndarray)
    assert isinstance(tree.to_tokens(advantages), np.ndarray)
    assert isinstance(tree.propagate(values, 0.0), np.ndarray)
    unique = tree.from_tokens(np.ones((6, 4)))
    assert unique.dtype == np.float64
    assert isinstance(tree.unique_to_tokens(unique), np.ndarray)
    branches = {name: x.numpy() for name, x in branches_of(tree).items()}
    same_tree(PrefixTree.from_branches(**branches), tree)
    PrefixTree.from_paths(
        np.array([[0, 1], [0, -1]]), segment_ids=np.array([[0, 1, 1], [0, 0, -1]]), mask=np.ones((2, 3))
    )
