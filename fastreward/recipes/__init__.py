"""Published methods, each one call: the public operations with the loss, parameters and aggregation that it has.

Every recipe of a loss takes the arguments of the operation that it is made of and returns what that returns; those over
prefix trees take a `PrefixTree` and rewards (only `tempo` also tokens, and makes the tree), and return advantages or
values; those of rewards and credit return constants, of rewards per response or token, or advantages of them.
`fastreward recipes` lists them, `fastreward recipes NAME` explains one; RECIPES holds what is known of each. In a
function that torch.compile compiles call the operation itself, with a loss that was made outside: recipes make theirs
in the call.
"""

# ruff: noqa: F403 (each file's __all__ says what it publishes)
from __future__ import annotations

from typing import TYPE_CHECKING

from fastreward.recipes import (
    agent_credit,
    agent_rewards,
    confidence,
    correction,
    distillation,
    divergence,
    group_advantage,
    group_baseline,
    group_pairwise,
    group_rewards,
    group_selection,
    likelihood,
    mixed,
    preference,
    ratio,
    reference_free,
    reward_shaping,
    score,
    sequence,
    step_credit,
    step_rewards,
    step_values,
    token_credit,
    tree,
    tree_search,
    turn_credit,
)
from fastreward.recipes._catalogue.registry import RECIPES, Recipe
from fastreward.recipes._catalogue.registry import hint as _hint
from fastreward.recipes._catalogue.registry import names_by_returns as _names_by_returns
from fastreward.recipes.agent_credit import *
from fastreward.recipes.agent_rewards import *
from fastreward.recipes.confidence import *
from fastreward.recipes.correction import *
from fastreward.recipes.distillation import *
from fastreward.recipes.divergence import *
from fastreward.recipes.group_advantage import *
from fastreward.recipes.group_baseline import *
from fastreward.recipes.group_pairwise import *
from fastreward.recipes.group_rewards import *
from fastreward.recipes.group_selection import *
from fastreward.recipes.likelihood import *
from fastreward.recipes.mixed import *
from fastreward.recipes.preference import *
from fastreward.recipes.ratio import *
from fastreward.recipes.reference_free import *
from fastreward.recipes.reward_shaping import *
from fastreward.recipes.score import *
from fastreward.recipes.sequence import *
from fastreward.recipes.step_credit import *
from fastreward.recipes.step_rewards import *
from fastreward.recipes.step_values import *
from fastreward.recipes.token_credit import *
from fastreward.recipes.tree import *
from fastreward.recipes.tree_search import *
from fastreward.recipes.turn_credit import *

__all__ = ["RECIPES", "Recipe"]
__all__ += confidence.__all__
__all__ += correction.__all__
__all__ += distillation.__all__
__all__ += divergence.__all__
__all__ += group_advantage.__all__
__all__ += group_baseline.__all__
__all__ += group_pairwise.__all__
__all__ += group_rewards.__all__
__all__ += group_selection.__all__
__all__ += likelihood.__all__
__all__ += preference.__all__
__all__ += reference_free.__all__
__all__ += mixed.__all__
__all__ += ratio.__all__
__all__ += reward_shaping.__all__
__all__ += score.__all__
__all__ += sequence.__all__
__all__ += step_credit.__all__
__all__ += step_rewards.__all__
__all__ += step_values.__all__
__all__ += token_credit.__all__
__all__ += tree.__all__
__all__ += tree_search.__all__
__all__ += turn_credit.__all__
__all__ += agent_credit.__all__
__all__ += agent_rewards.__all__

__doc__ = f"{__doc__}\nBy what they return:\n\n{_names_by_returns()}\n"

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        raise AttributeError(f"module 'fastreward.recipes' has no attribute {name!r}; {_hint(name)}")
