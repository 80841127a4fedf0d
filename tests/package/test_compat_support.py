"""`compat.largest`: what the equality tests of the patches compare with must itself notice a difference."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compat import largest


@dataclass
class Outputs:
    logprobs: torch.Tensor
    entropy: torch.Tensor | None


def test_the_largest_difference_of_a_structure_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rows"
    monkeypatch.setenv("FASTREWARD_COMPAT", str(file))
    ours = {"a": [torch.tensor([1.0, 4.25]), 2.0], "b": np.ones(3)}
    theirs = {"a": [torch.tensor([1.0, 4.0]), 2.125], "b": np.ones(3)}
    assert largest("slime.loss.f", ours, theirs, atol=0.5, version="624b824") == 0.0625
    assert largest("torch.f", torch.zeros(0), torch.zeros(0)) == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert rows[0] == {"trainer": "slime", "version": "624b824", "target": "slime.loss.f", "difference": 0.0625}
    assert rows[1]["version"] == torch.__version__


def test_nothing_is_written_where_nobody_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTREWARD_COMPAT", raising=False)
    monkeypatch.chdir(tmp_path)
    largest("not_installed.f", 1.0, 1.0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("ours", "theirs", "words"),
    [
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5]), r"at \[1\] 2, expected 2.5.*1 of 2 differ"),
        (torch.ones(2, 3), torch.ones(3, 2), r"shape \[2, 3\], expected \[3, 2\]"),
        (torch.ones(2, 1), torch.ones(2), "shape"),
        (math.nan, 0.0, "nan"),
        (0.0, math.nan, "nan"),
        (1e30, math.inf, "expected inf"),
        (-math.inf, math.inf, "expected inf"),
        ([1.0], [1.0, 2.0], "1 values, expected 2"),
        ({"a": 1.0}, {"b": 1.0}, r"names \['a'\], expected \['b'\]"),
        (None, 1.0, "None, expected 1.0"),
        (Outputs(torch.ones(1), None), Outputs(torch.ones(1), torch.ones(1)), "None"),
        ([], [], "nothing was compared"),
    ],
)
def test_a_difference_is_an_error(ours: Any, theirs: Any, words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        largest("trainer.f", ours, theirs)


@pytest.mark.parametrize("x", [math.nan, math.inf, -math.inf, None, 3, True, 1e300])
def test_the_same_is_no_difference(x: Any) -> None:
    assert largest("trainer.f", [x, 0.0], [x, 0.0]) == 0
    assert largest("trainer.f", Outputs(torch.ones(2), x), Outputs(torch.ones(2), x)) == 0


def test_the_tolerance_grows_with_their_value() -> None:
    assert largest("trainer.f", 1000.5, 1000.0, rtol=1e-3, atol=0) == 0.0005
    with pytest.raises(AssertionError):
        largest("trainer.f", 1001.5, 1000.0, rtol=1e-3, atol=0)
