"""doctor, verify and bench, through the command line."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkout import ROOT
from rich.console import Console
from typer.testing import CliRunner

import fastreward
from fastreward import doctor
from fastreward._arguments import check
from fastreward._runtime import dispatch
from fastreward._runtime.dispatch import BACKENDS, OPERATIONS
from fastreward.bench import OPERATIONS as BENCHED
from fastreward.bench import engine, memory, report, roofline, sweep, targets
from fastreward.bench.case import PEERS, Case, Contender, Target, Timing
from fastreward.bench.cases import whiten as bench_whiten
from fastreward.bench.run import Result
from fastreward.cli import app
from fastreward.cpu import group as cpu_group
from fastreward.cpu import whiten as cpu_whiten
from fastreward.verify import error, run

_RUNNER = CliRunner()


def _run(*arguments: str) -> Any:
    return _RUNNER.invoke(app, list(arguments))


# ------------------------------------------------------------------------------------------------------------ doctor
def test_doctor_names_every_operation_and_backend() -> None:
    result = _run("doctor")
    assert result.exit_code == 0, result.output
    for word in (*OPERATIONS, *BACKENDS, "instruction set in use", "threads", "liger-kernel", torch.__version__):
        assert word in result.output


def test_doctor_json() -> None:
    facts = json.loads(_run("doctor", "--json").output)
    assert facts["operations"]["logprobs"]["cpu"] == "available"
    assert facts["packages"]["torch"] == torch.__version__
    if not torch.cuda.is_available():
        assert "no CUDA device" in facts["operations"]["whiten"]["cuda"]


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gpu", [True, False])
@pytest.mark.parametrize("nvcc", [True, False])
@pytest.mark.parametrize("cupy", ["14", None])
def test_doctor_promises_the_kernels_that_there_are(
    operation: str, backend: Any, gpu: bool, nvcc: bool, cupy: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it says on any machine, against the modules and sources in the backend's room."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(doctor, "_has_module", lambda: nvcc)
    monkeypatch.setattr(doctor, "_cupy", lambda: cupy)
    monkeypatch.setattr("fastreward.cuda.missing", lambda generated: None)
    monkeypatch.setattr(dispatch, "implementation", lambda operation, backend: None)
    monkeypatch.setattr(dispatch, "unavailable", dispatch.unavailable.__wrapped__)
    text = doctor.status(operation, backend)
    _, package, kernel = dispatch.module(operation, backend).split(".")
    room = ROOT / ("kernels" if backend == "triton" else f"fastreward/{package}")
    exists = (room / f"{kernel}.py").exists() or (room / kernel).is_dir()
    assert text.startswith("there are no") != exists, text
    if backend == "cuda" and exists:
        source = (ROOT / "csrc/cuda" / f"{kernel}.cu").exists() or (ROOT / "csrc/cuda" / kernel).is_dir()
        made = "(compiled," if nvcc and source else "(compiled at first use," if cupy else "(not compiled,"
        assert made in text, text
    else:
        assert "compiled" not in text


def test_doctor_without_anything_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor.importlib.util.find_spec
    optional = ("triton", "trl", "verl", "openrlhf", "liger_kernel", "cupy")
    hidden = lambda name, *rest: None if name.split(".")[0] in optional else real(name, *rest)  # noqa: E731

    def no_version(package: str) -> str:
        raise doctor.importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(doctor.importlib.util, "find_spec", hidden)
    monkeypatch.setattr(doctor.importlib.metadata, "version", no_version)
    result = _run("doctor")
    assert result.exit_code == 0, result.output
    assert result.output.count("not installed") >= 5


def test_doctor_reports_a_broken_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(operation: str, backend: str) -> None:
        raise ImportError("libstdc++.so.6 is missing")

    monkeypatch.setattr(doctor.dispatch, "implementation", broken)
    assert doctor.status("group", "cpu") == "does not import: ImportError: libstdc++.so.6 is missing"


# ------------------------------------------------------------------------------------------------------------ verify
def test_verify_quick_passes() -> None:
    result = _run("verify", "--quick")
    assert result.exit_code == 0, result.output
    assert "passed" in result.output
    for operation in OPERATIONS:
        assert operation in result.output


def test_verify_fails_when_a_kernel_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    right = cpu_whiten.forward

    def wrong(x: torch.Tensor, mask: Any, shift_mean: bool, ddof: int, eps: float, out: torch.Tensor) -> None:
        right(x, mask, shift_mean, ddof, eps, out)
        out.mul_(1 + 1e-4)

    monkeypatch.setattr(cpu_whiten, "forward", wrong)
    result = _run("verify", "whiten", "--quick", "--backend", "cpu", "--json")
    assert result.exit_code == 1
    facts = json.loads(result.stdout)
    assert not facts["passed"]
    assert {f["output"] for f in facts["failures"]} == {"whitened"}


def test_verify_fails_when_a_kernel_crashes(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: Any) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(cpu_group, "forward", crash)
    result = _run("verify", "group", "--quick", "--backend", "cpu")
    assert result.exit_code == 1
    assert "boom" in result.output


def test_verify_fails_when_the_cpu_kernels_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "status", lambda operation, backend: "does not import: ImportError: _core")
    result = _run("verify", "group", "--quick")
    assert result.exit_code == 1
    assert "BROKEN" in result.output


def test_verify_knows_its_names() -> None:
    assert _run("verify", "group_advantages", "--quick", "--backend", "cpu").exit_code == 0
    assert _run("verify", "softmax").exit_code == 2
    assert _run("verify", "--backend", "opencl").exit_code == 2


def test_a_wrong_gradient_is_found() -> None:
    finding = run.Finding("logprobs", "cpu", "cpu", "p", "float32", "grad of logits", 3e-6, 1e-6)
    assert not finding.ok
    assert run.Finding("logprobs", "cpu", "cpu", "p", "float32", "grad of logits", 1.9e-6, 1e-6).ok


def test_distance() -> None:
    want = torch.tensor([0.5, -100.0, torch.inf, torch.nan])
    assert error.distance(want, want) == 0
    assert error.distance(torch.tensor([0.5, -101.0, torch.inf, torch.nan]), want) == pytest.approx(0.01)
    assert error.distance(torch.tensor([0.6, -100.0, torch.inf, torch.nan]), want) == pytest.approx(0.1)
    assert error.distance(torch.tensor([0.5, -100.0, 3.0, torch.nan]), want) == torch.inf
    assert error.distance(torch.tensor([torch.nan, -100.0, torch.inf, torch.nan]), want) == torch.inf
    small = torch.tensor([1e-5, 0.0])
    assert error.distance(small * 1.01, small, of_gradient=True) == pytest.approx(0.01, rel=1e-3)


# ------------------------------------------------------------------------------------------------------------- bench
@pytest.mark.slow
def test_bench_writes_json_and_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastreward.bench.peers.compiled", lambda function: function)  # compiling is tested below
    if importlib.util.find_spec("numba") is not None:  # which takes a quarter of a minute to compile a loop
        monkeypatch.setattr("numba.njit", lambda **_: lambda function: function)
        monkeypatch.setattr("numba.prange", range)
    figures, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    tiny = ("--quick", "--rows", "16", "--vocab", "200", "--seconds", "0.01", "--dtype", "float32")
    result = _run("bench", *tiny, "--json", str(figures), "--plot", str(picture))
    assert result.exit_code == 0, result.output
    facts = json.loads(figures.read_text())
    assert {case["operation"] for case in facts["cases"]} == set(BENCHED) - {"balance"}  # of integers alone
    assert facts["machine"]["torch"] == torch.__version__
    for case in facts["cases"]:
        ours = case["contenders"][0]
        assert ours["name"] == "fastreward"
        assert ours["median_ms"] > 0
        assert ours["share_of_limit"] > 0
        assert case["rounds"] >= 3
        known = {c["name"] for c in case["contenders"]} | set(case["absent"])
        assert known >= set(PEERS), "every peer has a row: a figure, or why not"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "Summary" in result.output


def test_bench_sweeps_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastreward.bench.peers.compiled", lambda function: function)
    monkeypatch.setenv("COLUMNS", "400")
    figures, picture = tmp_path / "sweep.json", tmp_path / "sweep.png"
    few = ("--no-peers", "--quick", "--rows", "8", "--seconds", "0.001", "--json", str(figures), "--plot", str(picture))
    result = _run("bench", "value_loss", "--sweep", *few)
    assert result.exit_code == 0, result.output
    facts = json.loads(figures.read_text())
    assert "cases" not in facts, "docs/benchmarks.md has tables of these"
    assert [case["shape"] for case in facts["sweep"]] == [[8, 256], [8, 16], [8, 64]]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert sweep("group", (40, 8)) == [(10, 8), (40, 8)]
    assert sweep("logprobs", (8, 999)) == [(8, 999)]
    result = _run("bench", "prefix_tree", "--sweep")
    assert result.exit_code == 2
    assert "--sweep: busy, small_calls, ranks, prefix_tree have sizes of their own" in result.output


def test_bench_looks_where_it_will_write_before_it_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def works(*_: Any) -> Any:
        raise AssertionError("the work has begun")

    monkeypatch.setattr("fastreward.bench.run.results", works)
    cases: list[tuple[str, Path, str]] = [
        ("--json", tmp_path / "no" / "bench.json", "--json: there is no folder"),
        ("--json", tmp_path, "--json: expected a file, got the folder"),
        ("--plot", tmp_path / "no" / "bench.png", "--plot: there is no folder"),
        ("--plot", tmp_path / "bench.txt", "--plot: expected a file that ends in .png, .svg, .pdf"),
    ]
    monkeypatch.setenv("COLUMNS", "400")
    for option, path, message in cases:
        result = _run("bench", "whiten", "--quick", option, str(path))
        assert result.exit_code == 2
        assert message in result.output
    monkeypatch.setattr(check.importlib.util, "find_spec", lambda name: None)
    result = _run("bench", "whiten", "--quick", "--plot", str(tmp_path / "bench.png"))
    assert result.exit_code == 2
    assert "pip install matplotlib" in result.output
    assert not list(tmp_path.iterdir())


def test_figures_name_the_commit(tmp_path: Path) -> None:
    package = tmp_path / "fastreward"
    (package / "_sources").mkdir(parents=True)
    assert report._commit(package) == "not recorded by the build"  # an sdist
    (package / "_sources" / "commit.txt").write_text("abc123\n")
    assert report._commit(package) == "abc123"  # a wheel
    git = ("git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path))
    for arguments in (("init", "--quiet"), ("commit", "--quiet", "--allow-empty", "--message", "first")):
        subprocess.run([*git, *arguments], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout
    assert head.startswith(report._commit(package).removesuffix("-dirty"))  # a checkout


def test_bench_keeps_what_it_has_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in its second case, it leaves the first one's figures."""
    figures, build = tmp_path / "bench.json", bench_whiten.build

    def stopped(case: str, *arguments: Any) -> Any:
        if case == bench_whiten.CASES[1]:
            raise KeyboardInterrupt
        return build(case, *arguments)

    monkeypatch.setattr(bench_whiten, "build", stopped)
    options = ("--quick", "--rows", "8", "--seconds", "0.01", "--no-peers", "--json", str(figures))
    assert _run("bench", "whiten", *options).exit_code != 0
    (case,) = json.loads(figures.read_text())["cases"]
    assert case["case"] == bench_whiten.CASES[0]
    assert {contender["name"].split(" (")[0] for contender in case["contenders"]} == {"fastreward"}


def test_bench_times_nothing_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_whiten, "forward", lambda x, mask, shift, ddof, eps, out: out.zero_())
    result = _run("bench", "whiten", "--quick", "--rows", "8")
    assert result.exit_code == 1
    assert "not equivalent" in result.output
    assert "GB/s" not in result.output


def test_bench_leaves_out_a_peer_that_is_wrong() -> None:
    x = torch.zeros(4)
    right, wrong = Contender("fastreward", lambda: x), Contender("TRL", lambda: x + 1)
    crash = Contender("verl", lambda: 1 // 0)
    case = _case([right, wrong, crash], x)
    outcome = engine.run(case, "cpu", engine.Settings(0.0, 3, 3), lambda text: None)
    assert [t.name for t in outcome.timings] == ["fastreward"]
    assert case.absent["TRL"].startswith("not equivalent: 1 from")
    assert case.absent["verl"].startswith("failed: ZeroDivisionError")


def test_bench_memory_of_a_fresh_process() -> None:
    shape = (2048, 4096)
    peaks = memory.measure("whiten", "fresh", "float32", shape, ["fastreward", "torch eager"])
    assert peaks["fastreward"] < 2 << 20
    assert peaks["torch eager"] > shape[0] * shape[1] * 4  # its temporaries


def test_bench_knows_its_names() -> None:
    assert _run("bench", "softmax").exit_code == 2
    assert _run("bench", "--dtype", "float8").exit_code == 2
    assert _run("bench", "whiten", "--case", "sideways").exit_code == 2
    if not torch.cuda.is_available():
        assert _run("bench", "--device", "cuda").exit_code == 2


def test_limit_is_bytes_over_bandwidth() -> None:
    bandwidth = roofline.Bandwidth(read=10.0, copy=20.0)
    assert roofline.Traffic(100, 0).seconds(bandwidth) == 10
    assert roofline.Traffic(100, 100).seconds(bandwidth) == 10  # 200 bytes at copy bandwidth
    assert roofline.Traffic(200, 100).seconds(bandwidth) == 20
    assert roofline.Traffic(100, 0, flops=300).seconds(roofline.Bandwidth(10.0, 20.0, flops=5.0)) == 60
    read = roofline.logprobs_forward(2, 1000, 4)
    assert read.read == 2 * (4000 + 8)
    assert read.written == 2 * 4


def test_promises_are_judged_at_the_own_size_only() -> None:
    x = torch.zeros(4)
    case = _case([], x)
    case.targets = (
        Target("speedup", 2.0, "verl"),
        Target("memory", 100),
        Target("speedup", 9, "TRL"),
    )
    ours = Timing("fastreward", 0.0, 0.0, [1.0], peak=200)
    outcome = engine.Outcome(case, [ours, Timing("verl", 0.0, 0.0, [3.0])], roofline.Bandwidth(1, 1), 1)
    assert [v.met for v in targets.judge(outcome, "cpu", True)] == [True, False, None]
    assert [v.met for v in targets.judge(outcome, "cpu", False)] == [None, None, None]
    assert targets.judge(outcome, "cuda", True) == []


@pytest.mark.parametrize(("share", "told"), [(0.5, False), (1.0, False), (2.0, True)])
def test_a_share_above_the_limit_is_explained(share: float, told: bool, capsys: pytest.CaptureFixture[str]) -> None:
    case = _case([], torch.zeros(4))
    outcome = engine.Outcome(case, [Timing("fastreward", 0.0, 0.0, [1.0])], roofline.Bandwidth(1.0, 1.0), 1)
    outcome.ours.samples[0] = outcome.limit / share
    report.print_case(Console(width=300), Result(outcome, []))
    assert ("above 100 %" in capsys.readouterr().out) == told


def test_version() -> None:
    result = _run("--version")
    assert result.exit_code == 0
    assert result.output == f"fastreward {fastreward.__version__}\n"


def test_module_runs_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fastreward.cli", "--help"], capture_output=True, text=True, check=True
    )
    for command in ("doctor", "verify", "bench"):
        assert command in done.stdout


def _case(contenders: list[Contender], truth: torch.Tensor) -> Case:
    return Case(
        operation="whiten",
        name="fresh",
        dtype="float32",
        shape=(4,),
        traffic=roofline.Traffic(16, 16),
        error=lambda result: error.distance(result, truth),
        contenders=contenders,
        tolerance=1e-6,
        inputs=[truth],
    )
