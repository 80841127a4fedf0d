"""openrlhf.models.utils: KL estimates per token, rewards per token, means under a mask."""

from __future__ import annotations

import functools
from typing import Any, Final, cast

import torch
from torch import Tensor

from fastreward.losses import Loss
from fastreward.patch.openrlhf import formulas
from fastreward.patch.openrlhf.serving import Serving, need
from fastreward.policy_loss import policy_loss
from fastreward.rewards import token_rewards

_MEAN: Final = formulas.identity()


def approx_kl(
    serving: Serving,
    log_probs: Tensor,  # f32 [B, T], as the others
    log_probs_base: Tensor,
    log_probs_old: Tensor | None = None,
    kl_estimator: str = "k1",
    unbiased_gradient: bool = False,
) -> Tensor:
    """compute_approx_kl: the estimate of each token, within +-10, with its gradient."""
    old = log_probs_old if unbiased_gradient else None
    serving.tokens(log_probs, log_probs_base, *([] if old is None else [old]))
    need(kl_estimator in ("k1", "k2", "k3"))
    if torch.is_grad_enabled() and log_probs.requires_grad:
        formula = _kl(kl_estimator, bool(unbiased_gradient))
        return cast(Tensor, _KL.apply(log_probs, log_probs_base, old, formula))  # type: ignore[no-untyped-call]
    unscored = log_probs.new_full((log_probs.shape[0],), torch.nan)  # rewards are scores less the KL: without scores
    return token_rewards(
        unscored,
        None,
        logprobs=log_probs,
        ref_logprobs=log_probs_base,
        kl=kl_estimator,  # type: ignore[arg-type]
        kl_coef=-1.0,
        kl_clamp=None,
        kl_value_clamp=formulas.KL_CLAMP,
    )


@functools.cache
def _kl(kind: str, unbiased: bool) -> Loss:
    return formulas.approximate_kl(kind=kind, unbiased=unbiased)


class _KL(torch.autograd.Function):
    """An estimate per token. Its derivative is per token too, and comes out of the pass that makes the values."""

    @staticmethod
    def forward(ctx: Any, log_probs: Tensor, base: Tensor, old: Tensor | None, formula: Loss) -> Tensor:
        with torch.enable_grad():
            x = log_probs.detach().requires_grad_()
            result = policy_loss(
                x,
                old,
                None,
                None,
                loss=formula,
                aggregation="token-sum",
                ref_logprobs=base,
                return_token_loss=True,
            )
            (derivative,) = torch.autograd.grad(result.loss, x)
        ctx.save_for_backward(derivative)
        return cast(Tensor, result.token_loss)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (derivative,) = ctx.saved_tensors
        return upstream * derivative, None, None, None


def reward(
    serving: Serving,
    r: Tensor,  # [B]
    kl_coef: float,
    kl: Tensor,  # f32 [B, T]
    action_mask: Tensor | None = None,  # [B, T]
    reward_clip_range: tuple[float, float] | None = None,
) -> Tensor:
    """compute_reward: the score on the last action of each sequence, less kl_coef times the KL of every token.

    A sequence without an action has its score in the last column, as OpenRLHF's has.
    """
    serving.takes(r, torch.float32)
    serving.tokens(kl)
    serving.mask(action_mask, kl)
    need(r.shape == kl.shape[:1] and not (torch.is_grad_enabled() and (r.requires_grad or kl.requires_grad)))
    need(r.device.type != "cpu" or not bool(r.isnan().any()))  # a NaN would be no score
    assert action_mask is not None
    bounds = tuple(reward_clip_range) if reward_clip_range else None
    rewards = token_rewards(r, action_mask, clip=cast(Any, bounds))
    empty = ~(action_mask != 0).any(dim=-1)
    rewards[:, -1] += torch.where(empty, r if bounds is None else r.clamp(*bounds), 0.0)
    return rewards.sub_(kl, alpha=kl_coef) if kl_coef > 0 else rewards


def mean(serving: Serving, tensor: Tensor, mask: Tensor | None, dim: int | None = None) -> Tensor:
    """masked_mean over everything. Per row it stays OpenRLHF's: three short passes that a fourth would not shorten."""
    need(dim is None)
    serving.tokens(tensor)
    serving.mask(mask, tensor)
    return policy_loss(tensor, None, None, mask, loss=_MEAN, aggregation="token-mean").loss
