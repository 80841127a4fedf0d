"""Methods over pairs of a chosen and a rejected response that have no reference policy.

m = mean of logprobs over a response's valid tokens, S = their sum, _w the chosen response, _l the rejected one. Every
recipe takes the arguments of `fastreward.preference_loss`, passes its options on and returns what it returns; its
parameters have their published values.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Unpack

from torch import Tensor

from fastreward import losses
from fastreward._arguments import check
from fastreward._arguments.tokens import Tokens, token_bounds
from fastreward._loss_call.results import PolicyLoss
from fastreward.losses import Loss
from fastreward.policy_loss import policy_loss
from fastreward.preference_loss import preference_loss
from fastreward.recipes._catalogue.registry import recipe
from fastreward.recipes._shared.options import PairOptions

__all__ = ["alphapo", "cpo", "orpo", "simpo", "tpo"]


@recipe(
    "SimPO (simple preference optimization)",
    "arXiv 2405.14734",
    code="princeton-nlp/SimPO scripts/simpo_trainer.py, TRL cpo_trainer.py",
    build=losses.simpo,
)
def simpo(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    *,
    beta: float = 2.0,
    gamma: float = 1.0,
    label_smoothing: float = 0.0,
    variant: str = "sigmoid",
    sft_weight: float = 0.0,
    **options: Unpack[PairOptions],
) -> PolicyLoss:
    """-logsigmoid(beta (m_w - m_l) - gamma), m = mean of logprobs over the response.

    beta 2.0 to 2.5 and gamma 1.0 to 1.4 in the authors' configurations; their gamma_beta_ratio is gamma / beta. variant
    "hinge": max(0, 1 - that). sft_weight: adds this times the mean -logprobs of the chosen tokens.
    """
    return preference_loss(
        chosen_logprobs,
        rejected_logprobs,
        loss=losses.simpo(beta, gamma, label_smoothing=label_smoothing, variant=variant, sft_weight=sft_weight),
        **options,
    )


@recipe(
    "AlphaPO (the reward shape of SimPO)",
    "arXiv 2501.03884",
    code='TRL experimental/cpo/cpo_trainer.py (loss_type "alphapo")',
    build=losses.alphapo,
    settings={"alpha": 0.25},
)
def alphapo(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    *,
    alpha: float,
    beta: float = 0.1,
    gamma: float = 0.5,
    label_smoothing: float = 0.0,
    **options: Unpack[PairOptions],
) -> PolicyLoss:
    """-logsigmoid(beta (r_w - r_l) - gamma), r = (1 - e^(-alpha m)) / alpha.

    beta and gamma are TRL's defaults; it gives alpha none.
    """
    return preference_loss(
        chosen_logprobs,
        rejected_logprobs,
        loss=losses.alphapo(alpha, beta, gamma, label_smoothing=label_smoothing),
        **options,
    )


@recipe(
    "CPO (contrastive preference optimization)",
    "arXiv 2401.08417",
    code="TRL experimental/cpo/cpo_trainer.py",
    build=losses.cpo,
)
def cpo(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    *,
    beta: float = 0.1,
    variant: str = "sigmoid",
    label_smoothing: float = 0.0,
    sft_weight: float = 1.0,
    **options: Unpack[PairOptions],
) -> PolicyLoss:
    """-logsigmoid(beta (S_w - S_l)) + sft_weight * mean of -logprobs over the chosen tokens.

    variant "hinge" or "ipo" (on m): DPO's of these names, without the reference. With the likelihood of a third, gold
    response in the place of the chosen one's it is `recipes.tpo`.
    """
    return preference_loss(
        chosen_logprobs,
        rejected_logprobs,
        loss=losses.cpo(beta, variant=variant, label_smoothing=label_smoothing, sft_weight=sft_weight),
        **options,
    )


@recipe(
    "ORPO (odds ratio preference optimization)",
    "arXiv 2403.07691",
    code="TRL experimental/orpo/orpo_trainer.py",
    build=losses.orpo,
)
def orpo(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    *,
    beta: float = 0.1,
    **options: Unpack[PairOptions],
) -> PolicyLoss:
    """Mean of -logprobs over the chosen tokens - beta logsigmoid(o_w - o_l), o = log(p / (1 - p)), p = e^m.

    beta is the paper's lambda. TRL's first term is over the prompt's tokens too.
    """
    return preference_loss(chosen_logprobs, rejected_logprobs, loss=losses.orpo(beta), **options)


def _tpo(beta: float, variant: str, label_smoothing: float, gamma: float) -> Loss:
    check.choice("variant", variant, ("sigmoid", "hinge", "ipo", "tpo-l"))
    if variant == "tpo-l":
        return losses.simpo(beta, gamma, label_smoothing=label_smoothing)
    return losses.cpo(beta, variant=variant, label_smoothing=label_smoothing, sft_weight=0.0)


@recipe(
    "TPO (triple preference optimization)",
    "arXiv 2405.16681",
    code="TRL experimental/tpo/tpo_trainer.py",
    build=_tpo,
)
def tpo(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    gold_logprobs: Tensor,
    *,
    gold_mask: Tensor | None = None,
    gold_cu_seqlens: Tensor | None = None,
    beta: float = 0.01,
    variant: str = "sigmoid",
    label_smoothing: float = 0.0,
    gamma: float = 0.5,
    nll_coef: float = 1.0,
    **options: Unpack[PairOptions],
) -> PolicyLoss:
    """-logsigmoid(beta (S_w - S_l)) + nll_coef * mean of -logprobs over the gold responses' tokens.

    gold_logprobs: of a third, better response to each prompt, [pairs, T], or [N] with gold_cu_seqlens; gradients flow
    to it too. variant "hinge" or "ipo" (on m): as of `recipes.cpo`; "tpo-l": -logsigmoid(beta (m_w - m_l) - gamma).
    Metrics are the pairs'.
    """
    loss = _tpo(beta, variant, label_smoothing, gamma)
    gold_logprobs = check.floats("gold_logprobs", gold_logprobs)
    gold_mask = check.mask(gold_mask, "gold_logprobs", gold_logprobs, "gold_mask")
    gold_cu_seqlens = token_bounds(gold_cu_seqlens, gold_logprobs, "gold_logprobs", "gold_cu_seqlens")
    pairs = preference_loss(chosen_logprobs, rejected_logprobs, loss=loss, **options)
    given = Tokens(gold_logprobs.shape, None, gold_cu_seqlens).rows
    wanted = Tokens(chosen_logprobs.shape, None, options.get("chosen_cu_seqlens")).rows
    if given != wanted:
        raise ValueError(f"gold_logprobs: expected a response for each of {wanted} pairs, got {given}")
    gold = policy_loss(
        gold_logprobs, None, None, gold_mask, loss=losses.sft(), cu_seqlens=gold_cu_seqlens,
        empty=options.get("empty", "raise"),
    )  # fmt: skip
    return replace(pairs, loss=pairs.loss + check.not_negative("nll_coef", nll_coef) * gold.loss)
