"""docs/methods.md has the table of methods that `fastreward recipes --markdown` prints."""

from __future__ import annotations

from checkout import ROOT

from fastreward.recipes._catalogue import show


def test_the_table_of_methods() -> None:
    text = (ROOT / "docs" / "methods.md").read_text()
    start, end = "<!-- recipes -->\n", "<!-- /recipes -->"
    assert text.count(start) == text.count(end) == 1
    table = text.partition(start)[2].partition(end)[0]
    assert table == show.markdown(), "run `python tools/docs.py`"
