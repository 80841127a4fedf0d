"""Methods over pairs of a chosen and a rejected response that have no reference policy.

m = mean of logprobs over a response's valid tokens, S = their sum, _w the chosen response, _l the rejected one. Every
recipe takes the arguments of `fastreward.preference_loss`, passes its options on and returns what it returns; its
parameters have their published values.
"""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from fastreward import losses
from fastreward._loss_call.results import PolicyLoss
from fastreward.preference_loss import preference_loss
from fastreward.recipes._catalogue.registry import recipe
from fastreward.recipes._shared.options import PairOptions

__all__ = ["alphapo", "cpo", "orpo", "simpo"]


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

    variant "hinge" or "ipo" (on m): DPO's of these names, without the reference. With beta 0.01, sft_weight 0 and the
    likelihood of a gold response beside it, `recipes.sft`, it is TPO (arXiv 2405.16681).
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
