"""Binds what the table lists, now or when OpenRLHF imports the module, and keeps the account of it."""

from __future__ import annotations

import importlib.metadata
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from fastreward.patch.bindings import Entry, Patch, PatchRefused, Report, active, exchange, install, undo, warn
from fastreward.patch.imports import AfterImport, is_imported
from fastreward.patch.openrlhf import log, tables
from fastreward.patch.openrlhf.replacement import Replacement
from fastreward.patch.openrlhf.serving import Serving
from fastreward.patch.openrlhf.source import PACKAGE, folder
from fastreward.patch.source import Unrecognised


def openrlhf(
    *,
    metrics: bool = False,
    devices: tuple[str, ...] = ("cpu", "cuda"),
    tell: Callable[[str], None] | None = None,
) -> Report:
    """Let OpenRLHF 0.11.2 compute through fastreward in this process; docs/compat.md lists what, and has Ray's workers.

    Modules of OpenRLHF's that are imported already are served at once, the others as they are imported; nothing is
    imported for it. Calling it again with the same options changes nothing. `fastreward.patch.undo()` takes it back.

    Args:
        metrics: OpenRLHF logs how much fastreward has served, with `Report.metrics()` of each process:
            `fastreward/driver/...` in what goes to wandb and TensorBoard, `fastreward/actor/...` and
            `fastreward/critic/...` (of rank 0) in its status.
        devices: kinds of device whose tensors are taken; others go to OpenRLHF's own functions.
        tell: called with a line for each function that is found not to be as expected and left alone (the report has
            them too), and for the first call that fastreward refuses of each; by default it is a RuntimeWarning.

    Returns:
        What was replaced, what will be once its module is imported, and what was left and why. It is kept up to date.

    Raises:
        PatchRefused: OpenRLHF is not installed. Nothing is changed then.
    """
    options = {"metrics": metrics, "devices": tuple(devices)}
    present = active(PACKAGE)
    if present is not None and present.options == options:
        return present.report
    root = folder()
    if root is None:
        raise PatchRefused("fastreward.patch.openrlhf: openrlhf is not installed")
    if present is not None:
        undo(PACKAGE)
    report = Report(PACKAGE, _version(), tell=tell or warn)
    patch = Patch(report, options, PACKAGE)
    binding = _Binding(patch, Serving(report, tuple(devices)), root, log.ROWS if metrics else ())
    patch.imports = AfterImport(binding.rows, binding.serve)
    report.kept += tables.KEPT
    install(PACKAGE, patch)
    for name in binding.rows:
        if is_imported(name):
            binding.serve(sys.modules[name])
        else:
            binding.wait(name)
    return report


def _version() -> str:
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return "(of unknown version)"  # a checkout; the sources decide in any case


class _Binding:
    """Rows of the table by their module, each put in place when that is imported."""

    def __init__(
        self,
        patch: Patch,
        serving: Serving,
        root: Path,
        logged: tuple[log.Logged, ...],
    ) -> None:
        self.patch, self.report, self.serving = patch, patch.report, serving
        self.rows: dict[str, list[Replacement | log.Logged]] = defaultdict(list)
        rows: tuple[Replacement | log.Logged, ...] = (*tables.REPLACEMENTS, *logged)
        for row in rows:
            try:
                row.check_source(root)
            except Unrecognised as problem:
                self._keep(row, str(problem))
            else:
                self.rows[row.module].append(row)

    def wait(self, module: str) -> None:
        """Say what is not in place yet."""
        why = f"as soon as {module} is imported"
        self.report.pending += [Entry(row.target, row.what, why) for row in self.rows[module]]

    def serve(self, module: ModuleType) -> None:
        """Put in place what there is for a module that has just been imported, or imported again."""
        rows = self.rows[module.__name__]
        targets = {row.target for row in rows}
        self.report.pending = [entry for entry in self.report.pending if entry.target not in targets]
        for row in rows:
            try:
                owner, stock = row.owner(module), row.stock(module)
            except Unrecognised as problem:
                self._keep(row, str(problem))
                continue
            ours = row.bound(stock, module, self.serving)
            if row.method:
                setattr(owner, row.short, ours)
                self.patch.single.append((owner, row.short, stock, ours))
                places = [row.target]
            else:
                self.patch.everywhere.append((stock, ours))
                places = exchange(PACKAGE, [(stock, ours)])[id(stock)]
            entry = Entry(", ".join(sorted(places)), row.what, row.why)
            if entry not in self.report.replaced:
                self.report.replaced.append(entry)

    def _keep(self, row: Replacement | log.Logged, why: str) -> None:
        self.report.kept.append(Entry(row.target, "OpenRLHF's own", why))
        self.report.tell(f"fastreward.patch.openrlhf leaves {row.target} to OpenRLHF {self.report.version}: {why}")
