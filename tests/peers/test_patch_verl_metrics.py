"""verl's metrics with what the patch has served, where they are asked for."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fastreward import patch

pytest.importorskip("verl")
TensorDict = pytest.importorskip("tensordict").TensorDict
NAMES = {f"fastreward/{name}" for name in ("calls", "tokens", "seconds", "handed_on", "share")}
metric_utils = importlib.import_module("verl.trainer.ppo.metric_utils")
core = importlib.import_module("verl.trainer.ppo.core_algos")
functional = importlib.import_module("verl.utils.torch_functional")
losses = importlib.import_module("verl.workers.utils.losses")
configs = importlib.import_module("verl.workers.config")
tu = importlib.import_module("verl.utils.tensordict_utils")
STOCK = (metric_utils.compute_timing_metrics, losses.ppo_loss, losses.value_loss)


@pytest.fixture(autouse=True)
def _taken_out() -> Iterator[None]:
    patch.undo()
    yield
    patch.undo()


def timings() -> dict[str, Any]:
    protocol = importlib.import_module("verl")
    data = protocol.DataProto.from_dict(
        {"responses": torch.ones(2, 3), "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    )
    found: dict[str, Any] = metric_utils.compute_timing_metrics(data, {"step": 2.0, "gen": 1.0})
    return found


def actor_metrics() -> dict[str, Any]:
    """Of a micro-batch of two sequences: prompts of one token, responses of two and one."""
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    zeros = torch.zeros(2, 2)
    data = TensorDict(
        {
            "prompts": mask[:, :1],
            "responses": mask[:, 1:],
            "attention_mask": mask,
            "response_mask": mask[:, 1:],
            "old_log_probs": zeros,
            "advantages": zeros + 1,
        },
        batch_size=2,
    )
    tu.assign_non_tensor(data, dp_size=1, batch_num_tokens=3, global_batch_size=2)
    config = configs.ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, policy_loss=configs.PolicyLossConfig()
    )
    found: dict[str, Any] = losses.ppo_loss(config, {"log_probs": torch.zeros(5, requires_grad=True)}, data)[1]
    return found


def test_not_unless_asked_for() -> None:
    before = timings().keys(), actor_metrics().keys()
    patch.verl()
    assert (timings().keys(), actor_metrics().keys()) == before
    assert (metric_utils.compute_timing_metrics, losses.ppo_loss, losses.value_loss) == STOCK


def test_on_the_driver() -> None:
    stock = timings()
    patch.verl(metrics=True)
    assert timings()["fastreward/calls"] == 0.0
    functional.masked_whiten(torch.randn(3, 4), torch.ones(3, 4))
    found = timings()
    assert found.keys() - stock.keys() == NAMES
    assert {name: found[name] for name in stock} == stock
    assert (found["fastreward/calls"], found["fastreward/tokens"]) == (1.0, 12.0)
    assert 0.0 < found["fastreward/share"] < 1.0


def test_of_a_worker() -> None:
    stock = actor_metrics()
    patch.verl(metrics=True)
    found = actor_metrics()
    assert found.keys() - stock.keys() == NAMES
    assert found["fastreward/calls"].aggregate() >= 2  # the padding, and the policy loss
    later = actor_metrics()
    for name in NAMES:
        found[name].append(later[name])
    assert found["fastreward/calls"].aggregate() == later["fastreward/calls"].aggregate()  # verl logs the largest


def test_asked_for_later_and_taken_out() -> None:
    patch.verl()
    report = patch.verl(metrics=True)
    assert patch.verl(metrics=True) is report
    assert [entry for entry in report.replaced if "compute_timing_metrics" in entry.target]
    assert "fastreward/share" in timings()
    patch.undo()
    assert (metric_utils.compute_timing_metrics, losses.ppo_loss, losses.value_loss) == STOCK


def test_the_plugin_is_told_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTREWARD_VERL", "off")
    plugin = importlib.import_module("fastreward.patch.verl.plugin")
    monkeypatch.setenv("FASTREWARD_VERL", "Metrics")
    plugin.apply()
    assert "fastreward/share" in timings()
