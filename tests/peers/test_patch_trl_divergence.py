"""patch.trl(losses=True) in DistillationTrainer: its divergence beside TRL's own function, values and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from compat import largest
from torch import Tensor

import fastreward as fr
from fastreward.patch.trl.distillation import SOURCES
from fastreward.patch.trl.versions import digest

trainer = pytest.importorskip("trl.trainer.distillation_trainer")
STOCK = getattr(trainer, "_chunked_divergence_loss", None)
if STOCK is None:
    pytest.skip("this version of TRL has no chunked divergence", allow_module_level=True)
KNOWN = digest(STOCK) in SOURCES
known = pytest.mark.skipif(not KNOWN, reason="this version's divergence has another source, and stays TRL's")
TARGET = "trl.trainer.distillation_trainer._chunked_divergence_loss"
B, K, H, G, V = 3, 5, 16, 24, 101
MASK = torch.tensor([[0, 1, 1, 1, 1], [0, 0, 1, 1, 0], [0, 0, 0, 0, 0]])


@pytest.fixture
def report() -> Iterator[Any]:
    yield fr.patch.trl(losses=True)
    fr.patch.undo()


def arguments(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """student hidden, teacher hidden, student weight, teacher weight."""
    torch.manual_seed(0)
    shapes = ((B, K, H), (B, K, G), (V, H), (V, G))
    return tuple((torch.randn(shape) / (1 + (len(shape) == 2))).to(dtype).requires_grad_() for shape in shapes)


@known
@pytest.mark.parametrize(
    "options",
    [
        {"beta": 0.0},
        {"beta": 1.0, "temperature": 0.7, "num_items_in_batch": 8},
        {"beta": 0.3, "student_final_logit_softcapping": 5.0, "teacher_final_logit_softcapping": 9.0},
        {"beta": 0.5, "student_logit_scale": 0.5, "teacher_logit_scale": 1.5, "num_items_in_batch": torch.tensor(11)},
        {"beta": 0.5, "bias": True},
    ],
    ids=["forward", "reverse", "softcaps", "scales", "biases"],
)
def test_equals_trls_own(report: Any, options: dict[str, Any]) -> None:
    options = dict(options)
    biases = [torch.randn(V, requires_grad=True), torch.randn(V)] if options.pop("bias", False) else [None, None]
    options |= dict(zip(("student_lm_head_bias", "teacher_lm_head_bias"), biases, strict=True))
    given = arguments()
    trained = [x for x in (given[0], given[2], biases[0]) if x is not None]
    found, expected = (f(*given, MASK, **options) for f in (trainer._chunked_divergence_loss, STOCK))
    grads = (torch.autograd.grad(x[0], trained) for x in (found, expected))
    largest(TARGET, found, expected, rtol=1e-5)
    largest(TARGET, *grads, rtol=1e-4)
    usage = report.usage[TARGET]
    assert (usage.calls, usage.handed_on, usage.tokens) == (1, 0, B * K)
    assert any(entry.target == TARGET for entry in report.replaced)


@known
def test_nothing_valid(report: Any) -> None:
    given = arguments()
    loss, entropy, valid = trainer._chunked_divergence_loss(*given, torch.zeros(B, K), 0.5)
    assert (loss.item(), entropy.item(), valid.item()) == (0.0, 0.0, 0)
    assert not any(grad.any() for grad in torch.autograd.grad(loss, (given[0], given[2])))


@known
@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(report: Any, dtype: torch.dtype, beta: float) -> None:
    """Values are those of float32 logits, as TRL's; TRL rounds the logits' gradient before it multiplies with it."""
    given = arguments(dtype)
    biases = torch.randn(V).to(dtype).requires_grad_(), torch.randn(V).to(dtype)
    options = dict(zip(("student_lm_head_bias", "teacher_lm_head_bias"), biases, strict=True))
    found, expected = (f(*given, MASK, beta, **options) for f in (trainer._chunked_divergence_loss, STOCK))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    trained = (given[0], given[2], biases[0])
    for ours, theirs in zip(*(torch.autograd.grad(x[0], trained) for x in (found, expected)), strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-4)
    assert report.usage[TARGET].handed_on == 0


@known
def test_autocast(report: Any) -> None:
    """Both round hidden states and heads to autocast's dtype; gradients of float32 heads are float32."""
    given = arguments()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = (f(*given, MASK, 0.5) for f in (trainer._chunked_divergence_loss, STOCK))
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(*(torch.autograd.grad(x[0], (given[0], given[2])) for x in (found, expected)), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-4)
    assert report.usage[TARGET].handed_on == 0


def test_undone() -> None:
    report = fr.patch.trl(losses=True)
    assert (trainer._chunked_divergence_loss is not STOCK) is KNOWN
    assert any(entry.target == TARGET for entry in (report.replaced if KNOWN else report.kept))
    fr.patch.undo()
    assert trainer._chunked_divergence_loss is STOCK
    fr.patch.trl()
    assert trainer._chunked_divergence_loss is STOCK
    fr.patch.undo()
