"""Losses that look along the sequence, written out in float64 torch, token by token.

lp, old [B, T], adv [B, T] or [B], mask [B, T]; a loss per token [B, T], 0 where the mask is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .policy import clean, log_ratio, ppo


def fipo(
    lp: Tensor,
    old: Tensor,
    adv: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    gamma: float = 2 ** (-1 / 32),
    weight_low: float = 1.0,
    weight_high: float = 1.2,
    safety: float | None = 4.0,
    delta: float | None = None,
) -> Tensor:
    """FIPO: PPO times the clipped likelihood of what follows; by the quadratic form, over the tokens that count."""
    d, r = log_ratio(mask, lp, old, None).detach(), log_ratio(mask, lp, old, 20.0).exp().detach()
    ahead = d if delta is None else torch.where(r > delta, 0.0, d)
    future = torch.zeros_like(d)
    for row, kept in enumerate(mask != 0):
        places = kept.nonzero().flatten()
        steps = torch.arange(len(places)).unsqueeze(0) - torch.arange(len(places)).unsqueeze(1)
        decay = torch.where(steps >= 0, torch.tensor(gamma, dtype=torch.float64) ** steps.clamp(min=0), 0.0)
        future[row, places] = decay @ ahead[row, places]
    weight = future.exp().clamp(weight_low, weight_high)
    if safety is not None:
        weight = torch.where((clean(mask, adv) < 0) & (r > safety), weight.clamp(0.8, 1.0), weight)
    return weight * ppo(lp, old, adv, mask, clip_low=clip_low, clip_high=clip_high, delta=delta)


def segment_ppo(
    lp: Tensor,
    old: Tensor,
    adv: Tensor,
    mask: Tensor,
    *,
    segment_ids: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    average: bool = True,
    log_ratio_max: float | None = 20.0,
) -> Tensor:
    """PPO on the ratio of the run of equal ids that the token is in; 0 on ids below 0."""
    d = log_ratio(mask, lp, old, None)
    rows = []
    for row, kept in enumerate(mask != 0):
        values = [torch.zeros((), dtype=torch.float64)] * mask.shape[1]
        run: list[int] = []
        for t in kept.nonzero().flatten().tolist():
            if run and segment_ids[row, t] != segment_ids[row, run[-1]]:
                run = []
            run = [*run, t]
            total = torch.stack([d[row, s] for s in run]).sum() / (len(run) if average else 1)
            for s in run:
                values[s] = total
        rows.append(torch.stack(values))
    log_s = torch.stack(rows)
    ratio = (log_s if log_ratio_max is None else log_s.clamp(max=log_ratio_max)).exp()
    a = clean(mask, adv)
    loss = torch.maximum(-a * ratio, -a * ratio.clamp(1 - clip_low, 1 + clip_high))
    return torch.where((mask != 0) & (clean(mask, segment_ids) >= 0), loss, 0.0)


def m2po(
    lp: Tensor,
    old: Tensor,
    adv: Tensor,
    mask: Tensor,
    *,
    tau: float = 0.04,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Tensor:
    """PPO without the tokens of the largest squared log-ratio, which are dropped one value after the other."""
    moment = log_ratio(mask, lp, old).detach() ** 2
    values = sorted(moment[mask != 0].tolist())
    while values and sum(values) / len(values) >= tau and values[0] < values[-1]:
        values = [v for v in values if v < values[-1]]
    kept = moment <= (values[-1] if values else 0.0)
    return torch.where(kept, ppo(lp, old, adv, mask, clip_low=clip_low, clip_high=clip_high), 0.0)
