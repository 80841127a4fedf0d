"""linear_divergence: KL and Jensen-Shannon from the hidden states and LM heads of both sides, and the gradient.

The GEMMs are everybody's same library calls; what differs is how many, what happens between them, and the memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from fastreward.bench import peers, roofline
from fastreward.bench.case import OURS, Case, Contender, Target
from fastreward.bench.cases._steps import Tensors, worst_of_rows
from fastreward.linear_divergence import linear_divergence
from fastreward.verify import eager
from fastreward.verify.error import sampled_rows

CASES = ("reverse-kl", "jsd", "reverse-kl+gradient", "jsd+gradient")
DTYPES = ("float32", "bfloat16")
SHAPE = (512, 512, 151_936)
QUICK = (64, 64, 4096)

_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}
#: TRL's beta of each.
_BETAS = {"forward-kl": 0.0, "reverse-kl": 1.0, "jsd": 0.5}


@lru_cache(maxsize=1)
def _data(dtype: torch.dtype, shape: tuple[int, ...], device: str) -> Tensors:
    """hidden [N, H] and weight [V, H] of the student, those of the teacher, and the upstream gradient [N]."""
    rows, width, vocab = shape
    generator = torch.Generator(device=device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    hidden, weight = normal(rows, width), normal(vocab, width) * (2 / width**0.5)
    teacher = hidden + 0.2 * normal(rows, width), weight + 0.2 / width**0.5 * normal(vocab, width)
    return (*(x.to(dtype) for x in (hidden, weight, *teacher)), normal(rows))


def build(case: str, dtype: torch.dtype, shape: tuple[int, ...], device: str) -> Case:
    """One case of CASES at `shape` [N, H, V], H the width of both sides."""
    rows, width, vocab = shape
    *sides, upstream = _data(dtype, shape, device)
    name, _, gradient = case.partition("+")
    built = Case(
        operation="linear_divergence",
        name=case,
        dtype=str(dtype).removeprefix("torch."),
        shape=shape,
        traffic=roofline.linear_divergence(rows, width, vocab, sides[0].element_size(), bool(gradient)),
        error=partial(worst_of_rows, _truth(name, tuple(sides), upstream, bool(gradient)), bool(gradient)),
        contenders=[],
        tolerance=_TOLERANCE[dtype],
        inputs=[*sides, upstream],
        gemm=(sides[0], sides[1][:8192].t()),
        targets=(Target("speedup", 1.0, "TRL"), Target("memory", 600 << 20)),
    )
    for peer, make in (
        (OURS, lambda: partial(_ours, name)),
        ("torch eager", lambda: partial(_eager, name)),
        ("torch.compile", lambda: peers.compiled(partial(_eager, name))),
        ("TRL", lambda: _trl(name)),
    ):
        peers.add(built, peer, partial(_contender, peer, make, tuple(sides), upstream, bool(gradient), dtype))
    built.absent |= {"verl": "no such function", "liger-kernel": "Triton only, or one mean over all tokens"}
    return built


def _contender(
    name: str,
    make: Callable[[], Callable[..., Tensor]],
    sides: Tensors,
    upstream: Tensor,
    gradient: bool,
    dtype: torch.dtype,
) -> Contender:
    function = make()

    def forward() -> Tensors:
        with torch.no_grad():
            return (function(*sides),)

    def forward_backward() -> Tensors:
        hidden, weight = (x.detach().requires_grad_() for x in sides[:2])
        found = function(hidden, weight, *sides[2:])
        grads = torch.autograd.grad(found, (hidden, weight), upstream.to(found.dtype))
        return (found.detach(), *grads)

    tolerance = None if name == OURS else max(10 * _TOLERANCE[dtype], 0.1 if dtype != torch.float32 else 0.0)
    call = forward_backward if gradient else forward
    return Contender(name, call, tolerance=tolerance, compiled=name == "torch.compile")


def _ours(name: str, *sides: Tensor) -> Tensor:
    hidden, weight, *teacher = sides
    return linear_divergence(hidden, weight, *teacher, divergence=name).divergence


def _eager(name: str, hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
    logits = eager.linear_logits(hidden, weight), eager.linear_logits(teacher_hidden, teacher_weight)
    return eager.token_divergence(*logits, name)["divergence"]


def _trl(name: str) -> Callable[..., Tensor]:
    function: Any = peers.load("TRL", "trl.kernels.chunked_divergence").ChunkedDivergenceFunction

    def call(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
        divergence: Tensor = function.apply(
            hidden, weight, None, teacher_hidden, teacher_weight, None, _BETAS[name]
        )[0]  # fmt: skip
        return divergence

    return call


def _truth(name: str, sides: Tensors, upstream: Tensor, gradient: bool) -> tuple[Tensor, Tensors]:
    """Rows that are looked at, and what they should be (the weight's gradient needs all rows: `verify` looks at it)."""
    rows = sampled_rows(len(upstream), upstream.device)
    hidden, weight, teacher_hidden, teacher_weight = (x.double() for x in sides)
    h = hidden[rows].requires_grad_(gradient)
    value = _eager(name, h, weight, teacher_hidden[rows], teacher_weight)
    expected = [value, *(torch.autograd.grad(value, h, upstream[rows].double()) if gradient else ())]
    return rows, tuple(e.detach() for e in expected)
