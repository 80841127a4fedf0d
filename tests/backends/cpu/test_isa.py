"""Every instruction set gives right numbers, not only this machine's best: the CPU tests again on the lower ones."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from checkout import ROOT
from instruction_sets import in_use

LOWER = ("baseline", "avx2", "avx512")


@pytest.mark.parametrize("isa", LOWER[:2])
def test_numbers_on_lower_instruction_sets(isa: str) -> None:
    if in_use(isa) != isa:
        pytest.skip(f"this machine has no {isa}")
    names = ("logprobs", "policy_loss", "preference_loss", "logits_policy_loss", "group", "whiten", "returns")
    files = [f"operations/test_{name}.py" for name in names] + ["prefix_tree/test_drawn_by_hand.py"]
    paths = [str(ROOT / "tests" / file) for file in files]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "cpu and (Numbers or numbers)"]
    environment = {**os.environ, "FASTREWARD_ISA": isa}
    done = subprocess.run([*command, *paths], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]


def test_the_best_instruction_set_is_chosen_and_nonsense_ignored() -> None:
    assert in_use("nonsense") == in_use("avx512")
    assert in_use("baseline") == "baseline"
