"""The rooms: what may import what, as CONTRIBUTING.md lists it, and no file that comes back to itself.

Every import counts, also inside functions and under TYPE_CHECKING. A room is a folder of the package; the files at its
root are the rooms "operations" (the public ones), "doctor" and "cli".
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest
from checkout import ROOT

#: Files of the package's root that are no operation.
ROOT_ROOMS = {"fastreward": "package", "fastreward.cli": "cli", "fastreward.doctor": "doctor"}
#: Compiled modules: what a backend hands pointers to.
COMPILED = ("fastreward._core", "fastreward._cuda")


@cache
def modules() -> dict[str, Path]:
    """Every Python file of the package, by the name of its module."""
    found = {}
    for folder, prefix in ((ROOT / "fastreward", "fastreward"), (ROOT / "kernels", "fastreward.kernels")):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((prefix, *parts)).removesuffix(".__init__")] = path
    return found


def room(module: str) -> str:
    """The room that a module is in."""
    if module in ROOT_ROOMS:
        return ROOT_ROOMS[module]
    parts = module.split(".")
    return parts[1] if len(parts) > 2 or modules()[module].name == "__init__.py" else "operations"


def imported(module: str, text: str) -> set[str]:
    """The package's modules that the text of `module` names in an import, wherever it stands."""
    package = module if modules()[module].name == "__init__.py" else module.rpartition(".")[0]
    names: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            up = package.split(".")
            base = ".".join([*up[: len(up) - node.level + 1], *filter(None, [node.module])] if node.level else [])
            base = base or node.module or ""
            # `from package import name`: the module of that name, if it is one.
            full = {alias: f"{base}.{alias.name}" for alias in node.names}
            names |= {name if name in modules() or name in COMPILED else base for name in full.values()}
    return {name for name in names if name in modules() and name != module}


@cache
def arrows() -> dict[str, set[str]]:
    """What each module imports."""
    return {module: imported(module, path.read_text(encoding="utf-8")) for module, path in modules().items()}


@cache
def listed() -> dict[str, set[str]]:
    """CONTRIBUTING.md's table: room -> what it may import. From top to bottom."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `?(\w+)`? \|[^|]*\|\s*([^|]*?)\s*\|$", text.partition("| room | ")[2], re.MULTILINE)
    return {name: set(re.findall(r"\w+", rooms)) for name, rooms in rows}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The nodes of a circle, in order; [] where there is none."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for following in sorted(graph.get(node, ())):
            found = visit(following, [*path, node])
            if found:
                return found
        done.add(node)
        return []

    for start in sorted(graph):
        found = visit(start, [])
        if found:
            return found
    return []


def test_no_import_circle() -> None:
    found = circle(arrows())
    assert not found, " -> ".join(found)


def test_rooms_import_what_the_list_says() -> None:
    actual: dict[str, dict[str, str]] = {}
    for module, others in arrows().items():
        for other in others:
            if room(module) != room(other):
                actual.setdefault(room(module), {}).setdefault(room(other), f"{module} imports {other}")
    assert set(listed()) == {room(module) for module in modules()}
    for name, allowed in listed().items():
        unlisted = [example for other, example in actual.get(name, {}).items() if other not in allowed]
        assert not unlisted, f"{name} may import {sorted(allowed)}, but {'; '.join(sorted(unlisted))}"
        assert allowed <= set(actual.get(name, {})), f"CONTRIBUTING.md lists what {name} does not import"


def test_the_list_runs_downwards() -> None:
    """A room imports what is listed below it, and nothing else."""
    order = list(listed())
    for name, allowed in listed().items():
        above = allowed & set(order[: order.index(name) + 1])
        assert not above, f"{name} imports {above}, which CONTRIBUTING.md lists above it"


def test_what_no_room_may_do() -> None:
    """Rules of their own: backends are strangers to each other, the reference knows torch alone, patches are last."""
    backends = {"cpu", "cuda", "kernels"}
    assert all(not allowed & (backends - {name}) for name, allowed in listed().items() if name in backends)
    assert listed()["reference"] == set()
    assert all("patch" not in allowed for name, allowed in listed().items() if name != "package")


def test_the_root_holds_public_operations() -> None:
    files = {path.name for path in (ROOT / "fastreward").glob("*.py")}
    assert not {name for name in files - {"__init__.py"} if name.startswith("_")}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("from fastreward._arguments import check", "fastreward._arguments.check"),
        ("def f():\n    import fastreward.cli", "fastreward.cli"),
        ("if TYPE_CHECKING:\n    from fastreward.losses.token import ppo", "fastreward.losses.token"),
        ("from fastreward import policy_loss", "fastreward.policy_loss"),
    ],
)
def test_imports_are_found_wherever_they_stand(text: str, found: str) -> None:
    assert imported("fastreward.group", text) == {found}


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
