"""group_advantages: every centre, scale and convention, with singletons, unscored components and near-equal rewards.

And every statistic of group_statistics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch

from fastreward.group import group_advantages
from fastreward.group_statistics import STATISTICS, group_statistics
from fastreward.reference import group as reference
from fastreward.verify import eager
from fastreward.verify.problem import Problem, Tensors, seeded

_CENTERS = ("none", "mean", "leave-one-out", "second-max")
_SCALES = ("none", "std", "batch-std", "max")


def problems(quick: bool) -> Iterator[Problem]:
    """Every mode, then what breaks statistics."""
    functions = (group_advantages, reference.group_advantages, eager.group_advantages)
    yield from seeded("group", quick, _inputs, *(partial(_call, function) for function in functions))
    yield from seeded("group", quick, _statistics_inputs, _statistics, _each_statistic, _each_statistic)


def _statistics_inputs(seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    generator = torch.Generator().manual_seed(seed)
    rows = 48
    x = torch.randn(rows, generator=generator)
    x[: rows // 2] = x[: rows // 2].round()  # ties
    ids = torch.randint(0, 7, (rows,), generator=generator)
    ids[5] = 77
    absent = torch.where(torch.rand(rows, generator=generator) < 0.2, torch.nan, x)
    base: dict[str, Any] = {"group_ids": ids, "weights": torch.rand(rows, generator=generator)}
    yield "statistics", {"x": x} | base
    yield "statistics, NaN", {"x": absent, "q": 0.1, "k": 2, "ddof": 0, "ties": "ordinal"} | base
    yield "statistics far from zero", {"x": 1e4 + 1e-2 * x} | base


def _statistics(seed: int, inputs: Mapping[str, Any]) -> Tensors:
    return group_statistics(statistics=STATISTICS, **inputs)


def _each_statistic(seed: int, inputs: Mapping[str, Any]) -> Tensors:
    given: dict[str, Any] = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    return {name: reference.group_statistics(statistic=name, **given) for name in STATISTICS}


def _inputs(seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    generator = torch.Generator().manual_seed(seed)
    rows = 48
    rewards = torch.randn(rows, generator=generator)
    ids = torch.randint(-3, 9, (rows,), generator=generator) * 1_000_003
    ids[5], ids[9] = 77, 78  # singletons
    base: dict[str, Any] = {"rewards": rewards, "group_ids": ids}
    for center in _CENTERS:
        for scale in _SCALES:
            yield f"center {center}, scale {scale}", base | {"center": center, "scale": scale}
    lengths = torch.randint(1, 2000, (rows,), generator=generator).float()
    yield "length-weighted", base | {"center": "length-weighted", "scale": "none", "lengths": lengths}
    tensors = {"center": torch.randn(rows, generator=generator), "scale": torch.rand(rows, generator=generator) + 0.5}
    yield "tensors as centre and scale", base | tensors
    for singleton in ("zero", "raw", "nan"):
        yield f"singletons {singleton}, ddof 0, eps inside", base | {
            "singleton": singleton, "ddof": 0, "eps": 1e-4, "eps_inside": True,
        }  # fmt: skip
    yield "uid strings", {"rewards": rewards, "group_ids": [f"uid-{i}" for i in ids.tolist()]}
    yield "contiguous groups", {"rewards": rewards, "group_size": 8}
    yield "float64 rewards", {"rewards": rewards.double(), "group_size": 8}
    yield "equal rewards", {"rewards": torch.ones(rows), "group_size": 8}
    yield "equal rewards, eps 0", {"rewards": torch.full((rows,), 0.1).double(), "group_size": 8, "eps": 0.0}
    yield "near-equal large rewards", {"rewards": 1e4 + 1e-2 * rewards, "group_size": 8}
    unscored = torch.where(torch.rand(rows, generator=generator) < 0.2, torch.nan, rewards)
    yield "NaN rewards", {"rewards": unscored, "group_ids": ids}
    parts = torch.randn(rows, 3, generator=generator)
    parts = torch.where(torch.rand(rows, 3, generator=generator) < 0.2, torch.nan, parts)
    parts[4] = torch.nan
    weights = torch.tensor([1.0, 0.5, -2.0])
    for normalize in ("sum-then-normalize", "normalize-then-sum"):
        yield f"NaN components, {normalize}", {
            "rewards": parts, "group_ids": ids, "component_weights": weights, "normalize": normalize,
        }  # fmt: skip
    yield "empty batch", {"rewards": torch.zeros(0), "group_ids": torch.zeros(0, dtype=torch.int64)}


def _call(function: Any, seed: int, inputs: Mapping[str, Any]) -> Tensors:
    if function is group_advantages:
        return {"advantages": function(**inputs)}
    return {"advantages": function(**{k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()})}
