"""Policy losses of 2024 and 2025 that came later, written out in float64 torch, as those of policy.py are."""

from __future__ import annotations

import torch
from torch import Tensor

from .policy import clean, clipped, count, log_ratio, members, ppo, seq_mean, seq_sum


def dft(lp: Tensor, old: Tensor, adv: Tensor, mask: Tensor) -> Tensor:
    """-sg(p) lp."""
    x = clean(mask, lp)
    return -x.exp().detach() * x


def topr(lp: Tensor, old: Tensor, adv: Tensor, mask: Tensor) -> Tensor:
    """-A lp for A > 0, else -sg(min(r, 1)) A lp."""
    a, r = clean(mask, adv), log_ratio(mask, lp, old, 20.0).exp().detach()
    return -torch.where(a > 0, 1.0, r.clamp(max=1.0)) * a * clean(mask, lp)


def vapo(
    lp: Tensor,
    old: Tensor,
    adv: Tensor,
    mask: Tensor,
    *,
    reward: Tensor,
    nll_coef: float = 0.1,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
) -> Tensor:
    """PPO, and nll_coef times -lp on right answers' tokens, so scaled that a mean over all is a mean over these."""
    right = (reward > 0).unsqueeze(-1) & (mask != 0)
    scale = (mask != 0).sum().double() / right.sum().clamp(min=1)
    nll = torch.where(right, -clean(mask, lp), 0.0) * scale
    return ppo(lp, old, adv, mask, clip_low=clip_low, clip_high=clip_high) + nll_coef * nll


def echo(
    lp: Tensor,
    old: Tensor,
    adv: Tensor,
    mask: Tensor,
    *,
    selected: Tensor,
    alpha: float,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Tensor:
    """PPO on the policy's tokens, -alpha lp on a tool's (selected)."""
    own = ppo(lp, old, adv, mask, clip_low=clip_low, clip_high=clip_high)
    return torch.where(selected != 0, -alpha * clean(mask, lp), own)


def loglinear_ppo(
    lp: Tensor,
    old: Tensor,
    adv: Tensor,
    mask: Tensor,
    *,
    importance: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Tensor:
    """sg(pi_prox / pi_old) PPO(pi / pi_prox), log pi_prox = (1 - a) log pi_old + a log pi, a constant."""
    x, y, a = clean(mask, lp), clean(mask, old), clean(mask, importance)
    prox = ((1 - a) * y + a * x).detach()
    weight, ratio = ((z).clamp(-20.0, 20.0).exp() for z in (prox - y, x - prox))
    return weight * clipped(ratio, clean(mask, adv), clip_low, clip_high)


def a2po(lp: Tensor, old: Tensor, adv: Tensor, mask: Tensor, *, ref: Tensor, beta: float = 1e-3) -> Tensor:
    """(beta sum (lp - ref) - A)^2, [B]."""
    return (beta * seq_sum(mask, clean(mask, lp) - clean(mask, ref)) - seq_mean(mask, adv)) ** 2


def gvpo(lp: Tensor, old: Tensor, adv: Tensor, mask: Tensor, *, groups: Tensor, beta: float = 0.1) -> Tensor:
    """(beta (sum d - mean of it over the group) - A)^2 / 2, [B]."""
    total, a = seq_sum(mask, log_ratio(mask, lp, old)), seq_mean(mask, adv)
    out = torch.zeros_like(total)
    for rows in members(mask, groups):
        own = beta * (total[rows] - total[rows].mean()) - a[rows]
        out = out.index_put((rows,), 0.5 * own**2)
    assert not out[count(mask) == 0].any()
    return out


def kto(
    lp: Tensor,
    old: Tensor,
    adv: Tensor,
    mask: Tensor,
    *,
    ref: Tensor,
    beta: float = 0.1,
    reference_point: float = 0.0,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """w (1 - sigmoid(+-beta (sum (lp - ref) - z))), + for A > 0, [B]."""
    s = seq_sum(mask, clean(mask, lp) - clean(mask, ref))
    good = desirable_weight * (1 - torch.sigmoid(beta * (s - reference_point)))
    bad = undesirable_weight * (1 - torch.sigmoid(beta * (reference_point - s)))
    return torch.where(seq_mean(mask, adv) > 0, good, bad)
