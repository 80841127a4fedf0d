"""value_loss: PPO's clipped value loss over [B, T] tokens, forward + backward."""

from __future__ import annotations

from functools import lru_cache, partial

import torch
from torch import Tensor

from fastreward.bench import peers, roofline
from fastreward.bench.case import OURS, Case, Contender, Target
from fastreward.bench.cases._steps import Tensors, add_torch, step, worst_of_step
from fastreward.value_loss import value_loss
from fastreward.verify import eager

CASES = ("clipped",)
DTYPES = ("float32",)
SHAPE = (2048, 2048)  # 4M tokens
QUICK = (64, 256)

_CLIP = 0.2


@lru_cache(maxsize=1)
def _data(shape: tuple[int, ...], device: str) -> Tensors:
    """Values, old values and returns, all f32 [B, T], and a ragged mask, bool [B, T]."""
    generator = torch.Generator(device=device).manual_seed(0)
    old, moved, missed = (torch.randn(shape, generator=generator, device=device) for _ in range(3))
    lengths = torch.randint(shape[1] // 4, shape[1] + 1, shape[:1], generator=generator, device=device)
    return old + 0.2 * moved, old, old + missed, torch.arange(shape[1], device=device) < lengths.unsqueeze(-1)


def build(case: str, dtype: torch.dtype, shape: tuple[int, ...], device: str) -> Case:
    """Forward + backward on [B, T] float32."""
    data = _data(shape, device)
    built = Case(
        operation="value_loss",
        name=case,
        dtype=str(dtype).removeprefix("torch."),
        shape=shape,
        traffic=roofline.value_loss_forward_backward(shape[0] * shape[1]),
        error=partial(worst_of_step, step(_eager, 1, *(x if x.dtype == torch.bool else x.double() for x in data))),
        contenders=[Contender(OURS, partial(step, _ours, 1, *data))],
        tolerance=1e-5,
        inputs=list(data),
        targets=(Target("share", 0.6), Target("speedup", 2.0, "torch.compile")),
    )
    add_torch(built, _eager, lambda form: partial(step, form, 1, *data), 1e-4)
    peers.add(built, "verl", partial(_verl, *data))
    built.absent["TRL"] = "no value loss since its PPO trainer has gone"
    built.absent["liger-kernel"] = "no such function"
    return built


def _ours(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    return value_loss(values, old_values, returns, mask, clip=_CLIP).loss


def _eager(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    return eager.value_loss(values, old_values, returns, mask, clip=_CLIP)


def _verl(*data: Tensor) -> Contender:
    algos = peers.load("verl", "verl.trainer.ppo.core_algos")

    def loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
        found: Tensor = algos.compute_value_loss(values, returns, old_values, mask, _CLIP)[0]
        return found

    return Contender("verl", partial(step, loss, 1, *data), tolerance=1e-4)
