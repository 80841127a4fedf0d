"""The divergence of TRL's DistillationTrainer, from the hidden states and LM heads of both models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from fastreward._arguments.logits import LOGITS_DTYPES
from fastreward._loss_call.divergence import DivergenceStats
from fastreward._runtime.lm_head import compute_dtype_of
from fastreward.linear_divergence import linear_divergence
from fastreward.patch.trl.divergence import divergence_of
from fastreward.patch.usage import handed_on

#: Module and name of the function that is replaced, and its sources (as LOSS_SOURCES) that this was written for.
DIVERGENCE: Final = ("trl.trainer.distillation_trainer", "_chunked_divergence_loss")
SOURCES: Final = {"550cb45191ab1654"}  # 1.16


class DivergenceLoss:
    """Stands for `_chunked_divergence_loss`: its arguments, its conventions, its three results."""

    def __init__(self, stock: Callable[..., Any]) -> None:
        self.stock = stock

    def __call__(
        self,
        student_hidden_states: Tensor,  # [B, K, H]
        teacher_hidden_states: Tensor,  # [B, K, G]
        student_lm_head_weight: Tensor,  # [V, H]
        teacher_lm_head_weight: Tensor,  # [V, G]
        completion_mask: Tensor,  # [B, K]
        beta: float,
        num_items_in_batch: Tensor | int | None = None,
        student_lm_head_bias: Tensor | None = None,
        teacher_lm_head_bias: Tensor | None = None,
        student_logit_scale: float = 1.0,
        teacher_logit_scale: float = 1.0,
        student_final_logit_softcapping: float | None = None,
        teacher_final_logit_softcapping: float | None = None,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(loss [], sum of the student's entropies [], number of valid tokens [])."""
        student = (student_hidden_states, student_lm_head_weight, student_lm_head_bias)
        teacher = (teacher_hidden_states, teacher_lm_head_weight, teacher_lm_head_bias)
        if not all(map(_served, (*student, *teacher))):
            handed_on()
            result: tuple[Tensor, Tensor, Tensor] = self.stock(
                student_hidden_states, teacher_hidden_states, student_lm_head_weight, teacher_lm_head_weight,
                completion_mask, beta, num_items_in_batch, student_lm_head_bias, teacher_lm_head_bias,
                student_logit_scale, teacher_logit_scale, student_final_logit_softcapping,
                teacher_final_logit_softcapping, temperature,
            )  # fmt: skip
            return result
        (own, own_weight), own_bias = _as_read(*student[:2]), _float32(student_lm_head_bias)
        (other, other_weight), other_bias = _as_read(*teacher[:2]), _float32(teacher_lm_head_bias)
        found = _divergence(
            own,
            own_weight,
            other.detach(),
            other_weight.detach(),
            bias=own_bias,
            teacher_bias=None if other_bias is None else other_bias.detach(),
            divergence=divergence_of(beta),
            temperature=temperature,
            logit_scale=student_logit_scale,
            teacher_logit_scale=teacher_logit_scale,
            softcap=student_final_logit_softcapping,
            teacher_softcap=teacher_final_logit_softcapping,
            mask=completion_mask,
            outputs=("entropy",),
        )
        assert found.entropy is not None
        loss, valid = found.divergence.sum(), (completion_mask != 0).sum()
        if num_items_in_batch is None:
            loss = loss / valid.clamp(min=1)
        else:
            items = num_items_in_batch
            loss = loss / (items.to(loss.device) if isinstance(items, Tensor) else items)
        return loss, found.entropy.sum().detach(), valid


def _served(x: Tensor | None) -> bool:
    """On the CPU, where TRL has torch code."""
    if x is None:
        return True
    plain = type(x) in (Tensor, torch.nn.Parameter) and not hasattr(x, "ds_id")
    return plain and x.is_cpu and x.dtype in LOGITS_DTYPES


def _as_read(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both as TRL's GEMMs read them: rounded to autocast's or the hidden states' dtype, and multiplied in float32."""
    dtype = compute_dtype_of(hidden)
    return _Rounded.apply(hidden, dtype), _Rounded.apply(weight, dtype)  # type: ignore[no-untyped-call]


def _float32(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float()


def _divergence(*sides: Tensor, **options: Any) -> DivergenceStats:
    with torch.autocast("cpu", enabled=False):
        return linear_divergence(*sides, **options)


class _Rounded(torch.autograd.Function):
    """x rounded to a dtype, in float32; its gradient is rounded to x's dtype alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = x.dtype
        return x.to(dtype).float() if x.dtype != torch.float32 or dtype != torch.float32 else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype), None


def tokens(student_hidden_states: Tensor, *_: Any, **__: Any) -> int:
    """Of a call, padding included."""
    return student_hidden_states.shape[:-1].numel()
