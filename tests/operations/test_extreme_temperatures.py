"""Temperatures that float32 can't hold, nor their reciprocals: what the limit gives, and never a NaN."""

from __future__ import annotations

import math
from typing import Any

import pytest
import raw_checks
import torch
from torch import Tensor

import fastreward as fr
from fastreward._runtime.dispatch import Backend
from fastreward.cpu import logprobs as cpu

HOT, COLD = (1e36, 1e39, 1.7e308), (1e-12, 1e-39, 5e-324)
OUTPUTS = ("logprobs", "entropy", "log_sum_sq_probs", "max_logprob", "argmax", "rank")
BACKENDS: tuple[Backend, ...] = ("cpu", "reference")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_form = pytest.mark.parametrize("per_token", [False, True])


def scored(logits: Tensor, labels: Tensor, temperature: float, per_token: bool) -> fr.TokenStats:
    given: Any = torch.full(labels.shape, temperature, dtype=torch.float64) if per_token else temperature
    return fr.token_logprobs(logits, labels, temperature=given, outputs=OUTPUTS)


def logits_of(kind: str, vocab: int, dtype: torch.dtype) -> Tensor:
    g = torch.Generator().manual_seed(vocab)
    x = torch.zeros(2, vocab) if kind == "zeros" else torch.randn(2, vocab, generator=g) * 3
    if kind == "-inf":
        x[:, 1::3] = -torch.inf
    if kind == "ties":
        x[:, vocab // 2] = x[:, -1] = 20.0
    return x.to(dtype)


@every_backend
@every_form
@pytest.mark.parametrize("temperature", [*HOT, *COLD])
def test_zeros_are_uniform_at_any_temperature(backend: Backend, per_token: bool, temperature: float) -> None:
    with fr.backend(backend):
        for vocab in (1, 16, 17, 4097):
            logits, labels = torch.zeros(1, vocab, requires_grad=True), torch.zeros(1, dtype=torch.int64)
            stats = scored(logits, labels, temperature, per_token)
            for got, want in (
                (stats.logprobs, -math.log(vocab)),
                (stats.entropy, math.log(vocab)),
                (stats.log_sum_sq_probs, -math.log(vocab)),
                (stats.max_logprob, -math.log(vocab)),
            ):
                torch.testing.assert_close(got.detach(), torch.tensor([want]), rtol=2e-7, atol=1e-6)
            (grad,) = torch.autograd.grad([stats.logprobs, stats.entropy], logits, [torch.ones(1), torch.ones(1)])
            assert grad.isfinite().all()


@every_backend
@every_form
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["plain", "-inf", "ties"])
def test_limits(backend: Backend, per_token: bool, dtype: torch.dtype, kind: str) -> None:
    """Hot: uniform over what is possible. Cold: uniform over the largest, all others have log-prob -inf or near it."""
    for vocab in (17, 4113):
        logits = logits_of(kind, vocab, dtype)
        possible, largest = logits > -torch.inf, logits == logits.amax(-1, keepdim=True)
        with fr.backend(backend):
            for temperature in (*HOT, *COLD):
                leaf = logits.clone().requires_grad_()
                support = possible if temperature > 1 else largest
                count = support.sum(-1).double()
                for label in (logits.argmax(-1), torch.tensor([0, 1])):
                    stats = scored(leaf, label, temperature, per_token)
                    inside = support.gather(1, label.unsqueeze(1)).squeeze(1)
                    want = torch.where(inside, -count.log(), -torch.inf)
                    got = stats.logprobs.detach().double()
                    torch.testing.assert_close(torch.where(got < -1e4, -torch.inf, got), want, rtol=1e-6, atol=1e-6)
                    torch.testing.assert_close(stats.entropy.detach().double(), count.log(), rtol=1e-6, atol=1e-6)
                    torch.testing.assert_close(
                        stats.log_sum_sq_probs.detach().double(), -count.log(), rtol=1e-6, atol=1e-6
                    )
                    assert torch.equal(stats.argmax, logits.argmax(-1))
                    upstream = [torch.ones(2)] * 3
                    outs = [stats.logprobs, stats.entropy, stats.log_sum_sq_probs]
                    (grad,) = torch.autograd.grad(outs, leaf, upstream)
                    assert not grad.isnan().any()
                    if dtype != torch.float16:  # which overflows long before
                        assert grad.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels(dtype: torch.dtype) -> None:
    raw_checks.check_extreme_temperatures(cpu, "cpu", dtype, 4113)


@every_backend
@pytest.mark.parametrize("temperature", [*HOT, *COLD])
def test_losses_and_heads(backend: Backend, temperature: float) -> None:
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(1, 2, 8, generator=g), torch.randn(17, 8, generator=g)
    logits, old, advantages = hidden @ weight.t(), torch.full((1, 2), -3.0), torch.tensor([-1.0])
    labels = logits.argmax(-1)
    want = -math.log(17) if temperature > 1 else 0.0
    with fr.backend(backend):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        stats = fr.linear_token_logprobs(*leaves, labels, temperature=temperature, outputs=("logprobs", "entropy"))
        torch.testing.assert_close(stats.logprobs.detach(), torch.full((1, 2), want), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(stats.entropy.detach(), torch.full((1, 2), -want), rtol=1e-6, atol=1e-6)
        results = [
            fr.linear_policy_loss(*leaves, labels, old, advantages, temperature=temperature, entropy_coef=0.1),
            fr.logits_policy_loss(
                logits.clone().requires_grad_(), labels, old, advantages, temperature=temperature, entropy_coef=0.1
            ),
        ]
        entropy = torch.full((1, 2), -want)
        expected = fr.policy_loss(torch.full((1, 2), want), old, advantages, entropy=entropy, entropy_coef=0.1).loss
        for result in results:
            torch.testing.assert_close(result.loss.detach(), expected, rtol=1e-5, atol=1e-5)
            result.loss.backward()
        assert all(x.grad is not None and not x.grad.isnan().any() for x in leaves)


@every_backend
def test_extreme_soft_caps_and_scales(backend: Backend) -> None:
    """A cap that no float32 holds caps nothing, one below them all makes every logit 0."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(3, 8, generator=g), torch.randn(17, 8, generator=g)
    labels = torch.tensor([0, 5, 16])
    with fr.backend(backend):
        plain = fr.linear_token_logprobs(hidden, weight, labels).logprobs
        for cap in (1e31, 1e39, 1e300):
            got = fr.linear_token_logprobs(hidden, weight, labels, softcap=cap).logprobs
            torch.testing.assert_close(got, plain, rtol=1e-6, atol=1e-6)
        for changed in ({"softcap": 1e-39}, {"softcap": 1e-300}, {"logit_scale": 1e-300}, {"logit_scale": 0.0}):
            leaf = hidden.clone().requires_grad_()
            got = fr.linear_token_logprobs(leaf, weight, labels, **changed).logprobs
            torch.testing.assert_close(got.detach(), torch.full((3,), -math.log(17)), rtol=1e-6, atol=1e-6)
            got.sum().backward()
            assert leaf.grad is not None
            assert leaf.grad.isfinite().all()
        with pytest.raises(ValueError, match="logit_scale: expected a number that float32 can hold, got 1e"):
            fr.linear_token_logprobs(hidden, weight, labels, logit_scale=1e39)
