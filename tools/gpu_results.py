"""A pytest plugin for gpu_check.sh: appends every test's outcome to $GPU_RESULTS as soon as it is known, so that a run
that is stopped, or hangs, keeps what it has found."""

from __future__ import annotations

import json
import os
import time

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """One line of JSON a test; of its phases the call, or the one that failed or skipped."""
    if "PYTEST_XDIST_WORKER" in os.environ or (report.when != "call" and report.passed):
        return
    message = str(report.longrepr).strip().splitlines()[-1][:200] if report.failed and report.longrepr else ""
    facts = {
        "test": report.nodeid.rsplit("::", 1)[-1],
        "outcome": "error" if report.failed and report.when != "call" else report.outcome,
        "seconds": round(report.duration, 2),
        "at": round(time.time(), 1),
        "message": message,
    }
    with open(os.environ["GPU_RESULTS"], "a", encoding="utf-8") as file:
        file.write(json.dumps(facts) + "\n")
