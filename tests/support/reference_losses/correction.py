"""Rollout correction written out in float64 torch, apart from the loss language: verl 0.9.1's rollout_corr_helper.py,
TRL 1.16's vLLM importance sampling (grpo_trainer.py) and DeepSeek-V3.2's off-policy sequence mask.

Tensors are [B, T]; log-ratio = old_logprob - rollout_logprob, of trainer over inference engine. What the mask leaves
out counts nowhere. The mean of an empty row is 0 and counts in verl's means over rows, as it does there (its counts are
n + 1e-8, which in float32 is n for every n > 0).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

CLAMP = 20.0  # verl's SAFETY_BOUND on log-ratios
LEVELS = ("token", "sequence", "geometric")
MODES = ("truncate", "mask", "icepop")
REJECTIONS = (
    *(f"{place}_k{k}" for place in ("token", "seq_sum", "seq_mean") for k in (1, 2, 3)),
    "seq_max_k2",
    "seq_max_k3",
)


# ---------------------------------------------------------------------------------------------------------- reductions
def clean(x: Tensor, mask: Tensor) -> Tensor:
    """Float64, and 0 where masked out."""
    return torch.where(mask != 0, x.double(), 0.0)


def count(mask: Tensor) -> Tensor:
    return (mask != 0).sum(-1).double()


def seq_mean(x: Tensor, mask: Tensor) -> Tensor:
    """[B]; 0 for an empty row."""
    return clean(x, mask).sum(-1) / count(mask).clamp(min=1)


def token_mean(x: Tensor, mask: Tensor) -> Tensor:
    return clean(x, mask).sum() / count(mask).sum().clamp(min=1)


def token_deviation(x: Tensor, mask: Tensor) -> Tensor:
    """Standard deviation over tokens, ddof 0."""
    return token_mean((x - token_mean(x, mask)) ** 2, mask).sqrt()


def clamped(x: Tensor, bound: float | None) -> Tensor:
    return x if bound is None else x.clamp(-bound, bound)


def log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf


def deviation(x: Tensor) -> Tensor:
    """Standard deviation, ddof 1, of a vector; 0 for a single value."""
    return x.std() if x.numel() > 1 else x.new_zeros(())


# ------------------------------------------------------------------------------------------------------------- weights
def level_log_ratio(old: Tensor, rollout: Tensor, mask: Tensor, level: str) -> Tensor:
    """Unclamped log-ratio: [B, T] for token, else [B, 1] (its sum, or its mean for geometric)."""
    log_ratio = clean(old, mask) - clean(rollout, mask)
    if level == "token":
        return log_ratio
    total = log_ratio.sum(-1, keepdim=True)
    return total if level == "sequence" else total / count(mask).clamp(min=1).unsqueeze(-1)


def raw_weights(old: Tensor, rollout: Tensor, mask: Tensor, level: str, clamp: float | None = CLAMP) -> Tensor:
    """exp(log-ratio) before any bound, [B, T], 0 where masked out."""
    log_ratio = clamped(level_log_ratio(old, rollout, mask, level), clamp)
    return clean(torch.exp(log_ratio).expand(mask.shape), mask)


def bounded_weights(
    raw: Tensor, mask: Tensor, mode: str, low: float | None, high: float | None
) -> tuple[Tensor, Tensor]:
    """(weights, inside): truncate moves a weight to the nearer bound, mask and icepop make it 0 outside of them."""
    inside = (raw >= (-math.inf if low is None else low)) & (raw <= (math.inf if high is None else high)) & (mask != 0)
    if mode == "truncate":
        return clean(raw.clamp(low, high) if low is not None or high is not None else raw, mask), inside
    return torch.where(inside, raw, 0.0), inside


def batch_norm_factor(weights: Tensor, mask: Tensor, level: str) -> Tensor:
    """verl's: mean weight over tokens, or over the non-empty sequences; 1 where that is (nearly) 0."""
    if level == "token":
        mean = token_mean(weights, mask)
    else:
        full = (count(mask) > 0).double()
        mean = (seq_mean(weights, mask) * full).sum() / full.sum().clamp(min=1)
    return torch.where(mean > 1e-8, mean, 1.0)


# ----------------------------------------------------------------------------------------------------------- rejection
def token_divergence(old: Tensor, rollout: Tensor, mask: Tensor, kind: str) -> Tensor:
    """k1 = -l, k2 = l^2 / 2, k3 = exp(l) - 1 - l of the clamped log-ratio l, [B, T]."""
    l = clamped(clean(old, mask) - clean(rollout, mask), CLAMP)  # noqa: E741
    return {"k1": -l, "k2": l * l / 2, "k3": torch.exp(l) - 1 - l}[kind]


def rejection_statistic(old: Tensor, rollout: Tensor, mask: Tensor, option: str) -> Tensor:
    """[B, T] for token options, [B] for the others."""
    place, kind = option.rsplit("_", 1)
    token = token_divergence(old, rollout, mask, kind)
    if place == "token":
        return token
    if place == "seq_sum":
        return clean(token, mask).sum(-1)
    if place == "seq_mean":
        return seq_mean(token, mask)
    top = torch.where(mask != 0, token, -torch.inf).amax(-1)
    return torch.where(top == -torch.inf, 0.0, top)


def rejection_bounds(option: str, threshold: float | tuple[float, float]) -> tuple[float, float]:
    """(low, high) of the statistic: k1's thresholds are ratios, compared as logs; one number is (1/x, x) there."""
    if option.endswith("k1"):
        low, high = (1 / threshold, threshold) if isinstance(threshold, int | float) else threshold
        return math.log(low), math.log(high)
    assert isinstance(threshold, int | float)
    return -math.inf, float(threshold)


def rejection_keep(
    old: Tensor, rollout: Tensor, mask: Tensor, option: str, threshold: float | tuple[float, float]
) -> Tensor:
    """Bool [B, T]: what the option lets through (masked-out places say nothing)."""
    statistic = rejection_statistic(old, rollout, mask, option)
    low, high = rejection_bounds(option, threshold)
    keep = (statistic >= low) & (statistic <= high)
    return keep if keep.ndim == 2 else keep.unsqueeze(-1).expand(mask.shape)


# ------------------------------------------------------------------------------------------------------------- metrics
def importance_metrics(
    weights: Tensor,
    raw: Tensor,
    log_ratio: Tensor,
    mask: Tensor,
    level: str,
    low: float | None,
    high: float,
) -> dict[str, Tensor]:
    """verl's compute_is_metrics: weights are the bounded ones, log_ratio the unclamped one of the level."""
    below = 1 / high if low is None else low
    inside = mask != 0
    metrics: dict[str, Tensor] = {"rollout_is_mean": token_mean(weights, mask)}
    if level == "token":
        metrics["rollout_is_max"] = torch.where(inside, weights, -torch.inf).amax()
        metrics["rollout_is_min"] = torch.where(inside, weights, torch.inf).amin()
        metrics["rollout_is_ratio_fraction_high"] = token_mean((raw > high).double(), mask)
        metrics["rollout_is_ratio_fraction_low"] = token_mean((raw < below).double(), mask)
    else:
        metrics["rollout_is_max"] = torch.exp(log_ratio.max().clamp(max=CLAMP))
        metrics["rollout_is_min"] = torch.exp(log_ratio.min())
        metrics["rollout_is_ratio_fraction_high"] = (log_ratio > math.log(high)).double().mean()
        metrics["rollout_is_ratio_fraction_low"] = (log_ratio < log(below)).double().mean()
    bounded = weights.clamp(0, high)
    mean = token_mean(bounded, mask)
    metrics["rollout_is_std"] = token_deviation(bounded, mask)
    metrics["rollout_is_eff_sample_size"] = 1 / token_mean((bounded / (mean + 1e-8)) ** 2, mask)
    per_row, raw_per_row = seq_mean(weights, mask), seq_mean(raw, mask)
    metrics["rollout_is_seq_mean"] = per_row.mean()
    metrics["rollout_is_seq_std"] = deviation(per_row)
    metrics["rollout_is_seq_max"] = per_row.max()
    metrics["rollout_is_seq_min"] = per_row.min()
    metrics["rollout_is_seq_max_deviation"] = (per_row - 1).abs().max()
    metrics["rollout_is_seq_fraction_high"] = (raw_per_row > high).double().mean()
    metrics["rollout_is_seq_fraction_low"] = (raw_per_row < below).double().mean()
    return metrics


def rejection_metrics(
    old: Tensor, rollout: Tensor, mask: Tensor, option: str, threshold: float | tuple[float, float]
) -> dict[str, Tensor]:
    """verl's compute_rs_metrics and the two masked fractions, of one option."""
    statistic = rejection_statistic(old, rollout, mask, option)
    low, high = rejection_bounds(option, threshold)
    has_low = option.endswith("k1")
    per_token = statistic if statistic.ndim == 2 else statistic.unsqueeze(-1).expand(mask.shape)
    per_row = (seq_mean(statistic, mask) if statistic.ndim == 2 else statistic)[count(mask) > 0]
    inside, none = mask != 0, torch.zeros(())
    if statistic.ndim == 2:
        top = torch.where(inside, per_token, -torch.inf).amax()
        bottom = torch.where(inside, per_token, torch.inf).amin()
        fraction_high = token_mean((per_token > high).double(), mask)
        fraction_low = token_mean((per_token < low).double(), mask)
    else:
        top, bottom = per_row.max(), per_row.min()
        fraction_high, fraction_low = (per_row > high).double().mean(), (per_row < low).double().mean()
    bounded = per_token.clamp(low if has_low else 0.0, high)
    keep = rejection_keep(old, rollout, mask, option, threshold)
    row_rejected = (~keep & inside).any(-1)[count(mask) > 0]
    values = {
        "mean": token_mean(per_token, mask),
        "max": top,
        "min": bottom,
        "fraction_high": fraction_high,
        "fraction_low": fraction_low if has_low else none,
        "std": token_deviation(bounded, mask),
        "seq_mean": per_row.mean(),
        "seq_std": deviation(per_row),
        "seq_max": per_row.max(),
        "seq_min": per_row.min(),
        "seq_max_deviation": per_row.abs().max(),
        "seq_fraction_high": (per_row > high).double().mean(),
        "masked_fraction": token_mean((~keep).double(), mask),
        "seq_masked_fraction": row_rejected.double().mean(),
    }
    if has_low:
        values["seq_fraction_low"] = (per_row < low).double().mean()
    return {f"rollout_rs_{option}_{name}": value for name, value in values.items()}


def off_policy_metrics(old: Tensor, rollout: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """verl's compute_offpolicy_metrics: perplexities, KL estimates, chi-squared divergences."""
    train, roll = seq_mean(old, mask), seq_mean(rollout, mask)
    log_ratio = clean(old, mask) - clean(rollout, mask)
    gap = roll - train
    return {
        "training_ppl": torch.exp(-train).mean(),
        "training_log_ppl": (-train).mean(),
        "kl": token_mean(-log_ratio, mask),
        "k3_kl": token_mean(torch.exp(log_ratio) - log_ratio - 1, mask),
        "rollout_ppl": torch.exp(-roll).mean(),
        "rollout_log_ppl": (-roll).mean(),
        "log_ppl_diff": gap.mean(),
        "log_ppl_abs_diff": gap.abs().mean(),
        "log_ppl_diff_max": gap.max(),
        "log_ppl_diff_min": gap.min(),
        "ppl_ratio": torch.exp(gap).mean(),
        "chi2_token": token_mean(torch.exp(clamped(log_ratio, CLAMP)) ** 2, mask) - 1,
        "chi2_seq": torch.exp(2 * clamped(log_ratio.sum(-1), CLAMP)).mean() - 1,
    }


# ------------------------------------------------------------------------------------------------------------ together
def correction_weights(
    old: Tensor,
    rollout: Tensor,
    mask: Tensor,
    *,
    mode: str | None = "truncate",
    level: str = "token",
    low: float | None = None,
    high: float | None = 2.0,
    log_ratio_clamp: float | None = CLAMP,
    reject: dict[str, float | tuple[float, float]] | None = None,
    batch_normalize: bool = False,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(weights [B, T], keep bool [B, T], metrics by verl's names without its "rollout_corr/").

    `keep` is False where masked out, where `mode="mask"` finds the weight outside its bounds, and where a rejection
    option says so; icepop's zero weights stay counted. mode None: ones, and no metrics of weights.
    """
    reject = reject or {}
    keep = mask != 0
    metrics: dict[str, Tensor] = {}
    weights = keep.double()
    if mode is not None:
        raw = raw_weights(old, rollout, mask, level, log_ratio_clamp)
        weights, inside = bounded_weights(raw, mask, mode, low, high)
        log_ratio = level_log_ratio(old, rollout, mask, level)
        metrics |= importance_metrics(weights, raw, log_ratio, mask, level, low, math.inf if high is None else high)
    if mode in ("mask", "icepop"):
        metrics["rollout_is_oob_ratio"] = token_mean((~inside).double(), mask)
    if batch_normalize:
        metrics["rollout_is_batch_norm_factor"] = batch_norm_factor(weights, mask, level)
        weights = weights / metrics["rollout_is_batch_norm_factor"]
    if mode == "mask":
        keep = keep & inside
    passed = torch.ones_like(keep)
    for option, threshold in reject.items():
        metrics |= rejection_metrics(old, rollout, mask, option, threshold)
        passed = passed & rejection_keep(old, rollout, mask, option, threshold)
    if reject:
        metrics["rollout_rs_masked_fraction"] = token_mean((~passed).double(), mask)
        metrics["rollout_rs_seq_masked_fraction"] = (~passed & (mask != 0)).any(-1).double().mean()
    metrics |= off_policy_metrics(old, rollout, mask)
    return weights, keep & passed, metrics


# ----------------------------------------------------------------------------------------------------------------- TRL
def trl_importance_ratio(
    old: Tensor, rollout: Tensor, mask: Tensor, mode: str, low: float | None, high: float | None
) -> Tensor:
    """TRL's `vllm_importance_sampling_mode`: [B, T] for token_*, [B, 1] for sequence_*; 1 where masked out. A NaN
    rollout log-prob (a token vLLM could not score) has log-ratio 0; nothing is clamped."""
    level, action = mode.split("_")
    log_ratio = clean(torch.nan_to_num(old.double() - rollout.double(), nan=0.0), mask)
    ratio = torch.exp(log_ratio.sum(-1, keepdim=True) if level == "sequence" else log_ratio)
    if action == "truncate":
        return ratio.clamp(low, high)
    outside = (ratio < (-math.inf if low is None else low)) | (ratio > (math.inf if high is None else high))
    return torch.where(outside, 0.0, ratio)


def off_policy_sequence_mask(
    logprobs: Tensor, rollout: Tensor, advantages: Tensor, mask: Tensor, *, threshold: float
) -> Tensor:
    """DeepSeek-V3.2's: bool [B], keep where A >= 0 or the mean of (rollout - current) log-prob is <= threshold.
    A NaN rollout log-prob is no evidence: its difference counts as 0."""
    gap = clean(torch.nan_to_num(rollout.double() - logprobs.detach().double(), nan=0.0), mask)
    return (advantages >= 0) | (gap.sum(-1) / count(mask).clamp(min=1) <= threshold)
