"""PPO in a line of the language, and terms of a few tokens for it and others."""

from __future__ import annotations

import torch
from torch import Tensor

from fastreward.losses import clip, define, maximum


@define
def plain_ppo(t, clip_low=0.2, clip_high=0.2):
    return maximum(-t.advantage * t.ratio, -t.advantage * clip(t.ratio, 1 - clip_low, 1 + clip_high))


def make(rows: int = 4, width: int = 6, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    old = -torch.rand(rows, width, generator=g, dtype=torch.float64)
    return {
        "logprob": (old + 0.3 * torch.randn(rows, width, generator=g, dtype=torch.float64)).requires_grad_(),
        "old_logprob": old,
        "advantage": torch.randn(rows, width, generator=g, dtype=torch.float64),
    }
