"""Prefix trees on a real GPU: the CPU backend's numbers and values at size, no synchronisation, CUDA graphs, bits."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any

import prefix_tree_raw_checks as checks
import pytest
import torch
from criterion import MASK_DTYPES
from torch import Tensor

import fastreward as fr
import fastreward.cuda
from fastreward.cpu import prefix_tree as cpu
from fastreward.cuda import prefix_tree as cuda

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
kernels = pytest.importorskip("fastreward.kernels.prefix_tree", reason="triton is not installed", exc_type=ImportError)


@contextmanager
def no_sync() -> Iterator[None]:
    """Any synchronising call of torch inside is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def rollouts(rows: int, columns: int, size: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens [B, T], mask, group ids): the rollouts of a group branch off each other, with ragged ends and holes."""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 150_000, (rows, columns), generator=g)
    first = torch.arange(rows) // size * size
    for b in range(rows):
        if b > first[b]:
            other = int(torch.randint(int(first[b]), b, (), generator=g))
            shared = int(torch.randint(columns // 4, columns + 1, (), generator=g))
            tokens[b, :shared] = tokens[other, :shared]
    ends = torch.randint(columns // 2, columns + 1, (rows, 1), generator=g)
    mask = (torch.arange(columns) < ends) & (torch.rand(rows, columns, generator=g) < 0.9)
    return tokens, mask, torch.arange(rows) // size


@pytest.fixture(params=["triton", "cuda"])
def chosen(request: pytest.FixtureRequest) -> Any:
    """A backend for what is computed on trees; Triton builds them."""
    reason = fastreward.cuda.missing() if request.param == "cuda" else None
    if reason is not None:
        pytest.skip(f"cuda: {reason}")
    return request.param


@pytest.fixture
def values_of(chosen: str) -> tuple[ModuleType, Any]:
    """Its raw functions on values, and what builds for it."""
    return (kernels, None) if chosen == "triton" else (cuda, kernels)


# --------------------------------------------------------------------------------------------------- raw functions
@pytest.mark.parametrize("seed", range(40))
def test_small_build(seed: int) -> None:
    checks.check_build(kernels, "cuda", checks.token_batch(seed, 40, 300))
    branches = checks.branch_batch(seed, 40)
    if branches is not None:
        checks.check_build(kernels, "cuda", branches)


@pytest.mark.parametrize("seed", range(20))
def test_small_values(seed: int, values_of: tuple[ModuleType, Any]) -> None:
    module, builder = values_of
    mask = (None, *MASK_DTYPES)[seed % (1 + len(MASK_DTYPES))]
    checks.check_values(module, "cuda", checks.token_batch(seed, 30, 200), seed, mask, builder)
    branches = checks.branch_batch(seed, 30)
    if branches is not None:
        checks.check_values(module, "cuda", branches, seed, builder=builder)


@pytest.mark.parametrize("dtype", MASK_DTYPES)
def test_small_masks(dtype: torch.dtype) -> None:
    extents = torch.tensor([0, 5, 5, 9, 50_000, 50_003, 90_000])
    mask = torch.rand(90_000, generator=torch.Generator().manual_seed(0)) < 0.3
    mask[5:9] = mask[30_000:50_000] = mask[50_003:80_000] = False
    checks.check_rows(kernels, "cuda", mask.to(dtype), extents)


@pytest.mark.parametrize(("rows", "columns", "size"), [(512, 6144, 8), (512, 1536, 64), (20_000, 24, 20_000)])
def test_at_size(rows: int, columns: int, size: int, values_of: tuple[ModuleType, Any]) -> None:
    """3.1M tokens in groups of 8, 786K in groups of 64, and one group of 20,000 short rows."""
    tokens, mask, group = rollouts(rows, columns, size)
    extents = torch.arange(rows + 1) * columns
    lengths = cpu.lengths(mask.reshape(-1), extents, None)
    flat = tokens.reshape(-1).int()
    batch = checks.Batch(flat, None, None, extents[:-1].contiguous(), lengths, group, extents)
    module, builder = values_of
    if builder is None:
        checks.check_build(kernels, "cuda", batch)
    f = checks.Forests(module, "cuda", batch, 0, builder)
    checks.check_numbers(f)
    checks.check_aggregates(f)
    checks.check_tokens(f, mask.reshape(-1))
    checks.check_advantages(f)
    checks.check_propagate(f)


def test_collisions_of_hashes_cost_sharing_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastreward.kernels.prefix_tree.parents.KEY_BITS", 5)
    r = random.Random(0)
    rows = checks.rows_of_tokens(r, 300, 40, 2)
    batch = checks.batch_of(rows, [i % 3 for i in range(300)], r, padded=False)
    nodes, made, _ = batch.build(kernels, "cuda")
    unique = kernels.unique_of_token(nodes, made, batch.extents.cuda(), batch.flat)
    ids = kernels.layout(batch.tokens.cuda(), nodes, made, batch.flat)[0]  # type: ignore[union-attr]
    assert torch.equal(ids[unique].cpu(), batch.tokens.long())  # type: ignore[union-attr]


# ---------------------------------------------------------------------------------------------------------- public
def test_nothing_waits_for_the_device(chosen: Any) -> None:
    """From tokens to credit and back to a gradient, twice with the same bits; and as on the CPU."""
    tokens, mask, group = rollouts(256, 700, 8)
    rewards = torch.randn(256, generator=torch.Generator().manual_seed(1))

    def credit(device: str) -> tuple[Tensor, ...]:
        r = given[device][3].detach().requires_grad_()
        tree = fr.PrefixTree(*given[device][:3])
        with fr.backend(chosen) if device == "cuda" else nullcontext():
            values = tree.aggregate(r, "mean", over="children", discount=0.99)
            tree.to_tokens(tree.propagate(values, 0.1, high=0.5)).square().sum().backward()
            tokens_of = tree.to_tokens(tree.advantages(values.detach(), "sibling"), row_values=r.detach())
            assert r.grad is not None
            return tokens_of, tree.from_tokens(tokens_of, "mean"), tree.node_of_token, r.grad

    given = {d: tuple(x.to(d) for x in (tokens, mask, group, rewards)) for d in ("cpu", "cuda")}
    credit("cuda")  # compiles
    torch.cuda.synchronize()
    with no_sync():
        got, again = credit("cuda"), credit("cuda")
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    for a, b in zip(got, credit("cpu"), strict=True):
        a = a.cpu()[: len(b)]  # on a GPU, places for the most unique tokens that there can be
        torch.testing.assert_close(a, b, atol=2e-6, rtol=2e-6)


def test_paths_and_branches_wait_for_nothing() -> None:
    paths = torch.randint(0, 3, (200, 6), device="cuda")
    parent = torch.arange(-1, 199, device="cuda")
    mask = torch.ones(200, 50, dtype=torch.bool, device="cuda")
    at, lengths = torch.full_like(parent, 20), torch.full_like(parent, 50)

    def trees() -> tuple[fr.PrefixTree, fr.PrefixTree]:
        by_path = fr.PrefixTree.from_paths(paths, group_size=20)
        return by_path, fr.PrefixTree.from_branches(parent, at, lengths, mask=mask)

    trees()
    torch.cuda.synchronize()
    with no_sync():
        by_path, by_branch = trees()
    want = fr.PrefixTree.from_paths(paths.cpu(), group_size=20)
    assert torch.equal(by_path.node_of_token.cpu(), want.node_of_token)
    want = fr.PrefixTree.from_branches(*(x.cpu() for x in (parent, at, lengths)), mask=mask.cpu())
    assert torch.equal(by_branch.node_of_token.cpu(), want.node_of_token)
    assert by_branch.num_nodes == want.num_nodes


@pytest.mark.parametrize("build", [False, True])
def test_cuda_graph(build: bool, chosen: Any) -> None:
    """to_tokens replays for new values; a whole tree replays for new tokens."""
    tokens, mask, group = (x.cuda() for x in rollouts(64, 300, 8))
    tree = fr.PrefixTree(tokens, mask, group)
    rewards = torch.randn(64, device="cuda")

    def credit() -> Tensor:
        t = fr.PrefixTree(tokens, mask, group) if build else tree
        with fr.backend(chosen):
            values = t.aggregate(rewards, over="children")
            return t.to_tokens(t.advantages(t.propagate(values, 0.5)))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        credit()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = credit()
    rewards.copy_(torch.randn(64))
    if build:
        tokens.copy_(rollouts(64, 300, 8, seed=1)[0])
    graph.replay()
    assert torch.equal(out, credit())
