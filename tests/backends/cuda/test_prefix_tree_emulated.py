"""The CUDA C++ kernels of prefix trees in the emulation (see test_emulated.py): the CPU backend's values, and bits."""

from __future__ import annotations

import platform
import random
import shutil
from pathlib import Path
from typing import Any

import prefix_tree_raw_checks as checks
import pytest
import torch
from criterion import MASK_DTYPES
from emulation import Emulator
from torch import Tensor

import fastreward as fr
from fastreward._runtime import dispatch
from fastreward._runtime.layout import NODES
from fastreward.cuda import prefix_tree as kernels

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("g++") is None or platform.machine() != "x86_64" or platform.system() != "Linux",
        reason="the emulation needs g++ on x86-64 Linux",
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("emulation")


@pytest.fixture(autouse=True)
def emulator(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Emulator:
    stand_in = Emulator(folder)
    monkeypatch.setattr(kernels, "launch", stand_in.launch)
    return stand_in


@pytest.mark.parametrize(("seed", "mask"), list(enumerate((None, *MASK_DTYPES))))
def test_values(seed: int, mask: torch.dtype | None) -> None:
    checks.check_values(kernels, "cpu", checks.token_batch(seed), seed, mask, checks.WithRoom)


def test_values_of_branches() -> None:
    batch = checks.branch_batch(5)
    assert batch is not None
    checks.check_values(kernels, "cpu", batch, 5, None, checks.WithRoom)


def test_more_than_a_warp_has_lanes() -> None:
    """Nodes of hundreds of sequences and children, and on long edges; a group of more nodes than a block takes."""
    r = random.Random(3)
    base = [r.randrange(50) for _ in range(300)]
    rows = [[*base[: r.choice((2, 2, 2, 140))], r.randrange(400)] for _ in range(600)]
    batch = checks.batch_of(rows, [0] * len(rows), r, padded=False)
    checks.check_values(kernels, "cpu", batch, 3, torch.bool, checks.WithRoom)


def test_empty_batches() -> None:
    none = torch.zeros(0, dtype=torch.long)
    nodes, rows, extents = torch.zeros(len(NODES), 0).long(), torch.zeros(4, 0).long(), torch.zeros(1).long()
    assert kernels.broadcast_to_tokens(torch.zeros(0), nodes, rows, extents, None, "broadcast", 3).tolist() == [0] * 3
    assert kernels.scatter_reduce(torch.zeros(3), nodes, rows, extents, None, "sum", 3).tolist() == [0] * 3
    assert kernels.aggregate(torch.zeros(0), None, None, nodes, rows, checks.AggregateOptions()).shape == (0,)
    empty = checks.batch_of([[], [], []], [3, 1, 3], random.Random(0), padded=False)
    checks.check_values(kernels, "cpu", empty, 0, torch.bool, checks.WithRoom)
    assert kernels.node_of_token(*empty.build(checks.WithRoom)[:2], empty.extents, 0).shape == none.shape


def test_public(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tree that another backend has built, in a block that chooses cuda: values, gradients, numbers on the device."""
    monkeypatch.setattr(dispatch, "unavailable", lambda operation, name, device: dispatch.absent(operation, name))
    g = torch.Generator().manual_seed(0)
    tokens, mask = torch.randint(0, 2, (6, 9), generator=g), torch.rand(6, 9, generator=g) < 0.8
    tree = fr.PrefixTree(tokens, mask, ["b", "a", "b", "b", "a", "c"])

    def credit(backend: Any) -> list[Tensor]:
        rewards = torch.linspace(-1, 2, 6).requires_grad_()
        with fr.backend(backend):
            values = tree.aggregate(rewards, "mean", over="children", discount=torch.tensor(0.9))
            tree.to_tokens(tree.propagate(values, 0.25, initial=1.0, high=0.5)).square().sum().backward()
            advantages = tree.to_tokens(tree.advantages(values.detach()), row_values=rewards.detach(), place="start")
            unique = tree.from_tokens(advantages, "mean").requires_grad_()
            tree.unique_to_tokens(unique).square().sum().backward()
        assert rewards.grad is not None
        assert unique.grad is not None
        return [values.detach(), advantages, unique.detach(), rewards.grad, unique.grad]

    for got, want in zip(credit("cuda"), credit("cpu"), strict=True):
        torch.testing.assert_close(got, want)
    assert "prefix_tree_propagate_backward" in emulator.launched
    with fr.backend("cuda"), pytest.raises(fr.BackendError, match="no CUDA C\\+\\+ kernel builds or packs trees"):
        tree.pack()


def test_groups_do_not_meet() -> None:
    """A group's bits are the same whatever comes before it."""
    r = random.Random(1)
    base = [r.randrange(50) for _ in range(9)]
    rows = [base[: r.randint(0, 9)] + [r.randrange(50) for _ in range(4)] for _ in range(40)]
    g = torch.Generator().manual_seed(0)
    rewards, tokens = torch.randn(40, generator=g), [torch.randn(len(row), generator=g) for row in rows]
    labels = [int(i >= 9) for i in range(40)]
    alone, together = (_everything(rows[k:], labels[k:], rewards[k:], tokens[k:]) for k in (9, 0))
    for a, b in zip(alone, together, strict=True):
        assert len(a) > 30
        assert torch.equal(a, b[-len(a) :])


def _everything(rows: list[list[int]], group: list[int], rewards: Tensor, tokens: list[Tensor]) -> list[Tensor]:
    """Sums of all kinds, of the nodes, unique tokens and sequences that are there."""
    batch = checks.batch_of(rows, group, random.Random(0), padded=False)
    nodes, made, sizes = batch.build(checks.WithRoom)
    forest, count, flat = (nodes, made), int(sizes[0]), torch.cat(tokens)
    out = []
    for over in checks.OVERS:
        options = checks.AggregateOptions("mean", over, discount=0.9)
        values = kernels.aggregate(rewards, None, None, *forest, options)
        grad = kernels.aggregate_backward(values, rewards, None, None, *forest, options)
        passed = kernels.propagate_backward(values, values, values, *forest, (0.5, -checks.INF, checks.INF))
        siblings = kernels.advantages(values, *forest, checks.AdvantageOptions("sibling"))
        out += [x[:count] for x in (values, siblings, *passed)] + [grad]
    collected = kernels.collect(flat, *forest, batch.extents, None, "broadcast")
    return [*out, collected[:count], kernels.scatter_reduce(flat, *forest, batch.extents, None, "mean", int(sizes[2]))]
