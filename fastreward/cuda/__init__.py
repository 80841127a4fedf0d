"""CUDA C++ kernels: csrc/cuda, compiled by nvcc into fastreward._cuda, or by NVRTC through CuPy at first use."""

from __future__ import annotations

import importlib.util

import torch

from fastreward.cuda._launch import Route
from fastreward.cuda._launch import route as _route

__all__ = ["missing", "route"]


def route() -> Route | None:
    """How the kernels are built here: "nvcc" (compiled into the package), "cupy" (NVRTC at first use) or None."""
    return _route()


def missing(generated: bool = False) -> str | None:
    """Why these kernels cannot run on this machine, in words; None where they can.

    generated: of kernels that are written at run time (those of losses), for which nvcc's build has none.
    """
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if torch.version.hip is not None:
        return "this torch is built for ROCm, whose GPUs these kernels do not run on"
    if _route() is None:
        return "the package was built without nvcc and CuPy is not installed (pip install 'fastreward[cuda13]')"
    if generated and importlib.util.find_spec("cupy") is None:
        return "losses are compiled at run time through CuPy, which is not installed (pip install 'fastreward[cuda13]')"
    if torch.cuda.get_device_capability() < (8, 0):
        return "they need a GPU of compute capability 8.0 or later"
    return None
