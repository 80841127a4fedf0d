"""The programs in examples/ run, and show what they say."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from checkout import ROOT

EXAMPLES = ROOT / "examples"


@pytest.mark.slow
def test_tree_grpo() -> None:
    """Three steps: the packed log-probs are TRL's own, and tokens are saved, also in several forward passes."""
    pytest.importorskip("trl")
    small = ("--steps", "3", "--prompts", "2", "--generations", "4", "--warm-up", "20", "--max-tokens", "120")
    run = subprocess.run(
        [sys.executable, str(EXAMPLES / "tree_grpo.py"), *small],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = re.search(r"difference of a log-prob from TRL's own, first step: (\S+)", run.stdout)
    assert found is not None, run.stdout
    assert 0 < float(found[1]) < 5e-5
    saved = [int(share) for share in re.findall(r"(\d+)%", run.stdout)]
    assert len(saved) == 3
    assert min(saved) > 40
