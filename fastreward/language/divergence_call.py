"""What the GPU backends make of a divergence's call before they launch anything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from fastreward._arguments.divergence import DivergenceCall
from fastreward._runtime.layout import VALUES
from fastreward.language.divergence_moments import Moments, moments
from fastreward.language.divergence_programs import DivergencePrograms
from fastreward.language.program import Program

_NOTHING: Final = Moments(0.0, 0.0, 0.0, 0.0, 0.0)


class Sums(NamedTuple):
    """The program of a forward's sums, its scalars, what each sum is of the moments (nothing, where they are not made
    of these), and whether they are."""

    program: Program
    scalars: list[float]
    coefficients: tuple[Moments, ...]
    by_moments: bool

    @property
    def numbers(self) -> list[float]:
        """The coefficients, one sum after the other."""
        return [x for m in self.coefficients for x in m]

    @property
    def used(self) -> tuple[bool, bool, bool, bool]:
        """Which moments any sum is made of, in the order of `Moments`."""
        p, q, log_p, log_q, _ = (any(x) for x in zip(*self.coefficients, strict=True))
        return p, q, log_p, log_q


def sums_of(programs: DivergencePrograms, count: int, call: DivergenceCall) -> Sums:
    """Those of the divergence and of `count` of its derivatives: none, that for log p, that for log q too."""
    program = programs.values[count]
    scalars = scalars_of(program, programs.parameters, call)
    known = moments(program, tuple(scalars))
    return Sums(program, scalars, known or (_NOTHING,) * len(program.outputs), known is not None)


def scalars_of(program: Program, names: Sequence[str], call: DivergenceCall) -> list[float]:
    """A program's scalars from the call's parameters, which are called so."""
    return program.scalar_values(dict(zip(names, call.parameters, strict=True)))


def results(program: Program, logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for a forward's outputs f32 [outputs, N], both sides' values f32 [8, N] and agreement f32 [N]."""
    n = logits.shape[0]
    shapes = ((len(program.outputs), n), (len(VALUES), n), (len(VALUES), n), (n,))
    outputs, student, teacher, agreement = (logits.new_empty(shape, dtype=torch.float32) for shape in shapes)
    return outputs, student, teacher, agreement
