"""value_loss: loss and gradient for the values, clipped and not, squared and Huber's, near and far from the returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fastreward import losses
from fastreward.losses.value import huber, squared
from fastreward.value_loss import value_loss
from fastreward.verify.problem import Problem, Tensors, leaf
from fastreward.verify.problems._losses import problem


def problems(quick: bool) -> Iterator[Problem]:
    """Ragged rows, one of them empty."""
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(6, 61, generator=generator)
    mask = torch.arange(61) < torch.tensor([61, 1, 0, 17, 30, 5]).unsqueeze(-1)
    for spread in (0.3,) if quick else (0.3, 30.0):
        moved, missed = (torch.randn(old.shape, generator=generator) * spread for _ in range(2))
        inputs = {"value": old + moved, "old_value": old, "returns": old + missed, "mask": mask}
        for loss in (squared(), squared(None), huber(0.5), huber(None, 0.1)):
            name = f"{loss.name}, {'not clipped' if loss.parameters['clip'] is None else 'clipped'}, {spread:g} apart"
            given = {k: x for k, x in inputs.items() if k != "old_value" or loss.reads(k)}
            yield problem("value_loss", name, loss, given, _run)


def _run(loss: losses.Loss, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensors]:
    values = leaf(inputs["value"])
    result = value_loss(values, inputs.get("old_value"), inputs["returns"], inputs["mask"], loss=loss)
    return result.loss, {"value": values}
