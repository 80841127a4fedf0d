"""fastreward's recipes under verl's configuration: names, options, where their arguments come from, what verl gets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastreward as fr
from fastreward import patch, recipes

pytest.importorskip("verl")
from omegaconf import OmegaConf
from verl_stock import imported

core = imported("verl.trainer.ppo.core_algos")
trainer = imported("verl.trainer.ppo.ray_trainer")
configs = imported("verl.workers.config")
DataProto = imported("verl").DataProto

TOKENS = torch.tensor([[5, 1, 2, 7, 8, 9], [5, 1, 3, 4, 0, 0], [6, 2, 2, 1, 3, 0], [6, 2, 4, 4, 1, 2]])
MASK = (torch.arange(6) < torch.tensor([[6], [4], [5], [6]])).long()
UIDS = ["a", "a", "b", "b"]
SCORES = torch.tensor([1.0, 0.0, 0.25, 1.0])


@pytest.fixture(autouse=True)
def _patched() -> Iterator[None]:
    patch.undo()
    patch.verl()
    yield
    patch.undo()


def data(**others: Any) -> Any:
    """A batch as verl's trainer has it before advantages; `others`: what a reward function gave beside the score."""
    generator = torch.Generator().manual_seed(0)
    rewards = torch.zeros(4, 6)
    rewards[torch.arange(4), MASK.sum(-1) - 1] = SCORES
    tensors = {
        "token_level_rewards": rewards,
        "response_mask": MASK,
        "responses": TOKENS,
        "old_log_probs": -1 - torch.rand(4, 6, generator=generator),
        "ref_log_prob": -1 - torch.rand(4, 6, generator=generator),
        "values": torch.rand(4, 6, generator=generator),
        "sum_pi_squared": torch.rand(4, 6, generator=generator),
    }
    arrays = {"uid": np.array(UIDS, dtype=object)} | {n: x for n, x in others.items() if isinstance(x, np.ndarray)}
    tensors |= {n: x for n, x in others.items() if isinstance(x, Tensor)}
    return DataProto.from_dict(tensors=tensors, non_tensors=arrays)


def advantages(name: str, batch: Any, **algorithm: Any) -> Tensor:
    """Of verl's trainer, with `name` as its estimator."""
    config = OmegaConf.create({"gamma": 1.0, "lam": 1.0, **algorithm})
    found = trainer.compute_advantage(batch, name, config=config)
    assert found.batch["returns"] is found.batch["advantages"] or torch.equal(
        found.batch["returns"], found.batch["advantages"]
    )
    result = found.batch["advantages"]
    assert isinstance(result, Tensor)
    assert bool((result[MASK == 0] == 0).all())
    return result


def test_tempo_takes_the_tokens_of_the_batch() -> None:
    expected = recipes.tempo(TOKENS, MASK, SCORES, group_ids=UIDS)
    assert not any("fastreward." in target for target in patch.status()["verl"].usage)  # not a hundred rows of zeros
    torch.testing.assert_close(advantages("fastreward.tempo", data()), expected)
    assert patch.status()["verl"].usage[f"{core.__name__}.ADV_ESTIMATOR_REGISTRY['fastreward.tempo']"].calls == 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("treerpo", lambda: recipes.treerpo(fr.PrefixTree(TOKENS, MASK, UIDS), SCORES)),
        ("maxrl", lambda: recipes.maxrl(SCORES, UIDS).unsqueeze(-1) * MASK),
        ("opo", lambda: recipes.opo(SCORES, MASK.sum(-1).float(), UIDS).unsqueeze(-1) * MASK),
        (
            "unlikeliness",
            lambda: recipes.unlikeliness(data().batch["old_log_probs"], MASK, SCORES, UIDS).unsqueeze(-1) * MASK,
        ),
        (
            "otb",
            lambda: recipes.otb(
                data().batch["token_level_rewards"],
                data().batch["old_log_probs"],
                data().batch["sum_pi_squared"].log(),
                MASK,
                UIDS,
            ),
        ),
    ],
)
def test_arguments_come_from_what_verl_has(name: str, expected: Any) -> None:
    torch.testing.assert_close(advantages(f"fastreward.{name}", data()), expected())


def test_other_arguments_come_from_the_batch_under_their_names() -> None:
    flawed = np.array([True, False, False, False], dtype=object)
    expected = recipes.fapo(SCORES, torch.tensor(flawed.tolist()), UIDS, penalty=0.5)
    found = advantages("fastreward.fapo(penalty=0.5)", data(flawed=flawed))
    torch.testing.assert_close(found, expected.unsqueeze(-1) * MASK)
    steps = MASK.cumsum(-1).sub(1).div(3, rounding_mode="floor").masked_fill(MASK == 0, -1)
    scores = torch.rand(4, 2)
    expected = recipes.pure(scores, steps, MASK, rewards=SCORES, group_ids=UIDS)
    torch.testing.assert_close(advantages("fastreward.pure", data(segment_ids=steps, step_scores=scores)), expected)


def test_options_stand_behind_the_name_or_in_the_algorithms_configuration() -> None:
    expected = recipes.pass_at_k(SCORES, UIDS, scale="none").unsqueeze(-1) * MASK
    torch.testing.assert_close(advantages("fastreward.pass_at_k(scale='none')", data()), expected)
    torch.testing.assert_close(
        advantages("fastreward.pass_at_k", data(), fastreward={"scale": "none"}),
        expected,
    )
    weights = {"component_weights": [2.0]}
    found = advantages("fastreward.gdpo(trainer='verl')", data(), fastreward=weights)
    expected = recipes.gdpo(SCORES, UIDS, trainer="verl", component_weights=[2.0])
    torch.testing.assert_close(found, expected.unsqueeze(-1) * MASK)


@pytest.mark.parametrize(
    ("name", "algorithm", "message"),
    [
        ("fastreward.maxrl(epsilon=1)", {}, r"fastreward.maxrl: no option 'epsilon'; it has group_size, mask"),
        ("fastreward.maxrl", {"fastreward": {"k": 2}}, "no option 'k'"),
        ("fastreward.maxrl", {"fastreward": "k"}, "algorithm.fastreward: expected options by name, got 'k'"),
        ("fastreward.fapo", {}, r"fastreward.fapo needs flawed; the batch has .*token_rewards"),
        ("fastreward.maxrl(", {}, "expected a name, or a call with keywords"),
        ("fastreward.nothing", {}, "Unknown advantage estimator simply: fastreward.nothing"),
        ("fastreward.nothing(k=1)", {}, "Unknown advantage estimator simply: fastreward.nothing"),
    ],
)
def test_what_is_not_there_is_an_error_that_says_what_is(name: str, algorithm: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        advantages(name, data(), **algorithm)


def test_verls_own_estimators_go_on_as_before() -> None:
    patch.undo()
    expected = trainer.compute_advantage(data(), "grpo").batch["advantages"]
    patch.verl()
    torch.testing.assert_close(trainer.compute_advantage(data(), "grpo").batch["advantages"], expected)
    with pytest.raises(ValueError, match="Unknown advantage estimator"):
        core.get_adv_estimator_fn("no such")


def actor(**given: Any) -> Any:
    """verl's ActorConfig."""
    return configs.ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, **given)


def loss_inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    old = -1 - torch.rand(4, 6, generator=generator)
    return {
        "old_log_prob": old,
        "log_prob": old + 0.5 * torch.randn(4, 6, generator=generator),
        "advantages": torch.randn(4, 6, generator=generator),
        "response_mask": MASK != 0,
    }


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"])
@pytest.mark.parametrize(("name", "options"), [("dispo", {}), ("dispo", {"pos_high": 0.1}), ("gspo", {}), ("dro", {})])
def test_losses(name: str, options: dict[str, float], mode: str) -> None:
    inputs = loss_inputs()
    options = options | ({"beta": 0.2} if name == "dro" else {})
    text = f"fastreward.{name}" + (f"({', '.join(f'{k}={x}' for k, x in options.items())})" if options else "")

    def gradient(loss: Tensor, x: Tensor) -> Tensor:
        return torch.autograd.grad(loss, x)[0]

    x, y = (inputs["log_prob"].clone().requires_grad_() for _ in range(2))
    loss, metrics = core.get_policy_loss_fn(text)(**inputs | {"log_prob": x}, loss_agg_mode=mode, config=actor())
    expected = getattr(recipes, name)(
        y, inputs["old_log_prob"], inputs["advantages"], inputs["response_mask"], aggregation=mode, **options
    )
    torch.testing.assert_close(loss, expected.loss)
    torch.testing.assert_close(gradient(loss, x), gradient(expected.loss, y))
    assert metrics["actor/ppo_kl"] == pytest.approx(float(expected.metrics["kl_old_k1"]))
    assert all(isinstance(value, float) for value in metrics.values())


def test_losses_are_normalised_over_the_global_batch() -> None:
    """As verl's trainer asks for it: this rank's part of the sum over all ranks, times their number."""
    inputs, config = loss_inputs(), actor()
    config.global_batch_info.update(dp_size=2, batch_num_tokens=100, global_batch_size=8, loss_scale_factor=None)
    function = core.get_policy_loss_fn("fastreward.ppo")
    loss, _ = function(**inputs, loss_agg_mode="token-mean", config=config)
    stock = getattr(core.compute_policy_loss_vanilla, "__wrapped__", None)
    assert stock is not None
    expected, _ = stock(**inputs, loss_agg_mode="token-mean", config=config)
    torch.testing.assert_close(loss, expected)
    config.global_batch_info.update(batch_num_tokens=None)
    with pytest.raises(ValueError, match=r"fastreward\.ppo: verl refuses to count"):
        function(**inputs, loss_agg_mode="token-mean", config=config)


def test_a_micro_batch_of_which_nothing_counts_and_weights() -> None:
    inputs = loss_inputs()
    function = core.get_policy_loss_fn("fastreward.dispo")
    weights = torch.rand(4, 6)
    loss, _ = function(**inputs, config=actor(), rollout_is_weights=weights)
    expected = recipes.dispo(*(inputs[k] for k in ("log_prob", "old_log_prob", "advantages")), MASK, weights=weights)
    torch.testing.assert_close(loss, expected.loss)
    config = actor()
    config.global_batch_info.update(dp_size=1, batch_num_tokens=10, global_batch_size=4, loss_scale_factor=None)
    loss, metrics = function(**inputs | {"response_mask": torch.zeros(4, 6, dtype=torch.bool)}, config=config)
    assert float(loss) == 0.0
    assert set(metrics.values()) == {0.0}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fastreward.dispo(high=2)", r"fastreward.dispo: no option 'high'; it has .*pos_high.*aggregation"),
        ("fastreward.nothing", "Supported modes are: .*'fastreward.dispo'"),
        ("fastreward.nothing(k=2)", "Unsupported loss mode: fastreward.nothing"),
    ],
)
def test_losses_that_are_not_there_and_options(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        core.get_policy_loss_fn(name)(**loss_inputs(), config=actor())


def test_every_name_is_a_recipe_and_undo_takes_them_out() -> None:
    ours = {
        name.removeprefix("fastreward.")
        for registry in (core.ADV_ESTIMATOR_REGISTRY, core.POLICY_LOSS_REGISTRY)
        for name in registry
        if name.startswith("fastreward.")
    }
    assert ours <= set(recipes.RECIPES)
    returns = ("advantages", "response advantages")
    assert {name for name, recipe in recipes.RECIPES.items() if recipe.returns in returns} <= ours
    assert {"dispo", "ppo", "gspo", "sapo", "cispo"} <= ours
    assert not {"real", "pacs", "dpo", "deepseek_v3_2"} & ours  # they read what verl's losses are not given
    patch.undo()
    assert not [n for r in (core.ADV_ESTIMATOR_REGISTRY, core.POLICY_LOSS_REGISTRY) for n in r if "fastreward" in n]
