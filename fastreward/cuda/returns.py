"""Raw function of returns on CUDA tensors. The kernels: csrc/cuda/returns.cu."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from fastreward._arguments.options import (
    AT_MASKED,
    RETURNS_KINDS,
    RETURNS_OPS,
    ReturnsInputs,
    ReturnsOptions,
)
from fastreward._arguments.tokens import Tokens, few_and_long
from fastreward.cuda._launch import countable, launch, pack

_SOURCE: Final = "returns"
# As in the source.
_THREADS: Final = 256
_TILE: Final = 1024
_LOOP_THREADS: Final = 64
_WARP: Final = 32


def scan(
    inputs: ReturnsInputs,
    tokens: Tokens,
    numbers: Sequence[float] | Tensor,
    options: ReturnsOptions,
    out: Tensor,
    second: Tensor | None,
) -> None:
    """Writes the results of `options.kind`: one launch, or several where rows are few and long."""
    rows = tokens.rows
    if rows == 0 or out.numel() == 0:
        return
    scans = options.scans(inputs, numbers)
    in_tiles = scans and few_and_long(tokens, _TILE)
    known, given = ([1.0] * 5, numbers) if isinstance(numbers, Tensor) else (numbers, None)
    mask, kind = countable(tokens.mask)
    per_row = [x is not None and tuple(x.shape) != tokens.shape for x in (inputs.gamma, inputs.lam)]
    slots = _slots(tokens) if in_tiles else 0
    arguments = pack(
        *inputs, mask, kind, tokens.cu_seqlens, rows, tokens.shape[-1], *map(int, per_row),
        RETURNS_KINDS.index(options.kind), AT_MASKED.index(options.at_masked), RETURNS_OPS.index(options.op),
        int(options.reverse), int(options.move), *map(float, known), given, out, second,
        slots, *(_scratch(slots, rows, out.device, mask is not None) if in_tiles else (None, None, None)),
    )  # fmt: skip

    def run(kernel: str, grid: int, block: int = _THREADS) -> None:
        launch(_SOURCE, kernel, grid, block, arguments, out.device)

    if not scans:
        run("returns_loop", -(-rows // _LOOP_THREADS), _LOOP_THREADS)
    elif not in_tiles:
        run("returns_scan", rows)
    else:
        if mask is not None:
            run("returns_reach", slots)
            run("returns_passed", slots)
            run("returns_join_passed", rows, _WARP)
        run("returns_maps", slots)
        run("returns_join_maps", rows, _WARP)
        run("returns_results", slots)


def _slots(tokens: Tokens) -> int:
    """Room for the tiles of all rows, as the source lays them out."""
    columns = tokens.shape[-1]
    return tokens.rows * (columns // _TILE + 2) if tokens.cu_seqlens is None else columns // _TILE + 2 * tokens.rows


def _scratch(slots: int, rows: int, device: torch.device, masked: bool) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """reach i64 [rows], passed [slots] of 20 bytes, maps f32 [slots, 2]."""
    maps = torch.empty((slots, 2), device=device)
    if not masked:
        return None, None, maps
    reach = torch.zeros(rows, dtype=torch.int64, device=device)
    return reach, torch.empty((slots, 5), dtype=torch.int32, device=device), maps
