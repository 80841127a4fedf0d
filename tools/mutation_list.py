"""The mutations of tools/mutations/*.toml, one file for each room of the code.

A file has, before its [[mutation]] entries:

    preload = ["torch", "hypothesis"]   # what the process that all its tests are forked from imports
    tests = "tests/operations/test_whiten.py"      # arguments for pytest, where an entry has none of its own
    [environment]                       # variables that its tests are run with
    TRITON_INTERPRET = "1"

and an entry has `name`, `file`, `before` (which must occur exactly once in the file), `after`, perhaps `tests`, and
`equivalent`, the reason why no test can notice it.
"""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Final

REPOSITORY: Final = Path(__file__).resolve().parents[1]
LISTS: Final = REPOSITORY / "tools" / "mutations"


@dataclass(frozen=True)
class Room:
    """A file of mutations. preload, environment: of the process that its tests are forked from."""

    name: str
    preload: tuple[str, ...]
    environment: tuple[tuple[str, str], ...]
    mutations: list[Mutation] = field(default_factory=list, compare=False)


@dataclass(frozen=True)
class Mutation:
    """One change to one file. tests: arguments for pytest. equivalent: why no result changes."""

    room: Room
    name: str
    file: str
    before: str
    after: str
    tests: str
    equivalent: str | None = None

    @property
    def label(self) -> str:
        """Room and name."""
        return f"{self.room.name}/{self.name}"

    @property
    def selection(self) -> tuple[tuple[str, ...], str]:
        """What pytest gets of `tests`: the arguments, and the expression of -k ("" for none)."""
        words = shlex.split(self.tests)
        return (tuple(words[: words.index("-k")]), words[-1]) if "-k" in words else (tuple(words), "")

    def stale(self) -> str | None:
        """Why the entry no longer fits the repository; None if it does."""
        path = REPOSITORY / self.file
        if not path.is_file():
            return f"there is no {self.file}"
        count = path.read_text(encoding="utf-8").count(self.before)
        if count != 1:
            return f"{self.before!r} occurs {count} times in {self.file}"
        if self.before == self.after:
            return "it changes nothing"
        return _missing_tests(*self.selection)


def _missing_tests(files: tuple[str, ...], expression: str) -> str | None:
    """Which file, test or word of -k is not there."""
    if not files:
        return "it names no tests"
    missing = [f for f in files if not (REPOSITORY / f.split("::")[0]).is_file()]
    if missing:
        return f"there is no {missing[0]}"
    text = {f: (REPOSITORY / f.split("::")[0]).read_text(encoding="utf-8") for f in files}
    for file in files:
        for name in file.split("::")[1:]:
            if not re.search(rf"def {re.escape(name.split('[')[0])}\b", text[file]):
                return f"there is no {name} in {file.split('::')[0]}"
    for word in re.findall(r"\w+", expression):
        if word not in ("and", "or", "not") and word not in _all_tests():
            return f"there is no {word!r} in tests/"
    return None


@cache
def _all_tests() -> str:
    """The text of every test, and of what their parameters' names come from."""
    return "\n".join(p.read_text(encoding="utf-8") for p in sorted((REPOSITORY / "tests").rglob("*.py")))


def load() -> list[Room]:
    """All rooms, by name."""
    return [_room(path.stem, tomllib.loads(path.read_text(encoding="utf-8"))) for path in sorted(LISTS.glob("*.toml"))]


def _room(name: str, content: Mapping[str, Any]) -> Room:
    unknown = content.keys() - {"preload", "environment", "tests", "mutation"}
    if unknown:
        raise ValueError(f"tools/mutations/{name}.toml: unknown: {', '.join(sorted(unknown))}")
    room = Room(name, tuple(content.get("preload", ())), tuple(content.get("environment", {}).items()))
    for entry in content["mutation"]:
        room.mutations.append(Mutation(**{"tests": content.get("tests", ""), "room": room, **entry}))
    return room
