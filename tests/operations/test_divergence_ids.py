"""token_divergence over k ids and what they leave, beside the same written out in torch, values and gradients."""

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

MASK = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [1, 0, 1, 1]])


def events(logits: Tensor, ids: Tensor, temperature: float, tail: bool, dtype: torch.dtype) -> Tensor:
    """Log-probs of the ids (negative: none), and of the rest or renormalised."""
    found = (logits.to(dtype) / temperature).log_softmax(-1).gather(-1, ids.clamp(min=0))
    found = torch.where(ids < 0, -torch.inf, found)
    if not tail:
        return (found - found.logsumexp(-1, keepdim=True)).clamp(min=-1e4)
    rest = torch.log1p(-found.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-7))
    return torch.cat([found, rest], -1).clamp(min=-1e4)


def sides(dtype: torch.dtype = torch.float32, vocab: int = 403) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of both, and the student's 9 likeliest."""
    x, y = (torch.randn(3, 4, vocab).mul(2).to(dtype).requires_grad_() for _ in range(2))
    return x, y, x.detach().topk(9).indices


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FORMULAS)
def test_values_and_gradients_of_both_sides(name: str, dtype: torch.dtype, tail: bool) -> None:
    x, y, ids = sides(dtype)
    numbers = {"temperature": 0.8, "teacher_temperature": 1.7}
    found = fr.token_divergence(x, y, divergence=name, token_ids=ids, tail=tail, **numbers).divergence
    own = gradients(found, x, y)
    leaves = [s.detach().double().requires_grad_() for s in (x, y)]

    def written_out(at: list[Tensor], of: torch.dtype) -> list[Tensor]:
        logs = [events(z, ids, t, tail, of) for z, t in zip(at, numbers.values(), strict=True)]
        value = FORMULAS[name](*logs).sum(-1)
        return [value, *gradients(value, *at)]

    exact, rounded = written_out(leaves, torch.float64), written_out([x, y], torch.float32)
    for ours, truth, theirs in zip((found, *own), exact, rounded, strict=True):
        assert ours.dtype in (torch.float32, dtype)
        assert_as_good_as_torch(ours, truth, theirs, name)


@pytest.mark.parametrize("tail", [True, False])
def test_the_teacher_as_its_log_probs(tail: bool) -> None:
    x, y, ids = sides()
    logprobs = fr.token_logprobs(y, ids[..., 0], temperature=1.7, outputs=("id_logprobs",), token_ids=ids).id_logprobs
    leaf = logprobs.detach().requires_grad_()
    whole = fr.token_divergence(x, y, divergence="jsd", token_ids=ids, tail=tail, teacher_temperature=1.7).divergence
    found = fr.token_divergence(x, divergence="jsd", token_ids=ids, tail=tail, teacher_logprobs=leaf).divergence
    assert torch.equal(found, whole)
    ours, teachers = gradients(found, x, leaf)
    expected, through = gradients(whole, x, y)
    assert torch.equal(ours, expected)
    (chained,) = torch.autograd.grad(logprobs, y, teachers)
    torch.testing.assert_close(chained, through, rtol=1e-5, atol=1e-7)


def test_every_id_is_the_whole_vocabulary() -> None:
    x, y, _ = sides(vocab=50)
    ids = torch.arange(50)
    for tail in (True, False):
        found = fr.token_divergence(x, y, divergence="jsd", token_ids=ids, tail=tail).divergence
        whole = fr.token_divergence(x, y, divergence="jsd").divergence
        torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-6)
        for a, b in zip(gradients(found, x, y), gradients(whole, x, y), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_padding_counts_for_nothing() -> None:
    x, y, ids = sides()
    ids[0, 0, 4:], ids[2, 3] = -1, -7
    logprobs = torch.where(ids < 0, torch.nan, y.detach().log_softmax(-1).gather(-1, ids.clamp(min=0)))
    for tail in (True, False):
        found = fr.token_divergence(x, divergence="jsd", token_ids=ids, tail=tail, teacher_logprobs=logprobs).divergence
        short = fr.token_divergence(x[0, 0], y[0, 0], divergence="jsd", token_ids=ids[0, 0, :4], tail=tail).divergence
        torch.testing.assert_close(found[0, 0], short, rtol=1e-5, atol=1e-6)
        assert found[2, 3] == 0
        (grad,) = gradients(found, x)
        assert grad.isfinite().all()
        assert (grad[2, 3] == 0).all()


def test_a_teacher_that_is_sure_and_one_that_forbids() -> None:
    x, _, ids = sides()
    logprobs = torch.full(ids.shape, -torch.inf)
    logprobs[..., 0] = 0.0  # nothing is left for the rest: at least 1e-7
    for name in FORMULAS:
        found = fr.token_divergence(x, divergence=name, token_ids=ids, teacher_logprobs=logprobs).divergence
        own = events(x, ids, 1.0, True, torch.float64)
        rest = torch.full_like(own[..., :1], 1e-7).log()
        teacher = torch.cat([logprobs.double().clamp(min=-1e4), rest], -1)
        truth = FORMULAS[name](own, teacher).sum(-1)
        torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-5)
        ours, exact = (gradients(d, x)[0] for d in (found, truth))
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-6 * float(exact.abs().max().clamp(min=1.0)))


def test_what_lies_under_the_mask_leaks_nowhere() -> None:
    x, y, ids = sides()
    logprobs = y.detach().log_softmax(-1).gather(-1, ids)
    with torch.no_grad():
        x[MASK == 0], logprobs[MASK == 0], ids[MASK == 0] = torch.nan, torch.nan, 10**6
    logprobs.requires_grad_()
    found = fr.token_divergence(x, token_ids=ids, teacher_logprobs=logprobs, mask=MASK).divergence
    assert (found[MASK == 0] == 0).all()
    clean = [s.detach()[MASK == 1].requires_grad_() for s in (x, logprobs)]
    alone = fr.token_divergence(clean[0], token_ids=ids[MASK == 1], teacher_logprobs=clean[1]).divergence
    assert torch.equal(found[MASK == 1], alone)
    upstream = torch.rand(3, 4)
    for side, own in zip((x, logprobs), clean, strict=True):
        (grad,) = torch.autograd.grad((found * upstream).sum(), side, retain_graph=True)
        (expected,) = torch.autograd.grad((alone * upstream[MASK == 1]).sum(), own, retain_graph=True)
        assert (grad[MASK == 0] == 0).all()
        assert torch.equal(grad[MASK == 1], expected)


def test_the_other_outputs_are_those_of_the_vocabulary() -> None:
    x, y, ids = sides()
    labels = torch.randint(0, 403, (3, 4))
    asked = ("entropy", "teacher_entropy", "logprobs", "top1_agreement")
    found = fr.token_divergence(x, y, token_ids=ids, labels=labels, outputs=asked, mask=MASK)
    whole = fr.token_divergence(x, y, labels=labels, outputs=asked, mask=MASK)
    for name in asked:
        torch.testing.assert_close(getattr(found, name), getattr(whole, name), rtol=1e-6, atol=1e-6)
    assert found.entropy is not None
    assert whole.entropy is not None
    total, expected = (gradients(r.divergence + r.entropy, x)[0] for r in (found, whole))
    plain = gradients(fr.token_divergence(x, y, token_ids=ids, mask=MASK).divergence, x)[0]
    of_whole = gradients(fr.token_divergence(x, y, mask=MASK).divergence, x)[0]
    torch.testing.assert_close(total - plain, expected - of_whole, rtol=1e-4, atol=1e-6)


def test_in_place_and_bits_of_the_row_alone() -> None:
    x, y, ids = sides(vocab=9001)
    whole = fr.token_divergence(x, y, token_ids=ids).divergence
    (expected,) = gradients(whole, x)
    leaf = x.detach().clone().requires_grad_() * 1
    leaf.retain_grad()
    memory = leaf.data_ptr()
    (grad,) = gradients(fr.token_divergence(leaf, y, token_ids=ids, inplace_backward=True).divergence, leaf)
    assert grad.data_ptr() == memory
    assert torch.equal(grad, expected)
    one = x[2:, 1:2].detach().clone().requires_grad_()
    alone = fr.token_divergence(one, y[2:, 1:2], token_ids=ids[2:, 1:2]).divergence
    assert torch.equal(alone, whole[2:, 1:2])
    upstream = torch.linspace(-1, 2, 12)[9]
    assert torch.equal(torch.autograd.grad((alone * upstream).sum(), one)[0], expected[2:, 1:2])


def test_one_of_your_own_and_ids_of_all_tokens() -> None:
    @divergences.define
    def chi_squared(t: Any) -> Any:
        return t.q * (t.p / t.q - 1.0) ** 2

    x, y, _ = sides()
    ids = torch.tensor([3, 40, 1])
    found = fr.token_divergence(x / 2, y / 2, divergence=chi_squared(), token_ids=ids).divergence
    p, q = (events(z / 2, ids.expand(3, 4, 3), 1.0, True, torch.float64).exp() for z in (x, y))
    torch.testing.assert_close(found.double(), (q * (p / q - 1) ** 2).sum(-1), rtol=1e-5, atol=1e-6)


def test_arrays() -> None:
    x, y, ids = (s.detach() for s in sides())
    logprobs = y.log_softmax(-1).gather(-1, ids)
    expected = fr.token_divergence(x, token_ids=ids, teacher_logprobs=logprobs).divergence
    found = fr.token_divergence(x.numpy(), token_ids=ids.numpy(), teacher_logprobs=logprobs.numpy()).divergence
    assert (found == expected.numpy()).all()


X, IDS = torch.randn(2, 5), torch.tensor([[0, 1], [3, 2]])
LP = torch.full((2, 2), -1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fr.token_divergence(X), "teacher_logits: expected, or token_ids with teacher_logprobs"),
        (lambda: fr.token_divergence(X, X, teacher_logprobs=LP), "teacher_logprobs: stand for teacher_logits"),
        (lambda: fr.token_divergence(X, teacher_logprobs=LP), "token_ids: needed with teacher_logprobs"),
        (
            lambda: fr.token_divergence(X, token_ids=IDS, teacher_logprobs=LP, teacher_temperature=2.0),
            "teacher_temperature: teacher_logprobs are taken as they are",
        ),
        (
            lambda: fr.token_divergence(X, token_ids=IDS, teacher_logprobs=LP, outputs=("teacher_entropy",)),
            "outputs: 'teacher_entropy' is of the teacher's whole vocabulary",
        ),
        (lambda: fr.token_divergence(X, token_ids=IDS, teacher_logprobs=LP[:1]), r"expected shape \[2, 2\]"),
        (
            lambda: fr.token_divergence(X, token_ids=IDS, teacher_logprobs=-LP),
            r"teacher_logprobs: expected log-probs, at most 0, got 1.0 at index \[0, 0\]",
        ),
        (
            lambda: fr.token_divergence(X, token_ids=IDS, teacher_logprobs=LP.long()),
            "teacher_logprobs: expected floating-point numbers",
        ),
        (lambda: fr.token_divergence(X, X, token_ids=IDS + 2), r"token_ids: expected ids below 5.* got 5 at index"),
        (
            lambda: fr.token_divergence(X, X, token_ids=torch.tensor([[0, 1], [3, 3]])),
            r"token_ids: expected ids unique within a row, got 3 at index \[1, 1\]",
        ),
        (lambda: fr.token_divergence(X, X, token_ids=IDS[:, :0]), "token_ids: expected at least one id"),
        (lambda: fr.token_divergence(X, X, token_ids=IDS.float()), "token_ids: expected an integer tensor"),
        (lambda: fr.token_divergence(X, X, token_ids=IDS, tail="no"), "tail: expected True or False"),
    ],
)
def test_refusals(call: Callable[[], object], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call()
