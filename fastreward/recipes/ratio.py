"""Policy losses per token on the probability ratio: PPO's clipped surrogate and its variants.

r = exp(lp - old_lp), lp = logprobs, A = advantages, sg = stop_gradient. Every recipe takes the arguments of
`fastreward.policy_loss`, passes its options on and returns what it returns; parameters have their published values.
A response whose reward is NaN was not scored, and is left out.
"""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from fastreward import losses
from fastreward._arguments.options import Aggregation
from fastreward._loss_call.results import PolicyLoss
from fastreward.losses import Loss
from fastreward.policy_loss import policy_loss
from fastreward.recipes._catalogue.registry import recipe
from fastreward.recipes._shared.factory import policy_recipe, reading_recipe, reward_recipe
from fastreward.recipes._shared.options import LossOptions, PolicyOptions, add_extra

__all__ = [
    "bapo", "bnpo_loss", "cfpo", "clip_cov", "dapo", "dr_grpo_loss", "dual_clip_ppo", "fipo", "grpo_loss",
    "intellect_2", "kl_cov", "lite_ppo_loss", "m2po", "nsr", "ppo", "psr", "sapo", "segment_ppo",
    "stable_reinforce", "tw_grpo", "visurf", "w_reinforce",
]  # fmt: skip

_VANILLA = "verl core_algos.py `compute_policy_loss_vanilla`"
_TRL = "TRL grpo_trainer.py `_compute_loss`"


# ---------------------------------------------------------------------------------------------- PPO's clipped surrogate
@policy_recipe("PPO (proximal policy optimization)", "arXiv 1707.06347", code=_VANILLA)
def ppo(*, clip_low: float = 0.2, clip_high: float = 0.2, **options: Unpack[LossOptions]) -> Loss:
    """max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)).

    Advantages: per token, from generalised advantage estimation; or any other.
    """
    return losses.ppo(clip_low, clip_high)


@policy_recipe("Dual-clip PPO", "arXiv 1912.09729", code=_VANILLA)
def dual_clip_ppo(
    *, clip_low: float = 0.2, clip_high: float = 0.2, dual_clip: float = 3.0, **options: Unpack[LossOptions]
) -> Loss:
    """min(PPO's loss, -A dual_clip) where A < 0, else PPO's loss.

    Without it the loss of a token with A < 0 has no upper bound as its ratio grows. 3.0 is verl's clip_ratio_c.
    """
    return losses.ppo(clip_low, clip_high, dual_clip)


@policy_recipe(
    "GRPO's loss (group relative policy optimization)",
    "arXiv 2402.03300",
    code=f'{_TRL} (loss_type "grpo"), {_VANILLA}',
    aggregation="seq-mean-token-mean",
    kl=("k3", 0.04),
    passes=("ref_logprobs",),
)
def grpo_loss(*, clip_low: float = 0.2, clip_high: float = 0.2, **options: Unpack[LossOptions]) -> Loss:
    """PPO's loss + kl_coef k3, mean over each response, then over responses.

    k3 = exp(ref_lp - lp) - (ref_lp - lp) - 1, where ref_logprobs is passed; kl_coef is then 0.04, DeepSeekMath's,
    unless given. Advantages: (reward - group mean) / (group std + eps), `group_advantages(rewards, ...)`; the name
    `grpo` is kept for these.
    """
    return losses.ppo(clip_low, clip_high)


@policy_recipe(
    "DAPO (decoupled clip and dynamic sampling)", "arXiv 2503.14476", code=f'{_VANILLA}, {_TRL} (loss_type "dapo")'
)
def dapo(*, clip_low: float = 0.2, clip_high: float = 0.28, **options: Unpack[LossOptions]) -> Loss:
    """max(-A r, -A clip(r, 1 - 0.2, 1 + 0.28)), mean over all tokens.

    Clip-higher, no KL. Advantages: GRPO's, `group_advantages(rewards, ...)`, of rewards with the overlong penalty.
    Groups whose rewards are all equal are sampled anew, or left out: keep=... For gradient accumulation and data
    parallelism pass the tokens of the whole step as normalizer.
    """
    return losses.ppo(clip_low, clip_high)


@policy_recipe(
    "Dr. GRPO's loss (GRPO done right)",
    "arXiv 2503.20783",
    code=f'{_TRL} (loss_type "dr_grpo"), verl core_algos.py `agg_loss`',
    aggregation="seq-mean-token-sum-norm",
    advantages='scale="none"',
)
def dr_grpo_loss(*, clip_low: float = 0.2, clip_high: float = 0.2, **options: Unpack[LossOptions]) -> Loss:
    """PPO's loss, summed over all tokens, divided by a constant: responses * T.

    T is the padded length; for TRL's constant pass normalizer=responses * max_completion_length. Advantages: reward -
    group mean, `group_advantages(rewards, ..., scale="none")`; the name `dr_grpo` is kept for these.
    """
    return losses.ppo(clip_low, clip_high)


@policy_recipe(
    "The aggregation that TRL calls bnpo",
    "arXiv 2506.02864",
    code=f'{_TRL} (loss_type "bnpo"); the paper\'s own method is an advantage',
)
def bnpo_loss(*, clip_low: float = 0.2, clip_high: float = 0.2, **options: Unpack[LossOptions]) -> Loss:
    """PPO's loss, mean over the tokens of this micro-batch.

    TRL and ms-swift call this aggregation so; it differs from DAPO's where a step has several micro-batches. BNPO
    itself normalises rewards by a Beta distribution: an advantage, for which the name `bnpo` is kept.
    """
    return losses.ppo(clip_low, clip_high)


@policy_recipe(
    "Lite PPO's loss (Tricks or Traps)",
    "arXiv 2508.08221",
    code='ROLL functionals.py, TRL grpo_trainer.py (scale_rewards "batch")',
    advantages='scale="batch-std"',
)
def lite_ppo_loss(*, clip_low: float = 0.2, clip_high: float = 0.2, **options: Unpack[LossOptions]) -> Loss:
    """PPO's loss, mean over all tokens, on advantages scaled over the batch.

    Advantages: (reward - group mean) / (batch std + eps), `group_advantages(rewards, ..., scale="batch-std")`; the name
    `lite_ppo` is kept for these.
    """
    return losses.ppo(clip_low, clip_high)


@policy_recipe(
    "INTELLECT-2's two-sided clip",
    "arXiv 2505.07291",
    code=f"{_TRL} (delta)",
    aggregation="seq-mean-token-mean",
    kl=("k3", 0.001),
    passes=("ref_logprobs",),
)
def intellect_2(
    *, clip_low: float = 0.2, clip_high: float = 0.2, delta: float = 4.0, **options: Unpack[LossOptions]
) -> Loss:
    """max(-A min(r, delta), -A clip(r, 1 - clip_low, 1 + clip_high)) + kl_coef k3.

    The ratio's own upper bound keeps tokens with A < 0 from huge losses. k3 is there where ref_logprobs is passed;
    kl_coef is then 0.001 unless given (delta and kl_coef as TRL's documentation quotes the paper's section 4.1).
    Advantages: GRPO's, `group_advantages(rewards, ...)`.
    """
    return losses.ppo(clip_low, clip_high, delta=delta)


# -------------------------------------------------------------------------------------- PPO's surrogate, tokens weighed
@recipe(
    "Clip-Cov (The Entropy Mechanism)",
    "arXiv 2505.22617",
    code="verl core_algos.py `compute_policy_loss_clip_cov`",
    build=losses.clip_cov,
)
def clip_cov(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    share: float = 0.0002,
    cov_low: float = 1.0,
    cov_high: float = 5.0,
    aggregation: Aggregation = "token-mean",
    **options: Unpack[PolicyOptions],
) -> PolicyLoss:
    """PPO's loss, 0 on a random few of the tokens with cov_low < cov < cov_high.

    cov = (A - mean A)(lp - mean lp), means over the batch. At most max(1, share * tokens), of those that PPO's clip
    leaves alone, drawn on the device by torch's generator. Advantages: GRPO's, `group_advantages(rewards, ...)`.
    """
    add_extra(options, lots=torch.rand_like(logprobs, dtype=torch.float32, requires_grad=False))
    loss = losses.clip_cov(clip_low, clip_high, share, cov_low, cov_high)
    return policy_loss(logprobs, old_logprobs, advantages, mask, loss=loss, aggregation=aggregation, **options)


@policy_recipe(
    "KL-Cov (The Entropy Mechanism)",
    "arXiv 2505.22617",
    code="verl core_algos.py `compute_policy_loss_kl_cov`",
)
def kl_cov(*, ppo_kl_coef: float = 1.0, share: float = 0.0002, **options: Unpack[LossOptions]) -> Loss:
    """-A r, plus ppo_kl_coef |lp - old_lp| on the few tokens of the largest cov; no clip.

    cov = (A - mean A)(lp - mean lp), means over the batch; max(1, share * tokens) of them, all of those that equal the
    last one. ppo_kl_coef: the paper's; verl's configuration has 0.1. Advantages: GRPO's,
    `group_advantages(rewards, ...)`.
    """
    return losses.kl_cov(ppo_kl_coef, share)


@reading_recipe(
    "TW-GRPO (token-weighted GRPO, focused thinking)",
    "arXiv 2505.24718",
    code="longmalongma/TW-GRPO grpo_trainer.py",
    advantages="eps=1e-4",
)
def tw_grpo(
    importance: Tensor,
    mask: Tensor | None = None,
    *,
    alpha: float = 1.4,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    **options: Unpack[LossOptions],
) -> Loss:
    """(1 + (alpha - 1) importance) * PPO's loss, divided by the plain token count.

    importance, in [0, 1], in the shape of logprobs: how much the group's next-token distributions disagree at a
    position, from `losses.tw_grpo_importance`. The authors' scripts have alpha 1.5. Advantages: GRPO's with eps 1e-4,
    `group_advantages(rewards, ..., eps=1e-4)`.
    """
    return losses.tw_grpo(alpha, clip_low, clip_high)


@policy_recipe(
    "StableReinforce (R1-Reward)",
    "arXiv 2505.02835",
    code="yfzhang114/r1_reward openrlhf/models/loss.py, replay_buffer.py; the paper's filter where the two differ",
)
def stable_reinforce(
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    pre_clip: float = 1000.0,
    advantage_filter: str | None = "paper",
    **options: Unpack[LossOptions],
) -> Loss:
    """PPO's loss on clip(r, 1 / pre_clip, pre_clip) and whitened advantages, outliers beyond 3 sigma set to 0.

    advantage_filter: "paper" |z| <= 3; "code" the released filter, which compares z with the raw mean +- 3; None: no
    whitening. Advantages: as REINFORCE++ has them before its own whitening.
    """
    return losses.stable_reinforce(clip_low, clip_high, pre_clip, advantage_filter)


@reading_recipe(
    "ViSurf (supervised and reinforcement learning in one step)",
    "arXiv 2510.10606",
    reconstructed="the abstract; no code or full text read",
)
def visurf(
    expert: Tensor,
    mask: Tensor | None = None,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    **options: Unpack[LossOptions],
) -> Loss:
    """PPO's loss; on the rows of given answers old_lp := sg(lp), so that their gradient is -A.

    expert [B]: nonzero for the ground-truth answers that were put into the group. Their old_logprobs go into the
    metrics alone; pass the current ones. Advantages: GRPO's over the group with the given answer in it.
    """
    return losses.visurf(clip_low, clip_high)


# --------------------------------------------------------------------------------------------- right and wrong answers
_RLVR = "TianHongZXY/RLVR-Decomposed core_algos.py"


@reward_recipe("PSR (positive sample reinforcement)", "arXiv 2506.01347", code=_RLVR, keep=lambda rewards: rewards > 0)
def psr(*, clip_low: float = 0.2, clip_high: float = 0.2, **options: Unpack[LossOptions]) -> Loss:
    """PPO's loss with A = R on the right answers; the wrong ones are dropped.

    rewards [B]: 1 for right, 0 for wrong; they take the place of advantages, there is no baseline.
    """
    return losses.psr(clip_low, clip_high)


@reward_recipe("NSR (negative sample reinforcement)", "arXiv 2506.01347", code=_RLVR, keep=lambda rewards: rewards <= 0)
def nsr(*, clip_low: float = 0.2, clip_high: float = 0.2, **options: Unpack[LossOptions]) -> Loss:
    """PPO's loss with A = R - 1 on the wrong answers; the right ones are dropped.

    rewards [B]: 1 for right, 0 for wrong; they take the place of advantages, there is no baseline.
    """
    return losses.nsr(clip_low, clip_high)


@reward_recipe("W-REINFORCE (weighted PSR and NSR)", "arXiv 2506.01347", code=_RLVR)
def w_reinforce(
    *, positive_weight: float = 0.1, clip_low: float = 0.2, clip_high: float = 0.2, **options: Unpack[LossOptions]
) -> Loss:
    """PPO's loss with A = positive_weight R on right answers, -1 on wrong ones.

    rewards [B]: 1 for right, 0 for wrong; they take the place of advantages, there is no baseline.
    """
    return losses.w_reinforce(positive_weight, clip_low, clip_high)


# ---------------------------------------------------------------------------------------------------------- a soft clip
@policy_recipe(
    "SAPO (soft adaptive policy optimization)",
    "arXiv 2511.20347",
    code=f'verl core_algos.py `compute_policy_loss_sapo`, {_TRL} (loss_type "sapo")',
)
def sapo(*, tau_pos: float = 1.0, tau_neg: float = 1.05, **options: Unpack[LossOptions]) -> Loss:
    """-A sigmoid(tau (r - 1)) 4 / tau, tau = tau_pos where A > 0, else tau_neg.

    A soft gate in the place of the clip. Advantages: GRPO's, `group_advantages(rewards, ...)`.
    """
    return losses.sapo(tau_pos, tau_neg)


@policy_recipe(
    "CFPO (clipping-free policy optimization)",
    "arXiv 2601.22801",
    note="three third-party notes and codes that agree; the authors' pull requests (TRL, verl, OpenRLHF) in words",
)
def cfpo(*, epsilon: float = 0.2, **options: Unpack[LossOptions]) -> Loss:
    """-A r + |A| (r - 1)^2 / (2 epsilon).

    A quadratic penalty in the place of the clip, which pulls back wherever r is; per token the loss of SPO (arXiv
    2401.16025). Advantages: GRPO's, `group_advantages(rewards, ...)`.
    """
    return losses.cfpo(epsilon)


# ------------------------------------------------------------------------------------------------- along the sequence
@policy_recipe(
    "FIPO (future-KL influenced policy optimization)",
    "arXiv 2603.19835",
    code="ms-swift grpo_trainer.py `_compute_fipo_influence`",
)
def fipo(
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    gamma: float = 2 ** (-1 / 32),
    weight_low: float = 1.0,
    weight_high: float = 1.2,
    safety: float | None = 4.0,
    delta: float | None = None,
    **options: Unpack[LossOptions],
) -> Loss:
    """sg(w) times PPO's loss, w_t = clip(exp(f_t), weight_low, weight_high), f_t = sum over s >= t of gamma^(s-t) d_s.

    d = lp - old_lp: a token weighs more where what follows it has become likelier. safety: where A < 0 and r > safety,
    w is in [0.8, 1]; None: off. delta bounds r, and tokens above it do not count in f. Advantages: GRPO's.
    """
    return losses.fipo(clip_low, clip_high, gamma, weight_low, weight_high, safety, delta)


@policy_recipe(
    "M2PO (second-moment trust policy optimization)",
    "arXiv 2510.01161",
    code="AReaL actor.py `_get_m2po_loss_mask`",
)
def m2po(*, tau: float = 0.04, clip_low: float = 0.2, clip_high: float = 0.2, **options: Unpack[LossOptions]) -> Loss:
    """PPO's loss, 0 on the tokens whose d^2 is above the threshold that leaves the others a mean below tau.

    For stale rollouts: old_logprobs are those of the policy that sampled. Advantages: GRPO's.
    """
    return losses.m2po(tau, clip_low, clip_high)


@policy_recipe(
    "BAPO (balanced policy optimization with adaptive clipping)",
    "arXiv 2510.18927",
    code="WooooDyy/BAPO recipe/bapo/policy_loss.py; bounds and target are the examples of its config.py",
)
def bapo(
    *,
    target: float = 1.0,
    low_start: float = 0.6,
    low_end: float = 0.8,
    high_start: float = 1.2,
    high_end: float = 2.0,
    high_step: float = 0.05,
    dual_clip: float = 3.0,
    **options: Unpack[LossOptions],
) -> Loss:
    """PPO's loss, r in [low, high]: moved until sum_{A>0} A min(r, high) >= target sum_{A<0} -A max(r, low).

    Unless that holds at low_start and high_start, low is low_end and high the first of its steps where it does, or
    high_end. The sums are over the tokens of the call. dual_clip: the loss is at most that times -A where A < 0.
    Advantages: GRPO's.
    """
    return losses.bapo(target, low_start, low_end, high_start, high_end, high_step, dual_clip)


@reading_recipe(
    "Segment-level importance weights (a ratio per turn or step)",
    "arXiv 2506.06122",
    reconstructed="ROLL base_config.py names the options; the loss itself was not read",
)
def segment_ppo(
    segment_ids: Tensor,
    mask: Tensor | None = None,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    average: bool = True,
    log_ratio_max: float | None = 20.0,
    **options: Unpack[LossOptions],
) -> Loss:
    """max(-A s, -A clip(s, 1 - clip_low, 1 + clip_high)), s = exp(mean of d over the token's segment).

    segment_ids: in the shape of logprobs, of which equal neighbours are a segment, as from `fastreward.segment_ids`; -1
    is none, and nothing is learnt there. average=False: s is the product of the ratios. Advantages: per turn, or any.
    """
    return losses.segment_ppo(clip_low, clip_high, average=average, log_ratio_max=log_ratio_max)
