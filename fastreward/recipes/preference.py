"""Methods whose loss is one value per pair of a chosen and a rejected response.

S = sum of logprobs - ref_logprobs over a response's valid tokens, L their number, _w the chosen response, _l the
rejected one, z = beta (S_w - S_l). Every recipe takes the arguments of `fastreward.preference_loss`, passes its options
on and returns what it returns; parameters have their published values.
"""

from __future__ import annotations

from functools import partial
from typing import Unpack

import torch
from torch import Tensor

from fastreward import losses
from fastreward._loss_call.results import PolicyLoss
from fastreward.losses import Loss
from fastreward.losses.preference import FDivergence
from fastreward.preference_loss import preference_loss
from fastreward.recipes._catalogue.registry import recipe
from fastreward.recipes._shared.factory import pair_recipe
from fastreward.recipes._shared.options import PairOptions

__all__ = [
    "aot", "aot_unpaired", "apo_down", "apo_zero", "bco", "cdpo", "cream", "discopop", "dno", "dpo", "dpo_norm",
    "exo", "f_dpo", "gpo", "hinge_dpo", "ipo", "ld_dpo", "mah_dpo", "mm_dpo", "nca", "robust_dpo", "rpo", "sppo",
    "sppo_hard", "tgdpo", "treg", "wpo",
]  # fmt: skip

_TRL = "TRL dpo_trainer.py `_compute_loss`"


# --------------------------------------------------------------------------------------------------- DPO and variants
@pair_recipe("DPO (direct preference optimization)", "arXiv 2305.18290", code=_TRL)
def dpo(*, beta: float = 0.1, **options: Unpack[PairOptions]) -> Loss:
    """-logsigmoid(z), z = beta (S_w - S_l).

    With chosen_weights and rejected_weights, per token, S is the sum of weight * (logprobs - ref_logprobs).
    """
    return losses.dpo(beta)


@pair_recipe(
    "cDPO (conservative DPO)",
    "Mitchell 2023, ericmitchell.ai/cdpo.pdf",
    code="eric-mitchell/direct-preference-optimization trainers.py, as copied in pearls-lab/multiobj-align; " + _TRL,
)
def cdpo(*, beta: float = 0.1, label_smoothing: float = 0.1, **options: Unpack[PairOptions]) -> Loss:
    """-(1 - e) logsigmoid(z) - e logsigmoid(-z), e = label_smoothing: the share of flipped labels."""
    return losses.cdpo(beta, label_smoothing)


@pair_recipe("Robust DPO (provably robust to flipped labels)", "arXiv 2403.00409", code=_TRL + " (robust)")
def robust_dpo(*, beta: float = 0.1, label_smoothing: float = 0.1, **options: Unpack[PairOptions]) -> Loss:
    """(-(1 - e) logsigmoid(z) + e logsigmoid(-z)) / (1 - 2 e), e = label_smoothing: the share of flipped labels.

    e below 0.5; 0.1 is an example, TRL's default is 0, plain DPO.
    """
    return losses.dpo(beta, label_smoothing, "robust")


@pair_recipe("SLiC's hinge on DPO's margin (as in RSO)", "arXiv 2309.06657", code=_TRL + " (hinge)")
def hinge_dpo(*, beta: float = 0.1, **options: Unpack[PairOptions]) -> Loss:
    """max(0, 1 - z)."""
    return losses.dpo(beta, variant="hinge")


@pair_recipe("IPO (identity preference optimization)", "arXiv 2310.12036", code=_TRL + " (ipo)")
def ipo(*, beta: float = 0.1, **options: Unpack[PairOptions]) -> Loss:
    """(S_w / L_w - S_l / L_l - 1 / (2 beta))^2.

    beta: the paper's tau. S / L, as the authors advise; the paper's formula has S.
    """
    return losses.dpo(beta, variant="ipo")


@pair_recipe("EXO-pref (efficient exact optimization)", "arXiv 2402.00856", code=_TRL + " (exo_pair)")
def exo(*, beta: float = 0.1, label_smoothing: float = 1e-3, **options: Unpack[PairOptions]) -> Loss:
    """KL([sigmoid(z), sigmoid(-z)] || [1 - e, e]), e = label_smoothing."""
    return losses.dpo(beta, label_smoothing, "exo_pair")


@pair_recipe("NCA (noise contrastive alignment), pairs", "arXiv 2402.05369", code=_TRL + " (nca_pair)")
def nca(*, beta: float = 0.1, **options: Unpack[PairOptions]) -> Loss:
    """-logsigmoid(beta S_w) - logsigmoid(-beta S_w) / 2 - logsigmoid(-beta S_l) / 2."""
    return losses.dpo(beta, variant="nca_pair")


@pair_recipe(
    "BCO (binary classifier optimization), pairs",
    "arXiv 2404.04656",
    code=_TRL + " (bco_pair), which has no running mean of rewards",
)
def bco(*, beta: float = 0.1, **options: Unpack[PairOptions]) -> Loss:
    """-logsigmoid(beta S_w) - logsigmoid(-beta S_l).

    The paper also subtracts a running mean of the rewards from both.
    """
    return losses.dpo(beta, variant="bco_pair")


@pair_recipe("AOT (alignment via optimal transport), paired", "arXiv 2406.05882", code=_TRL + " (aot)")
def aot(*, beta: float = 0.1, label_smoothing: float = 0.0, **options: Unpack[PairOptions]) -> Loss:
    """-logsigmoid(beta (margin - ref margin of the same rank in the batch)), with label smoothing e.

    A pair's margin is its chosen less its rejected log-prob, under the policy and under the reference.
    """
    return losses.dpo(beta, label_smoothing, "aot")


@pair_recipe("AOT (alignment via optimal transport), unpaired", "arXiv 2406.05882", code=_TRL + " (aot_unpaired)")
def aot_unpaired(*, beta: float = 0.1, label_smoothing: float = 0.0, **options: Unpack[PairOptions]) -> Loss:
    """-logsigmoid(beta (S_w - S_l of the same rank in the batch)), with label smoothing e."""
    return losses.dpo(beta, label_smoothing, "aot_unpaired")


@pair_recipe("APO-zero (anchored preference optimization)", "arXiv 2408.06266", code=_TRL + " (apo_zero)")
def apo_zero(*, beta: float = 0.1, **options: Unpack[PairOptions]) -> Loss:
    """1 - sigmoid(beta S_w) + sigmoid(beta S_l).

    For a policy that is worse than the chosen responses: pulls them up and the rejected ones down.
    """
    return losses.dpo(beta, variant="apo_zero")


@pair_recipe("APO-down (anchored preference optimization)", "arXiv 2408.06266", code=_TRL + " (apo_down)")
def apo_down(*, beta: float = 0.1, **options: Unpack[PairOptions]) -> Loss:
    """sigmoid(beta S_w) + 1 - sigmoid(z).

    For a policy that is better than the chosen responses: pulls both down, the rejected one more.
    """
    return losses.dpo(beta, variant="apo_down")


@pair_recipe("SPPO with hard labels", "arXiv 2405.00675", code=_TRL + " (sppo_hard)")
def sppo_hard(*, beta: float = 0.1, **options: Unpack[PairOptions]) -> Loss:
    """(S_w - 1 / (2 beta))^2 + (S_l + 1 / (2 beta))^2."""
    return losses.dpo(beta, variant="sppo_hard")


@pair_recipe("DiscoPOP (discovered preference optimization)", "arXiv 2406.08414", code=_TRL + " (discopop)")
def discopop(*, beta: float = 0.1, discopop_tau: float = 0.05, **options: Unpack[PairOptions]) -> Loss:
    """-logsigmoid(z) (1 - sigmoid(z / tau)) + exp(-z) sigmoid(z / tau)."""
    return losses.dpo(beta, variant="discopop", discopop_tau=discopop_tau)


@pair_recipe("Length-normalised DPO (Tülu 3)", "arXiv 2411.15124", code=_TRL + " (sigmoid_norm)")
def dpo_norm(*, beta: float = 5.0, **options: Unpack[PairOptions]) -> Loss:
    """-logsigmoid(beta (S_w / L_w - S_l / L_l)).

    beta: Tülu 3's (from memory); with S / L it is larger than DPO's.
    """
    return losses.dpo(beta, variant="sigmoid_norm")


@pair_recipe(
    "f-DPO (DPO with other divergences)",
    "arXiv 2309.16240",
    code=_TRL + " (f_divergence_type)",
    settings={"f_divergence": "js"},
)
def f_dpo(*, f_divergence: FDivergence, beta: float = 0.1, alpha: float = 0.5, **options: Unpack[PairOptions]) -> Loss:
    """-logsigmoid(beta (f'(e^S_w) - f'(e^S_l))).

    f'(e^S) by f_divergence: "reverse_kl" S (plain DPO); "forward_kl" 1 - e^-S; "js" log 2 + logsigmoid(S); "alpha"
    (e^((alpha - 1) S) - 1) / (alpha - 1).
    """
    return losses.dpo(beta, f_divergence=f_divergence, alpha=alpha)


@recipe(
    "LD-DPO (length-desensitised DPO)",
    "arXiv 2409.06411",
    code=_TRL + " (ld_alpha)",
    build=losses.dpo,
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
        ref_chosen_logprobs=ref_chosen_logprobs,
        ref_rejected_logprobs=ref_rejected_logprobs,
    )


@pair_recipe("WPO (weighted preference optimization)", "arXiv 2406.11827", code=_TRL + " (use_weighting)")
def wpo(
    chosen_log_sum_sq_probs: Tensor,
    rejected_log_sum_sq_probs: Tensor,
    *,
    beta: float = 0.1,
    **options: Unpack[PairOptions],
) -> Loss:
    """DPO's loss times sg(w_w w_l), w = exp(mean of logprobs - log sum_v p_v^2) over the response.

    chosen_log_sum_sq_probs, rejected_log_sum_sq_probs: in the shape of the side's logprobs, an output of
    `token_logprobs` (outputs=("logprobs", "log_sum_sq_probs")).
    """
    return losses.dpo(beta, wpo=True)


# ------------------------------------------------------------------------------------------------ DPO with more terms
@pair_recipe(
    "RPO (regularised preference optimization)",
    "arXiv 2405.16436",
    code="YSLIU627/Regularized-Preference-Optimization rpo_trainer.py",
)
def rpo(*, beta: float = 0.05, eta: float = 0.005, **options: Unpack[PairOptions]) -> Loss:
    """DPO's loss - eta beta sum of logprobs over the chosen response.

    beta 0.05, eta 0.005: the authors' for Gemma; their 7B Zephyr model has beta 0.01.
    """
    return losses.rpo(beta, eta)


@pair_recipe(
    "CREAM (consistency-regularised self-rewarding)",
    "arXiv 2410.12735",
    code="Raibows/CREAM sft_dpo_trainer.py, cal_consistency.py",
)
def cream(consistency: Tensor, *, beta: float = 0.1, **options: Unpack[PairOptions]) -> Loss:
    """-c logsigmoid(z) - (1 - c) logsigmoid(-z), c the consistency of two rankings.

    consistency: [P], or one number for the data set: (Kendall's tau between the rankings by this and by the last
    iteration's model + 1) / 2.
    """
    return losses.cream(beta)


@pair_recipe("DNO (direct Nash optimization)", "arXiv 2404.03715", note="two notes that agree; no code is released")
def dno(
    win_rate_chosen: Tensor, win_rate_rejected: Tensor, *, beta: float = 0.1, **options: Unpack[PairOptions]
) -> Loss:
    """-c logsigmoid(z) - (1 - c) logsigmoid(-z), c = sigmoid(P_w - P_l).

    win_rate_chosen, win_rate_rejected [P]: expected win rate of each response against the current policy, which is the
    reference. beta: the paper's eta. DNO-Prct, what the authors ran, is `dpo` on pairs of a large margin.
    """
    return losses.dno(beta)


@recipe(
    "MM-DPO (MM-RLHF)",
    "arXiv 2502.10391",
    code="yfzhang114/MM-RLHF trl/trainer/dpo_trainer.py; the margin's formula from memory",
    build=partial(losses.mm_dpo, implicit_beta=True),
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
    return preference_loss(
        chosen_logprobs,
        rejected_logprobs,
        loss=loss,
        ref_chosen_logprobs=ref_chosen_logprobs,
        ref_rejected_logprobs=ref_rejected_logprobs,
        extra=extra,
        **options,
    )


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


@pair_recipe("SPPO (self-play preference optimization)", "arXiv 2405.00675", code="uclaml/SPPO sppo/trainer.py")
def sppo(
    win_rate_chosen: Tensor, win_rate_rejected: Tensor, *, beta: float = 1e-3, **options: Unpack[PairOptions]
) -> Loss:
    """((S_w - (P_w - 1/2) / beta)^2 + (S_l - (P_l - 1/2) / beta)^2) / 2.

    win_rate_chosen, win_rate_rejected [P]: each response's mean win probability against the group. 1 / beta: the
    paper's eta.
    """
    return losses.sppo(beta)


@pair_recipe(
    "GPO (general preference optimization)",
    "arXiv 2410.02197",
    code="general-preference/general-preference-model general_preference/models/loss.py",
)
def gpo(score_chosen: Tensor, score_rejected: Tensor, *, beta: float = 1e-3, **options: Unpack[PairOptions]) -> Loss:
    """((S_w - s_w / beta)^2 + (S_l - s_l / beta)^2) / 2: SPPO on preference scores.

    score_chosen, score_rejected [P]: the general preference model's score of the response over the others of its group,
    mean over these.
    """
    return losses.gpo(beta)


@pair_recipe(
    "MAH-DPO (multi-action-head DPO)",
    "arXiv 2510.01167",
    code="pearls-lab/multiobj-align mah_dpo/mahdpo_trainers.py",
    passes=("group_ids=dimensions",),
)
def mah_dpo(*, beta: float = 0.1, **options: Unpack[PairOptions]) -> Loss:
    """DPO's loss, mean over each reward dimension's pairs, then over the dimensions present.

    group_ids [P] are the pairs' dimensions; log-probs are those of the dimension's own head.
    """
    return losses.mah_dpo(beta)


@pair_recipe(
    "TGDPO (token-level reward guidance)",
    "arXiv 2506.14574",
    code="dvlab-research/TGDPO src/llamafactory/train/tgdpo/trainer.py",
)
def tgdpo(
    chosen_rm_logprobs: Tensor,
    rejected_rm_logprobs: Tensor,
    *,
    alpha: float = 0.5,
    beta: float = 0.1,
    **options: Unpack[PairOptions],
) -> Loss:
    """-logsigmoid(Z_w - Z_l), Z = sum of beta (1 +- alpha beta rho) (logprobs - ref_logprobs), + on the chosen side.

    rho = rm_logprobs - ref_logprobs; chosen_rm_logprobs, rejected_rm_logprobs: of a model trained by DPO or SimPO
    before, in the shape of the side's logprobs.
    """
    return losses.tgdpo(alpha, beta)


@pair_recipe(
    "T-REG (token-level reward regularisation)",
    "arXiv 2412.02685",
    note="notes on the paper; the authors' code was not found",
)
def treg(
    chosen_better_logprobs: Tensor,
    chosen_worse_logprobs: Tensor,
    rejected_better_logprobs: Tensor,
    rejected_worse_logprobs: Tensor,
    *,
    alpha: float = 0.25,
    beta: float = 0.1,
    **options: Unpack[PairOptions],
) -> Loss:
    """DPO's loss - alpha sg(sigmoid(-z)) sum of beta (sigmoid(better - worse) - 1/2) logprobs, over both responses.

    better, worse: the tokens' log-probs under prompts that ask for a better and for a worse response. alpha 0.1, 0.25
    or 0.5 in the paper. On SimPO instead of DPO: losses.treg(base="simpo").
    """
    return losses.treg(alpha, beta)
