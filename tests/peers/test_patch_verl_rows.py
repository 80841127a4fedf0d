"""Rows of a verl batch under the patch: the same fields, values, offsets and errors as verl's own."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastreward import patch

pytest.importorskip("verl")
tensordict = pytest.importorskip("tensordict")
tu = importlib.import_module("verl.utils.tensordict_utils")
STOCK = tu.index_select_tensor_dict
LENGTHS = [3, 0, 5, 1, 4, 2]
B = len(LENGTHS)


@pytest.fixture(autouse=True, scope="module")
def _patched() -> Iterator[None]:
    patch.undo()
    patch.verl()
    yield
    patch.undo()


def usage() -> Any:
    return patch.status()["verl"].usage["verl.utils.tensordict_utils.index_select_tensor_dict"]


def batch() -> Any:
    """A field of every kind that verl's batches have."""
    g = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, 99, (n,), generator=g) for n in LENGTHS]
    hidden = [torch.randn(n, 3, generator=g) for n in LENGTHS]
    return tu.get_tensordict(
        {
            "ids": torch.nested.as_nested_tensor(ids, layout=torch.jagged),
            "hidden": torch.nested.as_nested_tensor(hidden, layout=torch.jagged),
            "long": torch.randn(B, 700, generator=g),
            "mask": torch.randint(0, 2, (B, 700), generator=g),
            "turned": torch.randn(700, B, generator=g).T,
            "score": torch.randn(B, generator=g),
            "cube": torch.randn(B, 2, 300, generator=g).bfloat16(),
            "uid": [f"prompt-{i}" for i in range(B)],
        },
        non_tensor_dict={"temperature": 0.7},
    )


def same(ours: Any, theirs: Any) -> None:
    assert list(ours.keys()) == list(theirs.keys())
    assert ours.batch_size == theirs.batch_size
    for name, y in theirs.items():
        x = ours[name]
        if not isinstance(y, Tensor):
            assert type(ours.get(name)) is type(theirs.get(name))
            assert x == theirs[name]
        elif y.is_nested:
            assert x.values().equal(y.values())
            assert x.offsets().equal(y.offsets())
            assert x.offsets().dtype == y.offsets().dtype
            assert (x._ragged_idx, x.shape[0]) == (y._ragged_idx, y.shape[0])
            assert (x._min_seqlen, x._max_seqlen) == (y._min_seqlen, y._max_seqlen)
        else:
            assert x.equal(y)
            assert x.dtype == y.dtype
            assert x.is_contiguous()


@pytest.mark.parametrize(
    "indices", [[4, 0, 2], [3], [5, 5, 1], list(range(B)), torch.tensor([2, 4]), torch.tensor([1], dtype=torch.int32)]
)
def test_the_rows_are_verls(indices: Any) -> None:
    before = usage().calls
    ours = tu.index_select_tensor_dict(batch(), indices)
    assert usage().calls == before + 1
    same(ours, STOCK(batch(), indices))


def test_what_is_selected_is_a_copy() -> None:
    given = batch()
    found = tu.index_select_tensor_dict(given, [0, 1])
    for name in ("ids", "hidden"):
        found[name].values().zero_()
    for name in ("long", "mask", "score"):
        found[name].zero_()
    same(tu.index_select_tensor_dict(given, [0, 1]), STOCK(batch(), [0, 1]))


@pytest.mark.parametrize("indices", [[-1, 0], torch.tensor([], dtype=torch.long)])
def test_other_indices_are_verls(indices: Any) -> None:
    before = usage().handed_on
    dense = batch().select("long", "score")
    same(tu.index_select_tensor_dict(dense, indices), STOCK(dense, indices))
    assert usage().handed_on == before + 1


def test_gradients_and_transposed_sequences_are_verls() -> None:
    before, data = usage().handed_on, batch()
    data["ids"] = data["hidden"].values().sum(-1).requires_grad_()[:B]
    leaf = torch.randn(sum(LENGTHS), requires_grad=True)
    data["hidden"] = torch.nested.nested_tensor_from_jagged(leaf, torch.tensor([0, *LENGTHS]).cumsum(0))
    found = tu.index_select_tensor_dict(data, [2, 3])["hidden"]
    (gradient,) = torch.autograd.grad(found.values().sum(), leaf)
    assert int(gradient.sum()) == LENGTHS[2] + LENGTHS[3]
    assert usage().handed_on == before + 1


def test_errors_are_verls() -> None:
    for arguments, error in (
        ((batch(), torch.zeros(2, 2, dtype=torch.long)), AssertionError),
        ((batch(), [B]), IndexError),
    ):
        with pytest.raises(error) as theirs:
            STOCK(*arguments)
        with pytest.raises(error) as ours:
            tu.index_select_tensor_dict(*arguments)
        assert str(ours.value) == str(theirs.value)
    assert tu.index_select_tensor_dict(None, [0]) is None
