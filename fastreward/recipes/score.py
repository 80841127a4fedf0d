"""Policy losses of the form -weight * logprob, the weight a constant, and of distillation.

r = exp(lp - old_lp), lp = logprobs, A = advantages, sg = stop_gradient. Every recipe takes the arguments of
`fastreward.policy_loss`, passes its options on and returns what it returns; parameters have their published values.
A response whose reward is NaN was not scored, and is left out.
"""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from fastreward import losses
from fastreward._arguments.options import Aggregation
from fastreward._loss_call.results import PolicyLoss
from fastreward.losses import Loss
from fastreward.policy_loss import policy_loss
from fastreward.recipes._catalogue.registry import recipe
from fastreward.recipes._shared.factory import policy_recipe
from fastreward.recipes._shared.options import LossOptions, PolicyOptions, add_extra, keep_also, scored

__all__ = [
    "cispo", "dft", "dispo", "dppo_kl", "dppo_tv", "dro", "gpg_loss", "kimi_k1_5", "kpop", "raft", "reinforce", "sdpo",
    "sdpo_topk", "sft", "topr", "vespo",
]  # fmt: skip

_TRL = "TRL grpo_trainer.py `_compute_loss`"


@policy_recipe(
    "CISPO (MiniMax-M1)",
    "arXiv 2506.13585",
    code=f'verl core_algos.py `compute_policy_loss_cispo`, {_TRL} (loss_type "cispo")',
)
def cispo(
    *, clip_low: float = 0.2, clip_high: float = 0.2, convention: str = "verl", **options: Unpack[LossOptions]
) -> Loss:
    """-sg(clip(r, 1 - clip_low, 1 + clip_high)) A lp: the weight is clipped, no token loses its gradient.

    The paper's own runs set clip_low to 1, no lower bound. convention: "verl" as above; "trl" r <= clip_high (ScaleRL,
    arXiv 2510.13786, recommends 5.0); "tinker" r in [clip_low, clip_high]. Advantages: GRPO's,
    `group_advantages(rewards, ...)`.
    """
    return losses.cispo(clip_low, clip_high, convention)


@policy_recipe(
    "DISPO (CISPO with bounds by the sign of A)",
    "arXiv 2602.00983",
    note="two independent notes that agree; no code is released",
)
def dispo(
    *,
    pos_low: float = 0.2,
    pos_high: float = 10.0,
    neg_low: float = 1.0,
    neg_high: float = 100.0,
    **options: Unpack[LossOptions],
) -> Loss:
    """-sg(clip(r, 1 - low, 1 + high)) A lp, (low, high) by the sign of A.

    Advantages: GRPO's, `group_advantages(rewards, ...)`, of rewards with DAPO's overlong penalty; groups whose rewards
    are all equal are sampled anew, or left out: keep=...
    """
    return losses.dispo(pos_low, pos_high, neg_low, neg_high)


@policy_recipe(
    "DPPO (divergence PPO) with the binary total variation",
    "arXiv 2602.04879",
    code="verl core_algos.py `compute_policy_loss_dppo_tv`, sail-sg/Stable-RL core_algos.py",
)
def dppo_tv(*, low: float = 0.2, high: float = 0.2, cap: float = 20.0, **options: Unpack[LossOptions]) -> Loss:
    """-A sg(min(r, cap)) lp while p - q <= high (A > 0) or p - q >= -low (A <= 0), else 0.

    p, q: the token's new and old probability. The authors' own code has cap 10. Advantages: GRPO's,
    `group_advantages(rewards, ...)`.
    """
    return losses.dppo_tv(low, high, cap)


@policy_recipe(
    "DPPO (divergence PPO) with the binary KL",
    "arXiv 2602.04879",
    code="verl core_algos.py `compute_policy_loss_dppo_kl`, sail-sg/Stable-RL core_algos.py",
)
def dppo_kl(*, low: float = 0.2, high: float = 0.2, cap: float = 20.0, **options: Unpack[LossOptions]) -> Loss:
    """-A sg(min(r, cap)) lp while KL <= high or p <= q (A > 0), KL <= low or p >= q (A <= 0), else 0.

    KL = q log(q / p) + (1 - q) log((1 - q) / (1 - p)), p and q the token's new and old probability. Advantages: GRPO's,
    `group_advantages(rewards, ...)`.
    """
    return losses.dppo_kl(low, high, cap)


@policy_recipe(
    "KPop (a trust region in both directions of the binary KL)",
    "Guo et al., ringtech.notion.site/kpop",
    note="AReaL's pull request 1405, merged, and prime-rl's 3283, open, as they quote formula and clamp",
)
def kpop(*, threshold: float = 0.1, **options: Unpack[LossOptions]) -> Loss:
    """-A r while KL(p || q) <= threshold and KL(q || p) <= threshold, else 0.

    Of the distributions "this token or another", p the new probability, q that of the engine that wrote the rollouts,
    whose log-probs old_logprobs are. Every token stays in the mean. Advantages: GRPO's.
    """
    return losses.kpop(threshold)


@policy_recipe(
    "TOPR (tapered off-policy REINFORCE)",
    "arXiv 2503.14286",
    note="the token form of ROLL actor_pg_worker.py, by a third-party formula page; the paper's weight is a sequence's",
)
def topr(**options: Unpack[LossOptions]) -> Loss:
    """-A lp where A > 0, else -sg(min(r, 1)) A lp.

    Right answers teach at full weight whoever wrote them, wrong ones only as far as the policy still writes them.
    """
    return losses.topr()


@policy_recipe(
    "Kimi k1.5's policy mirror descent, per token",
    "arXiv 2501.12599",
    note="ROLL actor_pg_worker.py by a third-party formula page, which gives tau no default",
    settings={"tau": 0.1},
)
def kimi_k1_5(*, tau: float, **options: Unpack[LossOptions]) -> Loss:
    """-A lp + tau (lp - old_lp)^2 / 2: DRO's loss.

    Advantages: reward - group mean, `group_advantages(rewards, ..., scale="none")`.
    """
    return losses.dro(tau)


@policy_recipe(
    "DRO (direct reward optimization), per token",
    "arXiv 2405.19107",
    code="verl core_algos.py `compute_policy_loss_dro`",
    settings={"beta": 0.1},
)
def dro(*, beta: float, **options: Unpack[LossOptions]) -> Loss:
    """-(A lp - beta (lp - old_lp)^2 / 2).

    A quadratic pull to the old policy in the place of a clip. verl gives beta no default.
    """
    return losses.dro(beta)


@policy_recipe(
    "VESPO (variational sequence-level soft policy optimization)",
    "arXiv 2602.10693",
    code="TRL grpo_trainer.py `get_gamma_weights`",
)
def vespo(
    *,
    k_pos: float = 2.0,
    lambda_pos: float = 3.0,
    k_neg: float = 3.0,
    lambda_neg: float = 2.0,
    **options: Unpack[LossOptions],
) -> Loss:
    """-sg(phi) A lp, phi = exp(lambda + k log W - lambda W), W the sequence's ratio.

    log W = sum of lp - old_lp over the sequence, and of the logarithms of weights= (rollout importance weights), where
    passed; (k, lambda) by the sign of A. Advantages: GRPO's, `group_advantages(rewards, ...)`.
    """
    return losses.vespo(k_pos, lambda_pos, k_neg, lambda_neg)


# ---------------------------------------------------------------------------------------------- log-prob times a weight
@recipe(
    "REINFORCE",
    "Williams 1992, doi.org/10.1007/BF00992696",
    code="verl core_algos.py `compute_policy_loss_reinforce`",
    build=losses.reinforce,
)
def reinforce(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    aggregation: Aggregation = "seq-mean-token-sum",
    **options: Unpack[PolicyOptions],
) -> PolicyLoss:
    """-A lp, times weights= where passed (rollout importance weights).

    old_logprobs go into the metrics alone. Advantages: any.
    """
    loss = losses.reinforce()
    return policy_loss(logprobs, old_logprobs, advantages, mask, loss=loss, aggregation=aggregation, **options)


@recipe(
    "GPG's loss (group policy gradient)",
    "arXiv 2504.02546",
    code="AMAP-ML/GPG grpo_trainer.py, verl core_algos.py `compute_policy_loss_gpg`",
    build=losses.gpg,
    advantages='scale="none"',
)
def gpg_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    aggregation: Aggregation = "seq-mean-token-mean",
    **options: Unpack[PolicyOptions],
) -> PolicyLoss:
    """-A lp: no ratio, no clip, no reference.

    old_logprobs go into the metrics alone. Advantages: (reward - group mean) * samples / samples of groups whose
    rewards differ, `group_advantages(rewards, ..., scale="none")` times that; the name `gpg` is kept for these.
    """
    loss = losses.gpg()
    return policy_loss(logprobs, old_logprobs, advantages, mask, loss=loss, aggregation=aggregation, **options)


@recipe(
    "SFT (supervised fine-tuning)",
    "common knowledge",
    code='TRL dpo_trainer.py `_compute_loss` (loss_type "sft")',
    build=losses.sft,
)
def sft(
    logprobs: Tensor,
    mask: Tensor | None = None,
    *,
    aggregation: Aggregation = "token-mean",
    **options: Unpack[PolicyOptions],
) -> PolicyLoss:
    """-lp, mean over all tokens."""
    return policy_loss(logprobs, None, None, mask, loss=losses.sft(), aggregation=aggregation, **options)


@recipe(
    "DFT (dynamic fine-tuning)",
    "arXiv 2508.05629",
    code='TRL sft_trainer.py (loss_type "dft")',
    build=losses.dft,
)
def dft(
    logprobs: Tensor,
    mask: Tensor | None = None,
    *,
    aggregation: Aggregation = "token-mean",
    **options: Unpack[PolicyOptions],
) -> PolicyLoss:
    """-sg(p) lp, p = exp(lp), mean over all tokens: SFT in which unlikely tokens count less."""
    return policy_loss(logprobs, None, None, mask, loss=losses.dft(), aggregation=aggregation, **options)


@recipe(
    "RAFT (reward-ranked fine-tuning, best-of-n)",
    "arXiv 2304.06767",
    reconstructed="commonly known; no code or full text read",
    build=losses.raft,
)
def raft(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    rewards: Tensor,
    mask: Tensor | None = None,
    *,
    aggregation: Aggregation = "token-mean",
    **options: Unpack[PolicyOptions],
) -> PolicyLoss:
    """-lp on the responses with a positive reward; the others are dropped.

    rewards [B]: of right and wrong answers 1 and 0; to learn from the best of each group, 1 for it and 0 for the
    others. old_logprobs go into the metrics alone.
    """
    rewards = scored(options, rewards, logprobs)
    keep_also(options, rewards > 0, logprobs)
    loss = losses.raft()
    return policy_loss(logprobs, old_logprobs, rewards, mask, loss=loss, aggregation=aggregation, **options)


# ---------------------------------------------------------------------------------------------------- self-distillation
_SDPO = "lasgroup/SDPO core_algos.py, TRL experimental/sdpo/loss_utils.py"


@recipe("SDPO (self-distillation), sampled tokens", "arXiv 2601.20802", code=_SDPO, build=losses.sdpo)
def sdpo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    teacher_logprobs: Tensor,
    mask: Tensor | None = None,
    *,
    is_clip: float | None = 2.0,
    aggregation: Aggregation = "token-mean",
    **options: Unpack[PolicyOptions],
) -> PolicyLoss:
    """sg(lp - teacher_lp) lp sg(min(r, is_clip)): the reverse KL's gradient on the sampled tokens.

    teacher_logprobs: of the same tokens, by the model itself shown a successful rollout or feedback. Responses without
    a teacher are left out: keep=... There are no advantages.
    """
    add_extra(options, teacher_logprob=teacher_logprobs)
    loss = losses.sdpo(is_clip)
    return policy_loss(logprobs, old_logprobs, None, mask, loss=loss, aggregation=aggregation, **options)


@recipe("SDPO (self-distillation), k likeliest tokens", "arXiv 2601.20802", code=_SDPO, build=losses.sdpo_topk)
def sdpo_topk(
    logprobs: Tensor,
    teacher_logprobs: Tensor,
    mask: Tensor | None = None,
    *,
    alpha: float = 0.5,
    tail: bool = True,
    weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> PolicyLoss:
    """(1 - alpha) KL(student || M) + alpha KL(teacher || M), M = (1 - alpha) student + alpha teacher, over k ids.

    logprobs, teacher_logprobs [B, T, k]: log-probs of the student's k likeliest ids (k = 100 in the paper), as
    `token_logprobs(..., token_ids=...)` gives them. mask, weights [B, T]: tokens that count; factors, such as the
    clipped importance weight of the sampled token. alpha 0: KL(teacher || student), 1: KL(student || teacher). tail:
    what the k ids leave is one id more, else both sides are renormalised. Mean over the valid tokens, or divided by
    normalizer; each token is a sequence of k to the operation, so its metrics count ids.
    """
    if logprobs.ndim != 3:
        raise ValueError(f"logprobs: expected shape [B, T, k], got {list(logprobs.shape)}")
    student, teacher = logprobs.flatten(0, 1), teacher_logprobs.flatten(0, 1)
    return policy_loss(
        student,
        None,
        None,
        loss=losses.sdpo_topk(alpha, tail),
        aggregation="seq-mean-token-mean",
        normalizer=normalizer,
        weights=None if weights is None else weights.flatten(),
        keep=None if mask is None else mask.flatten() != 0,
        extra={"teacher_logprob": teacher},
    )
