"""The programs in examples/ run, and show what they say."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from checkout import ROOT
from typer.testing import CliRunner

EXAMPLES = ROOT / "examples"


#: Both that need TRL, in one process: importing it takes longer than what they do.
_TRL = f"""
import sys
sys.path.insert(0, {str(EXAMPLES)!r})
import step_grpo, tree_grpo
tree_grpo.main(steps=3, prompts=2, generations=4, warm_up=20, max_tokens=120)
print("step_grpo")
for written in ("b;c;d", "b;d;e", "b", "b;c;d;e", "aa;;c", "z;z"):
    print(step_grpo.step_scores("a=", written, 3))
step_grpo.main(steps=5, prompts=4, generations=8, warm_up=40, length=3)
"""


@pytest.fixture(scope="module")
def trl_runs() -> tuple[str, str]:
    """What tree_grpo and step_grpo print."""
    pytest.importorskip("trl")
    run = subprocess.run([sys.executable, "-c", _TRL], capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    tree, _, step = run.stdout.partition("step_grpo\n")
    return tree, step


@pytest.mark.slow
def test_tree_grpo(trl_runs: tuple[str, str]) -> None:
    """Three steps: the packed log-probs are TRL's own, and tokens are saved, also in several forward passes."""
    output, _ = trl_runs
    found = re.search(r"difference of a log-prob from TRL's own, first step: (\S+)", output)
    assert found is not None, output
    assert 0 < float(found[1]) < 5e-5
    saved = [int(share) for share in re.findall(r"(\d+)%", output)]
    assert len(saved) == 3
    assert min(saved) > 40


@pytest.mark.slow
def test_step_grpo(trl_runs: tuple[str, str]) -> None:
    """What scores a step says; both runs begin with the same completions, and learn different things of them."""
    _, output = trl_runs
    scores = [json.loads(line) for line in output.splitlines() if line.startswith("[")]
    assert scores == [[1, 1, 1], [1, 0, 1], [1, 0, 0], [1, 1, 1, 0], [0, 0, 0], [0, 0, 0]]
    rows = [(float(a), float(b)) for a, b in re.findall(r"(\d\.\d{3})\D+(\d\.\d{3})", output)]
    assert len(rows) == 5
    assert rows[0][0] == rows[0][1] > 0
    assert rows[1:] != [(a, a) for a, _ in rows[1:]]


def _run(example: str, *arguments: str) -> str:
    """What it prints, run in this process."""
    threads = torch.get_num_threads()
    app = typer.Typer()
    app.command()(runpy.run_path(str(EXAMPLES / example))["main"])
    result = CliRunner().invoke(app, arguments)
    torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    return result.output


def test_ppo() -> None:
    """In twenty rounds the policy has learned some, and the critic explains returns."""
    output = _run("ppo.py", "--steps", "20", "--batch", "64")
    rows = [line.split("│")[2:-1] for line in output.splitlines() if line.startswith("│")]
    assert len(rows) == 10
    scores, explained = [float(row[0]) for row in rows], [float(row[4]) for row in rows]
    assert scores[-1] > 2 * scores[0]
    assert explained[-1] > explained[0]


def test_compose_advantages() -> None:
    """A few steps of each run: GRPO, distillation, both."""
    output = _run("compose_advantages.py", "--steps", "3", "--prompts", "2", "--generations", "4")
    assert "the teacher's: 33%" in output
    assert len(re.findall(r"\d+%", output)) == 1 + 3 * 3


@pytest.mark.slow
def test_verl_driver(tmp_path: Path) -> None:
    """Every step of both sides, equal numbers, and the same rows in the table and in the file."""
    pytest.importorskip("verl")
    written = tmp_path / "figures.json"
    options = ("--batch", "16", "--length", "64", "--prompt", "16", "--json", str(written))
    command = [sys.executable, str(EXAMPLES / "verl_driver.py"), *options]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    rows = {row["step"]: row for row in json.loads(written.read_text())["rows"]}
    assert len(rows) == 11
    assert all(row["difference"] < 1e-5 and min(row["seconds"].values()) > 0 for row in rows.values())
    assert rows["all"]["seconds"]["verl"] == pytest.approx(
        sum(rows[x]["seconds"]["verl"] for x in ("driver", "workers"))
    )
    assert re.search(r"fastreward served \d+ calls", run.stdout)
