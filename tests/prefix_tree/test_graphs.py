"""Prefix trees in torch.compile(fullgraph=True), built inside or outside: two graphs for any sizes and numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiled_graphs import graphs
from operation_rows import SIZES, Row, as_tensors, mask
from torch import Tensor

from fastreward import PrefixTree
from fastreward._arguments.options import TREE_MODES


def batch(B: int, T: int) -> dict[str, Any]:
    return {"tokens": torch.randint(0, 3, (B, T)), "mask": mask(B, T), "rewards": torch.randn(B, requires_grad=True)}


def grouped(B: int, T: int) -> dict[str, Any]:
    return batch(B, T) | {"ids": torch.arange(B) % (B // 2)}


# -------------------------------------------------------------------------------------------------------------- build
def of_tokens(tokens: Tensor, mask: Tensor, rewards: Tensor, ids: Tensor) -> list[Tensor]:
    bounds = torch.arange(tokens.shape[0] + 1) * tokens.shape[1]
    trees = [
        PrefixTree(tokens, mask, ids),
        PrefixTree(tokens, group_size=2, lengths=mask.sum(1).long()),
        PrefixTree(tokens, mask, attention_mask=mask.flip(1), ignore_masked=True),
        PrefixTree(tokens.reshape(-1), mask.reshape(-1), cu_seqlens=bounds),
    ]
    return [credit(tree, rewards) for tree in trees]


def of_steps(tokens: Tensor, mask: Tensor, rewards: Tensor, ids: Tensor) -> list[Tensor]:
    row = torch.arange(tokens.shape[0])
    above = torch.where(row % 2 == 0, -1, row - 1)
    trees = [
        PrefixTree.from_paths(tokens, ids, segment_ids=(mask - 1).long(), mask=mask),
        PrefixTree.from_branches(above, torch.ones_like(row), torch.full_like(row, 2), group_size=2, mask=mask),
    ]
    return [credit(tree, rewards) for tree in trees]


def credit(tree: PrefixTree, rewards: Tensor) -> Tensor:
    return tree.to_tokens(tree.propagate(1.0, tree.aggregate(rewards)))


# --------------------------------------------------------------------------------------------------------- operations
def aggregates(
    tokens: Tensor, mask: Tensor, rewards: Tensor, weights: Tensor, discount: Any, scale: Any
) -> list[Tensor]:
    tree = PrefixTree(tokens, mask)
    options: dict[str, Any] = {"over": "children", "child_weights": tree.count}
    return [
        tree.aggregate(rewards, weights=weights, discount=discount).nan_to_num(),
        tree.aggregate(rewards, "sum", discount=discount, **options),
        tree.aggregate(rewards, "logsumexp", scale=scale, normalized=True, **options),
        tree.aggregate(rewards.detach(), "max"),
    ]


def advantages(tokens: Tensor, rewards: Tensor, eps: Any) -> list[Tensor]:
    tree = PrefixTree(tokens)
    values = tree.aggregate(rewards)
    return [tree.advantages(values, mode, eps=eps) for mode in TREE_MODES]


def propagated(
    tokens: Tensor, mask: Tensor, rewards: Tensor, scale: Any, initial: Any, low: Any, high: Any
) -> list[Tensor]:
    tree = PrefixTree(tokens, mask)
    values = tree.aggregate(rewards)
    return [
        tree.propagate(scale, values, initial=initial, low=low, high=high),
        tree.propagate(values, scale, initial=initial),
        tree.propagate(scale, initial, high=high),
    ]


def folded(tokens: Tensor, mask: Tensor, x: Tensor) -> list[Tensor]:
    tree = PrefixTree(tokens, mask)
    return [tree.unique_to_tokens(tree.from_tokens(x, op)) for op in ("sum", "mean")]  # type: ignore[arg-type]


def outside(tree: PrefixTree, rewards: Tensor, x: Tensor, discount: Any) -> list[Tensor]:
    """The tree comes from a data loader."""
    values = tree.aggregate(rewards, discount=discount)
    return [tree.to_tokens(values, place="start"), tree.unique_to_tokens(tree.from_tokens(x, "mean"))]


def packed_logprobs(packed: Any, logits: Tensor, temperature: Any) -> list[Tensor]:
    stats = packed.token_logprobs(logits * 1.0, temperature=temperature, outputs=("logprobs", "entropy"))
    return [packed.to_tokens(stats.logprobs), stats.entropy]


def packed_batch(B: int, T: int) -> dict[str, Any]:
    packed = PrefixTree(torch.randint(0, 3, (B, T)), mask(B, T)).pack()
    return {"packed": packed, "logits": torch.randn(len(packed), 4, requires_grad=True), "temperature": 0.3 * B}


def made(*extra: str, **numbers: Callable[[int, int], float]) -> Callable[[int, int], Any]:
    def make(B: int, T: int) -> dict[str, Any]:
        return batch(B, T) | {name: torch.rand(B) for name in extra} | {k: f(B, T) for k, f in numbers.items()}

    return make


ROWS = [
    Row("PrefixTree", "tokens", grouped, of_tokens),
    Row("PrefixTree", "steps", grouped, of_steps),
    Row(
        "aggregate", "numbers",
        made("weights", discount=lambda B, T: 0.05 * B, scale=lambda B, T: 0.1 * T), aggregates,
    ),
    Row(
        "advantages", "eps",
        lambda B, T: {"tokens": torch.randint(0, 3, (B, T)), "rewards": torch.rand(B), "eps": 0.1 * B}, advantages,
    ),
    Row(
        "propagate", "numbers",
        made(scale=lambda B, T: 0.1 * B, initial=lambda B, T: 0.1 * T, low=lambda B, T: -0.1 * B,
             high=lambda B, T: 0.2 * B),
        propagated,
    ),
    Row(
        "from_tokens", "built",
        lambda B, T: {"tokens": torch.randint(0, 3, (B, T)), "mask": mask(B, T),
                      "x": torch.randn(B, T, requires_grad=True)},
        folded,
    ),
    Row(
        "PrefixTree", "outside",
        lambda B, T: {"tree": PrefixTree(torch.randint(0, 3, (B, T)), mask(B, T)),
                      "rewards": torch.randn(B, requires_grad=True), "x": torch.randn(B, T, requires_grad=True),
                      "discount": 0.05 * B},
        outside,
    ),
    Row("PackedTree", "token_logprobs", packed_batch, packed_logprobs),
]  # fmt: skip


CASES = [pytest.param(row, False, id=row.id) for row in ROWS]
CASES += [
    pytest.param(row, True, id=f"{row.id}-0-d tensors")
    for row in ROWS
    if row.options in ("numbers", "eps", "token_logprobs")
]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # of Dynamo, by itself
@pytest.mark.parametrize(("row", "tensors"), CASES)
def test_two_graphs_are_enough(row: Row, tensors: bool) -> None:
    torch.manual_seed(0)
    calls = [row.make(*size) for size in SIZES[:3]]
    assert graphs(row, [as_tensors(c) for c in calls] if tensors else calls) <= 2
