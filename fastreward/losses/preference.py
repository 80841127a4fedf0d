"""Preference losses: DPO, its variants and its relatives, each one value per pair, for `preference_loss`.

S is a sequence's sum of logprob - ref_logprob over its valid tokens, times chosen_weights or rejected_weights where
the call gives them; L is the number of those tokens (at least 1), _w the chosen side, _l the rejected one. An empty
side has S = 0. "Code" in a docstring means: formula read in that code; "paper": in the paper's text; "notes": only in
third-party notes that quote it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

import torch
from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.arrays import accepts_arrays
from fastreward.language.define import define
from fastreward.language.functions import (
    abs,
    batch_match,
    batch_mean,
    batch_sum,
    clip,
    exp,
    expm1,
    group_size,
    log,
    log1p,
    logsigmoid,
    maximum,
    seq_mean,
    seq_sum,
    sigmoid,
    stop_gradient,
    where,
)
from fastreward.language.node import Node
from fastreward.language.terms import PairTerms, Side
from fastreward.losses._rules import PAIR_RULES, RULES, Rule, apply, check_pair

__all__ = [
    "cdpo",
    "cream",
    "dno",
    "dpo",
    "gpo",
    "ld_dpo_weights",
    "mah_dpo",
    "mm_dpo",
    "rpo",
    "sppo",
    "tgdpo",
    "treg",
]

FDivergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]
#: Losses of the scores' difference: the only ones that an f-divergence can be combined with (TRL refuses the others).
_DIFFERENCE: Final = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")
_SMOOTHED: Final = ("sigmoid", "robust", "exo_pair", "aot", "aot_unpaired")
_SORTED: Final = ("aot", "aot_unpaired")
_EXP_MAX: Final = 80.0  # exponents of f-divergences stop here (TRL's alpha divergence): e^80 is still a float32


# ------------------------------------------------------------------------------------------------------- common parts
def _weighted_sum(side: Side, x: Node) -> Node:
    """Sum over the side's tokens, with the token weights where the call gives them."""
    return seq_sum(x * side.weight if side.has("weight") else x)


def _log_ratio(t: PairTerms) -> tuple[Node, Node]:
    """(S_w, S_l)."""
    return _weighted_sum(t.chosen, t.chosen.log_ratio), _weighted_sum(t.rejected, t.rejected.log_ratio)


def soft_label(z: Node, smoothing: Node | float) -> Node:
    """Cross entropy of a preference that holds with probability 1 - smoothing, of logit z."""
    return -(1.0 - smoothing) * logsigmoid(z) - smoothing * logsigmoid(-z)


def batch_nll(t: PairTerms) -> Node:
    """The pair's share of the mean negative log-prob over all chosen tokens: its mean over the pairs is that mean."""
    tokens = batch_sum(t.chosen.length)
    return -seq_sum(t.chosen.logprob) * (batch_sum(1.0, t.graph) / maximum(tokens, 1.0))


def report(t: PairTerms, reward_w: Node, reward_l: Node) -> None:
    t.report(
        reward_chosen=reward_w,
        reward_rejected=reward_l,
        reward_margin=reward_w - reward_l,
        reward_accuracy=reward_w > reward_l,
    )


# ---------------------------------------------------------------------------------------------------------------- DPO
@dataclass(frozen=True, slots=True)
class _Scores:
    """Arguments of DPO's variants; f are the f-divergence's scores of S (S itself for the reverse KL)."""

    t: PairTerms
    s_w: Node
    s_l: Node
    f_w: Node
    f_l: Node
    beta: Node
    smoothing: Node
    tau: Node

    @property
    def z(self) -> Node:
        return self.beta * (self.f_w - self.f_l)

    @property
    def per_token(self) -> Node:
        """Difference of the scores, each divided by its length."""
        return self.f_w / maximum(self.t.chosen.length, 1.0) - self.f_l / maximum(self.t.rejected.length, 1.0)


def _ipo(x: _Scores) -> Node:
    return (x.per_token - 0.5 / x.beta) ** 2


def _robust(x: _Scores) -> Node:
    e = x.smoothing
    return (-(1.0 - e) * logsigmoid(x.z) + e * logsigmoid(-x.z)) / (1.0 - 2.0 * e)


def _exo_pair(x: _Scores) -> Node:
    e, z = x.smoothing, x.z
    return sigmoid(z) * (logsigmoid(z) - log1p(-e)) + sigmoid(-z) * (logsigmoid(-z) - log(e))


def _nca_pair(x: _Scores) -> Node:
    w, l = x.beta * x.s_w, x.beta * x.s_l  # noqa: E741
    return -logsigmoid(w) - 0.5 * logsigmoid(-w) - 0.5 * logsigmoid(-l)


def _matched(x: _Scores, own: Node, other: Node) -> Node:
    """Sigmoid loss of `own` against the `other` of the same rank in the batch; pairs that do not count come last."""
    valid = x.t.graph.valid()
    last = (where(valid, value, math.inf) for value in (own, other))
    return soft_label(x.beta * (own - batch_match(*last)), x.smoothing)


def _aot(x: _Scores) -> Node:
    chosen, rejected = x.t.chosen, x.t.rejected
    reference = _weighted_sum(chosen, chosen.ref_logprob) - _weighted_sum(rejected, rejected.ref_logprob)
    return _matched(x, x.s_w - x.s_l + reference, reference)


def _discopop(x: _Scores) -> Node:
    # e^-z sigmoid(z / tau) in log space: for z far below 0 the product is 0 though e^-z overflows.
    z = x.z
    return -logsigmoid(z) * sigmoid(-z / x.tau) + exp(-z + logsigmoid(z / x.tau))


_VARIANTS: Final[dict[str, Callable[[_Scores], Node]]] = {
    "sigmoid": lambda x: soft_label(x.z, x.smoothing),
    "hinge": lambda x: maximum(0.0, 1.0 - x.z),
    "ipo": _ipo,
    "robust": _robust,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "bco_pair": lambda x: -logsigmoid(x.beta * x.s_w) - logsigmoid(-x.beta * x.s_l),
    "aot": _aot,
    "aot_unpaired": lambda x: _matched(x, x.s_w, x.s_l),
    "apo_zero": lambda x: sigmoid(-x.beta * x.s_w) + sigmoid(x.beta * x.s_l),
    "apo_down": lambda x: sigmoid(x.beta * x.s_w) + sigmoid(-x.beta * (x.s_w - x.s_l)),
    "sppo_hard": lambda x: (x.s_w - 0.5 / x.beta) ** 2 + (x.s_l + 0.5 / x.beta) ** 2,
    "discopop": _discopop,
    "sft": lambda x: batch_nll(x.t),
    "sigmoid_norm": lambda x: -logsigmoid(x.beta * x.per_token),
}


#: What a variant asks of the smoothing besides.
_SMOOTHING: Final[dict[str, dict[str, Rule]]] = {
    "robust": {"label_smoothing": (lambda x: x < 0.5, "a number below 0.5 for 'robust'")},
    "exo_pair": {"label_smoothing": (lambda x: x > 0, "a number above 0 (EXO: 1e-3)")},
}


def _check_dpo(
    label_smoothing: float,
    variant: str,
    f_divergence: str,
    length_normalize: bool,
    wpo: bool,
    **others: Any,
) -> None:
    check.choice("variant", variant, tuple(_VARIANTS))
    check.choice("f_divergence", f_divergence, get_args(FDivergence))
    smoothing = {"label_smoothing": label_smoothing}
    check_pair(**smoothing, **others)
    apply(_SMOOTHING.get(variant, {}), smoothing)
    if f_divergence != "reverse_kl" and variant not in _DIFFERENCE:
        raise ValueError(f"f_divergence: {f_divergence!r} goes with {', '.join(_DIFFERENCE)}, got variant {variant!r}")
    if label_smoothing and variant not in _SMOOTHED:
        raise ValueError(f"label_smoothing: taken by {', '.join(_SMOOTHED)}, got variant {variant!r}")
    if length_normalize and variant in ("ipo", "sigmoid_norm", "sft", *_SORTED):
        raise ValueError(f"length_normalize: {variant} divides by lengths itself or not at all")
    if wpo and variant in _SORTED:
        raise ValueError(f"wpo: pairs have no weight of their own where {variant!r} matches them across the batch")


def _scored(s: Node, divergence: str, alpha: Node) -> Node:
    """f'(e^S): S (reverse KL), 1 - e^-S (forward), log 2 + logsigmoid(S) (Jensen-Shannon), alpha's."""
    if divergence == "forward_kl":
        return 1.0 - exp(clip(-s, high=_EXP_MAX))
    if divergence == "js":
        return math.log(2) + logsigmoid(s)
    if divergence == "alpha":
        power = where(abs(alpha - 1.0) < 1e-6, 1e-12, alpha - 1.0)  # the limit is S
        return expm1(clip(power * s, high=_EXP_MAX)) / power
    return s


def _wpo_weight(side: Side) -> Node:
    return stop_gradient(exp(seq_mean(side.logprob - side.extra("log_sum_sq_probs"))))


@define(pairs=True, aggregation="mean", check=_check_dpo)
def dpo(
    t: PairTerms,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    variant: str = "sigmoid",
    *,
    f_divergence: FDivergence = "reverse_kl",
    alpha: float = 0.5,
    discopop_tau: float = 0.05,
    length_normalize: bool = False,
    wpo: bool = False,
) -> Node:
    """DPO: -logsigmoid(z), z = beta (S_w - S_l) (arXiv 2305.18290), and TRL's other functions of S_w and S_l.

    S is weighted by token where the call has chosen_weights and rejected_weights; `ld_dpo_weights` makes LD-DPO's.

    Args:
        beta: strength of the tie to the reference; for ipo its tau.
        label_smoothing: e, the share of flipped labels: sigmoid (conservative DPO: -(1 - e) logsigmoid(z)
            - e logsigmoid(-z)), robust, exo_pair (above 0; its paper: 1e-3) and aot.
        variant:
            sigmoid; hinge: max(0, 1 - z) (2309.06657); ipo: (S_w / L_w - S_l / L_l - 1 / (2 beta))^2 (2310.12036);
            robust: (-(1 - e) logsigmoid(z) + e logsigmoid(-z)) / (1 - 2 e) (2403.00409);
            exo_pair: KL(softmax || [1 - e, e]) (2402.00856);
            nca_pair: -logsigmoid(beta S_w) - logsigmoid(-beta S_w) / 2 - logsigmoid(-beta S_l) / 2 (2402.05369);
            bco_pair: -logsigmoid(beta S_w) - logsigmoid(-beta S_l) (2404.04656, without its running mean);
            aot: each pair's policy margin against the reference margin of the same rank in the batch, aot_unpaired:
            each S_w against the S_l of the same rank (2406.05882);
            apo_zero: 1 - sigmoid(beta S_w) + sigmoid(beta S_l), apo_down: sigmoid(beta S_w) + 1 - sigmoid(z)
            (2408.06266); sppo_hard: (S_w - 1 / (2 beta))^2 + (S_l + 1 / (2 beta))^2 (2405.00675);
            discopop: logistic and exponential loss mixed by sigmoid(z / tau) (2406.08414); sft: negative log-prob of
            the chosen tokens, mean over the batch's; sigmoid_norm: sigmoid with S / L.
        f_divergence, alpha: f-DPO (2309.16240) puts f'(e^S) in the place of S: forward_kl 1 - e^-S, js
            log 2 + logsigmoid(S), alpha (e^((alpha - 1) S) - 1) / (alpha - 1); exponents stop at 80.
        discopop_tau: temperature of discopop's mixing.
        length_normalize: S / L in the place of S.
        wpo: WPO (2406.11827): each pair's loss times exp(mean(logprob - log sum_v p_v^2)) of both sides, constant;
            reads "log_sum_sq_probs" of chosen_extra and rejected_extra (an output of `token_logprobs`).

    Code: TRL 1.16.0 dpo_trainer.py `_compute_loss`, run against in the tests. The clamp of forward_kl's exponent is
    ours (TRL's overflows).
    """

    def total(side: Side) -> Node:
        s = _weighted_sum(side, side.log_ratio)
        return s / maximum(side.length, 1.0) if length_normalize else s

    graph = t.graph
    if variant == "sft" and not t.chosen.has("ref_logprob"):  # needs no reference, and has no rewards then
        loss = batch_nll(t)
    else:
        s_w, s_l = total(t.chosen), total(t.rejected)
        f_w, f_l = (_scored(s, f_divergence, graph.node(alpha)) for s in (s_w, s_l))
        scalars = (graph.node(x) for x in (beta, label_smoothing, discopop_tau))
        loss = _VARIANTS[variant](_Scores(t, s_w, s_l, f_w, f_l, *scalars))
        report(t, beta * s_w, beta * s_l)
    return loss * (_wpo_weight(t.chosen) * _wpo_weight(t.rejected)) if wpo else loss


@accepts_arrays
def ld_dpo_weights(chosen_mask: Tensor, rejected_mask: Tensor, ld_alpha: float) -> tuple[Tensor, Tensor]:
    """LD-DPO's token weights, for preference_loss(chosen_weights=..., rejected_weights=...), f32 [P, T] of each mask.

    1 up to the shorter response's length, ld_alpha beyond (arXiv 2409.06411; code: TRL 1.16.0 dpo_trainer.py).

    Raises:
        TypeError, ValueError: no tensor or array, other than [P, T] with one P for both.
    """
    check_pair(ld_alpha=ld_alpha)
    for name, given in (("chosen_mask", chosen_mask), ("rejected_mask", rejected_mask)):
        if check.tensor(name, given).ndim != 2:
            raise ValueError(f"{name}: expected shape [P, T], got {list(given.shape)}")
    if chosen_mask.shape[0] != rejected_mask.shape[0]:
        raise ValueError(f"rejected_mask: expected {chosen_mask.shape[0]} rows, got {rejected_mask.shape[0]}")
    chosen, rejected = chosen_mask != 0, rejected_mask != 0
    shorter = torch.minimum(chosen.sum(-1), rejected.sum(-1)).unsqueeze(-1)

    def weights(valid: Tensor) -> Tensor:
        beyond = valid.cumsum(-1) > shorter
        return torch.ones(valid.shape, device=valid.device).masked_fill_(beyond, ld_alpha)

    return weights(chosen), weights(rejected)


# ------------------------------------------------------------------------------------------------- DPO with more terms
@define(pairs=True, aggregation="mean", check=check_pair)
def rpo(t: PairTerms, beta: float = 0.05, eta: float = 0.005) -> Node:
    """RPO (arXiv 2405.16436): DPO - eta beta sum_t logprob of the chosen response, not divided by its length.

    beta 0.05 and eta 0.005 are the released configuration for Gemma.
    Code: YSLIU627/Regularized-Preference-Optimization rpo_trainer.py. TRL's loss_type ["sigmoid", "sft"] is similar,
    but its sft term is a mean over tokens.
    """
    s_w, s_l = _log_ratio(t)
    report(t, beta * s_w, beta * s_l)
    return -logsigmoid(beta * (s_w - s_l)) - eta * beta * seq_sum(t.chosen.logprob)


@define(pairs=True, aggregation="mean", check=check_pair)
def cdpo(t: PairTerms, beta: float = 0.1, label_smoothing: float = 0.1) -> Node:
    """Conservative DPO: -(1 - e) logsigmoid(z) - e logsigmoid(-z), e = label_smoothing, z as in dpo.

    Source: Mitchell's note "A note on DPO with noisy preferences" (ericmitchell.ai/cdpo.pdf). Code: the authors'
    eric-mitchell/direct-preference-optimization trainers.py, as copied in pearls-lab/multiobj-align.
    """
    s_w, s_l = _log_ratio(t)
    report(t, beta * s_w, beta * s_l)
    return soft_label(beta * (s_w - s_l), label_smoothing)


@define(pairs=True, aggregation="mean", check=check_pair)
def cream(t: PairTerms, beta: float = 0.1) -> Node:
    """CREAM (arXiv 2410.12735): cDPO whose label c is the consistency of two rankings: -c logsigmoid(z) - (1 - c)
    logsigmoid(-z).

    Reads extra "consistency": [pairs] or one number, (Kendall's tau between the rankings of two iterations + 1) / 2.
    Code: Raibows/CREAM sft_dpo_trainer.py.
    """
    s_w, s_l = _log_ratio(t)
    report(t, beta * s_w, beta * s_l)
    return soft_label(beta * (s_w - s_l), 1.0 - t.extra("consistency"))


@define(pairs=True, aggregation="mean", check=check_pair)
def dno(t: PairTerms, beta: float = 0.1) -> Node:
    """DNO (arXiv 2404.03715): cDPO with label sigmoid(r_w - r_l), r the expected win rate against the current policy.

    Reads extras "win_rate_chosen", "win_rate_rejected" [pairs]; the reference is the current iteration's policy; beta
    is the paper's eta. Notes (two agree; no code released). DNO-Prct, what the authors ran, is dpo on pairs of large
    margin.
    """
    s_w, s_l = _log_ratio(t)
    report(t, beta * s_w, beta * s_l)
    label = sigmoid(t.extra("win_rate_chosen") - t.extra("win_rate_rejected"))
    return soft_label(beta * (s_w - s_l), 1.0 - label)


@define(pairs=True, aggregation="mean", check=check_pair)
def mm_dpo(
    t: PairTerms,
    beta: float = 0.1,
    weight: float = 0.1,
    *,
    label_smoothing: float = 0.0,
    sft_weight: float = 0.0,
    implicit_beta: bool = False,
) -> Node:
    """MM-DPO (MM-RLHF, arXiv 2502.10391): DPO with beta' = max(beta (1 + weight x), 1e-3).

    Args:
        weight: the authors' ls_factor_weight; 0.1 in their script.
        label_smoothing: as in dpo (the authors' code counts it the other way round, 1.0 for none).
        sft_weight: adds this times the mean negative log-prob of the batch's chosen tokens (their gamma).
        implicit_beta: False: x is extra "margin_factor" [pairs] of the data set (paper: 1 - e^(-k margin), k 0.5, from
            memory). True, which the released code always takes: one x for the batch, the mean of D = S_w - S_l over
            the pairs where extra "selected" [pairs] is not 0, minus its mean over all; they draw 80 % of the pairs
            without replacement with weights exp(-((D - mean) / std)^2 / 2), over all ranks.

    Code: yfzhang114/MM-RLHF trl/trainer/dpo_trainer.py (read in a fork).
    """
    s_w, s_l = _log_ratio(t)
    d = s_w - s_l
    if implicit_beta:
        selected = t.extra("selected") != 0.0
        count = maximum(batch_sum(where(selected, 1.0, 0.0)), 1.0)
        x = stop_gradient(batch_sum(where(selected, d, 0.0)) / count - batch_mean(d))
    else:
        x = t.extra("margin_factor")
    scaled = maximum(beta * (1.0 + weight * x), 1e-3)
    report(t, beta * s_w, beta * s_l)
    return soft_label(scaled * d, label_smoothing) + sft_weight * batch_nll(t)


@define(pairs=True, aggregation="mean", check=check_pair)
def sppo(t: PairTerms, beta: float = 1e-3) -> Node:
    """SPPO (arXiv 2405.00675): ((S_w - (P_w - 1/2) / beta)^2 + (S_l - (P_l - 1/2) / beta)^2) / 2; 1 / beta is eta.

    Reads extras "win_rate_chosen" and "win_rate_rejected" [pairs]: each response's win probability against the policy.
    Code: uclaml/SPPO sppo/trainer.py, loss_type "sppo".
    """
    return _regression(t, beta, t.extra("win_rate_chosen") - 0.5, t.extra("win_rate_rejected") - 0.5)


@define(pairs=True, aggregation="mean", check=check_pair)
def gpo(t: PairTerms, beta: float = 1e-3) -> Node:
    """GPO (General Preference Modeling, arXiv 2410.02197): SPPO's regression with a preference score as its target:
    ((S_w - s_w / beta)^2 + (S_l - s_l / beta)^2) / 2.

    Reads extras "score_chosen" and "score_rejected" [pairs]: the mean over the group of the general preference model's
    score of the response over the others. Code: general-preference/general-preference-model.
    """
    return _regression(t, beta, t.extra("score_chosen"), t.extra("score_rejected"))


def _regression(t: PairTerms, beta: float, target_w: Node, target_l: Node) -> Node:
    s_w, s_l = _log_ratio(t)
    report(t, beta * s_w, beta * s_l)
    return 0.5 * ((s_w - target_w / beta) ** 2 + (s_l - target_l / beta) ** 2)


@define(pairs=True, aggregation="mean", check=check_pair)
def mah_dpo(t: PairTerms, beta: float = 0.1, label_smoothing: float = 0.0) -> Node:
    """MAH-DPO: one head per reward dimension; the loss is the mean over the present dimensions of each one's mean DPO
    loss.

    Pass each pair's dimension as group_ids, and log-probs of that dimension's head; the weights that make a mean over
    the pairs into that mean are applied here.
    Code: pearls-lab/multiobj-align mah_dpo/mahdpo_trainers.py `get_batch_metrics`.
    """
    s_w, s_l = _log_ratio(t)
    report(t, beta * s_w, beta * s_l)
    share = 1.0 / maximum(group_size(t), 1.0)
    balance = share / maximum(batch_mean(share), 1e-30)
    return balance * soft_label(beta * (s_w - s_l), label_smoothing)


_ALPHA = {**PAIR_RULES, "alpha": RULES["kl_coef"]}  # dpo's, of the f-divergence, may be any number


def _check_alpha(base: str = "dpo", **parameters: Any) -> None:
    check.choice("base", base, ("dpo", "simpo"))
    apply(_ALPHA, parameters)


@define(pairs=True, aggregation="mean", check=_check_alpha)
def tgdpo(t: PairTerms, alpha: float = 0.5, beta: float = 0.1) -> Node:
    """TGDPO (arXiv 2506.14574): -logsigmoid(Z_w - Z_l), Z = sum_t beta (1 +- alpha beta rho_t) (logprob - ref_logprob).

    rho = rm_logprob - ref_logprob, + on the chosen side; reads "rm_logprob" of chosen_extra and rejected_extra: the
    log-probs of a model trained by DPO or SimPO before, whose implicit reward guides the tokens.
    Code: dvlab-research/TGDPO src/llamafactory/train/tgdpo/trainer.py.
    """

    def total(side: Side, direction: float) -> Node:
        rho = side.extra("rm_logprob") - side.ref_logprob
        return seq_sum((beta + direction * alpha * beta * beta * rho) * side.log_ratio)

    z_w, z_l = total(t.chosen, 1.0), total(t.rejected, -1.0)
    report(t, z_w, z_l)
    return -logsigmoid(z_w - z_l)


@define(pairs=True, aggregation="mean", check=_check_alpha)
def treg(t: PairTerms, alpha: float = 0.25, beta: float = 0.1, *, base: str = "dpo", gamma: float = 1.0) -> Node:
    """T-REG (arXiv 2412.02685): DPO + alpha w (REG_w + REG_l), which pulls implicit token rewards to given ones.

    REG = -sum_t beta (sigmoid(better - worse) - 1/2) logprob; w = sigmoid(z_l - z_w), constant, z = beta S (or SimPO's
    beta times the mean log-prob).

    Args:
        alpha: 0.1, 0.25 or 0.5 in the paper.
        base: dpo, or simpo (mean log-probs without a reference, margin gamma).

    Reads "better_logprob" and "worse_logprob" of chosen_extra and rejected_extra: the tokens' log-probs under prompts
    that ask for a better and for a worse response.
    Notes (authors' code not seen).
    """
    if base == "dpo":
        z_w, z_l = beta * seq_sum(t.chosen.log_ratio), beta * seq_sum(t.rejected.log_ratio)
    else:
        z_w, z_l = beta * seq_mean(t.chosen.logprob), beta * seq_mean(t.rejected.logprob)

    def regularizer(side: Side) -> Node:
        reward = sigmoid(side.extra("better_logprob") - side.extra("worse_logprob")) - 0.5
        return -beta * seq_sum(reward * side.logprob)

    report(t, z_w, z_l)
    margin = z_w - z_l if base == "dpo" else z_w - z_l - gamma
    weight = stop_gradient(sigmoid(z_l - z_w))
    return -logsigmoid(margin) + alpha * weight * (regularizer(t.chosen) + regularizer(t.rejected))
