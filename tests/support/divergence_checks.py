"""Checks of a backend's raw divergence functions against the float64 reference: values, gradients, slices, bits."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from program_checks import same_bits
from raw_checks import STEP, close, logits_case
from torch import Tensor

from fastreward import divergences
from fastreward._arguments.divergence import DivergenceCall
from fastreward._runtime.layout import VALUES
from fastreward.language.divergence_programs import DivergencePrograms, register_programs, registered_programs
from fastreward.reference import divergence as reference

KINDS = (
    "plain", "strided", "temperatures", "one_temperature", "masked", "infinities", "ties", "far_apart", "empty_block",
)  # fmt: skip
#: Of those that differ by their formulas alone, enough.
FEW_KINDS = ("masked", "infinities", "temperatures")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@divergences.define
def jeffreys(t: Any, weight: float = 0.3) -> Any:
    """Of every moment: both KLs, and the two entropies."""
    own = 0.1 * t.p * t.log_p - 0.2 * t.q * t.log_q
    return weight * (t.p - t.q) * (t.log_p - t.log_q) + own


@divergences.define
def every_token(t: Any) -> Any:
    """Not 0 where neither allows a token: columns that do not exist must not count."""
    return t.q * (t.log_q - t.log_p) - 0.001 * t.log_p


#: Those of moments, and those that need both normalisers first.
DIVERGENCES = {
    "forward_kl": divergences.forward_kl(),
    "reverse_kl": divergences.reverse_kl(),
    "jeffreys": jeffreys(),
    "jsd": divergences.jsd(0.3),
    "skewed_forward_kl": divergences.skewed_forward_kl(),
    "skewed_reverse_kl": divergences.skewed_reverse_kl(),
    "total_variation": divergences.total_variation(),
    "alpha": divergences.alpha(),
    "alpha_close_to_one": divergences.alpha(0.99),
    "hellinger": divergences.hellinger(),
    "every_token": every_token(),
}


@dataclass
class Case:
    """One call, on the CPU."""

    programs: DivergencePrograms
    logits: Tensor
    teacher_logits: Tensor
    call: DivergenceCall

    def on(self, device: str) -> tuple[Tensor, Tensor, DivergenceCall]:
        """Copies on `device`, with the same strides."""
        labels, *rest = (x.to(device) if isinstance(x, Tensor) else x for x in self.call)
        sides = (_copy(x, device) for x in (self.logits, self.teacher_logits))
        return (*sides, DivergenceCall(labels, *rest))  # type: ignore[return-value]


def _copy(x: Tensor, device: str) -> Tensor:
    whole = x if x._base is None else x._base
    return whole.clone().to(device).as_strided(x.shape, x.stride(), x.storage_offset())


def make_case(name: str, kind: str, dtypes: tuple[torch.dtype, torch.dtype], rows: int, vocab: int) -> Case:
    """Both sides of one kind (raw_checks.CASES); where it forbids tokens, each side others."""
    divergence = DIVERGENCES[name]
    sides = [logits_case(kind, dtype, rows, vocab, seed) for seed, dtype in enumerate(dtypes)]
    student, teacher = sides
    if student.mask is not None:
        teacher.logits[~student.mask] = torch.inf
    parameters = [divergence.scalars[key] for key in sorted(divergence.scalars)]
    inverses = student.inv_temperature, teacher.inv_temperature if kind == "temperatures" else 0.7
    call = DivergenceCall(student.labels, *inverses, student.mask, parameters)
    programs = registered_programs(register_programs(divergence))
    return Case(programs, student.logits, teacher.logits, call)


def check_forward(module: ModuleType, device: str, case: Case, *, statistics: bool, sums: int = 2) -> None:
    found = module.forward(case.programs, *case.on(device), sums, statistics)
    wanted = reference.forward(case.programs, *case.on("cpu"), sums, True)
    for k, (got, want) in enumerate(zip(found[0], wanted[0], strict=True)):
        close(got, want, 4e-6, 3e-6, f"sum {k}")
    for side, got, want in zip(("student", "teacher"), found[1:3], wanted[1:3], strict=True):
        for name in ("logprobs", "max_logprob", "max_logit", *(["entropy"] if statistics else [])):
            close(got[VALUES.index(name)], want[VALUES.index(name)], 3e-6, 1e-6, f"{side}'s {name}")
    if statistics:
        assert torch.equal(found[3].cpu(), wanted[3])


def check_backward(module: ModuleType, device: str, case: Case, *, in_place: bool = False) -> None:
    """The three gradients, of upstream ones that differ from row to row."""
    outputs, student, teacher, _ = reference.forward(case.programs, *case.on("cpu"), 2, True)
    rows, label = len(case.logits), torch.linspace(-1, 1, len(case.logits))
    upstream = {name: torch.linspace(-1, 2, rows) * (k + 1) for k, name in enumerate(("upstream", "a", "b"))}
    of_student, of_teacher = ({**upstream, "total": outputs[k]} for k in (1, 2))
    for program, inputs, at_label in (
        (case.programs.student, of_student, None),
        (case.programs.statistics, of_student, label),
        (case.programs.teacher, of_teacher, None),
    ):
        own = case.teacher_logits if program is case.programs.teacher else case.logits
        want = torch.empty(own.shape, dtype=torch.float64)
        known = (case.programs.parameters, *case.on("cpu"), student, teacher, inputs, at_label)
        reference.backward(program, *known, want)
        logits, teacher_logits, call = case.on(device)
        sides = (logits, teacher_logits)
        out = sides[program is case.programs.teacher]
        if not in_place:
            out = torch.full_like(out, torch.nan)
        given = {name: x.to(device) for name, x in inputs.items()}
        added = None if at_label is None else at_label.to(device)
        statistics = (student.to(device), teacher.to(device))
        module.backward(program, case.programs.parameters, *sides, call, *statistics, given, added, out)
        scale = max(1.0, float(want.nan_to_num(0.0, 0.0, 0.0).abs().max()))
        close(out, want, 4e-6 * scale, 2e-6 + 1.01 * STEP[own.dtype], "grad_logits")


def check_slices(module: ModuleType, device: str, case: Case, tile: int) -> None:
    """The sums over slices of the vocabulary come to those of the whole rows."""
    wanted, student, teacher, _ = reference.forward(case.programs, *case.on("cpu"), 2, True)
    logits, teacher_logits, call = case.on(device)
    statistics = (student.to(device), teacher.to(device))
    total = torch.zeros(wanted.shape, dtype=torch.float64, device=device)
    for start in range(0, logits.shape[1], tile):
        sides = (x[:, start : start + tile] for x in (logits, teacher_logits))
        total += module.sums(case.programs, *sides, call, 2, *statistics)
    close(total, wanted, 4e-6, 3e-6)


def check_bits(module: ModuleType, device: str, case: Case) -> None:
    """The same bits again, alone, in another order, and whatever else is asked for."""
    logits, teacher_logits, call = case.on(device)
    first = module.forward(case.programs, logits, teacher_logits, call, 2, True)
    again = module.forward(case.programs, logits, teacher_logits, call, 2, True)
    assert all(same_bits(a, b) for a, b in zip(first, again, strict=True))
    plain = module.forward(case.programs, logits, teacher_logits, call, 0, False)[0]
    assert same_bits(plain[0], first[0][0])
    for n in range(2):
        at = slice(n, n + 1)
        alone = module.forward(case.programs, logits[at], teacher_logits[at], call.rows(n, 1), 2, True)
        assert all(same_bits(a, b[..., at].contiguous()) for a, b in zip(alone, first, strict=True))
