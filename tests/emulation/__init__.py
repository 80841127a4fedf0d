"""Runs csrc/cuda's kernels on the CPU (emulate.hpp), through the package's own launch plans, on CPU tensors."""

from __future__ import annotations

import ctypes
import re
import subprocess
from functools import cache
from pathlib import Path

import torch

from fastreward.cuda import _launch

_HERE = Path(__file__).parent
#: As on a small Hopper GPU: few multiprocessors, so that both the clustered and the plain kernels get work.
MULTIPROCESSORS = 4


@cache
def library(source: str, folder: Path) -> ctypes.CDLL:
    """csrc/cuda/<source>.cu as a shared library of host code."""
    text = _launch.source_text(source)
    text = re.sub(r"// All inline PTX.*?}  // namespace fastreward\n", "", text, count=1, flags=re.DOTALL)
    text = re.sub(r"extern __shared__ float (\w+)\[\];", r"float* \1 = emulated_dynamic_shared();", text)
    text = re.sub(r"^#pragma unroll.*$", "", text, flags=re.MULTILINE)
    assert "asm" not in text
    path = folder / f"{source}.cpp"
    path.write_text('#define __CUDACC_RTC__\n#include "emulate.hpp"\n' + text)
    out = folder / f"{source}.so"
    command = ["g++", "-std=c++20", "-O1", "-fPIC", "-shared", "-pthread", f"-I{_HERE}", str(path), "-o", str(out)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    return ctypes.CDLL(str(out))


class Emulator:
    """Stands in for fastreward.cuda._launch's functions that need a device."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.launched: list[str] = []
        self.clusters = True

    def launch(
        self, source: str, kernel: str, grid: int, block: int, arguments: _launch.Arguments, device: torch.device,
        shared: int = 0, define: str = "",
    ) -> None:  # fmt: skip
        self.launched.append(kernel)
        lib, packed = library(source, self.folder), arguments.packed
        status = lib.emulate(
            ctypes.cast(getattr(lib, kernel), ctypes.c_void_p), ctypes.c_char_p(packed), len(packed) // 8,
            ctypes.c_uint(grid), ctypes.c_uint(block), ctypes.c_size_t(shared), int(kernel.endswith("_cluster")),
        )  # fmt: skip
        assert status == 0, f"emulate.hpp does not know a struct of {len(packed) // 8} words ({kernel})"

    def has_clusters(self, device: torch.device) -> bool:
        return self.clusters

    def multiprocessors(self, device: torch.device) -> int:
        return MULTIPROCESSORS

    def counter(self, device: torch.device) -> torch.Tensor:
        return self._counter

    _counter = torch.zeros(1, dtype=torch.int32)
