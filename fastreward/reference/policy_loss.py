"""The PPO family's policy loss in float64 torch: the truth. Formulas: PPO-clip, DAPO's asymmetric clip, dual clip,
INTELLECT-2's delta (TRL), KL estimators k1, k2, k3 and the four aggregations."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

_KL_CLAMP = 20.0


class _Options(Protocol):
    """What this file reads of fastreward's PolicyOptions (the reference imports nothing but torch)."""

    @property
    def clip_low(self) -> float: ...
    @property
    def clip_high(self) -> float: ...
    @property
    def dual_clip(self) -> float | None: ...
    @property
    def delta(self) -> float | None: ...
    @property
    def log_ratio_clamp(self) -> float | None: ...
    @property
    def aggregation(self) -> str: ...
    @property
    def kl(self) -> str | None: ...
    @property
    def kl_coef(self) -> float: ...
    @property
    def entropy_coef(self) -> float: ...


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
        token = token + kl_coef * {"k1": -gap, "k2": gap * gap / 2, "k3": gap.exp() - gap - 1}[kl]
    if entropy is not None and entropy_coef:
        token = token - entropy_coef * clean(entropy)
    token = torch.where(counted, token, 0.0)
    loss = aggregate(token, counted, aggregation, normalizer)

    count = counted.sum().clamp(min=1)

    def mean(x: Tensor) -> Tensor:
        return torch.where(counted, x.double(), 0.0).sum() / count

    has_ref = ref_logprobs is not None
    none = loss.new_zeros(())
    metrics = {
        "clip_fraction_low": mean((ratio < 1 - clip_low) & (adv < 0)),
        "clip_fraction_high": mean((ratio > 1 + clip_high) & (adv > 0)),
        "clip_fraction_dual": mean(dual),
        "kl_old_k1": mean(-log_ratio),
        "kl_old_k3": mean(ratio - log_ratio - 1),
        "kl_ref_k1": mean(-gap) if has_ref else none,
        "kl_ref_k3": mean(gap.exp() - gap - 1) if has_ref else none,
        "ratio_mean": mean(ratio),
        "ratio_min": torch.where(counted, ratio, torch.inf).amin() if counted.any() else none,
        "ratio_max": torch.where(counted, ratio, -torch.inf).amax() if counted.any() else none,
        "entropy_mean": mean(clean(entropy)),
        "token_count": counted.sum().double(),
    }
    return loss, token, {name: value.detach() for name, value in metrics.items()}


def aggregate(token: Tensor, counted: Tensor, aggregation: str, normalizer: float | Tensor | None = None) -> Tensor:
    """Scalar loss from token losses [B, T] (0 where masked): the sum over `normalizer`, see fastreward.policy_loss."""
    lengths = counted.sum(-1)
    rows = token.sum(-1)
    sequences = (lengths > 0).sum()
    if aggregation == "token-mean":
        total, denominator = rows.sum(), lengths.sum()
    elif aggregation == "seq-mean-token-mean":
        total, denominator = (rows / lengths.clamp(min=1)).sum(), sequences
    elif aggregation == "seq-mean-token-sum":
        total, denominator = rows.sum(), sequences
    elif aggregation == "seq-mean-token-sum-norm":
        total, denominator = rows.sum(), sequences * token.shape[-1]
    else:
        raise ValueError(f"aggregation: unknown {aggregation!r}")
    return total / (denominator.clamp(min=1) if normalizer is None else normalizer)


def forward(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    ref_logprobs: Tensor | None,
    entropy: Tensor | None,
    weights: Tensor | None,
    cu_seqlens: Tensor | None,
    options: _Options,
    want_token_loss: bool,
    normalizer: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Raw form: (loss [], metrics [12], gradient for logprobs [B, T], row weight [B], token loss [B, T] or [0])."""
    rows = _Rows(logprobs, cu_seqlens)
    counted = rows.padded(torch.ones_like(logprobs, dtype=torch.bool) if mask is None else mask != 0)
    lp, old = rows.padded(logprobs), rows.padded(old_logprobs)
    adv = rows.padded(advantages) if advantages.shape == logprobs.shape else advantages
    ref = None if ref_logprobs is None else rows.padded(ref_logprobs)
    factor = None if weights is None else rows.padded(weights)
    loss, token, metrics = policy_loss(
        lp,
        old,
        adv,
        counted,
        clip_low=options.clip_low,
        clip_high=options.clip_high,
        dual_clip=options.dual_clip,
        delta=options.delta,
        log_ratio_clamp=options.log_ratio_clamp,
        aggregation=options.aggregation,
        normalizer=normalizer,
        ref_logprobs=ref,
        kl=options.kl,
        kl_coef=options.kl_coef,
        entropy=None if entropy is None else rows.padded(entropy),
        entropy_coef=options.entropy_coef,
        weights=factor,
    )
    weight = _row_weight(counted, options.aggregation, normalizer)
    grad = torch.where(counted, _derivative(lp, old, adv, ref, factor, options) * weight.unsqueeze(-1), 0.0)
    return (
        loss.float(),
        torch.stack(list(metrics.values())).float(),
        rows.flat(grad).float(),
        weight.float(),
        rows.flat(token).float() if want_token_loss else logprobs.new_zeros(0),
    )


def _derivative(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    ref_logprobs: Tensor | None,
    weights: Tensor | None,
    options: _Options,
) -> Tensor:
    """Derivative of the token loss for its log-prob [B, T], written out (autograd does not run inside a custom op)."""
    adv = (advantages.unsqueeze(-1) if advantages.ndim == 1 else advantages).double()
    log_ratio = logprobs.double() - old_logprobs.double()
    live = torch.ones_like(logprobs, dtype=torch.bool)
    if options.log_ratio_clamp is not None:
        live = log_ratio.abs() <= options.log_ratio_clamp
        log_ratio = log_ratio.clamp(-options.log_ratio_clamp, options.log_ratio_clamp)
    ratio = log_ratio.exp()
    unclipped = -adv * (ratio if options.delta is None else ratio.clamp(max=options.delta))
    clipped = -adv * ratio.clamp(1 - options.clip_low, 1 + options.clip_high)
    in_range = (ratio >= 1 - options.clip_low) & (ratio <= 1 + options.clip_high)
    below_delta = torch.ones_like(in_range) if options.delta is None else ratio <= options.delta
    live = live & torch.where(unclipped >= clipped, below_delta, in_range)
    if options.dual_clip is not None:
        live = live & ~((adv < 0) & (torch.maximum(unclipped, clipped) > -adv * options.dual_clip))
    grad = torch.where(live, -adv * ratio, 0.0)
    if weights is not None:
        grad = grad * weights.double()
    if options.kl is not None and ref_logprobs is not None:
        gap = ref_logprobs.double() - logprobs.double()
        slope = {"k1": torch.ones_like(gap), "k2": -gap, "k3": 1 - gap.exp()}[options.kl]
        grad = grad + options.kl_coef * torch.where(gap.abs() <= _KL_CLAMP, slope, 0.0)
    return grad


def _row_weight(counted: Tensor, aggregation: str, normalizer: Tensor | None) -> Tensor:
    """What aggregation multiplies a token loss of row b by, [B]."""
    lengths = counted.sum(-1).double()
    sequences = (lengths > 0).sum().double()
    denominator = {
        "token-mean": lengths.sum(),
        "seq-mean-token-mean": sequences,
        "seq-mean-token-sum": sequences,
        "seq-mean-token-sum-norm": sequences * counted.shape[-1],
    }[aggregation].clamp(min=1)
    each = torch.ones_like(lengths) / (denominator if normalizer is None else normalizer.double())
    return each / lengths.clamp(min=1) if aggregation == "seq-mean-token-mean" else each


def backward(
    saved: Tensor,
    mask: Tensor | None,
    row_weight: Tensor,
    grad_loss: Tensor,
    cu_seqlens: Tensor | None,
    options: _Options,
) -> tuple[Tensor, Tensor]:
    """Gradients for logprobs and entropy ([0] without an entropy bonus), in the shape of `saved`."""
    grad_entropy = saved.new_zeros(0)
    if options.entropy_coef:
        rows = _Rows(saved, cu_seqlens)
        counted = torch.ones_like(saved) if mask is None else (mask != 0).float()
        grad_entropy = rows.flat(rows.padded(counted) * row_weight.unsqueeze(-1)) * (-options.entropy_coef * grad_loss)
    return saved * grad_loss, grad_entropy


class _Rows:
    """Packed [N] to padded [B, T] and back; padded tensors pass through."""

    def __init__(self, like: Tensor, cu_seqlens: Tensor | None) -> None:
        self.packed = cu_seqlens is not None
        if cu_seqlens is not None:
            lengths = cu_seqlens.diff()
            width = int(lengths.max()) if len(lengths) else 0
            self.inside = torch.arange(width, device=like.device) < lengths.unsqueeze(-1)

    def padded(self, x: Tensor) -> Tensor:
        if not self.packed:
            return x
        return x.new_zeros(self.inside.shape).masked_scatter(self.inside, x)

    def flat(self, x: Tensor) -> Tensor:
        return x[self.inside] if self.packed else x
