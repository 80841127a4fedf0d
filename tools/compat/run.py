"""Runs a row's tests in its environment and says what came of them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from environments import ROOT, NotHere, python_of
from rows import COMMITS, TRAINERS, Row

_COUNTS = re.compile(r"(\d+) (passed|failed|skipped|errors?)\b")


def run(row: Row) -> dict[str, Any]:
    """{"outcome": {"passed": ..., "failed": ...}, "functions": ..., "kept": ...}, or {"not_run": why}."""
    try:
        python = python_of(row)
    except NotHere as error:
        return {"not_run": str(error)}
    found: dict[str, Any] = {"outcome": _tested(row, python)}
    if row.kind in (*TRAINERS, *COMMITS):
        survey = _survey(row, python)
        differences = _differences(_records(row))
        functions = {
            target: [*served, differences.get(target)] for target, served in sorted(survey["functions"].items())
        }
        found |= {"functions": functions, "kept": survey["kept"]}
    return found


def _tested(row: Row, python: Path) -> dict[str, int]:
    """Counts of passed, failed and skipped tests. Triton's are two runs: it is the interpreter, or it compiles."""
    records = _records(row)
    records.parent.mkdir(parents=True, exist_ok=True)
    records.unlink(missing_ok=True)
    counts: dict[str, int] = {}
    interpreted, others = [], []
    for pattern in row.tests:
        files = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))
        (interpreted if "interpreted" in pattern else others).extend(files)
    # What Triton compiles is all marked as slow.
    options = (*row.options, *(() if row.kind == "compiled" else ("-m", "not slow")))
    for files, environment in ((interpreted, {"TRITON_INTERPRET": "1"}), (others, {})):
        told = {"FASTREWARD_COMPAT": str(records), **environment, **dict(row.environment)}
        for word, number in _pytest(python, [*options, *files] if files else [], told).items():
            counts[word] = counts.get(word, 0) + number
    return counts


def _pytest(python: Path, arguments: list[str], environment: dict[str, str]) -> dict[str, int]:
    if not arguments:
        return {}
    options = ("-q", "-p", "no:cacheprovider")
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(
        [str(python), "-m", "pytest", *options, *arguments],
        cwd=ROOT,
        env={**os.environ, **threads, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    print(*(line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))), sep="\n", flush=True)
    last = done.stdout.strip().rpartition("\n")[2]
    counts = {word.rstrip("s") if word == "errors" else word: int(n) for n, word in _COUNTS.findall(last)}
    if not counts:
        raise RuntimeError(f"pytest in {python} said nothing of its tests:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return counts


def _survey(row: Row, python: Path) -> dict[str, Any]:
    script = Path(__file__).with_name("survey.py")
    done = subprocess.run([str(python), str(script), row.kind], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        raise RuntimeError(f"{row.name}: the patch could not be applied")
    survey: dict[str, Any] = json.loads(done.stdout.strip().rpartition("\n")[2])
    return survey


def _records(row: Row) -> Path:
    return ROOT / "build" / "compat" / "records" / f"{row.name}.jsonl"


def _differences(records: Path) -> dict[str, float]:
    """The largest difference of each function, of what the tests have noted."""
    found: dict[str, float] = {}
    for line in records.read_text(encoding="utf-8").splitlines() if records.exists() else ():
        record = json.loads(line)
        found[record["target"]] = max(record["difference"], found.get(record["target"], 0.0))
    return found
