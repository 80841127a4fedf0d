"""Where the OpenRLHF drop-in reaches: every binding, modules imported later, other sources, Ray's workers."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkout import ROOT
from openrlhf_whole import stand_ins

pytest.importorskip("openrlhf")
pytest.importorskip("peft")
pytest.importorskip("ray")
stand_ins()
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

from fastreward import patch  # noqa: E402
from fastreward.patch.openrlhf import source, tables, workers  # noqa: E402

UTILS = "openrlhf.models.utils"


@pytest.fixture(autouse=True)
def _unpatched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(workers.VARIABLE, raising=False)
    patch.undo()
    yield
    patch.undo()


def everything() -> dict[str, Any]:
    """Every name in OpenRLHF's modules and every method of its classes, with what is bound to it."""
    found: dict[str, Any] = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "openrlhf" and module is not None:
            for key, value in list(vars(module).items()):
                found[f"{name}.{key}"] = value
                if isinstance(value, type) and value.__module__.startswith("openrlhf"):
                    found |= {f"{name}.{key}.{k}": v for k, v in list(vars(value).items())}
    return found


def test_every_binding_is_exchanged_and_put_back() -> None:
    for name in (
        "models",
        "utils.logging_utils",
        "trainer.ppo_utils.experience_maker",
        "trainer.ray.ppo_actor",
        "trainer.ray.ppo_critic",
    ):
        importlib.import_module(f"openrlhf.{name}")
    before = everything()
    report = patch.openrlhf(metrics=True)
    changed = {name for name, value in everything().items() if before.get(name) is not value}
    for name in (
        f"{UTILS}.masked_mean",
        "openrlhf.models.loss.masked_mean",
        "openrlhf.trainer.ray.ppo_actor.masked_mean",
        "openrlhf.trainer.ray.ppo_critic.masked_mean",
        "openrlhf.trainer.ppo_utils.experience_maker.masked_mean",
        "openrlhf.trainer.ppo_utils.experience_maker.compute_reward",
        "openrlhf.trainer.ray.ppo_actor.aggregate_loss",
        "openrlhf.models.actor.compute_entropy",
        "openrlhf.models.actor.Actor.forward",
        "openrlhf.trainer.ray.ppo_actor.PolicyLoss.forward",
        "openrlhf.utils.seqlen_balancing.karmarkar_karp",
    ):
        assert name in changed
    assert not report.pending or all(
        entry.target.startswith("openrlhf.trainer.ppo_trainer") for entry in report.pending
    )
    reported = {place for entry in report.replaced for place in entry.target.split(", ")}
    assert {row.target for row in tables.REPLACEMENTS} <= reported
    assert patch.openrlhf(metrics=True) is report
    patch.undo()
    after = everything()
    assert [name for name in before if after.get(name) is not before[name]] == []


def test_every_source_is_known() -> None:
    """In the version that is installed; another digest here means: read the change, then add it."""
    root = source.folder()
    assert root is not None
    for row in tables.REPLACEMENTS:
        row.check_source(root)


def changed_copy(tmp_path: Path, before: str, after: str) -> Path:
    """The package's utils.py with another text in one place."""
    root = source.folder()
    assert root is not None
    text = (root / "models" / "utils.py").read_text()
    assert text.count(before) == 1
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "utils.py").write_text(text.replace(before, after))
    return tmp_path


@pytest.mark.parametrize(
    ("before", "after", "same"),
    [
        ("value = value.clamp(min=-10, max=10)", "value = value.clamp(min=-20, max=20)", False),
        ("value = log_ratio**2 / 2.0", "value = log_ratio**2", False),
        ("value = log_ratio  # log_ratio is already p - q", "value = log_ratio  # log_ratio is already q - p", False),
        ("    Compute the approximate KL divergence between two distributions.\n", "    KL.\n", True),
        ("        # Non-negative KL approximation: (p - q)^2 / 2\n", "        # another comment\n\n", True),
    ],
)
def test_another_source_is_another_function(tmp_path: Path, before: str, after: str, same: bool) -> None:
    row = next(row for row in tables.REPLACEMENTS if row.name == "compute_approx_kl")
    root = changed_copy(tmp_path, before, after)
    if not same:
        with pytest.raises(
            source.Unrecognised, match="the source of compute_approx_kl is not one that fastreward knows"
        ):
            row.check_source(root)
    else:
        row.check_source(root)


def test_what_is_not_recognised_is_left_alone_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    utils = importlib.import_module(UTILS)

    def mine(*_: Any, **__: Any) -> str:
        return "mine"

    monkeypatch.setattr(utils, "compute_approx_kl", mine)
    told: list[str] = []
    report = patch.openrlhf(tell=told.append)
    assert utils.compute_approx_kl() == "mine"
    (line,) = told
    assert line.startswith("fastreward.patch.openrlhf leaves openrlhf.models.utils.compute_approx_kl to OpenRLHF")
    assert "compute_approx_kl" in " ".join(entry.target for entry in report.kept)
    assert utils.compute_reward is not vars(utils)["compute_approx_kl"]
    assert f"{UTILS}.compute_reward" in str(report)
    patch.undo()
    with pytest.warns(RuntimeWarning, match="is not OpenRLHF's own any more"):
        patch.openrlhf()


@pytest.mark.slow
def test_modules_imported_later_are_served_and_nothing_is_imported_for_it() -> None:
    """In a process of its own, where OpenRLHF has not been imported yet."""
    program = """
import sys
from openrlhf_whole import stand_ins
stand_ins()
from fastreward import patch
report = patch.openrlhf()
assert not [name for name in sys.modules if name.startswith("openrlhf.")], sys.modules
assert not report.replaced and len(report.pending) == 15, report
import openrlhf.models.utils as utils, openrlhf.models.loss as loss, openrlhf.models.actor as actor
assert actor.compute_entropy is utils.compute_entropy and hasattr(utils.compute_entropy, "__wrapped__")
assert utils.masked_mean is loss.masked_mean and hasattr(utils.masked_mean, "__wrapped__")
assert len(report.pending) == 6, report.pending
ours = [utils.masked_mean]
patch.undo()
assert loss.masked_mean is utils.masked_mean is not ours[0]
assert loss.PolicyLoss.forward.__code__.co_filename.endswith("loss.py")
print("DONE")
"""
    assert "DONE" in run(["-c", program]).stdout


def run(arguments: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    """Python with these arguments, where tests/support is found."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT / "tests" / "support"),
        "OMP_NUM_THREADS": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        **variables,
    }
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done


# ---- Ray -------------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_two_ray_actors_are_served() -> None:
    """Through the launcher, as OpenRLHF's command line is started: it calls ray.init itself."""
    program = ["-m", "fastreward.patch.openrlhf", "openrlhf_program", "--train.batch_size", "8"]
    done = run(program)
    result = json.loads(done.stdout.rpartition("RESULT ")[2].splitlines()[0])
    assert result["arguments"] == ["--train.batch_size", "8"]
    assert result["processes"] == 3
    x = torch.tensor([[0.5, -1.0]])
    torch.testing.assert_close(torch.tensor(result["values"]), ((-x).exp() - 1 + x).expand(2, 1, 2))
    assert result["served"] == [1, 1]
    assert "serves 15 functions of OpenRLHF" in done.stderr


def test_the_runtime_environment_has_the_hook() -> None:
    found = patch.openrlhf_runtime_env({"env_vars": {"NCCL_DEBUG": "INFO"}, "working_dir": "."}, metrics=True)
    assert found == {
        "worker_process_setup_hook": "fastreward.patch.openrlhf.workers.apply",
        "env_vars": {"FASTREWARD_OPENRLHF": "metrics", "NCCL_DEBUG": "INFO"},
        "working_dir": ".",
    }
    module, _, name = found["worker_process_setup_hook"].rpartition(".")
    assert getattr(importlib.import_module(module), name) is workers.apply
    assert patch.openrlhf_runtime_env(found) == found
    with pytest.raises(ValueError, match="expected no worker_process_setup_hook of another's, got 'another'"):
        patch.openrlhf_runtime_env({"worker_process_setup_hook": "another"})


def test_the_hook_says_in_a_line_what_is_served(capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    importlib.import_module(UTILS)
    report = workers.apply()
    assert report is not None
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"fastreward (process {os.getpid()}): serves 15 functions of OpenRLHF {report.version} (")
    assert all(name in line for name in ("compute_approx_kl", "forward", "karmarkar_karp", "FASTREWARD_OPENRLHF=off"))
    patch.undo()
    for word in ("off", "0", " No "):
        monkeypatch.setenv(workers.VARIABLE, word)
        assert workers.apply() is None
    assert patch.status() == {}
    assert capfd.readouterr().err == ""
    monkeypatch.setenv(workers.VARIABLE, "metrics")
    workers.apply()
    assert "openrlhf" in patch.status()
    monkeypatch.setattr(sys.modules["fastreward.patch.openrlhf.apply"], "folder", lambda: None)
    patch.undo()
    assert workers.apply() is None
    assert "WARNING: fastreward.patch.openrlhf: openrlhf is not installed" in capfd.readouterr().err


# ---- metrics ---------------------------------------------------------------------------------------------------------
def stand_in(owner: Any, method: str, result: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Puts a function where OpenRLHF's own was found, which needs GPUs or a server; returns what it was called with."""
    seen: list[Any] = []

    def called(*args: Any) -> Any:
        seen.append(args)
        return result

    ours = vars(owner)[method]
    cell = next(c for c in ours.__closure__ if c.cell_contents is ours.__wrapped__)
    monkeypatch.setattr(cell, "cell_contents", called)
    return seen


def served_once(status: dict[str, Any], process: str) -> None:
    assert status["loss"] == 1.0
    assert status[f"fastreward/{process}/calls"] == 1
    assert status[f"fastreward/{process}/tokens"] == 6
    assert 0 < status[f"fastreward/{process}/share"] < 1


@pytest.mark.parametrize(("process", "arguments"), [("actor", (0.1,)), ("critic", ())])
def test_the_status_of_a_worker_says_what_was_served(process: str, arguments: Any, monkeypatch: Any) -> None:
    module = importlib.import_module(f"openrlhf.trainer.ray.ppo_{process}")
    trainer = getattr(module, f"{process.capitalize()}PPOTrainer")
    stock = trainer.ppo_train
    patch.openrlhf()
    assert trainer.ppo_train is stock, "only where it is asked for"
    patch.openrlhf(metrics=True)
    importlib.import_module(UTILS).masked_mean(torch.ones(2, 3), torch.ones(2, 3))
    stand_in(trainer, "ppo_train", {"loss": 1.0}, monkeypatch)
    served_once(trainer.ppo_train(None, *arguments), process)


@pytest.mark.parametrize("name", ["WandbLogger", "TensorboardLogger"])
def test_what_the_driver_logs_says_what_was_served(name: str, monkeypatch: Any) -> None:
    logger = getattr(importlib.import_module("openrlhf.utils.logging_utils"), name)
    patch.openrlhf(metrics=True)
    importlib.import_module(UTILS).masked_mean(torch.ones(2, 3), torch.ones(2, 3))
    seen = stand_in(logger, "log_train", None, monkeypatch)
    logs = {"loss": 1.0}
    logger.log_train(None, global_step=3, logs_dict=logs)
    ((_, step, logged),) = seen
    assert step == 3
    served_once(logged, "driver")
    assert logs == {"loss": 1.0}, "a copy is logged"


# ---- balance ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("kind", [int, float])
def test_parts_are_openrlhfs(equal: bool, kind: type) -> None:
    balancing: Any = importlib.import_module("openrlhf.utils.seqlen_balancing")
    lengths = [kind(x) for x in torch.randint(1, 40, (96,), generator=torch.Generator().manual_seed(0)).tolist()]
    want = balancing.get_seqlen_balanced_partitions(lengths, 12, equal)
    report = patch.openrlhf()
    assert balancing.get_seqlen_balanced_partitions(lengths, 12, equal) == want
    usage = report.usage["openrlhf.utils.seqlen_balancing.karmarkar_karp"]
    assert (usage.calls, usage.handed_on) == (1, 0)
    assert balancing.karmarkar_karp([0.5, 1.5, 2.25], 2, False) == [[2], [1, 0]]
    assert usage.handed_on == 1
    with pytest.raises(AssertionError):
        balancing.karmarkar_karp([1, 2, 3], 2, True)
