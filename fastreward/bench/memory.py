"""Peak extra memory on the CPU: the kernel's own high-water mark of a fresh process around one call.

`measure` starts `python -m fastreward.bench.memory`, which builds the case, warms every contender up on a few rows,
resets VmHWM (Linux: /proc/self/clear_refs) and makes one call. malloc hands every block above 64 KiB back to the
system at once there, so that no earlier call's memory hides a later call's need.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from fastreward.bench import peers
from fastreward.bench.case import Case, Contender
from fastreward.bench.engine import outputs_bytes

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
_WARM_ROWS = 4


def measure(operation: str, case: str, dtype: str, shape: tuple[int, ...], names: list[str]) -> dict[str, int]:
    """Peak extra bytes besides the outputs, by contender, from a fresh process; {} where the system has no /proc."""
    if not _STATUS.exists():
        return {}
    job = json.dumps({"operation": operation, "case": case, "dtype": dtype, "shape": shape, "names": names})
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "fastreward.bench.memory", job],
        env=os.environ | _MALLOC,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"the memory measurement of {operation} {case} failed:\n{done.stderr[-2000:]}")
    answer: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return answer


def _child(operation: str, case: str, dtype: str, shape: list[int], names: list[str]) -> dict[str, int]:
    from fastreward import bench

    module = bench.operation(operation)
    few = (min(_WARM_ROWS, shape[0]), *shape[1:])
    imported = any(name.startswith(tuple(peers.MODULES)) for name in names)
    with nullcontext() if imported else peers.left_out():
        tiny = module.build(case, getattr(torch, dtype), few, "cpu")
        real = module.build(case, getattr(torch, dtype), tuple(shape), "cpu")
    for contender in _chosen(tiny, names):
        if not contender.compiled:
            contender.prepare()
            contender.call()
    del tiny
    return {contender.name: _peak(real, contender) for contender in _chosen(real, names)}


def _chosen(case: Case, names: list[str]) -> list[Contender]:
    return [c for c in case.contenders if c.name in names]


def _peak(case: Case, contender: Contender) -> int:
    contender.prepare()
    if contender.compiled:
        contender.call()  # the compiler's memory is not the kernel's
        contender.prepare()
    gc.collect()
    watch = _HighWater()
    result = contender.call()
    return max(watch.stop() - outputs_bytes(result, case.inputs), 0)


class _HighWater:
    """Growth of the resident set since construction, at its highest."""

    def __init__(self) -> None:
        self._exact = True
        try:
            _CLEAR.write_text("5")
        except OSError:  # some sandboxes forbid it: sample instead
            self._exact = False
        self._before = _status("VmRSS")
        self._seen = self._before
        self._done = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        if not self._exact:
            self._sampler.start()

    def _sample(self) -> None:
        while not self._done.is_set():
            self._seen = max(self._seen, _status("VmRSS"))
            time.sleep(0.001)

    def stop(self) -> int:
        """Bytes above the start."""
        if self._exact:
            return _status("VmHWM") - self._before
        self._done.set()
        self._sampler.join()
        return max(self._seen, _status("VmRSS")) - self._before


def _status(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_STATUS} has no {field}")


def main(job: str) -> None:
    """The fresh process: a job in JSON in, bytes by contender in JSON out."""
    arguments: dict[str, Any] = json.loads(job)
    sys.stdout.write("\n" + json.dumps(_child(**arguments)) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
