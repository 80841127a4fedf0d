"""segments: every reduction and every place, ids in runs and in any order, weights, nothing there, large numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch

from fastreward._arguments.options import SEGMENT_OPS, SEGMENT_PLACES
from fastreward.reference import segments as reference
from fastreward.segments import scatter_rewards, segment_ids, segment_reduce
from fastreward.verify import eager
from fastreward.verify.problem import Problem, Tensors, gradients, leaf, seeded

_SEGMENTS = 9


def problems(quick: bool) -> Iterator[Problem]:
    """Reductions and scatters with their gradients."""
    ways = (
        partial(_call, segment_ids, segment_reduce, scatter_rewards, False),
        partial(_call, reference.segment_ids, reference.segment_reduce, reference.scatter_rewards, True),
        partial(_call, reference.segment_ids, eager.segment_reduce, eager.scatter_rewards, False),
    )
    yield from seeded("segments", quick, _inputs, *ways)


def _inputs(seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    generator = torch.Generator().manual_seed(seed)
    shape = (7, 203)
    x = torch.randn(shape, generator=generator)
    mask = (torch.rand(shape, generator=generator) < 0.97).cumprod(1).roll(40, 1) > 0
    mask[0], mask[1] = False, True
    runs = (torch.arange(shape[1]) // 25).expand(shape).masked_fill(~mask, -1)
    weights = torch.rand(shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.8)
    anywhere = torch.randint(-1, _SEGMENTS, shape, generator=generator)
    for op in SEGMENT_OPS:
        options: dict[str, Any] = {"op": op} | ({"temperature": 0.3} if op == "softmin" else {})
        yield f"{op} of runs", {"x": x, "ids": runs, **options}
        spoiled = x.masked_fill((weights == 0) | (anywhere < 0), torch.nan)
        yield (
            f"{op} in any order, weighted",
            {"x": spoiled, "ids": anywhere, "weights": weights, "empty": -3.0, **options},
        )
    yield "logsumexp of large numbers", {"x": 1e4 + 100 * x, "ids": runs.int(), "op": "logsumexp"}
    values = torch.randn((shape[0], _SEGMENTS), generator=generator)
    for place in SEGMENT_PLACES:
        yield f"{place} of runs", {"values": values, "ids": runs, "place": place}
        yield f"{place} in any order, masked", {"values": values, "ids": anywhere, "mask": weights > 0, "place": place}
    yield "turns of a mask", {"mask_of_turns": mask}


def _call(ids_of: Any, reduce: Any, scatter: Any, double: bool, seed: int, inputs: Mapping[str, Any]) -> Tensors:
    if "mask_of_turns" in inputs:
        return {"segment_ids": ids_of(inputs["mask_of_turns"])}
    given = dict(inputs)
    name, ids = ("x" if "x" in given else "values"), given.pop("ids")
    on_cpu = reduce is not segment_reduce
    wrt = leaf(given.pop(name).cpu() if on_cpu else given.pop(name), double)
    given = {k: v.cpu() if on_cpu and isinstance(v, torch.Tensor) else v for k, v in given.items()}
    ids = ids.cpu() if on_cpu else ids
    out = reduce(wrt, ids, num_segments=_SEGMENTS, **given) if name == "x" else scatter(wrt, ids, **given)
    return {"out": out} | (gradients({"out": out}, {name: wrt}, seed) if out.requires_grad else {})
