"""NaN is the value of a sequence or of a node that is not there: in no statistic, without credit, without gradient."""

from __future__ import annotations

import random
from typing import Any

import prefix_tree_raw_checks as raw
import pytest
import torch
from prefix_tree_checks import random_batch
from torch import Tensor

import fastreward as fr
from fastreward import PrefixTree
from fastreward._arguments.options import OVERS, TREE_MODES, TREE_OPS
from fastreward.reference import prefix_tree as reference

NAN = torch.nan
BACKENDS = pytest.mark.parametrize("backend", ["cpu", "reference"])
#: root -> 1 2 -> (3, 4), root -> 5
TOKENS = torch.tensor([[1, 2, 3], [1, 2, 4], [5, 6, 7]])


@pytest.mark.parametrize("seed", range(20))
def test_reference_and_cpu(seed: int) -> None:
    f = raw.Forests(reference, "cpu", raw.token_batch(seed), seed)
    raw.check_aggregates(f)
    raw.check_advantages(f)
    raw.check_propagate(f)
    raw.check_tokens(f, raw.mask_of(f, torch.bool))


@BACKENDS
def test_written_out(backend: Any) -> None:
    with fr.backend(backend):
        tree = PrefixTree(TOKENS)
        for op, over, want in (
            ("mean", "sequences", [1.5, 1.0, 1.0, NAN, 2.0]),
            ("sum", "children", [3.0, 1.0, 1.0, NAN, 2.0]),
            ("max", "sequences", [2.0, 1.0, 1.0, NAN, 2.0]),
            ("min", "children", [1.0, 1.0, 1.0, NAN, 2.0]),
            ("any", "sequences", [1.0, 1.0, 1.0, NAN, 1.0]),
        ):
            got = tree.aggregate(torch.tensor([1.0, NAN, 2.0]), op, over=over)  # type: ignore[arg-type]
            torch.testing.assert_close(got, torch.tensor(want), equal_nan=True, msg=f"{op} over {over}: {got.tolist()}")
        nothing = tree.aggregate(torch.tensor([NAN, NAN, 2.0]))
        torch.testing.assert_close(nothing, torch.tensor([2.0, NAN, NAN, NAN, 2.0]), equal_nan=True)
        td = tree.advantages(nothing)
        assert td.tolist() == [0.0, 0.0, 0.0, 0.0, 0.0]
        tokens = tree.to_tokens(nothing, row_values=torch.tensor([10.0, NAN, 20.0]))
        assert tokens.tolist() == [[10.0] * 3, [0.0] * 3, [22.0] * 3]


@BACKENDS
def test_siblings_that_are_not_there(backend: Any) -> None:
    with fr.backend(backend):
        tree = PrefixTree(torch.tensor([[1], [2], [3]]))
        alone = torch.tensor([0.0, 5.0, NAN, NAN])
        assert tree.advantages(alone, "sibling", singleton="raw").tolist() == [0.0, 5.0, 0.0, 0.0]
        assert tree.advantages(alone, "sibling").tolist() == [0.0, 0.0, 0.0, 0.0]
        two = torch.tensor([0.0, 5.0, NAN, 1.0])
        assert tree.advantages(two, "sibling", scale="none").tolist() == [0.0, 2.0, 0.0, -2.0]


@pytest.mark.parametrize("over", OVERS)
@pytest.mark.parametrize("op", TREE_OPS)
def test_as_without_the_sequences(op: Any, over: Any) -> None:
    """Gradients too; over children the nodes that only they pass through are gone with them."""
    for seed in range(12):
        r = random.Random(seed)
        given = random_batch(r)
        given.pop("cu_seqlens", None)
        count = given["tokens"].shape[0]
        values = torch.randn(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        there = torch.tensor([r.random() < 0.6 for _ in range(count)])
        weights = torch.rand(count, dtype=torch.float64) + 0.1
        if count == 0:
            continue
        tree = PrefixTree(given["tokens"])
        node = tree.leaf[there]  # nodes that are there with these alone, too: where a sequence ends
        part = PrefixTree(given["tokens"][there])
        differentiable = op in ("mean", "sum", "logsumexp")
        whole_values = torch.where(there, values, NAN).requires_grad_(differentiable)
        part_values = values[there].requires_grad_(differentiable)
        options: dict[str, Any] = {"over": over, "discount": 0.9} if op in ("mean", "sum") else {"over": over}
        if over == "sequences":
            options["weights"] = weights
        got = tree.aggregate(whole_values, op, **options)
        if over == "sequences":
            options["weights"] = weights[there]
        want = part.aggregate(part_values, op, **options)
        torch.testing.assert_close(got[node], want[part.leaf])
        if differentiable and len(node):
            (a,) = torch.autograd.grad(
                got.nan_to_num().square().sum() if over == "sequences" else got[node].sum(), whole_values
            )
            assert not a[~there].any()
            if over == "children":
                (b,) = torch.autograd.grad(want[part.leaf].sum(), part_values)
                torch.testing.assert_close(a[there], b)


@pytest.mark.parametrize("mode", TREE_MODES)
def test_advantages_are_never_nan(mode: Any) -> None:
    tree = PrefixTree(torch.randint(0, 2, (20, 5), generator=torch.Generator().manual_seed(0)))
    for values in (torch.full((tree.num_nodes,), NAN), torch.where(tree.depth == 0, NAN, 1.0)):
        got = tree.advantages(values, mode)
        assert torch.equal(got, torch.zeros_like(got))


@BACKENDS
def test_gradients_to_tokens(backend: Any) -> None:
    """None to a node that is not there, none from the tokens of a row that is not."""
    with fr.backend(backend):
        tree = PrefixTree(TOKENS)
        values = torch.tensor([0.0, 1.0, NAN, 3.0, 4.0]).requires_grad_()
        own = torch.tensor([0.0, NAN, 0.0])
        out = tree.to_tokens(values, row_values=own)
        assert out.tolist() == [[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [4.0, 4.0, 4.0]]
        out.backward(torch.tensor([[1.0, 1, 1], [NAN, NAN, NAN], [1, 1, 1]]))
        assert values.grad is not None
        assert values.grad.tolist() == [0.0, 2.0, 0.0, 0.0, 3.0]


def test_steps_of_several_tokens() -> None:
    tree = PrefixTree.from_paths([["a"], ["b"]], segment_ids=torch.tensor([[0, 0], [0, 0]]))
    got = tree.to_tokens(torch.tensor([0.0, 1.0, 2.0]), place="start", row_values=torch.tensor([5.0, NAN]))
    assert got.tolist() == [[6.0, 5.0], [0.0, 0.0]]


@BACKENDS
def test_propagate_through_what_is_not_there(backend: Any) -> None:
    """x of the node and of all below it is NaN, and no gradient comes from there."""
    with fr.backend(backend):
        tree = PrefixTree(TOKENS)
        shift = torch.tensor([0.0, NAN, 1.0, 1.0, 2.0]).requires_grad_()
        scale = torch.ones(5).requires_grad_()
        x = tree.propagate(scale, shift, initial=3.0)
        torch.testing.assert_close(x, torch.tensor([3.0, NAN, NAN, NAN, 5.0]), equal_nan=True)
        x.backward(torch.ones(5))
        assert shift.grad is not None
        assert scale.grad is not None
        assert shift.grad.tolist() == [0.0, 0.0, 0.0, 0.0, 1.0]
        assert scale.grad.tolist() == [0.0, 0.0, 0.0, 0.0, 3.0]


@BACKENDS
@pytest.mark.parametrize(("low", "high"), [(0.5, None), (None, 0.5), (0.5, 0.5)])
def test_on_a_bound_the_gradient_passes(low: float | None, high: float | None, backend: Any) -> None:
    """As through torch.clamp: 0.5 + 0 is the bound itself; beyond it, above or below, nothing passes."""
    with fr.backend(backend):
        tree = PrefixTree(torch.tensor([[1], [2], [3]]))
        shift = torch.tensor([0.0, 0.0, 1.0, -1.0]).requires_grad_()
        x = tree.propagate(1.0, shift, initial=0.5, low=low, high=high)
        (got,) = torch.autograd.grad(x.sum(), shift)
        (want,) = torch.autograd.grad((0.5 + shift[1:]).clamp(low, high).sum(), shift)
        assert got.tolist() == want.tolist()
        assert got[1] == 1.0


@BACKENDS
def test_scale_and_shift_of_two_dtypes(backend: Any) -> None:
    """One in float64 is enough: nothing is rounded to float32, whichever it is."""
    with fr.backend(backend):
        tree = PrefixTree(torch.tensor([[1], [2]]))
        third = torch.full((3,), 1 / 3, dtype=torch.float64)
        ones = torch.ones(3)
        for scale, shift in ((ones, third), (third, ones), (1.0, third), (third, 1.0)):
            x = tree.propagate(scale, shift, initial=1.0)
            assert x.dtype == torch.float64
            assert x[1:].tolist() == [1 + 1 / 3] * 2
        leaf = ones.clone().requires_grad_()
        (grad,) = torch.autograd.grad(tree.propagate(leaf, third, initial=2.0).sum(), leaf)
        assert grad.dtype == torch.float32
        assert grad.tolist() == [0.0, 2.0, 2.0]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"weights": torch.tensor([1.0, NAN, 1.0])}, r"weights: expected finite numbers, got nan at index \[1\]"),
    ({"weights": torch.tensor([1.0, 1.0, torch.inf])}, r"weights: expected finite numbers, got inf at index \[2\]"),
    ({"weights": -torch.ones(3), "op": "logsumexp"}, r"weights: expected numbers >= 0 .*, got -1.0 at index \[0\]"),
    (
        {"child_weights": torch.tensor([1.0, 1, NAN, 1, 1]), "over": "children"},
        r"child_weights: expected finite numbers, got nan at index \[2\]",
    ),
    ({"discount": NAN}, "discount: expected a finite number"),
    ({"scale": NAN, "op": "logsumexp"}, "scale: expected a finite number"),
]


@pytest.mark.parametrize(("given", "message"), BAD)
def test_nan_elsewhere_is_an_error(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrefixTree(TOKENS).aggregate(torch.ones(3), **given)


def test_child_weights_of_roots_are_not_read() -> None:
    weights = torch.tensor([NAN, 1.0, 1.0, 1.0, 3.0])
    got = PrefixTree(TOKENS).aggregate(torch.tensor([0.0, 0.0, 4.0]), over="children", child_weights=weights)
    assert got[0] == 3.0


def only_position_0(dtype: torch.dtype, rows: int, columns: int) -> Tensor:
    mask = torch.zeros(rows, columns, dtype=dtype)
    mask[:, 0] = 1
    return mask


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float32])
@pytest.mark.parametrize("columns", [1, 7, 8, 31, 63, 64, 65, 128, 200])
def test_only_position_0_counts(columns: int, dtype: torch.dtype) -> None:
    """A search from the end of a row, by vectors, reaches its first position; one row more than a row is empty."""
    mask = only_position_0(dtype, 3, columns)
    mask[2] = 0
    tree = PrefixTree(torch.arange(3 * columns).view(3, columns), mask)
    assert tree.lengths.tolist() == [1, 1, 0]
    assert (
        tree.to_tokens(torch.ones(tree.num_nodes)).tolist()
        == only_position_0(torch.float32, 3, columns).mul(torch.tensor([[1.0], [1.0], [0.0]])).tolist()
    )
