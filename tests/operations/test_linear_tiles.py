"""The LM head in tiles, in the dtypes that a model has: what is summed over tiles is summed in float32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastreward as fr
from fastreward import linear_logprobs

N, V, H = 21, 37, 6


def inputs(hidden: torch.dtype, weight: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return (
        torch.randn(N, H, generator=g).to(hidden).requires_grad_(),
        torch.randn(V, H, generator=g).to(weight).requires_grad_(),
        torch.randint(0, V, (N,), generator=g),
        torch.randn(N, generator=g),
    )


def truth(h: Tensor, w: Tensor, labels: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probs, gradients for hidden and weight) in float64."""
    a, b = (x.detach().double().requires_grad_() for x in (h, w))
    logprobs = (a @ b.t()).log_softmax(-1).gather(1, labels.unsqueeze(1)).squeeze(1)
    return logprobs.detach(), *torch.autograd.grad(logprobs, (a, b), upstream.double())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_add_up_over_tiles(
    dtype: torch.dtype, backend: fr._dispatch.Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three tiles of rows and three of columns: a gradient that is stored, not added, keeps the last of them."""
    monkeypatch.setattr(linear_logprobs, "_CPU_TILE", (8, 16))
    h, w, labels, upstream = inputs(dtype, dtype)
    with fr.backend(backend):
        got = fr.linear_token_logprobs(h, w, labels).logprobs
        grads = torch.autograd.grad(got, (h, w), upstream)
    logprobs, *want = truth(h, w, labels, upstream)
    # What the inputs' dtype rounds: logits (of 10 or so), their gradients, and the result itself.
    step = {torch.float32: 1e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[dtype]
    torch.testing.assert_close(got.detach().double(), logprobs, rtol=step, atol=6 * step)
    for grad, exact in zip(grads, want, strict=True):
        assert grad.dtype == dtype
        torch.testing.assert_close(grad.double(), exact, rtol=2 * step, atol=8 * step)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_float32_head_under_autocast(backend: fr._dispatch.Backend) -> None:
    """A bfloat16 hidden state meets a float32 head where autocast makes one dtype of them, and nowhere else."""
    h, w, labels, upstream = inputs(torch.bfloat16, torch.float32)
    with fr.backend(backend), torch.autocast("cpu", torch.bfloat16):
        got = fr.linear_token_logprobs(h, w, labels).logprobs
        grads = torch.autograd.grad(got, (h, w), upstream)
    assert got.dtype == torch.float32
    assert [x.dtype for x in grads] == [torch.bfloat16, torch.float32]
    rounded = w.detach().bfloat16()  # what autocast multiplies with
    logprobs, *want = truth(h, rounded, labels, upstream)
    torch.testing.assert_close(got.detach().double(), logprobs, rtol=2.0**-7, atol=6 * 2.0**-7)
    for grad, exact in zip(grads, want, strict=True):
        torch.testing.assert_close(grad.double(), exact, rtol=2.0**-6, atol=8 * 2.0**-7)
    with fr.backend(backend), pytest.raises(TypeError, match="weight: expected hidden's dtype"):
        fr.linear_token_logprobs(h, w, labels)


@pytest.mark.parametrize("kind", ["linear_token_logprobs", "linear_policy_loss"])
def test_float32_head_under_autocast_masked(kind: str) -> None:
    """The same through either entry, with rows masked out: gradients in the inputs' dtypes, 0 for those rows."""
    h, w, labels, _ = inputs(torch.bfloat16, torch.float32)
    mask = (torch.arange(N) % 3 != 1).unsqueeze(0)
    with torch.autocast("cpu", torch.bfloat16):
        if kind == "linear_token_logprobs":
            total = fr.linear_token_logprobs(h.unsqueeze(0), w, labels.unsqueeze(0), mask=mask).logprobs.sum()
        else:
            old = torch.full((1, N), -3.0)
            total = fr.linear_policy_loss(h.unsqueeze(0), w, labels.unsqueeze(0), old, torch.ones(1), mask).loss
    grads = torch.autograd.grad(total, (h, w))
    assert [x.dtype for x in grads] == [torch.bfloat16, torch.float32]
    assert not grads[0][~mask[0]].any()
    assert grads[0][mask[0]].any(-1).all()
