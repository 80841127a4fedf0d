"""Runs csrc/cuda's kernels on the CPU (emulate.hpp), through the package's own launch plans, on CPU tensors."""

from __future__ import annotations

import ctypes
import hashlib
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
    return _compiled(_launch.source_text(source), source, folder)


@cache
def text_library(text: str, folder: Path) -> ctypes.CDLL:
    """Generated CUDA C++ as a shared library of host code."""
    return _compiled(_launch.whole_text(text), f"text_{hashlib.sha256(text.encode()).hexdigest()[:16]}", folder)


def _compiled(text: str, name: str, folder: Path) -> ctypes.CDLL:
    text = re.sub(r"// All inline PTX.*?}  // namespace fastreward\n", "", text, count=1, flags=re.DOTALL)
    text = re.sub(
        r"extern __shared__ (\w+) (\w+)\[\];", r"\1* \2 = reinterpret_cast<\1*>(emulated_dynamic_shared());", text
    )
    text = re.sub(r"^#pragma unroll.*$", "", text, flags=re.MULTILINE)
    assert "asm" not in text
    path, out = folder / f"{name}.cpp", folder / f"{name}.so"
    path.write_text('#include "emulate.hpp"\n' + text)
    _gxx("-fPIC", "-shared", "-pthread", "-include", str(_precompiled(folder)), str(path), "-o", str(out))
    return ctypes.CDLL(str(out))


@cache
def _precompiled(folder: Path) -> Path:
    """emulate.hpp, beside what the compiler has made of it once: the standard library takes longer than a kernel."""
    header = folder / "emulate.hpp"
    header.write_text("#define __CUDACC_RTC__\n" + (_HERE / "emulate.hpp").read_text())
    _gxx("-fPIC", "-pthread", "-x", "c++-header", str(header), "-o", f"{header}.gch")
    return header


def _gxx(*arguments: str) -> None:
    # Libraries that define the same inline functions and their statics (shared memory) each keep their own.
    separate = ("-fvisibility=hidden", "-fno-gnu-unique")
    command = ["g++", "-std=c++20", "-O1", "-ffp-contract=off", *separate, *arguments]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]


class Emulator:
    """Stands in for fastreward.cuda._launch's functions that need a device."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.launched: list[str] = []
        self.cluster = 1  # blocks of the last launch's clusters
        self.clusters = True
        self.shared = 228 << 10

    def launch(
        self, source: str, kernel: str, grid: int, block: int, arguments: _launch.Arguments, device: torch.device,
        shared: int = 0, define: str = "",
    ) -> None:  # fmt: skip
        cluster = 8 if kernel.endswith("_cluster") else 1
        self._run(library(source, self.folder), kernel, grid, block, arguments, shared, cluster)

    def launch_text(
        self, text: str, kernel: str, grid: int, block: int, arguments: _launch.Arguments, device: torch.device,
        shared: int = 0,
    ) -> None:  # fmt: skip
        size = re.search(r"FASTREWARD_CLUSTER\((\d)\)", text)
        self._run(text_library(text, self.folder), kernel, grid, block, arguments, shared, int(size[1]) if size else 1)

    def _run(
        self, lib: ctypes.CDLL, kernel: str, grid: int, block: int, arguments: _launch.Arguments, shared: int,
        cluster: int,
    ) -> None:  # fmt: skip
        self.launched.append(kernel)
        self.cluster = cluster
        packed = arguments.packed
        status = lib.emulate(
            ctypes.cast(getattr(lib, kernel), ctypes.c_void_p), ctypes.c_char_p(packed), len(packed) // 8,
            ctypes.c_uint(grid), ctypes.c_uint(block), ctypes.c_size_t(shared), ctypes.c_uint(cluster),
        )  # fmt: skip
        assert status == 0, f"emulate.hpp does not know a struct of {len(packed) // 8} words ({kernel})"

    def has_clusters(self, device: torch.device) -> bool:
        return self.clusters

    def shared_memory(self, device: torch.device) -> int:
        return self.shared

    def multiprocessors(self, device: torch.device) -> int:
        return MULTIPROCESSORS

    def counter(self, device: torch.device) -> torch.Tensor:
        return self._counter

    _counter = torch.zeros(1, dtype=torch.int32)
