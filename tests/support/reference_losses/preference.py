"""Preference losses written out in float64 torch, apart from the loss language: slow, obvious, differentiable.

Every function takes log-probs [P, Tc] and [P, Tr] with their masks and gives the loss of each pair, [P]; what a mask
leaves out (NaN included) counts nowhere. L is a sequence's number of masked-in tokens, S its sum of (logprob - ref),
D = S_chosen - S_rejected. Formulas: those of the papers that the losses' docstrings name, and of TRL 1.16's
dpo_trainer.py where the two differ (its f-divergence scores keep their constants, which matter once divided by L).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

VARIANTS = (
    "sigmoid",
    "hinge",
    "ipo",
    "robust",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "sppo_hard",
    "discopop",
    "sft",
    "sigmoid_norm",
)
F_DIVERGENCES = ("reverse_kl", "forward_kl", "js", "alpha")
# What TRL lets an f-divergence be combined with: losses of the difference of the two scores.
F_DIVERGENCE_VARIANTS = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")
_EXP_MAX = 80.0  # TRL clamps the alpha divergence's exponent here; the forward KL's is clamped alike, to stay finite


# --------------------------------------------------------------------------------------------------------- sequences
def clean(x: Tensor | None, mask: Tensor) -> Tensor:
    """Float64, and 0 where masked out, so that a NaN there can leak nowhere."""
    return torch.zeros_like(mask, dtype=torch.float64) if x is None else torch.where(mask != 0, x.double(), 0.0)


def lengths(mask: Tensor) -> Tensor:
    """Masked-in tokens, [P] float64, at least 1."""
    return (mask != 0).sum(-1).clamp(min=1).double()


def seq_sum(logprobs: Tensor | None, ref: Tensor | None, mask: Tensor, weights: Tensor | None = None) -> Tensor:
    """S, [P]; with token weights their weighted sum."""
    gap = clean(logprobs, mask) - clean(ref, mask)
    return (gap if weights is None else gap * clean(weights, mask)).sum(-1)


def ld_weights(chosen_mask: Tensor, rejected_mask: Tensor, ld_alpha: float) -> tuple[Tensor, Tensor]:
    """LD-DPO's token weights: ld_alpha past the shorter response's length, 1 up to it."""
    shorter = torch.minimum((chosen_mask != 0).sum(-1), (rejected_mask != 0).sum(-1)).unsqueeze(-1)

    def weights(mask: Tensor) -> Tensor:
        position = (mask != 0).cumsum(-1)
        return torch.full(mask.shape, ld_alpha, dtype=torch.float64).masked_fill(position <= shorter, 1.0)

    return weights(chosen_mask), weights(rejected_mask)


def f_score(s: Tensor, divergence: str, alpha: float) -> Tensor:
    """f-DPO's score f'(exp(S))."""
    if divergence == "reverse_kl":
        return s
    if divergence == "forward_kl":
        return 1 - torch.exp((-s).clamp(max=_EXP_MAX))
    if divergence == "js":
        return math.log(2) + logsigmoid(s)
    if divergence == "alpha":
        return s if abs(alpha - 1) < 1e-6 else (torch.exp(((alpha - 1) * s).clamp(max=_EXP_MAX)) - 1) / (alpha - 1)
    raise ValueError(f"divergence: unknown {divergence!r}")


def soft_label(z: Tensor, c: Tensor | float) -> Tensor:
    """Cross entropy of a preference that holds with probability c."""
    return -c * logsigmoid(z) - (1 - c) * logsigmoid(-z)


def batch_nll(logprobs: Tensor, mask: Tensor) -> Tensor:
    """Shares [P] whose mean over the pairs is the mean negative log-prob over all of the batch's tokens."""
    return -clean(logprobs, mask).sum(-1) * len(mask) / (mask != 0).sum().clamp(min=1)


def in_place_of(values: Tensor, owner: Tensor) -> Tensor:
    """values[i] moved to place owner[i]."""
    return torch.zeros_like(values).scatter(0, owner, values)


# --------------------------------------------------------------------------------------------------------------- DPO
def dpo(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor | None,
    ref_rejected: Tensor | None,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    variant: str = "sigmoid",
    f_divergence: str = "reverse_kl",
    alpha: float = 0.5,
    discopop_tau: float = 0.05,
    ld_alpha: float | None = None,
    length_normalize: bool = False,
    chosen_weights: Tensor | None = None,
    rejected_weights: Tensor | None = None,
    chosen_log_sum_sq_probs: Tensor | None = None,
    rejected_log_sum_sq_probs: Tensor | None = None,
) -> Tensor:
    """DPO and its variants under TRL's names; log_sum_sq_probs (log sum_v p_v^2 per token) turn WPO's weights on."""
    if ld_alpha is not None:
        chosen_ld, rejected_ld = ld_weights(chosen_mask, rejected_mask, ld_alpha)
        chosen_weights = chosen_ld if chosen_weights is None else chosen_ld * chosen_weights
        rejected_weights = rejected_ld if rejected_weights is None else rejected_ld * rejected_weights

    def total(logprobs: Tensor | None, ref: Tensor | None, mask: Tensor, weights: Tensor | None) -> Tensor:
        s = seq_sum(logprobs, ref, mask, weights)
        return s / lengths(mask) if length_normalize else s

    s_w = total(chosen, ref_chosen, chosen_mask, chosen_weights)
    s_l = total(rejected, ref_rejected, rejected_mask, rejected_weights)
    length_w, length_l = lengths(chosen_mask), lengths(rejected_mask)
    f_w, f_l = f_score(s_w, f_divergence, alpha), f_score(s_l, f_divergence, alpha)
    z, e = beta * (f_w - f_l), label_smoothing
    if variant == "sigmoid":
        loss = soft_label(z, 1 - e)
    elif variant == "hinge":
        loss = torch.relu(1 - z)
    elif variant == "ipo":
        loss = (f_w / length_w - f_l / length_l - 1 / (2 * beta)) ** 2
    elif variant == "robust":
        loss = (-(1 - e) * logsigmoid(z) + e * logsigmoid(-z)) / (1 - 2 * e)
    elif variant == "exo_pair":
        loss = torch.sigmoid(z) * (logsigmoid(z) - math.log1p(-e)) + torch.sigmoid(-z) * (logsigmoid(-z) - math.log(e))
    elif variant == "nca_pair":
        loss = -logsigmoid(beta * s_w) - 0.5 * logsigmoid(-beta * s_w) - 0.5 * logsigmoid(-beta * s_l)
    elif variant == "bco_pair":
        loss = -logsigmoid(beta * s_w) - logsigmoid(-beta * s_l)
    elif variant == "aot":
        policy_w = total(chosen, None, chosen_mask, chosen_weights)
        policy_l = total(rejected, None, rejected_mask, rejected_weights)
        ref_w = total(ref_chosen, None, chosen_mask, chosen_weights)
        ref_l = total(ref_rejected, None, rejected_mask, rejected_weights)
        ranked, owner = (policy_w - policy_l).sort(stable=True)
        loss = in_place_of(soft_label(beta * (ranked - (ref_w - ref_l).sort(stable=True).values), 1 - e), owner)
    elif variant == "aot_unpaired":
        ranked, owner = s_w.sort(stable=True)
        loss = in_place_of(soft_label(beta * (ranked - s_l.sort(stable=True).values), 1 - e), owner)
    elif variant == "apo_zero":
        loss = 1 - torch.sigmoid(beta * s_w) + torch.sigmoid(beta * s_l)
    elif variant == "apo_down":
        loss = torch.sigmoid(beta * s_w) + 1 - torch.sigmoid(beta * (s_w - s_l))
    elif variant == "sppo_hard":
        loss = (s_w - 0.5 / beta) ** 2 + (s_l + 0.5 / beta) ** 2
    elif variant == "discopop":
        # exp(-z) sigmoid(z / tau) in log space: for z far below 0 the product is 0 though exp(-z) overflows.
        loss = -logsigmoid(z) * torch.sigmoid(-z / discopop_tau) + torch.exp(-z + logsigmoid(z / discopop_tau))
    elif variant == "sft":
        loss = batch_nll(chosen, chosen_mask)
    elif variant == "sigmoid_norm":
        loss = -logsigmoid(beta * (f_w / length_w - f_l / length_l))
    else:
        raise ValueError(f"variant: unknown {variant!r}")
    if chosen_log_sum_sq_probs is not None:
        loss = loss * wpo_weight(chosen, chosen_log_sum_sq_probs, chosen_mask)
        loss = loss * wpo_weight(rejected, rejected_log_sum_sq_probs, rejected_mask)
    return loss


def wpo_weight(logprobs: Tensor, log_sum_sq_probs: Tensor | None, mask: Tensor) -> Tensor:
    """WPO (2406.11827): exp of the mean aligned log-prob, [P], constant."""
    gap = clean(logprobs, mask) - clean(log_sum_sq_probs, mask)
    return torch.exp(gap.sum(-1) / lengths(mask)).detach()


# ------------------------------------------------------------------------------------------------- reference-free etc.
def simpo(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor | None,
    ref_rejected: Tensor | None,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
    *,
    beta: float = 2.0,
    gamma: float = 1.0,
    label_smoothing: float = 0.0,
    variant: str = "sigmoid",
    sft_weight: float = 0.0,
) -> Tensor:
    """SimPO: mean log-probs without a reference, margin gamma / beta; sft_weight adds the chosen side's NLL."""
    mean_w = seq_sum(chosen, None, chosen_mask) / lengths(chosen_mask)
    mean_l = seq_sum(rejected, None, rejected_mask) / lengths(rejected_mask)
    z = beta * (mean_w - mean_l) - gamma
    loss = torch.relu(1 - z) if variant == "hinge" else soft_label(z, 1 - label_smoothing)
    return loss + sft_weight * batch_nll(chosen, chosen_mask)


def alphapo(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor | None,
    ref_rejected: Tensor | None,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
    *,
    alpha: float,
    beta: float = 0.1,
    gamma: float = 0.5,
    label_smoothing: float = 0.0,
) -> Tensor:
    """AlphaPO: SimPO on (1 - p^-alpha) / alpha, p the geometric mean of a response's probabilities."""
    p_w = (seq_sum(chosen, None, chosen_mask) / lengths(chosen_mask)).exp()
    p_l = (seq_sum(rejected, None, rejected_mask) / lengths(rejected_mask)).exp()
    r_w, r_l = ((1 - p.pow(-alpha)) / alpha for p in (p_w, p_l))
    return soft_label(beta * (r_w - r_l) - gamma, 1 - label_smoothing)


def cpo(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor | None,
    ref_rejected: Tensor | None,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
    *,
    beta: float = 0.1,
    variant: str = "sigmoid",
    label_smoothing: float = 0.0,
    sft_weight: float = 1.0,
) -> Tensor:
    """CPO: DPO, hinge or IPO without a reference, and the chosen side's NLL."""
    s_w, s_l = seq_sum(chosen, None, chosen_mask), seq_sum(rejected, None, rejected_mask)
    if variant == "ipo":
        loss = (s_w / lengths(chosen_mask) - s_l / lengths(rejected_mask) - 1 / (2 * beta)) ** 2
    elif variant == "hinge":
        loss = torch.relu(1 - beta * (s_w - s_l))
    else:
        loss = soft_label(beta * (s_w - s_l), 1 - label_smoothing)
    return loss + sft_weight * batch_nll(chosen, chosen_mask)


def orpo(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor | None,
    ref_rejected: Tensor | None,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
    *,
    beta: float = 0.1,
) -> Tensor:
    """ORPO: the chosen side's NLL, and the odds ratio of both sides' mean log-probs, at most -1e-6."""
    m_w = (seq_sum(chosen, None, chosen_mask) / lengths(chosen_mask)).clamp(max=-1e-6)
    m_l = (seq_sum(rejected, None, rejected_mask) / lengths(rejected_mask)).clamp(max=-1e-6)
    ratio = (m_w - torch.log1p(-m_w.exp())) - (m_l - torch.log1p(-m_l.exp()))
    return batch_nll(chosen, chosen_mask) - beta * logsigmoid(ratio)


def rpo(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor | None,
    ref_rejected: Tensor | None,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
    *,
    beta: float = 0.05,
    eta: float = 0.005,
) -> Tensor:
    """RPO: DPO - eta beta sum_t log pi(chosen), as released (no division by the length)."""
    loss = dpo(chosen, rejected, ref_chosen, ref_rejected, chosen_mask, rejected_mask, beta=beta)
    return loss - eta * beta * seq_sum(chosen, None, chosen_mask)


def cdpo(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor | None,
    ref_rejected: Tensor | None,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.1,
) -> Tensor:
    """Conservative DPO: the preference holds with probability 1 - label_smoothing."""
    s_w, s_l = seq_sum(chosen, ref_chosen, chosen_mask), seq_sum(rejected, ref_rejected, rejected_mask)
    return soft_label(beta * (s_w - s_l), 1 - label_smoothing)


def cream(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor | None,
    ref_rejected: Tensor | None,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
    *,
    consistency: Tensor | float,
    beta: float = 0.1,
) -> Tensor:
    """CREAM: soft label `consistency`, [P] or a number."""
    s_w, s_l = seq_sum(chosen, ref_chosen, chosen_mask), seq_sum(rejected, ref_rejected, rejected_mask)
    return soft_label(beta * (s_w - s_l), consistency.double() if isinstance(consistency, Tensor) else consistency)


def dno(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor | None,
    ref_rejected: Tensor | None,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
    *,
    win_rate_chosen: Tensor,
    win_rate_rejected: Tensor,
    beta: float = 0.1,
) -> Tensor:
    """DNO: soft label sigmoid(r_chosen - r_rejected) of the two expected win rates [P]; the paper's eta is beta."""
    s_w, s_l = seq_sum(chosen, ref_chosen, chosen_mask), seq_sum(rejected, ref_rejected, rejected_mask)
    label = torch.sigmoid(win_rate_chosen.double() - win_rate_rejected.double())
    return soft_label(beta * (s_w - s_l), label)


def mm_dpo(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor | None,
    ref_rejected: Tensor | None,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
    *,
    beta: float = 0.1,
    weight: float = 0.1,
    margin_factor: Tensor | None = None,
    selected: Tensor | None = None,
    label_smoothing: float = 0.0,
    sft_weight: float = 0.0,
) -> Tensor:
    """MM-DPO: beta (1 + weight x), at least 1e-3; x = margin_factor [P] (paper), or, as shipped, the mean of D over
    the `selected` pairs [P] minus its mean over all."""
    s_w, s_l = seq_sum(chosen, ref_chosen, chosen_mask), seq_sum(rejected, ref_rejected, rejected_mask)
    d = s_w - s_l
    if margin_factor is not None:
        x = margin_factor.double()
    else:
        assert selected is not None
        x = d[selected != 0].mean().detach() - d.mean().detach()
    scaled = (beta * (1 + weight * x)).clamp(min=1e-3)
    return soft_label(scaled * d, 1 - label_smoothing) + sft_weight * batch_nll(chosen, chosen_mask)


def sppo(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor | None,
    ref_rejected: Tensor | None,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
    *,
    win_rate_chosen: Tensor,
    win_rate_rejected: Tensor,
    beta: float = 1e-3,
) -> Tensor:
    """SPPO: squared error of each S against (win rate - 1/2) / beta, halved."""
    s_w, s_l = seq_sum(chosen, ref_chosen, chosen_mask), seq_sum(rejected, ref_rejected, rejected_mask)
    error_w = s_w - (win_rate_chosen.double() - 0.5) / beta
    error_l = s_l - (win_rate_rejected.double() - 0.5) / beta
    return (error_w**2 + error_l**2) / 2


def gpo(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor | None,
    ref_rejected: Tensor | None,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
    *,
    score_chosen: Tensor,
    score_rejected: Tensor,
    beta: float = 1e-3,
) -> Tensor:
    """GPO (General Preference Modeling): SPPO's regression on score / beta."""
    s_w, s_l = seq_sum(chosen, ref_chosen, chosen_mask), seq_sum(rejected, ref_rejected, rejected_mask)
    return ((s_w - score_chosen.double() / beta) ** 2 + (s_l - score_rejected.double() / beta) ** 2) / 2


def mah_dpo(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor | None,
    ref_rejected: Tensor | None,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
    *,
    dimension_ids: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """MAH-DPO: each pair's DPO loss times P / (dimensions * pairs of its dimension); its mean over pairs is the mean
    over the present dimensions of each one's mean."""
    loss = dpo(
        chosen,
        rejected,
        ref_chosen,
        ref_rejected,
        chosen_mask,
        rejected_mask,
        beta=beta,
        label_smoothing=label_smoothing,
    )
    present, inverse, counts = dimension_ids.unique(return_inverse=True, return_counts=True)
    return loss * len(loss) / (len(present) * counts[inverse])


def tgdpo(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor | None,
    ref_rejected: Tensor | None,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
    *,
    chosen_rm_logprob: Tensor,
    rejected_rm_logprob: Tensor,
    alpha: float = 0.5,
    beta: float = 0.1,
) -> Tensor:
    """TGDPO: DPO with token weights 1 +- alpha beta (log pi_rm - log pi_ref)."""
    rho_w = clean(chosen_rm_logprob, chosen_mask) - clean(ref_chosen, chosen_mask)
    rho_l = clean(rejected_rm_logprob, rejected_mask) - clean(ref_rejected, rejected_mask)
    z_w = beta * seq_sum(chosen, ref_chosen, chosen_mask, 1 + alpha * beta * rho_w)
    z_l = beta * seq_sum(rejected, ref_rejected, rejected_mask, 1 - alpha * beta * rho_l)
    return -logsigmoid(z_w - z_l)


def treg(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor | None,
    ref_rejected: Tensor | None,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
    *,
    chosen_better_logprob: Tensor,
    chosen_worse_logprob: Tensor,
    rejected_better_logprob: Tensor,
    rejected_worse_logprob: Tensor,
    alpha: float = 0.25,
    beta: float = 0.1,
    base: str = "dpo",
    gamma: float = 1.0,
) -> Tensor:
    """T-REG: base loss + alpha w (REG(chosen) + REG(rejected)), REG = -sum_t beta (sigmoid(better - worse) - 1/2) lp,
    w = sigmoid(z_rejected - z_chosen), constant; better and worse are log-probs under two contrastive prompts."""
    if base == "dpo":
        z_w = beta * seq_sum(chosen, ref_chosen, chosen_mask)
        z_l = beta * seq_sum(rejected, ref_rejected, rejected_mask)
        loss = -logsigmoid(z_w - z_l)
    else:
        z_w = beta * seq_sum(chosen, None, chosen_mask) / lengths(chosen_mask)
        z_l = beta * seq_sum(rejected, None, rejected_mask) / lengths(rejected_mask)
        loss = -logsigmoid(z_w - z_l - gamma)

    def regularizer(logprobs: Tensor, better: Tensor, worse: Tensor, mask: Tensor) -> Tensor:
        reward = torch.sigmoid(clean(better, mask) - clean(worse, mask)) - 0.5
        return -(beta * reward * clean(logprobs, mask)).sum(-1)

    reg_w = regularizer(chosen, chosen_better_logprob, chosen_worse_logprob, chosen_mask)
    reg_l = regularizer(rejected, rejected_better_logprob, rejected_worse_logprob, rejected_mask)
    return loss + alpha * torch.sigmoid(z_l - z_w).detach() * (reg_w + reg_l)
