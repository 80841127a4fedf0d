"""Random batches for prefix trees, and what two backends' trees of one batch are held to."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import fastreward
from fastreward import PrefixTree
from fastreward._arguments.options import OVERS, PLACES, TOKEN_OPS, TREE_MODES, TREE_OPS

#: Every array of a tree.
FIELDS = (
    *("parent", "depth", "edge_start", "edge_length", "count", "first_row", "tin", "tout", "token_begin", "children"),
    *("root", "is_branch", "leaf", "lengths", "node_of_token", "unique_of_token"),
)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8)


# ---------------------------------------------------------------------------------------------------------- batches
def rows_of_tokens(r: random.Random, rows: int, columns: int, alphabet: int) -> list[list[int]]:
    """Rows that often share a prefix with an earlier one, or are the same."""
    out: list[list[int]] = []
    for _ in range(rows):
        shared = r.choice(out)[: r.randint(0, columns)] if out and r.random() < 0.6 else []
        out.append(shared + [r.randrange(alphabet) for _ in range(columns - len(shared))])
    return out


def random_mask(r: random.Random, rows: int, columns: int) -> Tensor:
    """Ragged ends, with holes, empty rows and full ones among them."""
    ends = torch.tensor([r.choice((0, columns, r.randint(0, columns))) for _ in range(rows)], dtype=torch.int64)
    mask = torch.arange(columns) < ends.unsqueeze(1)
    holes = torch.tensor([[r.random() < 0.2 for _ in range(columns)] for _ in range(rows)], dtype=torch.bool)
    return mask & ~holes.reshape(rows, columns)


def random_batch(r: random.Random, most_rows: int = 10, most_columns: int = 9) -> dict[str, Any]:
    """Arguments of PrefixTree: padded tokens, and some of what else there may be."""
    rows, columns = r.randint(0, most_rows), r.randint(0, most_columns)
    alphabet = r.choice((1, 2, 2, 3, 50))
    tokens = torch.tensor(rows_of_tokens(r, rows, columns, alphabet), dtype=torch.int64).reshape(rows, columns)
    dtype = r.choice(INTEGERS)
    if dtype in (torch.int64, torch.int32) and r.random() < 0.3:
        tokens = 2**31 - 1 - tokens
    given: dict[str, Any] = {"tokens": tokens.to(dtype)}
    if r.random() < 0.6:
        given["mask"] = random_mask(r, rows, columns).to(r.choice((torch.bool, torch.int64, torch.float32)))
        given["ignore_masked"] = r.random() < 0.3
    span = r.random()
    if span < 0.3:
        given["lengths"] = torch.tensor([r.randint(0, columns) for _ in range(rows)], dtype=torch.int64)
    elif span < 0.5:
        given["attention_mask"] = random_mask(r, rows, columns)
    grouping = r.random()
    if grouping < 0.5:
        given["group_ids"] = torch.tensor([r.choice((7, -3, 10**12)) for _ in range(rows)], dtype=torch.int64)
    elif grouping < 0.7:
        given["group_size"] = r.choice([size for size in range(1, rows + 1) if rows % size == 0] or [1])
    return given


def packed(given: dict[str, Any], r: random.Random) -> dict[str, Any]:
    """The same batch as packed tokens: each row's columns up to a random end, as lengths allow."""
    tokens = given["tokens"]
    rows, columns = tokens.shape
    least = given["lengths"].tolist() if "lengths" in given else [0] * rows
    ends = [r.randint(low, columns) for low in least]
    keep = torch.arange(columns) < torch.tensor(ends, dtype=torch.int64).unsqueeze(1)
    flat = {name: given[name][keep] for name in ("tokens", "mask", "attention_mask") if name in given}
    return given | flat | {"cu_seqlens": torch.tensor([0, *ends]).cumsum(0)}


def random_branches(r: random.Random, most_rows: int = 10, most_columns: int = 9) -> dict[str, Any]:
    """Arguments of PrefixTree.from_branches: parents before and after their children, and all kinds of positions."""
    rows, columns = r.randint(0, most_rows), r.randint(0, most_columns)
    length = [r.randint(0, columns) for _ in range(rows)]
    group = [r.choice((0, 0, 5)) for _ in range(rows)]
    order = r.sample(range(rows), rows)
    parent, position = [-1] * rows, [0] * rows
    for place, b in enumerate(order):
        candidates = [other for other in order[:place] if group[other] == group[b]]
        if candidates and r.random() < 0.8:
            parent[b] = r.choice(candidates)
            most = min(length[b], length[parent[b]])
            position[b] = r.choice((0, most, r.randint(0, most)))
    given: dict[str, Any] = {
        name: torch.tensor(x, dtype=torch.int64)
        for name, x in (("parent", parent), ("branch_position", position), ("lengths", length), ("group_ids", group))
    }
    if r.random() < 0.5:
        given["mask"] = random_mask(r, rows, columns)
    return given


def branches_of(tree: PrefixTree) -> dict[str, Any]:
    """What from_branches takes, read off a tree of padded tokens that start at their rows' beginning.

    A row branches off the first earlier one that shares as many tokens with it as any does.
    """
    parent, position = [], []
    unique, lengths = tree.unique_of_token.tolist(), tree.lengths.tolist()
    groups = tree.root[tree.leaf].tolist()
    for b in range(tree.num_rows):
        shared = [
            _common(unique[a][: lengths[a]], unique[b][: lengths[b]]) if groups[a] == groups[b] else -1
            for a in range(b)
        ]
        best = max(shared, default=-1)
        parent.append(shared.index(best) if best >= 0 else -1)
        position.append(max(best, 0))
    branches = {"parent": parent, "branch_position": position, "lengths": lengths, "group_ids": groups}
    return {name: torch.tensor(x, dtype=torch.int64) for name, x in branches.items()}


def _common(a: list[int], b: list[int]) -> int:
    shared = 0
    while shared < min(len(a), len(b)) and a[shared] == b[shared]:
        shared += 1
    return shared


# ------------------------------------------------------------------------------------------------------- comparisons
def both(make: Callable[[], PrefixTree], backend: str = "cpu") -> tuple[PrefixTree, PrefixTree]:
    """The same tree on a backend and as the reference has it."""
    with fastreward.backend(backend):  # type: ignore[arg-type]
        tree = make()
    with fastreward.backend("reference"):
        return tree, make()


def same_tree(tree: PrefixTree, truth: PrefixTree, what: object = "") -> None:
    """Every array is the same."""
    for name in FIELDS:
        got, want = getattr(tree, name), getattr(truth, name)
        assert got.dtype == want.dtype
        assert torch.equal(got, want), f"{name}: {got.tolist()}, expected {want.tolist()} of {what}"
    assert (tree.num_nodes, tree.num_groups, tree.num_tokens) == (truth.num_nodes, truth.num_groups, truth.num_tokens)
    assert torch.equal(tree.forest.nodes, truth.forest.nodes), what  # and what has no public name
    assert torch.equal(tree.forest.rows, truth.forest.rows), what
    for n in range(0, tree.num_nodes, 3):
        assert torch.equal(tree.rows_of(n), truth.rows_of(n)), (n, what)


def aggregations(r: random.Random, tree: PrefixTree) -> Iterator[dict[str, Any]]:
    """Every op over sequences and over children, with random options."""
    for op in TREE_OPS:
        for over in OVERS:
            options: dict[str, Any] = {"op": op, "over": over}
            if r.random() < 0.5:
                options["weights"] = torch.rand(tree.num_rows) + 0.1
            if over == "children" and r.random() < 0.5:
                options["child_weights"] = torch.rand(tree.num_nodes) + 0.1
            if op in ("mean", "sum"):
                options["discount"] = r.choice((1.0, 0.9, -0.5, 0.0))
            if op == "logsumexp":
                options["scale"] = r.choice((1.0, 3.0, -0.7))
                options["normalized"] = r.random() < 0.5
            yield options


def advantage_modes(r: random.Random) -> Iterator[dict[str, Any]]:
    """Every mode, with random options."""
    for mode in TREE_MODES:
        yield {
            "mode": mode,
            "scale": r.choice(("std", "none")),
            "ddof": r.choice((0, 1)),
            "eps": r.choice((1e-6, 0.1)),
            "singleton": r.choice(("zero", "raw")),
        }


def close(got: Tensor, want: Tensor, what: object) -> None:
    """Equal up to rounding of their dtype, with NaN and infinities in the same places."""
    tolerance = 1e-12 if want.dtype == torch.float64 else 2e-6
    torch.testing.assert_close(
        got, want, atol=tolerance, rtol=tolerance, equal_nan=True, msg=lambda text: f"{what}: {text}"
    )


def same_values(tree: PrefixTree, truth: PrefixTree, r: random.Random, dtype: torch.dtype) -> None:
    """Operations with their gradients, on random values and upstream gradients."""

    def check(what: object, call: Callable[[PrefixTree, Tensor], Tensor], *shape: int, gradient: bool = True) -> None:
        x = torch.randn(shape, dtype=dtype).requires_grad_(gradient)
        got, want = call(tree, x), call(truth, x)
        close(got, want, what)
        assert got.dtype == dtype
        if gradient:
            upstream = torch.randn_like(got)
            close(*(torch.autograd.grad(y, x, upstream)[0] for y in (got, want)), f"gradient, {what}")

    for options in aggregations(r, tree):
        smooth = options["op"] in ("mean", "sum", "logsumexp")
        check(options, lambda t, v, o=options: t.aggregate(v, **o), tree.num_rows, gradient=smooth)
    for options in advantage_modes(r):
        check(options, lambda t, v, o=options: t.advantages(v, **o), tree.num_nodes, gradient=False)
    bounds = r.choice(({}, {"low": -0.5}, {"low": -1.0, "high": 0.5}))
    shift = torch.randn(tree.num_nodes, dtype=dtype)
    check(("propagate", bounds), lambda t, v: t.propagate(v, shift, initial=0.7, **bounds), tree.num_nodes)
    check(("propagate", bounds), lambda t, v: t.propagate(shift, v, **bounds), tree.num_nodes)
    for place in PLACES:
        check(place, lambda t, v, p=place: t.to_tokens(v, place=p), tree.num_nodes)
        own = torch.randn(tree.num_rows, dtype=dtype)
        check((place, "rows"), lambda t, v, p=place, own=own: t.to_tokens(v, place=p, row_values=own), tree.num_nodes)
    for op in TOKEN_OPS:
        check(op, lambda t, v, o=op: t.from_tokens(v, o), *tree.shape, gradient=op != "first")
    check("unique_to_tokens", lambda t, v: t.unique_to_tokens(v), tree.num_tokens)
