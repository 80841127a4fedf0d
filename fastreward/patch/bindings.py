"""Rebinding names in someone else's modules so that every one of them can be put back, and the report about it.

A name is a module's attribute, or an entry of a dictionary that is one: a registry. Names are found by the identity of
what they hold, so that modules which imported a function from elsewhere are served too.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, astuple, dataclass, field
from types import ModuleType
from typing import Any, Final

import torch
from rich.table import Table

from fastreward.patch.imports import AfterImport
from fastreward.patch.usage import P, R, Usage, counted, is_inside_handed_on


class PatchRefused(RuntimeError):
    """The patch was not applied, nothing was changed, and the message says why."""


def warn(line: str) -> None:
    """A RuntimeWarning: how a patch makes itself heard where its caller has no other way."""
    warnings.warn(line, RuntimeWarning, stacklevel=3)


#: So many functions without a call are listed one by one.
_FEW: Final = 8


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a report: of `target` it is now `what` that runs, and `why`."""

    target: str
    what: str
    why: str


@dataclass(slots=True)
class Report:
    """A patch's account of what it replaced and what it kept. `rich.print(report)` shows it as a table.

    `pending` is what it replaces once the trainer imports the module, which it has not done yet in this process.
    `usage` has what each replaced function has done in this process, by its dotted name; `share` is the part of the
    time since the patch was applied that they took. `tell` is called with what its user has to hear.
    """

    trainer: str
    version: str
    replaced: list[Entry] = field(default_factory=list)
    kept: list[Entry] = field(default_factory=list)
    pending: list[Entry] = field(default_factory=list)
    usage: dict[str, Usage] = field(default_factory=dict)
    since: float = field(default_factory=time.perf_counter)
    tell: Callable[[str], None] = warn
    refusals: set[str] = field(default_factory=set)  # targets of which it has been told

    def __str__(self) -> str:
        lines = [f"{self._title}; `fastreward.patch.undo()` takes it out"]
        lines += [f"  replaced  {e.target} -> {e.what}: {e.why}" for e in self.replaced]
        lines += [f"  pending   {e.target} -> {e.what}: {e.why}" for e in self.pending]
        lines += [f"  kept      {e.target}: {e.what}, because {e.why}" for e in self.kept]
        return "\n".join(lines)

    def __rich__(self) -> Table:
        table = Table("", title=self._title, title_justify="left")
        for heading in ("what", "now served by", "why"):
            table.add_column(heading, overflow="fold")
        for mark, entries in (("replaced", self.replaced), ("pending", self.pending), ("kept", self.kept)):
            for entry in entries:
                table.add_row(mark, entry.target, entry.what, entry.why)
        return table

    def counted(self, target: str, function: Callable[P, R], tokens: Callable[P, int]) -> Callable[P, R]:
        """`function`, whose calls are entered in `usage` under `target`; `tokens` says how many a call has."""
        return counted(self.usage.setdefault(target, Usage()), function, tokens)

    def refused(self, target: str, error: Exception) -> None:
        """Tell, once for each target, why fastreward has refused a call that the trainer's own function then served.

        Not of calls that this function makes in its turn: it is the same NaN that they meet.
        """
        if target not in self.refusals and not torch.compiler.is_compiling() and not is_inside_handed_on():
            self.refusals.add(target)
            why = f"{type(error).__name__}: {error}"
            self.tell(
                f"fastreward.patch: a call of {target} went on to {self.trainer}'s own code, as will others like it, "
                f"which are counted and not told; {why}"
            )

    @property
    def total(self) -> Usage:
        """All of `usage` added up."""
        rows = self.usage.values()
        return Usage(*(sum(column) for column in zip(*map(astuple, rows), strict=True))) if rows else Usage()

    @property
    def share(self) -> float:
        """The part of the wall time since the patch was applied that its replaced functions took."""
        return self.total.seconds / max(time.perf_counter() - self.since, 1e-9)

    def metrics(self) -> dict[str, float]:
        """`total` and `share` as numbers to log: `fastreward/calls`, `/tokens`, `/seconds`, `/handed_on`, `/share`."""
        return {f"fastreward/{name}": float(x) for name, x in asdict(self.total).items()} | {
            "fastreward/share": self.share
        }

    @property
    def _title(self) -> str:
        return f"fastreward in {self.trainer} {self.version}"


class Status(dict[str, Report]):
    """The report of every patch in place, by trainer. Printed, it is what each replaced function has done since."""

    def __str__(self) -> str:
        if not self:
            return "fastreward.patch: no patch is in place in this process"
        return "\n".join(line for report in self.values() for line in _usage_lines(report))

    def __rich__(self) -> Table:
        table = Table(title="fastreward.patch in this process", title_justify="left")
        table.add_column("function", overflow="fold")
        for heading in ("calls", "tokens", "seconds", "of the time", "handed on"):
            table.add_column(heading, justify="right")
        for report in self.values():
            rows, more = _usage_rows(report)
            for target, usage in rows:
                table.add_row(target, *_usage_cells(report, usage))
            if more:
                table.add_row(more)
            table.add_row(f"all of {report.trainer}", *_usage_cells(report, report.total), end_section=True)
        return table


def _usage_rows(report: Report) -> tuple[list[tuple[str, Usage]], str]:
    """Each function and what it has served; where many have not been called, their number instead of their rows."""
    rows = list(report.usage.items())
    used = [(target, usage) for target, usage in rows if usage.calls or usage.handed_on]
    unused = len(rows) - len(used)
    if unused <= _FEW:
        return rows, ""
    return used, f"{unused} others, not called so far; status()[{report.trainer!r}] has their names"


def _usage_cells(report: Report, usage: Usage) -> tuple[str, ...]:
    elapsed = max(time.perf_counter() - report.since, 1e-9)
    share = f"{100 * usage.seconds / elapsed:.1f} %"
    return f"{usage.calls:,}", f"{usage.tokens:,}", f"{usage.seconds:.3f}", share, f"{usage.handed_on:,}"


def _usage_lines(report: Report) -> Iterator[str]:
    yield f"{report._title}: calls, tokens, seconds, share of the time, handed on to {report.trainer}"
    rows, more = _usage_rows(report)
    for target, usage in rows:
        yield f"  {target}: {', '.join(_usage_cells(report, usage))}"
    if more:
        yield f"  {more}"
    yield f"  all: {', '.join(_usage_cells(report, report.total))}"


@dataclass(slots=True)
class Patch:
    """The bindings of one applied patch: pairs (theirs, ours) by the module prefix in which they are exchanged."""

    report: Report
    options: dict[str, Any]
    package: str
    everywhere: list[tuple[Any, Any]] = field(default_factory=list)  # (theirs, ours), wherever the package binds theirs
    single: list[tuple[Any, str, Any, Any]] = field(default_factory=list)  # (module or class, name, theirs, ours)
    added: list[tuple[dict[str, Any], str, Any]] = field(default_factory=list)  # (registry, a key of ours, ours)
    imports: AfterImport | None = None  # serves modules that are imported later

    def apply(self) -> None:
        """Put ours in."""
        exchange(self.package, self.everywhere)
        for owner, name, _, ours in self.single:
            setattr(owner, name, ours)
        for registry, key, ours in self.added:
            registry[key] = ours
        if self.imports is not None:
            self.imports.start()

    def undo(self) -> None:
        """Put theirs back, also in modules that were imported since; what someone else has rebound meanwhile stays."""
        if self.imports is not None:
            self.imports.stop()
        # A script's own module has taken ours where it imported a name after the patch.
        exchange(self.package, [(ours, theirs) for theirs, ours in self.everywhere], beyond=True)
        for owner, name, theirs, ours in self.single:
            if vars(owner).get(name) is ours:
                setattr(owner, name, theirs)
        for registry, key, ours in self.added:
            if registry.get(key) is ours:
                del registry[key]


def exchange(package: str, pairs: Iterable[tuple[Any, Any]], *, beyond: bool = False) -> dict[int, list[str]]:
    """Rebind to `new`, for each of the pairs (old, new), every name and registry entry of `package` that is `old`.

    Returns the dotted places by the id of the old object. `beyond`: names of modules outside the package too.
    """
    new = {id(old): (old, ours) for old, ours in pairs}  # which keeps old, so that its id is nobody else's
    places: dict[int, list[str]] = {found: [] for found in new}
    for module in _modules("" if beyond else package):
        for registry, namespace in _namespaces(module, registries=_is_in(module.__name__, package)):
            for key, bound in list(namespace.items()):
                if id(bound) in new:
                    namespace[key] = new[id(bound)][1]
                    place = f"{registry}[{key!r}]" if registry else key
                    places[id(bound)].append(f"{module.__name__}.{place}")
    return places


def bindings(package: str, value: Any) -> Iterator[tuple[ModuleType, str]]:
    """Module-level names in the imported modules of `package` that are bound to this very object."""
    for module in _modules(package):
        for name in [name for name, bound in vars(module).items() if bound is value]:
            yield module, name


def _modules(package: str) -> Iterator[ModuleType]:
    """The imported modules of `package`; of all packages, where it is ""."""
    for name, module in list(sys.modules.items()):
        if isinstance(module, ModuleType) and (not package or _is_in(name, package)):
            yield module


def _is_in(module_name: str, package: str) -> bool:
    return module_name == package or module_name.startswith(f"{package}.")


def _namespaces(module: ModuleType, *, registries: bool) -> Iterator[tuple[str, dict[Any, Any]]]:
    """The names of a module, as ("", them), and its dictionaries by their names."""
    # vars() and not getattr: a lazy module would import its whole trainer zoo on attribute access
    names = vars(module)
    yield "", names
    if registries:
        yield from [(n, x) for n, x in names.items() if isinstance(x, dict) and not n.startswith("__")]


def is_own(function: Any, package: str) -> bool:
    """Whether all of a function's code is the package's: nothing is wrapped around it but what torch decorates with.

    What wraps a function may take its name, module and signature, and its source is told for that of the wrapper.
    """
    folders = tuple(f"{folder}{os.sep}" for name in (package, "torch") for folder in sys.modules[name].__path__)
    while function is not None:
        code = getattr(function, "__code__", None)
        if code is not None and not code.co_filename.startswith(folders):
            return False
        function = getattr(function, "__wrapped__", None)
    return True


_applied: dict[str, Patch] = {}


def active(trainer: str) -> Patch | None:
    """The patch of `trainer` that is in place, if one is."""
    return _applied.get(trainer)


def install(trainer: str, patch: Patch) -> Report:
    """Apply a patch and remember it."""
    patch.apply()
    _applied[trainer] = patch
    return patch.report


def undo(trainer: str | None = None) -> None:
    """Restore every binding that the patch of `trainer` (None: every patch) has replaced; no effect where none is."""
    for name in list(_applied) if trainer is None else [trainer]:
        patch = _applied.pop(name, None)
        if patch is not None:
            patch.undo()


def status() -> Status:
    """The report of every patch in place, by trainer; empty when there is none.

    Printed (`print`, or `rich.print` for a table), it shows for each replaced function how many calls, tokens and
    seconds it has served in this process since the patch was applied.
    """
    return Status({trainer: patch.report for trainer, patch in _applied.items()})
