"""token_divergence beside the formulas written out in float64, values and gradients, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from criterion import assert_as_good_as_torch
from divergence_formulas import FORMULAS, gradients
from torch import Tensor

import fastreward as fr
from fastreward import divergences

ALL = ("entropy", "teacher_entropy", "logprobs", "top1_agreement")
LOWEST = -1e4


def written_out(
    formula: Callable[..., Tensor],
    logits: Tensor,
    teacher: Tensor,
    T: Any,
    U: Any,
    dtype: torch.dtype,
    **numbers: float,
) -> Tensor:
    def log_probs(x: Tensor, temperature: Any) -> Tensor:
        t = torch.as_tensor(temperature, dtype=dtype)
        return (x.to(dtype) / (t.unsqueeze(-1) if t.ndim else t)).log_softmax(-1).clamp(min=LOWEST)

    return formula(log_probs(logits, T), log_probs(teacher, U), **numbers).sum(-1)


def sides(vocab: int, dtype: torch.dtype, lead: tuple[int, ...] = (3, 4)) -> tuple[Tensor, Tensor]:
    x, y = (torch.randn(*lead, vocab) * 3 for _ in range(2))
    return x.to(dtype).requires_grad_(), y.to(dtype).requires_grad_()


# ----------------------------------------------------------------------------------------------------------- values
@pytest.mark.parametrize("vocab", [1, 17, 2048, 4113])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FORMULAS)
def test_values_and_gradients_of_both_sides(name: str, dtype: torch.dtype, vocab: int) -> None:
    x, y = sides(vocab, dtype)
    found = fr.token_divergence(x, y, divergence=name, temperature=0.8, teacher_temperature=1.7).divergence
    own = gradients(found, x, y)
    leaves = [s.detach().double().requires_grad_() for s in (x, y)]
    exact, rounded = [
        [value := written_out(FORMULAS[name], *at, 0.8, 1.7, of), *gradients(value, *at)]
        for at, of in ((leaves, torch.float64), ((x, y), torch.float32))
    ]
    for ours, truth, theirs in zip((found, *own), exact, rounded, strict=True):
        assert ours.dtype in (torch.float32, dtype)
        assert_as_good_as_torch(ours, truth, theirs, name)


@pytest.mark.parametrize(
    ("divergence", "name", "number"),
    [
        (divergences.jsd(0.1), "jsd", {"beta": 0.1}),
        (divergences.jsd(0.9), "jsd", {"beta": 0.9}),
        (divergences.skewed_forward_kl(0.7), "skewed-forward-kl", {"alpha": 0.7}),
        (divergences.skewed_reverse_kl(0.7), "skewed-reverse-kl", {"alpha": 0.7}),
        (divergences.alpha(0.2), "alpha", {"alpha": 0.2}),
        (divergences.adaptive_kl(0.2), "adaptive-kl", {"alpha": 0.2}),
        (divergences.adaptive_kl(0.95), "adaptive-kl", {"alpha": 0.95}),
    ],
    ids=str,
)
def test_parameters(divergence: divergences.Loss, name: str, number: dict[str, float]) -> None:
    x, y = sides(403, torch.float32)
    found = fr.token_divergence(x, y, divergence=divergence).divergence
    truth = written_out(FORMULAS[name], x, y, 1.0, 1.0, torch.float64, **number)
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-6)
    for ours, exact in zip(gradients(found, x, y), gradients(truth, x, y), strict=True):
        torch.testing.assert_close(ours, exact.float(), rtol=1e-5, atol=1e-6)


def test_limits_of_the_alpha_divergence_are_the_kls() -> None:
    x, y = sides(100, torch.float32)
    for alpha, name in ((1 - 1e-6, "reverse-kl"), (1e-6, "forward-kl")):
        near = fr.token_divergence(x, y, divergence=divergences.alpha(alpha)).divergence
        torch.testing.assert_close(near, fr.token_divergence(x, y, divergence=name).divergence, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("alpha", [1e-45, 1e-37, 1e-6, 1e-3, 0.3, 0.8, 0.999, 1 - 1e-6])
def test_alpha_close_to_its_limits_loses_no_digits(alpha: float, backend: Any) -> None:
    x, y = sides(2049, torch.float32)
    close = (x.detach() + 0.1 * torch.randn(x.shape)).requires_grad_()
    for other in (y, close):
        with fr.backend(backend):
            found = fr.token_divergence(x, other, divergence=divergences.alpha(alpha)).divergence
            own = gradients(found, x, other)
        leaves = [s.detach().double().requires_grad_() for s in (x, other)]
        value = written_out(_alpha_exactly, *leaves, 1.0, 1.0, torch.float64, alpha=alpha)
        torch.testing.assert_close(found.double(), value, rtol=1e-6, atol=5e-7)
        for ours, exact in zip(own, gradients(value, *leaves), strict=True):
            torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=2e-7)


def _alpha_exactly(lp: Tensor, lq: Tensor, alpha: float) -> Tensor:
    """FORMULAS["alpha"] without the differences that cancel in float64 too."""
    if alpha > 0.5:
        lp, lq, alpha = lq, lp, 1 - alpha
    lacking = lq.exp() * torch.expm1(alpha * (lp - lq)) / alpha
    return (lp.exp() - lq.exp() - lacking) / (1 - alpha)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_tail_of_an_adaptive_kl(backend: Any) -> None:
    """The teacher's least likely, of one probability the first ones; equal sides weigh both KLs alike."""
    q = torch.tensor([0.3, 0.2, 0.1, 0.2, 0.2]).log()
    p = torch.tensor([0.1, 0.3, 0.2, 0.35, 0.05]).log()  # differences .2, .1, .1, .15, .15
    forward, reverse = (FORMULAS[name](p, q).sum() for name in ("forward-kl", "reverse-kl"))
    with fr.backend(backend):
        for alpha, tail in ((0.05, 0.0), (0.2, 0.1), (0.4, 0.2), (0.6, 0.35), (0.8, 0.5)):
            found = fr.token_divergence(p, q, divergence=divergences.adaptive_kl(alpha)).divergence
            share = 1 - tail / 0.7
            torch.testing.assert_close(found, share * forward + (1 - share) * reverse, rtol=1e-5, atol=1e-6)
        assert fr.token_divergence(q, q.clone(), divergence="adaptive-kl").divergence.abs() < 1e-7


def test_one_of_your_own() -> None:
    @divergences.define
    def chi_squared(t: Any, scale: float = 1.0) -> Any:
        return scale * t.q * (t.p / t.q - 1.0) ** 2

    x, y = (s.detach().div(3).requires_grad_() for s in sides(50, torch.float32))
    found = fr.token_divergence(x, y, divergence=chi_squared(scale=2.0)).divergence
    truth = written_out(lambda lp, lq: 2.0 * lq.exp() * (lp.exp() / lq.exp() - 1) ** 2, x, y, 1.0, 1.0, torch.float64)
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-6)
    for ours, exact in zip(gradients(found, x, y), gradients(truth, x, y), strict=True):
        torch.testing.assert_close(ours, exact.float(), rtol=2e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------- the other outputs
def test_statistics_and_their_gradients() -> None:
    x, y = sides(4113, torch.float32)
    labels = torch.randint(0, 4113, (3, 4))
    y.data[0] = x.data[0] * 1.5  # where both agree on the largest
    found = fr.token_divergence(x, y, temperature=0.7, teacher_temperature=2.0, labels=labels, outputs=ALL)
    lp, lq = (x.double() / 0.7).log_softmax(-1), (y.double() / 2.0).log_softmax(-1)
    truth = {
        "entropy": -(lp.exp() * lp).sum(-1),
        "teacher_entropy": -(lq.exp() * lq).sum(-1),
        "logprobs": lp.gather(-1, labels.unsqueeze(-1)).squeeze(-1),
        "top1_agreement": (x.argmax(-1) == y.argmax(-1)).double(),
    }
    assert truth["top1_agreement"].unique().numel() == 2
    for name, exact in truth.items():
        torch.testing.assert_close(getattr(found, name).double(), exact, rtol=1e-5, atol=1e-5)
    assert found.teacher_entropy is not None
    assert not found.teacher_entropy.requires_grad
    exact_value = written_out(FORMULAS["reverse-kl"], x, y, 0.7, 2.0, torch.float64)
    weights = torch.randn(3, 3, 4)

    def total(divergence: Tensor, entropy: Tensor, logprobs: Tensor) -> Tensor:
        return (divergence * weights[0] - entropy * weights[1] + logprobs * weights[2]).sum()

    assert found.entropy is not None
    assert found.logprobs is not None
    ours = torch.autograd.grad(total(found.divergence, found.entropy, found.logprobs), (x, y))
    exact = torch.autograd.grad(total(exact_value, truth["entropy"], truth["logprobs"]), (x, y))
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_only_what_is_asked_for_is_there() -> None:
    x, y = sides(10, torch.float32)
    found = fr.token_divergence(x, y, outputs=("entropy",))
    assert found.entropy is not None
    assert (found.teacher_entropy, found.logprobs, found.top1_agreement) == (None, None, None)


# --------------------------------------------------------------------------------------------- masks and forbidden ids
@pytest.mark.parametrize("name", FORMULAS)
def test_what_lies_under_the_mask_leaks_nowhere(name: str) -> None:
    x, y = sides(300, torch.float32)
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [1, 0, 1, 1]])
    with torch.no_grad():
        x[mask == 0], y[mask == 0] = torch.nan, torch.inf
    temperature = torch.where(mask == 0, torch.nan, 0.9)
    found = fr.token_divergence(x, y, divergence=name, temperature=temperature, mask=mask).divergence
    assert (found[mask == 0] == 0).all()
    clean = [s.detach()[mask == 1].requires_grad_() for s in (x, y)]
    alone = fr.token_divergence(*clean, divergence=name, temperature=torch.full((6,), 0.9)).divergence
    assert torch.equal(found[mask == 1], alone)
    upstream = torch.rand(3, 4)
    for side, own in zip((x, y), clean, strict=True):
        (grad,) = torch.autograd.grad((found * upstream).sum(), side, retain_graph=True)
        (expected,) = torch.autograd.grad((alone * upstream[mask == 1]).sum(), own, retain_graph=True)
        assert (grad[mask == 0] == 0).all()
        assert torch.equal(grad[mask == 1], expected)


@pytest.mark.parametrize("name", FORMULAS)
def test_forbidden_tokens_have_a_finite_cost_and_gradient(name: str) -> None:
    x, y = sides(40, torch.float32)
    with torch.no_grad():
        x[..., 3:9] = -torch.inf  # of the student alone
        y[..., 20:29] = -torch.inf  # of the teacher alone
        x[..., 35:], y[..., 35:] = -torch.inf, -torch.inf
    found = fr.token_divergence(x, y, divergence=name).divergence
    truth = written_out(FORMULAS[name], x, y, 1.0, 1.0, torch.float64)
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-5)
    for side in gradients(found, x, y):
        assert side.isfinite().all()
        assert (side[..., 35:] == 0).all()
    if name == "reverse-kl":
        p = x.softmax(-1)[..., 20:29].sum(-1)
        torch.testing.assert_close(found, p * 1e4, rtol=0.01, atol=50.0)


def test_rows_without_a_distribution_are_nan() -> None:
    x, y = torch.randn(4, 30), torch.randn(4, 30)
    x[0], x[1, 3], y[2, 5] = -torch.inf, torch.nan, torch.inf
    found = fr.token_divergence(x, y).divergence
    assert found[:3].isnan().all()
    assert found[3].isfinite()


def test_equal_sides() -> None:
    x = torch.randn(5, 3000, requires_grad=True)
    for name in FORMULAS:
        found = fr.token_divergence(x, x.detach().clone(), divergence=name).divergence
        assert found.abs().max() < 1e-6
        (grad,) = torch.autograd.grad(found.sum(), x)
        assert grad.abs().max() < 1e-6


@pytest.mark.parametrize("temperature", [1e-3, 1e3])
def test_extreme_temperatures(temperature: float) -> None:
    x, y = sides(200, torch.float32)
    for name, formula in FORMULAS.items():
        found = fr.token_divergence(x, y, divergence=name, temperature=temperature).divergence
        truth = written_out(formula, x, y, temperature, temperature, torch.float64)
        torch.testing.assert_close(found.double(), truth, rtol=1e-4, atol=1e-6)
        assert all(g.isfinite().all() for g in gradients(found, x, y))


# ------------------------------------------------------------------------------------------------ memory and bits
def test_in_place_is_the_same_gradient_on_the_same_memory() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x, y = sides(2500, dtype)
        own = x.detach().clone().requires_grad_()
        (expected,) = gradients(fr.token_divergence(x, y.detach(), divergence="jsd").divergence, x)
        leaf = own * 1  # not a leaf, as logits are not
        leaf.retain_grad()
        memory = leaf.data_ptr()
        (grad,) = gradients(
            fr.token_divergence(leaf, y.detach(), divergence="jsd", inplace_backward=True).divergence, leaf
        )
        assert grad.data_ptr() == memory
        assert torch.equal(grad, expected)


def test_in_place_does_not_write_over_the_teacher() -> None:
    x = torch.randn(3, 50)
    with pytest.raises(ValueError, match="teacher_logits: expected memory of its own"):
        fr.token_divergence(x, x.detach(), inplace_backward=True)
    fr.token_divergence(x[:1], x[1:2], inplace_backward=True)  # neighbours in one batch


@pytest.mark.parametrize("threads", [1, 2])
def test_bits_are_those_of_the_row_alone(threads: int, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue("threads")
    torch.set_num_threads(threads)
    x, y = sides(9001, torch.float32, (23,))
    whole = fr.token_divergence(x, y, outputs=("entropy",))
    (grad,) = gradients(whole.divergence, x)
    alone = x[7:8].detach().clone().requires_grad_()
    one = fr.token_divergence(alone, y[7:8].detach(), outputs=("entropy",))
    assert torch.equal(whole.divergence[7:8], one.divergence)
    assert whole.entropy is not None
    assert one.entropy is not None
    assert torch.equal(whole.entropy[7:8], one.entropy)
    upstream = torch.linspace(-1, 2, 23)[7]
    assert torch.equal(grad[7:8], torch.autograd.grad((one.divergence * upstream).sum(), alone)[0])


def test_views_are_read_where_they_lie() -> None:
    x, y = sides(33, torch.float32, (4, 6))
    views = x[:, :-1], y.transpose(0, 1)[1:].transpose(0, 1)
    found = fr.token_divergence(*views, divergence="jsd", temperature=torch.rand(4, 5) + 0.5).divergence
    assert found.shape == (4, 5)
    grads = gradients(found, x, y)
    torch.manual_seed(0)
    sides(33, torch.float32, (4, 6))
    copies = [v.detach().clone().requires_grad_() for v in views]
    again = fr.token_divergence(*copies, divergence="jsd", temperature=torch.rand(4, 5) + 0.5).divergence
    assert torch.equal(found, again)
    expected = gradients(again, *copies)
    assert torch.equal(grads[0][:, :-1], expected[0])
    assert torch.equal(grads[1][:, 1:], expected[1])


@pytest.mark.parametrize("ids", [None, 2])
@pytest.mark.parametrize("linear", [False, True])
def test_a_row_without_a_top_token_agrees_with_nothing(ids: int | None, linear: bool) -> None:
    """Not with another such row either, though the first index of both is 0; one beside them does."""
    x = torch.eye(4, 6)
    x[0], x[1, 3] = float("-inf"), float("nan")
    chosen = None if ids is None else torch.arange(ids).expand(4, ids)
    asked: dict[str, Any] = {"outputs": ("top1_agreement",), "token_ids": chosen}
    if linear:  # by a head that is the identity; -inf times its zeros is NaN too
        found = fr.linear_divergence(x, torch.eye(6), x.clone(), torch.eye(6), **asked).top1_agreement
    else:
        found = fr.token_divergence(x, x.clone(), **asked).top1_agreement
    torch.testing.assert_close(found, torch.tensor([float("nan"), float("nan"), 1.0, 1.0]), equal_nan=True)


def test_nothing_at_all() -> None:
    x = torch.randn(0, 5, requires_grad=True)
    found = fr.token_divergence(x, torch.randn(0, 5), outputs=("entropy", "teacher_entropy", "top1_agreement"))
    assert found.divergence.shape == (0,)
    found.divergence.sum().backward()
    assert x.grad is not None
    assert fr.token_divergence(torch.randn(5), torch.randn(5)).divergence.shape == ()


@pytest.mark.parametrize(("own", "other"), [(torch.float32, torch.bfloat16), (torch.float16, torch.float32)])
def test_mixed_dtypes(own: torch.dtype, other: torch.dtype) -> None:
    """Each side's gradient is as exact as its own dtype, whatever the other's."""
    x, y = (torch.randn(3, 100).to(dtype).requires_grad_() for dtype in (own, other))
    found = fr.token_divergence(x, y, divergence="jsd").divergence
    exact = [v.detach().double().requires_grad_() for v in (x, y)]
    truth = written_out(FORMULAS["jsd"], *exact, 1.0, 1.0, torch.float64)
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-6)
    for grad, want in zip(gradients(found, x, y), gradients(truth, *exact), strict=True):
        rounding = max(1e-5, torch.finfo(grad.dtype).eps)
        torch.testing.assert_close(grad.double(), want, rtol=rounding, atol=1e-7)


# --------------------------------------------------------------------------------------------------------- refusals
X = torch.randn(2, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fr.token_divergence(X, X[:, :4]), r"teacher_logits: expected shape \[2, 5\] \(that of logits\)"),
        (lambda: fr.token_divergence(X, X.double()), "teacher_logits: expected"),
        (lambda: fr.token_divergence(X, X, divergence="reverse_kl"), "did you mean 'reverse-kl'"),
        (lambda: fr.token_divergence(X, X, divergence=divergences.jsd), "as in divergences.jsd"),
        (lambda: fr.token_divergence(X, X, outputs=("logprobs",)), "labels: needed for the output 'logprobs'"),
        (lambda: fr.token_divergence(X, X, labels=torch.tensor([0, 9])), "labels: needed for the output"),
        (lambda: fr.token_divergence(X, X, labels=torch.tensor([0, 9]), outputs=("logprobs",)), "labels: expected int"),
        (lambda: fr.token_divergence(X, X, temperature=0.0), "temperature: expected"),
        (lambda: fr.token_divergence(X, X, teacher_temperature=-1.0), "teacher_temperature: expected"),
        (lambda: divergences.jsd(1.0), "beta: expected a number between 0 and 1"),
        (lambda: divergences.alpha(0.0), "alpha: expected a number between 0 and 1"),
        (
            lambda: fr.token_divergence(X, X, divergence=fr.losses.ppo()),
            "divergence: expected one over log_p and log_q, got ppo",
        ),
    ],
)
def test_refusals(call: Callable[[], object], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_a_divergence_with_sums_or_without_the_student_is_refused() -> None:
    @divergences.define
    def normalised(t: Any) -> Any:
        return t.p / fr.losses.seq_sum(t.q)

    @divergences.define
    def entropy_of_teacher(t: Any) -> Any:
        return -t.q * t.log_q

    with pytest.raises(ValueError, match="reductions and scans are not part of it"):
        fr.token_divergence(X, X, divergence=normalised())
    with pytest.raises(ValueError, match="does not depend on log_p"):
        fr.token_divergence(X, X, divergence=entropy_of_teacher())


def test_printed_with_its_derivative() -> None:
    assert "log_p" in str(divergences.reverse_kl())
