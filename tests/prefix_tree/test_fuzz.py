"""Prefix trees of random batches on the CPU, against a trie of dictionaries in plain Python (the reference)."""

from __future__ import annotations

import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prefix_tree_checks import both, branches_of, packed, random_batch, random_branches, same_tree, same_values

from fastreward import PrefixTree

BATCHES = 20  # of an example
SEEDS = st.integers(0, 2**32)


@settings(max_examples=150, deadline=None)
@given(SEEDS)
def test_trees_of_tokens(seed: int) -> None:
    """3,000 batches."""
    r = random.Random(seed)
    for _ in range(BATCHES):
        given = random_batch(r)
        same_tree(*both(lambda given=given: PrefixTree(**given)), given)


@settings(max_examples=50, deadline=None)
@given(SEEDS)
def test_trees_of_packed_tokens(seed: int) -> None:
    """1,000 batches."""
    r = random.Random(seed)
    for _ in range(BATCHES):
        given = packed(random_batch(r), r)
        same_tree(*both(lambda given=given: PrefixTree(**given)), given)


@settings(max_examples=50, deadline=None)
@given(SEEDS)
def test_trees_of_paths(seed: int) -> None:
    """1,000 batches."""
    r = random.Random(seed)
    for _ in range(BATCHES):
        batch = random_batch(r)
        paths = batch["tokens"].long().masked_fill(torch.rand(batch["tokens"].shape) < 0.1, -1)
        segments = torch.randint(-1, 1, (len(paths), 3)) if r.random() < 0.5 else None
        if segments is not None and paths.shape[1]:
            steps = (paths >= 0).long().cumprod(1).sum(1, keepdim=True)
            segments = torch.minimum(torch.randint(-2, paths.shape[1], (len(paths), 7)), steps - 1)
        elif segments is not None:
            segments = torch.full_like(segments, -1)
        groups = batch.get("group_ids")
        same_tree(
            *both(lambda p=paths, g=groups, s=segments: PrefixTree.from_paths(p, g, segment_ids=s)), (paths, segments)
        )


@settings(max_examples=50, deadline=None)
@given(SEEDS)
def test_trees_of_branches(seed: int) -> None:
    """1,000 batches of branches that no tokens have made."""
    r = random.Random(seed)
    for _ in range(BATCHES):
        given = random_branches(r)
        same_tree(*both(lambda given=given: PrefixTree.from_branches(**given)), given)


@settings(max_examples=25, deadline=None)
@given(SEEDS)
def test_trees_of_the_branches_of_tokens(seed: int) -> None:
    """Whatever built a tree: 500 trees of tokens again from where their rows branch off each other."""
    r = random.Random(seed)
    for _ in range(BATCHES):
        batch = random_batch(r)
        tree = PrefixTree(batch["tokens"], batch.get("mask"), batch.get("group_ids"), lengths=batch.get("lengths"))
        branches = branches_of(tree)
        columns = torch.ones(tree.shape, dtype=torch.bool)
        again = PrefixTree.from_branches(**branches, mask=columns)
        same_tree(again, tree, branches)


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.sampled_from([torch.float32, torch.float64]))
def test_values_and_gradients(seed: int, dtype: torch.dtype) -> None:
    """Every operation, with random options, on trees of tokens (all kinds of rows) and of branches."""
    r = random.Random(seed)
    torch.manual_seed(seed)
    batch, branches = random_batch(r), random_branches(r)
    same_values(*both(lambda: PrefixTree(**batch)), r, dtype)
    same_values(*both(lambda: PrefixTree(**packed(batch, random.Random(seed)))), r, dtype)
    same_values(*both(lambda: PrefixTree.from_branches(**branches)), r, dtype)
