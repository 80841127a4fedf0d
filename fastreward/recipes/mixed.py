"""Policy losses per token that add a term to PPO's, or put a policy between its two.

r = exp(lp - old_lp), lp = logprobs, A = advantages, sg = stop_gradient. Every recipe takes the arguments of
`fastreward.policy_loss`, passes its options on and returns what it returns; parameters have their published values.
A response whose reward is NaN was not scored, and is left out.
"""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from fastreward import losses
from fastreward._arguments import check
from fastreward._arguments.numbers import Number
from fastreward._arguments.options import Aggregation
from fastreward._loss_call.results import PolicyLoss
from fastreward.losses import Loss
from fastreward.policy_loss import policy_loss
from fastreward.recipes._catalogue.registry import recipe
from fastreward.recipes._shared.factory import reading_recipe
from fastreward.recipes._shared.options import LossOptions, PolicyOptions, add_extra, scored

__all__ = ["echo", "loglinear_ppo", "vapo_loss"]


@recipe(
    "VAPO's loss (positive-example likelihood beside PPO)",
    "arXiv 2504.05118",
    note="NeMo-RL loss_functions.py by a third-party formula page; the coefficient from memory of the paper",
    build=losses.vapo,
)
def vapo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    rewards: Tensor,
    mask: Tensor | None = None,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    nll_coef: float = 0.1,
    aggregation: Aggregation = "token-mean",
    **options: Unpack[PolicyOptions],
) -> PolicyLoss:
    """PPO's loss + nll_coef * mean of -lp over the tokens of right answers.

    rewards [B]: above 0 for right answers. Advantages: `gae` with the method's decoupled and length-adaptive lambda.
    """
    add_extra(options, reward=scored(options, rewards, logprobs))
    loss = losses.vapo(clip_low, clip_high, nll_coef)
    return policy_loss(logprobs, old_logprobs, advantages, mask, loss=loss, aggregation=aggregation, **options)


@reading_recipe(
    "ECHO (the likelihood of tool outputs beside GRPO)",
    "github.com/PrimeIntellect-ai/prime-rl",
    note="prime-rl echo.py by a third-party formula page, which gives alpha no default; its one mean is reconstructed",
    settings={"alpha": 0.1},
)
def echo(
    observation: Tensor,
    mask: Tensor | None = None,
    *,
    alpha: float,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    **options: Unpack[LossOptions],
) -> Loss:
    """PPO's loss on the policy's tokens, -alpha lp on those that a tool wrote.

    observation, in the shape of logprobs: nonzero = a tool's token. mask has to count these too.
    """
    return losses.echo(alpha, clip_low, clip_high)


@recipe(
    "Decoupled PPO with the log-linear proximal policy",
    "arXiv 2110.00641",
    code="AReaL 1.0.4 trainer/ppo/actor.py `compute_prox_logp_approximations`, utils/functional `ppo_actor_loss_fn`",
    build=losses.loglinear_ppo,
    settings={"current_version": 7},
)
def loglinear_ppo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    versions: Tensor,
    mask: Tensor | None = None,
    *,
    current_version: Number,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    aggregation: Aggregation = "token-mean",
    **options: Unpack[PolicyOptions],
) -> PolicyLoss:
    """sg(exp(prox - old_lp)) max(-A r, -A clip(r)), r = exp(lp - prox), prox = old_lp + a (lp - old_lp), constant.

    versions, in the shape of logprobs: of the policy that wrote the token, below 0 for none; current_version: of the
    one that is trained, the proximal one's being one less. a = (current_version - 1 - versions) / (current_version -
    versions), held within 0 and 1.
    """
    behind = current_version - check.reals("versions", versions)
    old = (behind > 0) & (versions >= 0)
    share = torch.where(old, (behind - 1) / torch.where(old, behind, 1.0), 0.0).clamp(0.0, 1.0)
    add_extra(options, interpolation=share)
    loss = losses.loglinear_ppo(clip_low, clip_high)
    return policy_loss(logprobs, old_logprobs, advantages, mask, loss=loss, aggregation=aggregation, **options)
