"""`fastreward bench busy`: its busy processes are there while the rounds run, and end however those end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fastreward.bench import OPERATIONS, engine, peers, roofline
from fastreward.bench.case import Case, Contender, Timing
from fastreward.bench.cases import busy, small_calls
from fastreward.cli import app

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux")


def _busy_children(of: int | None = None) -> list[int]:
    """Processes of this one, or of another, that run the busy program."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status, command = (folder / "status").read_text(), (folder / "cmdline").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if f"\nPPid:\t{of or os.getpid()}\n" in status and "time.monotonic() < end" in command:
            found.append(int(folder.name))
    return found


def _fail_beside_one() -> None:
    with busy.busy_machine(1):
        assert len(_busy_children()) == 1
        raise ZeroDivisionError


def test_they_end_with_the_rounds() -> None:
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    with busy.busy_machine(2):
        assert len(_busy_children()) == 2
        assert len(os.sched_getaffinity(0)) <= 2
        torch.set_num_threads(1)
    assert _busy_children() == []
    with pytest.raises(ZeroDivisionError):
        _fail_beside_one()
    assert _busy_children() == []
    assert os.sched_getaffinity(0) == cores
    assert torch.get_num_threads() == threads


def test_they_end_with_whoever_started_them() -> None:
    code = (
        "import os, signal; from fastreward.bench.cases.busy import busy_machine\n"
        "with busy_machine(1): print(os.getpid(), flush=True); signal.pause()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        (child,) = _busy_children(int(parent.stdout.readline()))
        parent.kill()
    end = time.monotonic() + 30
    while Path(f"/proc/{child}").exists() and time.monotonic() < end:
        time.sleep(0.01)
    assert not Path(f"/proc/{child}").exists()


def test_a_case_runs_beside_them_and_slow_peers_leave_rounds_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_TAIL_SECONDS", 0.2)
    seen: set[int] = set()

    def ours() -> torch.Tensor:
        seen.add(len(_busy_children()))
        return torch.zeros(4)

    def slow() -> torch.Tensor:
        time.sleep(0.15)
        return torch.zeros(4)

    case = Case(
        "busy", "a", "float32", (4,), roofline.Traffic(16, 0), lambda _: 0.0,
        [Contender("fastreward", ours), Contender("torch.compile", slow)], 0.0, [],
        beside=lambda: busy.busy_machine(1), tail=True,
    )  # fmt: skip
    outcome = engine.run(case, "cpu", engine.Settings(min_rounds=6), lambda _: None)
    assert seen == {0, 1}  # before the rounds, and in them
    assert [len(t.samples) for t in outcome.timings][1] == 1
    assert len(outcome.ours.samples) >= 6 or sum(outcome.ours.samples) > 0.1
    assert Timing("a", 0.0, 0.0, [float(i) for i in range(101)]).p99 == 99


def test_from_the_command_line(tmp_path: Path) -> None:
    figures = tmp_path / "busy.json"
    tiny = ("--case", "whiten-1M-1-busy", "--quick", "--rows", "4", "--seconds", "0.05", "--no-peers")
    result = CliRunner().invoke(app, ["bench", "busy", *tiny, "--json", str(figures)])
    assert result.exit_code == 0, result.output
    assert "p99 ms" in result.output
    (case,) = json.loads(figures.read_text())["cases"]
    assert case["case"] == "whiten-1M-1-busy"
    assert [c["name"] for c in case["contenders"]] == ["fastreward", "fastreward, one thread"]
    assert all(c["p99_ms"] >= c["median_ms"] > 0 for c in case["contenders"])


def test_cases_are_those_of_other_benchmarks() -> None:
    case = busy.build("whiten-1M-2-busy", torch.float32, (4,), "cpu")
    assert case.shape == (8, 1024)
    assert [c.name for c in case.contenders] == ["fastreward", "fastreward, one thread", "torch.compile"]
    tree = busy.build("tree-524K-0-busy", torch.float32, (16,), "cpu")
    assert tree.absent == {"torch.compile": "torch has no such operation"}
    assert [t.text for t in tree.targets] == ["<= 1.5x the time of fastreward, one thread"]


@pytest.mark.slow
def test_small_calls_are_every_operation_s_beside_the_eager_form(tmp_path: Path) -> None:
    figures = tmp_path / "bench.json"
    result = CliRunner().invoke(app, ["bench", "small_calls", "--quick", "--seconds", "0.01", "--json", str(figures)])
    assert result.exit_code == 0, result.output
    cases = json.loads(figures.read_text())["cases"]
    assert {case["case"] for case in cases} == set(OPERATIONS) - {"balance"}  # of lists: no eager form
    for case in cases:
        assert [c["name"] for c in case["contenders"]] == ["fastreward", "torch eager"]


def test_small_calls_import_no_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_import", lambda path: pytest.fail(f"{path} takes seconds to import"))
    for case in small_calls.CASES:
        built = small_calls.build(case, torch.float32, small_calls.SHAPE, "cpu")
        assert [contender.name for contender in built.contenders] == ["fastreward", "torch eager"]
