"""CPU backend of `returns`: torch tensors to pointers for csrc/cpu/returns. Inputs are validated already."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastreward import _core
from fastreward._arguments.options import (
    AT_MASKED,
    RETURNS_KINDS,
    RETURNS_OPS,
    ReturnsInputs,
    ReturnsOptions,
)
from fastreward._arguments.tokens import Tokens
from fastreward._runtime.addresses import address, mask_arguments


def scan(
    inputs: ReturnsInputs,
    tokens: Tokens,
    numbers: Sequence[float] | Tensor,
    options: ReturnsOptions,
    out: Tensor,
    second: Tensor | None,
) -> None:
    """Writes the results of `options.kind`; the kernel finds what is not finite, after it has written."""
    mask, mask_kind = mask_arguments(tokens.mask)
    finite = _core.returns_scan(
        [*map(address, inputs), mask, address(tokens.cu_seqlens)],
        list(numbers) if not isinstance(numbers, Tensor) else numbers.tolist(),
        [
            RETURNS_KINDS.index(options.kind),
            AT_MASKED.index(options.at_masked),
            RETURNS_OPS.index(options.op),
            options.reverse,
            options.move,
            mask_kind,
            *(x is not None and tuple(x.shape) != tokens.shape for x in (inputs.gamma, inputs.lam)),
        ],
        tokens.rows,
        tokens.shape[-1],
        address(out),
        address(second),
        torch.get_num_threads(),
    )
    if not finite:
        inputs.check_finite(tokens.mask)
