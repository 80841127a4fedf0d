"""docs/gpu.json says what the streaming kernels' machine code is, and a divergence's loop leaves an H200 its bandwidth.

No GPU is needed: tools/machine_code.py compiles in a process of its own.
"""

from __future__ import annotations

import importlib.util
import json
from types import ModuleType
from typing import Any

import pytest
from checkout import ROOT
from cuda_compilers import nvrtc_library

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]
AGAIN = ("log-probs, bf16", "reverse KL, bf16", "PPO", "whitening, statistics")


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("machine_code", ROOT / "tools" / "machine_code.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def known(tool: ModuleType) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(tool.FIGURES.read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def lines(tool: ModuleType) -> dict[str, dict[str, Any]]:
    return {line["case"]: line for line in tool.compiled(["90"], AGAIN)}


def test_the_file_says_what_is_compiled(lines: dict[str, dict[str, Any]], known: dict[str, Any]) -> None:
    """To the instruction, with the Triton that it was written with; another one's compiler may differ by some."""
    import triton

    slack = 0.0 if triton.__version__ == known["triton"] else 0.2
    assert set(lines) == set(AGAIN)
    for name, line in lines.items():
        expected = known["kernels"][name]["90"]
        assert line["warps"] == expected["warps"]
        assert line["registers"] == pytest.approx(expected["registers"], rel=slack, abs=0)
        for got, want in zip(line["passes"], expected["passes"], strict=True):
            assert got == pytest.approx(want, rel=slack, abs=0), f"{name}: run `python tools/machine_code.py`"


def test_a_divergence_has_at_most_12_instructions_per_column(lines: dict[str, dict[str, Any]]) -> None:
    """Of one side's logits, in the loop that reads both: an H200 has room for 12.4 at its full bandwidth in bf16."""
    (loop,) = lines["reverse KL, bf16"]["passes"]
    columns = loop["loaded"] // 2
    assert columns == 32
    assert loop["instructions"] <= 12 * columns
    assert loop["mufu"] <= columns + 2


def test_a_cuda_kernel_is_what_the_file_says(tool: ModuleType, known: dict[str, Any]) -> None:
    """To a fifth, as another NVRTC compiles otherwise."""
    if nvrtc_library() is None:
        pytest.skip("libnvrtc is not here: pip install nvidia-cuda-nvrtc")
    (line,) = tool.compiled(["90"], ["GSPO"], "cuda")
    expected = known["cuda"][line["case"]]["90"]
    assert line["registers"] == pytest.approx(expected["registers"], rel=0.2)
    for got, want in zip(line["passes"], expected["passes"], strict=True):
        assert got == pytest.approx(want, rel=0.2)


@pytest.mark.parametrize("table", ["kernels", "cuda"])
def test_every_case_is_in_the_file(table: str, tool: ModuleType, known: dict[str, Any]) -> None:
    source = tool.PROGRAMS[table].read_text(encoding="utf-8")
    assert all(f'        "{name}": Case(' in source for name in known[table])
    assert source.count(": Case(") == len(known[table])
    for by_sm in known[table].values():
        assert sorted(by_sm) == ["100", "80", "90"]


def test_bytes_are_those_of_the_instruction() -> None:
    """Not of the address behind it, which is a pair of registers."""
    from compiled import work

    lines = [f"  /*00{k}0*/  {text} ;" for k, text in enumerate((
        "LDG.E R2, desc[UR6][R28.64+0x400]",
        "@P1 LDG.E.128.CONSTANT R4, desc[UR6][R28.64]",
        "LDG.E.U8 R9, desc[UR6][R28.64]",
        "STG.E.64 desc[UR6][R28.64], R2",
        "MUFU.LG2 R3, R2",
    ))]  # fmt: skip
    assert work(lines) == {"instructions": 5, "mufu": 1, "loaded": 21, "stored": 8}


def test_the_way_through_a_loop_is_that_of_whole_vectors() -> None:
    """Either 16 bytes at once or one by one; an exponential, or none where a token does not count."""
    from compiled_cuda_streams import ways

    code = """.L_x_1:
        /*0000*/ @P0 BRA `(.L_x_2) ;
        /*0010*/ LDG.E.128 R4, desc[UR6][R28.64] ;
        /*0020*/ BRA `(.L_x_3) ;
    .L_x_2:
        /*0030*/ LDG.E.64 R4, desc[UR6][R28.64] ;
        /*0040*/ LDG.E.64 R6, desc[UR6][R28.64+0x8] ;
    .L_x_3:
        /*0050*/ BSSY B0, `(.L_x_5) ;
        /*0060*/ @!P1 BRA `(.L_x_4) ;
        /*0070*/ MUFU.EX2 R4, R4 ;
    .L_x_4:
        /*0080*/ BSYNC B0 ;
    .L_x_5:
        /*0090*/ @P2 BRA `(.L_x_1) ;"""
    assert ways(code.splitlines(), 1) == {(16, 0, 0): 7, (16, 0, 1): 8}


def test_shares_are_the_least_of_three_limits(tool: ModuleType) -> None:
    gpu = tool.Gpu("one", 90, 100, 1.0, 1.28)  # room for 10 instructions a byte; 8,960 bytes in flight
    kernel = {"registers": 64, "warps": 8}  # four programs
    assert gpu.room == pytest.approx(10.0)
    assert tool.programs_per_sm(kernel) == 4
    loop = {"instructions": 100, "mufu": 0, "loaded": 16, "stored": 0}
    assert tool.share(gpu, kernel, loop) == 1.0
    assert tool.share(gpu, kernel, {**loop, "instructions": 320}) == pytest.approx(0.5)
    assert tool.share(gpu, kernel, {**loop, "mufu": 40}) == pytest.approx(0.5)
    few = {"registers": 255, "warps": 8}  # one
    assert tool.share(gpu, few, {**loop, "loaded": 2, "stored": 14}) == pytest.approx(512 / 8960)
