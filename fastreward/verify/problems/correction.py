"""correction_weights: weights, what is kept and metrics, against the float64 run of the same formula node by node."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch

from fastreward._runtime.dispatch import backend
from fastreward.correction import correction_weights
from fastreward.verify.problem import Problem, Tensors

_OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"mode": "mask"},
    {"mode": "icepop"},
    {"level": "sequence"},
    {"level": "geometric", "mode": "mask", "low": 0.9, "high": 1.1},
    {"batch_normalize": True},
    {"reject": {"token_k3": 0.5, "seq_mean_k1": 1.5, "seq_max_k2": 2.0}},
)


def problems(quick: bool) -> Iterator[Problem]:
    """Every mode and level, over ragged and empty sequences."""
    generator = torch.Generator().manual_seed(0)
    old = -torch.rand(6, 41, generator=generator) * 3
    for spread in (0.3,) if quick else (0.3, 8.0):
        inputs = {
            "old_logprobs": old,
            "rollout_logprobs": old + torch.randn(6, 41, generator=generator) * spread,
            "mask": torch.arange(41) < torch.tensor([41, 1, 0, 30, 17, 5]).unsqueeze(-1),
        }
        for options in _OPTIONS:
            name = ", ".join(f"{k}={v}" for k, v in options.items()) or "truncate"
            yield Problem(
                "correction",
                f"{name}, gaps of {spread:g}",
                "float32",
                inputs,
                partial(_run, options),
                partial(_reference, options),
                partial(_reference, options),
            )


def _run(options: Mapping[str, Any], inputs: Mapping[str, Any]) -> Tensors:
    weights, keep, metrics = correction_weights(**inputs, **options)
    return {"weights": weights, "keep": keep.float()} | {f"metric {k}": v for k, v in metrics.items()}


def _reference(options: Mapping[str, Any], inputs: Mapping[str, Any]) -> Tensors:
    with backend("reference"):
        return _run(options, inputs)
