"""logits_policy_loss: loss and logits gradient against float64, for losses by token and by sequence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastreward import losses
from fastreward.language.evaluate import evaluate
from fastreward.logits_policy_loss import logits_policy_loss
from fastreward.reference.policy_loss import aggregate
from fastreward.verify.problem import Problem, Tensors, gradients, leaf

_TEMPERATURE = 0.7


def problems(quick: bool) -> Iterator[Problem]:
    """Fresh and in place, every logits dtype, with and without entropy, one loss that needs all log-probs first."""
    for dtype in (torch.float32,) if quick else (torch.float32, torch.bfloat16, torch.float16):
        for loss in (losses.ppo(dual_clip=3.0), losses.cispo(), losses.gspo()):
            for inplace in (False, True):
                for coefficient in (0.0, 0.01):
                    yield Problem(
                        "logits_policy_loss",
                        f"{loss.name}{', in place' if inplace else ''}{', entropy bonus' if coefficient else ''}",
                        str(dtype).removeprefix("torch."),
                        _inputs(dtype),
                        partial(_ours, loss, inplace, coefficient),
                        partial(_torch, loss, coefficient, torch.float64),
                        partial(_torch, loss, coefficient, dtype),
                    )


def _inputs(dtype: torch.dtype) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    rows, width, vocab = 4, 9, 517
    logits = 3 * torch.randn(rows, width, vocab, generator=generator)
    labels = torch.randint(0, vocab, (rows, width), generator=generator)
    logprobs = torch.log_softmax(logits / _TEMPERATURE, -1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return {
        "logits": logits.to(dtype),
        "labels": labels,
        "old_logprobs": logprobs + 0.2 * torch.randn(rows, width, generator=generator),
        "advantages": torch.randn(rows, width, generator=generator),
        "mask": torch.arange(width) < torch.tensor([9, 1, 0, 5]).unsqueeze(-1),
    }


def _ours(loss: losses.Loss, inplace: bool, coefficient: float, inputs: Mapping[str, Any]) -> Tensors:
    given = {k: v for k, v in inputs.items() if k != "logits"}
    logits = leaf(inputs["logits"].clone())
    result = logits_policy_loss(
        logits, **given, temperature=_TEMPERATURE, loss=loss, inplace=inplace, entropy_coef=coefficient
    )
    return {"loss": result.loss.detach()} | gradients({"loss": result.loss}, {"logits": logits}, 0)


def _torch(loss: losses.Loss, coefficient: float, dtype: torch.dtype, inputs: Mapping[str, Any]) -> Tensors:
    logits = leaf(inputs["logits"], dtype == torch.float64)
    statistics = torch.log_softmax(logits / _TEMPERATURE, -1)
    logprobs = statistics.gather(-1, inputs["labels"].unsqueeze(-1)).squeeze(-1)
    entropy = -(statistics.exp() * statistics).sum(-1)
    mask = inputs["mask"]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    terms = {"logprob": logprobs, "old_logprob": inputs["old_logprobs"], "advantage": inputs["advantages"]}
    value = evaluate(loss, mask, None, terms, wide)
    token: Tensor = value if value.ndim == 2 else torch.where(mask, value.unsqueeze(-1), 0.0)
    token = token - coefficient * torch.where(mask, entropy.to(wide), 0.0)
    total = aggregate(token, mask, loss.aggregation)
    return {"loss": total.detach().float()} | gradients({"loss": total}, {"logits": logits}, 0)
