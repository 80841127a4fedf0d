"""verl's sequence balancing under the patch: the very parts of its own, and its own errors."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastreward as fr
from fastreward import patch

pytest.importorskip("verl")
balancing = importlib.import_module("verl.utils.seqlen_balancing")
NAMES = ("karmarkar_karp", "get_seqlen_balanced_partitions", "get_group_balanced_partitions")
STOCK: dict[str, Callable[..., Any]] = {name: getattr(balancing, name) for name in NAMES}


@pytest.fixture(autouse=True, scope="module")
def _patched() -> Iterator[None]:
    patch.undo()
    patch.verl()
    yield
    patch.undo()


def usage(name: str) -> Any:
    return patch.status()["verl"].usage[f"verl.utils.seqlen_balancing.{name}"]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 5) | st.integers(0, 8192), min_size=1, max_size=40), st.booleans(), st.data())
def test_the_same_parts(lengths: list[int], equal_size: bool, data: st.DataObject) -> None:
    sizes = [k for k in range(1, len(lengths) + 1) if not equal_size or len(lengths) % k == 0]
    parts = data.draw(st.sampled_from(sizes))
    workloads = balancing.calculate_workload(torch.tensor(lengths))
    for name in NAMES[:2]:
        for given_as in (lengths, workloads, workloads.tolist()):  # verl's driver passes the tensor as it is
            before = usage(name).calls
            assert getattr(balancing, name)(given_as, parts, equal_size) == STOCK[name](given_as, parts, equal_size)
            assert usage(name).calls == before + 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([None, "a", "b", "c"]), st.integers(0, 8192)), min_size=1, max_size=30))
def test_groups_stay_together(sequences: list[tuple[str | None, int]]) -> None:
    uids, lengths = [uid for uid, _ in sequences], [length for _, length in sequences]
    groups = 1 + sum(a != b for a, b in itertools.pairwise(uids))
    for parts in (k for k in range(1, groups + 1) if groups % k == 0):
        found = balancing.get_group_balanced_partitions(lengths, uids, parts)
        assert found == STOCK["get_group_balanced_partitions"](lengths, uids, parts)


@pytest.mark.parametrize(
    ("name", "arguments", "error"),
    [
        ("get_seqlen_balanced_partitions", ([1, 2], 3, False), AssertionError),
        ("get_seqlen_balanced_partitions", ([1, 2, 3], 2, True), AssertionError),
        ("karmarkar_karp", ([1, 2, 3], 2, True), AssertionError),
        ("karmarkar_karp", ([], 2, False), IndexError),
        ("get_group_balanced_partitions", ([1, 2], ["a", "a"], 2), AssertionError),
        ("get_group_balanced_partitions", ([1, 2], ["a"], 1), AssertionError),
        ("get_group_balanced_partitions", ([], [], 1), AssertionError),
    ],
)
def test_errors_are_verls(name: str, arguments: tuple[Any, ...], error: type[Exception]) -> None:
    with pytest.raises(error) as theirs:
        STOCK[name](*arguments)
    before = usage(name).calls
    with pytest.raises(error) as ours:
        getattr(balancing, name)(*arguments)
    assert str(ours.value) == str(theirs.value)
    assert usage(name).calls == before


def test_other_numbers_are_verls() -> None:
    for lengths in ([1.5, 2.25, 0.5], [True, False, True], [-1, 2, 3], [2**70, 1, 2], torch.tensor([1.5, 2.0, 0.5])):
        before = usage("get_seqlen_balanced_partitions").handed_on
        found = balancing.get_seqlen_balanced_partitions(lengths, 2, False)
        assert found == STOCK["get_seqlen_balanced_partitions"](lengths, 2, False)
        assert usage("get_seqlen_balanced_partitions").handed_on == before + 1


def test_micro_batches_keep_within_the_cap() -> None:
    from tensordict import TensorDict

    lengths = [900, 10, 20, 500, 510, 480, 3, 999, 250, 250, 250, 260]
    mask = (torch.arange(1000) < torch.tensor(lengths)[:, None]).long()
    batch = TensorDict({"input_ids": mask.cumsum(1), "attention_mask": mask}, batch_size=len(lengths))
    parts = balancing.rearrange_micro_batches(batch, max_token_len=1000)[1]
    assert all(sum(lengths[i] for i in part) <= 1000 for part in parts)
    found = patch_out(lambda: balancing.rearrange_micro_batches(batch, max_token_len=1000)[1])
    assert parts == found
    workloads = balancing.calculate_workload(torch.tensor(lengths))
    alone = fr.balance_partitions(lengths, costs=workloads, max_tokens=1000)
    assert sorted(map(tuple, parts)) == sorted(map(tuple, alone))


def patch_out(call: Callable[[], Any]) -> Any:
    patch.undo()
    try:
        return call()
    finally:
        patch.verl()


def test_openrlhf_has_the_same_parts() -> None:
    package = importlib.util.find_spec("openrlhf")
    if package is None or not package.submodule_search_locations:
        pytest.skip("openrlhf is not installed")
    path = Path(package.submodule_search_locations[0], "utils", "seqlen_balancing.py")
    spec = importlib.util.spec_from_file_location("openrlhf_balancing", path)  # its package needs a GPU's packages
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    theirs = module.get_seqlen_balanced_partitions
    lengths = torch.randint(1, 4096, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    for parts, equal_size in ((7, False), (8, True), (64, False)):
        assert fr.balance_partitions(lengths, parts, equal_size=equal_size) == theirs(lengths, parts, equal_size)
