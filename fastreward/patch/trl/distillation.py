"""The divergence of TRL's DistillationTrainer, from the hidden states and LM heads of both models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from fastreward import divergences
from fastreward.linear_divergence import linear_divergence
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
        hidden, weight, bias = (None if x is None else x.detach() for x in teacher)
        found = linear_divergence(
            student_hidden_states,
            student_lm_head_weight,
            hidden,
            weight,
            bias=student_lm_head_bias,
            teacher_bias=bias,
            divergence="forward-kl" if beta == 0 else "reverse-kl" if beta == 1 else divergences.jsd(beta),
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
    """On the CPU, where TRL has torch code, and in float32: of a lower precision TRL's logits are float32 still."""
    if x is None:
        return True
    plain = type(x) in (Tensor, torch.nn.Parameter) and not hasattr(x, "ds_id")
    return plain and x.is_cpu and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")


def tokens(student_hidden_states: Tensor, *_: Any, **__: Any) -> int:
    """Of a call, padding included."""
    return student_hidden_states.shape[:-1].numel()
