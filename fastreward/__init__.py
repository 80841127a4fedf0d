"""fastreward: compiled kernels for RL training of language models, between the rollouts and the optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING as _TYPE_CHECKING

from fastreward import losses
from fastreward._loss_call.results import PolicyLoss
from fastreward._runtime.dispatch import backend
from fastreward._runtime.errors import BackendError
from fastreward.correction import correction_weights, off_policy_sequence_mask
from fastreward.group import group_advantages
from fastreward.linear_logprobs import linear_token_logprobs
from fastreward.linear_policy_loss import linear_policy_loss
from fastreward.logits_policy_loss import logits_policy_loss
from fastreward.logprobs import TokenStats, token_logprobs
from fastreward.policy_loss import policy_loss
from fastreward.preference_loss import preference_loss
from fastreward.whiten import whiten

if _TYPE_CHECKING:
    from fastreward import patch, recipes
    from fastreward.prefix_tree.tree import PrefixTree

__version__ = "0.1.0"
__all__ = [
    "BackendError",
    "PolicyLoss",
    "PrefixTree",
    "TokenStats",
    "backend",
    "correction_weights",
    "group_advantages",
    "linear_policy_loss",
    "linear_token_logprobs",
    "logits_policy_loss",
    "losses",
    "off_policy_sequence_mask",
    "patch",
    "policy_loss",
    "preference_loss",
    "recipes",
    "token_logprobs",
    "whiten",
]


_MODULES = ("patch", "recipes")  # not imported with the package


def __getattr__(name: str) -> object:
    """Recipes, patches and trees are loaded when they are asked for: they cost more to import than the operations."""
    import importlib

    if name in _MODULES:
        return importlib.import_module(f"fastreward.{name}")
    if name == "PrefixTree":
        return importlib.import_module("fastreward.prefix_tree").PrefixTree
    raise AttributeError(f"module 'fastreward' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
