"""Policy losses of 2024 and 2025 that came later, written out in float64 torch, as those of policy.py are."""

from __future__ import annotations

import torch
from torch import Tensor

from .policy import clean, clipped, count, log_ratio, members, ppo, seq_mean, seq_sum


def cfpo(lp: Tensor, old: Tensor, adv: Tensor, mask: Tensor, *, epsilon: float = 0.2) -> Tensor:
    """-(r A - |A| (r - 1)^2 / (2 epsilon))."""
    r, a = log_ratio(mask, lp, old, 20.0).exp(), clean(mask, adv)
    return -(r * a - a.abs() / (2 * epsilon) * (r - 1).square())


def kpop(lp: Tensor, old: Tensor, adv: Tensor, mask: Tensor, *, threshold: float = 0.1) -> Tensor:
    """-A r, 0 where the KL of the token's Bernoulli distributions is above the threshold in either direction."""
    p, q = (clean(mask, x).detach().exp().clamp(1e-6, 1 - 1e-6) for x in (lp, old))

    def kl(x: Tensor, y: Tensor) -> Tensor:
        return x * (x / y).log() + (1 - x) * ((1 - x) / (1 - y)).log()

    kept = (kl(p, q) <= threshold) & (kl(q, p) <= threshold)
    return torch.where(kept, -clean(mask, adv) * log_ratio(mask, lp, old, 20.0).exp(), 0.0)


def bapo(
    lp: Tensor,
    old: Tensor,
    adv: Tensor,
    mask: Tensor,
    *,
    target: float = 1.0,
    lows: tuple[float, float, float] = (0.6, 0.8, 0.05),
    highs: tuple[float, float, float] = (1.2, 2.0, 0.05),
    dual_clip: float = 3.0,
) -> Tensor:
    """The authors' search, step by step, for the ratio's bounds (start, end, step); then PPO-clip with dual clip."""
    r, a = log_ratio(mask, lp, old, 20.0).exp(), clean(mask, adv)
    (low, low_end, low_step), (high, high_end, high_step) = lows, highs

    def unbalanced() -> bool:
        effective = (torch.where(a >= 0, r.clamp(max=high), r.clamp(min=low)) * a).detach()
        good, bad = effective.clamp(min=0).sum(), -effective.clamp(max=0).sum()
        return bool(bad > 0) and bool(good / bad < target)

    while unbalanced() and low < low_end:
        low = min(low + low_step, low_end)
    while unbalanced() and high < high_end:
        high = min(high + high_step, high_end)
    value = torch.maximum(-a * r, -a * r.clamp(low, high))
    return torch.where(a < 0, torch.minimum(value, -a * dual_clip), value)


def flowrl(
    lp: Tensor,
    old: Tensor,
    adv: Tensor,
    mask: Tensor,
    *,
    log_z: Tensor,
    ref: Tensor,
    beta: float = 15.0,
    bounds: tuple[float, float] = (0.0, 10.0),
) -> Tensor:
    """w (log Z + mean lp - beta mean A - mean ref)^2, w = sg(product of the ratios within bounds), [B]."""
    weight = seq_sum(mask, log_ratio(mask, lp, old)).exp().clamp(*bounds).detach()
    gap = log_z.double() + seq_mean(mask, lp) - beta * seq_mean(mask, adv) - seq_mean(mask, ref)
    return weight * gap.square()


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
