"""Changes the code in small ways, one at a time, and reports which changes no test notices.

    python tools/mutate.py                      every mutation of tools/mutations/*.toml
    python tools/mutate.py --room losses        those of one file (or several: --room losses --room trees)
    python tools/mutate.py --only clip          those whose "room/name" contains the text (a regular expression)
    python tools/mutate.py --list               names and tests, nothing run

Each mutation is applied to a copy of the repository under build/mutation, never to the working tree, and the tests
that its entry names are run there. They must pass on the unchanged copy first. A run past its time limit (five times
what the unchanged code takes, and half a minute) counts as noticed. Mutations marked `equivalent` alter no result, for
the reason given: they are run too, and must not be noticed. Exit status 1 if under 95 % are noticed, or if an entry is
of no use (stale, does not compile, tests that fail without it).
"""

from __future__ import annotations

import argparse
import fcntl
import queue
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from mutation_copy import CompileError, Copy
from mutation_list import REPOSITORY, Mutation, Room, load
from rich.console import Console
from rich.markup import escape
from rich.table import Table

T = TypeVar("T")
R = TypeVar("R")
WANTED: Final = 0.95
NOTICED, SURVIVED, EQUIVALENT = "noticed", "survived", "equivalent"
STALE, BROKEN, FAILING = "stale", "does not compile", "tests fail without it"
UNTESTED, WRONG = "its tests select nothing", "wrongly marked equivalent"
USELESS: Final = (STALE, BROKEN, FAILING, UNTESTED, WRONG)
sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
console: Final = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class Result:
    """What became of a mutation: one of NOTICED, SURVIVED, EQUIVALENT, or why it is useless."""

    mutation: Mutation
    outcome: str
    seconds: float = 0.0
    detail: str = ""


class Progress:
    """One line for each thing done, with the share done and the time left at the pace since the first of them."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self._start, self._lock = total, 0, 0.0, threading.Lock()

    def line(self, text: str) -> None:
        """Prints a line for one more thing done."""
        with self._lock:
            self._done += 1
            if self._done == 1:  # what came before it was copying and compiling
                self._start = time.monotonic()
            left = round((time.monotonic() - self._start) / max(1, self._done - 1) * (self._total - self._done))
            console.print(f"[dim]{self._done:4d}/{self._total}  {left // 60:3d}:{left % 60:02d} left[/]  {text}")


def main() -> int:
    """Parses the command line and runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--room", action="append", help="a file of tools/mutations, without .toml")
    parser.add_argument("--only", default="", metavar="PATTERN", help="regular expression for room/name")
    parser.add_argument("--jobs", type=int, default=1, help="mutations at once, each in a copy of its own")
    parser.add_argument("--list", action="store_true", help="show what would run")
    arguments = parser.parse_args()
    rooms = load()
    unknown = set(arguments.room or ()) - {r.name for r in rooms}
    if unknown:
        parser.error(f"--room: expected {', '.join(r.name for r in rooms)}, got {', '.join(sorted(unknown))}")
    chosen = [
        m
        for room in rooms
        if not arguments.room or room.name in arguments.room
        for m in room.mutations
        if re.search(arguments.only, m.label)
    ]
    if arguments.list:
        for m in chosen:
            console.print(f"{m.label:60} {m.tests}", markup=False)
        console.print(f"{len(chosen)} mutations")
        return 0
    with _alone():
        results = run(chosen, max(1, arguments.jobs))
    return report(results)


@contextmanager
def _alone() -> Iterator[None]:
    """Two runs would change each other's copies."""
    folder = REPOSITORY / "build" / "mutation"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit("mutate: another run is going on in this checkout")
        yield


# -------------------------------------------------------------------------------------------------------------- running
def run(mutations: Sequence[Mutation], jobs: int) -> list[Result]:
    """The results of `mutations`, tried by `jobs` threads, each of which has a copy of the repository."""
    stale = [Result(m, STALE, detail=why) for m in mutations if (why := m.stale())]
    outdated = {r.mutation.label for r in stale}
    fresh = [m for m in mutations if m.label not in outdated]
    together: dict[tuple[Room, tuple[str, ...]], set[str]] = {}  # what is run of some files, by any mutation
    for m in fresh:
        files, expression = m.selection
        together.setdefault((m.room, files), set()).add(expression)
    progress = Progress(len(together) + len(fresh))

    def unchanged(copy: Copy, of: tuple[Room, tuple[str, ...]]) -> tuple[tuple[Room, tuple[str, ...]], float | None]:
        return of, _baseline(copy, *of, together[of], progress)

    passing = dict(_in_copies(together, jobs, unchanged))
    usable = [m for m in fresh if passing[m.room, m.selection[0]] is not None]
    results = stale + [Result(m, FAILING) for m in fresh if passing[m.room, m.selection[0]] is None]
    for r in results:
        console.print(f"[red]{r.outcome}[/] {r.mutation.label} {escape(r.detail)}")

    def tried(copy: Copy, m: Mutation) -> Result:
        result = _try(copy, m, 30.0 + 5.0 * (passing[m.room, m.selection[0]] or 0.0))
        colour = {NOTICED: "green", EQUIVALENT: "yellow"}.get(result.outcome, "bold red")
        progress.line(f"[{colour}]{result.outcome}[/] {result.seconds:.1f} s {m.label} {escape(result.detail)}")
        return result

    return results + _in_copies(usable, jobs, tried)


def _in_copies(work: Iterable[T], jobs: int, task: Callable[[Copy, T], R]) -> list[R]:
    """task(copy, item) for each item of `work`, as they finish, from `jobs` threads with a copy each."""
    waiting: queue.SimpleQueue[T] = queue.SimpleQueue()
    for item in work:
        waiting.put(item)
    done: list[R] = []
    failed: list[BaseException] = []

    def worker(number: int) -> None:
        try:
            with Copy(number) as copy:
                while not failed:
                    done.append(task(copy, waiting.get_nowait()))
        except queue.Empty:
            pass
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=worker, args=(k,), daemon=True) for k in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return done


def _baseline(
    copy: Copy, room: Room, files: tuple[str, ...], expressions: set[str], progress: Progress
) -> float | None:
    """Seconds that the tests of `files` that any of `expressions` selects take unchanged; None if they do not pass."""
    copy.prepare(room)
    expression = "" if "" in expressions else " or ".join(f"({e})" for e in sorted(expressions))
    answer = copy.run_tests(room, files, expression, 900.0, unchanged=True)
    if answer.outcome == "passed":
        progress.line(f"[dim]unchanged code passes in {answer.seconds:.1f} s: {room.name}: {' '.join(files)}[/]")
        return answer.seconds
    progress.line(f"[bold red]the unchanged code does not pass ({answer.outcome}):[/] {' '.join(files)}")
    console.print(copy.log(), markup=False, style="dim")
    return None


def _try(copy: Copy, m: Mutation, limit: float) -> Result:
    copy.prepare(m.room)
    try:
        with copy.changed(m):
            answer = copy.run_tests(m.room, *m.selection, limit)
    except CompileError as error:
        return Result(m, BROKEN, detail=str(error))
    if answer.outcome == "nothing":
        return Result(m, UNTESTED, detail=m.tests)
    if answer.outcome != "passed":
        if m.equivalent:
            return Result(m, WRONG, answer.seconds, copy.first_failure())
        detail = "(out of time)" if answer.outcome == "timeout" else ""
        return Result(m, NOTICED, answer.seconds, detail)
    if m.equivalent:
        return Result(m, EQUIVALENT, answer.seconds, f"({m.equivalent})")
    return Result(m, SURVIVED, answer.seconds, f"{m.file}: {m.before!r} -> {m.after!r}; {m.tests}")


# --------------------------------------------------------------------------------------------------------------- report
def report(results: Sequence[Result]) -> int:
    """Prints a table by room and the names of what was not noticed; the exit status."""
    table = Table("room", "noticed", "survived", "equivalent", "of no use", "share", title="mutations")
    for name in [*dict.fromkeys(r.mutation.room.name for r in results), None]:
        here = [r for r in results if name is None or r.mutation.room.name == name]
        counts = [sum(r.outcome == o for r in here) for o in (NOTICED, SURVIVED, EQUIVALENT)]
        useless = sum(r.outcome in USELESS for r in here)
        if name is None:
            table.add_section()
        table.add_row(name or "all", *map(str, counts), str(useless), f"{_share(here):.1%}")
    console.print(table)
    for outcome in (SURVIVED, *USELESS):
        named = [r.mutation.label for r in results if r.outcome == outcome]
        if named:
            console.print(f"{outcome}: {', '.join(named)}")
    good = _share(results) >= WANTED and not any(r.outcome in USELESS for r in results)
    console.print(f"{_share(results):.1%} noticed; wanted: {WANTED:.0%}")
    return 0 if good else 1


def _share(results: Sequence[Result]) -> float:
    noticed, survived = (sum(r.outcome == o for r in results) for o in (NOTICED, SURVIVED))
    return noticed / max(1, noticed + survived)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    sys.exit(main())
