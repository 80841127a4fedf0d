"""openrlhf.trainer.ppo_utils.length_penalty: all responses at once, where OpenRLHF looks at each of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastreward.patch.openrlhf.serving import Serving, need


def overlong(
    serving: Serving,
    experiences: list[Any],
    max_new_tokens: int,
    overlong_buffer_len: float,
    overlong_penalty_factor: float = 1.0,
) -> int:
    """apply_overlong_penalty (DAPO): takes from rewards what a response exceeds the expected length by, in its share.

    Rewards are changed in place. Returns how many responses were penalised.
    """
    need(max_new_tokens >= overlong_buffer_len)
    lengths = [_per_response(serving, e.rewards, e.response_length).double() for e in experiences]
    expected, penalized = max_new_tokens - overlong_buffer_len, 0
    for experience, length in zip(experiences, lengths, strict=True):
        excess = (length - expected).clamp(max=overlong_buffer_len)
        late = excess > 0
        penalty = torch.where(late, -excess / overlong_buffer_len * overlong_penalty_factor, 0.0)
        experience.rewards += penalty.to(experience.rewards.dtype)
        penalized += int(late.sum())
    return penalized


def stop_properly(serving: Serving, experiences: list[Any], stop_properly_penalty_coef: float) -> int:
    """apply_stop_properly_penalty (ProRL): rewards of truncated responses times the coefficient; a negative one itself.

    Rewards are changed in place. Returns how many responses were truncated.
    """
    need(stop_properly_penalty_coef <= 1)
    known = [e for e in experiences if e.truncated is not None]
    flags = [_per_response(serving, e.rewards, e.truncated) != 0 for e in known]
    for experience, truncated in zip(known, flags, strict=True):
        penalized = experience.rewards * stop_properly_penalty_coef
        if stop_properly_penalty_coef < 0:
            penalized = torch.full_like(experience.rewards, stop_properly_penalty_coef)
        experience.rewards.copy_(torch.where(truncated, penalized, experience.rewards))
    return sum(int(truncated.sum()) for truncated in flags)


def _per_response(serving: Serving, rewards: Any, x: Any) -> Tensor:
    """`x`, one for each reward."""
    serving.takes(rewards, torch.float32, torch.float64)
    need(isinstance(x, Tensor) and x.ndim == 1 and x.shape == rewards.shape and x.device == rewards.device)
    need(not rewards.requires_grad)
    result: Tensor = x
    return result
