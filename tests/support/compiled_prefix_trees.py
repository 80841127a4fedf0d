"""Compiles the Triton kernels of prefix trees; a program, for test_prefix_tree_compile.py.

With `all` on the command line: all modes, and float64 too, which takes minutes more.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

import compiled
import torch
from fastreward.kernels import prefix_tree

from fastreward._arguments.options import PLACES, TOKEN_OPS, TREE_MODES, AdvantageOptions, AggregateOptions
from fastreward._runtime.layout import NODES, ROWS

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
        f"propagate, {dtype}": lambda: prefix_tree.propagate_backward(
            nodes, nodes, nodes, *forest, (0.5, 0.1, math.inf)
        ),
    }


def token_cases(dtype: torch.dtype, everything: bool) -> dict[str, Callable[[], object]]:
    forest = torch.zeros((len(NODES), 3 * B), dtype=torch.int64), torch.zeros((len(ROWS), B), dtype=torch.int64)
    nodes, rows, tokens = (torch.zeros(n, dtype=dtype) for n in (3 * B, B, B * T))
    extents, mask = torch.arange(B + 1) * T, torch.ones(B * T, dtype=torch.bool)

    def both_ways() -> None:
        for place in PLACES if everything else PLACES[:1]:
            prefix_tree.broadcast_to_tokens(nodes, *forest, extents, mask, place, B * T, rows)
            prefix_tree.collect(tokens, *forest, extents, mask, place)
        prefix_tree.gather(tokens, *forest, extents, None, B * T)
        for op in TOKEN_OPS if everything else TOKEN_OPS[1:]:
            prefix_tree.scatter_reduce(tokens, *forest, extents, mask, op, B * T)

    def numbers() -> None:
        prefix_tree.node_of_token(*forest, extents, B * T)
        prefix_tree.unique_of_token(*forest, extents, B * T)
        prefix_tree.layout(torch.zeros(B * T, dtype=torch.int32), *forest, B * T)
        prefix_tree.lengths(mask, extents, prefix_tree.starts(mask, extents))

    return {f"tokens, {dtype}": both_ways} | ({"numbers": numbers} if dtype == torch.float32 else {})


def cases(everything: bool) -> dict[str, Callable[[], object]]:
    found = build_cases(everything) | value_cases(torch.float32, everything) | token_cases(torch.float32, everything)
    return found | value_cases(torch.float64, False) | token_cases(torch.float64, False) if everything else found


if __name__ == "__main__":
    compiled.main(lambda _: cases("all" in sys.argv))
