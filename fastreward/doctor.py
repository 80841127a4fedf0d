"""Report on this machine, and on which backend serves which operation: `fastreward doctor`."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import platform
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fastreward._runtime import dispatch

_TRAINERS = ("trl", "verl", "openrlhf", "liger-kernel")
_CPUINFO = Path("/proc/cpuinfo")
#: CPU features that the kernels of an instruction set use, as /proc/cpuinfo calls them.
_FEATURES = {
    "baseline": (),
    "avx2": ("avx2", "fma", "f16c", "bmi2"),
    "avx512": ("avx512f", "avx512bw", "avx512dq", "avx512vl"),
}


def report() -> dict[str, Any]:
    """Everything that doctor knows, ready for JSON: `machine`, `packages` and `operations`."""
    return {"machine": _machine(), "packages": _packages(), "operations": operations()}


def operations() -> dict[str, dict[str, str]]:
    """operation -> backend -> "available", "experimental (...)" or why not."""
    return {op: {name: status(op, name) for name in dispatch.BACKENDS} for op in dispatch.OPERATIONS}


def status(operation: str, backend: dispatch.Backend) -> str:
    """Whether `backend` can serve `operation` on this machine, on whichever device it takes."""
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda and backend in ("triton", "cuda") else "cpu"
    try:
        if backend == "cuda" and not cuda and dispatch.absent(operation, backend) is None:
            return f"no CUDA device ({_cuda_state(operation)})"
        reason = dispatch.unavailable(operation, backend, device)
        if reason is not None:
            return reason
        dispatch.implementation(operation, backend)
    except Exception as error:  # doctor reports what is broken, it does not break on it
        return f"does not import: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if backend == "cuda":
        available = "available" if operation in dispatch.CUDA_PASSED_ON else "experimental"
        return f"{available} ({_cuda_state(operation)})"
    if backend == "triton" and device == "cpu":
        return "available (interpreter)"
    return "available"


def _cuda_state(operation: str) -> str:
    """State of an operation's CUDA C++ kernels: how they are compiled here, and on which hardware they have passed."""
    generated = dispatch.generated(operation)
    if _has_module() and not generated:
        made = "compiled"
    elif _cupy() is not None:
        made = "compiled at first use"
    else:
        return f"not compiled, needs CuPy{' at first use' if generated else ' or nvcc'}"
    passed = dispatch.CUDA_PASSED_ON.get(operation)
    state = f"{made}, passed on {passed}" if passed else f"{made}, never passed on hardware"
    return state if dispatch.absent(f"{operation}_build", "cuda") is None else f"{state}; Triton builds and packs"


def cpu_model() -> str:
    """The processor's name, as the system tells it."""
    if _CPUINFO.exists():
        for line in _CPUINFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def isa() -> str:
    """Instruction set that the CPU kernels use, or why there is none."""
    try:
        core = importlib.import_module("fastreward._core")
    except ImportError as error:
        return f"no compiled core: {error}"
    name = str(core.isa())
    features = " ".join(_FEATURES[name])
    return f"{name} ({features})" if features else f"{name} (what the compiler targets by default)"


def version(package: str) -> str | None:
    """Installed version, None where the package is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        module = package.replace("-", "_")
        return "installed, version unknown" if importlib.util.find_spec(module) is not None else None


def show(console: Console, facts: dict[str, Any]) -> None:
    """Prints the report as three tables."""
    for title, key in (("Machine", "machine"), ("Packages", "packages")):
        table = Table(title=title, title_justify="left", show_header=False)
        for name, value in facts[key].items():
            table.add_row(name, str(value) if value is not None else "[dim]not installed[/]")
        console.print(table)
    table = Table(title="Operations", title_justify="left")
    table.add_column("operation")
    for backend in dispatch.BACKENDS:
        table.add_column(backend)
    for operation, by_backend in facts["operations"].items():
        table.add_row(operation, *(_coloured(text) for text in by_backend.values()))
    console.print(table)


def _coloured(text: str) -> str:
    if text.startswith("available"):
        return f"[green]{text}[/]"
    if text.startswith("experimental"):
        return f"[yellow]{text}[/]"
    return f"[red]{text}[/]" if text.startswith("does not import") else f"[dim]{text}[/]"


def _machine() -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    return {
        "CPU": cpu_model(),
        "instruction set in use": isa(),
        "threads": f"{torch.get_num_threads()} (torch.get_num_threads)",
        "python": platform.python_version(),
        "CUDA device": ", ".join(_gpu(i) for i in range(torch.cuda.device_count())) if cuda else "none",
        "CUDA driver": _driver() if cuda else "none",
        "CUDA of torch": torch.version.cuda or "none",
        "CUDA C++ kernels": _cuda_route(),
    }


def _gpu(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return f"{torch.cuda.get_device_name(index)} (sm_{major}{minor})"


def _driver() -> str:
    try:
        number = int(vars(torch._C)["_cuda_getDriverVersion"]())
    except Exception as error:
        return f"unknown ({error})"
    return f"CUDA {number // 1000}.{number % 1000 // 10}"


def _cuda_route() -> str:
    """Origin of the CUDA C++ kernels: nvcc at installation, CuPy at first use, or none."""
    cupy = _cupy()
    by_cupy = f"compiled at first use by CuPy {cupy} (NVRTC)"
    without = "compiled at first use by CuPy, which is not installed"
    if _has_module():
        return f"built by nvcc at installation; those of losses are {without if cupy is None else by_cupy}"
    return f"not built at installation; {without if cupy is None else by_cupy}"


def _has_module() -> bool:
    return importlib.util.find_spec("fastreward._cuda") is not None


def _cupy() -> str | None:
    for package in ("cupy", "cupy-cuda13x", "cupy-cuda12x"):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _packages() -> dict[str, str | None]:
    found: dict[str, str | None] = {name: version(name) for name in ("fastreward", "torch", "numpy", "triton")}
    if found["triton"] is not None and dispatch.interpreted():
        found["triton"] = f"{found['triton']} (TRITON_INTERPRET=1)"
    found["cupy"] = _cupy()
    return found | {name: version(name) for name in _TRAINERS}
