"""kernels/prefix_tree under Triton's interpreter: the CPU backend's numbers and values, on random small batches."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import prefix_tree_raw_checks as checks
import pytest
import torch
from criterion import MASK_DTYPES
from fastreward.kernels import prefix_tree as kernels
from fastreward.kernels.prefix_tree import parents
from torch import Tensor

import fastreward as fr
from fastreward._runtime.layout import NODES

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


# ------------------------------------------------------------------------------------------------------------- build
@pytest.mark.parametrize("seed", range(8))
def test_build(seed: int) -> None:
    checks.check_build(kernels, "cpu", checks.token_batch(seed))


@pytest.mark.parametrize("seed", range(5))
def test_build_from_branches(seed: int) -> None:
    batch = checks.branch_batch(seed)
    if batch is not None:
        checks.check_build(kernels, "cpu", batch)


def test_blocks_of_tokens() -> None:
    """Rows that part on each side of a block's edge, that end there, and that go over many blocks."""
    r = checks.random.Random(0)
    base = [r.randrange(1000) for _ in range(5000)]
    ends = (*range(30, 35), 63, 64, 65, 4095, 4096, 4097, 5000)
    rows = [base[:n] for n in ends] + [[*base[:n], -1, n] for n in ends] + [[], base]
    r.shuffle(rows)
    for group in ([0] * len(rows), [i % 2 for i in range(len(rows))]):
        checks.check_build(kernels, "cpu", checks.batch_of(rows, group, r, padded=False))


def test_empty_batches() -> None:
    none = torch.zeros(0, dtype=torch.long)
    nodes, rows, sizes = kernels.build(none, None, None, none, none, none, False, True)
    assert (nodes.shape, rows.shape, sizes.tolist()) == ((len(NODES), 0), (4, 0), [0, 0, 0])
    extents = torch.zeros(1).long()
    assert kernels.broadcast_to_tokens(torch.zeros(0), nodes, rows, extents, None, "broadcast", 0).shape == (0,)
    assert kernels.aggregate(torch.zeros(0), None, None, nodes, rows, checks.AggregateOptions()).shape == (0,)
    checks.check_build(kernels, "cpu", checks.batch_of([[], [], []], [3, 1, 3], checks.random.Random(0), padded=False))


@pytest.mark.parametrize("bits", [1, 4])
def test_collisions_of_hashes_cost_sharing_alone(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a few bits of each hash nearly all prefixes collide, and every row still finds its own tokens."""
    monkeypatch.setattr(parents, "KEY_BITS", bits)
    missed = 0
    for seed in range(4):
        batch = checks.token_batch(seed)
        nodes, rows, sizes = batch.build(kernels)
        unique = kernels.unique_of_token(nodes, rows, batch.extents, batch.flat)
        ids = kernels.layout(batch.tokens, nodes, rows, batch.flat)[0]
        at, ends = torch.arange(batch.flat), batch.starts + batch.lengths
        inside = ((at[:, None] >= batch.starts) & (at[:, None] < ends)).any(1)
        assert torch.equal(unique >= 0, inside)
        assert torch.equal(ids[unique[inside]], batch.tokens[inside].long())
        assert int(nodes[NODES.index("count")][nodes[NODES.index("root")].unique()].sum()) == len(batch.lengths)
        missed += int(sizes[2]) - int(batch.build(checks.cpu)[2][2])
    assert missed > 0


def test_wrong_lengths_stay_inside() -> None:
    """Where values are not checked: rows end where the next one begins, or the tokens do."""
    r = checks.random.Random(3)
    batch = checks.batch_of([[1, 2, 3], [1, 2], [1, 2, 4, 5]], [0, 0, 0], r, padded=False)
    wrong = torch.tensor([5, 10**12, 4])
    got = replace(batch, lengths=wrong).build(kernels)
    assert all(torch.equal(a, b) for a, b in zip(got, batch.build(kernels), strict=True))
    got = replace(batch, lengths=torch.tensor([3, -7, 4])).build(kernels)
    want = replace(batch, lengths=torch.tensor([3, 0, 4])).build(kernels)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_rows_that_overlap_end() -> None:
    """More prefixes than the tables have room for, of starts that nobody has checked."""
    starts, lengths = torch.tensor([0, 64] * 10), torch.full((20,), 10**9)
    tokens = torch.arange(64)
    nodes, rows, sizes = kernels.build(tokens, None, None, starts, lengths, torch.arange(20), False, True)
    assert rows[checks.ROWS.index("length")].tolist() == [64, 0] * 10
    assert (sizes[0] <= nodes.shape[1]).all()


def test_wrong_branches_hang_off_the_root() -> None:
    """A circle and what leads into it, a parent that is not there, one of another group, a row itself."""
    count = 8
    starts, lengths = torch.arange(count) * 10, torch.full((count,), 10)
    group = torch.tensor([0, 0, 0, 0, 0, 0, 5, 0])

    def build(parent: list[int]) -> tuple[Tensor, ...]:
        given = torch.tensor(parent), torch.full((count,), 4), starts, lengths, group
        return kernels.build(None, *given, False, True)

    got = build([1, 2, 0, 2, 99, 4, 0, 7])
    want = build([-1, -1, -1, -1, -1, 4, -1, -1])
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# ------------------------------------------------------------------------------------------------------------ values
@pytest.mark.parametrize(("seed", "mask"), list(zip((1, 3, 4, 5, 21), MASK_DTYPES[::-1], strict=False)))
def test_values(seed: int, mask: torch.dtype) -> None:
    checks.check_values(kernels, "cpu", checks.token_batch(seed), seed, mask)


def test_values_of_branches() -> None:
    batch = checks.branch_batch(5)
    assert batch is not None
    checks.check_values(kernels, "cpu", batch, 5, None)


def test_groups_do_not_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group's bits are the same whatever comes before it, and with more nodes than a program takes at a time."""
    for function in (kernels.aggregate, kernels.advantages):
        monkeypatch.setattr(sys.modules[function.__module__], "LANES", 16)
    r = checks.random.Random(1)
    base = [r.randrange(50) for _ in range(9)]
    rows = [base[: r.randint(0, 9)] + [r.randrange(50) for _ in range(4)] for _ in range(40)]
    options = checks.AggregateOptions("mean", "children", discount=0.9)
    rewards = torch.randn(40, generator=torch.Generator().manual_seed(0))

    def run(first: int) -> tuple[Tensor, Tensor]:
        group = [int(i >= 9) for i in range(first, 40)]
        batch = checks.batch_of(rows[first:], group, checks.random.Random(0), padded=False)
        nodes, made, sizes = batch.build(kernels)
        values = kernels.aggregate(rewards[first:], None, None, nodes, made, options)
        passed = kernels.propagate(values, values, nodes, made, (0.5, -checks.INF, checks.INF))
        count, want = int(sizes[0]), batch.build(checks.cpu)[:2]
        torch.testing.assert_close(values[:count], checks.cpu.aggregate(rewards[first:], None, None, *want, options))
        again = checks.cpu.propagate(values[:count], values[:count], *want, (0.5, -checks.INF, checks.INF))
        torch.testing.assert_close(passed[:count], again)
        return values[:count], passed[:count]

    for alone, together in zip(run(9), run(0), strict=True):
        assert len(alone) > 2 * 16
        assert torch.equal(alone, together[-len(alone) :])


# ------------------------------------------------------------------------------------------------------------ tokens
@pytest.mark.parametrize("dtype", MASK_DTYPES)
def test_masks(dtype: torch.dtype) -> None:
    """Starts and lengths: ragged, with holes, empty rows, rows without a counted position, long ones."""
    g = torch.Generator().manual_seed(0)
    extents = torch.tensor([0, 5, 5, 9, 5000, 5003, 9000])
    mask = torch.rand(9000, generator=g) < 0.3
    mask[5:9] = False
    mask[3000:5000] = False
    mask[5003:8000] = False
    checks.check_rows(kernels, "cpu", mask.to(dtype), extents)


def test_rows_of_one_length_and_of_many() -> None:
    """Blocks of tokens with one row, with many, and rows of more than a block."""
    r = checks.random.Random(7)
    long = [r.randrange(3) for _ in range(1500)]
    for rows in ([long, long[:1200] + [7] * 300], [[i % 3] * (i % 7) for i in range(20)] + [long]):
        f = checks.Forests(kernels, "cpu", checks.batch_of(rows, [0] * len(rows), r, padded=len(rows) == 2), 0)
        checks.check_tokens(f, checks.mask_of(f, torch.bool))
        checks.check_numbers(f)


# ------------------------------------------------------------------------------------------------------------ public
def _public(backend: str, **given: Any) -> list[Tensor]:
    """What a user sees, of the places that are there."""
    with fr.backend(backend):  # type: ignore[arg-type]
        tree = fr.PrefixTree(**given)
        rewards = torch.linspace(-1, 2, tree.num_rows).requires_grad_()
        values = tree.aggregate(rewards)
        credit = tree.to_tokens(tree.advantages(values.detach()), row_values=rewards.detach(), place="start")
        tree.to_tokens(tree.propagate(values, 0.25, initial=1.0, high=0.5)).square().sum().backward()
        folded = tree.from_tokens(credit, "mean")
        count = int(tree.forest.sizes[0])
        assert rewards.grad is not None
        fields = [tree.parent, tree.depth, tree.count, tree.tout, tree.is_branch, values.detach()]
        return [x[:count] for x in fields] + [tree.leaf, tree.node_of_token, credit, folded, rewards.grad]


@pytest.mark.parametrize("case", ["masked", "left-padded", "ignore_masked", "packed"])
def test_public(case: str) -> None:
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 2, (6, 9), generator=g)
    mask = torch.rand(6, 9, generator=g) < 0.8
    given: dict[str, Any] = {"tokens": tokens, "mask": mask, "group_ids": ["b", "a", "b", "b", "a", "c"]}
    if case == "left-padded":
        given["attention_mask"] = (torch.arange(9) >= torch.arange(6)[:, None]).long()
    elif case == "ignore_masked":
        given["ignore_masked"] = True
    elif case == "packed":
        given = {"tokens": tokens.reshape(-1), "cu_seqlens": torch.tensor([0, 9, 9, 20, 31, 54]), "group_size": 5}
    for got, want in zip(_public("triton", **given), _public("cpu", **given), strict=True):
        torch.testing.assert_close(got, want)


def test_public_paths_and_branches() -> None:
    paths = torch.tensor([[3, 1, 2], [3, 1, -1], [4, 1, 2], [3, 5, 2]])
    segments = torch.tensor([[0, 0, 1, 2], [0, 1, 1, -1], [-1, 2, 2, 0], [1, 1, 1, 1]])
    trees = []
    for backend in ("triton", "cpu"):
        with fr.backend(backend):  # type: ignore[arg-type]
            path_tree = fr.PrefixTree.from_paths(paths, segment_ids=segments)
            branches = torch.tensor([-1, 0, 1]), torch.tensor([0, 2, 1]), torch.tensor([5, 4, 3])
            trees.append((path_tree, fr.PrefixTree.from_branches(*branches)))
    for got, want in zip(*trees, strict=True):
        assert torch.equal(got.node_of_token, want.node_of_token)
        assert torch.equal(got.parent[: want.num_nodes], want.parent)
