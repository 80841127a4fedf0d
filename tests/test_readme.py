"""The README's ten lines run as written."""

from __future__ import annotations

import re
from pathlib import Path

import torch

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_ten_lines_run_as_written() -> None:
    (example,) = [block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "policy_loss" in block]
    names: dict[str, object] = {}
    exec(example, names)
    logits = names["logits"]
    assert isinstance(logits, torch.Tensor)
    assert logits.grad is not None
    assert logits.grad.abs().sum() > 0
