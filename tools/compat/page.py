"""docs/compat.md: the tables between its markers, from results.json. The text around them is written by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Final

from rows import COMMITS, TRAINERS, Row, rows

ROOT: Final = Path(__file__).resolve().parents[2]
RESULTS: Final = Path(__file__).with_name("results.json")
PAGE: Final = ROOT / "docs" / "compat.md"


def read() -> dict[str, Any]:
    """The results by row."""
    results: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    return results


def write(results: dict[str, Any]) -> None:
    """The results of the rows that there are, and the page."""
    names = [row.name for row in rows()]
    kept = {name: results[name] for name in names if name in results}
    RESULTS.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    PAGE.write_text(rendered(PAGE.read_text(encoding="utf-8"), kept), encoding="utf-8")


def rendered(text: str, results: dict[str, Any]) -> str:
    """The page with its tables as the results have them."""
    parts = {name: trainer(name, results) for name in (*TRAINERS, *COMMITS)}
    parts |= {kind: environments(kind, results) for kind in ("torch", "python", "triton", "compiled")}
    for name, part in parts.items():
        marked = re.compile(rf"<!-- {name} -->\n.*?<!-- /{name} -->", re.DOTALL)
        if len(marked.findall(text)) != 1:
            raise ValueError(f"docs/compat.md: expected <!-- {name} --> and <!-- /{name} --> once")
        text = marked.sub(lambda _, n=name, p=part: f"<!-- {n} -->\n{p}\n<!-- /{n} -->", text)
    return text


def trainer(name: str, results: dict[str, Any]) -> str:
    """What came of its versions, then a line for each function."""
    found = [(row, results.get(row.name, {"not_run": "not run yet"})) for row in rows() if row.kind == name]
    lines = [f"{'commit ' if name in COMMITS else ''}{_title(row)}: {_outcome(result)}." for row, result in found]
    ran = {row.version: result for row, result in found if "functions" in result}
    functions = {target: row for result in ran.values() for target, row in result["functions"].items()}
    heads = ["function", "served by", "convention", *(f"largest difference, {version}" for version in ran)]
    table = []
    for target, (served, convention, _) in sorted(functions.items()):
        numbers = (_number(result["functions"].get(target)) for result in ran.values())
        table.append((f"`{target}`", f"`{served}`" if served else "", _cell(convention), *numbers))
    return "\n".join([*(f"- {line}" for line in lines), "", *_table(heads, table)])


def environments(kind: str, results: dict[str, Any]) -> str:
    """A line for each version."""
    found = [(row, results.get(row.name, {"not_run": "not run yet"})) for row in rows() if row.kind == kind]
    name = "triton" if kind == "compiled" else kind
    body = [(_title(row), _outcome(result)) for row, result in found]
    return "\n".join(_table([name, "tests"], body))


def _title(row: Row) -> str:
    return f"{row.version} ({row.note})" if row.note else row.version


def _outcome(result: dict[str, Any]) -> str:
    if "not_run" in result:
        return f"**not run**: {result['not_run']}"
    counts = result["outcome"]
    words = [f"{counts.get('passed', 0):,} passed"]
    words += [f"**{counts[word]:,} {word}**" for word in ("failed", "error") if counts.get(word)]
    words += [f"{counts['skipped']:,} skipped"] if counts.get("skipped") else []
    return ", ".join(words)


def _number(row: list[Any] | None) -> str:
    if row is None:
        return "not there"
    return "" if row[2] is None else "0" if row[2] == 0 else f"{row[2]:.0e}".replace("e-0", "e-")


def _table(heads: list[str], body: list[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *body)]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def ran(row: Row, results: dict[str, Any]) -> bool:
    """Whether there is a result of it."""
    return row.name in results and "not_run" not in results[row.name]
