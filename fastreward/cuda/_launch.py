"""How a CUDA kernel is started, for both routes: the operations plan (kernel, grid, block, arguments), this launches.

Every kernel in csrc/cuda is an extern "C" function of one struct whose members are all 8 bytes wide (pointer, int64,
float64), so that a plan is a name, two numbers and some packed bytes. `_cuda.launch` takes it as it is; on the CuPy
route the same source is compiled by NVRTC at first use and kept by CuPy on disk under a hash of its text. Kernels that
are generated, those of losses, take the CuPy route always.
"""

from __future__ import annotations

import importlib.util
import os
import re
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Final, Literal, NamedTuple

import torch
from torch import Tensor

from fastreward._runtime.errors import BackendError

Route = Literal["nvcc", "cupy"]
#: As in CMakeLists.txt: multiply-adds are fused only where the source says so, so that both routes give the same bits.
NVRTC_OPTIONS: Final = ("-std=c++17", "-fmad=false")
#: A struct member: pointer of a tensor (None = null), int64 or float64.
Member = Tensor | int | float | None

#: Dynamic shared memory that a block of any kernel here may have without asking for more: the 48 KiB that CUDA gives
#: unasked, less what kernels declare themselves.
MAX_SHARED_BYTES: Final = 46 << 10

_MASK_KINDS = {
    torch.bool: 1,
    torch.uint8: 1,
    torch.int8: 1,
    torch.int32: 2,
    torch.int64: 3,
    torch.float32: 4,
}


@cache
def route() -> Route | None:
    """How kernels are built here; FASTREWARD_CUDA_ROUTE=nvcc or cupy chooses where both could."""
    available: list[Route] = []
    if importlib.util.find_spec("fastreward._cuda") is not None:
        available.append("nvcc")
    if importlib.util.find_spec("cupy") is not None:
        available.append("cupy")
    wanted = os.environ.get("FASTREWARD_CUDA_ROUTE")
    if wanted:
        available = [name for name in available if name == wanted]
    return available[0] if available else None


class Arguments(NamedTuple):
    """A kernel's argument struct, and the tensors it points into: some are temporaries that must outlive the launch."""

    packed: bytes
    members: tuple[Member, ...]


def pack(*members: Member) -> Arguments:
    """The argument struct of a kernel."""
    values = [m.data_ptr() if isinstance(m, Tensor) else 0 if m is None else m for m in members]
    return Arguments(struct.pack("".join("d" if isinstance(v, float) else "q" for v in values), *values), members)


def launch(
    source: str,
    kernel: str,
    grid: int,
    block: int,
    arguments: Arguments,
    device: torch.device,
    shared: int = 0,
    define: str = "",
) -> None:
    """Queues csrc/cuda/<source>.cu's `kernel` on torch's current stream; `define` narrows what NVRTC compiles."""
    index = _index(device)
    stream = torch.cuda.current_stream(index).cuda_stream
    if route() == "nvcc":
        _compiled().launch(kernel, index, grid, block, shared, stream, arguments.packed)
    else:
        _queue(lambda: _cupy_kernel(source, kernel, define), grid, block, arguments.packed, index, stream, shared)


def launch_text(
    text: str, kernel: str, grid: int, block: int, arguments: Arguments, device: torch.device, shared: int = 0
) -> None:
    """Queues `kernel` of generated CUDA C++ on torch's current stream. Its includes are of csrc.

    Such text is compiled by NVRTC through CuPy in every installation: nvcc is no part of a running program.
    """
    index = _index(device)
    stream = torch.cuda.current_stream(index).cuda_stream
    _queue(lambda: _text_kernel(text, kernel), grid, block, arguments.packed, index, stream, shared)


def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of the device."""
    return _properties(_index(device))[0]


def has_clusters(device: torch.device) -> bool:
    """True where thread blocks form clusters with distributed shared memory (compute capability 9.0 and later)."""
    return _properties(_index(device))[1] >= 9


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory of one multiprocessor, of which CUDA takes 1024 for every block on it."""
    return _properties(_index(device))[2]


def counter(device: torch.device) -> Tensor:
    """An int32 [1] that is 0, for kernels of a call whose last block finishes; each leaves it 0 for the next.

    It must not outlive the call, though keeping one would save its memset: torch.compile(mode="reduce-overhead") warms
    up, without capturing, in the memory of its CUDA graphs, where nothing may stay behind but outputs.
    """
    return torch.zeros(1, dtype=torch.int32, device=device)


def countable(mask: Tensor | None) -> tuple[Tensor | None, int]:
    """A contiguous mask of a type that the kernels read, and its kind there (nonzero counts)."""
    if mask is None:
        return None, 0
    if mask.dtype not in _MASK_KINDS:
        mask = mask != 0
    return mask.contiguous(), _MASK_KINDS[mask.dtype]


def source_text(name: str) -> str:
    """csrc/cuda/<name>.cu, whole."""
    return whole_text((_sources() / "cuda" / f"{name}.cu").read_text(encoding="utf-8"))


def whole_text(text: str) -> str:
    """CUDA C++ with fastreward's own headers pasted in, so that a hash of it covers everything."""
    seen: set[str] = set()

    def include(match: re.Match[str]) -> str:
        header = match[1]
        if header in seen or header.endswith(".hpp"):  # .hpp: the host's side, which NVRTC never sees
            return ""
        seen.add(header)
        pasted = (_sources() / header).read_text(encoding="utf-8").replace("#pragma once", "")
        return _INCLUDE.sub(include, pasted)

    return _INCLUDE.sub(include, text)


_INCLUDE = re.compile(r'^#include "(.+)"$', re.MULTILINE)


def _sources() -> Path:
    """Installed: fastreward/_sources; in a checkout: csrc beside the package."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "_sources"
    return installed if installed.is_dir() else package.parent / "csrc"


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


@cache
def _properties(index: int) -> tuple[int, int, int]:
    p = torch.cuda.get_device_properties(index)
    return p.multi_processor_count, p.major, p.shared_memory_per_multiprocessor


@cache
def _compiled() -> ModuleType:
    return importlib.import_module("fastreward._cuda")


@cache
def _cupy_kernel(source: str, kernel: str, define: str) -> Any:
    return _cupy_module(source, define).get_function(kernel)


@cache
def _cupy_module(source: str, define: str) -> Any:
    import cupy

    options = (*NVRTC_OPTIONS, f"-D{define}") if define else NVRTC_OPTIONS
    return cupy.RawModule(code=source_text(source), options=options, backend="nvrtc")


@cache
def _text_kernel(text: str, kernel: str) -> Any:
    if importlib.util.find_spec("cupy") is None:
        raise BackendError(
            "fastreward: the cuda backend compiles losses at first use, through CuPy, which is not installed "
            "(pip install 'fastreward[cuda13]', or cuda12 where torch is built for CUDA 12)"
        )
    return _text_module(text).get_function(kernel)


@cache
def _text_module(text: str) -> Any:
    import cupy

    return cupy.RawModule(code=whole_text(text), options=NVRTC_OPTIONS, backend="nvrtc")


def _queue(
    find: Callable[[], Any], grid: int, block: int, arguments: bytes, index: int, stream: int, shared: int
) -> None:
    """Queues the kernel that `find` gives. It is asked on the kernel's device: CuPy compiles for the current one."""
    import cupy
    import numpy as np

    # A NumPy array is passed by value: exactly the struct's bytes. CuPy refuses handle 0 as an external stream.
    by_value = np.frombuffer(arguments, dtype=np.int64)
    queue = cupy.cuda.ExternalStream(stream, index) if stream else cupy.cuda.Stream.null
    with cupy.cuda.Device(index), queue:
        kernel = find()
        if shared > MAX_SHARED_BYTES:
            _allow_all_shared_memory(kernel, index)
        kernel((grid,), (block,), (by_value,), shared_mem=shared)


@cache
def _allow_all_shared_memory(kernel: Any, index: int) -> None:
    """Lets launches of `kernel` on device `index`, the current one, have all shared memory that a block may have.

    Once, and not what each launch is about to ask for: between that and the launch another thread could set less.
    """
    properties: Any = torch.cuda.get_device_properties(index)  # torch's stubs leave this one out
    kernel.max_dynamic_shared_size_bytes = properties.shared_memory_per_block_optin - kernel.shared_size_bytes
