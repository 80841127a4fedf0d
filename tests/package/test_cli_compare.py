"""`fastreward compare`: table, JSON, picture, exit codes and refusals."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import fastreward as fr
from fastreward._arguments import check
from fastreward.cli import app

GENERATOR = torch.Generator().manual_seed(0)
LOGITS = 3 * torch.randn(4, 16, 12, generator=GENERATOR)


def _run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


def _text(result: Any) -> str:
    return re.sub(r"[\s│]+", " ", re.sub(r"[╭╰╮╯─]", "", result.output))


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    paths = tmp_path / "a.pt", tmp_path / "b.pt"
    torch.save({"logits": LOGITS / 0.7}, paths[0])
    torch.save({"logits": LOGITS}, paths[1])
    return paths


def test_a_fault(files: tuple[Path, Path]) -> None:
    result = _run(*files)
    assert result.exit_code == 1
    assert "likely fault: temperature" in result.stdout
    assert "KL(A || B), exact" in result.stdout


def test_none(files: tuple[Path, Path]) -> None:
    result = _run(*files, "--temperature-b", 0.7, "--tolerance", 1e-5)
    assert result.exit_code == 0, result.output
    assert "no fault found" in result.stdout


def test_json(files: tuple[Path, Path]) -> None:
    facts = json.loads(_run(*files, "--json").stdout)
    assert facts == json.loads(json.dumps(fr.compare(*files).to_dict()))
    facts = json.loads(_run(*files, "--json", "--per-token", "--top", 3).stdout)
    assert len(facts["per_token"]["kl_ab"]) == 64


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_a_picture(files: tuple[Path, Path], tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"plot{suffix}"
    assert _run(*files, "--plot", path).exit_code == 1
    assert path.stat().st_size > 5000
    for given in (torch.zeros(0, 3), torch.full((1, 2), -1.0), torch.tensor([[-1.0, -torch.inf]])):
        fr.compare(given, torch.full_like(given, -1.0)).plot(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--temperature-a", 0), "temperature_a: expected a positive number"),
        (("--key-a", "other"), "A: there is no 'other'; there are logits"),
        (("--per-token",), "--per-token: goes with --json"),
        (("--plot", "missing/plot.png"), "--plot: there is no folder missing"),
        (("--plot", "plot.txt"), "--plot: expected a file that ends in .png"),
    ],
)
def test_refusals(files: tuple[Path, Path], options: tuple[Any, ...], message: str) -> None:
    result = _run(*files, *options)
    assert result.exit_code == 2
    assert message in _text(result)


def test_a_file_that_is_not_there(files: tuple[Path, Path], tmp_path: Path) -> None:
    result = _run(files[0], tmp_path / "c.pt")
    assert result.exit_code == 2
    assert "No such file" in _text(result)


def test_a_picture_without_matplotlib(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise ModuleNotFoundError("pictures need matplotlib")

    monkeypatch.setattr(check, "require_matplotlib", missing)
    assert _run(*files, "--plot", tmp_path / "plot.png").exit_code == 2
