"""Launches of a divergence's generated kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastreward._arguments.divergence import DivergenceCall
from fastreward.language.divergence_call import results, scalars_of, sums_of
from fastreward.language.divergence_programs import DivergencePrograms
from fastreward.language.program import Program

from .._shared.launch import OPTIONS, contiguous, in_units, load_width, on_device_of, temperature_arguments
from ..program.module import load
from ..program.source import Generated
from . import source

# --------------------------------------------------------------------------------------------------------- config
# Programs of 8 warps with a block of 4096 columns of each side, as in logprobs: 16 KiB of bf16 in flight, the next
# block's, in each of two or three programs an SM; an H200 needs about 26 KiB (4.8 TB/s / 132 SMs * 0.7 us). A load is
# 16 bytes of the wider side: a thread has the same columns of either.
BLOCK = 4096
WARPS = 8
LANES = 32 * WARPS
_MOMENTS = ("P", "Q", "P_LOG", "Q_LOG")  # constants of the kernel, as language.divergence_moments.Moments


def forward(
    programs: DivergencePrograms,
    logits: Tensor,  # [N, V] f32, bf16 or f16, unit column stride
    teacher_logits: Tensor,  # the same
    call: DivergenceCall,
    sums: int,  # of which derivatives: none, those for log p, those for log q too
    statistics: bool,  # whether entropies and agreement are wanted
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(outputs f32 [1 + sums, N], student's and teacher's values f32 [8, N], agreement f32 [N])."""
    asked = sums_of(programs, sums, call)
    outputs, student, teacher, agreement = results(asked.program, logits)
    n = logits.shape[0]
    if n == 0:
        return outputs, student, teacher, agreement
    generated = source.sums(asked.program)
    kernel = load("divergence", generated.source).divergence_forward
    sides, sizes, constants = _sides(logits, teacher_logits, call)
    with on_device_of(logits):
        kernel[(n,)](
            *_own(generated, asked.program, asked.scalars, {}), *asked.numbers,
            *sides, student, teacher, outputs, agreement, *sizes,
            **constants, **dict(zip(_MOMENTS, asked.used, strict=True)), MOMENTS=asked.by_moments,
            STATISTICS=statistics,
        )  # fmt: skip
    return outputs, student, teacher, agreement


def sums(
    programs: DivergencePrograms,
    logits: Tensor,  # [N, V of the slice]
    teacher_logits: Tensor,  # the same columns
    call: DivergenceCall,
    count: int,  # `sums` of forward
    student: Tensor,  # [8, N] f32, of the whole vocabulary
    teacher: Tensor,  # [8, N] f32
) -> Tensor:
    """f64 [1 + count, N]: what a slice of the vocabulary adds to forward's outputs; 0 in masked rows."""
    n, program = logits.shape[0], programs.values[count]
    outputs = torch.zeros((len(program.outputs), n), dtype=torch.float64, device=logits.device)
    if n == 0 or logits.shape[1] == 0:
        return outputs
    generated = source.sums(program)
    kernel = load("divergence", generated.source).divergence_sums
    sides, sizes, constants = _sides(logits, teacher_logits, call)
    own = _own(generated, program, scalars_of(program, programs.parameters, call), {})
    with on_device_of(logits):
        kernel[(n,)](*own, *sides, student.contiguous(), teacher.contiguous(), outputs, *sizes, **constants)
    return outputs


def backward(
    program: Program,  # its output: the gradient per token of the vocabulary
    parameters: Sequence[str],  # names of call.parameters
    logits: Tensor,  # [N, V]
    teacher_logits: Tensor,  # [N, V]
    call: DivergenceCall,
    student: Tensor,  # [8, N] f32, the forward's
    teacher: Tensor,  # [8, N] f32
    inputs: Mapping[str, Tensor],  # f32 [N] each, what the program reads of a row
    label_gradients: Tensor | None,  # f32 [N]
    grad_logits: Tensor,  # [N, V], out; may be either side's logits
) -> None:
    """Writes every element of grad_logits, 0 in masked rows."""
    n = logits.shape[0]
    if n == 0 or logits.shape[1] == 0:
        return
    generated = source.gradient(program)
    kernel = load("divergence", generated.source).divergence_gradient
    sides, sizes, constants = _sides(logits, teacher_logits, call)
    grad_units, grad_unit = in_units(grad_logits.stride(0), constants["VEC"])
    own = _own(generated, program, scalars_of(program, parameters, call), inputs)
    with on_device_of(logits):
        kernel[(n,)](
            *own, *sides, student.contiguous(), teacher.contiguous(), contiguous(label_gradients), grad_logits,
            *sizes, grad_units, **constants, HAS_LABEL=label_gradients is not None, GRAD_UNIT=grad_unit,
        )  # fmt: skip


def _own(
    generated: Generated, program: Program, scalars: Sequence[float], inputs: Mapping[str, Tensor]
) -> list[float | Tensor]:
    """The program's own arguments of a kernel: numbers, and tensors per row."""
    return [
        scalars[a.index] if a.kind == "scalar" else inputs[program.inputs[a.index].name or ""].contiguous()
        for a in generated.launches[0].arguments
    ]


def _sides(
    logits: Tensor, teacher_logits: Tensor, call: DivergenceCall
) -> tuple[tuple[Any, ...], tuple[int, ...], dict[str, Any]]:
    """What every kernel is given of both sides: tensors and numbers, sizes, and what it is compiled for."""
    vec = min(load_width(logits), load_width(teacher_logits))
    units, unit = in_units(logits.stride(0), vec)
    teacher_units, teacher_unit = in_units(teacher_logits.stride(0), vec)
    inv_t, stride, has_inv_t = temperature_arguments(call.inv_temperature)
    teacher_inv_t, teacher_stride, has_teacher_inv_t = temperature_arguments(call.inv_teacher_temperature)
    tensors = (logits, teacher_logits, call.labels.contiguous(), inv_t, teacher_inv_t, contiguous(call.mask))
    sizes = (units, teacher_units, stride, teacher_stride, logits.shape[0], logits.shape[1] // vec)
    constants = {"HAS_MASK": call.mask is not None, "HAS_INV_T": has_inv_t, "HAS_TEACHER_INV_T": has_teacher_inv_t}
    tile = {"LOGITS_UNIT": unit, "TEACHER_UNIT": teacher_unit, "STEPS": BLOCK // (LANES * vec)}
    return tensors, sizes, {**constants, **tile, "LANES": LANES, "VEC": vec, "num_warps": WARPS, **OPTIONS}
