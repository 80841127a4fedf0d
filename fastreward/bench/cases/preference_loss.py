"""preference_loss: DPO over pairs, forward + backward, beside the same in plain torch and TRL's own loss."""

from __future__ import annotations

from functools import lru_cache, partial

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastreward import losses
from fastreward.bench import roofline
from fastreward.bench.case import OURS, Case, Contender, Target
from fastreward.bench.cases._steps import Tensors, add_torch, step, worst_of_step
from fastreward.preference_loss import preference_loss

CASES = ("dpo",)
DTYPES = ("float32",)
SHAPE = (1024, 2048)  # pairs, tokens of each side: 4M tokens
QUICK = (64, 256)

_BETA = 0.1
_DPO = losses.dpo(beta=_BETA)


@lru_cache(maxsize=1)
def _data(shape: tuple[int, ...], device: str) -> Tensors:
    """Log-probs of chosen and rejected, the reference's, all f32 [P, T], and their masks, bool [P, T]."""
    generator = torch.Generator(device=device).manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def mask() -> Tensor:
        lengths = torch.randint(shape[1] // 4, shape[1] + 1, shape[:1], generator=generator, device=device)
        return torch.arange(shape[1], device=device) < lengths.unsqueeze(-1)

    references = -normal().abs(), -normal().abs()
    policies = tuple(x + 0.1 * normal() for x in references)
    return (*policies, *references, mask(), mask())


def build(case: str, dtype: torch.dtype, shape: tuple[int, ...], device: str) -> Case:
    """Forward + backward on two [P, T] float32."""
    data = _data(shape, device)
    built = Case(
        operation="preference_loss",
        name=case,
        dtype=str(dtype).removeprefix("torch."),
        shape=shape,
        traffic=roofline.preference_loss_forward_backward(2 * shape[0] * shape[1]),
        error=partial(worst_of_step, _truth(*data)),
        contenders=[Contender(OURS, partial(step, _ours, 2, *data))],
        tolerance=1e-5,
        inputs=list(data),
        targets=(
            Target("speedup", 1.3, "torch.compile"),
            Target("speedup", 2.0, "torch eager"),  # a few passes of sums: the memory's limit is 5 times that
            Target("first_call", 0.02),
        ),
    )
    add_torch(built, _dpo, lambda form: partial(step, form, 2, *data), 1e-4)
    built.absent["TRL"] = (
        "its loss is inside DPOTrainer._compute_loss, no function of its own; 'torch eager' is its form"
    )
    built.absent["verl"] = "no preference loss"
    built.absent["liger-kernel"] = "its DPO starts from hidden states"
    return built


def _dpo(chosen: Tensor, rejected: Tensor, ref_c: Tensor, ref_r: Tensor, mask_c: Tensor, mask_r: Tensor) -> Tensor:
    """TRL's form: log-probs of masked tokens are set to 0, then summed."""

    def total(x: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, x, 0.0).sum(-1)

    chosen_ratio = total(chosen, mask_c) - total(ref_c, mask_c)
    rejected_ratio = total(rejected, mask_r) - total(ref_r, mask_r)
    return -logsigmoid(_BETA * (chosen_ratio - rejected_ratio)).mean()


def _ours(chosen: Tensor, rejected: Tensor, ref_c: Tensor, ref_r: Tensor, mask_c: Tensor, mask_r: Tensor) -> Tensor:
    return preference_loss(
        chosen,
        rejected,
        loss=_DPO,
        ref_chosen_logprobs=ref_c,
        ref_rejected_logprobs=ref_r,
        chosen_mask=mask_c,
        rejected_mask=mask_r,
    ).loss


def _truth(*data: Tensor) -> Tensors:
    return step(_dpo, 2, *(x if x.dtype == torch.bool else x.double() for x in data))
