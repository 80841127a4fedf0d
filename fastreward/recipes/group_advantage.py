"""Advantages of responses against the others to the same prompt: [B] from rewards [B], for `policy_loss`.

R = rewards, NaN where a response was not scored: it counts in nothing and gets 0. group_ids or group_size says which
responses are to the same prompt, as in `fastreward.group_advantages`; most recipes are one setting of it. What trainers
do otherwise than each other in the same method is in CONVENTIONS.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Literal, get_args

import torch
from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.groups import GroupIds, Groups
from fastreward._arguments.numbers import Number
from fastreward._arguments.options import MaskedRewards, Singleton
from fastreward.group import group_advantages
from fastreward.group_statistics import group_statistics
from fastreward.recipes._catalogue.registry import recipe
from fastreward.recipes._shared.groups import finite_or_nan, given
from fastreward.recipes._shared.tokens import per_response, rewards_of_tokens
from fastreward.returns import discounted_returns
from fastreward.whiten import whiten

__all__ = [
    "bnpo",
    "dr_grpo",
    "gdpo",
    "gpg",
    "grpo",
    "lite_ppo",
    "maxrl",
    "opo",
    "pass_at_k",
    "pass_at_k_training",
    "prpo",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "remax",
    "rloo",
]

Trainer = Literal["verl", "trl", "trl-async", "openrlhf", "slime", "skyrl", "rl-kernel", "nemo-rl"]
#: (R - mean) / (std + eps) as trainers have it: ddof of the std, eps, and what a response alone in its group gets.
CONVENTIONS: Final[dict[Trainer, dict[str, Any]]] = {
    "verl": {"ddof": 1, "eps": 1e-6, "singleton": "raw"},
    "trl": {"ddof": 1, "eps": 1e-4, "singleton": "zero"},
    "trl-async": {"ddof": 0, "eps": 1e-8, "singleton": "zero"},
    "openrlhf": {"ddof": 1, "eps": 1e-9, "singleton": "nan"},
    "slime": {"ddof": 1, "eps": 1e-6, "singleton": "zero"},  # it turns the std off where a prompt has one response
    "skyrl": {"ddof": 1, "eps": 1e-6, "singleton": "raw"},
    "rl-kernel": {"ddof": 0, "eps": 1e-8, "singleton": "zero"},
}


# ---------------------------------------------------------------------------------------------------- one setting each
@recipe(
    "GRPO (group relative policy optimization)",
    "arXiv 2402.03300",
    code="verl core_algos.py `compute_grpo_outcome_advantage`; TRL, OpenRLHF, slime, SkyRL, NeMo-RL",
    passes=("group_ids",),
)
def grpo(
    rewards: Tensor,
    group_ids: GroupIds | None = None,
    *,
    group_size: int | None = None,
    mask: Tensor | None = None,
    trainer: Trainer = "verl",
) -> Tensor:
    """A = (R - mean) / (std + eps).

    trainer: whose ddof, eps and singletons: "verl", "skyrl" (1, 1e-6, R itself), "trl" (1, 1e-4, 0), "trl-async" (0,
    1e-8, 0), "openrlhf" (1, 1e-9, NaN), "slime" (1, 1e-6, 0), "rl-kernel" (0, 1e-8, 0). "nemo-rl": mean and std are the
    others' (1, 1e-6, 0), and where theirs is 0 nothing is divided by. mask [B]: nonzero = there.
    """
    check.choice("trainer", trainer, get_args(Trainer))
    if trainer == "nemo-rl":
        advantages = rloo(rewards, group_ids, group_size=group_size, mask=mask, singleton="zero")
        others = group_statistics(rewards, group_ids, ("leave-one-out-std",), group_size=group_size, mask=mask)
        std = others["leave-one-out-std"]
        return torch.where(std > 0, advantages / (std + 1e-6), advantages)
    return group_advantages(rewards, group_ids, group_size=group_size, mask=mask, **CONVENTIONS[trainer])


@recipe(
    "Dr. GRPO (GRPO done right)",
    "arXiv 2503.20783",
    code="verl core_algos.py (norm_adv_by_std_in_grpo), OpenRLHF experience_maker.py",
    passes=("group_ids",),
)
def dr_grpo(
    rewards: Tensor,
    group_ids: GroupIds | None = None,
    *,
    group_size: int | None = None,
    mask: Tensor | None = None,
    singleton: Singleton = "zero",
) -> Tensor:
    """A = R - mean.

    singleton: a response alone in its group gets 0 (OpenRLHF, TRL), or its "raw" reward (verl). The method also sums a
    response's losses instead of averaging them: aggregation="seq-mean-token-sum-norm".
    """
    return group_advantages(rewards, group_ids, group_size=group_size, mask=mask, scale="none", singleton=singleton)


@recipe(
    "RLOO (REINFORCE leave-one-out)",
    "arXiv 2402.14740",
    code="verl core_algos.py `compute_rloo_outcome_advantage`, TRL, OpenRLHF",
    passes=("group_ids",),
)
def rloo(
    rewards: Tensor,
    group_ids: GroupIds | None = None,
    *,
    group_size: int | None = None,
    mask: Tensor | None = None,
    singleton: Singleton = "raw",
) -> Tensor:
    """A = R - mean of the others = (R - mean) n / (n - 1).

    singleton: a response alone keeps its "raw" reward (verl's loop), or gets "zero" (its vectorized form, SkyRL).
    """
    return group_advantages(
        rewards,
        group_ids,
        group_size=group_size,
        mask=mask,
        center="leave-one-out",
        scale="none",
        singleton=singleton,
    )


@recipe(
    "OPO (on-policy with optimal reward baseline)",
    "arXiv 2505.23585",
    code="verl core_algos.py `compute_opo_outcome_advantage`",
    passes=("group_ids",),
)
def opo(
    rewards: Tensor,
    lengths: Tensor,
    group_ids: GroupIds | None = None,
    *,
    group_size: int | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """A = R - sum of L R / sum of L, L = lengths of the responses; a response alone keeps its reward."""
    return group_advantages(
        rewards,
        group_ids,
        group_size=group_size,
        mask=mask,
        center="length-weighted",
        lengths=lengths,
        scale="none",
        singleton="raw",
    )


@recipe(
    "Lite PPO (group mean, batch standard deviation)",
    "arXiv 2508.08221",
    code='ROLL functionals.py; TRL (scale_rewards="batch", eps 1e-4)',
    passes=("group_ids",),
)
def lite_ppo(
    rewards: Tensor,
    group_ids: GroupIds | None = None,
    *,
    group_size: int | None = None,
    mask: Tensor | None = None,
    eps: Number = 1e-6,
) -> Tensor:
    """A = (R - mean) / (std of the batch + eps)."""
    return group_advantages(rewards, group_ids, group_size=group_size, mask=mask, scale="batch-std", eps=eps)


@recipe("PRPO (mean and standard deviation of the batch)", "rLLM, github.com/rllm-org/rllm", code="rLLM advantage.py")
def prpo(rewards: Tensor, *, mask: Tensor | None = None, eps: Number = 1e-6) -> Tensor:
    """A = (R - mean of the batch) / (std of the batch + eps)."""
    rewards = given("rewards", _scores(rewards, None, mask))
    everyone = torch.zeros(rewards.shape, dtype=torch.int64, device=rewards.device)
    return group_advantages(rewards, everyone, eps=eps)


@recipe("ReMax (a greedy response as the baseline)", "arXiv 2310.10505", code="verl core_algos.py")
def remax(rewards: Tensor, greedy_rewards: Tensor) -> Tensor:
    """A = R - reward of the greedy response to the same prompt."""
    rewards = given("rewards", rewards).float()
    return (rewards - per_response("greedy_rewards", greedy_rewards, "rewards", rewards)).nan_to_num(0.0)


@recipe(
    "GPG (group policy gradient)",
    "arXiv 2504.02546",
    code="verl core_algos.py `compute_gpg_outcome_advantage`",
    passes=("group_ids",),
)
def gpg(
    rewards: Tensor,
    group_ids: GroupIds | None = None,
    *,
    group_size: int | None = None,
    mask: Tensor | None = None,
    f_norm: float = 1.0,
) -> Tensor:
    """A = alpha (R - mean) / f_norm, alpha = responses / responses whose reward is not 0.

    A response alone in its group gets alpha R / f_norm.
    """
    centred = dr_grpo(rewards, group_ids, group_size=group_size, mask=mask, singleton="raw")
    there = _there(rewards, group_ids, mask)
    alpha = there.sum() / (there & (rewards != 0)).sum().clamp(min=1)
    return centred * (alpha / check.positive("f_norm", f_norm))


# ------------------------------------------------------------------------------------------------------- several steps
@recipe(
    "GDPO (group reward-decoupled normalization)",
    "arXiv 2601.05242",
    code='TRL (multi_objective_aggregation "normalize_then_sum"), NVlabs/GDPO; verl whitens over tokens',
    passes=("group_ids",),
)
def gdpo(
    rewards: Tensor,
    group_ids: GroupIds | None = None,
    *,
    group_size: int | None = None,
    component_weights: Tensor | Sequence[Number] | None = None,
    mask: Tensor | None = None,
    trainer: Trainer = "trl",
    batch_eps: Number | None = 1e-4,
) -> Tensor:
    """A = (S - mean of all) / (std of all + batch_eps), S = sum over components of w (R - mean) / (std + eps).

    rewards: [B, K]. component_weights: w [K], default 1. trainer: as of `grpo`. batch_eps None: S alone, of which verl
    makes `fr.whiten(S[:, None] * mask, mask)` over the tokens.
    """
    check.choice("trainer", trainer, get_args(Trainer))
    summed = group_advantages(
        rewards,
        group_ids,
        group_size=group_size,
        component_weights=component_weights,
        mask=mask,
        normalize="normalize-then-sum",
        **CONVENTIONS[trainer],
    )
    if batch_eps is None:
        return summed
    there = _there(rewards, group_ids, mask)
    return prpo(summed.flatten(), mask=there.flatten(), eps=batch_eps).view(summed.shape)


@recipe(
    "REINFORCE++",
    "arXiv 2501.03262",
    code="verl core_algos.py `compute_reinforce_plus_plus_outcome_advantage`",
    returns="advantages",
)
def reinforce_plus_plus(
    token_rewards: Tensor,
    mask: Tensor,
    *,
    gamma: Number = 1.0,
    masked_rewards: MaskedRewards = "drop",
    eps: Number = 1e-8,
) -> Tensor:
    """A = G whitened over the tokens of the batch, G_t = r_t + gamma G_{t+1}; tool tokens are skipped. [B, T].

    token_rewards: [B, T], of `fastreward.token_rewards`: a score less the KL. mask: [B, T]. masked_rewards: "drop"
    those on masked tokens (verl), or move them "to-last-valid", where none is lost.
    """
    x = rewards_of_tokens("token_rewards", token_rewards, mask)
    returns = discounted_returns(x, mask, gamma=gamma, masked_rewards=masked_rewards)
    return whiten(returns, mask, eps=eps)


@recipe(
    "REINFORCE++ with the group's mean as baseline",
    "arXiv 2501.03262",
    code="verl core_algos.py `compute_reinforce_plus_plus_baseline_outcome_advantage`",
    passes=("group_ids",),
    returns="advantages",
)
def reinforce_plus_plus_baseline(
    mask: Tensor,
    rewards: Tensor,
    group_ids: GroupIds | None = None,
    *,
    group_size: int | None = None,
    eps: Number = 1e-8,
) -> Tensor:
    """A = R - mean on every token, whitened over the tokens of the batch: long responses count more. [B, T].

    mask: [B, T]. A response alone keeps its reward. The variance is added eps, and is unbiased.
    """
    centred = dr_grpo(rewards, group_ids, group_size=group_size, singleton="raw")
    if check.tensor("mask", mask).ndim != 2 or mask.shape[0] != centred.shape[0]:
        raise ValueError(f"mask: expected shape [{centred.shape[0]}, T], got {list(mask.shape)}")
    return whiten(centred.unsqueeze(-1).expand(mask.shape), mask, eps=eps)


@recipe(
    "Pass@k, the best response alone",
    "arXiv 2503.19595",
    code="verl core_algos.py `compute_grpo_passk_outcome_advantage`",
    passes=("group_ids",),
)
def pass_at_k(
    rewards: Tensor,
    group_ids: GroupIds | None = None,
    *,
    group_size: int | None = None,
    mask: Tensor | None = None,
    scale: Literal["std", "none"] = "std",
    eps: Number = 1e-6,
) -> Tensor:
    """A = (largest R - second largest) / (std + eps) for the best response, 0 for the others.

    scale "none": not divided. A response alone in its group gets 0 (verl refuses it).
    """
    check.choice("scale", scale, ("std", "none"))
    against_the_best_other = group_advantages(
        rewards, group_ids, group_size=group_size, mask=mask, center="second-max", scale=scale, eps=eps
    )
    return against_the_best_other.clamp(min=0.0)


@recipe(
    "Pass@k training, in closed form",
    "arXiv 2508.10751",
    code="RUCAIBox/Passk_Training passk_adv.py",
    passes=("group_ids",),
    settings={"k": 1},
)
def pass_at_k_training(
    rewards: Tensor,
    group_ids: GroupIds | None = None,
    *,
    k: int = 4,
    group_size: int | None = None,
    mask: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """A = f / s right, -f c / ((n - c) s) wrong, f = C(n - c, k) / C(n, k), s = sqrt(f (1 - f)) + eps.

    c of n responses are right (R > 0): the mean of (max - mean) / std over all sets of k. The code has
    f - C(n - c - 1, k - 1) / C(n - 1, k - 1) for a wrong one, which is the same.
    """
    k = check.whole("k", k, "responses that are drawn")
    if k < 1:
        raise ValueError(f"k: expected an integer of at least 1, got {k}")
    rewards = _scores(rewards, group_ids, mask)
    right = torch.where(rewards.isnan(), torch.nan, (rewards > 0).float())
    found = group_statistics(right, group_ids, ("count", "mean"), group_size=group_size, mask=mask)
    n, rate = found["count"].double(), found["mean"].double()
    wrong = (n * (1 - rate)).round()
    log_fail = _log_falling(wrong, k) - _log_falling(n, k)
    fail = torch.where(wrong >= k, log_fail.exp(), 0.0)
    lost = torch.where(wrong > 0, -fail * (n - wrong) / wrong, 0.0)
    spread = (fail * (1 - fail)).sqrt() + check.not_negative("eps", eps)
    advantages = torch.where(right > 0, fail, lost) / spread
    return torch.where(~rewards.isnan() & (n >= k), advantages, 0.0).float()


def _log_falling(n: Tensor, k: int) -> Tensor:
    """log of n (n - 1) ... (n - k + 1), f64; n at least k."""
    n = n.clamp(min=k)
    return torch.lgamma(n + 1) - torch.lgamma(n - k + 1)


def _there(rewards: Tensor, group_ids: GroupIds | None, mask: Tensor | None) -> Tensor:
    """bool [B], or in the shape of Groups: which are scored, in any component, and there, and in a group."""
    there = ~rewards.isnan()
    if isinstance(group_ids, Groups):
        there = there if there.shape == group_ids.shape else there.any(-1)
        there = there & (group_ids.index.to(there.device) >= 0)
    elif there.ndim > 1:
        there = there.any(-1)
    return there if mask is None else there & (mask != 0)


def _scores(rewards: Tensor, group_ids: GroupIds | None, mask: Tensor | None) -> Tensor:
    """One of each response, a constant, finite; NaN: not scored, not there, or in no group."""
    rewards = check.constant("rewards", check.rewards("rewards", rewards))
    if not rewards.ndim:
        raise ValueError("rewards: expected shape [B], got []")
    entries = group_ids.shape if isinstance(group_ids, Groups) else rewards.shape[:1]
    check.shape("rewards", rewards, entries, "one per entry of the groups")
    if mask is not None:
        check.shape("mask", check.tensor("mask", mask), rewards.shape, "as rewards")
        check.same_device("mask", mask, "rewards", rewards)
        rewards = rewards.masked_fill(check.constant("mask", mask) == 0, torch.nan)
    if isinstance(group_ids, Groups):
        rewards = rewards.masked_fill(group_ids.index.to(rewards.device) < 0, torch.nan)
    return finite_or_nan("rewards", rewards)


@recipe(
    "MaxRL (maximum likelihood reinforcement learning)",
    "arXiv 2602.02710",
    code="prime-rl, SkyRL",
    passes=("group_ids",),
)
def maxrl(
    rewards: Tensor,
    group_ids: GroupIds | None = None,
    *,
    group_size: int | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """A = (R - mean) / mean, 0 where the mean is not above 0."""
    rewards = _scores(rewards, group_ids, mask)
    mean = group_statistics(rewards, group_ids, ("mean",), group_size=group_size, mask=mask)["mean"]
    positive = mean > 0
    advantages = group_advantages(
        rewards, group_ids, group_size=group_size, mask=mask, scale=torch.where(positive, mean, 1.0)
    )
    return torch.where(positive, advantages, 0.0)


@recipe(
    "BNPO (beta normalization)",
    "arXiv 2506.02864",
    code="changyi7231/BNPO bnpo_ray_trainer.py",
    passes=("group_ids",),
)
def bnpo(
    rewards: Tensor,
    group_ids: GroupIds | None = None,
    *,
    group_size: int | None = None,
    mask: Tensor | None = None,
    low: float = 0.0,
    high: float = 1.0,
    weight_max: float = 1e6,
) -> Tensor:
    """A = (R - p) / f(p), p = mean, f = density of Beta(1 + a / 3, 1 + b / 3), both at least 1.

    low, high: rewards lie between, and are mapped from there to 0 and 1. weight_max: of 1 / f. A response alone has p =
    0. a and b are fitted to the mean and variance of p over the prompts; f is 1 for one prompt, and where no p differs
    from another (the code divides by 0).
    """
    low, high = check.finite("low", low), check.finite("high", high)
    if not low < high:
        raise ValueError(f"high: expected a number above low ({low}), got {high}")
    rewards = _scores(rewards, group_ids, mask)
    if check.values_checked(rewards):
        within = rewards.isnan() | ((rewards >= low) & (rewards <= high))
        check.every("rewards", within, rewards, f"numbers from low = {low:g} to high = {high:g}, or NaN")
    scaled = (rewards.double() - low) / (high - low)
    found = group_statistics(scaled, group_ids, ("count", "mean"), group_size=group_size, mask=mask)
    there = ~rewards.isnan()
    p = torch.where(found["count"] > 1, found["mean"].double(), 0.0)
    share = torch.where(there, 1.0 / found["count"].double(), 0.0)  # so that every prompt counts as one
    prompts = share.sum().round()
    mean = (share * p).sum() / prompts
    variance = (share * (p - mean).square()).sum() / (prompts - 1)
    spread = torch.where((prompts > 1) & (variance > 0), mean * (1 - mean) / variance - 1, 0.0)
    a = (1 + spread * mean / 3).clamp(min=1)
    b = (1 + spread * (1 - mean) / 3).clamp(min=1)
    log_density = torch.xlogy(a - 1, p) + torch.xlogy(b - 1, 1 - p) - (a.lgamma() + b.lgamma() - (a + b).lgamma())
    weight = (-log_density).exp().clamp(max=check.positive("weight_max", weight_max))
    return torch.where(there, (scaled - p) * weight, 0.0).float()
