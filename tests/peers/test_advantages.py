"""Recipes of group advantages against the trainers' own code, to the last digit of a float32.

verl has functions. TRL and OpenRLHF have a passage in a method of a class that needs a trainer, or Ray: that passage is
cut out of the installed source and run as it stands.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastreward as fr
from fastreward import recipes

# What trl, verl, ray and transformers warn about on import is theirs.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

UIDS = ["a", "b", "a", "c", "b", "a", "b", "b"]  # c is alone
MASK = torch.arange(5) < torch.tensor([[5], [3], [1], [4], [2], [5], [4], [3]])


def rewards(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*(shape or (8,)), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same(got: Tensor, want: Tensor, tolerance: float = 2e-7) -> None:
    """As float32 the two are at most a digit apart: theirs is computed in float64 here."""
    assert want.nan_to_num(1).count_nonzero() > 0
    torch.testing.assert_close(got, want.float(), rtol=tolerance, atol=tolerance, equal_nan=True)


# ---------------------------------------------------------------------------------------------------------------- verl
@pytest.fixture(scope="module")
def verl() -> Any:
    pytest.importorskip("verl", reason="verl is not installed (`make test` installs it)", exc_type=ImportError)
    try:
        return importlib.import_module("verl.trainer.ppo.core_algos")
    except ImportError as error:  # its own dependencies: pip install '.[verl]'
        pytest.skip(f"verl can't be imported: {error}")


#: verl's function -> (the recipe on scores, more arguments of verl's, whether a uid may be alone).
VERL: dict[str, tuple[Callable[[Tensor, list[str]], Tensor], dict[str, Any], bool]] = {
    "grpo": (recipes.grpo, {}, True),
    "grpo_vectorized": (recipes.grpo, {}, True),
    "rloo": (recipes.rloo, {}, True),
    "rloo_vectorized": (lambda r, ids: recipes.rloo(r, ids, singleton="zero"), {}, True),
    "opo": (lambda r, ids: recipes.opo(r, MASK.sum(-1), ids), {}, True),
    "gpg": (recipes.gpg, {}, True),
    "grpo_passk": (recipes.pass_at_k, {"config": {}}, False),
    "grpo without std": (
        lambda r, ids: recipes.dr_grpo(r, ids, singleton="raw"), {"norm_adv_by_std_in_grpo": False}, True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", VERL)
def test_verl(name: str, verl: Any) -> None:
    recipe, more, alone = VERL[name]
    uids = UIDS if alone else [uid.replace("c", "a") for uid in UIDS]
    scores = rewards()
    scores[4] = 0.0  # GPG counts what is not
    placed = torch.where(torch.arange(5) == MASK.sum(-1, keepdim=True) - 1, scores.unsqueeze(-1), 0.0)
    function = getattr(verl, f"compute_{name.partition(' ')[0]}_outcome_advantage")
    theirs, _ = function(
        token_level_rewards=placed, response_mask=MASK.double(), index=np.array(uids, dtype=object), **more
    )
    if name in ("grpo", "grpo_vectorized"):  # the reward of c is divided by 1 + eps
        theirs = torch.where(torch.tensor([uid == "c" for uid in uids]).unsqueeze(-1), theirs * (1 + 1e-6), theirs)
    same(recipe(scores, uids).unsqueeze(-1) * MASK, theirs)


@pytest.mark.parametrize("holes", [False, True], ids=["single turn", "multi-turn"])
def test_verl_optimal_token_baseline(holes: bool, verl: Any) -> None:
    mask = MASK.clone()
    mask[[0, 3, 6], 1] &= not holes  # a tool's token
    p = rewards(8, 5, seed=1).sigmoid()
    collision, weights = p**2 + 0.1 * (1 - p) ** 2, 2 * rewards(8, 5, seed=2).sigmoid()
    given = {"old_log_probs": p.log(), "sum_pi_squared": collision, "rollout_is_weights": weights}
    form = "multi_turn_optimal_token_baseline" if holes else "optimal_token_baseline"
    theirs, _ = getattr(verl, f"compute_{form}_advantage")(
        token_level_rewards=rewards(8, 5), response_mask=mask.double(), index=np.array(UIDS, dtype=object), **given
    )
    ours = recipes.otb(
        rewards(8, 5).float(),
        p.log().float(),
        collision.log().float(),
        mask,
        UIDS,
        weights=weights.float(),
        positions="token" if holes else "column",
    )
    same(ours, theirs, tolerance=2e-6)


def test_verl_whitened(verl: Any) -> None:
    """REINFORCE++'s baseline form, GDPO and ReMax."""
    scores = rewards()
    placed = torch.where(torch.arange(5) == MASK.sum(-1, keepdim=True) - 1, scores.unsqueeze(-1), 0.0)
    arguments = {"token_level_rewards": placed, "response_mask": MASK.double(), "index": np.array(UIDS, dtype=object)}
    theirs, _ = verl.compute_reinforce_plus_plus_baseline_outcome_advantage(**arguments)
    same(recipes.reinforce_plus_plus_baseline(MASK, scores, UIDS), theirs, 5e-7)
    held = MASK.clone()
    held[:, 2] = False  # a tool's token
    theirs, _ = verl.compute_reinforce_plus_plus_outcome_advantage(
        token_level_rewards=placed, response_mask=held.double(), config=types.SimpleNamespace(gamma=0.9)
    )
    ours = recipes.reinforce_plus_plus(placed, held, gamma=0.9)
    same(ours, theirs, 2e-6)  # returns are float32 here
    both = rewards(8, 2, seed=1)
    theirs, _ = verl.compute_gdpo_outcome_advantage(
        **arguments,
        config={"gdpo_reward_keys": ["x", "y"], "gdpo_reward_weights": [1.0, 0.5]},
        non_tensor_batch={"x": both[:, 0].numpy(), "y": both[:, 1].numpy()},
        batch={"prompts": torch.zeros(8, 2), "attention_mask": torch.cat([torch.ones(8, 2), MASK], 1).long()},
    )
    summed = recipes.gdpo(both, UIDS, component_weights=[1.0, 0.5], trainer="verl", batch_eps=None)
    same(fr.whiten(summed.unsqueeze(-1).expand(MASK.shape), MASK), theirs, 2e-6)  # theirs is float32 here
    greedy = rewards(seed=2)
    theirs, _ = verl.compute_remax_outcome_advantage(placed, greedy, MASK.double())
    same(recipes.remax(scores, greedy).unsqueeze(-1) * MASK, theirs, 1e-6)  # greedy rewards are float32 here


# -------------------------------------------------------------------------------------------- passages of TRL, OpenRLHF
def passage(package: str, path: str, test: str) -> Any:
    """The `if` statement of an installed file whose condition is `test`, compiled."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is not installed (`make test` installs it)")
    source = (Path(spec.submodule_search_locations[0]) / path).read_text(encoding="utf-8")
    found = [x for x in ast.walk(ast.parse(source)) if isinstance(x, ast.If) and ast.unparse(x.test) == test]
    assert found, f"{path} has no longer: if {test}"
    return compile(ast.Module([found[0]], []), path, "exec")


@pytest.fixture(scope="module")
def trl_passage() -> Any:
    return passage("trl", "trainer/grpo_trainer.py", "self.multi_objective_aggregation == 'sum_then_normalize'")


def of_trl(code: Any, scored: Tensor, size: int, weights: Tensor, aggregation: str, scale: str) -> Tensor:
    utils = pytest.importorskip("trl.trainer.utils", exc_type=ImportError)
    own = types.SimpleNamespace(
        multi_objective_aggregation=aggregation, reward_weights=weights, scale_rewards=scale,
        reward_funcs=[None] * scored.shape[1],
    )  # fmt: skip
    names = {
        "self": own, "torch": torch, "nanstd": utils.nanstd, "rewards_per_func": scored, "num_generations": size,
        "device": "cpu", "unscorable_mask": scored.isnan().all(1),
    }  # fmt: skip
    exec(code, names)
    result: Tensor = names["advantages"]
    return result.nan_to_num(0.0)  # as TRL does behind it


@pytest.mark.parametrize("size", [4, 1])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_trl(scale: str, size: int, trl_passage: Any) -> None:
    scored, weights = rewards(8, 3), torch.tensor([1.0, 0.5, -2.0], dtype=torch.float64)
    scored[2, 1], scored[5] = torch.nan, torch.nan
    theirs = of_trl(trl_passage, scored, size, weights, "sum_then_normalize", scale)
    total = (scored * weights).nansum(1).masked_fill(scored.isnan().all(1), torch.nan)
    recipe: dict[str, Callable[[], Tensor]] = {
        "group": lambda: recipes.grpo(total, group_size=size, trainer="trl"),
        "batch": lambda: recipes.lite_ppo(total, group_size=size, eps=1e-4),
        "none": lambda: recipes.dr_grpo(total, group_size=size),
    }
    if size == 1:
        assert not theirs.any()
        assert not recipe[scale]().any()
    else:
        same(recipe[scale](), theirs)


def test_trl_normalize_then_sum(trl_passage: Any) -> None:
    scored, weights = rewards(8, 3), torch.tensor([1.0, 0.5, -2.0], dtype=torch.float64)
    scored[5] = torch.nan
    theirs = of_trl(trl_passage, scored, 4, weights, "normalize_then_sum", "group")
    same(recipes.gdpo(scored, group_size=4, component_weights=weights.float()), theirs, 1e-6)


@pytest.mark.parametrize("estimator", ["rloo", "reinforce_baseline", "dr_grpo", "group_norm"])
def test_openrlhf(estimator: str) -> None:
    code = passage("openrlhf", "trainer/ppo_utils/experience_maker.py", "args.algo.advantage.estimator == 'rloo'")
    scores = rewards()
    args = types.SimpleNamespace(
        algo=types.SimpleNamespace(advantage=types.SimpleNamespace(estimator=estimator)),
        rollout=types.SimpleNamespace(n_samples_per_prompt=4),
    )
    names: dict[str, Any] = {"args": args, "rewards": scores.view(2, 4)}
    exec(code, names)
    recipe: dict[str, Callable[[], Tensor]] = {
        "rloo": lambda: recipes.rloo(scores, group_size=4),
        "group_norm": lambda: recipes.grpo(scores, group_size=4, trainer="openrlhf"),
    }
    ours = recipe.get(estimator, lambda: recipes.dr_grpo(scores, group_size=4))()
    same(ours, names["rewards"].flatten())
