"""whiten: masks of every kind, a large mean over a small spread, and hardly anything to count."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch

from fastreward.reference import whiten as reference
from fastreward.verify import eager
from fastreward.verify.problem import Problem, Tensors, seeded
from fastreward.whiten import whiten


def problems(quick: bool) -> Iterator[Problem]:
    """Whole and masked, shifted and not, ill-conditioned, tiny."""
    torch_ways = (partial(_call, function) for function in (reference.whiten, eager.whiten))
    yield from seeded("whiten", quick, _inputs, _ours, *torch_ways)


def _inputs(seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    generator = torch.Generator().manual_seed(seed)
    shape = (13, 301)
    x = torch.randn(shape, generator=generator) * 2 + 1
    mask = torch.arange(shape[1]) < torch.randint(0, shape[1] + 1, (shape[0], 1), generator=generator)
    mask[0], mask[1] = False, True
    yield "no mask", {"x": x}
    yield "ragged mask", {"x": x, "mask": mask}
    yield "integer mask, mean kept", {"x": x, "mask": mask.long(), "shift_mean": False}
    yield "float mask, ddof 0", {"x": x, "mask": mask.float(), "ddof": 0}
    yield "large mean, small spread", {"x": 1e4 + 1e-2 * x, "mask": mask}
    yield "NaN under the mask", {"x": x.masked_fill(~mask, torch.nan), "mask": mask}
    yield "constant", {"x": torch.full(shape, 3.0), "mask": mask, "shift_mean": False}
    yield "two valid positions", {"x": x, "mask": torch.arange(x.numel()).view(shape) < 2}
    yield "one valid position, ddof 0", {"x": x, "mask": torch.arange(x.numel()).view(shape) < 1, "ddof": 0}
    yield "one dimension", {"x": x.flatten()[:1000].clone()}
    yield "in place", {"x": x, "mask": mask, "inplace": True}


def _ours(seed: int, inputs: Mapping[str, Any]) -> Tensors:
    options = {k: v for k, v in inputs.items() if k != "inplace"}
    if inputs.get("inplace"):
        work = options["x"].clone()
        return {"whitened": whiten(**options | {"x": work}, out=work)}
    return {"whitened": whiten(**options)}


def _call(function: Any, seed: int, inputs: Mapping[str, Any]) -> Tensors:
    return {"whitened": function(**{k: v for k, v in inputs.items() if k != "inplace"})}
