"""tools/check.py: which tests a changed file selects, and what happens when the time is over."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from checkout import ROOT


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import check

    return check


@pytest.mark.parametrize(
    ("changed", "tests"),
    [
        ("fastreward/whiten.py", {"operations/test_whiten.py", "backends/triton/interpreted/test_whiten.py"}),
        ("csrc/cpu/whiten.cpp", {"operations/test_whiten.py", "backends/triton/interpreted/test_whiten.py"}),
        ("csrc/cpu/mask.cpp", {"backends/cpu/test_masks.py"}),
        ("fastreward/divergences/__init__.py", {"operations/test_divergence.py"}),
        ("kernels/whiten.py", {"operations/test_whiten.py", "backends/triton/interpreted/test_whiten.py"}),
        ("csrc/bindings/register_whiten.cpp", {"operations/test_whiten.py"}),
        ("csrc/cpu/logprobs/backward.cpp", {"operations/test_logprobs.py", "operations/test_linear_logprobs.py"}),
        ("kernels/prefix_tree/values.py", {"prefix_tree/test_values.py", "prefix_tree/test_fuzz.py"}),
        ("kernels/prefix_tree/tokens.py", {"prefix_tree/test_drawn_by_hand.py"}),
        ("csrc/cpu/program/scans.cpp", {"backends/cpu/test_program.py", "losses/test_scans.py"}),
        ("fastreward/prefix_tree/plot.py", {"prefix_tree/test_views.py", "package/test_cli_plot.py"}),
        ("fastreward/_loss_call/call.py", {"operations/test_policy_loss.py", "recipes/test_policy.py"}),
        ("fastreward/_loss_call/divergence.py", {"operations/test_divergence.py", "recipes/test_divergence_losses.py"}),
        ("fastreward/_arguments/check.py", {"operations/test_arrays.py"}),
        ("fastreward/language/define.py", {"losses/test_policy.py", "backends/cpu/test_program.py"}),
        ("fastreward/recipes/policy.py", {"recipes/test_policy.py"}),
        ("fastreward/losses/token.py", {"losses/test_policy.py", "losses/test_fuzz.py"}),
        ("fastreward/patch/trl/apply.py", {"peers/test_patch_trl.py"}),
        ("tests/losses/test_ties.py", {"losses/test_ties.py"}),
        ("tests/support/program_checks.py", {"backends/cpu/test_program.py"}),
        ("tests/support/emulation/emulate.hpp", {"backends/cuda/test_emulated.py"}),
    ],
)
def test_a_changed_file_selects_its_tests(check: ModuleType, changed: str, tests: set[str]) -> None:
    assert {f"tests/{test}" for test in tests} <= set(check.selected(changed))


def test_nothing_more_than_its_room(check: ModuleType) -> None:
    assert check.selected("fastreward/recipes/policy.py") == ["tests/recipes/test_policy.py"]
    assert check.selected("LICENSE") == []


def test_every_folder_of_the_code_selects_something(check: ModuleType) -> None:
    code = [*(ROOT / "fastreward").rglob("*.py"), *(ROOT / "kernels").rglob("*.py"), *(ROOT / "csrc").rglob("*.?pp")]
    assert not [path for path in code if not check.selected(str(path.relative_to(ROOT)))]


def test_the_tables_name_tests_that_are_there(check: ModuleType) -> None:
    named = {name for names in (*check.ROOMS.values(), check.CORE) for name in names}
    assert not [name for name in named if not any(test.startswith(name) for test in check.test_files())]


def test_what_comes_too_late_is_skipped_and_counted(tmp_path: Path) -> None:
    (tmp_path / "test_late.py").write_text("def test_one(): assert False\n")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "check", "-p", "no:cacheprovider", str(tmp_path)],
        env={"PYTHONPATH": str(ROOT / "tools"), "CHECK_DEADLINE": "0"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "left out, no time left: 1 tests of test_late.py" in run.stdout
