"""Credit schemes on rollouts: every recipe that gives advantages, or what they are made of token by token."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from fastreward.group import group_advantages
from fastreward.prefix_tree.rollouts import Rollouts
from fastreward.prefix_tree.tree import PrefixTree
from fastreward.recipes import RECIPES, Recipe
from fastreward.recipes._catalogue.example import outcome, responses
from fastreward.recipes._catalogue.registry import FAMILIES
from fastreward.whiten import whiten

#: The operation under its defaults, which is GRPO's scheme: it stands beside the recipes.
_OPERATION: Final = "group_advantages"
#: What a recipe has to return. The last two become advantages as in the recipes' examples.
_CREDIT: Final = ("advantages", "response advantages", "token rewards", "node values")
#: What the tokens of the recipes' examples are as text: the first two responses answer one question.
_WORDS: Final = ("", "× 6 ", "= 60 ", "is ", "108 ", "17 ", "So ", "+ 42 ", "= ", "102 ")


@dataclass(frozen=True, eq=False)
class Scheme:
    """A scheme's advantages, f32 [B, T], on some rollouts. family: the heading that it stands under."""

    name: str
    family: str
    advantages: Tensor


def example() -> Rollouts:
    """The two built-in rollouts: those of the first group of the recipes' examples."""
    two = {name: x[:2] for name, x in responses().items()}
    texts = dict(enumerate(_WORDS))
    lengths = two["mask"].sum(-1)
    return Rollouts(two["tokens"], lengths, two["rewards"].double(), two["group_ids"], two["mask"], texts)


def on_example(names: Collection[str] = ()) -> tuple[list[Scheme], dict[str, str]]:
    """The schemes on the two built-in rollouts, in the order of the catalogue; all, or those of these names.

    Each runs as its example does, whatever it takes besides rewards; also why others are not there.
    """
    _check(names)
    given, found, missing = responses(), [], {}
    if _wanted(_OPERATION, names):
        own = group_advantages(given["rewards"], given["group_ids"])
        found.append(Scheme(_OPERATION, "Operations", _per_token(own, given["mask"])[:2]))
    for recipe in _recipes():
        if _wanted(recipe.name, names):
            own = outcome(recipe.example(), "advantages")
            try:
                found.append(Scheme(recipe.name, FAMILIES[recipe.family], _per_token(own, given["mask"])[:2]))
            except ValueError as error:  # the responses of its example are others
                missing[recipe.name] = str(error)
    return found, missing


def rewards_on_example() -> dict[str, list[float]]:
    """What the recipes for rewards per response give for the two built-in rollouts, each as its example makes it."""
    found = {}
    for recipe in RECIPES.values():
        if recipe.returns == "rewards":
            given = outcome(recipe.example(), "rewards")
            if given.shape == responses()["rewards"].shape:
                found[recipe.name] = given[:2].tolist()
    return found


def on_rollouts(rollouts: Rollouts, names: Collection[str] = ()) -> tuple[list[Scheme], dict[str, str]]:
    """The schemes on rollouts, and why others are not there; all that need no more, or those of these names.

    Raises:
        ValueError: an unknown name, or one of `names` that can't run on them.
    """
    _check(names)
    tree = rollouts.tree()
    mask = torch.arange(rollouts.tokens.shape[1]) < tree.lengths[:, None]
    mask = mask if rollouts.mask is None else mask & rollouts.mask
    groups = [0] * len(rollouts.tokens) if rollouts.groups is None else rollouts.groups
    rewards = rollouts.rewards.float()
    there = {"tokens": rollouts.tokens, "mask": mask, "rewards": rewards, "group_ids": groups, "tree": tree}
    there |= {"lengths": mask.sum(-1), **rollouts.numbers}
    found, missing = [], {}
    if _wanted(_OPERATION, names):
        own = group_advantages(rewards, groups)
        found.append(Scheme(_OPERATION, "Operations", _per_token(own, mask)))
    for recipe in _recipes():
        if _wanted(recipe.name, names):
            try:
                advantages = _per_token(_advantages(recipe, there), mask)
                found.append(Scheme(recipe.name, FAMILIES[recipe.family], advantages))
            except (TypeError, ValueError) as error:
                missing[recipe.name] = str(error).partition("\n")[0]
    if names and missing:
        raise ValueError("; ".join(f"{name}: {reason}" for name, reason in missing.items()))
    return found, missing


def _recipes() -> list[Recipe]:
    order = list(FAMILIES)
    return sorted((r for r in RECIPES.values() if r.returns in _CREDIT), key=lambda r: order.index(r.family))


def _wanted(name: str, names: Collection[str]) -> bool:
    return not names or name in names


def _check(names: Collection[str]) -> None:
    known = [_OPERATION, *(recipe.name for recipe in _recipes())]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known)
            hint = f"did you mean {', '.join(near)}?" if near else f"expected one of {', '.join(known)}"
            raise ValueError(f"no scheme {name!r}; {hint}")


def _arguments(recipe: Recipe, there: dict[str, Any]) -> dict[str, Any]:
    """What the recipe takes of what there is. A mask by keyword alone is one of responses, all of which are there."""
    own = inspect.signature(recipe.function).parameters
    needed = [n for n, p in own.items() if p.default is p.empty and p.kind is not p.VAR_KEYWORD and n not in there]
    if needed:
        raise ValueError(f"needs {', '.join(needed)}")
    responses_there = own.get("mask") is not None and own["mask"].kind is inspect.Parameter.KEYWORD_ONLY
    return {name: x for name, x in there.items() if name in own and not (name == "mask" and responses_there)}


def _advantages(recipe: Recipe, there: dict[str, Any]) -> Tensor:
    """What the recipe gives, as advantages."""
    given: Tensor = recipe.function(**_arguments(recipe, there))
    if recipe.returns == "token rewards":
        return whiten(given, there["mask"])
    if recipe.returns == "node values":
        tree: PrefixTree = there["tree"]
        return tree.to_tokens(tree.advantages(given))
    return given


def _per_token(advantages: Tensor, mask: Tensor) -> Tensor:
    """f32 in the shape of the mask, 0 where masked out."""
    given = advantages.detach().float()
    if tuple(given.shape) not in (tuple(mask.shape), (mask.shape[0],)):
        raise ValueError(f"expected advantages {list(mask.shape)} or [{mask.shape[0]}], got {list(given.shape)}")
    return torch.where(mask, given if given.ndim == 2 else given[:, None], 0.0)
