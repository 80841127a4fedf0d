"""Holds every operation on every backend of this machine to the float64 reference: `fastreward verify`.

A result passes when it is no further from the truth than the same computation in plain torch at the input's dtype,
plus 1e-6 (and one unit of a low-precision dtype where a GEMM rounds the logits). Errors are relative to the entry where
it is above 1, gradients' to their largest entry; NaN and infinities have to sit exactly where the truth has them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fastreward import doctor
from fastreward._runtime import dispatch
from fastreward.verify.error import distance
from fastreward.verify.problem import Problem, Tensors, on, problems

SLACK = 1e-6
Where = tuple[str, str, str, str, str]  # operation, backend, device, problem, dtype
#: Triton's interpreter cuts float32 off to bfloat16 where hardware rounds (test_rounding.py): up to a whole unit, of
#: numbers that torch may have hit by luck. In the interpreter only.
_INTERPRETER_SLACK = 2.0**-7
#: A low-precision GEMM rounds the logits on both sides, tile by tile or whole; which falls nearer to the truth is luck.
#: So what starts with one GEMM, or with two, may be that many units of its dtype further off than torch.
_GEMM_SLACK = {"bfloat16": 2.0**-8, "float16": 2.0**-11}
_GEMMS = {"linear_logprobs": 1, "linear_divergence": 2}


@dataclass(frozen=True, slots=True)
class Finding:
    """One output of one problem on one backend; `error` and `torch_error` are distances from the truth."""

    operation: str
    backend: str
    device: str
    problem: str
    dtype: str
    output: str
    error: float
    torch_error: float
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether it meets the criterion."""
        cut_off = self.backend == "triton" and self.device == "cpu" and self.dtype == "bfloat16"
        slack = SLACK + (_INTERPRETER_SLACK if cut_off else 0.0)
        slack += _GEMMS.get(self.operation, 0) * _GEMM_SLACK.get(self.dtype, 0.0)
        return self.error <= self.torch_error + slack


@dataclass(slots=True)
class Plan:
    """Problems by backend, and the reasons where there is none to run."""

    problems: list[tuple[Problem, list[tuple[dispatch.Backend, str]]]] = field(default_factory=list)
    skipped: dict[tuple[str, str], str] = field(default_factory=dict)  # (operation, backend) -> why
    broken: dict[tuple[str, str], str] = field(default_factory=dict)  # should be here, and is not


def plan(operations: Sequence[str] | None, backends: Sequence[str] | None, quick: bool) -> Plan:
    """Problems of the operations with the (backend, device) pairs that serve them here; all where None."""
    for name in operations or ():
        if name not in dispatch.OPERATIONS:
            raise ValueError(f"unknown operation {name!r}; expected one of {', '.join(dispatch.OPERATIONS)}")
    made = Plan()
    for operation in operations or dispatch.OPERATIONS:
        places = _places(made, operation, backends)
        if places:
            made.problems += [(problem, places) for problem in problems(operation, quick)]
    return made


def plan_of(operation: str, own: Iterable[Problem], backends: Sequence[str] | None) -> Plan:
    """Problems that somebody else has made, on the backends that serve the operation here."""
    made = Plan()
    places = _places(made, operation, backends)
    made.problems = [(problem, places) for problem in own] if places else []
    return made


def _places(made: Plan, operation: str, backends: Sequence[str] | None) -> list[tuple[dispatch.Backend, str]]:
    """Where the operation can run; why it can't elsewhere goes into the plan."""
    for name in backends or ():
        if name not in dispatch.BACKENDS:
            raise ValueError(f"unknown backend {name!r}; expected one of {', '.join(dispatch.BACKENDS)}")
    places: list[tuple[dispatch.Backend, str]] = []
    for backend in dispatch.BACKENDS:
        if backends and backend not in backends:
            continue
        status = doctor.status(operation, backend)
        if status.startswith(("available", "experimental")):
            places.append((backend, _device(backend)))
        elif backend == "cpu" or (backends and status.startswith("does not import")):
            made.broken[operation, backend] = status
        else:
            made.skipped[operation, backend] = status
    return places


def run(jobs: Plan, step: Callable[[str], None]) -> list[Finding]:
    """Every problem on every backend; `step` is told after each problem."""
    findings: list[Finding] = []
    for problem, places in jobs.problems:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            truth = problem.truth(on(problem.inputs, "cpu"))
            plain = {device: problem.plain(on(problem.inputs, device)) for device in {d for _, d in places}}
            for backend, device in places:
                findings += _compare(problem, backend, device, truth, plain[device])
        step(f"{problem.operation}: {problem.name}")
    return findings


def of_peer(name: str, problem: Problem, got: Tensors) -> list[Finding]:
    """What a function of somebody else's gives, from float64 inputs, beside plain torch's float32."""
    with torch.random.fork_rng(devices=[]):
        truth, plain = problem.truth(problem.inputs), problem.plain(problem.inputs)
    where = (problem.operation, name, "cpu", problem.name, problem.dtype)
    return _findings(where, got, truth, plain)


def passed(jobs: Plan, findings: Sequence[Finding]) -> bool:
    """Whether everything that should run here ran, and was right."""
    return not jobs.broken and bool(findings) and all(f.ok for f in findings)


def as_dict(jobs: Plan, findings: Sequence[Finding]) -> dict[str, Any]:
    """For --json: the worst finding of each kind, every failure, what was skipped, the verdict."""
    return {
        "passed": passed(jobs, findings),
        "worst": [_finding_dict(f) | {"problems": n} for f, n in _worst(findings)],
        "failures": [_finding_dict(f) for f in findings if not f.ok],
        "skipped": {" on ".join(key): reason for key, reason in jobs.skipped.items()},
        "broken": {" on ".join(key): reason for key, reason in jobs.broken.items()},
    }


def show(console: Console, jobs: Plan, findings: Sequence[Finding]) -> None:
    """The worst of each operation, backend and dtype, values and gradients apart, beside torch's error there."""
    table = Table(title="Distance from the float64 reference", title_justify="left")
    for heading in ("operation", "backend", "dtype", "what", "checks"):
        table.add_column(heading)
    for heading in ("worst error", "torch's there", "torch's worst"):
        table.add_column(heading, justify="right")
    table.add_column("worst in")
    table.add_column("")
    for finding, count in _worst(findings):
        same = [f for f in findings if _kind(f) == _kind(finding)]
        failures = sum(not f.ok for f in same)
        table.add_row(
            finding.operation,
            finding.backend if finding.device == "cpu" else f"{finding.backend} ({finding.device})",
            finding.dtype,
            "gradients" if finding.output.startswith("grad") else "values",
            str(count),
            f"{finding.error:.1e}",
            f"{finding.torch_error:.1e}",
            f"{max(f.torch_error for f in same):.1e}",
            f"{finding.problem}: {finding.output}",
            f"[bold red]{failures} failed[/]" if failures else "[green]ok[/]",
        )
    console.print(table)
    for finding in [f for f in findings if not f.ok][:20]:
        console.print(
            f"[red]FAILED[/] {finding.operation} on {finding.backend}, {finding.dtype}, {finding.problem}: "
            f"{finding.output} is {finding.error:.3e} from the truth, torch {finding.torch_error:.3e} {finding.note}",
            highlight=False,
        )
    for (operation, backend), reason in jobs.broken.items():
        console.print(f"[red]BROKEN[/] {operation} on {backend}: {reason}", highlight=False)
    for reason in sorted(set(jobs.skipped.values())):
        names = ", ".join(f"{op} on {backend}" for (op, backend), r in jobs.skipped.items() if r == reason)
        console.print(f"[dim]skipped {names}: {reason}[/]", highlight=False)
    verdict = "[bold green]passed[/]" if passed(jobs, findings) else "[bold red]FAILED[/]"
    bad = sum(not f.ok for f in findings)
    console.print(f"{verdict}: {len(findings)} comparisons in {len(jobs.problems)} problems, {bad} failed")


def _device(backend: str) -> str:
    return "cuda" if torch.cuda.is_available() and backend in ("triton", "cuda") else "cpu"


def _compare(problem: Problem, backend: dispatch.Backend, device: str, truth: Tensors, plain: Tensors) -> list[Finding]:
    where: Where = (problem.operation, backend, device, problem.name, problem.dtype)
    try:
        with dispatch.backend(backend):
            got = problem.ours(on(problem.inputs, device))
    except Exception as error:  # a crash is a failure of this backend, not of verify
        return [Finding(*where, "call", math.inf, 0.0, f"{type(error).__name__}: {error}")]
    return _findings(where, got, truth, plain)


def _findings(where: Where, got: Tensors, truth: Tensors, plain: Tensors) -> list[Finding]:
    if missing := truth.keys() - got.keys():
        return [Finding(*where, name, math.inf, 0.0, "not returned") for name in sorted(missing)]
    return [
        Finding(*where, name, _error(name, got[name], truth[name]), _torch_error(name, plain.get(name), truth[name]))
        for name in truth
    ]


def _error(name: str, got: Tensor, truth: Tensor) -> float:
    return distance(got.cpu(), truth, of_gradient=name.startswith("grad"))


def _torch_error(name: str, plain: Tensor | None, truth: Tensor) -> float:
    """Plain torch's distance, over the entries where it is finite; whole numbers have to be right."""
    if plain is None or not truth.is_floating_point():
        return 0.0
    plain = plain.cpu().double()
    return _error(name, torch.where(plain.isfinite(), plain, truth.double()), truth)


def _kind(finding: Finding) -> tuple[str, str, str, str, bool]:
    return (
        finding.operation,
        finding.backend,
        finding.device,
        finding.dtype,
        finding.output.startswith("grad"),
    )


def _worst(findings: Sequence[Finding]) -> list[tuple[Finding, int]]:
    """For each kind the finding furthest beyond torch's error (failures first), with the kind's count."""
    kinds: dict[tuple[str, str, str, str, bool], list[Finding]] = {}
    for finding in findings:
        kinds.setdefault(_kind(finding), []).append(finding)
    return [(max(group, key=lambda f: (not f.ok, f.error)), len(group)) for group in kinds.values()]


def _finding_dict(finding: Finding) -> dict[str, Any]:
    return {
        "operation": finding.operation,
        "backend": finding.backend,
        "device": finding.device,
        "dtype": finding.dtype,
        "problem": finding.problem,
        "output": finding.output,
        # JSON has no infinity.
        "error": finding.error if math.isfinite(finding.error) else "inf",
        "torch_error": finding.torch_error if math.isfinite(finding.torch_error) else "inf",
        "ok": finding.ok,
        "note": finding.note,
    }
