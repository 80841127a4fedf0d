"""Runs what a change may have broken, in a minute and a half: for work between commits; `make test` runs everything.

    python tools/check.py                 since main, uncommitted and untracked files included
    python tools/check.py --since HEAD    since the last commit
    python tools/check.py --list          shows what would run

An operation has one name in every room, so that a changed file selects the tests that have its name in their path:
`fastreward/whiten.py`, `csrc/cpu/whiten.cpp` and `kernels/whiten.py` all select tests/operations/test_whiten.py and the
backends' tests of that name. A file in the folder of an operation selects the operation's tests too, and one whose name
no test of its room has selects the room's. ROOMS names those of rooms whose tests are elsewhere, and those of rooms on
which others stand, which always run. Then come ruff, mypy and a core of fast tests. Tests marked slow are left out;
what the time is not enough for is skipped, and counted.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from functools import cache
from pathlib import Path, PurePath
from typing import Final

import pytest

ROOT: Final = Path(__file__).resolve().parents[1]
BUDGET: Final = 90.0
LINTERS: Final = ("ruff check --quiet .", "ruff format --check --quiet .", "mypy")
INTERPRETED: Final = "tests/backends/triton/interpreted/"
#: Where the tests are of a room (the longest prefix of a file's path that stands here) that has none of its own name.
ROOMS: Final = {
    "bench/": ["tests/package/test_bench_"],
    "csrc/bindings/": ["tests/package/test_dispatch.py"],
    "csrc/cpu/": ["tests/backends/cpu/test_isa.py", "tests/backends/cpu/test_program.py"],
    "csrc/cuda/": ["tests/backends/cuda/"],
    "docs/": ["tests/package/test_docs.py", "tests/package/test_readme.py"],
    "examples/": ["tests/package/test_examples.py"],
    "fastreward/": ["tests/package/test_dispatch.py"],
    "fastreward/_arguments/": ["tests/operations/test_arrays.py", "tests/losses/test_arguments.py"],
    "fastreward/_loss_call/": [
        *("tests/operations/test_policy_loss.py", "tests/operations/test_preference_loss.py"),
        *("tests/operations/test_value_loss.py", "tests/operations/test_logits_policy_loss.py"),
        *("tests/operations/test_linear_policy_loss.py", "tests/losses/test_arguments.py", "tests/recipes/"),
    ],
    "fastreward/_runtime/": ["tests/package/test_dispatch.py", "tests/operations/test_transforms.py"],
    "fastreward/bench/": ["tests/package/test_bench_", "tests/package/test_cli.py"],
    "fastreward/cli.py": ["tests/package/test_cli"],
    "fastreward/cuda/": ["tests/backends/cuda/"],
    "fastreward/doctor.py": ["tests/package/test_cli.py"],
    "fastreward/language/": ["tests/losses/", "tests/backends/cpu/test_program.py", "tests/recipes/test_policy.py"],
    "fastreward/patch/": ["tests/peers/test_patch_trl.py"],
    "fastreward/verify/": ["tests/package/test_cli.py"],
    "kernels/": ["tests/backends/triton/"],
    "README.md": ["tests/package/test_readme.py"],
    "tools/": ["tests/package/test_check.py", "tests/package/test_mutations.py"],
}
#: Rooms on which others stand: what a change breaks is tested there, also where tests have a changed file's name.
SHARED: Final = ("fastreward/_", "fastreward/language/")
CORE: Final = [
    "tests/package/test_rooms.py",
    "tests/package/test_mutations.py",
    "tests/operations/test_whiten.py",
    "tests/losses/test_language.py",
    "tests/operations/test_policy_loss.py",
    "tests/recipes/test_registry.py",
]


# ------------------------------------------------------------------------------------------------------- what to run
@cache
def test_files() -> tuple[str, ...]:
    """Every file of tests, by its path from the root."""
    return tuple(sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py")))


def changed_files(since: str | None) -> list[str]:
    """What differs in the working tree from `since` (None: from where main was left), untracked files included."""
    main = next((name for name in ("main", "origin/main") if _git("rev-parse", "--verify", "-q", name)), "HEAD")
    base = since or "".join(_git("merge-base", "HEAD", main))
    return sorted({*_git("diff", "--name-only", base), *_git("ls-files", "--others", "--exclude-standard")})


def _git(*command: str) -> list[str]:
    return subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()


def selected(changed: str) -> list[str]:
    """The test files for one changed file."""
    path = PurePath(changed)
    if path.parts[0] == "tests":
        return [changed] if changed in test_files() else importers(path)
    room = "".join(path.parts[1:2]) if path.parts[0] == "fastreward" and len(path.parts) > 2 else ""
    names = [*path.parts[2 if path.parts[0] in ("fastreward", "csrc") else 1 : -1], path.stem]
    found = [test for name in names for test in named(name.removeprefix("register_"), room)]
    if room and not any(test.startswith(f"tests/{room}/") for test in found):
        found += named(room, room)
    prefixes = [prefix for prefix in ROOMS if changed.startswith(prefix)]
    if prefixes and (not found or changed.startswith(SHARED)):
        found += [test for test in test_files() if test.startswith(tuple(ROOMS[max(prefixes, key=len)]))]
    return list(dict.fromkeys(found))


def named(name: str, room: str) -> list[str]:
    """The tests with a name, or its plural or singular, in their path: those of a room of that name, if it has any."""
    name = name.strip("_")
    found = _with(name) or _with(f"{name}s") or _with(name.removesuffix("s"))
    return [test for test in found if test.startswith(f"tests/{room}/")] or found


def _with(name: str) -> list[str]:
    return [test for test in test_files() if re.search(rf"[/_]{re.escape(name)}(?=[/_.])", test)]


def importers(support: PurePath) -> list[str]:
    """The tests that import a file of tests/support, also by way of others there."""
    if support.parts[:2] != ("tests", "support"):
        return []
    names, before = {support.parts[2].removesuffix(".py")}, 0
    helpers = list((ROOT / "tests" / "support").rglob("*.py"))
    while len(names) > before:
        before = len(names)
        names |= {helper.stem for helper in helpers if _imports(helper, names)}
    return [test for test in test_files() if _imports(ROOT / test, names)]


def _imports(path: Path, names: Iterable[str]) -> bool:
    return bool(re.search(rf"\b({'|'.join(map(re.escape, names))})\b", path.read_text()))


# ------------------------------------------------------------------------------------------------------------ running
class Deadline:
    """A pytest plugin: tests that would begin after CHECK_DEADLINE are skipped."""

    reason = "no time left"

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Skips where the time is over."""
        if time.time() > float(os.environ["CHECK_DEADLINE"]):
            pytest.skip(self.reason)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Says how many tests of which file were left out."""
        skipped = terminalreporter.stats.get("skipped", [])
        late = Counter(r.nodeid.partition("::")[0] for r in skipped if self.reason in str(r.longrepr))
        for file, count in late.items():
            terminalreporter.write_line(f"left out, {self.reason}: {count} tests of {file}")


def pytest_configure(config: pytest.Config) -> None:
    """Where pytest loads this file as a plugin (-p check)."""
    config.pluginmanager.register(Deadline())


def run_tests(files: list[str], deadline: float, **environment: str) -> bool:
    """Runs pytest over files, in order, until the deadline; True if none failed."""
    if not files:
        return True
    path = os.pathsep.join(filter(None, [str(ROOT / "tools"), os.environ.get("PYTHONPATH")]))
    environment |= {"CHECK_DEADLINE": str(deadline), "OMP_WAIT_POLICY": "passive", "PYTHONPATH": path}
    options = ["-q", "-n", "2", "--dist", "load", "-m", "not slow", "-r", "fE", "--durations", "5", "-p", "check"]
    command = [sys.executable, "-m", "pytest", *options, *files]
    status = subprocess.run(command, cwd=ROOT, env=os.environ | environment, check=False).returncode
    return status in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)


def main() -> int:
    """Parses the command line and runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--since", metavar="COMMIT", help="what to compare with (default: where main was left)")
    parser.add_argument("--seconds", type=float, default=BUDGET, help="no test begins later than this")
    parser.add_argument("--list", action="store_true", help="show what would run")
    arguments = parser.parse_args()
    start = time.time()
    tests = {changed: selected(changed) for changed in changed_files(arguments.since)} | {"the core": CORE}
    for changed, files in tests.items():
        print(f"{changed}: {', '.join(files) or 'no tests of its own'}", flush=True)
    if arguments.list:
        return 0
    bin_, deadline = Path(sys.executable).parent, start + arguments.seconds
    linters = {line: subprocess.Popen([bin_ / line.split()[0], *line.split()[1:]], cwd=ROOT) for line in LINTERS}
    every = list(dict.fromkeys(file for files in tests.values() for file in files))
    interpreted = [file for file in every if file.startswith(INTERPRETED)]
    others = [file for file in every if file not in interpreted]
    passed = {
        "interpreted tests": run_tests(interpreted, deadline, TRITON_INTERPRET="1", OMP_NUM_THREADS="1"),
        "tests": run_tests(others, deadline),
        **{line: process.wait() == 0 for line, process in linters.items()},
    }
    failed = [name for name, well in passed.items() if not well]
    print(f"{'failed: ' + ', '.join(failed) if failed else 'nothing failed'}, in {time.time() - start:.0f} s")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
