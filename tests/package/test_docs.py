"""README.md and docs/: what is generated is fresh, links lead somewhere, and commands are those that there are."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest
from checkout import ROOT

import fastreward
from fastreward import bench, losses, recipes
from fastreward._runtime.layout import METRICS, PAIR_METRICS

PAGES = ("README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))))


def _read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.fixture
def docs(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import docs

    assert Path(docs.__file__ or "").parent == ROOT / "tools"
    return docs


def test_generated_parts_are_fresh(docs: ModuleType) -> None:
    assert not docs.stale(), f"{', '.join(docs.stale())}: run `{docs.COMMAND}`"


def test_what_is_stale_is_told_and_written(
    docs: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(docs, "ROOT", tmp_path)
    monkeypatch.setattr(docs, "PARTS", {"page.md": {"part": lambda: "new"}})
    page = tmp_path / "page.md"
    page.write_text("by hand\n<!-- part -->\nold\n<!-- /part -->\nby hand\n")
    assert docs.main(["--check"]) == 1
    assert "old" in page.read_text()
    assert docs.main([]) == 0
    assert page.read_text() == "by hand\n<!-- part -->\nnew\n<!-- /part -->\nby hand\n"
    assert docs.main(["--check"]) == 0
    assert capsys.readouterr().out == "page.md: stale\npage.md: written\n"
    page.write_text("no such part\n")
    with pytest.raises(ValueError, match=r"page\.md: expected one <!-- part -->"):
        docs.stale()


def test_the_readme_is_short() -> None:
    assert len(_read("README.md").splitlines()) < 150


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", _read(page)):
        name, _, anchor = target.partition("#")
        linked = (ROOT / page).parent / name if name else ROOT / page
        assert linked.exists(), f"{page}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)", linked.read_text(encoding="utf-8"), re.M)
            assert anchor in {heading.lower().replace(" ", "-") for heading in headings}, f"{page}: {target}"


def test_commands_of_the_figures_are_those_of_the_benchmark() -> None:
    commands = re.findall(r"`(\w+) --case (\S+)(?: --dtype (\w+))?`", _read("README.md"))
    assert len(commands) >= 10
    for operation, case, dtype in commands:
        module = bench.operation(operation)
        assert case in module.CASES
        assert dtype in (*module.DTYPES, "")


def test_figures_to_come_are_cases_of_the_benchmark(docs: ModuleType) -> None:
    for _, operation, case, dtype in docs.FIGURES:
        module = bench.operation(operation)
        assert case in module.CASES
        assert dtype in (*module.DTYPES, "int64")


def test_every_method_is_listed() -> None:
    page = _read("docs/methods.md")
    names = [name for name in losses.__all__ if isinstance(getattr(losses, name), losses.Definition)]
    assert not [name for name in names if f"| `{name}(" not in page]
    assert not [name for name in recipes.RECIPES if f"| `{name}` |" not in page]


def test_help_begins_with_what_is_there() -> None:
    assert not [name for name in fastreward.__all__ if not re.search(rf"\b{name}\b", fastreward.__doc__ or "")]
    names = [name for name in losses.__all__ if isinstance(getattr(losses, name), losses.Definition)]
    assert not [name for name in names if not re.search(rf"\b{name}\b", losses.__doc__ or "")]


def test_every_metric_is_described() -> None:
    page = _read("docs/losses.md")
    assert not [name for name in (*METRICS, *PAIR_METRICS) if f"`{name}`" not in page]
