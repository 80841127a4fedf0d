"""`fastreward plot credit`: schemes on rollouts, the picture, the page and the gallery."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from checkout import ROOT
from credit_pages import content
from typer.testing import CliRunner

import fastreward as fr
from fastreward import recipes
from fastreward._arguments import check
from fastreward.cli import app
from fastreward.credit_plot import gallery, picture, schemes
from fastreward.prefix_tree import rollouts
from fastreward.recipes import RECIPES
from fastreward.recipes._catalogue.example import outcome, responses

_RECORDS = [
    {"tokens": [1, 2, 3, 4], "reward": 1.0, "group": "a", "mask": [0, 1, 1, 1]},
    {"tokens": [5, 6, 7], "reward": 0.5, "group": "b", "mask": [1, 1, 1]},
    {"tokens": [1, 2, 8], "reward": 0.0, "group": "a", "mask": [0, 1, 1]},
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rollouts.json"
    path.write_text(json.dumps(_RECORDS))
    return path


def _run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, ["plot", "credit", *map(str, arguments)])


def _refusal(result: Any) -> str:
    assert result.exit_code == 2, result.output
    return re.sub(r"[\s│]+", " ", re.sub(r"[╭╰╮╯─]", "", result.output))


# ----------------------------------------------------------------------------------------------------------- schemes
def test_every_scheme_is_on_the_example() -> None:
    drawn, missing = schemes.on_example()
    found = {scheme.name: scheme.advantages for scheme in drawn}
    kinds = ("advantages", "response advantages", "token rewards", "node values")
    assert {*found, *missing} == {"group_advantages", *(name for name, r in RECIPES.items() if r.returns in kinds)}
    own = responses()
    expected = recipes.tempo(own["tokens"], own["mask"], own["rewards"], group_ids=own["group_ids"])[:2]
    assert torch.equal(found["tempo"], expected)
    assert all(x.shape == (2, 6) and x.dtype == torch.float32 for x in found.values())
    assert not any(x[1, 4:].any() for x in found.values())  # behind the second rollout's end


def test_rewards_of_the_two() -> None:
    found = schemes.rewards_on_example()
    assert found
    assert all(RECIPES[name].returns == "rewards" and len(two) == 2 for name, two in found.items())


def test_an_example_leaves_the_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    outcome(RECIPES["spo_tree"].example(), "advantages")
    assert torch.equal(torch.get_rng_state(), before)


def test_schemes_on_a_file(file: Path) -> None:
    table = rollouts.read(file)
    found, missing = schemes.on_rollouts(table)
    advantages = {scheme.name: scheme.advantages for scheme in found}
    assert missing["slate"] == "needs step_rewards"
    assert not set(advantages) & set(missing)
    own = fr.group_advantages(table.rewards.float(), table.groups)
    assert table.mask is not None
    assert torch.equal(advantages["group_advantages"], torch.where(table.mask, own[:, None], 0.0))
    expected = recipes.tempo(table.tokens, table.mask, table.rewards, group_ids=table.groups)
    assert torch.equal(advantages["tempo"], expected)
    own = recipes.grpo(table.rewards.float(), group_ids=table.groups)
    assert torch.equal(advantages["grpo"], torch.where(table.mask, own[:, None], 0.0))
    assert {"opo", "reinforce_plus_plus_baseline"} <= set(advantages)
    with pytest.raises(ValueError, match="slate: needs step_rewards"):
        schemes.on_rollouts(table, ["tempo", "slate"])


# ------------------------------------------------------------------------------------------------------- the command
def test_without_a_file_it_draws_the_two_built_in_rollouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = _run("--scheme", "tempo", "--scheme", "group_advantages")
    assert result.exit_code == 0, result.output
    assert Path("credit.png").read_bytes().startswith(b"\x89PNG")
    data = content(Path("credit.html").read_text(encoding="ascii"))
    assert [x["name"] for x in data["values"]] == ["group_advantages", "tempo"]
    words = [data["vocabulary"]["texts"][k] for k in data["tokens"]]
    assert "".join(words) == "17 × 6 = 60 + 42 = 102 17 × 6 is 108 "
    assert "2 schemes: group_advantages, tempo" in result.output
    assert "The picture of sequences 0, 1 is in credit.png" in result.output


def test_a_file(file: Path, tmp_path: Path) -> None:
    page, svg = tmp_path / "c.html", tmp_path / "c.svg"
    result = _run(file, "--out", page, "--out", svg, "--group", "b", "--rollouts", "1")
    assert result.exit_code == 0, result.output
    data = content(page.read_text(encoding="ascii"))
    assert data["groups"]["names"] == ["a", "b"]
    assert data["counted"].tolist() == [0, 1, 1, 1, 1, 1, 1, 0, 1, 1]
    assert data["tree"] is not None
    assert "The picture of sequences 1 is in" in result.output
    assert "others are not there" in result.output
    assert svg.read_text(encoding="utf-8").startswith("<?xml")


def test_what_else_a_file_has(tmp_path: Path) -> None:
    """Log-probs and entropies are in the page, the ratio too, and reach the recipes that take them."""
    numbers = {"logprobs": [-1.0, -2.0], "old_logprobs": [-1.5, -2.0], "entropy": [0.5, 1.0]}
    records = [
        {"tokens": [1, 2], "reward": 1.0, **numbers},
        {"tokens": [1], "reward": 0.0, **{k: [-1] for k in numbers}},
    ]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, records)))
    table = rollouts.read(tmp_path / "r.jsonl")
    assert table.numbers["old_logprobs"].tolist() == [[-1.5, -2.0], [-1.0, 0.0]]
    found, _ = schemes.on_rollouts(table, ["spo_tree"])
    own = recipes.spo_tree(table.tree(), table.rewards, old_logprobs=table.numbers["old_logprobs"])
    assert torch.allclose(found[0].advantages, own)
    assert _run(tmp_path / "r.jsonl", "--scheme", "group_advantages", "--out", tmp_path / "r.html").exit_code == 0
    values = {x["name"]: x for x in content((tmp_path / "r.html").read_text(encoding="ascii"))["values"]}
    assert list(values) == ["group_advantages", "logprobs", "ratio", "entropy", "old_logprobs"]
    assert [x["scale"] for x in values.values()] == ["diverging", "low", "ratio", "high", "low"]
    assert values["ratio"]["numbers"].tolist() == pytest.approx([1.6487, 1, 1], rel=1e-4)


def test_a_long_rollout_has_no_numbers(tmp_path: Path) -> None:
    """Hundreds of tokens are a strip, with positions below it."""
    table = rollouts.rollouts({"tokens": [list(range(300)), [0]], "rewards": [1.0, 0.0]})
    found, _ = schemes.on_rollouts(table, ["group_advantages"])
    picture.draw(tmp_path / "long.png", table, found, [0, 1])
    assert (tmp_path / "long.png").stat().st_size


@pytest.mark.parametrize(
    ("x", "text"),
    [(0.0, "0"), (-1e-8, "0"), (-0.0012, "-0.001"), (0.7071, "+0.71"), (-1.4, "-1.40"), (1234.5, "+1.23e+03")],
)
def test_short_numbers(x: float, text: str) -> None:
    assert picture.short(x) == text


def test_refused_options(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "c.html"
    assert "no scheme 'grop'; did you mean grpo" in _refusal(_run("--scheme", "grop", "--out", page))
    assert "expected one of group_advantages, tempo" in _refusal(_run("--scheme", "xyz", "--out", page))
    assert "group: expected one of a, b, got 'c'" in _refusal(_run(file, "--group", "c", "--out", page))
    assert "slate: needs step_rewards" in _refusal(_run(file, "--scheme", "slate", "--out", page))
    assert "ends in .png, .svg, .pdf" in _refusal(_run("--out", tmp_path / "c.gif"))
    assert "takes no rollouts" in _refusal(_run(file, "--gallery", tmp_path / "credit.md"))
    assert "ends in .md" in _refusal(_run("--gallery", tmp_path / "credit.html"))
    file.write_text("[]")
    assert "no sequences to draw" in _refusal(_run(file, "--out", page))
    monkeypatch.setattr(check.importlib.util, "find_spec", lambda name: None)
    assert "pip install matplotlib" in _refusal(_run("--out", page, "--out", tmp_path / "c.png"))
    assert not page.exists()


# ------------------------------------------------------------------------------------------------------- the gallery
def test_the_gallery_is_fresh() -> None:
    """Of the text and, as what matplotlib draws differs between its versions, of what the picture was drawn for."""
    text = gallery.page()
    assert (ROOT / "docs" / "credit.md").read_text(encoding="utf-8") == text, f"run `{gallery.COMMAND}`"
    assert gallery.digest(text).encode() in (ROOT / "docs" / "credit.png").read_bytes(), f"run `{gallery.COMMAND}`"


def test_the_gallery_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schemes, "_wanted", lambda name, _: name in ("group_advantages", "tempo"))
    assert _run("--gallery", tmp_path / "g.md").exit_code == 0
    text = (tmp_path / "g.md").read_text(encoding="utf-8")
    assert "![advantages of two rollouts under each scheme](g.png)" in text
    assert "| `tempo` | +0.71 | +0.71 | +1.41 | +0.71 | +0.71 | +0.71 | | -0.71 | -0.71 | -1.41 | -0.71 |" in text
    assert gallery.digest(text).encode() in (tmp_path / "g.png").read_bytes()
