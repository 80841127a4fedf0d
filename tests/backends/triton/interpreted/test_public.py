"""The public functions on the Triton backend under its interpreter: dispatch, custom ops, autograd and kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import public_checks
import public_loss_checks
import pytest
import tie_checks
import torch
from operation_rows import ROWS, Row, as_tensors, copies, evaluated, name_of

import fastreward as fr
from fastreward import losses

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def _backend() -> Iterator[None]:
    with fr.backend("triton"):
        yield


@pytest.mark.parametrize("inplace", [False, True])
def test_token_logprobs(inplace: bool) -> None:
    public_checks.check_token_logprobs("cpu", inplace=inplace)


@pytest.mark.parametrize(("name", "inplace"), [("reverse-kl", True), ("hellinger", False)])
def test_token_divergence(name: str, inplace: bool) -> None:
    public_checks.check_divergence("cpu", name, inplace)


@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "logit_scale": 0.7, "bias": True}], ids=["plain", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear(dtype: torch.dtype, options: dict[str, Any]) -> None:
    public_checks.check_linear("cpu", dtype, **options)


@pytest.mark.parametrize("packed", [False, True])
def test_policy_loss(packed: bool) -> None:
    public_checks.check_policy_loss("cpu", packed)


@pytest.mark.parametrize("rule", ["clip, of bounds that are crossed", "minimum, of the second", "batch_max"])
def test_gradient_at_a_tie(rule: str) -> None:
    tie_checks.check_ties(rule)


def test_group_and_whiten() -> None:
    public_checks.check_group("cpu")
    public_checks.check_whiten("cpu")


def test_segments() -> None:
    public_checks.check_segments("cpu")


@pytest.mark.parametrize("row", [row for row in ROWS if row.numbers], ids=name_of)
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_numbers_that_only_a_kernel_may_read(row: Row) -> None:
    """In a compiled function 0-d tensors stay where they are, as tensors on a GPU do."""
    torch._dynamo.reset()
    arguments = row.make(4, 5)
    compiled = torch.compile(lambda **arguments: row(**arguments), fullgraph=True, backend="eager")
    expected = evaluated(row, copies(arguments))
    for got, wanted in zip(evaluated(compiled, copies(as_tensors(arguments))), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_messages() -> None:
    public_checks.check_messages("cpu")


@pytest.mark.parametrize("name", public_loss_checks.LOSSES)
def test_logits_policy_loss(name: str) -> None:
    for in_one_row in (False, True):
        public_loss_checks.check_logits_policy_loss("cpu", name, torch.float32, in_one_row=in_one_row)
    public_loss_checks.check_logits_policy_loss("cpu", name, torch.float16, in_place=True)


@pytest.mark.parametrize("loss", [losses.ppo(), losses.gspo_token(), losses.real()], ids=lambda loss: loss.name)
def test_under_the_mask(loss: losses.Loss) -> None:
    public_loss_checks.check_under_the_mask("cpu", loss)


@pytest.mark.parametrize("name", ["ppo", "gspo"])
def test_linear_policy_loss(name: str) -> None:
    public_loss_checks.check_linear_policy_loss("cpu", name)


def test_differentiable_extras() -> None:
    for in_one_row in (False, True):
        public_loss_checks.check_differentiable_extras("cpu", in_one_row=in_one_row)


@pytest.mark.parametrize("loss", [losses.dpo(label_smoothing=0.1), losses.dpo(variant="aot")], ids=["dpo", "aot"])
def test_preference_loss(loss: losses.Loss) -> None:
    for in_one_row in (False, True):
        public_loss_checks.check_preference_loss("cpu", loss, in_one_row=in_one_row)


@pytest.mark.parametrize("loss", ["squared", "huber"])
def test_value_loss(loss: str) -> None:
    public_loss_checks.check_value_loss("cpu", loss)


@pytest.mark.parametrize(("mode", "level"), [("truncate", "token"), ("mask", "sequence"), ("icepop", "geometric")])
def test_correction_weights(mode: str, level: str) -> None:
    for in_one_row in (False, True):
        public_loss_checks.check_correction("cpu", mode, level, in_one_row=in_one_row)
