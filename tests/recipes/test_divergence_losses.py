"""Recipes of distillation over the vocabulary, beside plain loops in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastreward import recipes

B, T, V, K = 3, 4, 23, 5
MASK = torch.tensor([[1, 1, 0, 1], [1, 0, 1, 1], [0, 0, 0, 1]])


def sides() -> tuple[Tensor, Tensor]:
    return torch.randn(B, T, V, requires_grad=True), torch.randn(B, T, V)


def softmax(row: list[float], temperature: float = 1.0) -> list[float]:
    top = max(row)
    e = [math.exp((x - top) / temperature) for x in row]
    return [x / sum(e) for x in e]


def kl(a: list[float], b: list[float]) -> float:
    return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))


def mixed(a: list[float], b: list[float], share: float) -> list[float]:
    return [share * x + (1 - share) * y for x, y in zip(a, b, strict=True)]


def jsd(p: list[float], q: list[float], beta: float) -> float:
    if beta in (0.0, 1.0):
        return kl(q, p) if beta == 0.0 else kl(p, q)
    m = mixed(q, p, beta)
    return beta * kl(q, m) + (1 - beta) * kl(p, m)


def mean(x: Tensor, y: Tensor, of: Callable[[list[float], list[float], int, int], float]) -> float:
    """Over the tokens that count."""
    a, b = x.detach().double().tolist(), y.double().tolist()
    found = [of(a[i][t], b[i][t], i, t) for i in range(B) for t in range(T) if MASK[i, t]]
    return sum(found) / len(found)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_gkd(beta: float) -> None:
    x, y = sides()
    found = recipes.gkd(x, y, MASK, beta=beta, temperature=0.7)
    expected = mean(x, y, lambda a, b, *_: jsd(softmax(a, 0.7), softmax(b, 0.7), beta))
    assert found.item() == pytest.approx(expected, rel=1e-5)
    total = recipes.gkd(x, y, MASK, beta=beta, temperature=0.7, normalizer=16.0)
    assert total.item() == pytest.approx(expected * int(MASK.sum()) / 16, rel=1e-5)
    (grad,) = torch.autograd.grad(found, x)
    assert (grad[MASK == 0] == 0).all()
    assert grad[MASK == 1].abs().sum() > 0


def test_on_policy_distillation_with_weights() -> None:
    x, y = sides()
    weights = torch.rand(B, T)
    weights[MASK == 0] = torch.nan
    found = recipes.on_policy_distillation(
        x, y, MASK, divergence="total-variation", teacher_temperature=2.0, weights=weights
    )

    def token(a: list[float], b: list[float], i: int, t: int) -> float:
        p, q = softmax(a), softmax(b, 2.0)
        return float(weights[i, t]) * sum(abs(u - v) for u, v in zip(p, q, strict=True)) / 2

    assert found.item() == pytest.approx(mean(x, y, token), rel=1e-5)


def events(p: list[float], ids: list[int], tail: bool) -> list[float]:
    own = [p[j] for j in ids]
    return [*own, 1 - sum(own)] if tail else [x / sum(own) for x in own]


@pytest.mark.parametrize("tail", [True, False])
def test_topk_distillation(tail: bool) -> None:
    x, y = sides()
    sent = y.log_softmax(-1).topk(K)
    ids = sent.indices.tolist()
    found = recipes.topk_distillation(x, sent.indices, sent.values, MASK, tail=tail)
    expected = mean(x, y, lambda a, b, i, t: kl(*(events(softmax(z), ids[i][t], tail) for z in (b, a))))
    assert found.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_sdpo_is_the_same_from_logits_and_from_log_probs(alpha: float, tail: bool) -> None:
    x, y = sides()
    ids, weights = x.detach().topk(K).indices, torch.rand(B, T)
    found = recipes.sdpo_logits(x, y, MASK, top_k=K, alpha=alpha, tail=tail, weights=weights)
    own, teachers = (z.log_softmax(-1).gather(-1, ids) for z in (x, y))
    other = recipes.sdpo_topk(own, teachers, MASK, alpha=alpha, tail=tail, weights=weights).loss
    torch.testing.assert_close(found, other, rtol=1e-4, atol=1e-6)
    for ours, theirs in zip(torch.autograd.grad(found, x), torch.autograd.grad(other, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    listed = ids.tolist()

    def token(a: list[float], b: list[float], i: int, t: int) -> float:
        p, q = (events(softmax(z), listed[i][t], tail) for z in (a, b))
        return float(weights[i, t]) * jsd(p, q, alpha)

    assert found.item() == pytest.approx(mean(x, y, token), rel=1e-4)


def adaptive(p: list[float], q: list[float]) -> float:
    mass, tail = 0.0, set()
    for j in sorted(range(len(q)), key=lambda j: q[j]):
        mass += q[j]
        if mass <= 0.5:
            tail.add(j)
    head = sum(abs(p[j] - q[j]) for j in range(len(q)) if j not in tail)
    share = head / sum(abs(u - v) for u, v in zip(p, q, strict=True))
    return share * kl(q, p) + (1 - share) * kl(p, q)


OBJECTIVES: dict[str, Callable[[list[float], list[float]], float]] = {
    "forward-kl": lambda p, q: kl(q, p),
    "reverse-kl": kl,
    "adaptive-kl": adaptive,
    "skewed-forward-kl": lambda p, q: kl(q, mixed(q, p, 0.1)),
    "skewed-reverse-kl": lambda p, q: kl(p, mixed(p, q, 0.1)),
    "jsd": lambda p, q: jsd(p, q, 0.5),
}


@pytest.mark.parametrize("topk", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_roll_kd(objective: str, topk: bool) -> None:
    x, y = sides()
    labels = torch.randint(0, V, (B, T))
    ids = y.topk(K).indices if topk else None
    found = recipes.roll_kd(
        x, y, labels, MASK, objective=objective, weight=0.3, temperature=0.8, teacher_temperature=1.5, token_ids=ids
    )

    def token(a: list[float], b: list[float], i: int, t: int) -> float:
        p, q = softmax(a, 0.8), softmax(b, 1.5)
        if ids is not None:
            p, q = (events(z, ids[i, t].tolist(), False) for z in (p, q))
        return 0.3 * OBJECTIVES[objective](p, q) - 0.7 * math.log(softmax(a)[int(labels[i, t])])

    assert found.item() == pytest.approx(mean(x, y, token), rel=1e-5)


def test_messages() -> None:
    x, y = sides()
    with pytest.raises(ValueError, match=r"beta: expected a number in \[0, 1\]"):
        recipes.gkd(x, y, beta=1.5)
    with pytest.raises(ValueError, match="teacher_logits: expected a constant"):
        recipes.gkd(x, y.requires_grad_())
    with pytest.raises(ValueError, match="top_k: expected between 1 and 23 ids, got 24"):
        recipes.sdpo_logits(x, y.detach(), top_k=24)
    with pytest.raises(ValueError, match="objective: expected one of"):
        recipes.roll_kd(x, y.detach(), torch.zeros(B, T, dtype=torch.long), objective="total-variation")
    with pytest.raises(ValueError, match=r"weights: expected shape \[3, 4\]"):
        recipes.on_policy_distillation(x, y.detach(), weights=torch.ones(3))
