"""linear_divergence: values and the gradients of hidden, weight and bias, through every option of the heads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastreward.divergence import NAMES
from fastreward.linear_divergence import linear_divergence
from fastreward.verify import eager
from fastreward.verify.problem import Problem, Tensors, gradients, leaf, seeded

_TRAINED = ("hidden", "weight", "bias")
_HEAD = ("bias", "logit_scale", "softcap")
_OUTPUTS = ("entropy", "teacher_entropy", "logprobs")


def problems(quick: bool) -> Iterator[Problem]:
    """Every divergence; rows at a time, masked, scaled and capped, over ids, empty."""
    for dtype in (torch.float32, torch.bfloat16):
        yield from seeded("linear_divergence", quick, partial(_inputs, dtype), _ours, _truth, _plain)


def _inputs(dtype: torch.dtype, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    generator = torch.Generator().manual_seed(seed)
    rows, width, vocab = 19, 48, 517

    def normal(*shape: int, by: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * by).to(dtype)

    hidden, weight = normal(rows, width), normal(vocab, width, by=3 / width**0.5)
    base: dict[str, Any] = {
        "hidden": hidden,
        "weight": weight,
        "teacher_hidden": torch.cat([hidden, normal(rows, 20)], -1),  # as near as teachers are, and wider
        "teacher_weight": torch.cat([weight, normal(vocab, 20, by=0.1)], -1),
        "divergence": "jsd",
    }
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    temperature = torch.rand(rows, generator=generator) + 0.4
    mask = torch.rand(rows, generator=generator) < 0.6
    for name in NAMES:
        yield name, base | {"divergence": name}
    yield "7 rows at a time, ragged mask", base | {"chunk_size": 7, "mask": mask}
    scaled = {"bias": normal(vocab), "logit_scale": 0.7, "softcap": 5.0, "labels": labels}
    yield "bias, scale, softcap, statistics", base | scaled | {"teacher_bias": normal(vocab), "teacher_softcap": 8.0}
    yield "temperatures", base | {"temperature": temperature, "teacher_temperature": 0.7}
    ids = eager.linear_logits(hidden, weight).topk(9).indices
    yield "over ids and the rest", base | {"token_ids": ids, "mask": mask, "divergence": "forward-kl"}
    yield "over ids, renormalised", base | {"token_ids": ids, "tail": False, "temperature": 1.5}
    yield "all rows masked", base | {"mask": torch.zeros(rows, dtype=torch.bool)}
    empty = {name: base[name][:0] for name in ("hidden", "teacher_hidden")}
    yield "empty batch", base | empty


def _leaves(inputs: Mapping[str, Any], double: bool = False) -> Tensors:
    return {n: leaf(inputs[n], double) for n in _TRAINED if n in inputs}


def _ours(seed: int, inputs: Mapping[str, Any]) -> Tensors:
    leaves = _leaves(inputs)
    outputs = _OUTPUTS if "labels" in inputs else ()
    found = linear_divergence(**{**inputs, **leaves}, outputs=outputs)
    return _finished({name: getattr(found, name) for name in ("divergence", *outputs)}, leaves, seed)


def _truth(seed: int, inputs: Mapping[str, Any]) -> Tensors:
    return _from_logits(_leaves(inputs, double=True), seed, inputs)


def _plain(seed: int, inputs: Mapping[str, Any]) -> Tensors:
    return _from_logits(_leaves(inputs), seed, inputs)


def _from_logits(leaves: Tensors, seed: int, inputs: Mapping[str, Any]) -> Tensors:
    dtype = leaves["hidden"].dtype
    teacher = {
        name.removeprefix("teacher_"): x.to(dtype) if isinstance(x, Tensor) else x
        for name, x in inputs.items()
        if name.startswith("teacher_") and name != "teacher_temperature"
    }
    student = {k: v for k, v in inputs.items() if k in _HEAD} | leaves
    logits, teacher_logits = (eager.linear_logits(**side) for side in (student, teacher))
    wanted = ("divergence", "temperature", "teacher_temperature", "mask", "labels", "token_ids", "tail")
    options = {k: v for k, v in inputs.items() if k in wanted}
    return _finished(eager.token_divergence(logits, teacher_logits, **options), leaves, seed)


def _finished(out: Tensors, leaves: Tensors, seed: int) -> Tensors:
    return {name: x.detach() for name, x in out.items()} | gradients(out, leaves, seed)
