"""Preference losses without a reference policy, each one value per pair, for `preference_loss`.

m is the mean log-prob of a response over its valid tokens, S their sum, _w the chosen side, _l the rejected one. "Code"
in a docstring means: formula read in that code.
"""

from __future__ import annotations

from typing import Any

from fastreward._arguments import check
from fastreward.language.define import define
from fastreward.language.functions import expm1, log, logsigmoid, minimum, relu, seq_mean, seq_sum
from fastreward.language.node import Node
from fastreward.language.terms import PairTerms, Side
from fastreward.losses._rules import check_pair
from fastreward.losses.preference import batch_nll, report, soft_label

__all__ = ["alphapo", "cpo", "orpo", "simpo"]


def _check_simpo(label_smoothing: float, variant: str, **others: Any) -> None:
    check.choice("variant", variant, ("sigmoid", "hinge"))
    check_pair(label_smoothing=label_smoothing, **others)
    if label_smoothing and variant == "hinge":
        raise ValueError("label_smoothing: taken by sigmoid, got variant 'hinge'")


@define(pairs=True, aggregation="mean", check=_check_simpo)
def simpo(
    t: PairTerms,
    beta: float = 2.0,
    gamma: float = 1.0,
    *,
    label_smoothing: float = 0.0,
    variant: str = "sigmoid",
    sft_weight: float = 0.0,
) -> Node:
    """SimPO (arXiv 2405.14734): -logsigmoid(beta (m_w - m_l) - gamma), m the mean log-prob of a response; no reference.

    Args:
        beta, gamma: 2.0 to 2.5 and 1.0 to 1.4 in the authors' configurations, whose gamma_beta_ratio is gamma / beta.
        label_smoothing: as in dpo.
        variant: sigmoid, or hinge: max(0, 1 - z).
        sft_weight: adds this times the mean negative log-prob of the batch's chosen tokens.

    Code: princeton-nlp/SimPO scripts/simpo_trainer.py; TRL 1.16.0 cpo_trainer.py (loss_type "simpo").
    """
    m_w, m_l = seq_mean(t.chosen.logprob), seq_mean(t.rejected.logprob)
    z = beta * (m_w - m_l) - gamma
    report(t, beta * m_w, beta * m_l)
    loss = relu(1.0 - z) if variant == "hinge" else soft_label(z, label_smoothing)
    return loss + sft_weight * batch_nll(t)


@define(pairs=True, aggregation="mean", check=check_pair)
def alphapo(t: PairTerms, alpha: float, beta: float = 0.1, gamma: float = 0.5, *, label_smoothing: float = 0.0) -> Node:
    """AlphaPO (arXiv 2501.03884): -logsigmoid(beta (r_w - r_l) - gamma), r = (1 - e^(-alpha m)) / alpha.

    SimPO with another shape of the reward: m itself for alpha to 0, concave above. alpha may be negative, not 0; TRL
    and the paper's abstract give it no default.

    Code: TRL 1.16.0 experimental/cpo/cpo_trainer.py (loss_type "alphapo").
    """
    r_w, r_l = (-expm1(-alpha * seq_mean(side.logprob)) / alpha for side in (t.chosen, t.rejected))
    report(t, beta * r_w, beta * r_l)
    return soft_label(beta * (r_w - r_l) - gamma, label_smoothing)


def _check_cpo(label_smoothing: float, variant: str, **others: Any) -> None:
    check.choice("variant", variant, ("sigmoid", "hinge", "ipo"))
    check_pair(label_smoothing=label_smoothing, **others)
    if label_smoothing and variant != "sigmoid":
        raise ValueError(f"label_smoothing: taken by sigmoid, got variant {variant!r}")


@define(pairs=True, aggregation="mean", check=_check_cpo)
def cpo(
    t: PairTerms,
    beta: float = 0.1,
    *,
    variant: str = "sigmoid",
    label_smoothing: float = 0.0,
    sft_weight: float = 1.0,
) -> Node:
    """CPO (arXiv 2401.08417): -logsigmoid(beta (S_w - S_l)) + sft_weight times the chosen tokens' mean -logprob.

    variant: hinge, max(0, 1 - z), or ipo, (m_w - m_l - 1 / (2 beta))^2, instead. label_smoothing: as in dpo. TPO (arXiv
    2405.16681) is its sigmoid with beta 0.01, sft_weight 0 and the likelihood of a third, gold response: `recipes.tpo`.

    Code: TRL 1.16.0 experimental/cpo/cpo_trainer.py (cpo_alpha is sft_weight), experimental/tpo/tpo_trainer.py.
    """
    s_w, s_l = (seq_mean(x) if variant == "ipo" else seq_sum(x) for x in (t.chosen.logprob, t.rejected.logprob))
    z = beta * (s_w - s_l)
    report(t, beta * s_w, beta * s_l)
    ipo = (s_w - s_l - 0.5 / beta) ** 2
    loss = {"ipo": ipo, "hinge": relu(1.0 - z)}.get(variant, soft_label(z, label_smoothing))
    return loss + sft_weight * batch_nll(t)


@define(pairs=True, aggregation="mean", check=check_pair)
def orpo(t: PairTerms, beta: float = 0.1) -> Node:
    """ORPO (arXiv 2403.07691): the chosen tokens' mean -logprob - beta logsigmoid(o_w - o_l), o = log(p / (1 - p)).

    p = e^m; a mean log-prob above -1e-6 counts as that, so that a certain or an empty response has finite odds. TRL
    takes the likelihood over the prompt's tokens too, which are those of chosen_mask here.

    Code: TRL 1.16.0 experimental/orpo/orpo_trainer.py.
    """

    def log_odds(side: Side) -> Node:
        m = minimum(seq_mean(side.logprob), -1e-6)
        return m - log(-expm1(m))

    report(t, beta * seq_mean(t.chosen.logprob), beta * seq_mean(t.rejected.logprob))
    return batch_nll(t) - beta * logsigmoid(log_odds(t.chosen) - log_odds(t.rejected))
