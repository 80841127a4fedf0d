"""docs/compat.md is what `make compat` found, for the versions in constraints.txt and what the patches replace now."""

from __future__ import annotations

import importlib
import importlib.util
import re
import subprocess
import sys
from typing import Any

import pytest
from checkout import ROOT

TOOL = ROOT / "tools" / "compat"
REFRESH = "run `python tools/compat {}`"


@pytest.fixture(scope="module")
def tool() -> Any:
    """The modules of tools/compat, which import each other by their names."""
    sys.path.insert(0, str(TOOL))
    try:
        yield {name: importlib.import_module(name) for name in ("rows", "page", "run", "survey", "environments")}
    finally:
        sys.path.remove(str(TOOL))
        for name in ("rows", "page", "run", "survey", "environments"):
            sys.modules.pop(name, None)


def pinned(package: str) -> str:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    (version,) = re.findall(rf"^{package}==(\S+)$", text, re.MULTILINE)
    return version


def test_the_page_shows_the_results(tool: Any) -> None:
    page = tool["page"]
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.rendered(text, page.read()) == text, "run `python tools/compat --page`"


@pytest.mark.parametrize("trainer", ["trl", "verl", "openrlhf"])
def test_every_claimed_version_has_been_tried(tool: Any, trainer: str) -> None:
    versions = tool["rows"].TRAINERS[trainer]
    assert versions[-1] == pinned(trainer)
    for version in versions:
        outcome = tool["page"].read().get(f"{trainer}-{version}", {}).get("outcome", {})
        assert outcome.get("passed"), REFRESH.format(f"{trainer}-{version}")
        assert set(outcome) <= {"passed", "skipped"}, REFRESH.format(f"{trainer}-{version}")


def test_the_readme_claims_those_versions(tool: Any) -> None:
    """A series, a span of series, or one version."""
    text, versions = (ROOT / "README.md").read_text(encoding="utf-8"), tool["rows"].TRAINERS
    claims = {
        name: re.findall(rf"^\| {name} ([\d.]+)(?: to ([\d.]+))? \|", text, re.M)
        for name in ("TRL", "verl", "OpenRLHF")
    }
    for name, ((first, last),) in claims.items():
        tried = versions[name.lower()]
        assert f"{tried[0]}.".startswith(f"{first}."), name
        assert f"{tried[-1]}.".startswith(f"{last or first}."), name


@pytest.mark.parametrize("trainer", ["slime", "prime-rl"])
def test_the_functions_found_by_path_have_been_tried(tool: Any, trainer: str) -> None:
    result = tool["page"].read()[f"{trainer}-{tool['rows'].COMMITS[trainer]}"]
    assert {name: row[:2] for name, row in result["functions"].items()} == tool["survey"].survey(trainer)["functions"]
    assert all(row[2] is not None for row in result["functions"].values())
    assert set(result["outcome"]) <= {"passed", "skipped"}


@pytest.mark.parametrize("trainer", ["verl", "openrlhf"])
def test_every_function_that_a_patch_replaces_is_on_the_page(tool: Any, trainer: str) -> None:
    result = tool["page"].read()[f"{trainer}-{pinned(trainer)}"]
    rows = tool["survey"].replacements(trainer)
    left = {entry[0] for entry in result["kept"]}
    assert set(result["functions"]) == set(rows) - left, REFRESH.format(trainer)
    for target, (served, convention, _) in result["functions"].items():
        assert [served, convention] == [rows[target].what, tool["survey"].convention(rows[target])], REFRESH.format(
            trainer
        )


def test_every_function_that_the_patch_of_trl_replaces_is_on_the_page(tool: Any) -> None:
    if importlib.util.find_spec("trl") is None:
        pytest.skip("no TRL")
    done = subprocess.run([sys.executable, TOOL / "survey.py", "trl"], capture_output=True, text=True, check=True)
    found = __import__("json").loads(done.stdout.strip().rpartition("\n")[2])["functions"]
    known = {name: row[:2] for name, row in tool["page"].read()[f"trl-{pinned('trl')}"]["functions"].items()}
    assert known == found, REFRESH.format("trl")


#: How pyproject.toml claims the oldest version of each.
CLAIMS = {"torch": r'"torch>=([\d.]+)"', "triton": r'"triton>=([\d.]+)', "python": r'requires-python = ">=([\d.]+)"'}


@pytest.mark.parametrize("kind", CLAIMS)
def test_what_is_claimed_has_been_tried(tool: Any, kind: str) -> None:
    (oldest,) = re.findall(CLAIMS[kind], (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    rows = {row.version: tool["page"].read().get(row.name, {}) for row in tool["rows"].rows() if row.kind == kind}
    tried = {version: result["outcome"] for version, result in rows.items() if "outcome" in result}
    assert any(f"{version}.".startswith(f"{oldest}.") for version in tried), f"{oldest}: {REFRESH.format(kind)}"
    assert all(outcome.get("passed") and not {"failed", "error"} & set(outcome) for outcome in tried.values())
    assert kind != "torch" or pinned("torch") in tried


# ------------------------------------------------------------------------------------------------------------ the tool
def test_rows_have_tests_and_their_names_are_their_own(tool: Any) -> None:
    rows = tool["rows"].rows()
    assert len({row.name for row in rows}) == len(rows)
    for row in rows:
        for pattern in row.tests:
            assert list(ROOT.glob(pattern)), f"{row.name}: {pattern}"


def test_a_version_that_is_nowhere_is_said_to_be_not_run(tool: Any) -> None:
    row = tool["rows"].Row("python", "3.99", ())
    assert tool["run"].run(row) == {"not_run": "no Python 3.99 on the machine of this run"}


def test_a_stale_page_is_noticed(tool: Any) -> None:
    page = tool["page"]
    text, results = page.PAGE.read_text(encoding="utf-8"), page.read()
    results["slime-00c2d6d"]["functions"]["slime.loss"][2] = 0.25
    assert "| 2e-1 |" in page.rendered(text, results)
    with pytest.raises(ValueError, match="<!-- trl -->"):
        page.rendered(text.replace("<!-- trl -->", ""), results)
