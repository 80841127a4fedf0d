"""Raw function of returns on CUDA tensors. The kernels: csrc/cuda/returns.cu."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from torch import Tensor

from fastreward._arguments.options import (
    AT_MASKED,
    RETURNS_KINDS,
    RETURNS_OPS,
    ReturnsInputs,
    ReturnsOptions,
)
from fastreward._arguments.tokens import Tokens
from fastreward.cuda._launch import countable, launch, pack

_SOURCE: Final = "returns"
# As in the source.
_THREADS: Final = 256
_LOOP_THREADS: Final = 64


def scan(
    inputs: ReturnsInputs,
    tokens: Tokens,
    numbers: Sequence[float] | Tensor,
    options: ReturnsOptions,
    out: Tensor,
    second: Tensor | None,
) -> None:
    """Writes the results of `options.kind`: one launch."""
    rows = tokens.rows
    if rows == 0 or out.numel() == 0:
        return
    known, given = ([1.0] * 5, numbers) if isinstance(numbers, Tensor) else (numbers, None)
    mask, kind = countable(tokens.mask)
    per_row = [x is not None and tuple(x.shape) != tokens.shape for x in (inputs.gamma, inputs.lam)]
    arguments = pack(
        *inputs, mask, kind, tokens.cu_seqlens, rows, tokens.shape[-1], *map(int, per_row),
        RETURNS_KINDS.index(options.kind), AT_MASKED.index(options.at_masked), RETURNS_OPS.index(options.op),
        int(options.reverse), int(options.move), *map(float, known), given, out, second,
    )  # fmt: skip
    if options.op == "sum":
        launch(_SOURCE, "returns_scan", rows, _THREADS, arguments, out.device)
    else:
        launch(_SOURCE, "returns_loop", -(-rows // _LOOP_THREADS), _LOOP_THREADS, arguments, out.device)
