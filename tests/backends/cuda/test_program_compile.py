"""Generated CUDA C++ of the loss language compiles for every architecture, under NVRTC, with no spills. Needs no GPU.

Compiling proves nothing about results: tests/backends/cuda/test_program_emulated.py does that on the CPU.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import divergence_checks
import program_checks as checks
import pytest
from checkout import CSRC
from cuda_compilers import ARCHITECTURES, cuobjdump, nvrtc_library

from fastreward import losses
from fastreward.cuda import _launch, logits_policy_loss
from fastreward.cuda.program.divergence_source import (
    Forward,
    LogitsType,
    forward_source,
    gradient_source,
    slice_source,
)
from fastreward.cuda.program.logits_source import Shape, logits_source
from fastreward.cuda.program.source import Source, source
from fastreward.language.divergence_programs import DivergencePrograms, register_programs, registered_programs

_USAGE = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)' for '(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?:[^\n]*?(?P<shared>\d+) bytes smem)?",
    re.DOTALL,
)


@dataclass(frozen=True)
class Usage:
    kernel: str
    registers: int
    stack: int
    spilled: int
    shared: int


@cache
def nvrtc() -> ctypes.CDLL:
    found = nvrtc_library()
    if found is None:
        pytest.skip("libnvrtc is not here: pip install nvidia-cuda-nvrtc")
    return found


def compiled(text: str, architecture: str, cubin: Path | None = None) -> list[Usage]:
    """What ptxas says of each kernel of the text that CuPy would get; the machine code goes to `cubin`."""
    lib, program = nvrtc(), ctypes.c_void_p()
    options = [*_launch.NVRTC_OPTIONS, f"--gpu-architecture=sm_{architecture}", "--ptxas-options=-v"]
    options.append("--diag-suppress=177")  # constants of a shared header that this text has no use for
    encoded = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
    whole = _launch.whole_text(text).encode()
    assert lib.nvrtcCreateProgram(ctypes.byref(program), whole, b"generated.cu", 0, None, None) == 0
    status = lib.nvrtcCompileProgram(program, len(options), encoded)
    size = ctypes.c_size_t()
    lib.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    lib.nvrtcGetProgramLog(program, log)
    words = log.value.decode()
    assert status == 0, words
    if cubin is not None:
        lib.nvrtcGetCUBINSize(program, ctypes.byref(size))
        code = ctypes.create_string_buffer(size.value)
        lib.nvrtcGetCUBIN(program, code)
        cubin.write_bytes(code.raw)
    lib.nvrtcDestroyProgram(ctypes.byref(program))
    assert "warning" not in words, words
    return [
        Usage(
            m["kernel"], int(m["registers"]), int(m["stack"]), int(m["stores"]) + int(m["loads"]), int(m["shared"] or 0)
        )
        for m in _USAGE.finditer(words)
    ]


def gradient_text(shape: Shape, entropy: bool) -> str:
    gradient = checks.logits_gradient(losses.ppo(), entropy=entropy, aggregation="token-mean")
    return logits_source(Source(gradient.program), gradient.gradients, gradient.entropy, shape)


_HALF: Final[tuple[LogitsType, LogitsType]] = ("BF16", "BF16")
_ALL: Final = (True,) * 6


def programs(name: str) -> DivergencePrograms:
    return registered_programs(register_programs(divergence_checks.DIVERGENCES[name]))


def _wanted(by_moments: bool) -> Forward:
    return Forward(by_moments, False, False, False, False, by_moments)


def program_text(name: str) -> Callable[[], str]:
    return lambda: source(checks.PROGRAMS[name]().program)


def texts() -> Iterator[tuple[str, Callable[[], str]]]:
    for name in ("ppo", "gspo", "sapo", "real", "dpo", "fipo"):
        yield name, program_text(name)
    yield "backward", lambda: '#include "cuda/program_backward.cuh"\n'
    yield "rescale", lambda: '#include "cuda/logits_rescale.cuh"\n'
    yield "divergence, bf16", lambda: forward_source(programs("reverse_kl").values[1], *_HALF, _wanted(True))
    yield (
        "divergence, bf16, all outputs",
        lambda: forward_source(programs("jeffreys").values[2], *_HALF, Forward(*_ALL)),
    )
    yield "divergence, f32, two reads", lambda: forward_source(programs("jsd").values[1], "F32", "F32", _wanted(False))
    yield "divergence of a slice, f16", lambda: slice_source(programs("jsd").values[2], "F16", "F16")
    yield "divergence, gradient, bf16", lambda: gradient_source(programs("reverse_kl").student, *_HALF, "BF16")
    yield "divergence, gradient, mixed", lambda: gradient_source(programs("jsd").statistics, "F32", "BF16", "F32")
    yield "logits, f32, cluster of 8", lambda: gradient_text(Shape("f32", 8, True), False)
    yield "logits, bf16, cluster of 4", lambda: gradient_text(Shape("bf16", 4, True), False)
    yield "logits, bf16, one block, entropy", lambda: gradient_text(Shape("bf16", 1, True), True)
    yield "logits, f32, read twice, entropy", lambda: gradient_text(Shape("f32", 1, False), True)


TEXTS = dict(texts())
ONE_ARCHITECTURE = {
    **{name: program_text(name) for name in ("ppo, everything", "gdro", "aot", "segments")},
    "prologue": lambda: source(checks.prologue_program().program),
    "random": lambda: source(checks.random_program(3, 130).program),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TEXTS, *ONE_ARCHITECTURE])
def test_no_spills_on_any_architecture(name: str) -> None:
    text = (TEXTS | ONE_ARCHITECTURE)[name]()
    kernels = set(
        re.findall(r'extern "C" __global__ void __launch_bounds__\([^)]*\)\S*(?: FASTREWARD\S+)? (\w+)\(', text)
    )
    for architecture in ARCHITECTURES if name in TEXTS else ("90",):
        usage = compiled(text, architecture)
        for used in usage:
            print(f"sm_{architecture:4s} {name:40s} {used.kernel:20s} {used.registers:3d} registers")
        assert usage
        assert kernels <= {u.kernel for u in usage}
        assert not [u for u in usage if u.stack or u.spilled]


def machine_code(text: str, folder: Path) -> str:
    """Its instructions on sm_90."""
    dump = cuobjdump()
    if dump is None:
        pytest.skip("no cuobjdump, neither on PATH nor in triton's wheel")
    compiled(text, "90", folder / "code.cubin")
    command = [dump, "-sass", str(folder / "code.cubin")]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
def test_logits_move_16_bytes_at_a_time_and_stay_on_chip(tmp_path: Path) -> None:
    sass = machine_code(gradient_text(Shape("bf16", 4, True), False), tmp_path)
    for instruction in ("LDG.E.128", "STS.128", "LDS.128", "STG.E.EF.128", "UCGABAR_ARV"):
        assert instruction in sass, instruction
    assert not re.search(r"\b(LDL|STL)\b", sass)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [Shape("f32", 8, True), Shape("bf16", 1, True), Shape("f16", 1, False)])
def test_a_launch_needs_no_more_shared_memory_than_the_plan_knows_of(shape: Shape) -> None:
    """What the kernel declares: taken off where no one asks for more, and left free beside the row where one does."""
    (used,) = compiled(gradient_text(shape, True), "90")
    assert used.shared > 0
    assert used.shared + _launch.MAX_SHARED_BYTES <= 48 << 10
    assert used.shared + (1 << 10) <= logits_policy_loss._OTHER_BYTES


@pytest.mark.slow
def test_tokens_are_loaded_together(tmp_path: Path) -> None:
    """Four tokens' inputs are under way before the first is used."""
    sass = machine_code(program_text("ppo")(), tmp_path)
    lines = [line for line in sass.splitlines() if re.search(r"\b(LDG|MUFU\.EX2|STG)\b|LDG\.E|MUFU\.EX2", line)]
    first = next(i for i, line in enumerate(lines) if "MUFU.EX2" in line)
    assert all("LDG.E" in line for line in lines[first - 12 : first])  # 3 inputs of 4 tokens


def test_every_struct_has_members_of_eight_bytes() -> None:
    """pack() and the C++ structs agree only if no member is narrower."""
    narrow = re.compile(r"^\s+(?:const )?(?:int|unsigned|float|bool|short|char)\s+\w+\s*[;,=]", re.MULTILINE)
    headers = "".join((CSRC / "cuda" / f"{name}.cuh").read_text() for name in ("program", "logits_policy_loss"))
    text = headers + program_text("real")() + gradient_text(Shape("f32", 1, True), False)
    structs = dict(re.findall(r"struct (Side|Groups|LogitsArguments|Arguments) \{(.*?)\n\};", text, re.DOTALL))
    assert set(structs) == {"Side", "Groups", "LogitsArguments", "Arguments"}
    assert not [name for name, members in structs.items() if narrow.search(members)]


@pytest.mark.parametrize("name", checks.PROGRAMS)
def test_source_reads_as_the_loss(name: str) -> None:
    """The same text every time; terms, parameters and what is made of them are called what they are in the loss."""
    text = source(checks.PROGRAMS[name]().program)
    assert text == source(checks.PROGRAMS[name]().program)
    assert max(map(len, text.splitlines())) <= 120
    assert f'#include "cuda/program{"_scans" if "run_row" in text else ""}.cuh"' in text
    term = "x.chosen_logprob" if name in ("dpo", "aot") else "x.logprob - x.old_logprob"
    assert term in text
    assert "scalar0" not in text


def test_every_place_of_an_array_has_a_name() -> None:
    """Columns, reductions, the batch's values and results are numbered; a comment says what is where."""
    text = source(checks.PROGRAMS["real"]().program)
    assert "  double tau;" in text
    for words in (
        "// columns: 0 length, 1 ",
        "// reductions, in sums and tokens: 0 sum_log_ratio, 1 length, 2 sum_log_ratio_clamped, 3 sum_ratio, ",
        "// batch: 0 batch_sum_",
        "// results: 0 batch_sum_",
        "const float ratio = expf(log_ratio_clamped);",
        "const bool is_empty = !has_tokens;",
    ):
        assert words in text
    listed = {"columns": r"double\* columns;  // \[(\d+),", "results": r"float\* results;  // \[(\d+)\]"}
    for array, declared in listed.items():
        comment = re.search(rf"// {array}: (.*?)\n +\w", text.replace("\n  //  ", ""), re.DOTALL)
        count = re.search(declared, text)
        assert comment is not None
        assert count is not None
        places = [int(item.split()[0]) for item in comment[1].split(", ")]
        assert places == list(range(int(count[1])))


WORDS = (
    "int",
    "a",
    "row",
    "x-y",
    "x y",
    "int_",
    "1st",
    "",
    "Input",
    "i64",
    "expf",
    "NULL",
    "__global__",
    "out0",
    "Pass1",
)


def test_names_that_are_words_of_cpp() -> None:
    """Extras and parameters may be called anything: int, a, a type or a macro, or what another one becomes."""

    @losses.define
    def odd(t: losses.Terms) -> losses.Node:  # type: ignore[name-defined]
        names = WORDS
        total = t.logprob * t.advantage
        for name in names:
            total = total + t.extra(name) * t.logprob
        return total

    named = checks.policy(odd(), terms=WORDS)
    assert compiled(source(named.program), "90")


def test_generating_imports_no_cupy() -> None:
    code = (
        "import sys, fastreward; from fastreward import losses; from fastreward.cuda.program.source import source\n"
        "assert 'cupy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_missing_cupy_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    find = _launch.importlib.util.find_spec
    monkeypatch.setattr(
        _launch.importlib.util, "find_spec", lambda name, *a: None if name == "cupy" else find(name, *a)
    )
    with pytest.raises(_launch.BackendError, match=r"through CuPy, which is not installed \(pip install"):
        _launch._text_kernel("// nothing", "nothing")
