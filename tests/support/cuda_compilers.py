"""NVIDIA's compilers and tools, where a machine has them. None of them needs a GPU."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
from pathlib import Path

ARCHITECTURES = ("80", "90", "100")

nvcc = shutil.which("nvcc")


def cuobjdump() -> str | None:
    found = shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None and triton.origin is not None:
        bundled = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(bundled) if bundled.exists() else None
    return found


def nvrtc_library() -> ctypes.CDLL | None:
    """NVIDIA's run-time compiler: beside nvcc, or from the wheel nvidia-cuda-nvrtc. It needs no GPU and no driver."""
    folders = [Path(nvcc).resolve().parents[1] / "lib64"] if nvcc else []
    folders += [Path("/usr/local/cuda/lib64")]
    spec = importlib.util.find_spec("nvidia")
    for root in spec.submodule_search_locations or [] if spec else []:
        folders += sorted(Path(root).glob("*/lib"), reverse=True)
    for folder in folders:
        for library in sorted(folder.glob("libnvrtc.so.*")):
            for builtins in folder.glob("libnvrtc-builtins.so.*"):  # which it opens by name alone
                ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
            return ctypes.CDLL(str(library))
    return None
