"""Run in a row's environment: what the patch of a trainer replaces there, as JSON. `python survey.py trl`."""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import sys
import warnings
from typing import Any

from fastreward import patch


def survey(trainer: str) -> dict[str, Any]:
    """{"functions": {target: [served by, convention]}, "kept": [[what, by whom, why]]}."""
    if trainer in ("slime", "prime-rl"):
        module = importlib.import_module(f"fastreward.patch.{trainer.replace('-', '_')}")
        names = [name for name in module.__all__ if inspect.isfunction(getattr(module, name))]
        functions = {f"{trainer}.{n}": [f"{module.__name__}.{n}", _first(getattr(module, n))] for n in names}
        return {"functions": functions, "kept": []}
    report = _report(trainer)
    rows = replacements(trainer)
    kept = [[entry.target, entry.what, entry.why] for entry in report.kept]
    served = {entry.target: entry for entry in report.replaced}
    left = {entry.target for entry in report.kept}
    functions = {target: [row.what, convention(row)] for target, row in rows.items() if target not in left}
    if not rows:
        functions = {target: [served[target].what, served[target].why] for target in report.usage}
    return {"functions": functions, "kept": kept}


def _report(trainer: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if trainer == "trl":
            importlib.import_module("trl")
            report = patch.trl(losses=True)
            for entry in list(report.pending):
                _imported(entry.target)
            return report
        report = getattr(patch, trainer)()
        for target in replacements(trainer):
            _imported(target)
        return report


def replacements(trainer: str) -> dict[str, Any]:
    """The rows of the patch's tables by their targets; none where it has no tables."""
    if trainer == "trl":
        return {}
    tables = importlib.import_module(f"fastreward.patch.{trainer}.tables")
    return {row.target: row for row in tables.REPLACEMENTS}


def _imported(target: str) -> None:
    """The module that a dotted name is defined in, if it can be imported here."""
    parts = target.split(".")
    for length in range(len(parts) - 1, 0, -1):
        try:
            importlib.import_module(".".join(parts[:length]))
        except Exception:  # its own dependencies, or a class in the way
            continue
        return


def convention(row: Any) -> str:
    """The first line of the replacement's docstring; of what is no function of its own the reason in the table."""
    ours = row.ours.func if isinstance(row.ours, functools.partial) else row.ours
    return (_first(ours) if inspect.isroutine(ours) else "") or row.why


def _first(function: Any) -> str:
    return (inspect.getdoc(function) or "").partition("\n")[0]


if __name__ == "__main__":
    print(json.dumps(survey(sys.argv[1])))
