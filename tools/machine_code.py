"""What the machine code of the streaming kernels predicts for GPUs: docs/gpu.json, the tables of docs/gpu.md.

`python tools/machine_code.py` compiles them for sm_80, sm_90 and sm_100 (no GPU is needed, some minutes are) and writes
the JSON; named cases alone with `python tools/machine_code.py PPO "reverse KL, bf16"`. `python tools/docs.py` writes
the page from it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final, NamedTuple

ROOT: Final = Path(__file__).resolve().parents[1]
FIGURES: Final = ROOT / "docs" / "gpu.json"
#: By the JSON's name of a table: the program that compiles its kernels.
PROGRAMS: Final = {
    "kernels": ROOT / "tests" / "support" / "compiled_streams.py",
    "cuda": ROOT / "tests" / "support" / "compiled_cuda_streams.py",
}
ARCHITECTURES: Final = ("80", "90", "100")

#: The time from asking memory for a load to having it under traffic, in seconds.
LATENCY: Final = 0.7e-6
#: Of an SM: instructions of a thread that are issued in a cycle, those of exp2 and its like, registers, warps.
ISSUED, MUFU, REGISTERS, WARPS = 128, 16, 65536, 64


class Gpu(NamedTuple):
    """clock: GHz under load; bandwidth: TB/s."""

    name: str
    sm: int
    processors: int
    clock: float
    bandwidth: float

    @property
    def room(self) -> float:
        """Instructions of a thread per byte that can be issued while memory is at its full bandwidth."""
        return self.processors * ISSUED * self.clock * 1e9 / (self.bandwidth * 1e12)

    @property
    def wanted(self) -> float:
        """Bytes in flight per SM that the latency asks for."""
        return self.bandwidth * 1e12 / self.processors * LATENCY


GPUS: Final = (
    Gpu("A100", 80, 108, 1.41, 2.04),
    Gpu("H100", 90, 132, 1.755, 3.35),
    Gpu("H200", 90, 132, 1.755, 4.8),
    Gpu("B200", 100, 148, 1.85, 8.0),
)


# --------------------------------------------------------------------------------------------------------- prediction
def programs_per_sm(kernel: dict[str, Any]) -> int:
    """How many programs the registers and warps of an SM have room for."""
    warp = -(-kernel["registers"] // 8) * 8 * 32
    return int(min(REGISTERS // warp // kernel["warps"], WARPS // kernel["warps"]))


def in_flight(kernel: dict[str, Any], loop: dict[str, int]) -> int:
    """Bytes that an SM has asked for: one pass's loads of all threads."""
    return programs_per_sm(kernel) * kernel["warps"] * 32 * loop["loaded"]


def share(gpu: Gpu, kernel: dict[str, Any], loop: dict[str, int]) -> float:
    """Of the bandwidth: what issue, the unit for exp2 and the latency leave of it."""
    moved = loop["loaded"] + loop["stored"]
    issue = gpu.room * moved / max(loop["instructions"], loop["mufu"] * ISSUED / MUFU)
    return min(1.0, issue, in_flight(kernel, loop) / gpu.wanted)


# -------------------------------------------------------------------------------------------------------------- page
def gpus() -> str:
    """What the prediction takes of each GPU."""
    heads = ("GPU", "SMs", "GHz", "TB/s", "instructions a byte", "and a bf16 column", "KiB in flight an SM")
    rows = (
        (g.name, str(g.processors), f"{g.clock:g}", f"{g.bandwidth:g}", f"{g.room:.1f}", f"{2 * g.room:.1f}",
         f"{g.wanted / 1024:.0f}")
        for g in GPUS
    )  # fmt: skip
    return _table(heads, rows)


def kernels() -> str:
    """The Triton kernels."""
    return _passes("kernels")


def cuda() -> str:
    """Those in CUDA C++."""
    return _passes("cuda")


def _passes(table: str) -> str:
    """A row for each pass of each kernel; sm_90 but for the shares, each of which is of its GPU's machine code."""
    known = json.loads(FIGURES.read_text(encoding="utf-8"))[table]
    heads = (
        "kernel", "bytes in, out", "registers", "programs an SM", "KiB in flight", "instructions", "a byte",
        *(g.name for g in GPUS),
    )  # fmt: skip
    rows = []
    for case, by_sm in known.items():
        kernel = by_sm["90"]
        for k, loop in enumerate(kernel["passes"]):
            title = case if len(kernel["passes"]) == 1 else f"{case}: {('first', 'second')[k]} read"
            moved = loop["loaded"] + loop["stored"]
            own = (
                title, f"{loop['loaded']}, {loop['stored']}", str(kernel["registers"]), str(programs_per_sm(kernel)),
                f"{in_flight(kernel, loop) / 1024:.0f}", str(loop["instructions"]),
                f"{loop['instructions'] / moved:.1f}",
            )  # fmt: skip
            shares = (share(g, by_sm[str(g.sm)], by_sm[str(g.sm)]["passes"][k]) for g in GPUS)
            rows.append((*own, *(f"{x:.0%}".replace("%", " %") for x in shares)))
    return _table(heads, rows)


def _table(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [heads, tuple("---" for _ in heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# ----------------------------------------------------------------------------------------------------------- compile
def compiled(architectures: Iterable[str], cases: Iterable[str] = (), table: str = "kernels") -> list[dict[str, Any]]:
    """What the table's program finds in the machine code, a line for each case and architecture."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as folder:
        environment.setdefault("FASTREWARD_CACHE", folder)
        command = [sys.executable, str(PROGRAMS[table]), *architectures, "--", *cases]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(run.stderr[-6000:])
    return [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]


def main() -> None:
    """Compiles everything, or the cases of the command line, and writes the JSON."""
    import triton

    known = json.loads(FIGURES.read_text(encoding="utf-8")) | {"triton": triton.__version__}
    unknown = set(sys.argv[1:])
    for table in PROGRAMS:
        kernels: dict[str, dict[str, Any]] = known.get(table, {}) if sys.argv[1:] else {}
        for line in compiled(ARCHITECTURES, sys.argv[1:], table):
            found = {name: line[name] for name in ("registers", "warps", "passes")}
            kernels.setdefault(line["case"], {})[str(line["sm"])] = found
            unknown.discard(line["case"])
        known[table] = kernels
    if unknown:
        raise SystemExit(f"machine_code: no case is called {', '.join(sorted(unknown))}")
    FIGURES.write_text(f"{json.dumps(known, indent=1)}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
