"""Rows that are split over ranks: whitening, and groups that straddle them. One rank may have nothing at all."""

from __future__ import annotations

from typing import Any

import pytest
import rank_calls
import torch
from criterion import assert_as_good_as_torch
from rank_pool import RankPool
from torch import Tensor

import fastreward as fr
from fastreward.reference import whiten as reference

#: Rows of each rank.
SIZES = ([3, 4], [7], [4, 0, 3], [0, 0, 7])


def whitened(ranks: RankPool, xs: Any, masks: Any, **options: Any) -> Tensor:
    requests = [{"operation": "whiten", "args": (x, m), "options": options} for x, m in zip(xs, masks, strict=True)]
    return torch.cat([rank["out"]["result"] for rank in ranks.run(rank_calls.call, requests)])


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("options", [{}, {"shift_mean": False, "ddof": 0}, {"eps": 0.1}], ids=str)
def test_whitening_is_over_all_ranks(sizes: list[int], options: dict[str, Any], ranks: RankPool) -> None:
    x, mask = torch.randn(7, 40) * 3 + 50, torch.rand(7, 40) > 0.3
    x[~mask] = torch.nan
    truth = reference.whiten(x, mask, **options)
    got = whitened(ranks, x.split(sizes), mask.split(sizes), **options)
    assert_as_good_as_torch(got, truth, truth)


@pytest.mark.parametrize("full", [0, 1, 2])
def test_ranks_that_count_nothing(full: int, ranks: RankPool) -> None:
    xs = [torch.randn(2, 40) * 3 + 50 for _ in range(3)]
    masks = [torch.full((2, 40), float(rank == full)) for rank in range(3)]
    for x, mask in zip(xs, masks, strict=True):
        x[mask == 0] = torch.nan
    truth = reference.whiten(torch.cat(xs), torch.cat(masks))
    assert_as_good_as_torch(whitened(ranks, xs, masks), truth, truth)


def test_one_token_here_and_three_there(ranks: RankPool) -> None:
    xs, masks = [torch.ones(1), torch.zeros(3)], [torch.ones(1), torch.ones(3)]
    torch.testing.assert_close(whitened(ranks, xs, masks, eps=0.0), torch.tensor([1.5, -0.5, -0.5, -0.5]))
    population = torch.tensor([1.7320508, -0.5773503, -0.5773503, -0.5773503])
    torch.testing.assert_close(whitened(ranks, xs, masks, eps=0.0, ddof=0), population)


def test_equal_values_on_every_rank(ranks: RankPool) -> None:
    assert not whitened(ranks, [torch.full((7,), 0.1)] * 3, [torch.ones(7)] * 3, eps=0.0).any()


@pytest.mark.parametrize(
    ("masks", "messages"),
    [
        (
            [torch.ones(2)] * 2,
            [
                "x: expected finite values where mask is set, got nan at index [1]",
                "x: expected finite values where mask is set, got others on another rank",
            ],
        ),
        ([torch.zeros(2)] * 2, ["mask: expected at least 2 counted positions for ddof=1, got 0"] * 2),
        (
            [torch.ones(3), torch.ones(2)],
            [
                "mask: expected shape [2] (as x), got [3]",
                "process_group: rank 0 of it has refused its arguments; its own error says why",
            ],
        ),
    ],
)
def test_an_error_is_raised_on_every_rank(masks: list[Tensor], messages: list[str], ranks: RankPool) -> None:
    """One that left the others waiting would hang the job."""
    xs = [torch.tensor([1.0, torch.nan]), torch.tensor([2.0, 3.0])]
    requests = [{"operation": "whiten", "args": (x, m)} for x, m in zip(xs, masks, strict=True)]
    answers = ranks.ask(rank_calls.call, requests)
    assert [answer.error for answer in answers] == [f"ValueError: {message}" for message in messages]


# ------------------------------------------------------------------------------------------------------------ groups
def ids_of(kind: str, numbers: Tensor) -> dict[str, Any]:
    names = [f"uid {n}" for n in numbers.tolist()]
    if kind == "composite":
        return {"group_ids": fr.Groups.by(names, [7] * len(names))}
    return {"group_size": 2} if kind == "size" else {"group_ids": numbers if kind == "integers" else names}


def across(ranks: RankPool, operation: str, sizes: list[int], columns: dict[str, Tensor], **options: Any) -> list[Any]:
    """What each rank gets from its part of the columns, of which the first is not named."""
    parts = [x.split(sizes) for x in columns.values()]
    requests = []
    for own in zip(*parts, strict=True):
        named = dict(zip(columns, own, strict=True))
        ids = ids_of(options["kind"], named.pop("numbers"))
        rest = {**options, **ids}
        del rest["kind"]
        requests.append({"operation": operation, "args": (named.pop("x"),), "options": rest | named})
    return [rank["out"] for rank in ranks.run(rank_calls.call, requests)]


@pytest.mark.parametrize("sizes", [[6, 8], [14], [4, 0, 10]], ids=str)
@pytest.mark.parametrize("kind", ["integers", "strings", "composite", "size"])
def test_groups_straddle_ranks(kind: str, sizes: list[int], ranks: RankPool) -> None:
    """Every rank gets the bits that one process gets from all of them, ranks of other sizes and empty ones too."""
    rewards, lengths, numbers = torch.randn(14, 2), torch.rand(14), torch.randint(0, 4, (14,)) * 10**12
    rewards[3] = torch.nan
    options = {"center": "length-weighted", "scale": "batch-std"}
    columns = {"x": rewards, "numbers": numbers, "lengths": lengths}
    got = across(ranks, "group_advantages", sizes, columns, kind=kind, **options)
    expected = fr.group_advantages(rewards, **ids_of(kind, numbers), lengths=lengths, **options)  # type: ignore[arg-type]
    assert torch.equal(torch.cat([rank["result"] for rank in got]), expected)


STATISTICS = ("count", "mean", "weighted-mean", "std", "leave-one-out", "rank", "quantile", "pass-at-k", "batch-std")


@pytest.mark.parametrize("sizes", [[6, 8], [4, 0, 10]], ids=str)
@pytest.mark.parametrize("kind", ["integers", "strings", "size"])
def test_statistics_of_groups_that_straddle(kind: str, sizes: list[int], ranks: RankPool) -> None:
    x, weights, numbers = torch.randn(14), torch.rand(14), torch.randint(0, 4, (14,))
    x[5] = torch.nan
    columns = {"x": x, "numbers": numbers, "weights": weights}
    got = across(ranks, "group_statistics", sizes, columns, kind=kind, statistics=STATISTICS)
    expected = fr.group_statistics(x, **ids_of(kind, numbers), statistics=STATISTICS, weights=weights)
    for name in STATISTICS:
        torch.testing.assert_close(
            torch.cat([rank[name] for rank in got]), expected[name], rtol=0, atol=0, equal_nan=True
        )


def test_statistics_per_group_are_of_a_ranks_own_groups(ranks: RankPool) -> None:
    x, numbers = torch.tensor([1.0, 2.0, 3.0, 4.0, 6.0]), torch.tensor([5, 8, 8, 5, 9])
    columns = {"x": x, "numbers": numbers}
    got = across(ranks, "group_statistics", [2, 3], columns, kind="integers", statistics=("mean",), per="group")
    assert got[0]["mean"].tolist() == [2.5, 2.5]
    assert got[1]["mean"].tolist() == [2.5, 2.5, 6.0]


def test_an_empty_rank_has_the_others_dtype(ranks: RankPool) -> None:
    """torch.tensor([]) is float32, and the integers of others become float64."""
    columns = [torch.tensor([1, 0, 3]), torch.tensor([])]
    ids = [torch.tensor([1, 1, 2]), torch.tensor([], dtype=torch.int64)]
    requests = [{"operation": "group_advantages", "args": own} for own in zip(columns, ids, strict=True)]
    first, second = ranks.run(rank_calls.call, requests)
    assert torch.equal(first["out"]["result"], fr.group_advantages(columns[0], ids[0]))
    assert second["out"]["result"].shape == (0,)


def test_ranks_of_different_kinds_are_refused(ranks: RankPool) -> None:
    ids = torch.tensor([1, 1])
    requests = [{"operation": "group_advantages", "args": (x, ids)} for x in (torch.ones(2), torch.ones(2, 3))]
    for answer in ranks.ask(rank_calls.call, requests):
        assert answer.error == (
            "ValueError: rewards: expected as many components and the same dtype on every rank, "
            "got 1 of 32 bits, 3 of 32 bits"
        )


def test_labels_that_no_other_process_knows(ranks: RankPool) -> None:
    ids = [[frozenset({1}), frozenset({2})], ["a", "b"]]
    requests = [{"operation": "group_advantages", "args": (torch.ones(2), own)} for own in ids]
    first, second = ranks.ask(rank_calls.call, requests)
    assert first.error is not None
    assert first.error.startswith("TypeError: group_ids: expected integers, strings or tuples of them over a process")
    assert second.error is not None
    assert second.error.startswith("ValueError: process_group: rank 0 of it has refused")
