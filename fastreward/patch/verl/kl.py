"""verl's estimates of a KL as a loss: value and slope of each token in one pass, by the loss language."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastreward.language.node import Node
from fastreward.language.terms import Terms
from fastreward.losses import abs, clip, define, expm1, stop_gradient
from fastreward.policy_loss import policy_loss


@define(static=("kind", "straight"))
def estimate(t: Terms, *, kind: str, straight: bool) -> Node:
    """k1, abs, k2 or k3 (the log-ratio within +-20, the estimate within +-10); straight: with the gradient of k2."""
    d = t.logprob - t.ref_logprob
    if kind == "k3":
        x = clip(-d, -20.0, 20.0)
        value = clip(expm1(x) - x, -10.0, 10.0)
    else:
        value = {"k1": d, "abs": abs(d), "k2": 0.5 * d * d}[kind]
    if not straight:
        return value
    half = 0.5 * d * d
    return half - stop_gradient(half) + stop_gradient(value)


def differentiable(logprobs: Tensor, ref_logprobs: Tensor, kind: str, straight: bool) -> Tensor:
    """The estimate of each token [B, T], f32, with its gradient for logprobs."""
    result: Tensor = _Estimate.apply(logprobs, ref_logprobs, kind, straight)  # type: ignore[no-untyped-call]
    return result


class _Estimate(torch.autograd.Function):
    """The language differentiates a sum; a sum's derivative for a token is the slope of that token's own estimate."""

    @staticmethod
    def forward(ctx: Any, logprobs: Tensor, ref_logprobs: Tensor, kind: str, straight: bool) -> Tensor:
        with torch.enable_grad():
            x = logprobs.detach().requires_grad_()
            loss = estimate(kind=kind, straight=straight)
            options: Any = {"ref_logprobs": ref_logprobs, "aggregation": "token-sum", "empty": "zero"}
            found = policy_loss(x, None, None, loss=loss, return_token_loss=True, **options)
            (slope,) = torch.autograd.grad(found.loss, x)
        ctx.save_for_backward(slope)
        assert found.token_loss is not None
        return found.token_loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return upstream * slope, None, None, None
