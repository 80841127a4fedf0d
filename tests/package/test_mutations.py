"""The list of tools/mutate.py: every entry still fits the code, and names tests that are there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from checkout import ROOT

TOOLS = ROOT / "tools"


@pytest.fixture
def rooms(monkeypatch: pytest.MonkeyPatch) -> list:  # type: ignore[type-arg]
    monkeypatch.syspath_prepend(str(TOOLS))
    from mutation_list import load

    assert Path(sys.modules["mutation_list"].__file__ or "").parent == TOOLS
    return load()


def test_entries_are_fresh(rooms: list) -> None:  # type: ignore[type-arg]
    stale = [f"{m.label}: {why}" for room in rooms for m in room.mutations if (why := m.stale())]
    assert not stale, "\n".join(stale)


def test_there_are_enough_of_them(rooms: list) -> None:  # type: ignore[type-arg]
    labels = [m.label for room in rooms for m in room.mutations]
    assert len(labels) == len(set(labels)) >= 150
    changes = {(m.file, m.before, m.after) for room in rooms for m in room.mutations}
    assert len(changes) == len(labels)


def test_reasons_are_given(rooms: list) -> None:  # type: ignore[type-arg]
    equivalent = [m for room in rooms for m in room.mutations if m.equivalent is not None]
    assert all(len(m.equivalent.split()) > 4 for m in equivalent)
