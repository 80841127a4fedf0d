"""kernels/logits_policy_loss.py under Triton's interpreter, against the float64 reference."""

from __future__ import annotations

import program_checks as checks
import pytest
import raw_checks
import torch
from fastreward.kernels import logits_policy_loss, logprobs

from fastreward import losses
from fastreward._arguments.tokens import Tokens
from fastreward.language.node import Level

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of what lies under the mask

KINDS = ("plain", "strided", "temperatures", "one_temperature", "masked", "infinities", "ties", "far_apart")


@pytest.fixture(autouse=True)
def _truncation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter truncates f32 to bf16, where the GPU rounds to nearest: one bit more."""
    monkeypatch.setitem(raw_checks.STEP, torch.bfloat16, 2.0**-7)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_every_kind(kind: str) -> None:
    """Token and sequence advantages, with an entropy bonus and without, sums over lengths first; padded and packed."""
    k = KINDS.index(kind)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    gradients = (
        checks.logits_gradient(losses.ppo(dual_clip=3.0), advantage=Level.TOKEN),
        checks.logits_gradient(losses.cispo(), entropy=True, aggregation="seq-mean-token-mean"),
        checks.logits_gradient(losses.reinforce(), entropy=True, aggregation="token-sum"),
    )
    for i, gradient in enumerate(gradients):
        case = raw_checks.logits_case(kind, dtypes[(i + k) % 3], 5, 1003)
        fresh = checks.check_logits(logits_policy_loss, "cpu", gradient, case, packed=i == 1)
        if i == k % 3:
            written = checks.check_logits(logits_policy_loss, "cpu", gradient, case, packed=i == 1, in_place=True)
            assert all(checks.same_bits(a, b) for a, b in zip(fresh, written, strict=True))


@pytest.mark.parametrize("name", checks.GRADIENTS)
def test_a_gradient_for_either_term(name: str) -> None:
    for i, dtype in enumerate((torch.float32, torch.bfloat16)):
        case = raw_checks.logits_case("masked", dtype, 5, 1003)
        checks.check_logits(logits_policy_loss, "cpu", checks.GRADIENTS[name](), case, packed=i == 1)


@pytest.mark.parametrize("vocab", [1, 3, 8, 4097])
def test_sizes(vocab: int) -> None:
    gradient = checks.logits_gradient(losses.ppo(), aggregation="seq-mean-token-mean")
    for kind in ("plain", "strided"):
        case = raw_checks.logits_case(kind, torch.float32, 2, vocab)
        checks.check_logits(logits_policy_loss, "cpu", gradient, case)


def test_bits_and_labels() -> None:
    """The log-probs of kernels/logprobs; a row's bits in any place; an illegal label gives NaN to its row alone."""
    gradient = checks.logits_gradient(losses.ppo(), aggregation="token-sum")
    p, case = gradient.program, raw_checks.logits_case("plain", torch.float32, 7, 5000)

    def run(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = len(labels)
        given = {"old_logprob": torch.full((1, rows), -9.0), "advantage": torch.ones(1)}
        inputs = [given.get(n.name or "") for n in p.inputs]
        scalars = p.scalar_values(dict.fromkeys(gradient.parameters, 0.2))
        out = torch.full_like(logits, torch.nan)
        logprobs, _ = logits_policy_loss.run(
            p, logits, labels, 1.0, inputs, Tokens((1, rows)), scalars, None, torch.ones(()), out, ("logprob",), False
        )
        return logprobs, out

    first = run(case.logits, case.labels)
    assert torch.equal(first[0], logprobs.forward(case.logits, case.labels, 1.0, None, None, None, None, 0)[0][0])
    for a, b in zip(run(case.logits[4:6], case.labels[4:6]), first, strict=True):
        assert torch.equal(a, b[4:6])
    labels = case.labels.clone()
    labels[0], labels[3] = -100, 5000
    values, grad = run(case.logits, labels)
    assert values.isnan().tolist() == [True, False, False, True, False, False, False]
    assert torch.equal(grad[1:3], first[1][1:3])


def test_tokens_without_a_gradient_get_zeros() -> None:
    gradient = checks.logits_gradient(losses.ppo(), aggregation="token-sum")
    p = gradient.program
    given = {"old_logprob": torch.full((2, 3), -200.0), "advantage": torch.tensor([1.0, 0.0])}
    logits = torch.randn(6, 300)
    out = torch.full_like(logits, torch.nan)
    scalars = p.scalar_values(dict.fromkeys(gradient.parameters, 0.2))
    inputs = [given.get(n.name or "") for n in p.inputs]
    labels = torch.zeros(6, dtype=torch.long)
    given_on = (inputs, Tokens((2, 3)), scalars, None, torch.ones(()), out, ("logprob",), False)
    logits_policy_loss.run(p, logits, labels, 1.0, *given_on)
    assert not out.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rescale(dtype: torch.dtype) -> None:
    for rows, vocab in ((3, 1003), (2, 5000), (1, 1), (0, 4)):
        checks.check_rescale(logits_policy_loss, "cpu", dtype, rows, vocab)
