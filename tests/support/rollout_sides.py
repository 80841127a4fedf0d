"""Logits like those of a language model, and what goes wrong between a rollout engine and a trainer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

B, T, V = 12, 96, 400
GENERATOR = torch.Generator()


def seeded(seed: int) -> None:
    """Starts the numbers anew."""
    GENERATOR.manual_seed(seed)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR)


def logits() -> Tensor:
    """[B, T, V] of tokens that are certain to various degrees."""
    sharpness = (normal(B, T, 1) * 0.6 + 1.0).exp()
    z = normal(B, T, V) * sharpness
    peaked = torch.rand(B, T, 1, generator=GENERATOR) < 0.6
    height = torch.where(peaked, torch.rand(B, T, 1, generator=GENERATOR) * 8 + 3.5 * sharpness, 0.0)
    return z.scatter_add(-1, torch.randint(0, V, (B, T, 1), generator=GENERATOR), height)


def bf16_noise(z: Tensor) -> Tensor:
    """What two bfloat16 forward passes of other kernels differ by."""
    return z + z.abs().clamp(max=30) * 2.0**-8 * 0.6 * normal(*z.shape)


def top_p(z: Tensor, share: float) -> Tensor:
    """-inf outside of the fewest ids that hold this share."""
    ordered, ids = z.log_softmax(-1).sort(dim=-1, descending=True)
    before = ordered.exp().cumsum(-1) - ordered.exp()
    return z.masked_fill(torch.zeros_like(z, dtype=torch.bool).scatter(-1, ids, before >= share), -torch.inf)


def top_k(z: Tensor, k: int) -> Tensor:
    return z.masked_fill(z < z.topk(k, -1).values[..., -1:], -torch.inf)


def sample(z: Tensor) -> Tensor:
    """Tokens [B, T]."""
    flat = z.softmax(-1).reshape(-1, z.shape[-1])
    return torch.multinomial(flat, 1, generator=GENERATOR).reshape(z.shape[:-1])


def chosen(z: Tensor, tokens: Tensor) -> Tensor:
    return z.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def top(z: Tensor, k: int = 20) -> dict[str, Tensor]:
    """As engines report it."""
    found = z.log_softmax(-1).topk(k, -1)
    return {"top_logprobs": found.values, "top_ids": found.indices}


def said(kind: str, z: Tensor, tokens: Tensor) -> Any:
    """One side in a kind of input."""
    return {
        "logprobs": lambda: chosen(z, tokens),
        "top-k": lambda: top(z),
        "logits": lambda: {"logits": z, "tokens": tokens},
    }[kind]()


def moved(side: Any, move: Any) -> Any:
    """`move` on all that a side has of its tokens."""
    return {name: move(x) for name, x in side.items()} if isinstance(side, dict) else move(side)
