"""Losses of the language: ours on its backend against torch autograd of their evaluation, in float64 and in float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastreward.language.evaluate import evaluate
from fastreward.losses import Loss
from fastreward.reference.policy_loss import aggregate
from fastreward.verify.problem import Problem, Tensors, gradients, leaf

Run = Callable[[Loss, Mapping[str, Any]], tuple[Tensor, Tensors]]


def problem(operation: str, name: str, loss: Loss, inputs: Mapping[str, Any], run: Run, seed: int = 0) -> Problem:
    """`inputs`: terms by name, the differentiable ones "logprob", "value", or "chosen_logprob" and "rejected_logprob",
    and extras; "mask" (or two), "group_ids". `run` calls the public function on leaves and gives (loss, leaves)."""
    return Problem(
        operation,
        name,
        "float32",
        inputs,
        partial(_ours, loss, run, seed),
        partial(_torch, loss, torch.float64, seed),
        partial(_torch, loss, torch.float32, seed),
    )


def _ours(loss: Loss, run: Run, seed: int, inputs: Mapping[str, Any]) -> Tensors:
    value, leaves = run(loss, inputs)
    return {"loss": value.detach()} | gradients({"loss": value}, leaves, seed)


def _torch(loss: Loss, dtype: torch.dtype, seed: int, inputs: Mapping[str, Any]) -> Tensors:
    masks = [inputs[name] for name in ("mask", "chosen_mask", "rejected_mask") if name in inputs]
    terms = {k: v for k, v in inputs.items() if not k.endswith("mask") and k != "group_ids"}
    leaves = {k: leaf(v, dtype == torch.float64) for k, v in terms.items() if k in differentiable(loss, inputs)}
    groups = inputs.get("group_ids")
    value = evaluate(loss, masks[0] if len(masks) == 1 else masks, groups, {**terms, **leaves}, dtype)
    total = value.mean() if loss.definition.pairs else _aggregated(loss, value, masks[0], groups)
    return {"loss": total.detach()} | gradients({"loss": total}, leaves, seed)


def differentiable(loss: Loss, inputs: Mapping[str, Any]) -> list[str]:
    """Names of the inputs that gradients flow to."""
    known = ("logprob", "value", "chosen_logprob", "rejected_logprob", *loss.differentiable)
    return [name for name in known if name in inputs]


def _aggregated(loss: Loss, value: Tensor, mask: Tensor, groups: Tensor | None) -> Tensor:
    token = value if value.ndim == 2 else torch.where(mask, value.unsqueeze(-1), 0.0)
    return aggregate(token, mask, loss.aggregation, None, groups)
