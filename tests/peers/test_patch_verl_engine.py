"""verl's FSDP engine takes a step of a tiny model on the CPU, over gloo: as verl has it, and under the patch."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkout import ROOT

pytest.importorskip("verl")
pytest.importorskip("transformers")
pytest.importorskip("peft")  # which verl's engine imports


@pytest.mark.slow
def test_a_step_of_the_fsdp_engine(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-W",
        "ignore",
        str(ROOT / "tests" / "support" / "verl_engine.py"),
        str(tmp_path),
        str(port),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    stock, ours = found["stock"], found["ours"]
    assert stock["metrics"].keys() == ours["metrics"].keys() >= {"actor/pg_loss", "kl_loss", "grad_norm"}
    for name, x in stock["metrics"].items():
        assert ours["metrics"][name] == pytest.approx(x, rel=1e-4, abs=1e-6), name
    assert stock["metrics"]["grad_norm"][0] > 0.1
    start, *ends = (torch.tensor(x) for x in (found["start"], stock["weights"], ours["weights"]))
    moved = (ends[0] - start).abs()
    assert moved.max() > 5e-3  # Adam's first step moves each weight by its sign, as far as the learning rate
    apart = (ends[1] - ends[0]).abs()
    assert apart.median() < 1e-7
    assert (apart < 1e-5).float().mean() > 0.99  # beyond it, gradients that are as good as 0 and have no sign
    assert {name.rpartition(".")[2] for name in found["usage"]} >= {
        "no_padding_2_padding",
        "left_right_2_no_padding",
        "compute_policy_loss_vanilla",
        "get_seqlen_balanced_partitions",
    }
