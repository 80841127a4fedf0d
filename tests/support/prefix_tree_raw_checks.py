"""Checks of a GPU backend's raw functions for prefix trees against the CPU backend's: equal integers, close values.

Run by test_prefix_tree.py in tests/backends/triton/interpreted and in tests/backends/gpu, and by
tests/backends/cuda/test_prefix_tree_emulated.py. Batches are made on the CPU, where the C++ backend runs, and copied to
`device`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from prefix_tree_checks import random_branches, rows_of_tokens
from torch import Tensor

from fastreward._arguments.options import (
    OVERS,
    PLACES,
    TOKEN_OPS,
    TREE_MODES,
    TREE_OPS,
    AdvantageOptions,
    AggregateOptions,
)
from fastreward._runtime.layout import NODES, ROWS
from fastreward.cpu import prefix_tree as cpu

INF = math.inf
#: What an empty place holds, where that is a number.
EMPTY = {"parent": -1, "depth": 0, "edge_start": 0, "edge_length": 0, "count": 0, "first_row": 0, "children": 0}


# ----------------------------------------------------------------------------------------------------------- batches
@dataclass
class Batch:
    """Arguments of `build`, with the extents of the rows; on the CPU."""

    tokens: Tensor | None
    parent: Tensor | None
    position: Tensor | None
    starts: Tensor
    lengths: Tensor
    group: Tensor
    extents: Tensor
    ordered: bool = False
    compress: bool = True

    @property
    def flat(self) -> int:
        """Tokens of the flat memory."""
        return int(self.extents[-1])

    def build(self, module: Any, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """The forest as a backend builds it, on its device."""
        given = (self.tokens, self.parent, self.position, self.starts, self.lengths, self.group)
        return module.build(*(x if x is None else x.to(device) for x in given), self.ordered, self.compress)


def batch_of(rows: list[list[int]], group: list[int], r: random.Random, *, padded: bool = True) -> Batch:
    """Rows of tokens, padded on both sides or packed, in one of the types that tokens have."""
    width = max(map(len, rows), default=0) + r.randint(0, 3)
    before = [r.randint(0, width - len(row)) if r.random() < 0.5 else 0 for row in rows] if padded else [0] * len(rows)
    sizes = [width if padded else len(row) for row in rows]
    extents = torch.tensor([0, *sizes]).cumsum(0)
    flat = [99 + 2 * (i % 2) for i in range(int(extents[-1]))]
    starts = [int(e) + b for e, b in zip(extents, before, strict=False)]
    for start, row in zip(starts, rows, strict=True):
        flat[start : start + len(row)] = row
    dtype = r.choice((torch.int32, torch.int64))
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    labels = torch.tensor(group, dtype=torch.int64)
    return Batch(torch.tensor(flat, dtype=dtype), None, None, torch.tensor(starts).long(), lengths, labels, extents)


def token_batch(seed: int, most_rows: int = 14, longest: int = 150) -> Batch:
    """Ragged rows that share prefixes within and beyond blocks of 32 tokens: copies, prefixes of others, empty ones."""
    r = random.Random(seed)
    count = r.randint(1, most_rows)
    scale = r.choice((1, 1, 7, max(longest // 10, 1)))
    columns = r.randint(1, 10) if scale > 1 else r.randint(1, 12)
    rows = [[x for x in row for _ in range(scale)] for row in rows_of_tokens(r, count, columns, r.choice((1, 2, 3)))]
    for row in r.sample(rows, count // 2):
        row[r.randrange(len(row))] = r.choice((5, 2**31 - 1))
    rows = [row[: r.choice((0, len(row), len(row), r.randint(0, len(row))))] for row in rows]
    labels = r.choice(([0], [7, -3, 10**12], [0, 2**63 - 1, -(2**63)], list(range(count))))
    batch = batch_of(rows, [r.choice(labels) for _ in rows], r, padded=r.random() < 0.7)
    batch.compress = scale > 1 or r.random() < 0.5  # a node for each of many tokens makes many levels
    if r.random() < 0.2:  # numbers that are an order
        labels = sorted(set(batch.group.tolist()), key=lambda label: label % 11)
        batch.group = torch.tensor([labels.index(label) for label in batch.group.tolist()])
        batch.ordered = True
    return batch


def branch_batch(seed: int, most_rows: int = 14) -> Batch | None:
    """Branches in any order; None where there are no rows."""
    given = random_branches(random.Random(seed), most_rows, 30)
    count = len(given["parent"])
    columns = int(given["lengths"].max()) if count else 0
    extents = torch.arange(count + 1) * columns
    if count == 0:
        return None
    return Batch(
        None,
        given["parent"],
        given["branch_position"],
        extents[:-1].contiguous(),
        given["lengths"],
        given["group_ids"],
        extents,
    )


# ------------------------------------------------------------------------------------------------------------- build
def check_build(module: ModuleType, device: str, batch: Batch) -> None:
    """Every array as on the CPU, and empty places behind the nodes."""
    nodes, rows, sizes = (x.cpu() for x in batch.build(module, device))
    want = batch.build(cpu)
    assert torch.equal(sizes, want[2]), f"sizes {sizes.tolist()}, expected {want[2].tolist()}"
    count, unique = int(sizes[0]), int(sizes[2])
    room = 3 * len(batch.lengths) if batch.compress or batch.tokens is None else batch.flat + len(batch.lengths)
    assert nodes.shape == (len(NODES), room)
    for name, got, expected in zip(NODES, nodes[:, :count], want[0], strict=True):
        assert torch.equal(got, expected), f"{name}: {got.tolist()}, expected {expected.tolist()}"
    for name, got, expected in zip(ROWS, rows, want[1], strict=True):
        assert torch.equal(got, expected), f"{name}: {got.tolist()}, expected {expected.tolist()}"
    numbers = torch.arange(count, room)
    rest = EMPTY | {"token_begin": unique, "token_tout": unique, "row_begin": len(batch.lengths)}
    for name, got in zip(NODES, nodes[:, count:], strict=True):
        expected = {"tout": numbers + 1, "root": numbers}.get(name, torch.full_like(numbers, rest.get(name, 0)))
        assert torch.equal(got, expected), f"empty places, {name}: {got.tolist()}"


class WithRoom:
    """The CPU's forests with empty places behind the nodes, as the GPU's have: for a backend that builds none."""

    @staticmethod
    def build(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
        """As the raw function."""
        nodes, rows, sizes = cpu.build(*given)
        count, room = nodes.shape[1], nodes.shape[1] + 2 * rows.shape[1]
        out = torch.empty((len(NODES), room), dtype=torch.int64)
        out[:, :count] = nodes
        rest = EMPTY | {"token_begin": int(sizes[2]), "token_tout": int(sizes[2]), "row_begin": rows.shape[1]}
        for k, name in enumerate(NODES):
            numbers = torch.arange(count, room)
            out[k, count:] = {"tout": numbers + 1, "root": numbers}.get(name, torch.tensor(rest.get(name, 0)))
        return out, rows, sizes


# ------------------------------------------------------------------------------------------------------------ values
class Forests:
    """The same batch as a backend's forest and as the CPU's, whose nodes are the first of the backend's.

    builder: what builds for a backend that does not.
    """

    def __init__(self, module: ModuleType, device: str, batch: Batch, seed: int, builder: Any = None) -> None:
        self.module, self.device, self.batch = module, device, batch
        self.packs = builder is None
        self.r, self.g = random.Random(seed), torch.Generator().manual_seed(seed)
        self.here = tuple(x for x in batch.build(builder or module, device)[:2])
        self.there = batch.build(cpu)[:2]
        self.nodes, self.places = self.there[0].shape[1], self.here[0].shape[1]
        self.unique = int((self.there[0][NODES.index("edge_length")]).sum())
        self.dtype = self.r.choice((torch.float32, torch.float64))

    def random(self, size: int) -> Tensor:
        """Values in the type of this forest."""
        return torch.randn(size, generator=self.g, dtype=torch.float64).to(self.dtype)

    def partly(self, x: Tensor, share: float = 0.3) -> Tensor:
        """`x` with NaN in some places, half of the time: what is not there."""
        gone = torch.rand(len(x), generator=self.g) < (share if self.r.random() < 0.5 else 0.0)
        return torch.where(gone, torch.nan, x)

    def number(self, x: float) -> float | Tensor:
        """A number as the host knows it, or as the device does."""
        if self.module.__name__.startswith(("fastreward.kernels", "fastreward.cuda")) and self.r.random() < 0.5:
            return torch.tensor(x, dtype=torch.float64, device=self.device)
        return x

    def padded(self, x: Tensor, places: int) -> Tensor:
        """`x` on the device, with numbers behind it that nobody should read."""
        return torch.cat([x, x.new_full((places - len(x),), 1e30)]).to(self.device)

    def same(self, got: Tensor, want: Tensor, what: object) -> None:
        """Close values, and zeros behind them."""
        tolerance = 1e-12 if want.dtype == torch.float64 else 1e-6
        assert got.dtype == want.dtype, what
        torch.testing.assert_close(
            got.cpu()[: len(want)], want, atol=tolerance, rtol=tolerance, equal_nan=True, msg=lambda m: f"{what}: {m}"
        )
        assert not got[len(want) :].any(), f"{what}: empty places {got[len(want) :].tolist()}"


def aggregations(r: random.Random) -> Iterator[AggregateOptions]:
    """Every op over sequences and over children."""
    for op in TREE_OPS:
        for over in OVERS:
            yield AggregateOptions(
                op,
                over,
                normalized=op == "logsumexp" and r.random() < 0.5,
                scale=r.choice((1.0, 3.0, -0.7)) if op == "logsumexp" else 1.0,
                discount=r.choice((1.0, 0.9, -0.5, 0.0)) if op in ("mean", "sum") else 1.0,
            )


def check_aggregates(f: Forests) -> None:
    """Values and gradients of every aggregate, weighted or not."""
    rows, to = len(f.batch.lengths), f.device
    for options in aggregations(f.r):
        values = f.partly(f.random(rows))
        weights = f.random(rows).abs() if f.r.random() < 0.5 else None
        if weights is not None:
            weights[f.r.randrange(rows)] = 0.0
        child = f.random(f.nodes).abs() + 0.1 if options.over == "children" and f.r.random() < 0.5 else None
        if f.r.random() < 0.2:
            values[f.r.randrange(rows)] = f.r.choice((torch.inf, -torch.inf))
        here = (
            values.to(to),
            None if weights is None else weights.to(to),
            None if child is None else f.padded(child, f.places),
            *f.here,
            replace(options, scale=f.number(options.scale), discount=f.number(options.discount)),
        )
        there = (values, weights, child, *f.there, options)
        f.same(f.module.aggregate(*here), cpu.aggregate(*there), options)
        if options.op in ("mean", "sum", "logsumexp"):
            grad = f.random(f.nodes)
            got = f.module.aggregate_backward(f.padded(grad, f.places), *here)
            f.same(got, cpu.aggregate_backward(grad, *there), f"gradient, {options}")


def check_advantages(f: Forests) -> None:
    """Every mode."""
    for mode in TREE_MODES:
        values = f.partly(f.random(f.nodes))
        for scale, singleton, ddof in (("std", "zero", 1), ("none", "raw", 0), ("std", "raw", 0)):
            o = AdvantageOptions(mode, scale, ddof, 1e-4, singleton)
            given = replace(o, eps=f.number(o.eps))
            got = f.module.advantages(f.padded(values, f.places), *f.here, given)
            f.same(got, cpu.advantages(values, *f.there, o), o)
            if mode != "sibling":
                break


def check_propagate(f: Forests) -> None:
    """The recurrence and its gradients, with bounds and without."""
    for rules in ((0.7, -INF, INF), (0.1, -0.55, INF), (-3.0, -0.4, 0.6), (0.5, 0.5, 0.5)):
        scale, shift, grad = f.partly(f.random(f.nodes), 0.1), f.random(f.nodes), f.random(f.nodes)
        if rules == (0.5, 0.5, 0.5):  # the bounds themselves, and what lies beyond them
            scale, shift = torch.ones_like(scale), (shift - 0.5).round().clamp(-1, 1)
        here = [f.padded(x, f.places) for x in (grad, scale, shift)]
        given = [f.number(x) for x in rules]
        f.same(f.module.propagate(*here[1:], *f.here, given), cpu.propagate(scale, shift, *f.there, rules), rules)
        got = f.module.propagate_backward(*here, *f.here, given)
        want = cpu.propagate_backward(grad, scale, shift, *f.there, rules)
        for x, y in zip(got, want, strict=True):
            f.same(x, y, f"gradient, {rules}")


# ------------------------------------------------------------------------------------------------------------ tokens
def mask_of(f: Forests, dtype: torch.dtype) -> Tensor:
    """Positions that get credit."""
    return (torch.rand(f.batch.flat, generator=f.g) < 0.7).to(dtype)


def check_tokens(f: Forests, mask: Tensor | None) -> None:
    """Between nodes, unique tokens and tokens, both ways."""
    extents, flat = f.batch.extents, f.batch.flat
    counted = None if mask is None else mask != 0  # the CPU backend takes fewer types
    there = (*f.there, extents, counted)
    here = (*f.here, extents.to(f.device), None if mask is None else mask.to(f.device))
    unique, tokens = f.random(f.unique), f.random(flat)
    for place in PLACES:
        values = f.partly(f.random(f.nodes))
        got = f.module.broadcast_to_tokens(f.padded(values, f.places), *here, place, flat)
        f.same(got, cpu.broadcast_to_tokens(values, *there, place, flat), place)
        own = f.partly(f.random(len(f.batch.lengths)))
        got = f.module.broadcast_to_tokens(f.padded(values, f.places), *here, place, flat, own.to(f.device))
        f.same(got, cpu.broadcast_to_tokens(values, *there, place, flat, own), f"{place}, values of rows")
        got = f.module.collect(tokens.to(f.device), *here, place)
        f.same(got, cpu.collect(tokens, *there, place), f"collect, {place}")
    room = max(flat, f.unique)
    f.same(f.module.gather(f.padded(unique, room), *here, flat), cpu.gather(unique, *there, flat), "gather")
    for op in TOKEN_OPS:
        got = f.module.scatter_reduce(tokens.to(f.device), *here, op, room)
        f.same(got, cpu.scatter_reduce(tokens, *there, op, f.unique), f"scatter_reduce, {op}")


def check_numbers(f: Forests) -> None:
    """Node and unique token of each token, and the layout of the unique ones."""
    extents, flat = f.batch.extents, f.batch.flat
    for name in ("node_of_token", "unique_of_token"):
        got = getattr(f.module, name)(*f.here, extents.to(f.device), flat)
        want = getattr(cpu, name)(*f.there, extents, flat)
        assert got.dtype == want.dtype
        assert torch.equal(got.cpu(), want), f"{name}: {got.tolist()}, expected {want.tolist()}"
    if f.batch.tokens is not None and f.packs:
        got = f.module.layout(f.batch.tokens.to(f.device), *f.here, flat)
        for x, want in zip(got, cpu.layout(f.batch.tokens, *f.there, f.unique), strict=True):
            assert torch.equal(x.cpu()[: f.unique], want)
            assert not x[f.unique :].any()


def check_values(
    module: ModuleType, device: str, batch: Batch, seed: int, mask: Any = torch.bool, builder: Any = None
) -> None:
    """Every operation on a forest; mask: the dtype of one, or None."""
    f = Forests(module, device, batch, seed, builder)
    check_aggregates(f)
    check_advantages(f)
    check_propagate(f)
    check_tokens(f, None if mask is None else mask_of(f, mask))
    check_numbers(f)


def check_rows(module: ModuleType, device: str, mask: Tensor, extents: Tensor) -> None:
    """Starts and lengths of masked rows."""
    starts = cpu.starts(mask != 0, extents)
    here = (mask.to(device), extents.to(device))
    assert torch.equal(module.starts(*here).cpu(), starts)
    for given in (None, starts):
        got = module.lengths(*here, None if given is None else given.to(device))
        assert torch.equal(got.cpu(), cpu.lengths(mask != 0, extents, given))
