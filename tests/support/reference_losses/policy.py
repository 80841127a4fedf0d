"""Policy losses written out in float64 torch, apart from the loss language: slow, obvious, differentiable.

Token losses take lp, old, adv and mask [B, T] and give the loss of each token [B, T], before mask and aggregation;
sequence losses give [B]; group losses also take groups, integers [B], and give every row the loss of its group, so
that a mean over rows is the mean over groups of one size. What a mask leaves out (NaN included) counts nowhere, and a
row without a valid token belongs to no group. lp alone carries a gradient.

Notation: d = lp - old, r = exp(d), A = adv, L = a row's valid tokens, sg = stop-gradient. Every ratio is made from d
clamped to +-log_ratio_clamp, gradient 0 outside (None: not clamped). Formulas: those of the papers and code that the
losses' docstrings name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, softplus


# ------------------------------------------------------------------------------------------------------------- helpers
def clean(mask: Tensor, x: Tensor) -> Tensor:
    """Float64, and 0 where masked out; x is [B, T] or, one value per row, [B]."""
    x = x.double() if x.dim() == mask.dim() else x.double().unsqueeze(-1).expand(mask.shape)
    return torch.where(mask != 0, x, 0.0)


def count(mask: Tensor) -> Tensor:
    """L, [B] float64."""
    return (mask != 0).sum(-1).double()


def seq_sum(mask: Tensor, x: Tensor) -> Tensor:
    return clean(mask, x).sum(-1)


def seq_mean(mask: Tensor, x: Tensor) -> Tensor:
    """[B]; 0 for an empty row."""
    return seq_sum(mask, x) / count(mask).clamp(min=1)


def choose(condition: Tensor, x: float, y: float) -> Tensor:
    """torch.where on two numbers would give float32."""
    return torch.where(condition, torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64))


def log_ratio(mask: Tensor, lp: Tensor, old: Tensor, clamp: float | None = None) -> Tensor:
    d = clean(mask, lp) - clean(mask, old)
    return d if clamp is None else d.clamp(-clamp, clamp)


def members(mask: Tensor, groups: Tensor) -> Iterator[Tensor]:
    """The rows of each group, without the rows that are empty."""
    for group in groups.unique():
        rows = torch.nonzero((groups == group) & (count(mask) > 0)).flatten()
        if len(rows):
            yield rows


# ------------------------------------------------------------------------------------------------ PPO and its variants
def clipped(r: Tensor, adv: Tensor, clip_low: float, clip_high: float, delta: float | None = None) -> Tensor:
    """max(-A min(r, delta), -A clip(r))."""
    whole = r if delta is None else r.clamp(max=delta)
    return torch.maximum(-adv * whole, -adv * r.clamp(1 - clip_low, 1 + clip_high))


def ppo(
    lp: Tensor,
    old: Tensor,
    adv: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    delta: float | None = None,
    log_ratio_clamp: float | None = 20.0,
) -> Tensor:
    """PPO's clip, with the dual clip and an upper bound of the ratio."""
    a = clean(mask, adv)
    loss = clipped(log_ratio(mask, lp, old, log_ratio_clamp).exp(), a, clip_low, clip_high, delta)
    return loss if dual_clip is None else torch.where(a < 0, torch.minimum(loss, -a * dual_clip), loss)


def psr(lp: Tensor, old: Tensor, adv: Tensor, mask: Tensor, **clip: float) -> Tensor:
    """A = R for rewards R in {0, 1}: learns from right answers alone."""
    return ppo(lp, old, clean(mask, adv), mask, **clip)


def nsr(lp: Tensor, old: Tensor, adv: Tensor, mask: Tensor, **clip: float) -> Tensor:
    """A = R - 1: learns from wrong answers alone."""
    return ppo(lp, old, clean(mask, adv) - 1, mask, **clip)


def w_reinforce(
    lp: Tensor, old: Tensor, adv: Tensor, mask: Tensor, *, positive_weight: float = 0.1, **clip: float
) -> Tensor:
    """A = positive_weight R for right answers, -1 for wrong ones."""
    rewards = clean(mask, adv)
    return ppo(lp, old, torch.where(rewards > 0, positive_weight * rewards, -1.0), mask, **clip)


def stable_reinforce(
    lp: Tensor,
    old: Tensor,
    adv: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    pre_clip: float = 1000.0,
    advantage_filter: str | None = "paper",
) -> Tensor:
    """The ratio held in [1 / pre_clip, pre_clip] before PPO's clip; advantages whitened and outliers zeroed."""
    a = clean(mask, adv)
    if advantage_filter is not None:
        m = (mask != 0).double()
        mean = a.sum() / m.sum().clamp(min=1)
        variance = ((a - mean).square() * m).sum() / m.sum().clamp(min=1)
        z = (a - mean) * variance.clamp(min=1e-8).rsqrt() + 1e-8
        # The released code compares the whitened value with the raw mean +- 3, the paper with +- 3.
        middle = mean if advantage_filter == "code" else 0.0
        a = torch.where(((z - middle).abs() > 3) | (z.abs() > 10), 0.0, z)
    bound = math.log(pre_clip)
    return clipped(log_ratio(mask, lp, old).clamp(-bound, bound).exp(), a, clip_low, clip_high)


def visurf(
    lp: Tensor,
    old: Tensor,
    adv: Tensor,
    mask: Tensor,
    *,
    expert: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    log_ratio_clamp: float | None = 20.0,
) -> Tensor:
    """PPO where the rows of `expert` [B] have no behaviour policy: old := sg(lp), so gradient -A."""
    lp = clean(mask, lp)
    base = torch.where(expert.bool().unsqueeze(-1), lp.detach(), clean(mask, old))
    return ppo(lp, base, adv, mask, clip_low=clip_low, clip_high=clip_high, log_ratio_clamp=log_ratio_clamp)


def tw_grpo(
    lp: Tensor,
    old: Tensor,
    adv: Tensor,
    mask: Tensor,
    *,
    importance: Tensor,
    alpha: float = 1.4,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    log_ratio_clamp: float | None = 20.0,
) -> Tensor:
    """TW-GRPO: PPO with token weights 1 + (alpha - 1) importance, importance in [0, 1]."""
    loss = ppo(lp, old, adv, mask, clip_low=clip_low, clip_high=clip_high, log_ratio_clamp=log_ratio_clamp)
    return (1 + (alpha - 1) * clean(mask, importance)) * loss


def tw_grpo_importance(logprobs: Tensor, mask: Tensor, groups: Tensor) -> Tensor:
    """Importance [B, T] from whole distributions [B, T, V]: how much a group disagrees at a position, min-max scaled.

    The padding takes part as a uniform distribution, as in the released code: every group is as long as the batch.
    """
    uniform = -math.log(logprobs.shape[-1])
    logprobs = torch.where((mask != 0).unsqueeze(-1), logprobs.double(), uniform)
    importance = torch.zeros(mask.shape, dtype=torch.float64)
    for group in groups.unique():
        rows = groups == group
        gap = (logprobs[rows].mean(0, keepdim=True) - logprobs[rows]).clamp(-11, 11)
        kl = (gap.exp() - gap - 1).sum(-1).mean(0)  # [T]
        importance[rows] = (kl - kl.min()) / (kl.max() - kl.min() + 1e-8)
    return importance


def clip_cov(
    lp: Tensor,
    old: Tensor,
    adv: Tensor,
    mask: Tensor,
    *,
    selected: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    log_ratio_clamp: float | None = 20.0,
) -> Tensor:
    """PPO, 0 on the selected tokens."""
    loss = ppo(lp, old, adv, mask, clip_low=clip_low, clip_high=clip_high, log_ratio_clamp=log_ratio_clamp)
    return loss * (clean(mask, selected) == 0)


def kl_cov(
    lp: Tensor,
    old: Tensor,
    adv: Tensor,
    mask: Tensor,
    *,
    selected: Tensor,
    kl_coef: float = 1.0,
    log_ratio_clamp: float | None = 20.0,
) -> Tensor:
    """-A r, plus kl_coef |d| on the selected tokens."""
    d = log_ratio(mask, lp, old)
    r = log_ratio(mask, lp, old, log_ratio_clamp).exp()
    return -clean(mask, adv) * r + kl_coef * d.abs() * (clean(mask, selected) != 0)


def covariance(lp: Tensor, adv: Tensor, mask: Tensor) -> Tensor:
    """(A - mean A)(lp - mean lp) over the batch's valid tokens, [B, T]."""
    m, tokens = (mask != 0).double(), count(mask).sum().clamp(min=1)
    a, x = clean(mask, adv), clean(mask, lp.detach())
    return (a - a.sum() / tokens) * (x - x.sum() / tokens) * m


def cov_mask(
    lp: Tensor,
    old: Tensor,
    adv: Tensor,
    mask: Tensor,
    *,
    method: str,
    ratio: float = 0.0002,
    cov_low: float = 1.0,
    cov_high: float = 5.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Tensor:
    """kl-cov's tokens, or all candidates for clip-cov, of which verl draws its share at random; bool [B, T]."""
    cov = covariance(lp, adv, mask)
    counted = mask != 0
    if method == "clip":
        r, a = log_ratio(mask, lp.detach(), old).exp(), clean(mask, adv)
        already = -a * r.clamp(1 - clip_low, 1 + clip_high) > -a * r
        return counted & ~already & (cov > cov_low) & (cov < cov_high)
    best = torch.where(counted, cov, -math.inf).flatten().topk(cov_count(mask, ratio)).indices
    return torch.zeros(mask.numel(), dtype=torch.bool).index_fill(0, best, True).reshape(mask.shape) & counted


def cov_count(mask: Tensor, ratio: float) -> int:
    """How many tokens clip-cov or kl-cov selects at most."""
    tokens = int(count(mask).sum())
    return min(max(int(ratio * tokens), 1), tokens)


# -------------------------------------------------------------------------------------------- log-prob times a constant
def reinforce(lp: Tensor, old: Tensor, adv: Tensor, mask: Tensor) -> Tensor:
    """-A lp; GPG's loss is the same, its group scaling sits in the advantage."""
    return -clean(mask, adv) * clean(mask, lp)


gpg = reinforce


def cispo(
    lp: Tensor,
    old: Tensor,
    adv: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    convention: str = "verl",
    log_ratio_clamp: float | None = 20.0,
) -> Tensor:
    """verl: clip to [1 - low, 1 + high]; trl: to (-inf, high]; tinker: to [low, high]."""
    r = log_ratio(mask, lp, old, log_ratio_clamp).exp().detach()
    low, high = {"verl": (1 - clip_low, 1 + clip_high), "trl": (None, clip_high), "tinker": (clip_low, clip_high)}[
        convention
    ]
    return -r.clamp(low, high) * clean(mask, adv) * clean(mask, lp)


def dispo(
    lp: Tensor,
    old: Tensor,
    adv: Tensor,
    mask: Tensor,
    *,
    pos_low: float = 0.2,
    pos_high: float = 10.0,
    neg_low: float = 1.0,
    neg_high: float = 100.0,
    log_ratio_clamp: float | None = 20.0,
) -> Tensor:
    """CISPO with bounds by the sign of A."""
    a = clean(mask, adv)
    r = log_ratio(mask, lp, old, log_ratio_clamp).exp().detach()
    weight = torch.where(a > 0, r.clamp(1 - pos_low, 1 + pos_high), r.clamp(1 - neg_low, 1 + neg_high))
    return -weight * a * clean(mask, lp)


def _dppo(keep: Tensor, r: Tensor, cap: float, a: Tensor, lp: Tensor) -> Tensor:
    return -a * r.clamp(max=cap).detach() * lp * keep.detach()


def dppo_tv(
    lp: Tensor,
    old: Tensor,
    adv: Tensor,
    mask: Tensor,
    *,
    low: float = 0.2,
    high: float = 0.2,
    cap: float = 20.0,
    log_ratio_clamp: float | None = 20.0,
) -> Tensor:
    """A token counts while its probability moved by no more than `high` up (A > 0) or `low` down."""
    a, x, r = clean(mask, adv), clean(mask, lp), log_ratio(mask, lp, old, log_ratio_clamp).exp()
    moved = x.exp() - clean(mask, old).exp()
    return _dppo(torch.where(a > 0, moved <= high, moved >= -low), r, cap, a, x)


def dppo_kl(
    lp: Tensor,
    old: Tensor,
    adv: Tensor,
    mask: Tensor,
    *,
    low: float = 0.2,
    high: float = 0.2,
    cap: float = 20.0,
    log_ratio_clamp: float | None = 20.0,
) -> Tensor:
    """The same with the KL of the two Bernoulli distributions "this token or another"."""
    a, x, base, r = clean(mask, adv), clean(mask, lp), clean(mask, old), log_ratio(mask, lp, old, log_ratio_clamp).exp()
    p, q = x.exp(), base.exp()
    kl = q * (base - x) + (1 - q) * torch.log((1 - q + 1e-8) / (1 - p + 1e-8))
    return _dppo(torch.where(a > 0, (kl <= high) | (p <= q), (kl <= low) | (p >= q)), r, cap, a, x)


def dro(lp: Tensor, old: Tensor, adv: Tensor, mask: Tensor, *, beta: float) -> Tensor:
    """-(A lp - beta d^2 / 2)."""
    return -(clean(mask, adv) * clean(mask, lp) - 0.5 * beta * log_ratio(mask, lp, old).square())


def vespo(
    lp: Tensor,
    old: Tensor,
    adv: Tensor,
    mask: Tensor,
    *,
    k_pos: float = 2.0,
    lambda_pos: float = 3.0,
    k_neg: float = 3.0,
    lambda_neg: float = 2.0,
    is_weight: Tensor | None = None,
) -> Tensor:
    """A gamma-shaped weight of the whole sequence's ratio, detached."""
    a, lowest = clean(mask, adv), math.log(1e-8)
    log_w = seq_sum(mask, log_ratio(mask, lp, old, 20.0))
    if is_weight is not None:  # [B, T], or [B] counted once
        correction = is_weight.double().log().clamp(lowest, 20.0)
        log_w = log_w + (correction if correction.dim() == 1 else seq_sum(mask, correction))
    log_w = log_w.clamp(lowest, 20.0).unsqueeze(-1)
    k, lam = choose(a >= 0, k_pos, k_neg), choose(a >= 0, lambda_pos, lambda_neg).clamp(min=1e-4)
    phi = torch.exp(lam + k * log_w - lam * log_w.exp())
    return -phi.detach() * a * clean(mask, lp)


def sdpo(
    lp: Tensor,
    old: Tensor,
    adv: Tensor,
    mask: Tensor,
    *,
    teacher: Tensor,
    is_clip: float | None = 2.0,
    log_ratio_clamp: float | None = 20.0,
) -> Tensor:
    """Token form (reverse KL): sg(lp - teacher) lp, times the ratio cut at is_clip. adv is not read."""
    x = clean(mask, lp)
    loss = (x - clean(mask, teacher)).detach() * x
    r = log_ratio(mask, lp, old, log_ratio_clamp).exp().detach()
    return loss if is_clip is None else loss * r.clamp(max=is_clip)


def sdpo_topk(
    lp: Tensor,
    old: Tensor | None,
    adv: Tensor | None,
    mask: Tensor,
    *,
    teacher: Tensor,
    alpha: float = 0.5,
    tail: bool = True,
    is_weight: Tensor | None = None,
) -> Tensor:
    """Over k ids: lp and teacher [N, K] are one position's log-probs of K ids; gives a loss per position [N].

    alpha 0: KL(teacher || student), 1: KL(student || teacher), between: the generalised Jensen-Shannon divergence.
    The rest of the vocabulary is one more id (tail) or is left out and the K renormalised. Neither old nor adv is read.
    """
    losses = []
    for n in range(mask.shape[0]):
        kept = mask[n] != 0
        if not kept.any():
            losses.append(torch.zeros((), dtype=torch.float64))
            continue
        s, t = (_with_tail(x[n][kept].double(), tail) for x in (lp, teacher.detach()))
        losses.append(_divergence(s, t, alpha))
    loss = torch.stack(losses)
    return loss if is_weight is None else loss * is_weight.double()


def _with_tail(logprobs: Tensor, tail: bool) -> Tensor:
    total = logprobs.logsumexp(0)
    if not tail:
        return logprobs - total
    rest = torch.log(-torch.expm1(total.clamp(max=-1e-7)))
    return torch.cat([logprobs, rest.unsqueeze(0)])


def _divergence(s: Tensor, t: Tensor, alpha: float) -> Tensor:
    if alpha == 0:
        return (t.exp() * (t - s)).sum()
    if alpha == 1:
        return (s.exp() * (s - t)).sum()
    m = torch.logaddexp(s + math.log(1 - alpha), t + math.log(alpha))
    return ((1 - alpha) * s.exp() * (s - m) + alpha * t.exp() * (t - m)).sum()


def sft(lp: Tensor, old: Tensor, adv: Tensor, mask: Tensor) -> Tensor:
    """-lp."""
    return -clean(mask, lp)


def raft(lp: Tensor, old: Tensor, adv: Tensor, mask: Tensor) -> Tensor:
    """-lp on rows with A > 0 (the best of each group, or the right ones), 0 elsewhere."""
    return -clean(mask, lp) * (clean(mask, adv) > 0)


def verifree(lp: Tensor, old: Tensor, adv: Tensor, mask: Tensor, *, answer: Tensor, reward: Tensor) -> Tensor:
    """-A lp on the reasoning, -R lp on the reference answer's tokens; answer [B, T], reward [B]."""
    x = clean(mask, lp)
    return torch.where(clean(mask, answer) != 0, -clean(mask, reward) * x, -clean(mask, adv) * x)


# --------------------------------------------------------------------------------------------------------- other tokens
def sapo(
    lp: Tensor,
    old: Tensor,
    adv: Tensor,
    mask: Tensor,
    *,
    tau_pos: float = 1.0,
    tau_neg: float = 1.05,
    log_ratio_clamp: float | None = 20.0,
) -> Tensor:
    """-A sigmoid(tau (r - 1)) 4 / tau, tau by the sign of A."""
    a = clean(mask, adv)
    tau = choose(a > 0, tau_pos, tau_neg)
    r = log_ratio(mask, lp, old, log_ratio_clamp).exp()
    return -a * torch.sigmoid(tau * (r - 1)) * 4 / tau


KL_KINDS = ("k1", "k2", "k3", "abs", "k1+", "k2+", "k3+", "abs+")


def kl(
    lp: Tensor,
    old: Tensor,
    adv: Tensor,
    mask: Tensor,
    *,
    ref: Tensor,
    kind: str = "k3",
    convention: str = "verl",
    bias_correction: bool = False,
) -> Tensor:
    """Of the policy to ref, x = ref - lp. "+": that value with the gradient of k2; bias_correction: times r.

    verl clamps k3's x to +-20 and k3 to +-10; OpenRLHF clamps every estimator to +-10 and k3's x to at most 10, and
    weighs the gradient of the "+" forms by sg(min(r, 10)); TRL clamps nothing. "fastreward" clamps x to +-20 always,
    and the ratio of bias_correction as every ratio.
    """
    x = clean(mask, ref) - clean(mask, lp)
    x = x.clamp(-20, 20) if convention == "fastreward" else x
    bounded = {"verl": x.clamp(-20, 20), "openrlhf": x.clamp(max=10)}.get(convention, x)
    base = kind.rstrip("+")
    value = {"k1": -x, "k2": 0.5 * x.square(), "abs": x.abs(), "k3": bounded.exp() - bounded - 1}[base]
    if convention == "openrlhf" or (convention == "verl" and base == "k3"):
        value = value.clamp(-10, 10)
    if kind.endswith("+"):
        surrogate = 0.5 * x.square()
        if convention == "openrlhf":
            surrogate = surrogate * log_ratio(mask, lp, old).exp().clamp(max=10).detach()
        value = surrogate - surrogate.detach() + value.detach()
    clamp = 20.0 if convention == "fastreward" else None
    return value * log_ratio(mask, lp, old, clamp).exp() if bias_correction else value


# ------------------------------------------------------------------------------------------------------------ sequences
def gspo(
    lp: Tensor,
    old: Tensor,
    adv: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.0003,
    clip_high: float = 0.0004,
    log_ratio_max: float | None = 10.0,
) -> Tensor:
    """Sequence form: PPO on s = exp(mean d) and the mean advantage, [B]."""
    mean = seq_mean(mask, log_ratio(mask, lp, old))
    mean = mean if log_ratio_max is None else mean.clamp(max=log_ratio_max)
    return clipped(mean.exp(), seq_mean(mask, adv), clip_low, clip_high)


def gspo_token(
    lp: Tensor,
    old: Tensor,
    adv: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.0003,
    clip_high: float = 0.0004,
    log_ratio_max: float | None = 10.0,
) -> Tensor:
    """Token form: the same s in every token, its gradient lp's own, [B, T]."""
    x = clean(mask, lp)
    log_s = x - x.detach() + seq_mean(mask, log_ratio(mask, lp, old)).detach().unsqueeze(-1)
    log_s = log_s if log_ratio_max is None else log_s.clamp(max=log_ratio_max)
    return clipped(log_s.exp(), clean(mask, adv), clip_low, clip_high)


def gmpo(
    lp: Tensor,
    old: Tensor,
    adv: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.4,
    clip_high: float = 0.4,
    log_ratio_clamp: float | None = 20.0,
    is_weight: Tensor | None = None,
) -> Tensor:
    """The geometric mean of one-sidedly clipped token ratios, times that of is_weight, [B]."""
    sign = clean(mask, adv).sign()
    d = log_ratio(mask, lp, old, log_ratio_clamp)
    least = sign * torch.minimum(sign * d, sign * d.clamp(-clip_low, clip_high))
    loss = -seq_mean(mask, adv) * seq_mean(mask, least).exp()
    return loss if is_weight is None else loss * seq_mean(mask, (is_weight.double() + 1e-10).log()).exp()


def laser(
    lp: Tensor,
    old: Tensor,
    adv: Tensor,
    mask: Tensor,
    *,
    score_token: Tensor,
    reward: Tensor,
    beta: float = 0.1,
    temperature: float = 1.0,
    constant: float | None = -23.0,
    ref: Tensor | None = None,
    balance: Tensor | None = None,
) -> Tensor:
    """(beta (tau lp(z_c) - c) - R)^2 at the marked token, c a constant or tau ref(z_c); 0 without one; [B]."""
    base = temperature * clean(mask, ref) if constant is None else constant
    error = beta * (temperature * clean(mask, lp) - base) - clean(mask, reward)
    loss = (error.square() * (clean(mask, score_token) != 0)).sum(-1)
    return loss if balance is None else loss * balance.double()


# --------------------------------------------------------------------------------------------------------------- groups
def real(
    lp: Tensor, old: Tensor, adv: Tensor, mask: Tensor, *, groups: Tensor, tau: float = 0.5, variant: str = "anchor"
) -> Tensor:
    """Rows with A > 0 against the others by their mean log-ratio s, [B].

    anchor: log(1 + sum_pos exp(-s / tau)) + log(1 + sum_neg exp(s / tau)), 0 for a group of one class;
    bce: each row's own softplus(-+ s / tau).
    """
    s = seq_mean(mask, log_ratio(mask, lp, old)) / tau
    positive = seq_mean(mask, adv) > 0
    if variant == "bce":
        return torch.where(positive, softplus(-s), softplus(s)) * (count(mask) > 0)
    loss = 0.0 * s
    for rows in members(mask, groups):
        pos, neg = rows[positive[rows]], rows[~positive[rows]]
        if len(pos) and len(neg):
            zero = torch.zeros(1, dtype=torch.float64)
            group = torch.cat([-s[pos], zero]).logsumexp(0) + torch.cat([s[neg], zero]).logsumexp(0)
            loss = loss.index_put((rows,), group.expand(len(rows)))
    return loss


def pacs(
    lp: Tensor,
    old: Tensor,
    adv: Tensor,
    mask: Tensor,
    *,
    groups: Tensor,
    beta: float = 1.0,
    method: str = "sum",
    center: str = "leave-one-out",
    balanced: bool = True,
) -> Tensor:
    """Binary cross-entropy of adv, here the 0/1 rewards, against psi less its baseline, differentiable; [B].

    psi = beta sum d, or beta mean lp (method "mean"); the baseline is the others' mean (0 for a singleton), the
    group's mean and std (center "std", ddof 1, + 1e-6) or none. balanced: classes of a mixed group weigh the same.
    """
    psi = beta * (seq_sum(mask, log_ratio(mask, lp, old)) if method == "sum" else seq_mean(mask, lp))
    rewards = seq_mean(mask, adv)
    loss = 0.0 * psi
    for rows in members(mask, groups):
        n, own, right = len(rows), psi[rows], rewards[rows]
        score = own
        if center == "leave-one-out":
            score = own - (own.sum() - own) / max(n - 1, 1)
        elif center == "std":
            score = (own - own.mean()) / ((own.std() if n > 1 else 0.0) + 1e-6)
        weight = torch.ones(n, dtype=torch.float64)
        hits = int((right > 0.5).sum())
        if balanced and 0 < hits < n:
            weight = choose(right > 0.5, n / (2 * hits), n / (2 * (n - hits)))
        bce = binary_cross_entropy_with_logits(score, right, reduction="none")
        loss = loss.index_put((rows,), weight * bce)
    return loss


def jepo(
    lp: Tensor, old: Tensor, adv: Tensor, mask: Tensor, *, groups: Tensor, answer: Tensor, sft_coef: float = 1.0
) -> Tensor:
    """4.4: J = log mean_i p_i over the group's rollouts, p_i = exp(sum of lp on the answer's tokens); [B].

    The group's loss is -sum_i A_i (sum of lp on the reasoning) - sft_coef J, A_i = sg(J - J without i), 0 in a group
    of one. Rows without an answer token are left out of these sums, but see the group's loss.
    """
    marked = clean(mask, answer) != 0
    x = clean(mask, lp)
    log_p, reasoning = (x * marked).sum(-1), (x * ~marked).sum(-1)
    loss = 0.0 * log_p
    for rows in members(mask, groups):
        told = rows[marked.any(-1)[rows]]
        if not len(told):
            continue
        n = len(told)
        j = log_p[told].logsumexp(0) - math.log(n)
        group = -sft_coef * j
        for i in told if n > 1 else ():
            without = log_p[told[told != i]].logsumexp(0) - math.log(n - 1)
            group = group - (j - without).detach() * reasoning[i]
        loss = loss.index_put((rows,), group.expand(len(rows)))
    return loss


def brain(
    lp: Tensor,
    old: Tensor,
    adv: Tensor,
    mask: Tensor,
    *,
    groups: Tensor,
    ref: Tensor | None = None,
    gamma: float = 1.0,
) -> Tensor:
    """Cross-entropy between a group's posterior weights and the policy's own self-normalised ones; [B].

    old is the proposal q', ref the prior (None: the proposal was the prior), adv the rewards:
    alpha = softmax(reward / gamma + log prior - log q'), loss -sum alpha log softmax(log pi - log q').
    """
    s = seq_sum(mask, log_ratio(mask, lp, old))
    target = seq_mean(mask, adv) / gamma
    if ref is not None:
        target = target + seq_sum(mask, log_ratio(mask, ref, old))
    loss = 0.0 * s
    for rows in members(mask, groups):
        alpha = target[rows].softmax(0).detach()
        loss = loss.index_put((rows,), -(alpha * s[rows].log_softmax(0)).sum().expand(len(rows)))
    return loss


def gdro(
    lp: Tensor,
    old: Tensor,
    adv: Tensor,
    mask: Tensor,
    *,
    groups: Tensor,
    ref: Tensor,
    beta: float = 0.1,
    tau: float = 0.05,
) -> Tensor:
    """Listwise cross-entropy over every suffix of a group sorted by reward (adv), s = beta sum (lp - ref); [B].

    Equal rewards keep the order of their rows.
    """
    s, rewards = beta * seq_sum(mask, log_ratio(mask, lp, ref)), seq_mean(mask, adv)
    loss = 0.0 * s
    for rows in members(mask, groups):
        ranked = rows[rewards[rows].argsort(descending=True, stable=True)]
        group = torch.zeros((), dtype=torch.float64)
        for i in range(len(ranked) - 1):
            suffix = ranked[i:]
            group = group - ((rewards[suffix] / tau).softmax(0) * s[suffix].log_softmax(0)).sum()
        loss = loss.index_put((rows,), group.expand(len(rows)))
    return loss
