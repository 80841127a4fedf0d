"""Generated kernels compile for sm_80, sm_90 and sm_100, without spills, and once for all shapes and parameters.

No GPU is needed: compiled_programs.py compiles in a process of its own (this one may have imported Triton's
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
PROGRAM = "compiled_programs.py"
CAPABILITIES = tuple(map(int, ARCHITECTURES))


def test_every_case_compiles_for_every_architecture(kernels: list[dict[str, Any]]) -> None:
    expected = {"ppo", "gspo", "sapo", "real", "dpo", "fipo", "logits, f32", "logits, bf16"}
    for capability in CAPABILITIES:
        own = [kernel for kernel in kernels if kernel["sm"] == capability]
        assert expected <= {kernel["case"] for kernel in own}
        assert {"tokens_1", "tokens_1_chosen", "tokens_1_rejected", "logits_gradient", "_rescale_kernel"} <= {
            kernel["kernel"] for kernel in own
        }
    assert {"_scale_kernel", "_broadcast_to_tokens_kernel", "tokens_2"} <= {kernel["kernel"] for kernel in kernels}


def test_no_spills(kernels: list[dict[str, Any]]) -> None:
    spilled = [kernel for kernel in kernels if kernel["spills"] or kernel["local"]]
    assert not spilled, spilled


def test_token_level_losses_have_one_kernel_that_leaves_room_for_others(kernels: list[dict[str, Any]]) -> None:
    """65,536 registers an SM, 128 threads a program: up to 102 registers is five programs."""
    for name in ("ppo", "sapo", "gspo"):
        own = [kernel for kernel in kernels if kernel["case"] == name]
        assert [kernel["kernel"] for kernel in own] == ["tokens_1"] * len(CAPABILITIES)
        assert all(kernel["registers"] <= 102 for kernel in own), own


def test_aligned_rows_are_read_and_written_16_bytes_at_a_time(kernels: list[dict[str, Any]]) -> None:
    for kernel in kernels:
        if kernel["case"] in ("ppo", "sapo"):
            assert kernel["wide_loads"] >= 4, kernel
            assert kernel["wide_stores"] >= 2, kernel
        if kernel["case"] in ("gspo", "real", "dpo"):
            assert kernel["wide_loads"] >= 4, kernel
        if kernel["case"] in ("logits, f32", "logits, bf16") and kernel["kernel"] == "logits_gradient":
            assert kernel["wide_loads_in_loops"] >= 4, kernel
            assert kernel["wide_stores"] >= 4, kernel


def test_divergences_stream_in_16_byte_loads_without_barriers(kernels: list[dict[str, Any]]) -> None:
    own = [kernel for kernel in kernels if kernel["case"].startswith("divergence, ")]
    assert {"divergence_forward", "divergence_gradient", "divergence_sums"} == {kernel["kernel"] for kernel in own}
    for kernel in own:
        assert kernel["wide_loads_in_loops"] >= 2, kernel
        assert kernel["barriers_in_loops"] == 0, kernel
        if kernel["case"] == "divergence, bf16" and kernel["kernel"] == "divergence_forward":
            assert kernel["registers"] <= (80 if kernel["sm"] == 90 else 128), kernel  # three programs an SM, or two


def test_parameters_and_shapes_compile_nothing_anew(lines: list[dict[str, Any]]) -> None:
    """One kernel for all long rows of a multiple of four tokens; four for padded rows at most, two for packed ones."""
    (counts,) = [line for line in lines if line["case"] == "variants"]
    assert counts["aligned"] == 1
    assert counts["padded"] <= 4
    assert counts["packed"] <= counts["padded"] + 2
