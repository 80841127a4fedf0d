"""linear_token_logprobs: outputs and the gradients of hidden, weight and bias, through every option of the head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastreward.linear_logprobs import linear_token_logprobs
from fastreward.reference import logprobs as reference
from fastreward.verify import eager
from fastreward.verify.problem import Problem, Tensors, gradients, leaf, seeded

_OUTPUTS = ("logprobs", "entropy", "logsumexp", "log_sum_sq_probs", "max_logprob", "label_logit")
_DIFFERENTIABLE = _OUTPUTS[:4]
_HEAD = ("bias", "logit_scale", "softcap")


def problems(quick: bool) -> Iterator[Problem]:
    """Plain, tiled, scaled and capped, masked, tempered, empty."""
    for dtype in (torch.float32, torch.bfloat16):
        yield from seeded("linear_logprobs", quick, partial(_inputs, dtype), _ours, _truth, _plain_torch)


def _inputs(dtype: torch.dtype, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    generator = torch.Generator().manual_seed(seed)
    rows, width, vocab = 19, 48, 517

    def normal(*shape: int, by: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * by).to(dtype)

    weight, hidden = normal(vocab, width, by=3 / width**0.5), normal(rows, width)
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    base = {"hidden": hidden, "weight": weight, "labels": labels}
    mask = torch.rand(rows, generator=generator) < 0.6
    temperature = torch.rand(rows, generator=generator) + 0.4
    yield "one tile", base
    yield "tiles of 100 columns, ragged mask", base | {"chunk_size": 100, "mask": mask}
    yield "bias, scale, softcap", base | {"bias": normal(vocab), "logit_scale": 0.7, "softcap": 5.0, "chunk_size": 128}
    yield "per-token temperature", base | {"temperature": temperature, "chunk_size": 200}
    yield "all rows masked", base | {"mask": torch.zeros(rows)}
    yield "empty batch", base | {"hidden": hidden[:0], "labels": labels[:0]}


def _leaves(inputs: Mapping[str, Any], double: bool = False) -> Tensors:
    return {n: leaf(inputs[n], double) for n in ("hidden", "weight", "bias") if n in inputs}


def _ours(seed: int, inputs: Mapping[str, Any]) -> Tensors:
    leaves = _leaves(inputs)
    options = {k: v for k, v in inputs.items() if k not in ("hidden", "weight", "labels")} | leaves
    stats = linear_token_logprobs(labels=inputs["labels"], outputs=_OUTPUTS, **options)
    return _finished({name: getattr(stats, name) for name in _OUTPUTS}, leaves, seed)


def _truth(seed: int, inputs: Mapping[str, Any]) -> Tensors:
    return _from_logits(reference.token_logprobs, _leaves(inputs, double=True), seed, inputs)


def _plain_torch(seed: int, inputs: Mapping[str, Any]) -> Tensors:
    return _from_logits(eager.token_logprobs, _leaves(inputs), seed, inputs)


def _from_logits(function: Any, leaves: Tensors, seed: int, inputs: Mapping[str, Any]) -> Tensors:
    head = {k: v for k, v in inputs.items() if k in _HEAD} | {k: v for k, v in leaves.items() if k == "bias"}
    logits = eager.linear_logits(leaves["hidden"], leaves["weight"], **head)
    options = {k: v for k, v in inputs.items() if k in ("mask", "temperature")}
    return _finished(function(logits, inputs["labels"], **options), leaves, seed)


def _finished(out: Tensors, leaves: Tensors, seed: int) -> Tensors:
    grads = gradients({name: out[name] for name in _DIFFERENTIABLE}, leaves, seed)
    return {name: out[name].detach() for name in _OUTPUTS} | grads
