"""whiten: masked whitening of [B, T] advantages, into a given tensor and into a fresh one."""

from __future__ import annotations

from functools import lru_cache, partial

import torch
from torch import Tensor

from fastreward.bench import peers, roofline
from fastreward.bench.case import OURS, Case, Contender, Target
from fastreward.bench.cases._steps import add_torch
from fastreward.reference import whiten as reference
from fastreward.verify import eager
from fastreward.verify.error import distance
from fastreward.whiten import whiten

CASES = ("out", "fresh")
DTYPES = ("float32",)
SHAPE = (4096, 8192)
QUICK = (64, 512)


@lru_cache(maxsize=1)
def _data(shape: tuple[int, ...], device: str) -> tuple[Tensor, Tensor, Tensor]:
    """x f32 [B, T], a ragged mask bool [B, T], and the whitened truth (float32 storage: rounded once)."""
    generator = torch.Generator(device=device).manual_seed(0)
    x = torch.randn(shape, generator=generator, device=device) * 3 + 1
    lengths = torch.randint(shape[1] // 4, shape[1] + 1, shape[:1], generator=generator, device=device)
    mask = torch.arange(shape[1], device=device) < lengths.unsqueeze(-1)
    return x, mask, reference.whiten(x, mask).float()


def build(case: str, dtype: torch.dtype, shape: tuple[int, ...], device: str) -> Case:
    """Whitening of [B, T] float32 with a mask."""
    x, mask, truth = _data(shape, device)
    out = torch.zeros_like(x) if case == "out" else None  # a buffer that has been used before
    built = Case(
        operation="whiten",
        name=case,
        dtype=str(dtype).removeprefix("torch."),
        shape=shape,
        traffic=roofline.whiten(x.numel()),
        error=partial(_error, truth, mask),
        contenders=[Contender(OURS, partial(whiten, x, mask, out=out))],
        tolerance=1e-5,
        inputs=[x, mask] + ([] if out is None else [out]),
        targets=(
            Target("speedup", 20.0 if case == "out" else 10.0, "verl"),
            Target("share", 0.85, device="cuda"),
        ),
    )
    add_torch(built, eager.whiten, lambda form: partial(form, x, mask), 1e-3)
    peers.add(built, "verl", partial(_verl, x, mask))
    built.absent["TRL"] = "only in its experimental PPO trainer"
    built.absent["liger-kernel"] = "no such function"
    return built


def _verl(x: Tensor, mask: Tensor) -> Contender:
    functional = peers.load("verl", "verl.utils.torch_functional")
    return Contender("verl", partial(functional.masked_whiten, x, mask), tolerance=1e-3)


def _error(truth: Tensor, mask: Tensor, result: Tensor) -> float:
    """Error at the valid positions; verl leaves what it computed in the others."""
    return distance(result[mask], truth[mask])
