"""Options of `pytest bench`, and the body of its test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastreward import bench
from fastreward.bench import engine
from fastreward.bench.case import OURS, PEERS

_ROUNDS = 5


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastreward")
    group.addoption("--full", action="store_true", help="the operations' own sizes instead of the quick ones")
    group.addoption("--rows", type=int, help="first dimension")
    group.addoption("--vocab", type=int, help="vocabulary, where there is one")
    group.addoption("--device", default="cpu", choices=("cpu", "cuda"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with `contender` runs once per operation, and its dtypes, cases and contenders."""
    if "contender" in metafunc.fixturenames:
        jobs = [
            (operation, case, dtype, name)
            for operation in bench.OPERATIONS
            for dtype in bench.operation(operation).DTYPES
            for case in bench.operation(operation).CASES
            for name in (OURS, *PEERS)
        ]
        names = ("operation", "case", "dtype", "contender")
        metafunc.parametrize(names, jobs, ids=["-".join(job) for job in jobs])


@pytest.fixture
def run_contender(request: pytest.FixtureRequest, benchmark: Any) -> Callable[[str, str, str, str], None]:
    """Builds the case, holds the contender to the truth, then times it; skips a peer that does not take part."""
    options = request.config.getoption

    def run(operation: str, case: str, dtype: str, name: str) -> None:
        shape = bench.shape_of(operation, not options("--full"), options("--rows"), options("--vocab"))
        device = options("--device")
        built = bench.operation(operation).build(case, getattr(torch, dtype), shape, device)
        contender = next((c for c in built.contenders if c.name == name), None)
        timing = None if contender is None else engine.gate(built, contender, device)
        if contender is None or timing is None:
            pytest.skip(built.absent.get(name, "does not take part"))

        def call() -> None:
            contender.call()
            if device == "cuda":
                torch.cuda.synchronize()

        benchmark.group = built.title
        benchmark.extra_info.update(error=timing.error, bytes=built.traffic.total)
        benchmark.pedantic(call, setup=contender.prepare, rounds=_ROUNDS, warmup_rounds=1)

    return run
