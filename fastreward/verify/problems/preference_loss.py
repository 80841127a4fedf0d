"""preference_loss: loss and gradients for both sides, over ragged and one-sidedly empty pairs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fastreward import losses
from fastreward.preference_loss import preference_loss
from fastreward.verify.problem import Problem, Tensors, leaf
from fastreward.verify.problems._losses import problem

_VARIANTS = ("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "apo_zero", "apo_down", "discopop")


def problems(quick: bool) -> Iterator[Problem]:
    """DPO's variants, then what differs from it in more than the last function."""
    chosen = [losses.dpo(variant=v, label_smoothing=0.1 if v in ("exo_pair", "robust") else 0.0) for v in _VARIANTS]
    others = [losses.simpo(), losses.rpo()]
    for loss in [*chosen[: 3 if quick else None], *others]:
        for spread in (0.3,) if quick else (0.3, 30.0):
            label = loss.parameters.get("variant", loss.name)
            name = f"{loss.name} {label}" if label != loss.name else loss.name
            yield problem("preference_loss", f"{name}, log-ratios of {spread:g}", loss, _inputs(loss, spread), _run)


def _inputs(loss: losses.Loss, spread: float) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    inputs: dict[str, Any] = {}
    for side, width in (("chosen", 61), ("rejected", 37)):
        reference = -torch.rand(6, width, generator=generator) * 3
        lengths = torch.tensor([width, 1, 0, 17, 30, 5])
        inputs[f"{side}_logprob"] = reference + torch.randn(6, width, generator=generator) * spread
        if loss.reads("ref_logprob"):
            inputs[f"{side}_ref_logprob"] = reference
        inputs[f"{side}_mask"] = torch.arange(width) < (lengths if side == "chosen" else lengths.flip(0)).unsqueeze(-1)
    return inputs


def _run(loss: losses.Loss, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensors]:
    leaves = {f"{side}_logprob": leaf(inputs[f"{side}_logprob"]) for side in ("chosen", "rejected")}
    references: dict[str, Any] = {f"ref_{s}_logprobs": inputs.get(f"{s}_ref_logprob") for s in ("chosen", "rejected")}
    result = preference_loss(
        *leaves.values(),
        loss=loss,
        chosen_mask=inputs["chosen_mask"],
        rejected_mask=inputs["rejected_mask"],
        **references,
    )
    return result.loss, leaves
