"""The code of the README and of docs/ runs as written."""

from __future__ import annotations

import importlib
import re
import runpy
from pathlib import Path

import pytest
import torch
from checkout import ROOT

import fastreward as fr
from fastreward.bench.cases import policy_loss as bench


def _blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)


BLOCKS = _blocks("README.md")
#: Every program of README and docs/, by page and number.
PROGRAMS = {
    f"{page} {i}": block
    for page in ("README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))))
    for i, block in enumerate(_blocks(page))
}


def test_the_first_lines_name_what_is_in_scope() -> None:
    """Calls in the comment too."""
    first = BLOCKS[0]
    names: dict[str, object] = {}
    exec("\n".join(line for line in first.splitlines() if line.startswith("import ")), names)
    calls = re.findall(r"(?<![\w.])[a-z_]+(?:\.[a-z_]+)+(?=\(\))", first)
    assert {"fastreward.patch.trl", "fastreward.patch.undo"} == set(calls)
    for call in calls:
        assert callable(eval(call, names)), call


@pytest.mark.parametrize("program", [name for name in PROGRAMS if name != "README.md 0"])
def test_programs_run_as_written(program: str, tmp_path: Path) -> None:
    """From a file, as a user runs them: a loss is traced from its source."""
    path = tmp_path / "program.py"
    path.write_text(PROGRAMS[program])
    assert runpy.run_path(str(path))


def test_the_training_step_runs_as_written() -> None:
    (example,) = [block for block in BLOCKS if "fr.token_logprobs" in block]
    names: dict[str, object] = {}
    exec(example, names)
    model = names["model"]
    assert isinstance(model, torch.nn.Module)
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0


def test_the_prefix_tree_runs_as_written(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = [block for block in _blocks("docs/trees.md") if "PrefixTree" in block]
    (short,) = [block for block in BLOCKS if "PrefixTree" in block]
    names: dict[str, object] = {}
    exec(example, names)
    packed, tree = names["packed"], names["tree"]
    assert isinstance(tree, fr.PrefixTree)
    count = f"{len(packed)} instead of {packed.tokens}"  # type: ignore[arg-type, attr-defined]
    assert count in example
    assert count in short
    assert names["embedding"].weight.grad.abs().sum() > 0  # type: ignore[attr-defined]
    assert capsys.readouterr().out.strip() == str(tree).strip()


def test_the_loss_of_ones_own_runs_as_written_and_is_the_benchs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (example,) = [block for block in BLOCKS if "losses.define" in block]
    (tmp_path / "own_loss.py").write_text(example)
    monkeypatch.syspath_prepend(tmp_path)
    own = importlib.import_module("own_loss")
    assert "d/d logprob" in capsys.readouterr().out
    g = torch.Generator().manual_seed(0)
    data = {name: torch.randn(3, 7, generator=g) for name in ("logprob", "old_logprob", "advantage")}
    torch.testing.assert_close(own.surprise().evaluate(**data), bench.surprise().evaluate(**data))
    logprobs = data["logprob"].requires_grad_()
    fr.policy_loss(logprobs, data["old_logprob"], data["advantage"], loss=own.surprise(cap=3.0)).loss.backward()
    assert logprobs.grad is not None
    assert logprobs.grad.abs().sum() > 0
