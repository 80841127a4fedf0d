"""csrc/cuda/divergence.cuh with generated programs, emulated on the CPU, against the float64 reference."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path
from typing import Any

import divergence_checks as checks
import pytest
import torch
from emulation import Emulator

from fastreward.cuda import divergence

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("g++") is None or platform.machine() != "x86_64" or platform.system() != "Linux",
        reason="the emulation needs g++ on x86-64 Linux",
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("emulation")


@pytest.fixture(autouse=True)
def _emulated(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def poisoned(*shape: Any, **options: Any) -> torch.Tensor:
        return empty(*shape, **options).fill_(torch.nan)

    monkeypatch.setattr(divergence, "launch_text", Emulator(folder).launch_text)
    monkeypatch.setattr(torch, "empty", poisoned)  # what nobody has written is seen


@pytest.mark.parametrize("name", ["reverse_kl", "jsd"])
def test_rows_of_every_kind(name: str) -> None:
    """One divergence of moments, one of two reads; of the flavours of a kernel, each of which is compiled, few."""
    dtypes = (torch.float32, torch.bfloat16) if name == "jsd" else (torch.float16, torch.float16)
    for k, kind in enumerate(checks.KINDS):
        case = checks.make_case(name, kind, dtypes, 3, 9000 if kind == "empty_block" else 1003)
        checks.check_forward(divergence, "cpu", case, statistics=True)
        checks.check_backward(divergence, "cpu", case, in_place=k % 3 == 0)


def test_every_moment() -> None:
    case = checks.make_case("jeffreys", "infinities", (torch.float32, torch.bfloat16), 4, 4100)
    checks.check_forward(divergence, "cpu", case, statistics=False)


def test_sizes_slices_and_bits() -> None:
    single = (torch.float32, torch.float32)
    for vocab in (1, 3, 8, 4097):
        checks.check_forward(
            divergence, "cpu", checks.make_case("reverse_kl", "plain", single, 2, vocab), statistics=True
        )
    checks.check_slices(divergence, "cpu", checks.make_case("jsd", "masked", single, 4, 5000), 1700)
    checks.check_bits(divergence, "cpu", checks.make_case("reverse_kl", "infinities", single, 4, 5000))
