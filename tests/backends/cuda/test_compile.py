"""The CUDA C++ sources compile for every architecture with no spills, under nvcc (the build's) and NVRTC. Needs no GPU.

Compiling proves nothing about results: tests/backends/gpu/test_operations.py does, on a machine that has a GPU.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
import struct
import subprocess
import sys

import pytest
import torch
from checkout import CSRC
from cuda_compilers import ARCHITECTURES, cuobjdump, nvrtc_library

import fastreward.cuda
from fastreward.cuda import _launch

SOURCES = ("logprobs", "group", "returns", "rewards", "segments", "whiten", "prefix_tree")
TYPES = ("f32", "bf16", "f16")


@pytest.fixture(scope="module")
def module() -> str:
    """What nvcc has made of the sources for every architecture: the module that is installed."""
    found = importlib.util.find_spec("fastreward._cuda")
    if found is None or found.origin is None:
        pytest.skip("this build of fastreward has no _cuda (no nvcc then)")
    return found.origin


def _dumped(*options: str) -> str:
    dump = cuobjdump()
    if dump is None:
        pytest.skip("no cuobjdump, neither on PATH nor in triton's wheel")
    return subprocess.run([dump, *options], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def usage(module: str) -> dict[tuple[str, str], dict[str, int]]:
    """Registers (REG) and bytes of STACK and LOCAL memory, by (architecture, kernel)."""
    found, arch = {}, ""
    for line in _dumped("-res-usage", module).splitlines():
        if match := re.match(r"arch = sm_(\d+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\w+):", line):
            kernel = match[1]
        elif "REG:" in line:
            found[arch, kernel] = {name: int(count) for name, count in re.findall(r"(REG|STACK|LOCAL):(\d+)", line)}
    return found


@pytest.mark.parametrize("source", SOURCES)
def test_no_spills_on_any_architecture(source: str, usage: dict[tuple[str, str], dict[str, int]]) -> None:
    """A spilled register is in local memory, in a frame on the stack."""
    from fastreward import _cuda

    own = {key: used for key, used in sorted(usage.items()) if source in key[1]}
    kernels = [kernel for kernel in _cuda.kernels() if source in kernel]
    assert set(own) == {(arch, kernel) for arch in ARCHITECTURES for kernel in kernels}
    assert kernels
    for (arch, kernel), used in own.items():
        print(f"sm_{arch:4s} {kernel:44s} {used['REG']:3d} registers")
    assert not {key: used for key, used in own.items() if used["STACK"] or used["LOCAL"]}


@pytest.mark.parametrize(
    "kernel", [f"logprobs_{what}" for t in TYPES for what in (f"forward_{t}_lean", f"backward_{t}")]
)
def test_logits_move_16_bytes_at_a_time(kernel: str, module: str) -> None:
    sass = _dumped("-sass", "-arch", "sm_90", "-fun", kernel, module)
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
    # logprobs by type, its finish, group, returns, rewards, segments, whiten, prefix_tree
    assert int(run.stdout) == 3 * 11 + 1 + 3 + 8 + 1 + 4 + 2 + 11


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
