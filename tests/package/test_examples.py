"""The programs in examples/ run, and show what they say."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys

import pytest
import torch
import typer
from checkout import ROOT
from typer.testing import CliRunner

EXAMPLES = ROOT / "examples"


@pytest.mark.slow
def test_tree_grpo() -> None:
    """Three steps: the packed log-probs are TRL's own, and tokens are saved, also in several forward passes."""
    pytest.importorskip("trl")
    small = ("--steps", "3", "--prompts", "2", "--generations", "4", "--warm-up", "20", "--max-tokens", "120")
    run = subprocess.run(
        [sys.executable, str(EXAMPLES / "tree_grpo.py"), *small],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = re.search(r"difference of a log-prob from TRL's own, first step: (\S+)", run.stdout)
    assert found is not None, run.stdout
    assert 0 < float(found[1]) < 5e-5
    saved = [int(share) for share in re.findall(r"(\d+)%", run.stdout)]
    assert len(saved) == 3
    assert min(saved) > 40


def test_compose_advantages() -> None:
    """A few steps of each run: GRPO, distillation, both."""
    threads = torch.get_num_threads()
    app = typer.Typer()
    app.command()(runpy.run_path(str(EXAMPLES / "compose_advantages.py"))["main"])
    result = CliRunner().invoke(app, ["--steps", "3", "--prompts", "2", "--generations", "4"])
    torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    assert "the teacher's: 33%" in result.output
    assert len(re.findall(r"\d+%", result.output)) == 1 + 3 * 3
