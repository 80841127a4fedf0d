"""A PrefixTree drawn by hand: its arrays, and what every operation makes of numbers one can check in one's head."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from drawn_tree import DRAWN, LEAF_VALUES, NODE_VALUES, padded, tree_of
from prefix_tree_checks import (
    close,
    same_tree,
)

import fastreward as fr
from fastreward import PrefixTree

INF, NAN = float("inf"), float("nan")


@pytest.fixture(params=["cpu", "reference"])
def _backend(request: pytest.FixtureRequest):
    with fr.backend(request.param):
        yield


def fields(tree: PrefixTree, *names: str) -> list[list[int]]:
    return [getattr(tree, name).tolist() for name in names]


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
