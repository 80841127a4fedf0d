"""kernels/group.py under Triton's interpreter, against the float64 reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import raw_checks
import torch
from fastreward.kernels import group as kernels
from torch import Tensor

from fastreward._arguments.options import GroupOptions
from fastreward.reference import group as reference

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

SIZES = (8, 1, 20, 2, 5, 140, 3)


def case(components: int = 1, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(rewards [B, K] with NaN, labels [B] of shuffled groups, lengths [B])."""
    g = torch.Generator().manual_seed(seed)
    names = torch.tensor([7, -3, 2**40, 0, 11, 5, -9])
    labels = torch.cat([names[i].repeat(n) for i, n in enumerate(SIZES)])
    labels = labels[torch.randperm(len(labels), generator=g)]
    rewards = torch.randint(0, 5, (len(labels), components), generator=g).float() + 0.25
    rewards[torch.rand(rewards.shape, generator=g) < 0.1] = torch.nan
    return rewards, labels, torch.randint(1, 50, (len(labels),), generator=g).float()


def truth(
    rewards: Tensor, labels: Tensor, lengths: Tensor, o: GroupOptions, weights: Tensor | None = None,
    center: Tensor | None = None, scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return reference.forward(rewards, labels, 0, lengths, weights, center, scale, o).double()


def check(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize(
    ("center", "scale"),
    [
        ("none", "std"),
        ("mean", "std"),
        ("mean", "none"),
        ("mean", "batch-std"),
        ("leave-one-out", "max"),
        ("length-weighted", "std"),
        ("second-max", "max"),
        ("second-max", "none"),
    ],
)
def test_labelled(center: str, scale: str) -> None:
    rewards, labels, lengths = case()
    singleton = {"none": "raw", "mean": "zero"}.get(center, "nan")
    inside = scale == "std"  # an eps that shows where it stands
    o = GroupOptions(
        center=center, scale=scale, singleton=singleton, ddof=center == "mean", eps=0.05, eps_inside=inside
    )
    check(kernels.forward(rewards, labels, 0, lengths, None, None, None, o), truth(rewards, labels, lengths, o))


@pytest.mark.parametrize("size", [1, 16, 37, 130])
def test_neighbours(size: int) -> None:
    rewards, _, lengths = case(seed=size)
    rewards = rewards[: 178 // size * size].double()
    labels = torch.arange(len(rewards)) // size
    for o in (GroupOptions(), GroupOptions(center="leave-one-out", scale="none", singleton="raw")):
        check(kernels.forward(rewards, None, size, None, None, None, None, o), truth(rewards, labels, lengths, o))


@pytest.mark.parametrize(
    ("normalize", "scale", "weighted"),
    [
        ("sum-then-normalize", "std", True),
        ("sum-then-normalize", "batch-std", False),
        ("normalize-then-sum", "batch-std", True),
    ],
)
def test_components(normalize: str, scale: str, weighted: bool) -> None:
    rewards, labels, lengths = case(3)
    rewards[::17] = torch.nan
    weights = torch.tensor([1.0, -0.5, 2.0]) if weighted else None
    o = replace(GroupOptions(), normalize=normalize, scale=scale)
    got = kernels.forward(rewards, labels, 0, None, weights, None, None, o)
    check(got, truth(rewards, labels, lengths, o, weights))
    assert not got[::17].any()
    assert torch.equal(got, kernels.forward(rewards, labels, 0, None, weights, None, None, o))


def test_center_and_scale_from_tensors() -> None:
    rewards, labels, lengths = case()
    g = torch.Generator().manual_seed(4)
    center, scale = torch.randn(len(labels), generator=g), torch.rand(len(labels), generator=g) + 0.5
    o = GroupOptions(center="tensor", scale="tensor")
    got = kernels.forward(rewards, labels, 0, None, None, center, scale, o)
    check(got, truth(rewards, labels, lengths, o, None, center, scale))


def test_permuted_batch_gives_the_same_advantages_and_no_rows_none() -> None:
    rewards, labels, _ = case()
    o = GroupOptions()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(9))
    got = kernels.forward(rewards[order], labels[order], 0, None, None, None, None, o)
    check(got, kernels.forward(rewards, labels, 0, None, None, None, None, o)[order].double())
    assert kernels.forward(rewards[:0], labels[:0], 0, None, None, None, None, o).shape == (0,)


@pytest.mark.parametrize("contiguous", [False, True])
def test_statistics(contiguous: bool) -> None:
    raw_checks.check_group_statistics(kernels, "cpu", 150 if contiguous else 20, contiguous=contiguous, wide=contiguous)


def test_corners() -> None:
    raw_checks.check_group_corners(kernels, "cpu")


def test_a_large_group_without_scores_at_its_beginning() -> None:
    """Sums are relative to a scored reward among the first members, where there is one."""
    rewards = torch.randn(170, 1, generator=torch.Generator().manual_seed(5), dtype=torch.float64) + 1e3
    rewards[:140] = torch.nan
    labels, o = torch.zeros(170, dtype=torch.int64), GroupOptions()
    got = kernels.forward(rewards, labels, 0, None, None, None, None, o)
    check(got, truth(rewards, labels, torch.ones(170), o))
