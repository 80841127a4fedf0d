"""A whole benchmark: every chosen operation, case and dtype in turn, with memory and verdicts."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from fastreward import bench
from fastreward.bench import memory, peers, targets
from fastreward.bench.case import OURS
from fastreward.bench.engine import Outcome, Settings, run


@dataclass(frozen=True, slots=True)
class Plan:
    """A choice of cases to run."""

    operations: tuple[str, ...]
    device: str = "cpu"
    quick: bool = False
    rows: int | None = None
    vocab: int | None = None
    dtypes: tuple[str, ...] = ()  # empty: each operation's own
    cases: tuple[str, ...] = ()  # empty: all
    memory: bool = True
    settings: Settings = field(default_factory=Settings)
    peers: bool = True
    sweep: bool = False

    def jobs(self) -> list[tuple[str, str, str, tuple[int, ...]]]:
        """(operation, dtype, case, shape) in the order in which they run: cases of one dtype and shape share data."""
        jobs = []
        for name in self.operations:
            module = bench.operation(name)
            chosen = [d for d in module.DTYPES if not self.dtypes or d in self.dtypes]
            cases = [c for c in module.CASES if not self.cases or c in self.cases]
            whole = bench.shape_of(name, self.quick, self.rows, self.vocab)
            shapes = bench.sweep(name, whole) if self.sweep else [whole]
            jobs += [(name, dtype, case, shape) for dtype in chosen for shape in shapes for case in cases]
        return jobs


@dataclass(frozen=True, slots=True)
class Result:
    """One case: what was measured and what it means."""

    outcome: Outcome
    verdicts: list[targets.Verdict]

    def as_dict(self) -> dict[str, Any]:
        """For --json; times in milliseconds, bandwidths in GB/s, memory in bytes."""
        case, limit = self.outcome.case, self.outcome.limit
        ours = self.outcome.ours.median
        return {
            "operation": case.operation,
            "case": case.name,
            "dtype": case.dtype,
            "shape": list(case.shape),
            "rounds": self.outcome.rounds,
            "read_gbs": self.outcome.bandwidth.read / 1e9,
            "copy_gbs": self.outcome.bandwidth.copy / 1e9,
            "gemm_gflops": self.outcome.bandwidth.flops / 1e9 if case.gemm is not None else None,
            "bytes": case.traffic.total,
            "limit_ms": limit * 1e3,
            "contenders": [
                {
                    "name": t.name,
                    "median_ms": t.median * 1e3,
                    "min_ms": min(t.samples) * 1e3,
                    "p99_ms": t.p99 * 1e3,
                    "max_ms": max(t.samples) * 1e3,
                    "first_ms": t.first * 1e3,
                    "gbs": case.traffic.total / t.median / 1e9,
                    "gflops": case.traffic.flops / t.median / 1e9,
                    "share_of_limit": limit / t.median,
                    "peak_extra_bytes": t.peak,
                    "error": t.error,
                    "fastreward_speedup": t.median / ours,
                }
                for t in self.outcome.timings
            ],
            "absent": case.absent,
            "targets": [{"text": v.target.text, "measured": v.measured, "met": v.met} for v in self.verdicts],
        }


def results(plan: Plan, step: Callable[[str], None]) -> Iterator[Result]:
    """Runs the plan, case by case; `step` is told what happens next."""
    for name, dtype, case_name, shape in plan.jobs():
        module = bench.operation(name)
        step(f"{name} {case_name} {dtype}: data")
        with nullcontext() if plan.peers else peers.left_out():
            case = module.build(case_name, getattr(torch, dtype), shape, plan.device)
        if not plan.peers:
            case.contenders = [c for c in case.contenders if c.name.startswith(OURS)]
        outcome = run(case, plan.device, plan.settings, lambda text: step(f"{name} {case_name} {dtype}: {text}"))  # noqa: B023
        # What a result keeps must not keep the data.
        case.contenders.clear()
        case.inputs.clear()
        case.error = _forgotten
        gc.collect()
        if plan.memory and plan.device == "cpu" and not case.tail and case.repeated == 1:
            step(f"{name} {case_name} {dtype}: peak memory, in a fresh process")
            peaks = memory.measure(name, case_name, dtype, shape, [t.name for t in outcome.timings])
            for timing in outcome.timings:
                timing.peak = peaks.get(timing.name)
        verdicts = targets.judge(outcome, plan.device, shape == module.SHAPE)
        yield Result(outcome, verdicts)


def _forgotten(result: Any) -> float:
    raise RuntimeError("this case has been run; its data is gone")
