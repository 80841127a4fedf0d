"""Compiles the Triton kernels of prefix trees for real GPUs without one; for test_prefix_tree_compile.py.

As compiled_kernels.py does it: raw functions on CPU tensors, nothing launched, one JSON object per kernel.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from compiled_kernels import Device, report
from fastreward.kernels import (
    _prefix_tree_aggregate,
    _prefix_tree_branches,
    _prefix_tree_folds,
    _prefix_tree_forest,
    _prefix_tree_nodes,
    _prefix_tree_parents,
    _prefix_tree_records,
    _prefix_tree_tokens,
    _prefix_tree_values,
    _prefix_tree_work,
    prefix_tree,
)
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fastreward._arguments.options import PLACES, TOKEN_OPS, TREE_MODES, AdvantageOptions, AggregateOptions
from fastreward._runtime.layout import NODES, ROWS

MODULES: tuple[ModuleType, ...] = (
    *(_prefix_tree_aggregate, _prefix_tree_branches, _prefix_tree_folds, _prefix_tree_forest, _prefix_tree_nodes),
    *(
        _prefix_tree_parents,
        _prefix_tree_records,
        _prefix_tree_tokens,
        _prefix_tree_values,
        _prefix_tree_work,
        prefix_tree,
    ),
)
B, T = 48, 512


def build_cases(everything: bool) -> dict[str, Callable[[], object]]:
    row = torch.arange(B)
    starts, lengths = row * T, torch.full((B,), T)

    def tokens(dtype: torch.dtype, ordered: bool = False, compress: bool = True) -> None:
        flat = torch.zeros(B * T, dtype=dtype)
        prefix_tree.build(flat, None, None, starts, lengths, row, ordered, compress)

    cases: dict[str, Callable[[], object]] = {
        "tokens, i64, a node for each": lambda: tokens(torch.int64, compress=False),
        "branches": lambda: prefix_tree.build(None, row - 1, row, starts, lengths, row, False, True),
    }
    return cases | {"tokens, i32": lambda: tokens(torch.int32, True)} if everything else cases


def value_cases(dtype: torch.dtype, everything: bool) -> dict[str, Callable[[], object]]:
    forest = torch.zeros((len(NODES), 3 * B), dtype=torch.int64), torch.zeros((len(ROWS), B), dtype=torch.int64)
    nodes, rows = torch.zeros(3 * B, dtype=dtype), torch.zeros(B, dtype=dtype)
    chosen = [
        AggregateOptions("mean", "children", discount=0.5),
        AggregateOptions("logsumexp", "children", normalized=True),
    ]
    if everything:
        chosen += [AggregateOptions("logsumexp"), AggregateOptions("sum", discount=0.5), AggregateOptions("max")]

    def aggregates() -> None:
        for options in chosen:
            given = (rows, rows, nodes if options.over == "children" else None, *forest, options)
            prefix_tree.aggregate(*given)
            if options.op in ("mean", "sum", "logsumexp"):
                prefix_tree.aggregate_backward(nodes, *given)

    def advantages() -> None:
        for mode in TREE_MODES if everything else ("sibling", "depth-weighted"):
            prefix_tree.advantages(nodes, *forest, AdvantageOptions(mode))

    return {
        f"aggregate, {dtype}": aggregates,
        f"advantages, {dtype}": advantages,
        f"propagate, {dtype}": lambda: prefix_tree.propagate_backward(nodes, nodes, nodes, *forest, 0.5, 0.1, math.inf),
    }


def token_cases(dtype: torch.dtype, everything: bool) -> dict[str, Callable[[], object]]:
    forest = torch.zeros((len(NODES), 3 * B), dtype=torch.int64), torch.zeros((len(ROWS), B), dtype=torch.int64)
    nodes, rows, tokens = (torch.zeros(n, dtype=dtype) for n in (3 * B, B, B * T))
    extents, mask = torch.arange(B + 1) * T, torch.ones(B * T, dtype=torch.bool)

    def both_ways() -> None:
        for place in PLACES if everything else PLACES[:1]:
            prefix_tree.spread(nodes, *forest, extents, mask, place, B * T, rows)
            prefix_tree.collect(tokens, *forest, extents, mask, place)
        prefix_tree.unfold(tokens, *forest, extents, None, B * T)
        for op in TOKEN_OPS if everything else TOKEN_OPS[1:]:
            prefix_tree.fold(tokens, *forest, extents, mask, op, B * T)

    def numbers() -> None:
        prefix_tree.node_of_token(*forest, extents, B * T)
        prefix_tree.unique_of_token(*forest, extents, B * T)
        prefix_tree.layout(torch.zeros(B * T, dtype=torch.int32), *forest, B * T)
        prefix_tree.lengths(mask, extents, prefix_tree.starts(mask, extents))

    return {f"tokens, {dtype}": both_ways} | ({"numbers": numbers} if dtype == torch.float32 else {})


def main(capabilities: list[int], everything: bool) -> None:
    """The variants that a run needs; with everything all modes, and float64 too: minutes more."""
    compiled: list[tuple[str, Any]] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        compiled.append((self.fn.__name__, run(self, *args, grid=grid, warmup=True, **kwargs)))

    JITFunction.run = compile_only
    for capability in capabilities:
        for function in (m for module in MODULES for m in vars(module).values()):
            if isinstance(function, JITFunction):
                function.device_caches.clear()
        driver.set_active(Device(capability))
        cases = build_cases(everything)
        cases |= value_cases(torch.float32, everything) | token_cases(torch.float32, everything)
        if everything:
            cases |= value_cases(torch.float64, False) | token_cases(torch.float64, False)
        seen: set[str] = set()
        for case, call in cases.items():
            compiled.clear()
            call()
            for kernel, binary in compiled:
                if binary.hash not in seen:
                    seen.add(binary.hash)
                    print(json.dumps(report(case, kernel, capability, binary)), flush=True)


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:] if argument != "all"], "all" in sys.argv)
