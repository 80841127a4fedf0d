"""group_statistics against the float64 loops of the reference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from criterion import assert_as_good_as_torch
from raw_checks import check_group_statistics

import fastreward as fr
from fastreward.cpu import group as cpu
from fastreward.group_statistics import STATISTICS
from fastreward.reference.group import group_statistics as truth_of

OF_OTHERS = ("leave-one-out", "leave-one-out-std", "leave-one-out-logsumexp", "others-max", "win-rate")


def batch(count: int = 40, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(values with NaN and ties, shuffled labels, weights); a group of one, and one without values."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, generator=g)
    x[: count // 2] = x[: count // 2].round()
    x[torch.rand(count, generator=g) < 0.2] = torch.nan
    ids = torch.randint(-2, 5, (count,), generator=g) * 10**10
    ids[1], ids[2] = 7, 8
    x[1], x[2] = 0.5, torch.nan
    return x, ids, torch.rand(count, generator=g)


@pytest.mark.parametrize("name", STATISTICS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_is_the_loops(name: str, backend: Any) -> None:
    x, ids, weights = batch()
    options: dict[str, Any] = {"weights": weights} if name == "weighted-mean" else {}
    with fr.backend(backend):
        for given in ({"q": 0.3, "k": 2, "ddof": 0}, {"q": 1.0, "k": 3, "ties": "ordinal"}, {"ties": "min"}):
            got = fr.group_statistics(x, ids, (name,), **options, **given)[name]
            assert got.dtype == torch.float32
            truth = truth_of(x, ids, statistic=name, **options, **given)
            assert_as_good_as_torch(got, truth, truth, f"{name} {given}")
        contiguous = fr.group_statistics(x, None, (name,), group_size=5, **options)[name]
        truth = truth_of(x, group_size=5, statistic=name, **options)
        assert_as_good_as_torch(contiguous, truth, truth, name)


@pytest.mark.parametrize(("contiguous", "wide"), [(True, False), (False, True)])
def test_raw(contiguous: bool, wide: bool) -> None:
    check_group_statistics(cpu, "cpu", 200, contiguous=contiguous, wide=wide)


def test_a_mask_is_nan_and_other_groups_do_not_matter() -> None:
    x, ids, weights = batch()
    mask = torch.arange(40) % 4
    absent = x.masked_fill(mask == 0, torch.nan)
    x[mask == 0] = torch.inf
    weights[mask == 0] = torch.nan
    names = tuple(n for n in STATISTICS if not n.startswith("batch"))
    got = fr.group_statistics(x, ids, names, mask=mask, weights=weights)
    expected = fr.group_statistics(absent, ids, names, weights=weights.nan_to_num(0.5))
    own = ids == 10**10
    alone = fr.group_statistics(absent[own], ids[own], names, weights=weights.nan_to_num(0.5)[own])
    for name in names:
        assert torch.equal(got[name].nan_to_num(9), expected[name].nan_to_num(9)), name
        assert torch.equal(got[name][own].nan_to_num(9), alone[name].nan_to_num(9)), name


@pytest.mark.parametrize("value", [0.0, 0.3, 1e6 + 0.1])
def test_equal_others_have_no_spread(value: float) -> None:
    """A spread that only rounding makes would be divided by: advantages of 1e6."""
    x = torch.tensor([value] * 6 + [value + 1.0], dtype=torch.float64)
    got = fr.group_statistics(x, None, ("leave-one-out-std",), group_size=7)["leave-one-out-std"]
    assert got[-1] == 0
    torch.testing.assert_close(got[:-1], torch.full((6,), 6**-0.5), rtol=1e-6, atol=0.0)


def test_per_group() -> None:
    x = torch.tensor([1.0, 5.0, 2.0, 4.0, torch.nan, 9.0])
    groups = fr.Groups(["b", "a", "b", "a", "c", "b"])
    got = fr.group_statistics(x, groups, ("mean", "count"), per="group")
    assert got["mean"].nan_to_num(-1).tolist() == [4.0, 4.5, -1.0]
    assert got["count"].tolist() == [3, 2, 0]
    assert fr.group_statistics(x, None, ("max",), group_size=2, per="group")["max"].tolist() == [5, 4, 9]


def test_leaving_out_the_largest_cancels_nothing() -> None:
    """log(exp(lse) - exp(x)) is -inf here."""
    got = fr.group_statistics(torch.tensor([0.0, -60.0, -61.0]), None, ("leave-one-out-logsumexp",), group_size=3)
    others = -60 + math.log1p(math.exp(-1))
    torch.testing.assert_close(got["leave-one-out-logsumexp"], torch.tensor([others, math.exp(-61), math.exp(-60)]))


def test_known_answers() -> None:
    x = torch.tensor([1.0, 0.0, 1.0, 0.0])
    got = fr.group_statistics(x, group_size=4, statistics=("pass-at-k", "win-rate", "rank"), k=2)
    assert got["pass-at-k"].tolist() == pytest.approx([1 - 1 / 6] * 4)
    assert got["win-rate"].tolist() == pytest.approx([5 / 6, 1 / 6, 5 / 6, 1 / 6])
    assert got["rank"].tolist() == [2.5, 0.5, 2.5, 0.5]


@pytest.mark.parametrize("count", [0, 1])
def test_tiny_batches(count: int) -> None:
    names = tuple(set(STATISTICS) - {"weighted-mean"})
    got = fr.group_statistics(torch.ones(count), torch.zeros(count, dtype=torch.long), names)
    assert all(x.shape == (count,) for x in got.values())
    assert not count or all(got[name].isnan().all() for name in (*OF_OTHERS, "std", "second-max"))


@pytest.mark.parametrize(
    ("error", "message", "given"),
    [
        (ValueError, "statistics: expected one of.*did you mean 'mean'", {"statistics": ("meen",)}),
        (TypeError, r"statistics: expected a tuple of names, got 'mean'; write \('mean',\)", {"statistics": "mean"}),
        (ValueError, "group_ids, group_size: expected exactly one", {"group_size": None}),
        (ValueError, "weights: needed for 'weighted-mean'", {"statistics": ("weighted-mean",)}),
        (ValueError, "weights: needed .* and only for it", {"weights": torch.ones(4)}),
        (ValueError, r"x: expected finite .* got inf at index \[1\]", {"x": torch.tensor([1, math.inf, 1, 1])}),
        (
            ValueError,
            r"weights: expected finite numbers >= 0, got -1.0 at index \[2\]",
            {"statistics": ("weighted-mean",), "weights": torch.tensor([1, 1, -1, 1])},
        ),
        (ValueError, r"x: expected shape \[4\]", {"x": torch.ones(4, 2)}),
        (ValueError, r"mask: expected shape \[4\]", {"mask": torch.ones(3)}),
        (ValueError, r"q: expected a number in \[0, 1\], got 1.5", {"q": 1.5}),
        (ValueError, "k: expected an integer of at least 1, got 0", {"k": 0}),
        (ValueError, "ties: expected one of", {"ties": "mean"}),
        (ValueError, "statistics: 'rank' is a statistic of an entry", {"statistics": ("rank",), "per": "group"}),
    ],
)
def test_messages(error: type[Exception], message: str, given: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        fr.group_statistics(**{"x": torch.ones(4), "group_size": 2, **given})


def test_opcheck() -> None:
    arguments = (torch.randn(12), torch.arange(12) % 3, 0, torch.rand(12), True, "cpu")
    torch.library.opcheck(torch.ops.fastreward.group_statistics, arguments)
