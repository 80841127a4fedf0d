"""The KL in the rewards: core_algos.kl_penalty, core_algos.compute_rewards and ray_trainer.apply_kl_penalty.

verl clamps the log-ratio to +-20 and the estimate to +-10 for k3 (low_var_kl) alone.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from fastreward._arguments.options import RewardKL
from fastreward._runtime.memory import empty_like
from fastreward.patch.verl.batch import constants, few_rows, flags, number
from fastreward.patch.verl.kl import differentiable
from fastreward.patch.verl.replacement import CORE, NotServed, Replacement
from fastreward.rewards.token_rewards import token_rewards

#: verl's names of the estimators, and fastreward's.
_ESTIMATORS: Final[dict[str, RewardKL]] = {
    "kl": "k1", "k1": "k1", "abs": "abs", "mse": "k2", "k2": "k2", "low_var_kl": "k3", "k3": "k3",
}  # fmt: skip


def kl_penalty(_: Any, logprob: Tensor, ref_logprob: Tensor, kl_penalty: str) -> Tensor:
    """The estimate for each token; with "+" its gradient is that of k2."""
    straight, estimator = kl_penalty.endswith("+"), _estimator(kl_penalty)
    trained = torch.is_grad_enabled() and logprob.requires_grad
    if logprob.shape != ref_logprob.shape or (trained and estimator == "k1" and not straight):
        raise NotServed  # verl broadcasts; a difference alone is one operation of torch's
    flat = logprob if logprob.ndim == 2 else logprob.reshape(1, -1)
    reference = ref_logprob.reshape(flat.shape)
    if not trained:
        return _times_kl(flat, reference, kl_penalty, 1.0, None).view(logprob.shape)
    constants(flat.detach(), reference)
    return differentiable(flat, reference, estimator, straight).view(logprob.shape)


def compute_rewards(
    _: Any, token_level_scores: Tensor, old_log_prob: Tensor, ref_log_prob: Tensor, kl_ratio: float
) -> Tensor:
    """token_level_scores - kl_ratio * (old_log_prob - ref_log_prob)."""
    constants(token_level_scores)
    if token_level_scores.shape != old_log_prob.shape:
        raise NotServed  # verl broadcasts
    return _times_kl(old_log_prob, ref_log_prob, "kl", -number(kl_ratio), None).add_(token_level_scores)


def apply_kl_penalty(_: Any, data: Any, kl_ctrl: Any, kl_penalty: str = "kl") -> tuple[Any, dict[str, Any]]:
    """Writes token_level_rewards into the batch, and lets the controller look at the mean KL of the sequences."""
    logprobs, scores = data.batch["old_log_probs"], data.batch["token_level_scores"]
    constants(scores, logprobs)
    if scores.shape != logprobs.shape:
        raise NotServed
    mask, reference, beta = data.batch["response_mask"], data.batch["ref_log_prob"], kl_ctrl.value
    if type(mask) is not Tensor or type(reference) is not Tensor or not mask.shape == reference.shape == scores.shape:
        raise NotServed
    rewards, of_sequences = empty_like(scores), logprobs.new_empty(len(scores))
    counts = torch.empty_like(of_sequences)
    room = None
    for rows in few_rows(scores):
        there = flags(mask[rows], logprobs[rows], counts[rows])
        room = torch.empty_like(logprobs[rows]) if room is None else room[: len(there)]
        kl = _times_kl(logprobs[rows], reference[rows], kl_penalty, 1.0, there, out=room)
        torch.sum(kl, -1, out=of_sequences[rows])
        torch.sub(scores[rows], kl, alpha=number(beta), out=rewards[rows])
    current_kl = of_sequences.div_(counts.add_(1e-8)).mean(dim=0).item()
    kl_ctrl.update(current_kl=current_kl, n_steps=data.batch.batch_size[0])
    data.batch["token_level_rewards"] = rewards
    return data, {"actor/reward_kl_penalty": current_kl, "actor/reward_kl_penalty_coeff": beta}


def _times_kl(
    logprobs: Tensor, ref_logprobs: Tensor, kind: str, factor: float, mask: Tensor | None, *, out: Tensor | None = None
) -> Tensor:
    """factor * KL(policy || reference) of each token that counts: rewards of a batch that has no scores."""
    constants(logprobs, ref_logprobs)
    estimator = _estimator(kind)
    if logprobs.ndim != 2:
        raise NotServed
    unscored = torch.full((len(logprobs),), torch.nan, device=logprobs.device)
    clamps: Any = {"kl_clamp": 20.0, "kl_value_clamp": 10.0} if estimator == "k3" else {"kl_clamp": None}
    given: Any = {"logprobs": logprobs, "ref_logprobs": ref_logprobs, "kl": estimator, "kl_coef": -factor}
    return token_rewards(unscored, mask, **given, **clamps, out=out)


def _estimator(kind: str) -> RewardKL:
    estimator = _ESTIMATORS.get(kind.removesuffix("+"))
    if estimator is None:
        raise NotServed  # an error
    return estimator


def _tokens_of_batch(data: Any, *_: Any, **__: Any) -> int:
    return int(data.batch["token_level_scores"].numel())


_TOKEN_REWARDS: Final = "fastreward.token_rewards"

REPLACEMENTS: Final = (
    Replacement(
        f"{CORE}.kl_penalty",
        ("logprob", "ref_logprob", "kl_penalty"),
        kl_penalty,
        "fastreward.token_rewards, with a gradient fastreward.policy_loss",
        "one pass, with a gradient too",
    ),
    Replacement(
        f"{CORE}.compute_rewards",
        ("token_level_scores", "old_log_prob", "ref_log_prob", "kl_ratio"),
        compute_rewards,
        _TOKEN_REWARDS,
        "two passes",
    ),
    Replacement(
        "verl.trainer.ppo.ray_trainer.apply_kl_penalty",
        ("data", "kl_ctrl", "kl_penalty"),
        apply_kl_penalty,
        _TOKEN_REWARDS,
        "one pass over memory, one tensor",
        _tokens_of_batch,
    ),
)
