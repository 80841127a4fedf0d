"""returns: the four recurrences, ragged masks, long discounts, and NaN under the mask."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastreward import returns as operation
from fastreward._arguments.options import ReturnsInputs, ReturnsOptions
from fastreward._arguments.tokens import Tokens
from fastreward.reference import returns as reference
from fastreward.verify import eager
from fastreward.verify.problem import Problem, Tensors, seeded

FUNCTIONS = {"returns": "discounted_returns", "gae": "gae", "vtrace": "vtrace"}


def problems(quick: bool) -> Iterator[Problem]:
    """Returns, advantages and V-trace, whole and masked."""
    yield from seeded("returns", quick, _inputs, partial(_call, operation), _truth, partial(_call, eager))


def _inputs(seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    generator = torch.Generator().manual_seed(seed)
    shape = (40, 301)
    r, v, w = torch.randn(3, *shape, generator=generator)
    mask = torch.arange(shape[1]) < torch.randint(0, shape[1] + 1, (shape[0], 1), generator=generator)
    mask &= torch.rand(shape, generator=generator) < 0.9
    mask[0], mask[1] = False, True
    r = r * mask
    discounts = {"gamma": 0.99, "lam": 0.95}
    yield "returns", {"rewards": r, "kind": "returns"}
    yield "returns, masked, discounted", {"rewards": r, "mask": mask, "gamma": 0.99, "kind": "returns"}
    yield "gae", {"rewards": r, "values": v, **discounts, "kind": "gae"}
    yield "gae, masked", {"rewards": r, "values": v, "mask": mask.float(), **discounts, "kind": "gae"}
    spoilt = {"rewards": r.masked_fill(~mask, torch.nan), "values": v.masked_fill(~mask, torch.nan)}
    yield "gae, NaN under the mask", {**spoilt, "mask": mask, "gamma": 1.0, "lam": 1.0, "kind": "gae"}
    yield "gae, large values", {"rewards": r * 1e3, "values": v * 1e4, "mask": mask, **discounts, "kind": "gae"}
    yield "vtrace", {"rewards": r, "values": v, "log_ratios": 0.3 * w, **discounts, "kind": "vtrace"}


def _named(kind: str, results: Tensor | tuple[Tensor, ...]) -> Tensors:
    return {f"{kind} {k}": x for k, x in enumerate([results] if isinstance(results, Tensor) else results)}


def _call(module: Any, seed: int, inputs: Mapping[str, Any]) -> Tensors:
    options = {k: v for k, v in inputs.items() if k != "kind"}
    return _named(inputs["kind"], getattr(module, FUNCTIONS[inputs["kind"]])(**options))


def _truth(seed: int, inputs: Mapping[str, Any]) -> Tensors:
    kind = inputs["kind"]
    tensors = ReturnsInputs(inputs["rewards"], inputs.get("values"), inputs.get("log_ratios"))
    numbers = (inputs.get("gamma", 1.0), inputs.get("lam", 1.0), 1.0, 1.0, 1.0)
    tokens = Tokens(tuple(inputs["rewards"].shape), inputs.get("mask"))
    results = reference.truth(tensors, tokens, numbers, ReturnsOptions(kind))
    return _named(kind, results[0] if kind == "returns" else results)
