"""Every trainer of TRL that reads what is replaced takes its steps stock and patched, and logs the same numbers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")
import transformers
import trl_combinations as table

# What trl, datasets, transformers and accelerate warn about on import and in a run is theirs.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

from fastreward import patch  # noqa: E402
from fastreward.patch.trl import callback  # noqa: E402
from fastreward.patch.trl.versions import supported_version  # noqa: E402

QUICK = [row for row in table.COMBINATIONS if row.quick]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the models are saved that more than one row loads."""
    return tmp_path_factory.mktemp("trl")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    count = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are tiny
    yield
    torch.set_num_threads(count)
    patch.undo()


@pytest.mark.parametrize("row", QUICK, ids=[row.name for row in QUICK])
def test_a_trainer_trains_the_same(row: table.Combination, folder: Path) -> None:
    stock, patched = table.both_sides(row, folder)
    assert table.difference(row, stock, patched) <= row.rtol
    moved = [a for a in stock["logs"] if a.get("grad_norm", 0.0) > 1e-3]
    assert moved, "no step had a gradient"


@pytest.mark.skipif(not supported_version()[1].pair, reason="from TRL 1.15 on every trainer scores through the head")
@pytest.mark.parametrize("trainer", ["grpo", "dpo", "kto"])
def test_the_head_with_liger(trainer: str, folder: Path) -> None:
    """TRL's part of it alone: Liger's own kernels in the model do not run on a CPU."""
    config = dict.fromkeys(("rope", "rms_norm", "swiglu", "fused_linear_cross_entropy"), False)
    row = table.Combination(trainer, trainer, {"use_liger_kernel": True, "liger_kernel_config": config})
    stock, patched = table.both_sides(row, folder)
    assert table.difference(row, stock, patched) <= row.rtol


def test_the_names_of_the_rows_are_unique_and_every_trainer_has_one() -> None:
    names = [row.name for row in table.COMBINATIONS]
    assert len(names) == len(set(names))
    assert {row.trainer for row in QUICK} | {"gmpo"} == set(table.KINDS)


def test_a_difference_is_noticed() -> None:
    row = table.Combination("", "sft", jumping=("luck",))
    one: dict[str, Any] = {"logs": [{"loss": 2.0, "luck": 0.0}], "weights": [torch.tensor([1.0])]}
    other: dict[str, Any] = {"logs": [{"loss": 2.5, "luck": 1.0}], "weights": [torch.tensor([1.1])]}
    assert table.difference(row, one, one) == 0.0
    assert table.difference(row, one, other) == 0.25
    assert table.difference(row, one, {**other, "logs": one["logs"]}) == pytest.approx(0.1)
    with pytest.raises(AssertionError, match="loss"):
        table.difference(row, one, {**one, "logs": [{"luck": 0.0}]})


def test_calls_are_counted_and_their_share_of_the_run(folder: Path) -> None:
    row = next(row for row in QUICK if row.name == "GRPO, losses=True")
    report = patch.trl(losses=True)
    table.run(row, folder)
    loss = report.usage["trl.trainer.grpo_trainer.GRPOTrainer._compute_loss"]
    # Per generation: the reference model's and the old log-probs; in each of two steps: the policy's. From the head,
    # or from whole logits in TRL 1.14.
    assert sum(usage.calls for target, usage in report.usage.items() if target.startswith("trl.trainer.utils.")) == 4
    assert (loss.calls, loss.handed_on) == (2, 0)
    assert loss.seconds > 0
    assert 0 < report.share < 1


# ---- what is logged about the patch ----------------------------------------------------------------------------------

NAMES = [f"fastreward/{name}" for name in ("calls", "tokens", "seconds", "handed_on", "share")]
LOGGED = set(NAMES)


class Reporter(transformers.TrainerCallback):  # type: ignore[misc]
    """Stands for wandb: keeps what it is given."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.logs.append(dict(logs))


@pytest.mark.parametrize("in_front", [True, False])
def test_a_run_logs_what_the_patch_has_served(folder: Path, in_front: bool) -> None:
    row = next(row for row in QUICK if row.name == "GRPO, losses=True")
    report = patch.trl(losses=True)
    reporter = Reporter()
    callbacks = [reporter] if in_front else [reporter, patch.trl_callback()]
    with table.quiet():
        trainer = table.build(row, folder, callbacks=callbacks)
        if in_front:
            assert patch.trl_callback(trainer) is trainer.callback_handler.callbacks[0]
        trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    # The first step generates and scores; the second reuses its rollouts.
    assert [entry["fastreward/calls"] for entry in steps] == [4.0, 2.0]
    end = trainer.state.log_history[-1]
    assert "train_runtime" in end
    for name in ("calls", "tokens", "seconds"):
        assert end[f"fastreward/{name}"] == pytest.approx(getattr(report.total, name))
    for name in ("calls", "tokens"):
        assert sum(entry[f"fastreward/{name}"] for entry in steps) == end[f"fastreward/{name}"]
    assert all(0 < entry["fastreward/share"] < 1 for entry in steps)
    assert all((entry.keys() >= LOGGED) is in_front for entry in reporter.logs)


def test_a_run_without_the_patch_logs_nothing_of_it(folder: Path) -> None:
    row = next(row for row in QUICK if row.name == "SFT")
    with table.quiet():
        trainer = table.build(row, folder, callbacks=[patch.trl_callback()])
        trainer.train()
    assert not any(entry.keys() & LOGGED for entry in trainer.state.log_history)


def test_a_reading_counts_from_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = callback.Meter()
    assert meter.read() == {}
    report = patch.trl()
    clock = iter([report.since + 2.0, report.since + 6.0])
    monkeypatch.setattr(callback.time, "perf_counter", lambda: next(clock))
    usage = next(iter(report.usage.values()))
    usage.calls, usage.tokens, usage.seconds = 3, 50, 0.5
    assert meter.read() == dict(zip(NAMES, (3.0, 50.0, 0.5, 0.0, 0.25), strict=True))
    usage.calls, usage.seconds, usage.handed_on = 4, 0.9, 1
    found = meter.read()
    assert [found[name] for name in NAMES] == [1.0, 0.0, pytest.approx(0.4), 1.0, pytest.approx(0.1)]
