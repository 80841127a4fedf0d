"""Fixtures of the compile tests. What compiles is a process of its own: this one may have imported the interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from checkout import ROOT


@pytest.fixture(scope="module")
def lines(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the module's PROGRAM prints; two processes, one of them for sm_90, for which most variants are built."""
    program = ROOT / "tests" / "support" / request.module.PROGRAM
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["FASTREWARD_CACHE"] = str(tmp_path_factory.mktemp("generated"))

    def build(architectures: list[str]) -> list[dict[str, Any]]:
        run = subprocess.run(
            [sys.executable, str(program), *architectures],
            env=environment,
            capture_output=True,
            text=True,
            timeout=590,
            check=False,
        )
        assert run.returncode == 0, run.stderr[-6000:]
        return [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]

    with ThreadPoolExecutor(2) as pool:
        return [line for part in pool.map(build, (["90"], ["80", "100"])) for line in part]


@pytest.fixture(scope="module")
def kernels(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The figures of every compiled kernel."""
    return [line for line in lines if "kernel" in line]
