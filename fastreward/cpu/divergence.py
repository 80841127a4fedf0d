"""CPU backend of `divergence`: torch tensors to pointers for csrc/cpu/divergence.cpp. Inputs are validated already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastreward import _core
from fastreward._arguments.divergence import DivergenceCall
from fastreward._runtime.addresses import address
from fastreward._runtime.layout import INDICES, VALUES, flags_of
from fastreward.cpu.logprobs import _rows
from fastreward.cpu.program.encode import encode
from fastreward.language.divergence_moments import Product, moments, products
from fastreward.language.divergence_programs import PER_TOKEN, DivergencePrograms
from fastreward.language.program import Program

#: What is made of the first side and the second, where the teacher is the first.
_SWAPPED = ("log_q", "log_p", "q", "p")


def forward(
    programs: DivergencePrograms,
    logits: Tensor,  # [N, V] f32/bf16/f16, unit column stride, any row stride
    teacher_logits: Tensor,  # the same
    call: DivergenceCall,
    sums: int,  # of which derivatives: none, those for log p, those for log q too
    statistics: bool,  # whether entropies and the largest logits are wanted
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(outputs f32 [1 + sums, N], student's and teacher's values f32 [8, N], agreement f32 [N])."""
    n, program = logits.shape[0], programs.values[sums]
    outputs = torch.empty((len(program.outputs), n), dtype=torch.float32, device="cpu")
    values = [torch.empty((len(VALUES), n), dtype=torch.float32, device="cpu") for _ in range(2)]
    indices = torch.empty((2, len(INDICES), n), dtype=torch.int64, device="cpu")
    flags = flags_of(("entropy", "argmax")) if statistics else 0
    _run(program, programs.parameters, logits, teacher_logits, call, flags, values, indices, outputs)
    agreement = (indices[0, 0] == indices[1, 0]).float()
    return outputs, values[0], values[1], agreement if call.mask is None else agreement * call.mask


def sums(
    programs: DivergencePrograms,
    logits: Tensor,  # [N, V of a slice of the vocabulary]
    teacher_logits: Tensor,  # the same columns
    call: DivergenceCall,
    count: int,  # `sums` of forward
    student: Tensor,  # [8, N] f32, contiguous, of the whole vocabulary
    teacher: Tensor,  # [8, N] f32, contiguous
) -> Tensor:
    """f64 [1 + count, N]: what the slice adds to forward's outputs; 0 in masked rows."""
    program = programs.values[count]
    outputs = torch.empty((len(program.outputs), logits.shape[0]), dtype=torch.float32, device="cpu")
    _run(program, programs.parameters, logits, teacher_logits, call, 0, [student, teacher], None, outputs)
    return outputs.double()


def _run(
    program: Program,
    parameters: Sequence[str],
    logits: Tensor,
    teacher_logits: Tensor,
    call: DivergenceCall,
    flags: int,
    values: Sequence[Tensor],  # of both sides f32 [8, N]: computed, or known
    indices: Tensor | None,  # i64 [2, 2, N]; None: the values are known
    outputs: Tensor,  # f32 [outputs of the program, N]
) -> None:
    rows, others, alive = _sides(logits, teacher_logits, call)
    names, scalars = [node.name for node in program.inputs], _scalars(program, parameters, call)
    _core.divergence_forward(
        student=rows,
        teacher=others,
        code=encode(program).code,
        made=[names.index(name) if name in names else -1 for name in PER_TOKEN],
        inputs=[0] * len(names),
        scalars=scalars,
        moments=[] if indices is None else [tuple(m) for m in moments(program, tuple(scalars)) or ()],
        student_flags=flags,
        teacher_flags=flags,
        known=indices is None,
        student_values=values[0].data_ptr(),
        teacher_values=values[1].data_ptr(),
        student_indices=0 if indices is None else indices[0].data_ptr(),
        teacher_indices=0 if indices is None else indices[1].data_ptr(),
        outputs=[x.data_ptr() for x in outputs],
    )
    del alive


def head_share(
    logits: Tensor,  # [N, V]
    teacher_logits: Tensor,  # [N, V]
    call: DivergenceCall,
    student: Tensor,  # [8, N] f32, the forward's
    teacher: Tensor,  # [8, N] f32
    alpha: float,
) -> Tensor:
    """f32 [N]: what lies in the teacher's head of the difference between both; 0 in masked rows."""
    shares = torch.empty(logits.shape[0], dtype=torch.float32, device="cpu")
    rows, others, alive = _sides(logits, teacher_logits, call)
    _core.divergence_head_share(
        student=rows,
        teacher=others,
        student_values=student.data_ptr(),
        teacher_values=teacher.data_ptr(),
        alpha=alpha,
        shares=shares.data_ptr(),
    )
    del alive
    return shares


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
    rows, others, alive = _sides(logits, teacher_logits, call)
    per_token = PER_TOKEN
    if grad_logits.dtype != logits.dtype:  # the teacher's; the kernel writes in the first side's dtype
        rows, others, student, teacher = others, rows, teacher, student
        per_token = _SWAPPED
    names = [node.name or "" for node in program.inputs]
    given = [inputs[name].contiguous() if name in inputs else None for name in names]
    scalars = _scalars(program, parameters, call)
    _core.divergence_backward(
        student=rows,
        teacher=others,
        code=encode(program).code,
        made=[names.index(name) if name in names else -1 for name in per_token],
        inputs=[address(x) for x in given],
        scalars=scalars,
        terms=[_term(x, names, per_token) for x in products(program, tuple(scalars)) or ()],
        student_values=student.data_ptr(),
        teacher_values=teacher.data_ptr(),
        label_gradients=address(label_gradients),
        grad_logits=grad_logits.data_ptr(),
        grad_stride=grad_logits.stride(0),
    )
    del alive


def _term(product: Product, names: Sequence[str], per_token: Sequence[str]) -> tuple[int, float, list[int]]:
    """(number of the product, factor, numbers of inputs) as csrc/cpu/divergence/divergence.hpp has them."""
    swapped = per_token is _SWAPPED
    side = int(product.of_p == swapped)
    log = 0 if product.log is None else 2 + 2 * side + int((product.log == "log_q") != swapped)
    return log or side, product.factor, [names.index(name) for name in product.inputs]


def _sides(logits: Tensor, teacher_logits: Tensor, call: DivergenceCall) -> tuple[object, object, list[object]]:
    """The C++ descriptions of both sides' rows, and the tensors that must outlive them."""
    labels, mask = call.labels, call.mask
    student, first = _rows(logits, labels, call.inv_temperature, mask, None, None, None)
    teacher, second = _rows(teacher_logits, labels, call.inv_teacher_temperature, mask, None, None, None)
    return student, teacher, [*first, *second]


def _scalars(program: Program, names: Sequence[str], call: DivergenceCall) -> list[float]:
    return program.scalar_values(dict(zip(names, call.parameters, strict=True)))
