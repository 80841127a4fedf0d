"""Compiled kernels for RL training of language models: what is computed between the rollouts and the optimizer.

Log-probs of tokens, with entropy and more (a `TokenStats`):
    token_logprobs            from logits
    linear_token_logprobs     from hidden states and LM head, without the logits
Divergences of a student's distribution from a teacher's, with their gradient (a `DivergenceStats`):
    token_divergence          from logits: KL, Jensen-Shannon, ... (`divergences`), or one of your own
    linear_divergence         the same from hidden states and LM heads, without any [N, V] tensor
Losses, with their gradient in the same pass (a `PolicyLoss`):
    policy_loss               from log-probs: PPO, CISPO, GSPO, ... (`losses`), or one of your own (`losses.define`)
    logits_policy_loss        from logits
    linear_policy_loss        from hidden states and LM head
    value_loss                of a critic's values
    loss_normalizer           what a loss over the batches of several ranks is divided by
    preference_loss           from the log-probs of chosen and rejected responses: DPO, SimPO, ...
    Clip                      which clip acted on a token, where return_tokens=("clip",) asks
Advantages and weights:
    group_advantages          rewards against those of the same group
    group_statistics          baselines, spreads, ranks, win rates and pass@k of groups
    Groups                    which rollouts or turns belong together, worked out once
    EmaBaseline               a moving average of rewards for each key, from batch to batch
    whiten                    to mean 0 and variance 1
    segment_ids               turns, steps or thoughts of responses: the segment of each token
    segment_reduce            one value for each segment: sum, mean, min, soft minimum, ...
    segment_diff              what each segment has added to a potential
    scatter_rewards           values of segments or responses on their tokens
    rewards                   a module: shaping, gates and combinations of rewards before that
    token_rewards             a score on a token of its sequence, less a KL penalty on each
    discounted_returns        rewards of later tokens, discounted
    gae                       advantages and returns from rewards and values
    lambda_returns, vtrace    targets of a value function, on- and off-policy
    correction_weights        for what the inference engine sampled with slightly other probabilities
    off_policy_sequence_mask  sequences to drop
    PrefixTree                rollouts that share prefixes: credit for each token, and batches without repetition
    credit_page               an HTML page of a batch, token by token: advantages, log-probs, ratios, which clip acted
Batches:
    balance_partitions        sequences to ranks or micro-batches of nearly equal length
A rollout engine against the trainer:
    compare                   log-probs, top-k or logits of both: how far they are apart, and what is wrong
Published methods, each in one call:
    recipes                   `fastreward recipes` lists them
Trainers:
    patch.trl                 TRL scores through fastreward; patch.undo takes it back

`backend` chooses where a call runs, `BackendError` says why it can't. `fastreward doctor` shows what is here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING as _TYPE_CHECKING

from fastreward import divergences, losses, rewards
from fastreward._loss_call.divergence import DivergenceStats
from fastreward._loss_call.results import PolicyLoss
from fastreward._runtime.dispatch import backend
from fastreward._runtime.errors import BackendError
from fastreward._runtime.layout import Clip
from fastreward._runtime.logprobs import TokenStats
from fastreward.balance import balance_partitions
from fastreward.compare import compare
from fastreward.correction import correction_weights, off_policy_sequence_mask
from fastreward.divergence import token_divergence
from fastreward.ema_baseline import EmaBaseline
from fastreward.group import Groups as Groups
from fastreward.group import group_advantages
from fastreward.group_statistics import group_statistics
from fastreward.linear_divergence import linear_divergence
from fastreward.linear_logprobs import linear_token_logprobs
from fastreward.linear_policy_loss import linear_policy_loss
from fastreward.logits_policy_loss import logits_policy_loss
from fastreward.logprobs import token_logprobs
from fastreward.loss_normalizer import loss_normalizer
from fastreward.policy_loss import policy_loss
from fastreward.preference_loss import preference_loss
from fastreward.returns import discounted_returns, gae, lambda_returns, vtrace
from fastreward.rewards import token_rewards
from fastreward.segments import scatter_rewards, segment_diff, segment_ids, segment_reduce
from fastreward.value_loss import value_loss
from fastreward.whiten import whiten

if _TYPE_CHECKING:
    from fastreward import patch, recipes
    from fastreward.credit_plot.page import credit_page
    from fastreward.prefix_tree.tree import PrefixTree

__version__ = "0.1.0"
__all__ = [
    "BackendError",
    "Clip",
    "DivergenceStats",
    "EmaBaseline",
    "Groups",
    "PolicyLoss",
    "PrefixTree",
    "TokenStats",
    "backend",
    "balance_partitions",
    "compare",
    "correction_weights",
    "credit_page",
    "discounted_returns",
    "divergences",
    "gae",
    "group_advantages",
    "group_statistics",
    "lambda_returns",
    "linear_divergence",
    "linear_policy_loss",
    "linear_token_logprobs",
    "logits_policy_loss",
    "loss_normalizer",
    "losses",
    "off_policy_sequence_mask",
    "patch",
    "policy_loss",
    "preference_loss",
    "recipes",
    "rewards",
    "scatter_rewards",
    "segment_diff",
    "segment_ids",
    "segment_reduce",
    "token_divergence",
    "token_logprobs",
    "token_rewards",
    "value_loss",
    "vtrace",
    "whiten",
]


_MODULES = ("patch", "recipes")  # not imported with the package


def __getattr__(name: str) -> object:
    """Recipes, patches, trees and pages are loaded when they are asked for: they cost more to import than the rest."""
    import importlib

    if name in _MODULES:
        return importlib.import_module(f"fastreward.{name}")
    if name == "PrefixTree":
        return importlib.import_module("fastreward.prefix_tree").PrefixTree
    if name == "credit_page":
        return importlib.import_module("fastreward.credit_plot.page").credit_page
    import difflib

    known = {x: f"losses.{x}" for x in losses.__all__} | {x: x for x in __all__}
    close = [name] if name in known else difflib.get_close_matches(name, known)
    near = ", ".join(f"fastreward.{known[x]}" for x in close)
    raise AttributeError(f"module 'fastreward' has no attribute {name!r}{f'; did you mean {near}?' if near else ''}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
