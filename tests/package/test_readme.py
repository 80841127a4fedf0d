"""The README's code runs as written."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch
from checkout import ROOT

import fastreward as fr
from fastreward.bench.cases import policy_loss as bench

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def test_the_first_lines_name_what_is_in_scope() -> None:
    """Calls in the comment too."""
    first = BLOCKS[0]
    names: dict[str, object] = {}
    exec("\n".join(line for line in first.splitlines() if line.startswith("import ")), names)
    calls = re.findall(r"(?<![\w.])[a-z_]+(?:\.[a-z_]+)+(?=\(\))", first)
    assert {"fastreward.patch.trl", "fastreward.patch.undo"} == set(calls)
    for call in calls:
        assert callable(eval(call, names)), call


def test_the_ten_lines_run_as_written() -> None:
    (example,) = [block for block in BLOCKS if "fr.group_advantages" in block]
    names: dict[str, object] = {}
    exec(example, names)
    logits = names["logits"]
    assert isinstance(logits, torch.Tensor)
    assert logits.grad is not None
    assert logits.grad.abs().sum() > 0


def test_the_prefix_tree_runs_as_written(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = [block for block in BLOCKS if "PrefixTree" in block]
    names: dict[str, object] = {}
    exec(example, names)
    packed, tree = names["packed"], names["tree"]
    assert isinstance(tree, fr.PrefixTree)
    assert f"{len(packed)} instead of {packed.tokens}" in example  # type: ignore[arg-type, attr-defined]
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
