"""`fastreward recipes`, through the command line."""

from __future__ import annotations

import re
from typing import Any

import pytest
from typer.testing import CliRunner

from fastreward.cli import app
from fastreward.recipes import RECIPES
from fastreward.recipes._catalogue.registry import FAMILIES, NOTATION, VERIFIED, by_returns

_RUNNER = CliRunner()


def _run(*arguments: str) -> Any:
    return _RUNNER.invoke(app, ["recipes", *arguments])


def test_lists_every_recipe_by_family() -> None:
    result = _run()
    assert result.exit_code == 0, result.output
    rows = {row[1].strip(): row for line in result.output.splitlines() if len(row := line.split("│")) == 6}
    for name, recipe in RECIPES.items():
        assert recipe.source.startswith(rows[name][3].strip())
        assert rows[name][4].strip() == VERIFIED[recipe.verified][0]
        assert recipe.summary.startswith(rows[name][2].strip())
    tables = [(heading, family) for heading, families in by_returns().items() for family in families]
    places = [result.output.index(f"{heading}: {FAMILIES[family]}") for heading, family in tables]
    assert places == sorted(places)
    for _, family in tables:
        assert NOTATION[family] in result.output


@pytest.mark.parametrize("name", RECIPES)
def test_explains_one(name: str) -> None:
    result, recipe = _run(name), RECIPES[name]
    assert result.exit_code == 0, result.output
    for text in (recipe.title, recipe.source, recipe.where, VERIFIED[recipe.verified][1], recipe.example()):
        assert text in result.output
    if recipe.url is not None:
        assert recipe.url in result.output
    for line in recipe.documentation.splitlines():
        assert line in result.output
    assert ("at the head of" in recipe.documentation) == ("segment_ids [B, T] in [-1, S)" in result.output)
    assert ("d/d " in result.output) == (recipe.definition is not None)


def test_the_printed_example_can_be_pasted(capsys: pytest.CaptureFixture[str]) -> None:
    program = _run("clip-cov").output.partition("\nExample\n")[2]
    names: dict[str, Any] = {}
    exec(program, names)
    assert names["logprobs"].grad.abs().sum() > 0
    assert capsys.readouterr().out


@pytest.mark.parametrize(
    ("written", "near"),
    [
        ("cisop", "cispo"),
        ("grop", "grpo"),
        ("dr-gpro", "dr_grpo"),
        ("tdpo", "tgdpo"),
        ("GSPO token!", "gspo_token"),
    ],
)
def test_suggests_the_nearest(written: str, near: str) -> None:
    result = _run(written)
    assert result.exit_code == 2
    assert "no recipe" in result.output
    assert near in re.sub(r"[\s│]+", " ", result.output)


@pytest.mark.parametrize(
    ("written", "there", "not_there"),
    [
        ("distillation", "sdpo_topk", "gspo"),
        ("2506.13585", "about that: cispo", "ppo,"),
        ("prefix trees", "tempo", "ppo,"),
    ],
)
def test_names_what_a_word_or_a_paper_is_about(written: str, there: str, not_there: str) -> None:
    result = _run(written)
    text = re.sub(r"[\s│]+", " ", result.output)
    assert result.exit_code == 2
    assert there in text
    assert not_there not in text


def test_a_name_like_no_other() -> None:
    result = _run("qqqqqqqq")
    assert result.exit_code == 2
    assert "lists all" in re.sub(r"[\s│]+", " ", result.output)


@pytest.mark.parametrize("written", ["W-REINFORCE", "gspo-token", "DeepSeek-V3.2", "Intellect 2"])
def test_names_may_be_written_as_in_the_papers(written: str) -> None:
    assert _run(written).exit_code == 0


def test_markdown() -> None:
    result = _run("--markdown")
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert lines[0].startswith("| recipe | formula |")
    titles = [
        f"| **{h}: {FAMILIES[family]}** | {NOTATION[family]} |" for h, of in by_returns().items() for family in of
    ]
    assert [line for line in lines if line.startswith("| **")] == [f"{title} | |" for title in titles]
    assert len(lines) == 2 + len(titles) + len(RECIPES)
    for line in lines:
        assert len(re.findall(r"(?<!\\)\|", line)) == 5, line
    for recipe in RECIPES.values():
        assert any(line.startswith(f"| `{recipe.name}` | ") for line in lines)


def test_markdown_takes_no_name() -> None:
    assert _run("dapo", "--markdown").exit_code == 2
