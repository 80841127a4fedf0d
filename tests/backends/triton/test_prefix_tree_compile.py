"""The Triton kernels of prefix trees compile for sm_80, sm_90 and sm_100, without spills.

No GPU is needed: compiled_prefix_trees.py compiles in a process of its own (this one may have imported Triton's
interpreter) and disassembles with the tools that Triton ships.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import pytest
from checkout import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]
CAPABILITIES = (80, 90, 100)
KERNELS = {
    *("_groups_kernel", "_prefixes_kernel", "_blocks_kernel", "_compare_kernel"),
    *("_given_kernel", "_earliest_kernel", "_order_kernel", "_first_sharer_kernel"),
    *("_records_kernel", "_runs_kernel", "_below_kernel", "_columns_kernel", "_numbers_kernel", "_nodes_kernel"),
    *("_links_kernel", "_sequences_kernel", "children_kernel", "_aggregate_backward_kernel"),
    *("_advantages_kernel", "_siblings_kernel", "_propagate_kernel", "_passed_kernel"),
    *("_tokens_kernel", "_fold_kernel", "_edges_kernel", "_layout_kernel", "_starts_kernel", "_lengths_kernel"),
}


@pytest.fixture(scope="module")
def kernels() -> list[dict[str, Any]]:
    """Every compiled kernel's figures; `compiled_prefix_trees.py 80 90 100 all` builds every variant."""
    program = ROOT / "tests" / "support" / "compiled_prefix_trees.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

    run = subprocess.run(
        [sys.executable, str(program), *map(str, CAPABILITIES)],
        cwd=program.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-6000:]
    return [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]


def test_every_kernel_compiles_for_every_architecture(kernels: list[dict[str, Any]]) -> None:
    for capability in CAPABILITIES:
        assert {kernel["kernel"] for kernel in kernels if kernel["sm"] == capability} == KERNELS


def test_no_spills_and_no_local_memory(kernels: list[dict[str, Any]]) -> None:
    spilled = [kernel for kernel in kernels if kernel["spills"] or kernel["stack"] or kernel["local"]]
    assert not spilled, spilled
