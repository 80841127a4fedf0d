"""Methods whose loss is one value per pair of a chosen and a rejected response.

S = sum of logprobs - ref_logprobs over a response's counted tokens, L their number, _w the chosen response, _l the
rejected one, z = beta (S_w - S_l). Every recipe takes the arguments of `fastreward.preference_loss`, passes its options
on and returns what it returns; parameters have their published values.
"""

from __future__ import annotations

from typing import TypedDict, Unpack

import torch
from torch import Tensor

from fastreward import losses
from fastreward._loss_call.results import PolicyLoss
from fastreward.losses.preference import FDivergence
from fastreward.preference_loss import preference_loss
from fastreward.recipes._catalogue.registry import recipe
from fastreward.recipes._shared.options import PairOptions

_TRL = "TRL dpo_trainer.py `_compute_loss`"


class _Reference(TypedDict):
    ref_chosen_logprobs: Tensor
    ref_rejected_logprobs: Tensor


def _reference(chosen: Tensor, rejected: Tensor) -> _Reference:
    return {"ref_chosen_logprobs": chosen, "ref_rejected_logprobs": rejected}


# --------------------------------------------------------------------------------------------------- DPO and variants
@recipe("preference", "DPO (direct preference optimization)", "arXiv 2305.18290", "code", _TRL, definition=losses.dpo)
def dpo(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    *,
    beta: float = 0.1,
    **options: Unpack[PairOptions],
) -> PolicyLoss:
    """-logsigmoid(z), z = beta (S_w - S_l).

    With chosen_weights and rejected_weights, per token, S is the sum of weight * (logprobs - ref_logprobs).
    """
    refs = _reference(ref_chosen_logprobs, ref_rejected_logprobs)
    return preference_loss(chosen_logprobs, rejected_logprobs, loss=losses.dpo(beta), **refs, **options)


@recipe(
    "preference",
    "cDPO (conservative DPO)",
    "Mitchell 2023, ericmitchell.ai/cdpo.pdf",
    "code",
    "eric-mitchell/direct-preference-optimization trainers.py, as copied in pearls-lab/multiobj-align; " + _TRL,
    definition=losses.cdpo,
)
def cdpo(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.1,
    **options: Unpack[PairOptions],
) -> PolicyLoss:
    """-(1 - e) logsigmoid(z) - e logsigmoid(-z), e = label_smoothing: the share of flipped labels."""
    refs = _reference(ref_chosen_logprobs, ref_rejected_logprobs)
    return preference_loss(
        chosen_logprobs, rejected_logprobs, loss=losses.cdpo(beta, label_smoothing), **refs, **options
    )


@recipe(
    "preference",
    "Robust DPO (provably robust to flipped labels)",
    "arXiv 2403.00409",
    "code",
    _TRL + " (robust)",
    definition=losses.dpo,
    fixed={"variant": "robust"},
)
def robust_dpo(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.1,
    **options: Unpack[PairOptions],
) -> PolicyLoss:
    """(-(1 - e) logsigmoid(z) + e logsigmoid(-z)) / (1 - 2 e), e = label_smoothing: the share of flipped labels.

    e below 0.5; 0.1 is an example, TRL's default is 0, plain DPO.
    """
    refs = _reference(ref_chosen_logprobs, ref_rejected_logprobs)
    return preference_loss(
        chosen_logprobs, rejected_logprobs, loss=losses.dpo(beta, label_smoothing, "robust"), **refs, **options
    )


@recipe(
    "preference",
    "SLiC's hinge on DPO's margin (as in RSO)",
    "arXiv 2309.06657",
    "code",
    _TRL + " (hinge)",
    definition=losses.dpo,
    fixed={"variant": "hinge"},
)
def hinge_dpo(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    *,
    beta: float = 0.1,
    **options: Unpack[PairOptions],
) -> PolicyLoss:
    """max(0, 1 - z)."""
    refs = _reference(ref_chosen_logprobs, ref_rejected_logprobs)
    return preference_loss(
        chosen_logprobs, rejected_logprobs, loss=losses.dpo(beta, variant="hinge"), **refs, **options
    )


@recipe(
    "preference",
    "IPO (identity preference optimization)",
    "arXiv 2310.12036",
    "code",
    _TRL + " (ipo)",
    definition=losses.dpo,
    fixed={"variant": "ipo"},
)
def ipo(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    *,
    beta: float = 0.1,
    **options: Unpack[PairOptions],
) -> PolicyLoss:
    """(S_w / L_w - S_l / L_l - 1 / (2 beta))^2.

    beta: the paper's tau. S / L, as the authors advise; the paper's formula has S.
    """
    refs = _reference(ref_chosen_logprobs, ref_rejected_logprobs)
    return preference_loss(chosen_logprobs, rejected_logprobs, loss=losses.dpo(beta, variant="ipo"), **refs, **options)


@recipe(
    "preference",
    "EXO-pref (efficient exact optimization)",
    "arXiv 2402.00856",
    "code",
    _TRL + " (exo_pair)",
    definition=losses.dpo,
    fixed={"variant": "exo_pair"},
)
def exo(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 1e-3,
    **options: Unpack[PairOptions],
) -> PolicyLoss:
    """KL([sigmoid(z), sigmoid(-z)] || [1 - e, e]), e = label_smoothing."""
    refs = _reference(ref_chosen_logprobs, ref_rejected_logprobs)
    return preference_loss(
        chosen_logprobs, rejected_logprobs, loss=losses.dpo(beta, label_smoothing, "exo_pair"), **refs, **options
    )


@recipe(
    "preference",
    "NCA (noise contrastive alignment), pairs",
    "arXiv 2402.05369",
    "code",
    _TRL + " (nca_pair)",
    definition=losses.dpo,
    fixed={"variant": "nca_pair"},
)
def nca(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    *,
    beta: float = 0.1,
    **options: Unpack[PairOptions],
) -> PolicyLoss:
    """-logsigmoid(beta S_w) - logsigmoid(-beta S_w) / 2 - logsigmoid(-beta S_l) / 2."""
    refs = _reference(ref_chosen_logprobs, ref_rejected_logprobs)
    return preference_loss(
        chosen_logprobs, rejected_logprobs, loss=losses.dpo(beta, variant="nca_pair"), **refs, **options
    )


@recipe(
    "preference",
    "BCO (binary classifier optimization), pairs",
    "arXiv 2404.04656",
    "code",
    _TRL + " (bco_pair), which has no running mean of rewards",
    definition=losses.dpo,
    fixed={"variant": "bco_pair"},
)
def bco(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    *,
    beta: float = 0.1,
    **options: Unpack[PairOptions],
) -> PolicyLoss:
    """-logsigmoid(beta S_w) - logsigmoid(-beta S_l).

    The paper also subtracts a running mean of the rewards from both.
    """
    refs = _reference(ref_chosen_logprobs, ref_rejected_logprobs)
    return preference_loss(
        chosen_logprobs, rejected_logprobs, loss=losses.dpo(beta, variant="bco_pair"), **refs, **options
    )


@recipe(
    "preference",
    "AOT (alignment via optimal transport), paired",
    "arXiv 2406.05882",
    "code",
    _TRL + " (aot)",
    definition=losses.dpo,
    fixed={"variant": "aot"},
)
def aot(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    **options: Unpack[PairOptions],
) -> PolicyLoss:
    """-logsigmoid(beta (margin - ref margin of the same rank in the batch)), with label smoothing e.

    A pair's margin is its chosen less its rejected log-prob, under the policy and under the reference.
    """
    refs = _reference(ref_chosen_logprobs, ref_rejected_logprobs)
    return preference_loss(
        chosen_logprobs, rejected_logprobs, loss=losses.dpo(beta, label_smoothing, "aot"), **refs, **options
    )


@recipe(
    "preference",
    "AOT (alignment via optimal transport), unpaired",
    "arXiv 2406.05882",
    "code",
    _TRL + " (aot_unpaired)",
    definition=losses.dpo,
    fixed={"variant": "aot_unpaired"},
)
def aot_unpaired(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    **options: Unpack[PairOptions],
) -> PolicyLoss:
    """-logsigmoid(beta (S_w - S_l of the same rank in the batch)), with label smoothing e."""
    refs = _reference(ref_chosen_logprobs, ref_rejected_logprobs)
    return preference_loss(
        chosen_logprobs, rejected_logprobs, loss=losses.dpo(beta, label_smoothing, "aot_unpaired"), **refs, **options
    )


@recipe(
    "preference",
    "APO-zero (anchored preference optimization)",
    "arXiv 2408.06266",
    "code",
    _TRL + " (apo_zero)",
    definition=losses.dpo,
    fixed={"variant": "apo_zero"},
)
def apo_zero(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    *,
    beta: float = 0.1,
    **options: Unpack[PairOptions],
) -> PolicyLoss:
    """1 - sigmoid(beta S_w) + sigmoid(beta S_l).

    For a policy that is worse than the chosen responses: pulls them up and the rejected ones down.
    """
    refs = _reference(ref_chosen_logprobs, ref_rejected_logprobs)
    return preference_loss(
        chosen_logprobs, rejected_logprobs, loss=losses.dpo(beta, variant="apo_zero"), **refs, **options
    )


@recipe(
    "preference",
    "APO-down (anchored preference optimization)",
    "arXiv 2408.06266",
    "code",
    _TRL + " (apo_down)",
    definition=losses.dpo,
    fixed={"variant": "apo_down"},
)
def apo_down(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    *,
    beta: float = 0.1,
    **options: Unpack[PairOptions],
) -> PolicyLoss:
    """sigmoid(beta S_w) + 1 - sigmoid(z).

    For a policy that is better than the chosen responses: pulls both down, the rejected one more.
    """
    refs = _reference(ref_chosen_logprobs, ref_rejected_logprobs)
    return preference_loss(
        chosen_logprobs, rejected_logprobs, loss=losses.dpo(beta, variant="apo_down"), **refs, **options
    )


@recipe(
    "preference",
    "SPPO with hard labels",
    "arXiv 2405.00675",
    "code",
    _TRL + " (sppo_hard)",
    definition=losses.dpo,
    fixed={"variant": "sppo_hard"},
)
def sppo_hard(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    *,
    beta: float = 0.1,
    **options: Unpack[PairOptions],
) -> PolicyLoss:
    """(S_w - 1 / (2 beta))^2 + (S_l + 1 / (2 beta))^2."""
    refs = _reference(ref_chosen_logprobs, ref_rejected_logprobs)
    return preference_loss(
        chosen_logprobs, rejected_logprobs, loss=losses.dpo(beta, variant="sppo_hard"), **refs, **options
    )


@recipe(
    "preference",
    "DiscoPOP (discovered preference optimization)",
    "arXiv 2406.08414",
    "code",
    _TRL + " (discopop)",
    definition=losses.dpo,
    fixed={"variant": "discopop"},
)
def discopop(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    *,
    beta: float = 0.1,
    discopop_tau: float = 0.05,
    **options: Unpack[PairOptions],
) -> PolicyLoss:
    """-logsigmoid(z) (1 - sigmoid(z / tau)) + exp(-z) sigmoid(z / tau)."""
    refs = _reference(ref_chosen_logprobs, ref_rejected_logprobs)
    return preference_loss(
        chosen_logprobs,
        rejected_logprobs,
        loss=losses.dpo(beta, variant="discopop", discopop_tau=discopop_tau),
        **refs,
        **options,
    )


@recipe(
    "preference",
    "Length-normalised DPO (Tülu 3)",
    "arXiv 2411.15124",
    "code",
    _TRL + " (sigmoid_norm)",
    definition=losses.dpo,
    fixed={"variant": "sigmoid_norm"},
)
def dpo_norm(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    *,
    beta: float = 5.0,
    **options: Unpack[PairOptions],
) -> PolicyLoss:
    """-logsigmoid(beta (S_w / L_w - S_l / L_l)).

    beta: Tülu 3's (from memory); with S / L it is larger than DPO's.
    """
    refs = _reference(ref_chosen_logprobs, ref_rejected_logprobs)
    return preference_loss(
        chosen_logprobs, rejected_logprobs, loss=losses.dpo(beta, variant="sigmoid_norm"), **refs, **options
    )


@recipe(
    "preference",
    "f-DPO (DPO with other divergences)",
    "arXiv 2309.16240",
    "code",
    _TRL + " (f_divergence_type)",
    definition=losses.dpo,
    settings={"f_divergence": "js"},
)
def f_dpo(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    *,
    f_divergence: FDivergence,
    beta: float = 0.1,
    alpha: float = 0.5,
    **options: Unpack[PairOptions],
) -> PolicyLoss:
    """-logsigmoid(beta (f'(e^S_w) - f'(e^S_l))).

    f'(e^S) by f_divergence: "reverse_kl" S (plain DPO); "forward_kl" 1 - e^-S; "js" log 2 + logsigmoid(S); "alpha"
    (e^((alpha - 1) S) - 1) / (alpha - 1).
    """
    refs = _reference(ref_chosen_logprobs, ref_rejected_logprobs)
    return preference_loss(
        chosen_logprobs,
        rejected_logprobs,
        loss=losses.dpo(beta, f_divergence=f_divergence, alpha=alpha),
        **refs,
        **options,
    )


@recipe(
    "preference",
    "LD-DPO (length-desensitised DPO)",
    "arXiv 2409.06411",
    "code",
    _TRL + " (ld_alpha)",
    definition=losses.dpo,
    settings={"ld_alpha": 0.5},
)
def ld_dpo(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
    *,
    ld_alpha: float,
    beta: float = 0.1,
    weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    return_pair_loss: bool = False,
) -> PolicyLoss:
    """DPO's loss, tokens beyond the shorter response's length weighed by ld_alpha in S.

    Padded [P, T] only; `losses.ld_dpo_weights` makes the weights. ld_alpha 1 is plain DPO, 0 cuts the longer response.
    """
    chosen_weights, rejected_weights = losses.ld_dpo_weights(chosen_mask, rejected_mask, ld_alpha)
    return preference_loss(
        chosen_logprobs,
        rejected_logprobs,
        loss=losses.dpo(beta),
        chosen_mask=chosen_mask,
        rejected_mask=rejected_mask,
        chosen_weights=chosen_weights,
        rejected_weights=rejected_weights,
        weights=weights,
        normalizer=normalizer,
        return_pair_loss=return_pair_loss,
        **_reference(ref_chosen_logprobs, ref_rejected_logprobs),
    )


@recipe(
    "preference",
    "WPO (weighted preference optimization)",
    "arXiv 2406.11827",
    "code",
    _TRL + " (use_weighting)",
    definition=losses.dpo,
    fixed={"wpo": True},
)
def wpo(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    chosen_log_sum_sq_probs: Tensor,
    rejected_log_sum_sq_probs: Tensor,
    *,
    beta: float = 0.1,
    **options: Unpack[PairOptions],
) -> PolicyLoss:
    """DPO's loss times sg(w_w w_l), w = exp(mean of logprobs - log sum_v p_v^2) over the response.

    chosen_log_sum_sq_probs, rejected_log_sum_sq_probs: in the shape of the side's logprobs, an output of
    `token_logprobs` (outputs=("logprobs", "log_sum_sq_probs")).
    """
    refs = _reference(ref_chosen_logprobs, ref_rejected_logprobs)
    return preference_loss(
        chosen_logprobs,
        rejected_logprobs,
        loss=losses.dpo(beta, wpo=True),
        chosen_extra={"log_sum_sq_probs": chosen_log_sum_sq_probs},
        rejected_extra={"log_sum_sq_probs": rejected_log_sum_sq_probs},
        **refs,
        **options,
    )


# -------------------------------------------------------------------------------------------------- without reference
@recipe(
    "preference",
    "SimPO (simple preference optimization)",
    "arXiv 2405.14734",
    "code",
    "princeton-nlp/SimPO scripts/simpo_trainer.py, TRL cpo_trainer.py",
    definition=losses.simpo,
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


# ------------------------------------------------------------------------------------------------ DPO with more terms
@recipe(
    "preference",
    "RPO (regularised preference optimization)",
    "arXiv 2405.16436",
    "code",
    "YSLIU627/Regularized-Preference-Optimization rpo_trainer.py",
    definition=losses.rpo,
)
def rpo(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    *,
    beta: float = 0.05,
    eta: float = 0.005,
    **options: Unpack[PairOptions],
) -> PolicyLoss:
    """DPO's loss - eta beta sum of logprobs over the chosen response.

    beta 0.05, eta 0.005: the authors' for Gemma; their 7B Zephyr model has beta 0.01.
    """
    refs = _reference(ref_chosen_logprobs, ref_rejected_logprobs)
    return preference_loss(chosen_logprobs, rejected_logprobs, loss=losses.rpo(beta, eta), **refs, **options)


@recipe(
    "preference",
    "CREAM (consistency-regularised self-rewarding)",
    "arXiv 2410.12735",
    "code",
    "Raibows/CREAM sft_dpo_trainer.py, cal_consistency.py",
    definition=losses.cream,
)
def cream(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    consistency: Tensor,
    *,
    beta: float = 0.1,
    **options: Unpack[PairOptions],
) -> PolicyLoss:
    """-c logsigmoid(z) - (1 - c) logsigmoid(-z), c the consistency of two rankings.

    consistency: [P], or one number for the data set: (Kendall's tau between the rankings by this and by the last
    iteration's model + 1) / 2.
    """
    refs = _reference(ref_chosen_logprobs, ref_rejected_logprobs)
    return preference_loss(
        chosen_logprobs,
        rejected_logprobs,
        loss=losses.cream(beta),
        extra={"consistency": consistency},
        **refs,
        **options,
    )


@recipe(
    "preference",
    "DNO (direct Nash optimization)",
    "arXiv 2404.03715",
    "note",
    "two notes that agree; no code is released",
    definition=losses.dno,
)
def dno(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    win_rate_chosen: Tensor,
    win_rate_rejected: Tensor,
    *,
    beta: float = 0.1,
    **options: Unpack[PairOptions],
) -> PolicyLoss:
    """-c logsigmoid(z) - (1 - c) logsigmoid(-z), c = sigmoid(P_w - P_l).

    win_rate_chosen, win_rate_rejected [P]: expected win rate of each response against the current policy, which is the
    reference. beta: the paper's eta. DNO-Prct, what the authors ran, is `dpo` on pairs of a large margin.
    """
    refs = _reference(ref_chosen_logprobs, ref_rejected_logprobs)
    return preference_loss(
        chosen_logprobs,
        rejected_logprobs,
        loss=losses.dno(beta),
        extra={"win_rate_chosen": win_rate_chosen, "win_rate_rejected": win_rate_rejected},
        **refs,
        **options,
    )


@recipe(
    "preference",
    "MM-DPO (MM-RLHF)",
    "arXiv 2502.10391",
    "code",
    "yfzhang114/MM-RLHF trl/trainer/dpo_trainer.py; the margin's formula from memory",
    definition=losses.mm_dpo,
    fixed={"implicit_beta": True},
)
def mm_dpo(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    *,
    margin: Tensor | None = None,
    selected: Tensor | None = None,
    beta: float = 0.1,
    weight: float = 0.1,
    k: float = 0.5,
    sft_weight: float = 0.0,
    generator: torch.Generator | None = None,
    **options: Unpack[PairOptions],
) -> PolicyLoss:
    """-logsigmoid(b (S_w - S_l)), b = max(beta (1 + weight x), 1e-3), x by the margin.

    margin [P], of the pair's rewards: x = 1 - exp(-k margin), the paper's. None, what the released code always does:
    one x for the batch, the mean of D = S_w - S_l over the selected pairs less its mean over all. selected [P]: which;
    None: 0.8 P of them are drawn here (from `generator`) without replacement, with weights exp(-((D - mean) / std)^2 /
    2); padded inputs only. Their draw is over all ranks.
    """
    refs = _reference(ref_chosen_logprobs, ref_rejected_logprobs)
    loss = losses.mm_dpo(beta, weight, sft_weight=sft_weight, implicit_beta=margin is None)
    if margin is not None:
        extra = {"margin_factor": -torch.expm1(-k * margin)}
    elif selected is not None:
        extra = {"selected": selected}
    else:
        if chosen_logprobs.ndim != 2:
            raise ValueError("selected: needed for packed sequences, of which no pairs are drawn here")
        chosen = _log_ratios(chosen_logprobs, ref_chosen_logprobs, options.get("chosen_mask"))
        rejected = _log_ratios(rejected_logprobs, ref_rejected_logprobs, options.get("rejected_mask"))
        extra = {"selected": _near_the_mean(chosen - rejected, 0.8, generator)}
    return preference_loss(chosen_logprobs, rejected_logprobs, loss=loss, extra=extra, **refs, **options)


@torch.no_grad()
def _log_ratios(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor | None) -> Tensor:
    """S [P]."""
    gap = logprobs - ref_logprobs
    return (gap if mask is None else torch.where(mask != 0, gap, 0.0)).sum(-1)


def _near_the_mean(x: Tensor, share: float, generator: torch.Generator | None) -> Tensor:
    """1 for that share of [P], drawn without replacement, weights a normal distribution's density; else 0."""
    z = (x - x.mean()) / ((x.std() if len(x) > 1 else 0.0) + 1e-7)
    # The largest of log weight + Gumbel noise are such a draw, and no host reads a number for it.
    noise = torch.empty_like(x).exponential_(generator=generator).log()
    drawn = (-0.5 * z * z - noise).topk(int(share * len(x)) or len(x)).indices
    return torch.zeros_like(x).index_fill(0, drawn, 1.0)


@recipe(
    "preference",
    "SPPO (self-play preference optimization)",
    "arXiv 2405.00675",
    "code",
    "uclaml/SPPO sppo/trainer.py",
    definition=losses.sppo,
)
def sppo(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    win_rate_chosen: Tensor,
    win_rate_rejected: Tensor,
    *,
    beta: float = 1e-3,
    **options: Unpack[PairOptions],
) -> PolicyLoss:
    """((S_w - (P_w - 1/2) / beta)^2 + (S_l - (P_l - 1/2) / beta)^2) / 2.

    win_rate_chosen, win_rate_rejected [P]: each response's mean win probability against the group. 1 / beta: the
    paper's eta.
    """
    refs = _reference(ref_chosen_logprobs, ref_rejected_logprobs)
    return preference_loss(
        chosen_logprobs,
        rejected_logprobs,
        loss=losses.sppo(beta),
        extra={"win_rate_chosen": win_rate_chosen, "win_rate_rejected": win_rate_rejected},
        **refs,
        **options,
    )


@recipe(
    "preference",
    "GPO (general preference optimization)",
    "arXiv 2410.02197",
    "code",
    "general-preference/general-preference-model general_preference/models/loss.py",
    definition=losses.gpo,
)
def gpo(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    score_chosen: Tensor,
    score_rejected: Tensor,
    *,
    beta: float = 1e-3,
    **options: Unpack[PairOptions],
) -> PolicyLoss:
    """((S_w - s_w / beta)^2 + (S_l - s_l / beta)^2) / 2: SPPO on preference scores.

    score_chosen, score_rejected [P]: the general preference model's score of the response over the others of its group,
    mean over these.
    """
    refs = _reference(ref_chosen_logprobs, ref_rejected_logprobs)
    return preference_loss(
        chosen_logprobs,
        rejected_logprobs,
        loss=losses.gpo(beta),
        extra={"score_chosen": score_chosen, "score_rejected": score_rejected},
        **refs,
        **options,
    )


@recipe(
    "preference",
    "MAH-DPO (multi-action-head DPO)",
    "arXiv 2510.01167",
    "code",
    "pearls-lab/multiobj-align mah_dpo/mahdpo_trainers.py",
    definition=losses.mah_dpo,
    passes=("group_ids=dimensions",),
)
def mah_dpo(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    *,
    beta: float = 0.1,
    **options: Unpack[PairOptions],
) -> PolicyLoss:
    """DPO's loss, mean over each reward dimension's pairs, then over the dimensions present.

    group_ids [P] are the pairs' dimensions; log-probs are those of the dimension's own head.
    """
    refs = _reference(ref_chosen_logprobs, ref_rejected_logprobs)
    return preference_loss(chosen_logprobs, rejected_logprobs, loss=losses.mah_dpo(beta), **refs, **options)


@recipe(
    "preference",
    "TGDPO (token-level reward guidance)",
    "arXiv 2506.14574",
    "code",
    "dvlab-research/TGDPO src/llamafactory/train/tgdpo/trainer.py",
    definition=losses.tgdpo,
)
def tgdpo(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    chosen_rm_logprobs: Tensor,
    rejected_rm_logprobs: Tensor,
    *,
    alpha: float = 0.5,
    beta: float = 0.1,
    **options: Unpack[PairOptions],
) -> PolicyLoss:
    """-logsigmoid(Z_w - Z_l), Z = sum of beta (1 +- alpha beta rho) (logprobs - ref_logprobs), + on the chosen side.

    rho = rm_logprobs - ref_logprobs; chosen_rm_logprobs, rejected_rm_logprobs: of a model trained by DPO or SimPO
    before, in the shape of the side's logprobs.
    """
    refs = _reference(ref_chosen_logprobs, ref_rejected_logprobs)
    return preference_loss(
        chosen_logprobs,
        rejected_logprobs,
        loss=losses.tgdpo(alpha, beta),
        chosen_extra={"rm_logprob": chosen_rm_logprobs},
        rejected_extra={"rm_logprob": rejected_rm_logprobs},
        **refs,
        **options,
    )


@recipe(
    "preference",
    "T-REG (token-level reward regularisation)",
    "arXiv 2412.02685",
    "note",
    "notes on the paper; the authors' code was not found",
    definition=losses.treg,
)
def treg(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    chosen_better_logprobs: Tensor,
    chosen_worse_logprobs: Tensor,
    rejected_better_logprobs: Tensor,
    rejected_worse_logprobs: Tensor,
    *,
    alpha: float = 0.25,
    beta: float = 0.1,
    **options: Unpack[PairOptions],
) -> PolicyLoss:
    """DPO's loss - alpha sg(sigmoid(-z)) sum of beta (sigmoid(better - worse) - 1/2) logprobs, over both responses.

    better, worse: the tokens' log-probs under prompts that ask for a better and for a worse response. alpha 0.1, 0.25
    or 0.5 in the paper. On SimPO instead of DPO: losses.treg(base="simpo").
    """
    return preference_loss(
        chosen_logprobs,
        rejected_logprobs,
        loss=losses.treg(alpha, beta),
        chosen_extra={"better_logprob": chosen_better_logprobs, "worse_logprob": chosen_worse_logprobs},
        rejected_extra={"better_logprob": rejected_better_logprobs, "worse_logprob": rejected_worse_logprobs},
        **_reference(ref_chosen_logprobs, ref_rejected_logprobs),
        **options,
    )
