"""The divergences written out, f(log p, log q) per token of the vocabulary, for the student's p and the teacher's q."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def _jsd(lp: Tensor, lq: Tensor, beta: float = 0.5) -> Tensor:
    m = (beta * lq.exp() + (1 - beta) * lp.exp()).clamp(min=1e-37).log()
    return beta * lq.exp() * (lq - m) + (1 - beta) * lp.exp() * (lp - m)


def _skewed(first: Tensor, other: Tensor, alpha: float = 0.1) -> Tensor:
    mixture = (alpha * first.exp() + (1 - alpha) * other.exp()).clamp(min=1e-37)
    return first.exp() * (first - mixture.log())


def _alpha(lp: Tensor, lq: Tensor, alpha: float = 0.5) -> Tensor:
    mixed = (alpha * lp + (1 - alpha) * lq).exp()
    return (alpha * lp.exp() + (1 - alpha) * lq.exp() - mixed) / (alpha * (1 - alpha))


def _adaptive(lp: Tensor, lq: Tensor, alpha: float = 0.5) -> Tensor:
    between = (lp.exp() - lq.exp()).abs().detach()
    ordered, order = lq.detach().exp().sort(stable=True)
    tail = torch.zeros_like(lq, dtype=torch.bool).scatter(-1, order, ordered.cumsum(-1) <= alpha)
    head = between.masked_fill(tail, 0.0).sum(-1, keepdim=True) / between.sum(-1, keepdim=True)
    head = head.nan_to_num(0.5)  # of equal sides
    return head * lq.exp() * (lq - lp) + (1 - head) * lp.exp() * (lp - lq)


#: By name: f(log p, log q) per token of the vocabulary, and a divergence with other parameters than the default's.
FORMULAS: dict[str, Callable[..., Tensor]] = {
    "forward-kl": lambda lp, lq: lq.exp() * (lq - lp),
    "reverse-kl": lambda lp, lq: lp.exp() * (lp - lq),
    "adaptive-kl": _adaptive,
    "jsd": _jsd,
    "skewed-forward-kl": lambda lp, lq, alpha=0.1: _skewed(lq, lp, alpha),
    "skewed-reverse-kl": lambda lp, lq, alpha=0.1: _skewed(lp, lq, alpha),
    "total-variation": lambda lp, lq: (lp.exp() - lq.exp()).abs() / 2,
    "alpha": _alpha,
    "hellinger": lambda lp, lq: ((lp / 2).exp() - (lq / 2).exp()) ** 2 / 2,
}


def gradients(outputs: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Under upstream gradients that differ from token to token."""
    upstream = torch.linspace(-1, 2, outputs.numel()).reshape(outputs.shape).to(outputs.dtype)
    return torch.autograd.grad((outputs * upstream).sum(), inputs)
