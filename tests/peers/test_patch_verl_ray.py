"""The plugin in Ray workers that verl's own classes start: each is patched, computes the same, and says so."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkout import ROOT

ray = pytest.importorskip("ray")
pytest.importorskip("verl")

WORKERS = 2
ROWS, LENGTH = 8, 12
SERVED = {
    "verl.trainer.ppo.core_algos.compute_gae_advantage_return",
    "verl.trainer.ppo.core_algos.compute_policy_loss_vanilla",
    "verl.trainer.ppo.core_algos.kl_penalty",
    "verl.utils.seqlen_balancing.get_seqlen_balanced_partitions",
}


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ray with the plugin as it is found once fastreward is installed: by the entry point of a distribution."""
    info = tmp_path / "served-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: served\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[verl.plugins]\nserved = fastreward.patch.verl.plugin\n")
    support = str(ROOT / "tests" / "support")
    monkeypatch.syspath_prepend(support)
    monkeypatch.setenv("FASTREWARD_VERL", "off")  # of this process: its workers have their own
    variables = {
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT), support]),
        "VERL_USE_EXTERNAL_PLUGINS": "served",
        "FASTREWARD_VERL": "on",
        "OMP_NUM_THREADS": "1",
    }
    ray.init(
        num_cpus=2 * WORKERS,
        object_store_memory=80 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        runtime_env={"env_vars": variables},
    )
    yield
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Ray state API:DeprecationWarning")
@pytest.mark.usefixtures("cluster")
def test_each_worker_is_served() -> None:
    controller = importlib.import_module("verl.single_controller.ray")
    worker = importlib.import_module("verl_workers").TrainingWorker
    pool = controller.RayResourcePool([WORKERS], use_gpu=False, max_colocate_count=2)
    group = controller.RayWorkerGroup(
        pool, controller.RayClassWithInitArgs(ray.remote(worker)), device_name="cpu", use_gpu=False
    )
    found = group.compute(rollouts()).batch
    names = [name for name in found.keys() if not name.startswith("stock ")]  # noqa: SIM118 - of a TensorDict
    assert len(names) == 6
    for name in names:
        assert found[name].shape[0] == ROWS
        torch.testing.assert_close(found[name], found[f"stock {name}"], rtol=1e-5, atol=1e-6)
    assert found["gradient"].abs().sum(1).min() > 0
    reports = group.report()
    assert [report["rank"] for report in reports] == list(range(WORKERS))
    assert len({os.getpid(), *(report["process"] for report in reports)}) == 1 + WORKERS
    for report in reports:
        assert set(report["usage"]) >= SERVED, report
        assert all(usage["calls"] > 0 for usage in report["usage"].values())


def rollouts() -> Any:
    """Ragged responses of eight sequences."""
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, LENGTH + 1, (ROWS, 1), generator=g)
    old = -torch.rand(ROWS, LENGTH, generator=g)
    tensors = {
        "old_log_probs": old,
        "ref_log_prob": old + 0.1 * torch.randn(ROWS, LENGTH, generator=g),
        "scores": torch.randn(ROWS, LENGTH, generator=g),
        "values": torch.randn(ROWS, LENGTH, generator=g),
        "response_mask": (torch.arange(LENGTH) < lengths).long(),
    }
    return importlib.import_module("verl").DataProto.from_dict(tensors)
