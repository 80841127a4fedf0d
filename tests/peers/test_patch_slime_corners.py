"""slime's hooks on what is rare: no samples, groups by other names than numbers, NaN under the mask, a wrong option."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import slime_formulas as formulas
import torch

from fastreward import patch
from fastreward.patch import slime

VOCAB = 17


@pytest.fixture(autouse=True)
def _no_account() -> Iterator[None]:
    yield
    patch.undo()


@pytest.fixture
def batch() -> dict[str, Any]:
    return formulas.batch([3, 1, 4, 2], [5, 1, 8, 6], VOCAB)


@pytest.mark.parametrize("groups", [["b", "a", "b", "a"], [("x", 1), ("x", 0), ("x", 1), ("x", 0)]])
def test_groups_by_any_name(groups: list[Any]) -> None:
    def rewards(names: list[Any]) -> tuple[list[float], list[float]]:
        raw = zip([1.0, 0.0, 0.5, 3.0], names, strict=True)
        samples = [SimpleNamespace(get_reward_value=lambda _, x=x: x, group_index=name) for x, name in raw]
        return slime.rewards(formulas.options(), samples)

    assert rewards(groups) == rewards([1, 0, 1, 0])


def test_a_batch_without_samples() -> None:
    """As a rank may have one: its loss is 0, and its lists are empty."""
    empty: dict[str, Any] = {key: [] for key in formulas.batch([1], [1], VOCAB)} | {"kl": []}
    logits = torch.zeros(1, 4, VOCAB, requires_grad=True)
    args = formulas.options(use_kl_loss=True, kl_loss_coef=0.1, use_tis=True)
    loss, metrics = slime.loss(args, empty, logits, torch.sum)
    loss.backward()
    assert loss == 0
    assert all(x == 0 for x in metrics.values())
    assert logits.grad is not None
    assert not logits.grad.any()
    for estimator in ("grpo", "ppo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"):
        slime.advantages(formulas.options(advantage_estimator=estimator), empty)
        assert empty["advantages"] == empty["returns"] == []


@pytest.mark.parametrize("lengths", [[2, 0, 1], [1, 1, 1], [3, 0, 0, 1]])
@pytest.mark.parametrize("estimator", ["grpo", "gspo", "cispo"])
def test_as_many_tokens_as_samples(estimator: str, lengths: list[int]) -> None:
    """Among them empty ones, as context parallelism leaves them: what is per token stays so."""
    data = formulas.batch([3] * len(lengths), lengths, VOCAB)
    data["advantages"] = [torch.arange(1.0, n + 1) for n in lengths]
    args = formulas.options(use_kl_loss=True, kl_loss_coef=0.1, use_tis=True, advantage_estimator=estimator)
    loss, _ = slime.loss(args, data, data["logits"], formulas.reducer(lengths, data["loss_masks"]))
    torch.testing.assert_close(loss, formulas.policy_loss(args, data, data["logits"])[0].float())


def test_no_metric_has_what_lies_under_the_mask(batch: dict[str, Any]) -> None:
    args, lengths = formulas.options(use_tis=True), batch["response_lengths"]
    reduce = formulas.reducer(lengths, batch["loss_masks"])
    expected = slime.loss(args, batch, batch["logits"], reduce)
    for key in ("log_probs", "rollout_log_probs", "advantages"):
        batch[key] = [torch.where(m != 0, x, math.nan) for x, m in zip(batch[key], batch["loss_masks"], strict=True)]
    torch.testing.assert_close(slime.loss(args, batch, batch["logits"], reduce), expected, rtol=0, atol=0)


@pytest.mark.parametrize("key", ["loss", "tis"])
def test_an_option_that_neither_recipe_nor_operation_has(key: str, batch: dict[str, Any]) -> None:
    name = {"loss": "dispo", "tis": "icepop"}[key]
    args = formulas.options(use_tis=True, **{f"fastreward_{key}": f"{name}(hgih=3.0)"})
    with pytest.raises(TypeError, match=rf"fastreward_{key}: recipes.{name}\(.*has no option 'hgih'"):
        slime.loss(args, batch, batch["logits"], formulas.reducer(batch["response_lengths"], batch["loss_masks"]))
