"""The Triton kernels compile for sm_80, sm_90 and sm_100, without spills, and stream in 16-byte loads.

No GPU is needed: compiled_kernels.py compiles in a process of its own (this one may have imported Triton's
interpreter) and disassembles with the tools that Triton ships.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
from cuda_compilers import ARCHITECTURES

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]
PROGRAM = "compiled_kernels.py"
CAPABILITIES = tuple(map(int, ARCHITECTURES))


def test_every_kernel_compiles_for_every_architecture(kernels: list[dict[str, Any]]) -> None:
    expected = {
        "_forward_kernel",
        "_forward_ids_kernel",
        "_backward_kernel",
        "_backward_ids_kernel",
        "_accumulate_kernel",
        "_finish_kernel",
        "_normalize_kernel",
        "_group_statistics_kernel",
        "_statistics_kernel",
        "_apply_kernel",
        "_token_rewards_kernel",
        "_spans_kernel",
        "_reduce_kernel",
        "_adjoint_kernel",
        "_ids_kernel",
        "_scan_kernel",
        "_reach_kernel",
        "_handed_on_kernel",
        "_join_kernel",
        "_loop_kernel",
    }
    for capability in CAPABILITIES:
        assert expected <= {kernel["kernel"] for kernel in kernels if kernel["sm"] == capability}
    assert {"_combine_kernel", "_batch_scale_kernel"} <= {kernel["kernel"] for kernel in kernels}


def test_no_spills_and_no_local_memory(kernels: list[dict[str, Any]]) -> None:
    spilled = [kernel for kernel in kernels if kernel["spills"] or kernel["stack"] or kernel["local"]]
    assert not spilled, spilled


def test_logprobs_stream_in_16_byte_loads_without_barriers(kernels: list[dict[str, Any]]) -> None:
    streaming = [
        kernel
        for kernel in kernels
        if kernel["case"].startswith("logprobs: ")
        and kernel["kernel"] in ("_forward_kernel", "_backward_kernel", "_accumulate_kernel")
        and "odd" not in kernel["case"]
    ]
    assert {"sm_90 bf16", "sm_90 f32"} <= {f"sm_{k['sm']} {k['case'].split()[1].rstrip(',')}" for k in streaming}
    for kernel in streaming:
        assert kernel["wide_loads_in_loops"] >= 2, kernel
        assert kernel["barriers_in_loops"] == 0, kernel
        if kernel["kernel"] == "_backward_kernel":
            assert kernel["wide_stores"] >= 2, kernel


def test_registers_leave_room_for_enough_programs(kernels: list[dict[str, Any]]) -> None:
    """65,536 registers an SM, 256 threads a program: up to 64 registers is four programs and 32 KiB in flight."""
    for kernel in kernels:
        if kernel["case"] in ("logprobs: bf16, logprobs and entropy", "logprobs: bf16, logprobs alone"):
            assert kernel["registers"] <= 64, kernel


def test_whiten_loads_16_bytes(kernels: list[dict[str, Any]]) -> None:
    for kernel in kernels:
        if kernel["case"] == "whiten":
            assert kernel["wide_loads"] >= 2, kernel
