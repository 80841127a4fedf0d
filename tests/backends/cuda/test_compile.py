"""The CUDA C++ sources compile for every architecture with no spills, under nvcc and NVRTC. Needs no GPU.

Compiling proves nothing about results: tests/backends/gpu/test_operations.py does, on a machine that has a GPU.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from checkout import CSRC
from cuda_compilers import ARCHITECTURES, cuobjdump, nvcc, nvrtc_library

import fastreward.cuda
from fastreward.cuda import _launch

SOURCES = ("logprobs", "group", "whiten")
TYPES = ("f32", "bf16", "f16")

needs_nvcc = pytest.mark.skipif(nvcc is None, reason="nvcc is not on PATH")


@dataclass
class Usage:
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int


@dataclass
class Compiled:
    path: Path
    usage: dict[tuple[str, str], Usage]  # by (architecture, kernel)


_ENTRY = re.compile(
    r"entry function '(?P<kernel>\w+)' for 'sm_(?P<arch>\d+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Compiled]:
    done: dict[str, Compiled] = {}
    folder = tmp_path_factory.mktemp("cuda")

    def compile_once(source: str) -> Compiled:
        if source not in done:
            done[source] = _compile(source, folder / f"{source}.o")
        return done[source]

    return compile_once


def _compile(source: str, out: Path) -> Compiled:
    assert nvcc is not None
    command = [nvcc, "-t", "1", "-std=c++17", "-O3", "-fmad=false", f"-I{CSRC}"]
    command += ["-Werror", "all-warnings", "-Xptxas", "-v"]
    for arch in ARCHITECTURES:
        command += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    command += ["-c", str(CSRC / "cuda" / f"{source}.cu"), "-o", str(out)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    usage = {
        (m["arch"], m["kernel"]): Usage(int(m["registers"]), int(m["stack"]), int(m["stores"]), int(m["loads"]))
        for m in _ENTRY.finditer(run.stdout + run.stderr)
    }
    return Compiled(out, usage)


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
def test_no_spills_on_any_architecture(source: str, compiled: Callable[[str], Compiled]) -> None:
    usage = compiled(source).usage
    assert {arch for arch, _ in usage} == set(ARCHITECTURES)
    for (arch, kernel), used in sorted(usage.items()):
        print(f"sm_{arch:4s} {kernel:44s} {used.registers:3d} registers")
    spilled = {key: used for key, used in usage.items() if used.stack or used.spill_stores or used.spill_loads}
    assert not spilled


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize(
    "kernel", [f"logprobs_{what}" for t in TYPES for what in (f"forward_{t}_lean", f"backward_{t}")]
)
def test_logits_move_16_bytes_at_a_time(kernel: str, compiled: Callable[[str], Compiled]) -> None:
    dump = cuobjdump()
    if dump is None:
        pytest.skip("no cuobjdump, neither on PATH nor in triton's wheel")
    command = [dump, "-sass", "-arch", "sm_90", "-fun", kernel, str(compiled("logprobs").path)]
    sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "LDG.E.128" in sass
    if "backward" in kernel:
        assert "STG.E.EF.128" in sass
    assert not re.search(r"\b(LDL|STL)\b", sass)  # no local memory


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "define"),
    [("logprobs", f"FASTREWARD_ONLY_{t.upper()}") for t in TYPES] + [(source, "") for source in SOURCES[1:]],
)
def test_nvrtc_compiles_the_text_that_cupy_gets(source: str, define: str) -> None:
    nvrtc = nvrtc_library()
    if nvrtc is None:
        pytest.skip("libnvrtc is not here: pip install nvidia-cuda-nvrtc")
    options = [*_launch.NVRTC_OPTIONS, "--gpu-architecture=sm_90", *([f"-D{define}"] if define else [])]
    program = ctypes.c_void_p()
    text = _launch.source_text(source).encode()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, b"kernels.cu", 0, None, None) == 0
    encoded = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
    status = nvrtc.nvrtcCompileProgram(program, len(options), encoded)
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    assert status == 0, log.value.decode()


@pytest.mark.parametrize("source", SOURCES)
def test_text_for_nvrtc_is_whole(source: str) -> None:
    text = _launch.source_text(source)
    assert '#include "' not in text.replace('#include "cuda/device/launch.hpp"', "")
    assert text.count("namespace fastreward {") >= 2


def test_pack_lays_out_eight_bytes_per_member() -> None:
    tensor = torch.zeros(3)
    arguments = _launch.pack(tensor, 7, None, 0.5, True)
    assert arguments.packed == struct.pack("qqqdq", tensor.data_ptr(), 7, 0, 0.5, 1)
    assert arguments.members[0] is tensor, "a temporary must outlive its launch"


def test_every_argument_struct_has_members_of_eight_bytes() -> None:
    """pack() and the C++ structs agree only if no member is narrower."""
    narrow = re.compile(r"^\s+(?:const )?(?:int|unsigned|float|bool|short|char)\s+\w+\s*[;,=]", re.MULTILINE)
    structs = re.compile(r"struct (\w*Arguments|Rows) \{(.*?)\n\};", re.DOTALL)
    found = 0
    for path in [*(CSRC / "cuda").glob("*.cu"), *(CSRC / "cuda").glob("*.cuh")]:
        for match in structs.finditer(path.read_text()):
            found += 1
            assert not narrow.search(match[2]), match[1]
    assert found >= 8


needs_module = pytest.mark.skipif(
    importlib.util.find_spec("fastreward._cuda") is None, reason="this build of fastreward has no _cuda (no nvcc then)"
)


@needs_module
def test_module_imports_without_touching_cuda() -> None:
    """In a fresh process with every device hidden; on CI there is no driver either."""
    code = "from fastreward import _cuda; print(len(_cuda.kernels()))"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"CUDA_VISIBLE_DEVICES": ""}
    )
    assert int(run.stdout) == 3 * 11 + 1 + 2 + 2  # logprobs by type, its finish, group, whiten


@needs_module
def test_module_refuses_unknown_kernels_and_wrong_argument_sizes() -> None:
    from fastreward import _cuda

    with pytest.raises(ValueError, match="no kernel nonsense"):
        _cuda.launch("nonsense", 0, 1, 1, 0, 0, b"")
    with pytest.raises(ValueError, match="bytes of arguments, not 3"):
        _cuda.launch("whiten_apply", 0, 1, 1, 0, 0, b"abc")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_missing_says_why() -> None:
    assert fastreward.cuda.missing() == "torch sees no CUDA device"
