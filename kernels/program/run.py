"""Runs loss programs: `run` launches generated kernels, `scale` and `broadcast_to_tokens` are their backward.

Fused: all elementwise operators and reductions of a loss, its metrics and its derivative (source.py). A pass
over the tokens is one launch, after a memset of the counter by which its last program knows itself; a loss whose
gradient needs no reduction first, such as PPO before the aggregation's weight, has one. No host sync.

The same call gives the same bits every time. What a token computes from its own inputs does not depend on its batch.
Sums over a sequence's tokens do, in their last bits: their order follows the tile and how many programs share a row
(`tiling`), which follow B, N or T, and packing. Those that come back to a token or a sequence are f64 (`precise`), so
that in another batch their f32 value differs about once in 1e8; what is then compared with a bound, such as GSPO's
ratio, may end up on its other side. csrc/cpu and csrc/cuda cut a row into pieces of one size: no such exception there.

A pass with scans gives each row, or eight short ones, to one program, which goes along it tile by tile (scans.py).
Where rows are few and long, programs share a row's tiles: a launch before has what each tile makes of what comes into
it, and a program folds those before its own, so that tokens have the bits that one program alone would give them. Not
so where a scan is made of another of the same pass (`formulas.alone`): there one program goes along, a tile of 512
tokens after the other (256 where rows are packed, or odd), each of which waits for its loads.

Bytes a token: each pass 4 for each tensor that it reads, 1 for the mask, and 4 for each that it writes; scale 8,
broadcast_to_tokens 5. A mask of another type than bool, uint8 or int8 is converted first (mask_bytes).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastreward._arguments.tokens import Tokens
from fastreward.language.program import Program

from .._shared.launch import OPTIONS, arrival_counter, mask_bytes, on_device_of
from .arguments import Argument
from .module import load
from .source import Generated, Launch, generate, source
from .tokens import before, row_bounds, tile_columns, wide

__all__ = ["broadcast_to_tokens", "run", "scale", "source"]

# --------------------------------------------------------------------------------------------------------- config
# A tile is [ROWS, STEPS, LANES, VEC] tokens: by the mean length 1 long row or 8 short ones, of 4 or 8 tokens a thread.
# VEC = 4 (16-byte loads) where T is a multiple of 4; else, and for packed rows, which start anywhere, 1. So a loss is
# compiled four times over at most, for packed rows twice (and again if it is called with a mask and without one). A
# long row is dealt, tile by tile, to as many programs as fill the machine. Registers are stated where ptxas, left
# alone, spills some to get below the next step of occupancy.
WARPS = 4
FILL = 1056  # programs that fill an H100: 132 SMs, 8 programs each
MOST_CHUNKS = 64  # programs that may share a row
LONG = 512  # mean tokens a row from which one row makes a tile
FEW = FILL // 4  # rows from which a program for each is enough for scans
SCANNED = 4096  # tokens that are worth a program of their own in a scan
BLOCK_ROWS = 128  # sequences that the last program takes at once
REGISTERS = 128  # short rows: four programs an SM
CROSS_SEQUENCE_REGISTERS = 168  # work per sequence with reductions over groups or ranks: three


def tiling(rows: int, tokens: int, longest: int) -> tuple[int, int]:
    """(rows per tile, programs per group of rows) for `rows` rows that hold `tokens` tokens."""
    if tokens < LONG * rows or rows == 0:
        return 8, 1
    return 1, max(1, min(triton.cdiv(FILL, rows), triton.cdiv(longest, 1024), MOST_CHUNKS))


def sharing(rows: int, tokens: int, longest: int) -> int:
    """Programs that share a row with scans."""
    if tokens < LONG * rows or rows == 0 or rows > FEW:
        return 1
    return max(1, min(-(-FILL // rows), longest // SCANNED, MOST_CHUNKS))


def tile(together: int, vec: int, scans: bool = False) -> dict[str, Any]:
    """The tile of `together` rows; half of it where scans hold f64 pairs."""
    steps = {(1, 4): 2, (1, 1): 4, (8, 4): 1, (8, 1): 2}[together, vec]
    steps = max(1, steps // 2) if scans else steps
    shape: dict[str, Any] = {"ROWS": together, "STEPS": steps, "LANES": 32 * WARPS // together, "VEC": vec}
    registers = {"maxnreg": REGISTERS} if together > 1 else {}
    return {**shape, **registers, "num_warps": WARPS}


# --------------------------------------------------------------------------------------------------------- kernel
@triton.jit(do_not_specialize=["N", "row_units", "B", "chunks"])
def _scale_kernel(
    saved,  # f32 [B, T] or [N]
    sequence_weight,  # f32 [B]
    grad_loss,  # f32 []
    cu_seqlens,  # i64 [B + 1]
    out,  # f32 like saved
    N, row_units, B, chunks,  # T = row_units * VEC
    PACKED: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    ROWS: tl.constexpr, STEPS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """8 bytes a token. A gradient of 0 stays 0 whatever the upstream one is."""
    T = row_units * VEC
    program = tl.program_id(0)
    row = (program // chunks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_ok = row < B
    start, _, extent = row_bounds(cu_seqlens, row, row_ok, N, T, B, PACKED)
    factor = tl.zeros([ROWS], tl.float32) + tl.load(grad_loss)
    if HAS_WEIGHT:
        factor *= tl.load(sequence_weight + row, mask=row_ok, other=0.0)
    TILE: tl.constexpr = STEPS * LANES * VEC
    offsets = tile_columns(STEPS, LANES, VEC)
    for t0 in range((program % chunks) * TILE, tl.max(extent, axis=0), chunks * TILE):
        t = t0 + offsets
        inside = before(t, extent, row_ok, T, PACKED)
        at = wide(start) + t
        x = tl.load(saved + at, mask=inside, other=0.0)
        tl.store(out + at, tl.where(x == 0.0, 0.0, x * wide(factor)), mask=inside)


@triton.jit(do_not_specialize=["N", "row_units", "B", "chunks"])
def _broadcast_to_tokens_kernel(
    sequence_values,  # f32 [B]
    grad_loss,  # f32 []
    mask,  # u8 like out, nonzero = valid
    cu_seqlens,  # i64 [B + 1]
    out,  # f32 [B, T] or [N]
    N, row_units, B, chunks,  # T = row_units * VEC
    PACKED: tl.constexpr, HAS_MASK: tl.constexpr,
    ROWS: tl.constexpr, STEPS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """4 + m bytes a token. A gradient of 0 stays 0 whatever the upstream one is."""
    T = row_units * VEC
    program = tl.program_id(0)
    row = (program // chunks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_ok = row < B
    start, tokens, extent = row_bounds(cu_seqlens, row, row_ok, N, T, B, PACKED)
    value = tl.load(sequence_values + row, mask=row_ok, other=0.0)
    value = wide(tl.where(value == 0.0, 0.0, value * tl.load(grad_loss)))
    TILE: tl.constexpr = STEPS * LANES * VEC
    offsets = tile_columns(STEPS, LANES, VEC)
    for t0 in range((program % chunks) * TILE, tl.max(extent, axis=0), chunks * TILE):
        t = t0 + offsets
        inside = before(t, extent, row_ok, T, PACKED)
        valid = before(t, tokens, row_ok, T, PACKED)
        at = wide(start) + t
        if HAS_MASK:
            valid = valid & (tl.load(mask + at, mask=inside, other=0) != 0)
        tl.store(out + at, tl.where(valid, value, 0.0), mask=inside)


# --------------------------------------------------------------------------------------------------------- launch
@lru_cache(maxsize=4096)
def prepared(program: Program) -> Generated:
    """Source and launches of a program; programs are kept by those who trace them, so identity will do."""
    return generate(program)


def run(
    program: Program,
    inputs: Sequence[Tensor],  # one per program.inputs, contiguous f32: TOKEN like the tokens, SEQUENCE [B], BATCH []
    sides: Sequence[Tokens],
    scalars: Sequence[float],  # values of program.scalars
    groups: Tensor | None,  # i64 [B], numbers 0 .. G - 1 in any order
) -> tuple[list[Tensor], Tensor]:
    """(outputs f32, each like its tokens or [B]; batch values f32 [M])."""
    generated = prepared(program)
    call = Call(program, inputs, sides, scalars, groups)
    call.launch(load("program", generated.source), generated, len(generated.launches))
    return call.outputs[: len(program.outputs)], call.batch


class Call:
    """The tensors of a call, and the launches on them."""

    def __init__(
        self,
        program: Program,
        inputs: Sequence[Tensor | None],
        sides: Sequence[Tokens],
        scalars: Sequence[float],
        groups: Tensor | None,
        like: Tensor | None = None,
    ) -> None:
        self.scalars = scalars
        self.sides = [_with_mask_bytes(side) for side in sides]
        self.rows = sides[0].rows
        self.like = _any_tensor(inputs, sides) if like is None else like
        kept = [self._empty(sides[n.side].shape) for n, _ in program.kept]
        own = [self._empty(sides[n.side].shape if n.level == 3 else (self.rows,)) for n in program.outputs]
        self.inputs, self.outputs = [*inputs, *kept], [*own, *kept]
        self.batch = self._empty((len(program.batch),))
        self.named: dict[str, Tensor | None] = {"batch": self.batch, "groups": groups}
        if program.groups:
            assert groups is not None
            in_order, self.named["order"] = torch.sort(groups, stable=True)
            bounds = torch.arange(self.rows + 1, device=groups.device)
            self.named["starts"] = torch.searchsorted(in_order, bounds)

    def launch(self, module: ModuleType, generated: Generated, count: int) -> None:
        """The first `count` launches."""
        launches = generated.launches[:count]
        partials = max((self._partials(launch) for launch in launches), default=0)
        scratch = (generated.columns * self.rows + partials, generated.values)
        for name, size in zip(("columns", "values"), scratch, strict=True):
            self.named[name] = torch.empty(size, dtype=torch.float64, device=self.like.device)
        maps = max((self._maps(launch) for launch in launches), default=0)
        self.named["maps"] = torch.empty(maps, dtype=torch.float64, device=self.like.device) if maps else None
        if any(a.kind == "counter" for launch in launches for a in launch.arguments):
            self.named["counter"] = arrival_counter(self.like)
        with on_device_of(self.like):
            for launch in launches:
                self._launch(getattr(module, launch.kernel), launch)

    def argument(self, argument: Argument, tokens: Tokens | None) -> Any:
        """The value of one of a kernel's arguments."""
        if argument.kind == "input":
            return self.inputs[argument.index]
        if argument.kind == "scalar":
            return float(self.scalars[argument.index])
        if argument.kind == "output":
            return self.outputs[argument.index]
        if argument.kind in ("mask", "cu_seqlens"):
            return getattr(tokens, argument.kind)
        return self.named[argument.kind]

    def _launch(self, kernel: Any, launch: Launch) -> None:
        tokens = None if launch.side is None else self.sides[launch.side]
        given = [self.argument(a, tokens) for a in launch.arguments]
        if tokens is None:
            kernel[(1,)](
                *given, self.rows, BLOCK_ROWS=BLOCK_ROWS, num_warps=WARPS, maxnreg=CROSS_SEQUENCE_REGISTERS, **OPTIONS
            )
            return
        sizes, flavour, programs = geometry(tokens, launch.scans > 0, launch.alone)
        shared = sizes[-1] > 1
        if launch.maps and not shared:
            return
        if launch.alone and not launch.maps:
            flavour["SHARED"] = shared
        if launch.cross_sequence:
            flavour["maxnreg"] = CROSS_SEQUENCE_REGISTERS
        kernel[(programs,)](
            *given, *sizes, **flavour, HAS_MASK=tokens.mask is not None, BLOCK_ROWS=BLOCK_ROWS, **OPTIONS
        )

    def _partials(self, launch: Launch) -> int:
        """Partial results of rows that several programs share."""
        if launch.side is None:
            return 0
        chunks = geometry(self.sides[launch.side], launch.scans > 0, launch.alone)[0][-1]
        return launch.reductions * self.rows * chunks if chunks > 1 else 0

    def _maps(self, launch: Launch) -> int:
        """Numbers that the maps of all rows' tiles are."""
        if launch.side is None or not launch.maps:
            return 0
        (count, _, rows, chunks), flavour, _ = geometry(self.sides[launch.side], True, True)
        block = flavour["STEPS"] * flavour["LANES"] * flavour["VEC"]
        return 2 * launch.scans * (count // block + rows) if chunks > 1 else 0

    def _empty(self, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.like.device)


def scale(
    saved: Tensor,  # f32 [B, T] or [N], contiguous
    sequence_weight: Tensor | None,  # f32 [B]
    grad_loss: Tensor,  # f32 []
    tokens: Tokens,
) -> Tensor:
    """Saved times grad_loss, and times the row's weight where there is one; a 0 in `saved` stays 0."""
    out = torch.empty_like(saved)
    sizes, flavour, programs = geometry(tokens)
    with on_device_of(saved):
        _scale_kernel[(programs,)](
            saved, sequence_weight, grad_loss, tokens.cu_seqlens, out, *sizes, **flavour,
            HAS_WEIGHT=sequence_weight is not None, **OPTIONS,
        )  # fmt: skip
    return out


def broadcast_to_tokens(
    sequence_values: Tensor,  # f32 [B]
    grad_loss: Tensor,  # f32 []
    tokens: Tokens,
) -> Tensor:
    """sequence_values[sequence] * grad_loss on valid tokens, 0 elsewhere: f32 in tokens.shape."""
    out = torch.empty(tokens.shape, dtype=torch.float32, device=sequence_values.device)
    sizes, flavour, programs = geometry(tokens)
    mask = mask_bytes(tokens.mask)
    with on_device_of(sequence_values):
        _broadcast_to_tokens_kernel[(programs,)](
            sequence_values, grad_loss, mask, tokens.cu_seqlens, out, *sizes, **flavour,
            HAS_MASK=mask is not None, **OPTIONS,
        )  # fmt: skip
    return out


def geometry(
    tokens: Tokens, scans: bool = False, alone: bool = False
) -> tuple[tuple[int, int, int, int], dict[str, Any], int]:
    """((N, row_units, B, chunks), the compile-time part, programs) of a pass over tokens.

    scans: programs can share rows only where the scans are `alone`.
    """
    rows, count, longest = extent(tokens)
    together, chunks = tiling(rows, count, longest)
    if scans:
        chunks = sharing(rows, count, longest) if alone else 1
    packed = tokens.cu_seqlens is not None
    vec = 4 if not packed and longest % 4 == 0 else 1
    programs = max(triton.cdiv(rows, together) * chunks, 1)
    return (count, longest // vec, rows, chunks), {"PACKED": packed, **tile(together, vec, scans)}, programs


def extent(tokens: Tokens) -> tuple[int, int, int]:
    """(rows, tokens, longest row as far as the host knows)."""
    if tokens.cu_seqlens is None:
        return tokens.shape[0], tokens.shape[0] * tokens.shape[1], tokens.shape[1]
    return tokens.rows, tokens.shape[0], tokens.shape[0]


def _with_mask_bytes(tokens: Tokens) -> Tokens:
    """Tokens with their mask as kernels take it."""
    mask = mask_bytes(tokens.mask)
    return tokens if mask is tokens.mask else replace(tokens, mask=mask)


def _any_tensor(inputs: Sequence[Tensor | None], sides: Sequence[Tokens]) -> Tensor:
    """A tensor of the call, for its device."""
    for x in (*inputs, *(t for side in sides for t in (side.mask, side.cu_seqlens))):
        if x is not None:
            return x
    return torch.empty(0)
