"""PrefixTree on the CPU: trees drawn by hand, the float64 reference, gradients, bits, sizes, messages."""

from __future__ import annotations

import random
import subprocess
import sys
import textwrap
from typing import Any

import numpy as np
import pytest
import torch
from criterion import MASK_DTYPES
from prefix_tree_checks import (
    advantage_modes,
    aggregations,
    both,
    branches_of,
    close,
    random_batch,
    same_tree,
)
from torch import Tensor

import fastreward as fr
from fastreward import PrefixTree
from fastreward._arguments.options import PLACES, TOKEN_OPS
from fastreward._runtime.layout import NODES, ROWS
from fastreward.reference import prefix_tree as reference

INF, NAN = float("inf"), float("nan")


@pytest.fixture(params=["cpu", "reference"])
def _backend(request: pytest.FixtureRequest):
    with fr.backend(request.param):
        yield


def padded(rows: list[list[int]], columns: int | None = None, filler: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens [B, T] and lengths [B]."""
    width = max(map(len, rows), default=0) if columns is None else columns
    tokens = [row + [filler] * (width - len(row)) for row in rows]
    return torch.tensor(tokens).reshape(len(rows), width), torch.tensor([len(row) for row in rows], dtype=torch.int64)


def tree_of(rows: list[list[int]], **options: Any) -> PrefixTree:
    tokens, lengths = padded(rows)
    return PrefixTree(tokens, lengths=lengths, **options)


def fields(tree: PrefixTree, *names: str) -> list[list[int]]:
    return [getattr(tree, name).tolist() for name in names]


#: Duplicates (0 and 4), a prefix of others (2), an empty sequence (5):
#:
#:   0 -- 1 [1 2] -- 2 [3 4]   rows 0, 4
#:    \     row 2 \- 3 [5]     row 1
#:     4 [7 8] row 3           (row 5 ends at the root)
DRAWN = [[1, 2, 3, 4], [1, 2, 5], [1, 2], [7, 8], [1, 2, 3, 4], []]
LEAF_VALUES = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
NODE_VALUES = torch.tensor([3.5, 2.75, 3.0, 2.0, 4.0])


@pytest.mark.usefixtures("_backend")
class TestNumbersDrawnByHand:
    def test_arrays(self) -> None:
        tree = tree_of(DRAWN)
        assert (tree.num_nodes, tree.num_groups, tree.num_tokens, tree.num_rows) == (5, 1, 7, 6)
        assert fields(tree, "parent", "depth") == [[-1, 0, 1, 1, 0], [0, 1, 2, 2, 1]]
        assert fields(tree, "edge_start", "edge_length") == [[0, 0, 2, 2, 0], [0, 2, 2, 1, 2]]
        assert fields(tree, "count", "first_row") == [[6, 4, 2, 1, 1], [0, 0, 0, 1, 3]]
        assert fields(tree, "tin", "tout") == [[0, 1, 2, 3, 4], [5, 4, 3, 4, 5]]
        assert fields(tree, "token_begin", "children") == [[0, 0, 2, 4, 5], [2, 2, 0, 0, 0]]
        assert fields(tree, "root", "is_branch") == [[0] * 5, [True, True, False, False, False]]
        assert fields(tree, "leaf", "lengths") == [[2, 3, 1, 4, 2, 0], [4, 3, 2, 2, 4, 0]]
        assert tree.node_of_token.tolist() == [
            *([1, 1, 2, 2], [1, 1, 3, -1], [1, 1, -1, -1], [4, 4, -1, -1], [1, 1, 2, 2], [-1] * 4)
        ]
        assert tree.unique_of_token.tolist() == [
            *([0, 1, 2, 3], [0, 1, 4, -1], [0, 1, -1, -1], [5, 6, -1, -1], [0, 1, 2, 3], [-1] * 4)
        ]
        assert [tree.rows_of(n).tolist() for n in range(5)] == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 4], [0, 4], [1], [3]]

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({"op": "mean"}, [3.5, 2.75, 3, 2, 4]),
            ({"op": "mean", "over": "children"}, [38 / 9, 8 / 3, 3, 2, 4]),
            ({"op": "sum"}, [21, 11, 6, 2, 4]),
            ({"op": "sum", "discount": 0.5}, [8.375, 5.5, 6, 2, 4]),
            ({"op": "mean", "discount": 0.5}, [8.375 / 6, 5.5 / 4, 3, 2, 4]),
            ({"op": "max"}, [6, 5, 5, 2, 4]),
            ({"op": "min"}, [1, 1, 1, 2, 4]),
            ({"op": "any"}, [1, 1, 1, 1, 1]),
            ({"op": "mean", "weights": torch.tensor([3.0, 1, 0, 1, 1, 2])}, [26 / 8, 2, 2, 2, 4]),
            (
                {"op": "mean", "over": "children", "child_weights": torch.tensor([9.0, 2, 1, 0, 1])},
                [(6 + 2 * 3 + 4) / 4, 3, 3, 2, 4],
            ),
        ],
    )
    def test_aggregate(self, options: dict[str, Any], expected: list[float]) -> None:
        got = tree_of(DRAWN).aggregate(LEAF_VALUES, **options)
        torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float32))

    @pytest.mark.parametrize("scale", [1.0, 2.0, -3.0])
    def test_logsumexp(self, scale: float) -> None:
        tree, x = tree_of(DRAWN), LEAF_VALUES.double() * scale
        got = tree.aggregate(LEAF_VALUES.double(), "logsumexp", scale=scale)
        below = [tree.rows_of(n) for n in range(5)]
        close(got, torch.stack([x[rows].exp().sum().log() / scale for rows in below]), "sum")
        got = tree.aggregate(LEAF_VALUES.double(), "logsumexp", scale=scale, normalized=True)
        close(got, torch.stack([x[rows].exp().mean().log() / scale for rows in below]), "mean")

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({"mode": "td"}, [0, -0.75, 0.25, -0.75, 0.5]),
            ({"mode": "root"}, [0, -0.75, -0.5, -1.5, 0.5]),
            ({"mode": "td+root"}, [0, -1.5, -0.25, -2.25, 1]),
            ({"mode": "all-ancestors"}, [0, -0.75, -0.125, -1.125, 0.5]),
            ({"mode": "depth-weighted"}, [0, -0.45, -1 / 6, -12 / 11, 3 / 7]),
            ({"mode": "sibling", "eps": 0.0}, [0, -(0.5**0.5), 0.5**0.5, -(0.5**0.5), 0.5**0.5]),
            ({"mode": "sibling", "ddof": 0, "eps": 0.5}, [0, -0.625 / 1.125, 0.5, -0.5, 0.625 / 1.125]),
            ({"mode": "sibling", "scale": "none"}, [0, -0.625, 0.5, -0.5, 0.625]),
        ],
    )
    def test_advantages(self, options: dict[str, Any], expected: list[float]) -> None:
        got = tree_of(DRAWN).advantages(NODE_VALUES, **options)
        torch.testing.assert_close(got, torch.tensor(expected))

    def test_an_only_child(self) -> None:
        tree = tree_of([[1, 2], [1, 2]])
        values = torch.tensor([1.0, 3.0])
        assert tree.advantages(values, "sibling").tolist() == [0, 0]
        assert tree.advantages(values, "sibling", singleton="raw").tolist() == [0, 3]

    def test_propagate(self) -> None:
        tree = tree_of(DRAWN)
        scale, shift = torch.tensor([9.0, 0.5, 2.0, -1.0, 3.0]), torch.tensor([9.0, 1, 0, 0.25, -1])
        assert tree.propagate(scale, shift, initial=1.0).tolist() == [1, 1.5, 3, -1.25, 2]
        assert tree.propagate(scale, shift, initial=1.0, low=0.0, high=1.25).tolist() == [1, 1.25, 1.25, 0, 1.25]
        assert tree.propagate(1.0, 1.0).tolist() == [0, 1, 2, 2, 1]  # the depth

    @pytest.mark.parametrize(
        ("place", "expected"),
        [
            ("broadcast", [[2, 2, 3, 3], [2, 2, 4, 0], [2, 2, 0, 0], [5, 5, 0, 0], [2, 2, 3, 3], [0] * 4]),
            ("start", [[2, 0, 3, 0], [2, 0, 4, 0], [2, 0, 0, 0], [5, 0, 0, 0], [2, 0, 3, 0], [0] * 4]),
            ("end", [[0, 2, 0, 3], [0, 2, 4, 0], [0, 2, 0, 0], [0, 5, 0, 0], [0, 2, 0, 3], [0] * 4]),
        ],
    )
    def test_to_tokens(self, place: Any, expected: list[list[float]]) -> None:
        assert tree_of(DRAWN).to_tokens(torch.arange(1.0, 6.0), place=place).tolist() == expected

    def test_to_tokens_with_the_rows_own_values(self) -> None:
        tree, own = tree_of(DRAWN, mask=torch.tensor([[1, 1, 0, 1]] * 6)), torch.tensor([10.0, 20, 30, 40, 50, 60])
        values = torch.arange(1.0, 6.0)
        assert tree.to_tokens(values, row_values=own).tolist() == [
            *([12, 12, 0, 13], [22, 22, 0, 0], [32, 32, 0, 0], [45, 45, 0, 0], [52, 52, 0, 53], [0] * 4)
        ]
        assert tree.to_tokens(values, place="end", row_values=own).tolist() == [
            *([10, 12, 0, 13], [20, 22, 0, 0], [30, 32, 0, 0], [40, 45, 0, 0], [50, 52, 0, 53], [0] * 4)
        ]
        steps = PrefixTree.from_paths(torch.tensor([[5, 6], [5, 7]]), segment_ids=torch.tensor([[0, 0, 1], [0, -1, 1]]))
        got = steps.to_tokens(values[:4], place="start", row_values=own[:2])
        assert got.tolist() == [[12, 10, 13], [22, 0, 24]]

    @pytest.mark.parametrize(
        ("op", "expected"),
        [
            ("sum", [28, 32, 20, 22, 6, 12, 13]),
            ("mean", [7, 8, 10, 11, 6, 12, 13]),
            ("first", [0, 1, 2, 3, 6, 12, 13]),
        ],
    )
    def test_from_tokens(self, op: Any, expected: list[float]) -> None:
        tree = tree_of(DRAWN)
        unique = tree.from_tokens(torch.arange(24.0).view(6, 4), op)
        assert unique.tolist() == expected
        spread = tree.unique_to_tokens(unique)
        assert spread[1].tolist() == [*expected[:2], expected[4], 0]
        assert spread[5].tolist() == [0] * 4

    def test_masked_tokens_count_for_identity_and_get_no_credit(self) -> None:
        tokens = torch.tensor([[1, 9, 2, 3], [1, 8, 2, 3], [1, 9, 2, 4]])
        mask = torch.tensor([[1, 0, 1, 0], [1, 0, 1, 1], [1, 0, 1, 1]])
        tree = PrefixTree(tokens, mask)
        assert tree.lengths.tolist() == [3, 4, 4]  # to the last counted one
        assert tree.node_of_token.tolist() == [[1, 2, 2, -1], [1, 4, 4, 4], [1, 2, 2, 3]]
        assert tree.to_tokens(torch.arange(5.0) + 1).tolist() == [[2, 0, 3, 0], [2, 0, 5, 5], [2, 0, 3, 4]]
        assert tree.to_tokens(torch.arange(5.0) + 1, place="start").tolist() == [
            *([2, 0, 0, 0], [2, 0, 0, 0], [2, 0, 0, 4])  # a node that begins with a masked token has no start
        ]
        # unique tokens: 1 | 9 2 | 4 | 8 2 3
        x = torch.tensor([[1.0, NAN, 3, NAN], [10, NAN, 30, 40], [100, NAN, 300, 400]])
        assert tree.from_tokens(x).tolist() == [111, 0, 303, 400, 0, 30, 40]
        assert tree.from_tokens(x, "mean").tolist() == [37, 0, 151.5, 400, 0, 30, 40]

    def test_the_first_sequence_that_counts_a_token(self) -> None:
        """Row 1 ends at the node and comes first among its rows, yet row 0 comes before it in the batch."""
        tokens, lengths = padded([[1, 2], [1], [1, 3]])
        x = torch.tensor([[1.0, 0], [10, 0], [100, 0]])
        for counted, expected in (([1, 1, 1], 1), ([0, 1, 1], 10), ([0, 0, 1], 100), ([0, 0, 0], 0)):
            mask = torch.ones(3, 2)
            mask[:, 0] = torch.tensor(counted)
            assert PrefixTree(tokens, mask, lengths=lengths).from_tokens(x, "first")[0] == expected

    def test_masked_tokens_ignored(self) -> None:
        tokens = torch.tensor([[1, 9, 2, 3], [1, 8, 2, 3], [5, 1, 2, 4]])
        mask = torch.tensor([[1, 0, 1, 0], [1, 0, 1, 1], [0, 1, 1, 1]])
        tree = PrefixTree(tokens, mask, ignore_masked=True)  # 1 2, 1 2 3, 1 2 4
        assert tree.lengths.tolist() == [2, 3, 3]
        assert tree.node_of_token.tolist() == [[1, -1, 1, -1], [1, -1, 1, 2], [-1, 1, 1, 3]]
        assert tree.unique_of_token.tolist() == [[0, -1, 1, -1], [0, -1, 1, 2], [-1, 0, 1, 3]]
        assert tree.to_tokens(torch.arange(4.0)).tolist() == [[1, 0, 1, 0], [1, 0, 1, 2], [0, 1, 1, 3]]
        x = torch.arange(12.0).view(3, 4)
        assert tree.from_tokens(x).tolist() == [0 + 4 + 9, 2 + 6 + 10, 7, 11]

    def test_paths(self) -> None:
        tree = PrefixTree.from_paths([["a", "b", "c"], ["a", "b"], ["a", ("d", 1)], []])
        assert fields(tree, "parent", "edge_start", "edge_length") == [
            [-1, 0, 1, 2, 1],
            [0, 0, 1, 2, 1],
            [0, 1, 1, 1, 1],
        ]
        assert fields(tree, "leaf", "count") == [[3, 2, 4, 0], [4, 3, 2, 1, 1]]
        assert tree.to_tokens(torch.arange(5.0)).tolist() == [[1, 2, 3], [1, 2, 0], [1, 4, 0], [0, 0, 0]]
        by_ids = PrefixTree.from_paths(torch.tensor([[5, 6, 7], [5, 6, -1], [5, 8, -1], [-1, 9, 9]]))
        same_tree(by_ids, tree)

    def test_paths_with_segments(self) -> None:
        segments = torch.tensor([[-1, 0, 0, 1, 1], [0, 1, 1, 1, -1]])
        tree = PrefixTree.from_paths(torch.tensor([[5, 6], [5, 7]]), segment_ids=segments)
        assert tree.shape == (2, 5)
        assert tree.node_of_token.tolist() == [[-1, 1, 1, 2, 2], [1, 3, 3, 3, -1]]
        values = torch.arange(4.0)
        assert tree.to_tokens(values).tolist() == [[0, 1, 1, 2, 2], [1, 3, 3, 3, 0]]
        assert tree.to_tokens(values, place="start").tolist() == [[0, 1, 0, 2, 0], [1, 3, 0, 0, 0]]
        assert tree.to_tokens(values, place="end").tolist() == [[0, 0, 1, 0, 2], [1, 0, 0, 3, 0]]
        masked = PrefixTree.from_paths(
            torch.tensor([[5, 6], [5, 7]]), segment_ids=segments, mask=torch.tensor([[1, 1, 0, 1, 1], [1, 0, 1, 1, 1]])
        )
        assert masked.to_tokens(values).tolist() == [[0, 1, 0, 2, 2], [1, 0, 3, 3, 0]]
        assert masked.to_tokens(values, place="end").tolist() == [[0, 0, 0, 0, 2], [1, 0, 0, 3, 0]]
        assert torch.equal(masked.node_of_token, tree.node_of_token)

    def test_branches(self) -> None:
        """The drawn tree, with parents that come after their children."""
        tree = PrefixTree.from_branches(
            torch.tensor([4, 0, 1, 5, -1, -1]),
            torch.tensor([4, 2, 2, 0, 0, 0]),
            torch.tensor([4, 3, 2, 2, 4, 0]),
        )
        same_tree(tree, tree_of(DRAWN))
        at_zero = PrefixTree.from_branches(torch.tensor([-1, 0]), torch.tensor([0, 0]), torch.tensor([2, 3]))
        assert fields(at_zero, "parent", "edge_length") == [[-1, 0, 0], [0, 2, 3]]
        twice = PrefixTree.from_branches(torch.tensor([-1, 0, 0]), torch.tensor([0, 1, 1]), torch.tensor([3, 3, 3]))
        assert fields(twice, "parent", "edge_length") == [[-1, 0, 1, 1, 1], [0, 1, 2, 2, 2]]

    @pytest.mark.parametrize("parent", [[1, 0], [0, -1], [2, 0, 1], [-1, 2, 3, 1]])
    def test_branches_in_a_circle(self, parent: list[int]) -> None:
        zeros = torch.zeros(len(parent), dtype=torch.int64)
        with pytest.raises(ValueError, match=r"parent: expected rows that lead to a row without parent .* cycle"):
            PrefixTree.from_branches(torch.tensor(parent), zeros, zeros + 1)

    @pytest.mark.parametrize("columns", [0, 1, 3])
    @pytest.mark.parametrize("rows", [0, 1, 2])
    def test_hardly_anything(self, rows: int, columns: int) -> None:
        tokens = torch.zeros(rows, columns, dtype=torch.int64)
        for mask in (None, torch.zeros(rows, columns)):
            tree = PrefixTree(tokens, mask)
            unique = columns if rows and mask is None else 0
            assert (tree.num_rows, tree.num_groups, tree.num_tokens) == (rows, min(rows, 1), unique)
            assert tree.num_nodes == (2 if unique else min(rows, 1))
            values = tree.aggregate(torch.ones(rows))
            assert values.tolist() == [1.0] * tree.num_nodes
            assert tree.advantages(values, "sibling").tolist() == [0.0] * tree.num_nodes
            assert torch.equal(tree.to_tokens(values), torch.full((rows, columns), float(unique > 0)))
            assert tree.from_tokens(torch.ones(rows, columns)).tolist() == [float(rows)] * unique
            assert tree.unique_to_tokens(torch.ones(unique)).shape == (rows, columns)

    def test_groups_are_numbered_as_they_come(self) -> None:
        rows = [[1, 2], [1, 2], [1, 3], [1, 2]]
        trees = [
            tree_of(rows, group_ids=torch.tensor([7, -5, 7, -5])),
            tree_of(rows, group_ids=torch.tensor([1, 0, 1, 0], dtype=torch.int32)),
            tree_of(rows, group_ids=["x", "y", "x", "y"]),
            tree_of(rows, group_ids=np.array([1.5, 2.5, 1.5, 2.5], dtype=object)),
        ]
        for tree in trees:
            assert fields(tree, "parent", "root", "leaf") == [[-1, 0, 1, 1, -1, 4], [0, 0, 0, 0, 4, 4], [2, 5, 3, 5]]
            assert tree.num_groups == 2
        pairs = tree_of(rows, group_size=2)
        assert fields(pairs, "parent", "leaf") == [[-1, 0, -1, 2, 3, 3], [1, 1, 4, 5]]
        assert tree_of(rows).num_groups == 1


# ---------------------------------------------------------------------------------------------------- other inputs
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


# ------------------------------------------------------------------------------------------- values and gradients
@pytest.mark.parametrize("seed", range(4))
def test_long_rows_against_the_reference(seed: int) -> None:
    """Edges longer than any block or vector, more than one thread, all kinds of masks."""
    r = random.Random(seed)
    torch.manual_seed(seed)
    tokens = torch.randint(0, 2, (12, 3300), dtype=torch.int32)
    for b in range(1, 12):
        shared = r.choice((31, 33, 1023, 1025, 2048, 2500, 3300))
        tokens[b, :shared] = tokens[r.randrange(b), :shared]
    mask = torch.rand(12, 3300) < 0.9
    given = {"tokens": tokens, "mask": (mask, mask.to(torch.int32), mask.float(), None)[seed], "group_size": 6}
    tree, truth = both(lambda: PrefixTree(**given))
    same_tree(tree, truth)
    values = torch.randn(tree.num_nodes)
    for place in PLACES:
        assert torch.equal(tree.to_tokens(values, place=place), truth.to_tokens(values, place=place))
    x = torch.randn(12, 3300)
    for op in TOKEN_OPS:
        close(tree.from_tokens(x, op), truth.from_tokens(x, op), op)
    for place in PLACES:
        leaf = torch.randn(tree.num_nodes, requires_grad=True)
        grads = [torch.autograd.grad(t.to_tokens(leaf, place=place), leaf, x)[0] for t in (tree, truth)]
        torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-6)  # sums of some thousand terms, stored as f32


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("shared", [1, 31, 32, 33, 40, 64, 65, 99])
def test_rows_part_anywhere(shared: int, dtype: torch.dtype) -> None:
    """At the first token that differs, by whatever bits, though others of the same vector differ too or do not."""
    tokens = torch.randint(0, 30_000, (2, 100)).to(dtype)
    tokens[1, :shared] = tokens[0, :shared]
    tokens[1, shared] = tokens[0, shared] ^ 6
    tree = PrefixTree(tokens, group_size=2)
    assert tree.edge_length.tolist() == [0, shared, 100 - shared, 100 - shared]


@pytest.mark.parametrize("over", ["sequences", "children"])
@pytest.mark.parametrize("op", ["mean", "sum", "logsumexp", "max", "min", "any"])
@pytest.mark.parametrize("special", [[-INF], [INF], [NAN], [-INF, INF], [0.0]])
def test_infinities_and_nan(op: Any, over: Any, special: list[float]) -> None:
    for seed in range(3):
        r = random.Random(seed)
        tokens = random_batch(r, 12)["tokens"]
        tree, truth = both(lambda tokens=tokens: PrefixTree(tokens))
        values = torch.randn(tree.num_rows)
        values[torch.rand(tree.num_rows) < 0.4] = special[0]
        values[torch.rand(tree.num_rows) < 0.2] = special[-1]
        got, want = (t.aggregate(values, op, over=over) for t in (tree, truth))
        close(got, want, (op, over))
        for options in advantage_modes(r):
            close(tree.advantages(got, **options), truth.advantages(got, **options), options)
        if op == "logsumexp":  # where no value is finite the gradient is 0, not NaN
            x = values.requires_grad_()
            grads = [torch.autograd.grad(t.aggregate(x, op, over=over).sum(), x)[0] for t in (tree, truth)]
            close(*grads, "gradient")
            assert torch.isfinite(grads[0]).all() or special[0] != special[0]


def test_a_logsumexp_whose_exponentials_overflow() -> None:
    tree = tree_of([[1, 2], [1, 3], [1, 4]])
    values = torch.tensor([1e4, -1e4, 5.0], dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([0.0, 1.0, 2.0])
    got = tree.aggregate(values, "logsumexp", weights=weights)
    expected = torch.tensor([0.0, 0.0, 1.0]).double()
    close(torch.autograd.grad(got[1], values)[0], expected, "a part without weight has no gradient")
    assert tree.aggregate(values.detach(), "logsumexp")[0] == 1e4


def test_weights_that_sum_to_nothing() -> None:
    tree = tree_of(DRAWN)
    got = tree.aggregate(LEAF_VALUES, weights=torch.tensor([0.0, 1, 1, 1, 0, 1]))
    assert got.isnan().tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.bool])
def test_other_dtypes_become_float32(dtype: torch.dtype) -> None:
    tree, values = tree_of(DRAWN), LEAF_VALUES.to(dtype)
    got = tree.aggregate(values)
    assert got.dtype == torch.float32
    assert torch.equal(got, tree.aggregate(values.float()))
    assert tree.to_tokens(torch.ones(5, dtype=dtype)).dtype == torch.float32
    assert tree.advantages(torch.ones(5).double()).dtype == torch.float64
    assert tree.propagate(torch.ones(5).double(), torch.ones(5)).dtype == torch.float64


def test_advantages_as_their_formulas_say() -> None:
    """Each mode written out a second time, with nothing of the reference."""
    for seed in range(5):
        r = random.Random(seed)
        tree = PrefixTree(random_batch(r, 16)["tokens"], group_ids=None)
        parent, count = tree.parent.tolist(), tree.count.tolist()
        v = torch.randn(tree.num_nodes).double()
        above = [[n] for n in range(len(parent))]
        for path in above:
            while parent[path[-1]] >= 0:
                path.append(parent[path[-1]])
        for n, path in enumerate(above):
            if parent[n] < 0:
                continue
            over = path[1:]
            siblings = torch.stack([v[k] for k in range(len(parent)) if parent[k] == parent[n]])
            expected = {
                "td": v[n] - v[path[1]],
                "root": v[n] - v[path[-1]],
                "td+root": 2 * v[n] - v[path[1]] - v[path[-1]],
                "all-ancestors": sum(v[n] - v[a] for a in over) / len(over),
                "depth-weighted": sum(count[a] * (v[n] - v[a]) for a in path) / sum(count[a] for a in path),
            }
            if len(siblings) > 1:
                expected["sibling"] = (v[n] - siblings.mean()) / (siblings.std() + 1e-6)
            for mode, value in expected.items():
                close(tree.advantages(v, mode)[n], value, (mode, n))


class TestGradcheck:
    """Numerical derivatives in float64, on the CPU's kernels and on the reference."""

    @pytest.fixture(params=["cpu", "reference"])
    def tree(self, request: pytest.FixtureRequest) -> PrefixTree:
        tokens = torch.tensor([[1, 2, 3, 4], [1, 2, 5, 0], [1, 2, 0, 0], [7, 8, 0, 0], [1, 2, 3, 4], [0, 0, 0, 0]])
        mask = torch.tensor([[1, 0, 1, 1], [1, 1, 1, 0], [0, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 1], [0, 0, 0, 0]])
        with fr.backend(request.param):
            return PrefixTree(tokens, mask, ["a", "a", "a", "a", "a", "b"])

    @staticmethod
    def check(function: Any, *sizes: tuple[int, ...]) -> None:
        inputs = tuple(torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes)
        torch.autograd.gradcheck(function, inputs)

    def test_aggregate(self, tree: PrefixTree) -> None:
        r = random.Random(0)
        for _ in range(2):
            for options in aggregations(r, tree):
                if options["op"] in ("mean", "sum", "logsumexp"):
                    self.check(lambda v, o=options: tree.aggregate(v, **o), (6,))

    @pytest.mark.parametrize("bounds", [{}, {"low": -0.1}, {"low": -0.3, "high": 0.2}])
    def test_propagate(self, tree: PrefixTree, bounds: dict[str, float]) -> None:
        size = (tree.num_nodes,)
        self.check(lambda a, b: tree.propagate(a, b, initial=0.5, **bounds), size, size)

    def test_tokens(self, tree: PrefixTree) -> None:
        for place in PLACES:
            self.check(lambda v, p=place: tree.to_tokens(v, place=p), (tree.num_nodes,))
        for op in ("sum", "mean"):
            self.check(lambda v, o=op: tree.from_tokens(v, o), (6, 4))
        self.check(tree.unique_to_tokens, (tree.num_tokens,))


def test_gradients_that_there_are_not() -> None:
    tree, x = tree_of(DRAWN), torch.ones(6, requires_grad=True)
    for op in ("max", "min", "any"):
        with pytest.raises(ValueError, match=f"leaf_values: op='{op}' has no gradient"):
            tree.aggregate(x, op)
        assert not tree.aggregate(x.detach(), op).requires_grad
    with pytest.raises(ValueError, match="node_values: expected a constant, as no gradient flows to it"):
        tree.advantages(torch.ones(5, requires_grad=True))
    first = tree.from_tokens(torch.ones(6, 4, requires_grad=True), "first")
    with pytest.raises(NotImplementedError, match="op='first' has no gradient"):
        first.sum().backward()
    grad = torch.autograd.grad(tree.aggregate(x).square().sum(), x, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="double backward"):
        grad.sum().backward()


def test_gradients_through_several_operations() -> None:
    """Upstream gradients that are views, and not uniform."""
    tree, truth = both(lambda: tree_of(DRAWN))
    x = LEAF_VALUES.double().requires_grad_()
    weight = torch.randn(4, 6).double()

    def loss(t: PrefixTree) -> Tensor:
        tokens = t.to_tokens(t.aggregate(x, "logsumexp") * t.propagate(0.5, 1.0).double())
        again = t.unique_to_tokens(t.from_tokens(tokens.square(), "mean"))
        return (again.t() * weight).sum()

    close(*(torch.autograd.grad(loss(t), x)[0] for t in (tree, truth)), "gradient")


# ------------------------------------------------------------------------------------------------------------- bits
def everything(tree: PrefixTree) -> list[Tensor]:
    """Arrays, values and gradients, from inputs that depend on a place's own group and row alone."""
    g = torch.Generator().manual_seed(1)
    rows = torch.randn(tree.num_rows, generator=g, requires_grad=True)
    tokens = torch.randn(tree.shape, generator=g)
    out = [tree.forest.nodes, tree.forest.rows, tree.node_of_token, tree.unique_of_token]
    for op in ("mean", "logsumexp", "max"):
        for over in ("sequences", "children"):
            values = tree.aggregate(rows if op != "max" else rows.detach(), op, over=over)
            out.append(values)
            if op != "max":
                out.append(torch.autograd.grad(values.sin().sum(), rows)[0])
    for options in advantage_modes(random.Random(0)):
        out.append(tree.advantages(out[4].detach(), **options))
    x = out[4].detach().requires_grad_()
    out += [tree.propagate(x, 0.1), tree.to_tokens(x), tree.from_tokens(tokens, "mean")]
    out.append(torch.autograd.grad(tree.to_tokens(x), x, tokens)[0])
    out.append(torch.autograd.grad(tree.propagate(x, 0.1).sin().sum(), x)[0])
    return [y.detach() for y in out]


@pytest.mark.usefixtures("threads")
def test_same_bits_on_any_number_of_threads() -> None:
    """Sizes above every threshold from which on threads share the work."""
    torch.manual_seed(0)
    shallow = torch.randint(0, 2, (6000, 40)), 8
    deep = torch.randint(0, 2, (64, 1), dtype=torch.int32).expand(64, 4096).contiguous(), 16
    for tokens, size in (shallow, deep):
        mask = torch.rand(tokens.shape) < 0.9
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(everything(PrefixTree(tokens, mask, group_size=size)))
        for one, two in zip(*found, strict=True):
            assert torch.equal(one.nan_to_num(7.0), two.nan_to_num(7.0))


def test_a_group_depends_neither_on_the_others_nor_on_padding() -> None:
    torch.manual_seed(0)
    tokens = torch.randint(0, 2, (30, 12))
    ids = torch.arange(30) % 3
    values, token_values = torch.randn(30), torch.randn(30, 12)
    whole = PrefixTree(tokens, group_ids=ids)
    for group in range(3):
        rows = ids == group
        alone = PrefixTree(torch.nn.functional.pad(tokens[rows], (0, 5), value=9), lengths=torch.full((10,), 12))
        begin = int(whole.root[whole.leaf[group]])
        end = int(whole.tout[begin])
        assert torch.equal(alone.count, whole.count[begin:end])
        assert torch.equal(alone.leaf, whole.leaf[rows] - begin)
        unique = int(whole.token_begin[begin])
        for options in aggregations(random.Random(0), alone):
            options.pop("weights", None), options.pop("child_weights", None)
            got, want = alone.aggregate(values[rows], **options), whole.aggregate(values, **options)
            assert torch.equal(got, want[begin:end])
        for options in advantage_modes(random.Random(0)):
            assert torch.equal(alone.advantages(got, **options), whole.advantages(want, **options)[begin:end])
        wide = torch.nn.functional.pad(token_values[rows], (0, 5), value=NAN)
        for op in TOKEN_OPS:
            part = whole.from_tokens(token_values, op)[unique : unique + alone.num_tokens]
            assert torch.equal(alone.from_tokens(wide, op), part)
        assert torch.equal(alone.to_tokens(got)[:, :12], whole.to_tokens(want)[rows])


def test_reshuffled_rows_have_the_same_prefixes() -> None:
    tokens = torch.randint(0, 2, (40, 6))
    order = torch.randperm(40)
    tree, shuffled = PrefixTree(tokens), PrefixTree(tokens[order])
    values = torch.randint(-9, 9, (40,)).float()  # sums of which are exact in any order
    a = tree.aggregate(values, "sum")[tree.node_of_token.long()]
    b = shuffled.aggregate(values[order], "sum")[shuffled.node_of_token.long()]
    assert torch.equal(a[order], b)


# --------------------------------------------------------------------------------------------------------- messages
@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "tokens: expected an integer tensor, got float32", {"tokens": torch.ones(2, 3)}),
        (TypeError, "tokens: expected an integer tensor, got bool", {"tokens": torch.ones(2, 3).bool()}),
        (TypeError, "tokens: expected a torch tensor", {"tokens": [[1]]}),
        (
            ValueError,
            r"tokens: expected shape \[B, T\], or \[N\] with cu_seqlens, got \[3\]",
            {"tokens": torch.ones(3).long()},
        ),
        (ValueError, r"mask: expected shape \[2, 3\]", {"mask": torch.ones(2, 4)}),
        (ValueError, r"attention_mask: expected shape \[2, 3\]", {"attention_mask": torch.ones(3)}),
        (ValueError, "group_ids, group_size: expected at most one", {"group_ids": [0, 1], "group_size": 1}),
        (ValueError, "group_size: expected a positive divisor of the 2 sequences, got 3", {"group_size": 3}),
        (TypeError, r"group_size: expected an integer \(sequences of a group\), got 1\.0", {"group_size": 1.0}),
        (ValueError, "group_ids: expected 2 ids", {"group_ids": ["a"]}),
        (ValueError, r"lengths: expected shape \[2\]", {"lengths": torch.ones(3).long()}),
        (TypeError, "lengths: expected an integer tensor", {"lengths": torch.ones(2)}),
        (ValueError, r"lengths: expected at most the row's tokens, got 4 at index \[1\]", {"lengths": [3, 4]}),
        (ValueError, r"lengths: expected at most the row's tokens, got -1 at index \[0\]", {"lengths": [-1, 0]}),
        (
            ValueError,
            r"cu_seqlens: expected \[B \+ 1\] bounds over packed tokens",
            {"cu_seqlens": torch.tensor([0, 3, 6])},
        ),
        (
            ValueError,
            r"cu_seqlens: expected bounds that never decrease, got 2 at index \[2\]",
            {"tokens": torch.ones(6).long(), "cu_seqlens": torch.tensor([0, 4, 2, 6])},
        ),
        (
            ValueError,
            r"cu_seqlens: expected bounds from 0 to 6 \(the packed length\), got 0 to 5",
            {"tokens": torch.ones(6).long(), "cu_seqlens": torch.tensor([0, 5])},
        ),
        (ValueError, "ignore_masked: needs a mask", {"ignore_masked": True}),
    ],
)
def test_messages_of_the_tree(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        PrefixTree(**{"tokens": torch.ones(2, 3).long(), **arguments})


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, r"parent: expected shape \[B\]", {"parent": torch.zeros(2, 2).long()}),
        (TypeError, "parent: expected an integer tensor", {"parent": torch.zeros(2)}),
        (
            ValueError,
            r"parent: expected rows in \[0, 2\), or -1, got 2 at index \[1\]",
            {"parent": torch.tensor([-1, 2])},
        ),
        (ValueError, r"parent: expected a row of the same group, got 0 at index \[1\]", {"group_ids": [0, 1]}),
        (ValueError, r"branch_position: expected shape \[2\]", {"branch_position": torch.zeros(3).long()}),
        (
            ValueError,
            r"branch_position: expected a position in both rows, got 3 at index \[1\]",
            {"branch_position": torch.tensor([0, 3])},
        ),
        (ValueError, r"lengths: expected integers >= 0, got -2 at index \[0\]", {"lengths": torch.tensor([-2, 2])}),
        (ValueError, r"mask: expected shape \[2, T\]", {"mask": torch.ones(3, 3)}),
        (ValueError, r"lengths: expected at most 1, the columns of mask, got 2 at", {"mask": torch.ones(2, 1)}),
    ],
)
def test_messages_of_branches(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    given = {"parent": torch.tensor([-1, 0]), "branch_position": torch.tensor([0, 1]), "lengths": torch.tensor([2, 3])}
    with pytest.raises(error, match=message):
        PrefixTree.from_branches(**{**given, **arguments})


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, r"path_ids: expected shape \[B, D\]", {"path_ids": torch.ones(3).long()}),
        (TypeError, "path_ids: expected an integer tensor", {"path_ids": torch.ones(2, 2)}),
        (ValueError, r"segment_ids: expected shape \[2, T\]", {"segment_ids": torch.zeros(3, 3).long()}),
        (TypeError, "segment_ids: expected an integer tensor", {"segment_ids": torch.zeros(2, 3)}),
        (
            ValueError,
            r"segment_ids: expected a place in the row's path .*, got 1 at index \[1, 0\]",
            {"segment_ids": torch.tensor([[0, 1], [1, 0]])},
        ),
        (ValueError, r"mask: expected shape \[2, 2\] \(as path_ids\)", {"mask": torch.ones(2, 3)}),
    ],
)
def test_messages_of_paths(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        PrefixTree.from_paths(**{"path_ids": torch.tensor([[0, 1], [0, -1]]), **arguments})


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("op: expected one of .*did you mean 'mean'", lambda t: t.aggregate(torch.ones(6), "meen")),
        ("over: expected one of", lambda t: t.aggregate(torch.ones(6), over="rows")),
        (r"leaf_values: expected shape \[6\]", lambda t: t.aggregate(torch.ones(5))),
        (r"weights: expected shape \[6\]", lambda t: t.aggregate(torch.ones(6), weights=torch.ones(5))),
        (r"child_weights: needs over='children'", lambda t: t.aggregate(torch.ones(6), child_weights=torch.ones(5))),
        (
            r"child_weights: expected shape \[5\]",
            lambda t: t.aggregate(torch.ones(6), over="children", child_weights=torch.ones(6)),
        ),
        ("discount: expected 1 with op='max'", lambda t: t.aggregate(torch.ones(6), "max", discount=0.9)),
        ("normalized: needs op='logsumexp'", lambda t: t.aggregate(torch.ones(6), normalized=True)),
        ("scale: expected a number other than 0", lambda t: t.aggregate(torch.ones(6), "logsumexp", scale=0)),
        ("scale: expected a finite number", lambda t: t.aggregate(torch.ones(6), "logsumexp", scale=INF)),
        (r"node_values: expected shape \[5\]", lambda t: t.advantages(torch.ones(6))),
        ("mode: expected one of .*did you mean 'sibling'", lambda t: t.advantages(torch.ones(5), "siblings")),
        ("singleton: expected one of", lambda t: t.advantages(torch.ones(5), "sibling", singleton="nan")),
        (r"scale: expected shape \[5\]", lambda t: t.propagate(torch.ones(6), 0.0)),
        (r"low, high: expected low <= high, got 1.0 and 0.0", lambda t: t.propagate(1.0, 0.0, low=1.0, high=0.0)),
        (r"row_values: expected shape \[6\]", lambda t: t.to_tokens(torch.ones(5), row_values=torch.ones(5))),
        ("place: expected one of", lambda t: t.to_tokens(torch.ones(5), place="middle")),
        (r"token_values: expected shape \[6, 4\]", lambda t: t.from_tokens(torch.ones(6, 3))),
        ("op: expected one of", lambda t: t.from_tokens(torch.ones(6, 4), "max")),
        (r"unique_values: expected shape \[7\]", lambda t: t.unique_to_tokens(torch.ones(8))),
    ],
)
def test_messages_of_operations(message: str, call: Any) -> None:
    with pytest.raises(ValueError, match=message):
        call(tree_of(DRAWN))


def test_steps_have_no_unique_tokens() -> None:
    """Also where there are as many tokens as steps."""
    tree = PrefixTree.from_paths(torch.tensor([[0, 1]]), segment_ids=torch.tensor([[1, -1]]))
    with pytest.raises(ValueError, match="from_tokens: a tree from_paths with segment_ids has no unique tokens"):
        tree.from_tokens(torch.ones(1, 2))


# ------------------------------------------------------------------------------------------- torch.library, compile
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


# ------------------------------------------------------------------------------------------------------------ sizes
def measured(code: str) -> tuple[float, ...]:
    """What a fresh process prints; `grown()` there is by how many MiB its peak has grown since the last call."""
    head = """
        import resource, time, torch, fastreward as fr
        torch.set_num_threads(1)
        peak = 0
        def grown():
            global peak
            before, peak = peak, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            return peak - before
        def ratio(call, other, times=5):
            # Work of two calls in processor time, which waiting for a busy machine is not; each one's best, in turn.
            best = [1e9, 1e9]
            for k in times * (0, 1):
                begin = time.process_time()
                (call, other)[k]()
                best[k] = min(best[k], time.process_time() - begin)
            return best[0] / best[1]
        fr.PrefixTree(torch.zeros(2, 2, dtype=torch.int64))
    """
    source = textwrap.dedent(head) + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return tuple(map(float, done.stdout.split()))


@pytest.mark.parametrize("alphabet", [2, 2**31 - 1])
def test_one_group_of_65536_sequences(alphabet: int) -> None:
    """A root with 65,536 children, and a tree of 130,000 branch points: work and memory linear in the rows.

    The same rows in 16 groups are the measure: a quadratic step would take a sixteenth there.
    """
    slower, memory, children, nodes = measured(
        f"""
        tokens = torch.randint(0, {alphabet}, (65536, 32), generator=torch.Generator().manual_seed(0))
        if {alphabet} > 65536:
            tokens[:, 0] = torch.arange(65536) * 30011
        grown()
        tree = fr.PrefixTree(tokens)
        memory = grown()
        slower = ratio(lambda: fr.PrefixTree(tokens), lambda: fr.PrefixTree(tokens, group_size=4096))
        print(slower, memory, int(tree.children[0]), tree.num_nodes)
        """
    )
    assert children == (2 if alphabet == 2 else nodes - 1)
    assert nodes > 65536 - 8
    assert slower < 6
    assert memory < 64  # MiB: 12 fields of 131,072 nodes are 12 of them, the tokens 16


@pytest.mark.slow
def test_ten_million_tokens() -> None:
    """As many bytes as the result and a few for each row; nothing for each token but what a token is asked for."""
    memory, spread = measured(
        """
        tokens = torch.randint(0, 50000, (5120, 2048), dtype=torch.int32)
        groups = tokens.view(640, 8, 2048)
        groups[:, 1:, :1200] = groups[:, :1, :1200]  # no memory of its own, which would hide what the build takes
        grown()
        tree = fr.PrefixTree(tokens, group_size=8)
        memory = grown()
        tree.to_tokens(tree.advantages(tree.aggregate(torch.randn(5120))))
        print(memory, grown())
        """
    )
    assert memory < 16
    assert spread < 64  # MiB: 40 of them are the tokens' advantages


def test_branches_off_each_other_65536_times() -> None:
    """Work linear in the rows where each one hangs off the one before it; the measure are 16 shorter such chains."""
    (slower,) = measured(
        """
        def comb(rows, groups):
            row = torch.arange(rows)
            parent = torch.where(row % (rows // groups) == 0, -1, row - 1)
            ones = torch.ones_like(parent)
            return fr.PrefixTree.from_branches(parent, ones, 2 * ones, group_size=rows // groups)
        assert (comb(4, 1).num_nodes, comb(4, 2).num_nodes) == (6, 8)
        print(ratio(lambda: comb(65536, 1), lambda: comb(65536, 16)))
        """
    )
    assert slower < 6
