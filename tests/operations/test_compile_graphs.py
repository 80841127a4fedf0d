"""Every public operation in torch.compile(fullgraph=True): a graph for the first call, and one for all others.

Sizes, the number of groups and every number change from call to call, all at once; results and gradients are those of
the eager call. A public operation without a row in operation_rows.py fails.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compiled_graphs import graphs
from operation_rows import ROWS, SIZES, Row, as_tensors, copies, evaluated, name_of, policy
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import fastreward as fr

#: What can be called in fastreward.__all__ and computes nothing.
NO_OPERATIONS = {
    *("BackendError", "Clip", "DivergenceStats", "EmaBaseline", "Groups", "PolicyLoss", "TokenStats"),
    *("backend", "balance_partitions", "compare", "credit_page"),
}

#: Dynamo warns about what it does itself with a torch.autograd.Function.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


def rows_named(*names: str) -> list[Row]:
    return [row for row in ROWS if row.id in names]


def test_every_public_operation_has_a_row() -> None:
    assert {row.operation for row in ROWS} == {
        name for name in fr.__all__ if callable(getattr(fr, name))
    } - NO_OPERATIONS


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_two_graphs_are_enough(row: Row) -> None:
    torch.manual_seed(0)
    assert graphs(row, [row.make(*size) for size in SIZES]) <= 2


@pytest.mark.parametrize("row", [row for row in ROWS if row.numbers], ids=name_of)
def test_numbers_may_be_tensors(row: Row) -> None:
    """Two graphs are enough, and a call with 0-d tensors gives what the call with their values gives."""
    torch.manual_seed(0)
    calls = [row.make(*size) for size in SIZES]
    for arguments in calls:
        expected = evaluated(row, copies(arguments))
        for got, wanted in zip(evaluated(row, copies(as_tensors(arguments))), expected, strict=True):
            assert torch.equal(got, wanted)
    assert graphs(row, [as_tensors(arguments) for arguments in calls], "eager") <= 2


@pytest.mark.parametrize("row", {row.operation: row for row in ROWS}.values(), ids=name_of)
def test_dynamic_from_the_start(row: Row) -> None:
    assert graphs(row, [row.make(*size) for size in SIZES[:2]], "eager", dynamic=True) == 1


@pytest.mark.parametrize(
    "row",
    rows_named("policy_loss-grouped", "policy_loss-packed", "correction_weights-packed", "preference_loss-packed"),
    ids=name_of,
)
def test_sizes_that_are_marked_dynamic(row: Row) -> None:
    """Torch refuses what makes a number of such a size; the second graph is for the loss's parameters."""
    assert graphs(row, [row.make(*size) for size in SIZES[:2]], "eager", marked=True) <= 2


@pytest.mark.parametrize(
    "row",
    rows_named("logits_policy_loss-masked", "preference_loss-masked", "correction_weights-masked"),
    ids=name_of,
)
def test_a_batch_of_one_takes_one_graph_more(row: Row) -> None:
    sizes = ((2, 5), (4, 6), (1, 4), (6, 7), (1, 5))
    assert graphs(row, [row.make(*size) for size in sizes], "eager") <= 3


@pytest.mark.parametrize("as_number", [float, torch.tensor], ids=["float", "tensor"])
def test_adaptive_kl(as_number: Any) -> None:
    """A controller changes kl_coef at every step: the numbers are those of floats in eager calls, from two graphs."""
    torch.manual_seed(0)
    arguments = policy(4, 6, "ref_logprobs")
    del arguments["logprobs"]

    def step(logprobs: Tensor, kl_coef: Any) -> Any:
        return fr.policy_loss(logprobs, **arguments, kl="k3", kl_coef=kl_coef)

    def trained(function: Any, number: Any) -> tuple[list[float], Tensor]:
        logprobs, kl_coef, seen = -torch.ones(4, 6), 0.2, []
        for _ in range(5):
            leaf = logprobs.requires_grad_()
            result = function(leaf, number(kl_coef))
            (grad,) = torch.autograd.grad(result.loss, leaf)
            logprobs = (leaf - 0.5 * grad).detach()
            seen.append(kl_coef)
            kl_coef *= 1.5 if result.metrics["kl_ref_k3"] > 0.1 else 0.7
        return seen, logprobs

    expected = trained(step, float)
    assert len(set(expected[0])) == 5
    counter = CompileCounter()
    for function in (step, torch.compile(step, fullgraph=True, backend=counter)):
        coefficients, logprobs = trained(function, as_number)
        assert coefficients == expected[0]
        torch.testing.assert_close(logprobs, expected[1], rtol=1e-6, atol=1e-6)
    assert counter.frame_count <= 2
