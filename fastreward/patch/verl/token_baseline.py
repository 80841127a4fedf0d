"""verl.trainer.ppo.core_algos: the optimal token baseline, by columns of the batch and by tokens that count.

B_t = sum of G_t W_t / (sum of W_t + epsilon) over the responses to a prompt, W_t = the sum up to t of
1 - 2 p + sum over v of p_v^2; nothing is subtracted from a response alone, nor (handle_zero_tail) where the longest one
of a group goes on beyond the second.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from fastreward._arguments.groups import Groups
from fastreward.group import group_advantages
from fastreward.patch.verl.batch import constants, flags, lengths, number, prompts
from fastreward.patch.verl.replacement import CORE, NotServed, Replacement
from fastreward.returns import discounted_returns

Pair = tuple[Tensor, Tensor]


def compute_optimal_token_baseline_advantage(
    _: Any,
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any,
    old_log_probs: Tensor,
    sum_pi_squared: Tensor,
    rollout_is_weights: Tensor | None = None,
    handle_zero_tail: bool = True,
    epsilon: float = 1e-8,
    **__: Any,
) -> Pair:
    """G_t - B_t, where a response's t-th position is its column; and G_t."""
    mask = flags(response_mask, token_level_rewards)
    returns, energy = _scans(token_level_rewards, mask, old_log_probs, sum_pi_squared, rollout_is_weights)
    groups, tokens = prompts(index, len(mask)), lengths(mask)
    cut = _tails(tokens, groups) if handle_zero_tail else None
    alone = (groups.sizes == 1)[groups.index]
    own = _baselines(returns, energy, groups, alone, cut, number(epsilon))
    return own.neg_().add_(returns).masked_fill_(~mask, 0.0), returns


def compute_multi_turn_optimal_token_baseline_advantage(
    _: Any,
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any,
    old_log_probs: Tensor,
    sum_pi_squared: Tensor,
    rollout_is_weights: Tensor | None = None,
    handle_zero_tail: bool = True,
    epsilon: float = 1e-8,
    **__: Any,
) -> Pair:
    """The same, where a response's t-th position is its t-th token that counts."""
    mask = flags(response_mask, token_level_rewards)
    returns, energy = _scans(token_level_rewards, mask, old_log_probs, sum_pi_squared, rollout_is_weights)
    groups, tokens = prompts(index, len(mask)), lengths(mask)
    cut = _tails(tokens, groups) if handle_zero_tail else None
    there = torch.bincount(groups.index[tokens > 0], minlength=groups.count)  # an empty response is in no group
    alone = (there <= 1)[groups.index]
    holes = bool((mask[:, 1:] > mask[:, :-1]).any())
    at = mask.cumsum(-1).sub_(1).clamp_(min=0) if holes else None
    packed = [x if at is None else torch.zeros_like(x).scatter_add_(1, at, x) for x in (returns, energy)]
    own = _baselines(packed[0], packed[1], groups, alone, cut, number(epsilon))
    own = own if at is None else own.gather(1, at)
    return own.neg_().add_(returns).masked_fill_(~mask, 0.0), returns


def _scans(
    rewards: Tensor, mask: Tensor, old_log_probs: Tensor, sum_pi_squared: Tensor, weights: Tensor | None
) -> Pair:
    """G and W [B, T], 0 under the mask."""
    constants(rewards, old_log_probs, sum_pi_squared, *(() if weights is None else (weights,)))
    given = (old_log_probs, sum_pi_squared, *(() if weights is None else (weights,)))
    if rewards.ndim != 2 or any(x.shape != rewards.shape for x in given):
        raise NotServed
    step = old_log_probs.exp().mul_(-2.0).add_(1.0).add_(sum_pi_squared)
    if weights is not None:
        step.mul_(weights).mul_(weights)
    returns = discounted_returns(rewards, mask, masked_rewards="drop")
    return returns, discounted_returns(step, mask, reverse=False, masked_rewards="drop")


def _tails(tokens: Tensor, groups: Groups) -> Tensor:
    """[B]: for the one longest response of a group the length of the second, for the others -1."""
    lead = group_advantages(tokens, groups, center="second-max", scale="none")
    return torch.where(lead > 0, tokens - lead, -1.0)


def _baselines(
    returns: Tensor, energy: Tensor, groups: Groups, alone: Tensor, cut: Tensor | None, epsilon: float
) -> Tensor:
    """[B, T]: of each response, at each of its positions."""

    def summed(x: Tensor) -> Tensor:
        return x.new_zeros(groups.count, x.shape[1]).index_add_(0, groups.index, x)

    baseline = summed(returns * energy).div_(summed(energy).add_(epsilon))
    own = baseline[groups.index]
    own[alone] = 0.0
    if cut is not None:
        longest = cut >= 0
        columns = torch.arange(own.shape[1])
        own[longest] = own[longest].masked_fill_(columns >= cut[longest].unsqueeze(-1), 0.0)
    return own


_PARAMETERS: Final = (
    *("token_level_rewards", "response_mask", "index", "old_log_probs", "sum_pi_squared"),
    *("rollout_is_weights", "handle_zero_tail", "epsilon", "kwargs"),
)
_WHY: Final = "two scans, and one sum for all groups"
REPLACEMENTS: Final = tuple(
    Replacement(f"{CORE}.{ours.__name__}", _PARAMETERS, ours, "fastreward.discounted_returns", _WHY)
    for ours in (compute_optimal_token_baseline_advantage, compute_multi_turn_optimal_token_baseline_advantage)
)
