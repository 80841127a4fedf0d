"""openrlhf.models.loss: the losses of actor and critic, and their aggregation, each with its gradient in one pass."""

from __future__ import annotations

from typing import Any, Final, Literal

import torch
from torch import Tensor

from fastreward.losses import Loss
from fastreward.patch.openrlhf import formulas
from fastreward.patch.openrlhf.serving import NotServed, Serving, need
from fastreward.policy_loss import policy_loss
from fastreward.value_loss import value_loss

_MEAN: Final = formulas.identity()


def aggregated(
    serving: Serving,
    loss: Tensor,  # f32 [B, T]
    loss_mask: Tensor,  # [B, T]
    token_level_loss: bool = True,
    dp_size: int = 1,
    batch_num_tokens: float | Tensor | None = None,
    global_batch_size: float | Tensor | None = None,
) -> Tensor:
    """aggregate_loss: the mean over tokens, or over sequences of their means, by global counts where they are given."""
    serving.tokens(loss)
    serving.mask(loss_mask, loss)
    how, normalizer = _aggregation(token_level_loss, dp_size, batch_num_tokens, global_batch_size)
    return policy_loss(loss, None, None, loss_mask, loss=_MEAN, aggregation=how, normalizer=normalizer).loss


def policy(
    serving: Serving,
    module: Any,  # the PolicyLoss, which has the options
    log_probs: Tensor,  # f32 [B, T], as all the others
    old_log_probs: Tensor,
    advantages: Tensor,
    action_mask: Tensor | None = None,
    rollout_log_probs: Tensor | None = None,
    dp_size: int = 1,
    batch_num_tokens: float | Tensor | None = None,
    global_batch_size: float | Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """PolicyLoss.forward: (loss, clip_ratio, ppo_kl, vllm_kl, is_filter_ratio)."""
    corrected = module.is_correction_level != "off"
    serving.tokens(log_probs, old_log_probs, advantages, *([rollout_log_probs] if corrected else []))
    serving.mask(action_mask, log_probs)
    how, normalizer = _aggregation(module.token_level_loss, dp_size, batch_num_tokens, global_batch_size)
    result = policy_loss(
        log_probs,
        old_log_probs,
        advantages,
        action_mask,
        loss=_formula(module),
        aggregation=how,
        normalizer=normalizer,
        rollout_logprobs=rollout_log_probs if corrected else None,
    )
    metrics = result.metrics
    vllm_kl = filtered = None
    if corrected and module.policy_loss_type == "ppo":
        vllm_kl, filtered = metrics["vllm_kl"], metrics["is_filter_ratio"]
        if module.is_correction_level == "seq":  # OpenRLHF counts sequences without a token among the filtered ones
            assert action_mask is not None
            empty = 1 - (action_mask != 0).any(dim=-1).float().mean()
            filtered = torch.where(empty < 1, filtered * (1 - empty), 0.0) + empty
    return result.loss, metrics["clip_ratio"], metrics["ppo_kl"], vllm_kl, filtered


def _formula(module: Any) -> Loss:
    if module.is_correction_gating == "binary_kl" and module.is_correction_level != "off":
        raise NotServed  # rounding alone puts KLs of equal policies below the bound of 0: which tokens is theirs to say
    need(module.policy_loss_type in ("ppo", "gspo"))
    low, high = module.is_correction_threshold
    return formulas.policy(
        module.clip_eps_low,
        module.clip_eps_high,
        1.0 if module.dual_clip is None else module.dual_clip,
        low,
        high,
        kind=module.policy_loss_type,
        dual=module.dual_clip is not None,
        level=module.is_correction_level,
        mode=module.is_correction_mode,
        gating=module.is_correction_gating,
    )


def value(
    serving: Serving,
    module: Any,  # the ValueLoss
    values: Tensor,  # f32 [B, T], as all the others
    old_values: Tensor,
    returns: Tensor,
    action_mask: Tensor | None = None,
    dp_size: int = 1,
    batch_num_tokens: float | Tensor | None = None,
    global_batch_size: float | Tensor | None = None,
) -> Tensor:
    """ValueLoss.forward: half the squared distance from the returns, clipped."""
    serving.tokens(values, returns, *([] if module.clip_eps is None else [old_values]))
    serving.mask(action_mask, values)
    how, normalizer = _aggregation(module.token_level_loss, dp_size, batch_num_tokens, global_batch_size)
    old = None if module.clip_eps is None else old_values
    result = value_loss(values, old, returns, action_mask, clip=module.clip_eps, aggregation=how, normalizer=normalizer)
    return result.loss


def _aggregation(
    token_level_loss: bool,
    dp_size: int,
    batch_num_tokens: float | Tensor | None,
    global_batch_size: float | Tensor | None,
) -> tuple[Literal["token-mean", "seq-mean-token-mean"], float | Tensor | None]:
    """OpenRLHF's two ways, and the denominator of its own: a global count, less what averaging over ranks undoes."""
    count = batch_num_tokens if token_level_loss else global_batch_size
    return ("token-mean" if token_level_loss else "seq-mean-token-mean"), None if count is None else count / dp_size
