"""CPU backend of programs of the loss language: torch tensors to pointers for csrc/cpu/program/."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastreward import _core
from fastreward._arguments.tokens import Tokens
from fastreward._runtime.addresses import address, mask_arguments
from fastreward._runtime.memory import empty
from fastreward.cpu.program.encode import encode
from fastreward.language.node import Level
from fastreward.language.program import Program


def run(
    program: Program,
    inputs: Sequence[Tensor],  # one per program.inputs, f32 contiguous: as the tokens of its side, [B] or []
    sides: Sequence[Tokens],
    scalars: Sequence[float],  # the values of program.scalars
    groups: Tensor | None,  # [B] i64: numbers 0, 1, ... of the sequences' groups
) -> tuple[list[Tensor], Tensor]:
    """(outputs f32 as the tokens of their side or [B], batch values f32 [M]). Tokens in f32, all else in f64."""
    sequences = sides[0].rows
    outputs = [
        empty(sides[n.side].shape if n.level == Level.TOKEN else (sequences,), torch.float32) for n in program.outputs
    ]
    kept = [empty(sides[n.side].shape, torch.float32) for n, _ in program.kept]
    batch = torch.empty(len(program.batch), dtype=torch.float32, device="cpu")
    _core.program_run(
        program=encode(program),
        sides=[_tokens(side) for side in sides],
        inputs=[x.data_ptr() for x in (*inputs, *kept)],
        scalars=list(scalars),
        groups=address(groups),
        outputs=[x.data_ptr() for x in (*outputs, *kept)],
        batch=batch.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return outputs, batch


def threshold(x: Tensor, bound: float | Tensor, tokens: Tokens, share: bool) -> Tensor:
    """The largest of the valid x up to which their mean is below the bound, the smallest where none is; f32 [].

    share: the smallest of the floor(bound * count) largest, at least of one. NaN are left out; inf of none.
    """
    found = _core.program_threshold(_tokens(tokens), x.data_ptr(), float(bound), share, torch.get_num_threads())
    return torch.tensor(found, dtype=torch.float32)


def scale(
    saved: Tensor,  # f32, as the tokens
    sequence_weight: Tensor | None,  # f32 [B]
    grad_loss: Tensor,  # [] f32
    tokens: Tokens,
) -> Tensor:
    """saved * sequence_weight[sequence] * grad_loss; a 0 stays 0."""
    out = empty(saved.shape, torch.float32)
    _core.program_scale(
        _tokens(tokens),
        saved.data_ptr(),
        address(sequence_weight),
        float(grad_loss),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def broadcast_to_tokens(sequence_values: Tensor, grad_loss: Tensor, tokens: Tokens) -> Tensor:
    """sequence_values [B] times grad_loss on valid tokens, 0 elsewhere; f32 in the tokens' shape."""
    out = empty(tokens.shape, torch.float32)
    _core.program_broadcast_to_tokens(
        _tokens(tokens), sequence_values.data_ptr(), float(grad_loss), out.data_ptr(), torch.get_num_threads()
    )
    return out


def _tokens(tokens: Tokens) -> tuple[int, int, int, int, int]:
    """(sequences, columns of the padded layout, cu_seqlens, mask, mask kind)."""
    columns = tokens.shape[1] if tokens.cu_seqlens is None else 0
    return (tokens.rows, columns, address(tokens.cu_seqlens), *mask_arguments(tokens.mask))
