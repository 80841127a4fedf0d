"""balance_partitions: the parts of the textbook's largest differencing, sizes, costs, the cap, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastreward as fr
from fastreward.balance import differenced
from fastreward.reference import balance as reference

LENGTHS = st.one_of(
    st.lists(st.integers(0, 3), min_size=1, max_size=40),  # ties and zeros
    st.lists(st.integers(0, 8192), min_size=1, max_size=60),
    st.lists(st.integers(0, 2**55), min_size=1, max_size=30),
)


@settings(max_examples=200, deadline=None)
@given(LENGTHS, st.data())
def test_parts_are_the_references(lengths: list[int], data: st.DataObject) -> None:
    parts = data.draw(st.integers(1, len(lengths)))
    raw = reference.balance_partitions(lengths, parts)
    assert differenced(torch.tensor(lengths), parts, equal_size=False) == raw
    assert fr.balance_partitions(lengths, parts) == [sorted(part) for part in raw]


@settings(max_examples=200, deadline=None)
@given(LENGTHS, st.data())
def test_parts_of_equal_size(lengths: list[int], data: st.DataObject) -> None:
    count = len(lengths)
    parts = data.draw(st.sampled_from([k for k in range(1, count + 1) if count % k == 0]))
    raw = reference.balance_partitions(lengths, parts, equal_size=True)
    found = fr.balance_partitions(lengths, parts, equal_size=True)
    assert found == [sorted(part) for part in raw]
    assert {len(part) for part in found} == {count // parts}


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 100), min_size=1, max_size=40), st.integers(100, 400), st.data())
def test_no_part_is_above_the_cap(lengths: list[int], cap: int, data: st.DataObject) -> None:
    parts = data.draw(st.integers(1, len(lengths)))
    costs = data.draw(st.lists(st.integers(0, 10**6), min_size=len(lengths), max_size=len(lengths)))
    found = fr.balance_partitions(lengths, parts, costs=costs, max_tokens=cap)
    assert sorted(i for part in found for i in part) == list(range(len(lengths)))
    assert all(part and sum(lengths[i] for i in part) <= cap for part in found)
    fewer = range(max(parts, -(-sum(lengths) // cap)), len(found))
    for count in fewer:  # each number of parts from the fewest on was not enough
        tried = fr.balance_partitions(costs, count)
        assert max(sum(lengths[i] for i in part) for part in tried) > cap


def test_textbook() -> None:
    """Karmarkar and Karp's own: 8, 7, 6, 5, 4 into two parts, whose sums differ by 2."""
    found = fr.balance_partitions([8, 7, 6, 5, 4], 2)
    assert [sum([8, 7, 6, 5, 4][i] for i in part) for part in found] == [16, 14]
    assert fr.balance_partitions([5, 1, 1, 1], 2) == [[0], [1, 2, 3]]
    assert fr.balance_partitions([5, 1, 1, 1], 2, equal_size=True) == [[0, 1], [2, 3]]


def test_many_sequences() -> None:
    """As many as a step has, heavy-tailed, into one part for each of 512 ranks."""
    lengths = (torch.rand(4096, generator=torch.Generator().manual_seed(0)) * 6).exp().mul(20).long()
    found = fr.balance_partitions(lengths, 512)
    sums = torch.tensor([int(lengths[part].sum()) for part in found])
    assert sums.tolist() == sorted(sums.tolist(), reverse=True)
    assert torch.cat([torch.tensor(part) for part in found]).sort().values.equal(torch.arange(4096))
    assert sums.max() <= max(int(lengths.max()), 1.01 * float(sums.double().mean()))


def test_costs_are_balanced_in_place_of_lengths() -> None:
    assert fr.balance_partitions([9, 1, 1, 1], 2, costs=[1, 1, 1, 1]) == fr.balance_partitions([1] * 4, 2)


@pytest.mark.parametrize("make", [tuple, np.array, torch.tensor, lambda x: torch.tensor(x, dtype=torch.int16)[:]])
def test_lengths_of_any_kind(make: object) -> None:
    lengths = [3, 1, 2, 2]
    assert fr.balance_partitions(make(lengths), 2) == fr.balance_partitions(lengths, 2)  # type: ignore[operator]


def test_strided_lengths() -> None:
    assert fr.balance_partitions(torch.tensor([3, 9, 1, 9, 2, 9])[::2], 2) == fr.balance_partitions([3, 1, 2], 2)


def test_sums_to_the_edge() -> None:
    most = 2**63 - 1
    assert fr.balance_partitions([most - 1, 1], 1) == [[0, 1]]
    for lengths in ([most, 1], torch.tensor([most, 1]), [most + 1]):
        with pytest.raises(ValueError, match=r"lengths: expected a sum of at most 2\^63 - 1, got \d+"):
            fr.balance_partitions(lengths, 1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1, 2], 3), ValueError, "parts: expected 1 to 2, the number of sequences, got 3"),
        (([], 1), ValueError, "parts: expected 1 to 0"),
        (([1, 2], 0), ValueError, "parts: expected 1 to 2"),
        (([1, 2], 1.5), TypeError, "parts: expected an integer"),
        (([1, 2],), ValueError, "parts, max_tokens: expected one of them"),
        (([1, -2], 1), ValueError, r"lengths: expected whole numbers of at least 0, got -2 at index \[1\]"),
        (([1, 2.0], 1), TypeError, r"lengths\[1\]: expected an integer \(a length\), got 2.0"),
        ((torch.ones(2), 1), TypeError, "lengths: expected an integer tensor, got float32"),
        ((torch.ones(2, dtype=torch.bool), 1), TypeError, "lengths: expected an integer tensor, got bool"),
        ((torch.ones(2, 2, dtype=torch.long), 1), ValueError, r"lengths: expected shape \[B\], got \[2, 2\]"),
    ],
)
def test_refused(arguments: tuple[object, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fr.balance_partitions(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"parts": 2, "equal_size": True}, ValueError, "parts: expected a divisor of 3.*got 2"),
        ({"parts": 2, "equal_size": "yes"}, TypeError, "equal_size: expected True or False, got 'yes'"),
        ({"max_tokens": 9, "equal_size": True}, ValueError, "equal_size: expected False with max_tokens"),
        ({"max_tokens": 2}, ValueError, r"lengths: expected at most max_tokens \(2\), got 3 at index \[2\]"),
        ({"max_tokens": 2.5}, TypeError, "max_tokens: expected an integer"),
        ({"parts": 2, "costs": [1, 2]}, ValueError, r"costs: expected shape \[3\] \(as lengths\), got \[2\]"),
        ({"parts": 2, "costs": [1, 2, -1]}, ValueError, "costs: expected whole numbers of at least 0"),
    ],
)
def test_refused_options(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fr.balance_partitions([1, 2, 3], **options)  # type: ignore[arg-type]
