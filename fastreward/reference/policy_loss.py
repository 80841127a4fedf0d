"""The PPO family's policy loss in float64 torch, written out: the truth, independent of the loss language.

PPO-clip, DAPO's asymmetric clip, dual clip, INTELLECT-2's delta (TRL), the KL estimators and the aggregations.
"""

from __future__ import annotations

import torch
from torch import Tensor

_KL_CLAMP = 20.0
_LOG_RATIO_CLAMP = 20.0


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    delta: float | None = None,
    log_ratio_clamp: float | None = 20.0,
    aggregation: str = "token-mean",
    normalizer: float | Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    kl: str | None = None,
    kl_coef: float = 0.0,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    weights: Tensor | None = None,
    group_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Scalar loss, per-token loss [B, T] (before aggregation, 0 where masked) and the metrics by name, in float64.

    logprobs, old_logprobs, ref_logprobs, entropy, weights [B, T]; advantages [B] or [B, T]; mask [B, T].
    """
    counted = torch.ones_like(logprobs, dtype=torch.bool) if mask is None else mask != 0

    def clean(x: Tensor | None) -> Tensor:
        """Float64, and 0 where masked, so that a NaN there can leak nowhere."""
        return torch.zeros_like(logprobs, dtype=torch.float64) if x is None else torch.where(counted, x.double(), 0.0)

    lp, old, ref = clean(logprobs), clean(old_logprobs), clean(ref_logprobs)
    adv = clean(advantages.unsqueeze(-1).expand_as(logprobs) if advantages.ndim == 1 else advantages)
    log_ratio = lp - old
    moved = log_ratio.clamp(-_LOG_RATIO_CLAMP, _LOG_RATIO_CLAMP)  # what the metrics speak of, whatever the loss clamps
    if log_ratio_clamp is not None:
        log_ratio = log_ratio.clamp(-log_ratio_clamp, log_ratio_clamp)
    ratio = log_ratio.exp()
    unclipped = -adv * (ratio if delta is None else ratio.clamp(max=delta))
    clipped = -adv * ratio.clamp(1 - clip_low, 1 + clip_high)
    token = torch.where(unclipped >= clipped, unclipped, clipped)
    dual = torch.zeros_like(counted)
    if dual_clip is not None:
        cap = -adv * dual_clip
        dual = (adv < 0) & (token > cap)
        token = torch.where(dual, cap, token)
    if weights is not None:
        token = token * clean(weights)
    gap = (ref - lp).clamp(-_KL_CLAMP, _KL_CLAMP)
    if kl is not None:
        token = token + kl_coef * _kl(kl, gap, ratio)
    if entropy is not None and entropy_coef:
        token = token - entropy_coef * clean(entropy)
    token = torch.where(counted, token, 0.0)
    loss = aggregate(token, counted, aggregation, normalizer, group_ids)

    def mean(x: Tensor) -> Tensor:
        """NaN where nothing counts."""
        return torch.where(counted, x.double(), 0.0).sum() / counted.sum()

    none = torch.full_like(loss, torch.nan)
    metrics = {
        "clip_fraction_low": mean((ratio < 1 - clip_low) & (adv < 0)),
        "clip_fraction_high": mean((ratio > 1 + clip_high) & (adv > 0)),
        **({} if dual_clip is None else {"clip_fraction_dual": mean(dual)}),
        "kl_old_k1": mean(-moved),
        "kl_old_k3": mean(moved.exp() - moved - 1),
        **({} if ref_logprobs is None else {"kl_ref_k1": mean(-gap), "kl_ref_k3": mean(gap.exp() - gap - 1)}),
        "ratio_mean": mean(moved.exp()),
        "ratio_min": torch.where(counted, moved.exp(), torch.inf).amin() if counted.any() else none,
        "ratio_max": torch.where(counted, moved.exp(), -torch.inf).amax() if counted.any() else none,
        **({} if entropy is None else {"entropy_mean": mean(clean(entropy))}),
        "token_count": counted.sum().double(),
    }
    return loss, token, {name: value.detach() for name, value in metrics.items()}


def _kl(kind: str, gap: Tensor, ratio: Tensor) -> Tensor:
    """Estimate of KL(policy || reference) from gap = ref - logprob; "+": its value with k2's gradient."""
    value = {
        "k1": -gap,
        "abs": gap.abs(),
        "k2": gap * gap / 2,
        "k3": gap.exp() - gap - 1,
        "k3-corrected": (gap.exp() - gap - 1) * ratio,
    }[kind.removesuffix("+")]
    squared = gap * gap / 2
    return squared - squared.detach() + value.detach() if kind.endswith("+") else value


def aggregate(
    token: Tensor,
    counted: Tensor,
    aggregation: str,
    normalizer: float | Tensor | None = None,
    group_ids: Tensor | None = None,
) -> Tensor:
    """Scalar loss from token losses [B, T] (0 where masked): the sum over `normalizer`, see fastreward.policy_loss."""
    lengths = counted.sum(-1)
    rows = token.sum(-1)
    sequences = (lengths > 0).sum()
    means = rows / lengths.clamp(min=1)
    if aggregation == "token-mean":
        total, denominator = rows.sum(), lengths.sum()
    elif aggregation == "token-sum":
        total, denominator = rows.sum(), torch.ones_like(sequences)
    elif aggregation == "seq-mean-token-mean":
        total, denominator = means.sum(), sequences
    elif aggregation == "seq-mean-token-sum":
        total, denominator = rows.sum(), sequences
    elif aggregation == "seq-mean-token-sum-norm":
        total, denominator = rows.sum(), sequences * token.shape[-1]
    elif aggregation == "group-mean":
        assert group_ids is not None
        groups = [(group_ids == g) & (lengths > 0) for g in sorted(set(group_ids.tolist()))]
        filled = [means[g].mean() for g in groups if g.any()]
        total, denominator = torch.stack([means.sum() * 0, *filled]).sum(), torch.tensor(len(filled))
    else:
        raise ValueError(f"aggregation: unknown {aggregation!r}")
    return total / (denominator.clamp(min=1) if normalizer is None else normalizer)
