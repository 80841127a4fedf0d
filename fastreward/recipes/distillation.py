"""Distillation on the student's own samples, as advantages: what a teacher thinks of each token that was sampled.

lp = logprobs of the student, which made the samples, t = teacher_logprobs of the same tokens (from
`fastreward.token_logprobs`). Recipes take tensors of tokens, [B, T] or packed [N], and return float32 advantages in
that shape, 0 where the mask is: constants, for `policy_loss(..., advantages)`. They add to others by plain arithmetic:
examples/compose_advantages.py. Divergences over the whole vocabulary, of which these are samples, are losses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastreward._arguments import check
from fastreward.recipes._catalogue.registry import recipe
from fastreward.recipes._shared.tokens import beside, token_values

__all__ = ["opd"]


@recipe(
    "OPD (on-policy distillation)",
    "arXiv 2601.02780",
    code="NeMo-RL advantage_estimator.py; the same in slime, prime-rl, ms-swift and verl",
)
def opd(
    old_logprobs: Tensor,
    teacher_logprobs: Tensor,
    mask: Tensor | None = None,
    *,
    rollout_logprobs: Tensor | None = None,
    low: float = 0.5,
    high: float = 5.0,
) -> Tensor:
    """A = t - old_lp, the sampled reverse KL's descent; 0 where exp(old_lp - rollout_lp) is outside [low, high].

    Args:
        old_logprobs: of the student, [B, T] or [N].
        teacher_logprobs: its shape; with several teachers, of the one for the prompt's domain.
        mask: its shape; nonzero = a token of the response.
        rollout_logprobs: its shape, as the inference engine reported them; only with them is anything gated (IcePop).
        low, high: of the gate.
    """
    old = token_values("old_logprobs", old_logprobs, mask)
    advantages = beside("teacher_logprobs", teacher_logprobs, "old_logprobs", old, mask) - old
    if rollout_logprobs is None:
        return advantages
    low, high = check.not_negative("low", low), check.positive("high", high)
    ratio = (old - beside("rollout_logprobs", rollout_logprobs, "old_logprobs", old, mask)).exp()
    return torch.where((ratio >= low) & (ratio <= high), advantages, 0.0)
