"""The Triton kernels of prefix trees compile for sm_80, sm_90 and sm_100, without spills.

No GPU is needed: compiled_prefix_trees.py compiles in a process of its own (this one may have imported Triton's
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
PROGRAM = "compiled_prefix_trees.py"
CAPABILITIES = tuple(map(int, ARCHITECTURES))
KERNELS = {
    *("_groups_kernel", "_prefixes_kernel", "_blocks_kernel", "_compare_kernel"),
    *("_given_kernel", "_earliest_kernel", "_order_kernel", "_first_sharer_kernel"),
    *("_records_kernel", "_runs_kernel", "_below_kernel", "_columns_kernel", "_numbers_kernel", "_nodes_kernel"),
    *("_links_kernel", "_sequences_kernel", "children_kernel", "_aggregate_backward_kernel"),
    *("_advantages_kernel", "_siblings_kernel", "_propagate_kernel", "_passed_kernel"),
    *("_tokens_kernel", "_scatter_reduce_kernel", "_edges_kernel", "_layout_kernel"),
    *("_starts_kernel", "_lengths_kernel"),
}


def test_every_kernel_compiles_for_every_architecture(kernels: list[dict[str, Any]]) -> None:
    for capability in CAPABILITIES:
        assert {kernel["kernel"] for kernel in kernels if kernel["sm"] == capability} == KERNELS


def test_no_spills_and_no_local_memory(kernels: list[dict[str, Any]]) -> None:
    spilled = [kernel for kernel in kernels if kernel["spills"] or kernel["stack"] or kernel["local"]]
    assert not spilled, spilled
