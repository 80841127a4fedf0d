"""What PrefixTree says of arguments that it cannot use."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from drawn_tree import DRAWN, tree_of

from fastreward import PrefixTree

INF, NAN = float("inf"), float("nan")


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
