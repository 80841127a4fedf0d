"""fastreward: compiled kernels for RL training of language models, between the rollouts and the optimizer."""

from __future__ import annotations

import torch as _torch  # noqa: F401  first: the extension shares the OpenMP runtime that torch has loaded

from fastreward import losses
from fastreward._dispatch import BackendError, backend
from fastreward.group import group_advantages
from fastreward.linear_logprobs import linear_token_logprobs
from fastreward.logprobs import TokenStats, token_logprobs
from fastreward.policy_loss import PolicyLoss, policy_loss
from fastreward.whiten import whiten

__version__ = "0.1.0"
__all__ = [
    "BackendError",
    "PolicyLoss",
    "TokenStats",
    "backend",
    "group_advantages",
    "linear_token_logprobs",
    "losses",
    "policy_loss",
    "token_logprobs",
    "whiten",
]
