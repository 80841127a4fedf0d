"""Rows of tokens that are split over ranks: what each gets is its part of what one process gets from all."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import rank_calls
import torch
from rank_pool import RankPool
from torch import Tensor

import fastreward as fr

B, T = 9, 24
#: Tokens of each rank.
CUTS = ([12, 12], [5, 19], [24], [3, 0, 21], [8, 8, 8])
AT_MASKED = ("carry", "zero", "decay", "reset")


def mask_of(seed: int) -> Tensor:
    """Rows of all kinds: full, empty, gaps across the cuts, one token at an end, none on the last rank."""
    mask = torch.rand(B, T, generator=torch.Generator().manual_seed(seed)) > 0.4
    mask[0], mask[1] = True, False
    mask[2, 10:20], mask[3], mask[4] = False, False, False
    mask[3, 0] = mask[4, -1] = True
    mask[5, 12:] = False
    mask[6, :13] = False
    return mask


def problem(operation: str, kind: str, seed: int) -> dict[str, Any]:
    """Tensors [B, T] and others of a call, NaN under the mask wherever it does not matter."""
    generator = torch.Generator().manual_seed(seed)

    def random() -> Tensor:
        return torch.randn(B, T, generator=generator)

    mask = mask_of(seed)
    p: dict[str, Any] = {"mask": mask, "rewards": random()}
    if operation in ("gae", "vtrace"):
        p["values"] = random().masked_fill(~mask, torch.nan)
    if operation == "vtrace":
        p["log_ratios"] = random().masked_fill(~mask, torch.nan)
        p |= {"rho_bar": 0.8 if seed % 2 else 1.4, "c_bar": 0.9}
    if operation == "lambda_returns":
        p["next_values"] = random().masked_fill(~mask, torch.nan)
    if operation != "discounted_returns":
        p["lam"] = {"number": 0.9, "row": torch.rand(B, generator=generator)}.get(kind, random().abs())
    p["gamma"] = {"number": 0.95, "row": torch.rand(B, generator=generator)}.get(kind, random())
    if kind == "token" and operation in ("gae", "vtrace"):
        p["next_values"] = random().masked_fill(~mask, torch.nan)
    if kind == "row" and operation in ("gae", "vtrace"):
        p["next_values"] = torch.randn(B, generator=generator)
    if kind == "row" and operation == "discounted_returns":
        p["initial"] = torch.randn(B, generator=generator)
    if kind != "number" and operation != "discounted_returns":
        p["done"] = torch.rand(B, T, generator=generator) > 0.8
        p["terminated"] = torch.rand(B, T, generator=generator) > 0.9
    return p


def parts_of(p: dict[str, Any], places: list[Tensor]) -> list[dict[str, Any]]:
    """The tokens of each rank, by their places in a row."""

    def part(x: Any, own: Tensor) -> Any:
        return x[:, own] if isinstance(x, Tensor) and x.shape == (B, T) else x

    return [{name: part(x, own) for name, x in p.items()} for own in places]


def compare(ranks: RankPool, operation: str, p: dict[str, Any], places: list[Tensor], **options: Any) -> None:
    shared = {name: x for name, x in options.items() if name != "sharding"}
    expected = rank_calls.tensors(getattr(fr, operation)(**p, **shared))
    requests = [{"operation": operation, "named": own, "options": options} for own in parts_of(p, places)]
    for own, rank in zip(places, ranks.run(rank_calls.call, requests), strict=True):
        for name, x in expected.items():
            size = 1.0 + float(x.abs().max())
            torch.testing.assert_close(rank["out"][name], x[:, own], rtol=2e-6, atol=1e-6 * size)


def contiguous(cuts: list[int]) -> list[Tensor]:
    return list(torch.arange(T).split(cuts))


def zigzag(count: int) -> list[Tensor]:
    chunks = torch.arange(T).chunk(2 * count)
    return [torch.cat([chunks[rank], chunks[2 * count - 1 - rank]]) for rank in range(count)]


@pytest.mark.parametrize("at_masked", AT_MASKED)
@pytest.mark.parametrize("kind", ["number", "row", "token"])
@pytest.mark.parametrize("operation", ["discounted_returns", "gae", "lambda_returns", "vtrace"])
def test_parts_of_the_whole(operation: str, kind: str, at_masked: str, ranks: RankPool) -> None:
    for seed, (cuts, masked_rewards) in enumerate(itertools.product(CUTS, ("to-last-valid", "drop"))):
        options = {"at_masked": at_masked, "masked_rewards": masked_rewards}
        compare(ranks, operation, problem(operation, kind, seed), contiguous(cuts), **options)


@pytest.mark.parametrize("at_masked", AT_MASKED)
def test_from_the_left(at_masked: str, ranks: RankPool) -> None:
    for seed, cuts in enumerate(CUTS):
        p = problem("discounted_returns", "row", seed)
        compare(ranks, "discounted_returns", p, contiguous(cuts), at_masked=at_masked, reverse=False)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("operation", ["discounted_returns", "gae"])
def test_zigzag(operation: str, count: int, ranks: RankPool) -> None:
    for seed, (kind, at_masked) in enumerate(itertools.product(("row", "token"), AT_MASKED)):
        p = problem(operation, kind, seed)
        compare(ranks, operation, p, zigzag(count), at_masked=at_masked, sharding="zigzag")
    if operation == "discounted_returns":
        compare(ranks, operation, problem(operation, "row", 3), zigzag(count), reverse=False, sharding="zigzag")


def test_without_a_mask(ranks: RankPool) -> None:
    p = {"rewards": torch.randn(B, T), "values": torch.randn(B, T)}
    compare(ranks, "gae", p, contiguous([5, 19]), gamma=0.9, lam=0.95)


@pytest.mark.parametrize("sharding", ["contiguous", "zigzag"])
@pytest.mark.parametrize("at_masked", ["carry", "zero"])
@pytest.mark.parametrize("operation", ["gae", "discounted_returns"])
def test_packed(operation: str, at_masked: str, sharding: str, ranks: RankPool) -> None:
    """Sequences of their own lengths, of which each rank holds a part; discounted_returns from the left."""
    lengths = [8, 4, 0, 16]
    mask = torch.rand(sum(lengths)) > 0.3
    whole = {"rewards": torch.randn(28), "mask": mask}
    options: dict[str, Any] = {"gamma": torch.rand(4), "at_masked": at_masked}
    if operation == "gae":
        whole["values"] = torch.randn(28).masked_fill(~mask, torch.nan)
        options |= {"next_values": torch.randn(4), "lam": 0.9}
    else:
        options |= {"initial": torch.randn(4), "reverse": False}
    places: list[list[Tensor]] = [[], []]
    for start, length in zip([0, 8, 12, 12], lengths, strict=True):
        own = torch.arange(start, start + length)
        quarter = own.chunk(4) if length else (own,) * 4
        for rank in (0, 1):
            even = torch.cat([quarter[rank], quarter[3 - rank]])
            cut = own.split([length - length // 4, length // 4])[rank]
            places[rank].append(even if sharding == "zigzag" else cut)
    bounds = torch.tensor([0, *itertools.accumulate(lengths)])
    expected = rank_calls.tensors(getattr(fr, operation)(**whole, **options, cu_seqlens=bounds))
    requests = []
    for own in places:
        flat = torch.cat(own)
        named = {name: x[flat] for name, x in whole.items()}
        named["cu_seqlens"] = torch.tensor([0, *itertools.accumulate(map(len, own))])
        requests.append({"operation": operation, "named": named, "options": options | {"sharding": sharding}})
    for own, rank in zip(places, ranks.run(rank_calls.call, requests), strict=True):
        for name, x in expected.items():
            torch.testing.assert_close(rank["out"][name], x[torch.cat(own)], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("cuts", [[12, 12], [3, 0, 21]], ids=str)
def test_whitened_over_all(cuts: list[int], ranks: RankPool) -> None:
    p = problem("gae", "number", 4)
    compare(ranks, "gae", p, contiguous(cuts), whiten=True)


def test_no_rows(ranks: RankPool) -> None:
    requests = [
        {"operation": "gae", "named": {"rewards": torch.ones(0, t), "values": torch.ones(0, t)}} for t in (2, 3)
    ]
    found = ranks.run(rank_calls.call, requests)
    assert [list(rank["out"]["0"].shape) for rank in found] == [[0, 2], [0, 3]]


def test_what_is_refused(ranks: RankPool) -> None:
    """Everywhere: one rank's rows, numbers that are not finite, more than sums."""
    one = {"operation": "discounted_returns"}
    rows = [{**one, "args": (torch.ones(rows, 3),)} for rows in (2, 4)]
    for answer in ranks.ask(rank_calls.call, rows):
        assert answer.error is not None
        assert "rewards: expected as many rows and the same sharding on every rank" in answer.error
    bad = [{**one, "args": (x,)} for x in (torch.ones(2, 3), torch.full((2, 3), torch.inf))]
    first, second = ranks.ask(rank_calls.call, bad)
    assert second.error == "ValueError: rewards: expected finite values where mask is set, got inf at index [0, 0]"
    assert first.error is not None
    assert "rank 1 of it has refused" in first.error
    for options, message in (
        ({"op": "min"}, "ValueError: process_group: only sums go over ranks, got op='min'"),
        ({"sharding": "zigzag"}, "ValueError: sharding: expected an even number of tokens a row"),
        ({"sharding": "striped"}, "ValueError: sharding: expected one of 'contiguous', 'zigzag', got 'striped'"),
    ):
        for answer in ranks.ask(rank_calls.call, [{**one, "args": (torch.ones(2, 3),), "options": options}] * 2):
            assert answer.error is not None
            assert answer.error.startswith(message)
