"""Methods against the gap between the policy that is trained and the engine that wrote the rollouts.

w = exp(old_logprobs - rollout_logprobs). The first recipes take the arguments of `fastreward.correction_weights` and
return what it returns, (weights, keep, metrics), for `policy_loss(..., weights=weights, keep=keep)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Unpack

from torch import Tensor

from fastreward import losses
from fastreward._arguments.options import Aggregation
from fastreward._loss_call.results import PolicyLoss
from fastreward.correction import off_policy_sequence_mask as _sequence_mask
from fastreward.policy_loss import policy_loss
from fastreward.recipes._catalogue.registry import recipe
from fastreward.recipes._shared.factory import Correction as Correction
from fastreward.recipes._shared.factory import Rule, Threshold, correction_recipe
from fastreward.recipes._shared.options import CorrectionOptions, PolicyOptions, add_kl, weigh_also

__all__ = ["deepseek_v3_2", "geo_rs", "icepop", "k3_rs", "mis", "off_policy_sequence_mask", "seq_mis", "seq_tis", "tis"]

_TIS = "Yao et al. 2025, fengyao.notion.site/off-policy-rl"
_MIS = "Liu et al. 2025, richardli.xyz/rl-collapse"
_VERL = "verl RolloutCorrectionConfig"


# ------------------------------------------------------------------------------------------------- importance weights
@correction_recipe(
    "TIS (truncated importance sampling), per token",
    _TIS,
    code=f"{_VERL}.decoupled_token_is, rollout_corr_helper.py; TRL token_truncate",
)
def tis(
    *, high: float = 2.0, reject: Mapping[str, Threshold] | None = None, **options: Unpack[CorrectionOptions]
) -> Rule:
    """weights = min(w, high) per token.

    high: verl's; TRL has 3.0.
    """
    return {"mode": "truncate", "level": "token", "high": high, "reject": reject}


@correction_recipe(
    "TIS (truncated importance sampling), per sequence",
    _MIS,
    code=f"{_VERL}.decoupled_seq_is, rollout_corr_helper.py; TRL sequence_truncate",
)
def seq_tis(
    *, high: float = 2.0, reject: Mapping[str, Threshold] | None = None, **options: Unpack[CorrectionOptions]
) -> Rule:
    """weights = min(product of w over the sequence, high).

    high: verl's; TRL has 3.0.
    """
    return {"mode": "truncate", "level": "sequence", "high": high, "reject": reject}


@correction_recipe(
    "MIS (masked importance sampling), per token",
    _MIS,
    code="TRL grpo_trainer.py (token_mask), which leaves the tokens in the mean",
)
def mis(
    *,
    low: float | None = None,
    high: float | None = 3.0,
    reject: Mapping[str, Threshold] | None = None,
    **options: Unpack[CorrectionOptions],
) -> Rule:
    """weights = w where low <= w <= high, per token; the others are dropped.

    keep leaves them out of the mean; to leave them in as zeros, as TRL does, do not pass it on. high: TRL's.
    """
    return {"mode": "mask", "level": "token", "low": low, "high": high, "reject": reject}


@correction_recipe(
    "MIS (masked importance sampling), per sequence", _MIS, code=f"{_VERL}.decoupled_seq_is_rs, rollout_corr_helper.py"
)
def seq_mis(*, high: float = 2.0, bounds: Threshold = (0.5, 2.0), **options: Unpack[CorrectionOptions]) -> Rule:
    """weights = min(product of w over the sequence, high); sequences with that product outside bounds are dropped."""
    return {"mode": "truncate", "level": "sequence", "high": high, "reject": {"seq_sum_k1": bounds}}


@correction_recipe(
    "IcePop (Ring-1T)", "arXiv 2510.18855", code=f"{_VERL}.decoupled_token_icepop, rollout_corr_helper.py"
)
def icepop(
    *,
    low: float = 0.5,
    high: float = 5.0,
    reject: Mapping[str, Threshold] | None = None,
    **options: Unpack[CorrectionOptions],
) -> Rule:
    """weights = w where low <= w <= high, else 0, per token; every token stays in the mean."""
    return {"mode": "icepop", "level": "token", "low": low, "high": high, "reject": reject}


# ----------------------------------------------------------------------------------------------------------- rejection
@correction_recipe(
    "Rejection by the geometric mean of ratios (geo-RS)",
    _MIS,
    code=f"{_VERL}.decoupled_geo_rs, rollout_corr_helper.py",
    settings={"bounds": (0.8, 1.25)},
)
def geo_rs(*, bounds: Threshold = (0.999, 1.001), **options: Unpack[CorrectionOptions]) -> Rule:
    """Sequences whose geometric mean of w is outside bounds are dropped; weights are 1.

    The example's bounds suit its noise.
    """
    return {"mode": None, "reject": {"seq_mean_k1": bounds}}


@correction_recipe(
    "Rejection by the k3 estimate of the divergence (k3-RS)",
    _MIS,
    code=f"{_VERL}.decoupled_k3_rs, rollout_corr_helper.py",
)
def k3_rs(*, bound: float = 0.01, **options: Unpack[CorrectionOptions]) -> Rule:
    """Sequences whose mean of w - 1 - log w is above bound are dropped; weights are 1."""
    return {"mode": None, "reject": {"seq_mean_k3": bound}}


@recipe(
    "DeepSeek-V3.2's off-policy sequence mask",
    "arXiv 2512.02556",
    code="TRL grpo_trainer.py `get_off_policy_mask`",
    settings={"threshold": 0.5},
    returns="mask",
)
def off_policy_sequence_mask(
    logprobs: Tensor,
    rollout_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    threshold: float,
    unscored: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Keep where A >= 0 or mean(rollout_lp - sg(lp)) <= threshold, per sequence.

    Returns bool [B], for policy_loss(keep=...). The paper gives no threshold (its delta); TRL's documentation names
    0.5.
    """
    return _sequence_mask(
        logprobs, rollout_logprobs, advantages, mask, threshold=threshold, unscored=unscored, cu_seqlens=cu_seqlens
    )


@recipe(
    "DeepSeek-V3.2's loss: GRPO with an unbiased KL and the off-policy sequence mask",
    "arXiv 2512.02556",
    code="TRL grpo_trainer.py `_compute_loss` (off_policy_mask_threshold, use_bias_correction_kl)",
    returns="loss",
    build=losses.ppo,
    passes=("rollout_logprobs", "ref_logprobs"),
    settings={"threshold": 0.5},
)
def deepseek_v3_2(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    threshold: float,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    aggregation: Aggregation = "seq-mean-token-mean",
    **options: Unpack[PolicyOptions],
) -> PolicyLoss:
    """PPO's loss where A >= 0 or mean(rollout_lp - sg(lp)) <= threshold, else 0; + kl_coef r k3.

    rollout_logprobs: of the inference engine; not passed, old_logprobs. Masked sequences stay in the mean and keep
    their KL term. It is there where ref_logprobs is passed; r is not detached, which makes its gradient unbiased;
    kl_coef is 0.001, DeepSeek-R1's, unless given. The paper gives no threshold (its delta); TRL's documentation names
    0.5. Advantages [B]: GRPO's, `group_advantages(rewards, ...)`.
    """
    given = options.pop("rollout_logprobs", None)  # the loss itself does not read them
    rollout, cu_seqlens = old_logprobs if given is None else given, options.get("cu_seqlens")
    keep = _sequence_mask(logprobs, rollout, advantages, mask, threshold=threshold, cu_seqlens=cu_seqlens)
    weigh_also(options, keep.to(logprobs.dtype), logprobs)
    add_kl(options, "k3-corrected", 0.001)
    loss = losses.ppo(clip_low, clip_high)
    return policy_loss(logprobs, old_logprobs, advantages, mask, loss=loss, aggregation=aggregation, **options)
