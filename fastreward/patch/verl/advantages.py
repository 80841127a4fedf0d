"""verl.trainer.ppo.core_algos: the advantage estimators, with verl's conventions.

Standard deviations with ddof 1 and eps added, a response alone in its group with mean 0 and deviation 1, observation
tokens skipped by GAE and REINFORCE++, whitening by rsqrt(var + 1e-8) over the batch's tokens. Under the mask results
are 0, where verl leaves what its recurrence carried past an observation token.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from fastreward._arguments.groups import Groups
from fastreward.group import group_advantages
from fastreward.patch.verl.batch import constants, flags, lengths, number, outcomes, over_tokens, prompts
from fastreward.patch.verl.replacement import CORE, NotServed, Replacement
from fastreward.returns import discounted_returns, gae
from fastreward.whiten import whiten

Pair = tuple[Tensor, Tensor]


# ------------------------------------------------------------------------------------------------------- over tokens
def compute_gae_advantage_return(
    _: Any, token_level_rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, lam: float
) -> Pair:
    """Whitened advantages, and advantages + values."""
    constants(token_level_rewards, values)
    mask = flags(response_mask, token_level_rewards)
    discounts: Any = {"gamma": number(gamma), "lam": number(lam)}
    return gae(token_level_rewards, values, mask, **discounts, masked_rewards="drop", whiten=True)


def compute_reinforce_plus_plus_outcome_advantage(
    _: Any, token_level_rewards: Tensor, response_mask: Tensor, config: Any = None, **__: Any
) -> Pair:
    """Whitened returns, and the returns."""
    constants(token_level_rewards)
    mask = flags(response_mask, token_level_rewards)
    gamma = number(_given(config).gamma)
    returns = discounted_returns(token_level_rewards, mask, gamma=gamma, masked_rewards="drop")
    return whiten(returns, mask), returns


def compute_remax_outcome_advantage(
    _: Any, token_level_rewards: Tensor, reward_baselines: Tensor, response_mask: Tensor, config: Any = None, **__: Any
) -> Pair:
    """Returns less the reward of the greedy response, and the returns."""
    constants(token_level_rewards, reward_baselines)
    mask = flags(response_mask, token_level_rewards)

    def later(beyond: Tensor | None) -> Tensor:
        return discounted_returns(token_level_rewards, mask, initial=beyond, masked_rewards="drop")

    return later(-reward_baselines), later(None)


# ------------------------------------------------------------------------------------------------------- of outcomes
def compute_grpo_outcome_advantage(
    _: Any,
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any,
    epsilon: float = 1e-6,
    norm_adv_by_std_in_grpo: bool = True,
    config: Any = None,
) -> Pair:
    """(score - mean) / (std + epsilon), or without the division: the plain and the vectorized form."""
    mask, scores, groups = _batch(token_level_rewards, response_mask, index)
    return _twice(over_tokens(_grpo(scores, groups, epsilon, norm_adv_by_std_in_grpo), mask))


def compute_grpo_passk_outcome_advantage(
    _: Any,
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any,
    epsilon: float = 1e-6,
    norm_adv_by_std_in_grpo: bool = True,
    config: Any = None,
    **__: Any,
) -> Pair:
    """The best of a group gets its lead over the second (divided by std + epsilon), the others 0."""
    scaled = _given(config).get("norm_adv_by_std_in_grpo", True)
    mask, scores, groups = _batch(token_level_rewards, response_mask, index)
    if bool(_alone(groups).any()):
        raise NotServed  # an error
    lead = group_advantages(scores, groups, center="second-max", scale="std" if scaled else "none", eps=epsilon)
    return _twice(over_tokens(lead.clamp(min=0.0), mask))


def compute_reinforce_plus_plus_baseline_outcome_advantage(
    _: Any,
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any,
    epsilon: float = 1e-6,
    config: Any = None,
    **__: Any,
) -> Pair:
    """score - mean, whitened over the tokens."""
    mask, scores, groups = _batch(token_level_rewards, response_mask, index)
    centred = group_advantages(scores, groups, scale="none", singleton="raw")
    return _twice(_whitened(centred, mask))


def compute_rloo_outcome_advantage(
    _: Any,
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any,
    epsilon: float = 1e-6,
    config: Any = None,
    **__: Any,
) -> Pair:
    """score - mean of the others; a score alone stays."""
    mask, scores, groups = _batch(token_level_rewards, response_mask, index)
    return _twice(over_tokens(_rloo(scores, groups, "raw"), mask))


def compute_rloo_vectorized_outcome_advantage(
    _: Any,
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any,
    epsilon: float = 1e-6,
    config: Any = None,
    **__: Any,
) -> Pair:
    """score - mean of the others; a score alone gives 0."""
    mask, scores, groups = _batch(token_level_rewards, response_mask, index)
    return _twice(over_tokens(_rloo(scores, groups, "zero"), mask))


def compute_opo_outcome_advantage(
    _: Any,
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any,
    epsilon: float = 1e-6,
    config: Any = None,
    **__: Any,
) -> Pair:
    """score - mean of the scores weighted by length."""
    mask, scores, groups = _batch(token_level_rewards, response_mask, index)
    options: Any = {"center": "length-weighted", "scale": "none", "singleton": "raw", "lengths": lengths(mask)}
    return _twice(over_tokens(group_advantages(scores, groups, **options), mask))


def compute_gpg_outcome_advantage(
    _: Any,
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any,
    epsilon: float = 1e-6,
    f_norm: float = 1.0,
    alpha: float = 1.0,
    config: Any = None,
    **__: Any,
) -> Pair:
    """(score - mean) * (responses / responses with a score) / f_norm."""
    mask, scores, groups = _batch(token_level_rewards, response_mask, index)
    share = len(scores) / max(1, int(scores.count_nonzero()))
    centred = group_advantages(scores, groups, scale="none", singleton="raw")
    return _twice(over_tokens(share * centred / number(f_norm), mask))


def compute_gdpo_outcome_advantage(
    _: Any,
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any,
    epsilon: float = 1e-6,
    norm_adv_by_std_in_grpo: bool = True,
    config: Any = None,
    non_tensor_batch: Any = None,
    batch: Any = None,
    **__: Any,
) -> Pair:
    """GRPO's advantage of each of several rewards, their weighted sum whitened over the tokens."""
    mask, scores, groups = _batch(token_level_rewards, response_mask, index)
    components, weights = [scores], [1.0]
    if config is not None and non_tensor_batch is not None and batch is not None:
        keys = config.get("gdpo_reward_keys", None)
        if not keys or not all(key in non_tensor_batch for key in keys):
            raise NotServed  # an error that names them
        columns = [np.asarray(non_tensor_batch[key], dtype=np.float32) for key in keys]
        components = [torch.tensor(column, device=scores.device) for column in columns]
        weights = [number(w) for w in config.get("gdpo_reward_weights", None) or [1.0] * len(keys)]
        if len(weights) < len(keys) or any(not bool(c.isfinite().all()) for c in components):
            raise NotServed
    total = torch.zeros_like(scores)
    for component, weight in zip(components, weights, strict=False):
        total += weight * _grpo(component, groups, epsilon, norm_adv_by_std_in_grpo)
    return _twice(_whitened(total, mask))


# ------------------------------------------------------------------------------------------------------------- shared
def _batch(token_level_rewards: Tensor, response_mask: Tensor, index: Any) -> tuple[Tensor, Tensor, Groups]:
    """The mask, the scores [B] and the groups of a batch of outcomes."""
    constants(token_level_rewards)
    mask = flags(response_mask, token_level_rewards)
    return mask, outcomes(token_level_rewards, mask), prompts(index, len(token_level_rewards))


def _grpo(scores: Tensor, groups: Groups, epsilon: float, scaled: bool) -> Tensor:
    if not scaled:
        return group_advantages(scores, groups, scale="none", singleton="raw")
    found = group_advantages(scores, groups, eps=epsilon, singleton="raw")
    return torch.where(_alone(groups).to(scores.device), scores / (1.0 + epsilon), found)


def _rloo(scores: Tensor, groups: Groups, singleton: Any) -> Tensor:
    return group_advantages(scores, groups, center="leave-one-out", scale="none", singleton=singleton)


def _alone(groups: Groups) -> Tensor:
    """[B]: whether a response is the only one of its group."""
    return (groups.sizes == 1)[groups.index]


def _whitened(values: Tensor, mask: Tensor) -> Tensor:
    tokens = over_tokens(values, mask)
    return whiten(tokens, mask, out=tokens)


def _twice(advantages: Tensor) -> Pair:
    """verl's returns of outcomes are the advantages, the same tensor."""
    return advantages, advantages


def _given(config: Any) -> Any:
    if config is None:
        raise NotServed  # verl asserts that there is one
    return config


_OUTCOME: Final = ("token_level_rewards", "response_mask", "index", "epsilon")
_NORMED: Final = (*_OUTCOME, "norm_adv_by_std_in_grpo", "config")
_KWARGS: Final = (*_OUTCOME, "config", "kwargs")
_GROUPS, _RETURNS = "fastreward.group_advantages", "fastreward.discounted_returns"
_GAE: Final = ("token_level_rewards", "values", "response_mask", "gamma", "lam")
_REINFORCE: Final = ("token_level_rewards", "response_mask", "config", "kwargs")
_REMAX: Final = ("token_level_rewards", "reward_baselines", "response_mask", "config", "kwargs")
_GPG: Final = (*_OUTCOME, "f_norm", "alpha", "config", "kwargs")
_GDPO: Final = (*_NORMED, "non_tensor_batch", "batch", "kwargs")
_LOOP: Final = "one scan instead of a Python loop over the tokens"
_DICT: Final = "one pass instead of a Python loop over the responses"

REPLACEMENTS: Final = tuple(
    Replacement(f"{CORE}.{name}", parameters, ours, what, why)
    for name, parameters, ours, what, why in (
        ("compute_gae_advantage_return", _GAE, compute_gae_advantage_return, "fastreward.gae", _LOOP),
        ("compute_grpo_outcome_advantage", _NORMED, compute_grpo_outcome_advantage, _GROUPS, _DICT),
        ("compute_grpo_vectorized_outcome_advantage", _NORMED, compute_grpo_outcome_advantage, _GROUPS, _DICT),
        ("compute_gdpo_outcome_advantage", _GDPO, compute_gdpo_outcome_advantage, _GROUPS, _DICT),
        (
            "compute_grpo_passk_outcome_advantage",
            (*_NORMED, "kwargs"),
            compute_grpo_passk_outcome_advantage,
            _GROUPS,
            _DICT,
        ),
        (
            "compute_reinforce_plus_plus_baseline_outcome_advantage",
            _KWARGS,
            compute_reinforce_plus_plus_baseline_outcome_advantage,
            _GROUPS,
            _DICT,
        ),
        ("compute_rloo_outcome_advantage", _KWARGS, compute_rloo_outcome_advantage, _GROUPS, _DICT),
        (
            "compute_rloo_vectorized_outcome_advantage",
            _KWARGS,
            compute_rloo_vectorized_outcome_advantage,
            _GROUPS,
            _DICT,
        ),
        ("compute_opo_outcome_advantage", _KWARGS, compute_opo_outcome_advantage, _GROUPS, _DICT),
        ("compute_gpg_outcome_advantage", _GPG, compute_gpg_outcome_advantage, _GROUPS, _DICT),
        (
            "compute_reinforce_plus_plus_outcome_advantage",
            _REINFORCE,
            compute_reinforce_plus_plus_outcome_advantage,
            _RETURNS,
            _LOOP,
        ),
        ("compute_remax_outcome_advantage", _REMAX, compute_remax_outcome_advantage, _RETURNS, "one scan"),
    )
)
