"""token_divergence: KL and Jensen-Shannon from the logits of both sides, forward, and with the gradient in place."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from fastreward.bench import peers, roofline
from fastreward.bench.case import OURS, Case, Contender, Target
from fastreward.bench.cases._steps import Tensors, worst_of_rows
from fastreward.divergence import token_divergence
from fastreward.verify import eager
from fastreward.verify.error import sampled_rows

CASES = ("reverse-kl", "forward-kl", "jsd", "reverse-kl+gradient", "jsd+gradient")
DTYPES = ("float32", "bfloat16")
SHAPE = (512, 151_936)
QUICK = (64, 8192)

_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
#: Peers answer in the logits' dtype.
_PEER_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
#: TRL's beta of each.
_BETAS = {"forward-kl": 0.0, "reverse-kl": 1.0, "jsd": 0.5}


@lru_cache(maxsize=1)
def _data(dtype: torch.dtype, shape: tuple[int, int], device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Student's and teacher's logits [N, V] and the upstream gradient [N]; kept for the next case of the same size."""
    generator = torch.Generator(device=device).manual_seed(0)
    student, teacher = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
    for start in range(0, shape[0], 64):  # in blocks: no float32 copy of a bf16 matrix
        block = student[start : start + 64]
        block.copy_(torch.randn(block.shape, generator=generator, device=device) * 2)
        other = torch.randn(block.shape, generator=generator, device=device)
        teacher[start : start + 64].copy_(block + 0.5 * other)
    return student, teacher, torch.randn(shape[0], generator=generator, device=device)


def build(case: str, dtype: torch.dtype, shape: tuple[int, ...], device: str) -> Case:
    """One case of CASES on logits `shape` [N, V]."""
    rows, vocab = shape
    student, teacher, upstream = _data(dtype, (rows, vocab), device)
    name, _, gradient = case.partition("+")
    built = Case(
        operation="divergence",
        name=case,
        dtype=str(dtype).removeprefix("torch."),
        shape=shape,
        traffic=roofline.divergence(rows, vocab, student.element_size(), bool(gradient)),
        error=partial(worst_of_rows, _truth(name, student, teacher, upstream, bool(gradient)), bool(gradient)),
        contenders=[],
        tolerance=_TOLERANCE[dtype] if gradient else _TOLERANCE[torch.float32],
        inputs=[student, teacher, upstream],
        targets=_targets(case),
    )
    if gradient:
        _ours_in_place(built, name, student, teacher, upstream)
    else:
        built.contenders.append(
            Contender(OURS, lambda: (token_divergence(student, teacher, divergence=name).divergence,))
        )
    for peer, function in _peers(built, name).items():
        call = (
            partial(_backward, function, student, teacher, upstream)
            if gradient
            else partial(_forward, function, student, teacher)
        )
        compiled = peer == "torch.compile"
        built.contenders.append(Contender(peer, call, tolerance=_PEER_TOLERANCE[dtype], compiled=compiled))
    return built


# ------------------------------------------------------------------------------------------------------- contenders
def _ours_in_place(case: Case, name: str, student: Tensor, teacher: Tensor, upstream: Tensor) -> None:
    work = torch.empty_like(student)

    def call() -> Tensors:
        leaf = work.detach().requires_grad_()
        found = token_divergence(leaf, teacher, divergence=name, inplace_backward=True).divergence
        (grad,) = torch.autograd.grad(found, leaf, upstream)
        return found.detach(), grad

    def restore() -> None:
        work.copy_(student)

    case.inputs.append(work)
    case.contenders.append(Contender(OURS, call, restore))


def _forward(function: Callable[..., Tensor], student: Tensor, teacher: Tensor) -> Tensors:
    return (function(student, teacher),)


def _backward(function: Callable[..., Tensor], student: Tensor, teacher: Tensor, upstream: Tensor) -> Tensors:
    leaf = student.detach().requires_grad_()
    found = function(leaf, teacher)
    (grad,) = torch.autograd.grad(found, leaf, upstream.to(found.dtype))
    return found.detach(), grad


def _peers(case: Case, name: str) -> dict[str, Callable[..., Tensor]]:
    def obvious(student: Tensor, teacher: Tensor) -> Tensor:
        return eager.token_divergence(student, teacher, name)["divergence"]

    found: dict[str, Callable[..., Tensor]] = {"torch eager": obvious, "torch.compile": peers.compiled(obvious)}
    case.absent |= {"verl": "no such function", "liger-kernel": "from hidden states, Triton only"}
    try:
        found["TRL"] = _trl(name)
    except peers.Absent as reason:
        case.absent["TRL"] = str(reason)
    return found


def _trl(name: str) -> Callable[..., Tensor]:
    """GKD's loss from logits, before its reduction."""
    trainer: Any = peers.load("TRL", "trl.experimental.gkd.gkd_trainer").GKDTrainer

    def call(student: Tensor, teacher: Tensor) -> Tensor:
        terms: Tensor = trainer.generalized_jsd_loss(student, teacher, beta=_BETAS[name], reduction="none")
        return terms.sum(-1)

    return call


# ------------------------------------------------------------------------------------------------------------ truth
def _truth(name: str, student: Tensor, teacher: Tensor, upstream: Tensor, gradient: bool) -> tuple[Tensor, Tensors]:
    """Rows that are looked at, and what they should be, in float64."""
    rows = sampled_rows(len(upstream), student.device)
    x = student[rows].double().requires_grad_(gradient)
    value = eager.token_divergence(x, teacher[rows].double(), name)["divergence"]
    expected = [value, *(torch.autograd.grad(value, x, upstream[rows].double()) if gradient else ())]
    return rows, tuple(e.detach() for e in expected)


def _targets(case: str) -> tuple[Target, ...]:
    if case.endswith("gradient"):
        return (Target("speedup", 3.0, "torch.compile"), Target("memory", 8 << 20), Target("share", 0.8, device="cuda"))
    share = 1 / 2.0 if case == "jsd" else 1 / 1.5
    speed = (Target("speedup", 3.0, "torch.compile"), Target("speedup", 14.0, "torch eager"))
    return (*speed, Target("share", share), Target("memory", 1 << 20), Target("share", 0.8, device="cuda"))
