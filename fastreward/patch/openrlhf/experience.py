"""RemoteExperienceMaker: advantages and returns of all experiences, without a Python loop over tokens.

Values under the mask are never read by OpenRLHF. Between action tokens they are its own here too (the sums decay
through the gap); before the first action token of a sequence they are 0, or what normalisation makes of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any, Final

import torch
from torch import Tensor

from fastreward.group import group_advantages
from fastreward.patch.openrlhf.serving import Serving, need
from fastreward.returns import discounted_returns, gae

#: How an estimator compares rewards of the same prompt: options of group_advantages. Groups of one: as 0 / 0.
_BASELINES: Final[dict[str, dict[str, Any]]] = {
    "rloo": {"center": "leave-one-out", "scale": "none"},
    "reinforce_baseline": {"center": "mean", "scale": "none", "singleton": "zero"},
    "dr_grpo": {"center": "mean", "scale": "none", "singleton": "zero"},
    "group_norm": {"center": "mean", "scale": "std", "ddof": 1, "eps": 1e-9},
}
#: Estimators whose advantages are normalised over the batch.
_NORMALIZED: Final = ("gae", "reinforce", "reinforce_baseline")
_ESTIMATORS: Final = ("gae", "reinforce", "flash_reinforce", *_BASELINES)


def advantages_and_returns(
    serving: Serving,
    maker: Any,
    values: Tensor,  # f32 [B, T], as the others
    rewards: Tensor,
    action_mask: Tensor,
    gamma: float,
    lambd: float,
) -> tuple[Tensor, Tensor]:
    """get_advantages_and_returns: GAE over all columns; masked ones have value and reward 0, and take time."""
    serving.tokens(rewards, values)
    need(values.dtype == torch.float32)
    serving.mask(action_mask, rewards)
    return gae(rewards, values, action_mask, gamma=gamma, lam=lambd, at_masked="decay", masked_rewards="drop")


def cumulative_returns(serving: Serving, maker: Any, rewards: Tensor, action_mask: Tensor, gamma: float) -> Tensor:
    """get_cumulative_returns: discounted rewards over all columns; masked ones have reward 0, and take time."""
    serving.tokens(rewards)
    serving.mask(action_mask, rewards)
    return discounted_returns(rewards, action_mask, gamma=gamma, at_masked="decay", masked_rewards="drop")


def all_advantages(serving: Serving, own: ModuleType, maker: Any, experiences: list[Any]) -> list[Any]:
    """compute_advantages_and_returns. Fills in each experience, as OpenRLHF does, and returns them.

    Length penalties, rewards per token, GAE and returns go through the names that OpenRLHF has for them, whoever has
    bound them.
    """
    args, estimator = maker.strategy.args, maker.advantage_estimator
    need(len(experiences) > 0 and estimator in _ESTIMATORS and args.algo.advantage.estimator == estimator)
    for experience in experiences:
        experience.rewards = experience.rewards.to(torch.promote_types(experience.rewards.dtype, torch.float32))
    own.apply_length_penalties(experiences, args)
    shaped = _shaped(experiences, args.rollout.n_samples_per_prompt, estimator)
    normalized = estimator in _NORMALIZED
    if estimator not in ("gae", "reinforce") and args.algo.advantage.gamma != 1.0:
        own.logger.warning(f"gamma is set to 1.0 for {estimator}")
        args.algo.advantage.gamma = 1.0
    for experience, scores in zip(experiences, shaped, strict=True):
        rewards = own.compute_reward(
            scores,
            maker.kl_ctl.value,
            experience.kl,
            action_mask=experience.action_mask,
            reward_clip_range=args.reward.clip_range,
        )
        mask, advantage = experience.action_mask, args.algo.advantage
        if estimator == "gae":
            experience.advantages, experience.returns = maker.get_advantages_and_returns(
                experience.values, rewards, mask, advantage.gamma, advantage.lambd
            )
        else:
            experience.returns = maker.get_cumulative_returns(rewards, mask, advantage.gamma)
            experience.advantages = experience.returns if normalized else experience.returns.clone()
        experience.info["return"] = rewards.sum(dim=-1)
        experience.kl = None
    if normalized:
        _normalize(experiences, scale=not args.algo.advantage.no_std_norm)
    return experiences


def _shaped(experiences: Sequence[Any], size: int, estimator: str) -> list[Tensor]:
    """Rewards against those of the same prompt, for each experience, whose rollouts may come in any order.

    Also notes the deviation of each group.
    """
    order = torch.tensor(list(itertools.chain.from_iterable(e.index for e in experiences)))
    given = torch.cat([e.rewards for e in experiences])
    rewards = torch.empty_like(given)
    rewards[order] = given
    groups = rewards.reshape(-1, size)
    counts = [len(e.index) for e in experiences]
    if size > 1:
        deviations = groups.std(-1).repeat_interleave(size)[order].split(counts)  # type: ignore[no-untyped-call]
        for experience, deviation in zip(experiences, deviations, strict=True):
            experience.info["group_reward_std"] = deviation
    if estimator == "flash_reinforce":
        rewards = rewards - rewards.mean()
    elif estimator in _BASELINES:
        rewards = _against_group(groups, size, estimator)
    return list(rewards[order].split(counts))  # type: ignore[no-untyped-call]


def _against_group(groups: Tensor, size: int, estimator: str) -> Tensor:
    """[B] of rewards [prompts, size]. A reward that is not finite makes its whole group NaN."""
    finite = groups.isfinite().all(-1, keepdim=True)
    options: dict[str, Any] = {"singleton": "nan"} | _BASELINES[estimator]
    result = group_advantages(torch.where(finite, groups, 0.0).flatten(), group_size=size, **options)
    return torch.where(finite.expand_as(groups).flatten(), result, torch.nan).to(groups.dtype)


def _normalize(experiences: Sequence[Any], *, scale: bool) -> None:
    """Advantages less their mean over all action tokens and, with `scale`, over their deviation (ddof 0)."""
    count = _total(e.action_mask for e in experiences)
    mean = (_total(e.advantages * e.action_mask for e in experiences) / count).float()
    for experience in experiences:
        experience.advantages = experience.advantages - mean
    if scale:
        variance = _total(e.advantages.square() * e.action_mask for e in experiences) / count
        inverse = variance.clamp(min=1e-8).rsqrt().float()
        for experience in experiences:
            experience.advantages.mul_(inverse)


def _total(parts: Iterable[Tensor]) -> Tensor:
    """f64 [], the sum of all elements of all parts."""
    return torch.stack([part.sum().double() for part in parts]).sum()
