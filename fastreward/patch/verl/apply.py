"""Binds what the tables list, now or when verl imports the module, and keeps the account of it."""

from __future__ import annotations

import importlib.metadata
import sys
from collections import defaultdict
from collections.abc import Callable
from types import ModuleType
from typing import Final

from fastreward.patch.bindings import Entry, Patch, PatchRefused, Report, active, exchange, install, undo, warn
from fastreward.patch.imports import AfterImport, is_imported
from fastreward.patch.source import Unrecognised
from fastreward.patch.verl import metrics as logged
from fastreward.patch.verl import tables
from fastreward.patch.verl.replacement import Registration, Replacement

_SERIES: Final = "0.9"


def verl(*, metrics: bool = False, tell: Callable[[str], None] | None = None) -> Report:
    """Let verl's trainers compute through fastreward; docs/compat.md lists what, the report what stays verl's.

    Modules of verl's that are imported already are served at once, the others as they are imported. Calling it again
    changes nothing. `fastreward.patch.undo()` takes it back.

    Args:
        metrics: verl's metrics of each step, on the driver and of actor and critic, get `Report.metrics()`: how many
            calls and tokens fastreward has served in the process since the patch, and in what part of the time.
        tell: called with a line for each function that is found not to be as expected and left alone (the report has
            them too), and for the first call that fastreward refuses of each; by default it is a RuntimeWarning.

    Returns:
        What was replaced, what will be once its module is imported, and what was left and why. It is kept up to date.

    Raises:
        PatchRefused: verl is not installed or not a 0.9. Nothing is changed then.
    """
    present = active("verl")
    if present is not None and present.options == {"metrics": metrics}:
        return present.report
    if present is not None:
        undo("verl")
    report = Report("verl", _supported_version(), tell=tell or warn)
    patch = Patch(report, {"metrics": metrics}, "verl")
    binding = _Binding(patch, logged.REPLACEMENTS if metrics else ())
    patch.imports = AfterImport(binding.rows, binding.serve)
    report.kept += tables.KEPT
    install("verl", patch)
    for name in binding.rows:
        if is_imported(name):
            binding.serve(sys.modules[name])
        else:
            binding.wait(name)
    return report


def _supported_version() -> str:
    try:
        version = importlib.metadata.version("verl")
    except importlib.metadata.PackageNotFoundError as error:
        raise PatchRefused("fastreward.patch.verl: verl is not installed") from error
    if not f"{version}.".startswith(f"{_SERIES}."):
        raise PatchRefused(
            f"fastreward.patch.verl: written for verl {_SERIES}.x, found {version}, whose internals may differ; "
            "nothing was changed"
        )
    return version


class _Binding:
    """Rows of the tables by their module, each put in place when that is imported."""

    def __init__(self, patch: Patch, asked_for: tuple[Replacement, ...] = ()) -> None:
        self.patch, self.report = patch, patch.report
        self.rows: dict[str, list[Replacement | Registration]] = defaultdict(list)
        rows: tuple[Replacement | Registration, ...] = (*tables.REPLACEMENTS, *tables.REGISTRATIONS, *asked_for)
        for row in rows:
            self.rows[row.module].append(row)

    def wait(self, module: str) -> None:
        """Say what is not in place yet."""
        why = f"as soon as {module} is imported"
        for row in self.rows[module]:
            self.report.pending.append(Entry(_place(row), row.what, why))

    def serve(self, module: ModuleType) -> None:
        """Put in place what the tables have for a module that has just been imported, or imported again."""
        rows = self.rows[module.__name__]
        places = {_place(row) for row in rows}
        self.report.pending = [entry for entry in self.report.pending if entry.target not in places]
        self._exchange([row for row in rows if isinstance(row, Replacement)], module)
        for row in rows:
            if isinstance(row, Registration):
                self._register(row, module)

    def _exchange(self, rows: list[Replacement], module: ModuleType) -> None:
        pairs = []
        for row in rows:
            try:
                stock = row.stock(module)
            except Unrecognised as problem:
                self._keep(row, str(problem))
            else:
                pairs.append((row, stock, row.bound(stock, self.report)))
        bound = [(stock, ours) for _, stock, ours in pairs]
        self.patch.everywhere += bound
        found = exchange(self.patch.package, bound)
        for row, stock, _ in pairs:
            self._tell_replaced(Entry(", ".join(sorted(found[id(stock)])), row.what, row.why))

    def _register(self, row: Registration, module: ModuleType) -> None:
        try:
            registry = row.dictionary(module)
            ours = row.bound(self.report)
            taken = sorted(registry.keys() & ours)
            if taken:
                raise Unrecognised(f"it has {', '.join(taken)} already")
        except Unrecognised as problem:
            self._keep(row, str(problem))
            return
        registry.update(ours)
        self.patch.added += [(registry, key, function) for key, function in ours.items()]
        self._tell_replaced(Entry(_place(row), row.what, row.why))

    def _tell_replaced(self, entry: Entry) -> None:
        if entry not in self.report.replaced:
            self.report.replaced.append(entry)

    def _keep(self, row: Replacement | Registration, why: str) -> None:
        place = _place(row)
        self.report.kept.append(Entry(place, "verl's own", why))
        self.report.tell(f"fastreward.patch.verl leaves {place} to verl {self.report.version}: {why}")


def _place(row: Replacement | Registration) -> str:
    return row.target if isinstance(row, Replacement) else row.registry
