"""Rewards of NaN in the recipes over prefix trees: the same as without these sequences, whose own tokens get 0."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from tree_recipes import EVERY

from fastreward import PrefixTree, recipes

Paths = list[list[int]]
COLUMNS = 4


def keys_of(tree: PrefixTree, paths: Paths, groups: list[int]) -> list[tuple[int, ...]]:
    """Each node's group and path: its name in any tree of these paths."""
    keys: list[tuple[int, ...]] = [()] * tree.num_nodes
    for leaf, path, group in zip(tree.leaf.tolist(), paths, groups, strict=True):
        n, left = leaf, list(path)
        while n >= 0:
            keys[n] = (group, *left)
            n, left = int(tree.parent[n]), left[:-1]
    return keys


def by_node(recipe: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    """A recipe with a number for each node, which is the node's own in every tree."""

    def call(tree: PrefixTree, r: Tensor, paths: Paths, groups: list[int]) -> Tensor:
        numbers = [random.Random(str(key)).uniform(0.1, 2.0) for key in keys_of(tree, paths, groups)]
        return recipe(tree, r, torch.tensor(numbers), **options)

    return call


def plain(name: str) -> Callable[..., Tensor]:
    return lambda tree, r, paths, groups: EVERY[name](tree, r)


CASES: dict[str, Callable[..., Tensor]] = {
    **{name: plain(name) for name in EVERY if name.partition(",")[0] not in ("slate", "at2po", "tree_grpo")},
    "treepo, whitened": lambda tree, r, *_: recipes.treepo(tree, r),
    "treepo_segment, whitened": lambda tree, r, *_: recipes.treepo_segment(tree, r),
    "spo_tree, whitened": lambda tree, r, *_: recipes.spo_tree(
        tree, r, old_logprobs=torch.linspace(-1, 0, COLUMNS).expand(tree.shape)
    ),
    "treerl, mean": lambda tree, r, *_: recipes.treerl(tree, r, average_one_generation=True),
    "treerl, selected": lambda tree, r, *_: recipes.treerl(tree, r, reweight="uniform", selected=tree.lengths % 2 == 1),
    "propa, visits": lambda tree, r, *_: recipes.propa(tree, r, visits=tree.lengths % 3),
    "tree_grpo": lambda tree, r, paths, groups: recipes.tree_grpo(tree, r, group_ids=[g // 2 for g in groups]),
    "tree_grpo, sequential": lambda tree, r, paths, groups: recipes.tree_grpo(
        tree, r, group_ids=[g // 2 for g in groups], sequential=True
    ),
    "at2po": by_node(lambda tree, r, x: recipes.at2po(tree, r, entropy=x)),
    "at2po, td": by_node(lambda tree, r, x: recipes.at2po(tree, r, entropy=x, advantage="diff_localglobal")),
    "portool, steps": by_node(lambda tree, r, x: recipes.portool(tree, r, step_rewards=x)),
    "mcts_step_values, visits": by_node(recipes.mcts_step_values),
    "diffusion_tree": lambda tree, r, *_: tree.to_tokens(
        recipes.diffusion_tree(tree, r), row_values=torch.where(r.isnan(), torch.nan, 0.0)
    ),
}


def batch(seed: int) -> tuple[Paths, list[int], Tensor]:
    rng = random.Random(seed)
    count = rng.randrange(4, 14)
    paths = [[rng.randrange(2) for _ in range(rng.randrange(1, COLUMNS + 1))] for _ in range(count)]
    groups = [rng.randrange(3) for _ in range(count)]
    r = torch.tensor([float(rng.randrange(2)) for _ in range(count)])
    missing = torch.tensor([rng.random() < 0.4 for _ in range(count)])
    missing[rng.randrange(count)] = False
    return paths, groups, torch.where(missing, torch.nan, r)


def run(call: Callable[..., Tensor], paths: Paths, groups: list[int], r: Tensor) -> Tensor:
    padded = torch.tensor([[*path, *[-1] * (COLUMNS - len(path))] for path in paths])
    return call(PrefixTree.from_paths(padded, groups), r, paths, groups)


@pytest.mark.parametrize("name", CASES)
def test_as_without_the_sequence(name: str) -> None:
    for seed in range(12):
        paths, groups, r = batch(seed)
        there = (~r.isnan()).nonzero().squeeze(1).tolist()
        got = run(CASES[name], paths, groups, r)
        want = run(CASES[name], [paths[b] for b in there], [groups[b] for b in there], r[there])
        assert not got[r.isnan()].any(), "a sequence that was not scored gets no credit"
        torch.testing.assert_close(got[there], want, msg=lambda m: f"seed {seed}: {m}")  # noqa: B023


@pytest.mark.parametrize("name", ["tempo", "tvm", "tree_opo"])
def test_tokens_as_without_the_sequence(name: str) -> None:
    """Where an edge is cut because an unscored sequence leaves it, its tokens get the same."""
    tokens = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5], [1, 6, 3, 4], [1, 2, 7, 8]])
    r = torch.tensor([1.0, 0.0, 0.5, torch.nan])
    got = EVERY[name](PrefixTree(tokens), r)
    torch.testing.assert_close(got[:3], EVERY[name](PrefixTree(tokens[:3]), r[:3]))
    assert not got[3].any()


def test_steps_that_were_not_scored() -> None:
    """A candidate that the judge has not seen: its siblings are compared without it."""
    two, three = PrefixTree.from_paths([["a"], ["b"]]), PrefixTree.from_paths([["a"], ["b"], ["c"]])
    want = recipes.slate(two, torch.tensor([0.0, 1.0, 3.0]))
    got = recipes.slate(three, torch.tensor([0.0, 1.0, 3.0, torch.nan]))
    assert want[0] < 0 < want[1]
    assert torch.equal(got, torch.cat([want, torch.zeros(1, 1)]))


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_scored(name: str) -> None:
    paths, groups, r = batch(0)
    got = run(CASES[name], paths, groups, torch.full_like(r, torch.nan))
    assert torch.equal(got, torch.zeros_like(got))


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("entropy", lambda tree, r, x: recipes.at2po(tree, r, entropy=x)),
        ("visits", lambda tree, r, x: recipes.mcts_step_values(tree, r, x)),
        ("visits", lambda tree, r, x: recipes.propa(tree, r, visits=x[:2])),
    ],
)
def test_nan_elsewhere_is_an_error(name: str, call: Any) -> None:
    tree = PrefixTree.from_paths([["a"], ["b"]])
    with pytest.raises(ValueError, match=rf"{name}: expected finite numbers, got nan at index \[1\]"):
        call(tree, torch.ones(2), torch.tensor([1.0, torch.nan, 1.0]))
