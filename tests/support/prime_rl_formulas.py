"""What prime-rl computes of one sequence, written out in float64, and its two records.

Read in prime-rl (trainer/rl/loss.py) at commits 559b447 (its default) and 008468c.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

VERSION = "559b447"


@dataclass
class LossInputs:
    """Of one sequence, each [tokens]."""

    trainer_logprobs: Tensor
    inference_logprobs: Tensor
    ref_logprobs: Tensor | None
    advantages: Tensor
    loss_mask: Tensor
    loss_weights: Tensor | None = None


@dataclass
class LossOutputs:
    """A sum, and what is logged."""

    loss: Tensor
    metrics: dict[str, Tensor]


def inputs(tokens: int, *, weighted: bool = False, seed: int = 0) -> LossInputs:
    """A sequence, f32, a third of it masked out."""
    g = torch.Generator().manual_seed(seed)
    old = -2 * torch.rand(tokens, generator=g)
    return LossInputs(
        (old + 0.5 * torch.randn(tokens, generator=g)).clamp(max=-0.01).requires_grad_(),
        old,
        old + 0.2 * torch.randn(tokens, generator=g),
        torch.randn(tokens, generator=g),
        torch.rand(tokens, generator=g) < 0.7,
        torch.rand(tokens, generator=g) * 2 if weighted else None,
    )


def loss(x: LossInputs, kind: str, logprobs: Tensor, **options: float) -> tuple[Tensor, Tensor]:
    """The summed loss of f64 `logprobs`, and the share of the counted tokens that are dropped."""
    kept_options: dict[str, Any] = {"adv_tau": 1.0, "kl_tau": 0.0 if kind == "icepop" else 1e-3} | options
    old, advantages, mask = x.inference_logprobs.double(), x.advantages.double(), x.loss_mask
    moved, ratio = logprobs.exp() - old.exp(), (logprobs - old).exp()
    if kind == "default":
        low, high = options.get("dppo_mask_low", 0.2), options.get("dppo_mask_high", 0.2)
        dropped = torch.where(advantages > 0, moved > high, moved < -low)
    elif kind == "ipo":
        dropped = moved.abs() > options.get("eps", 0.2)
    else:
        dropped = (ratio < options.get("ratio_low", 0.5)) | (ratio > options.get("ratio_high", 5.0))
    surrogate = -(mask & ~dropped).double() * kept_options["adv_tau"] * advantages * ratio
    per_token = surrogate + kept_options["kl_tau"] * mask * (logprobs - old) ** 2
    if x.loss_weights is not None:
        per_token = per_token * x.loss_weights.double()
    return per_token.sum(), (dropped & mask).sum() / mask.sum().clamp(min=1)
