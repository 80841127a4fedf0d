"""token_logprobs: every output and gradient on random logits, and on those that break kernels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastreward._runtime.layout import ALL_OUTPUTS, DIFFERENTIABLE
from fastreward.logprobs import token_logprobs
from fastreward.reference import logprobs as reference
from fastreward.verify import eager
from fastreward.verify.problem import Problem, Tensors, gradients, leaf, seeded

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def problems(quick: bool) -> Iterator[Problem]:
    """Random, ragged, infinite, kept, strided, huge, peaked, tiny, empty."""
    for dtype in _DTYPES:
        yield from seeded("logprobs", quick, partial(_inputs, dtype, quick), _ours, _truth, _plain_torch)


def _inputs(dtype: torch.dtype, quick: bool, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, by: float = 3.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * by).to(dtype)

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=generator)

    def coin(*shape: int, p: float = 0.5) -> Tensor:
        return torch.rand(*shape, generator=generator) < p

    batch, vocab = (3, 5), 1003
    labels = integers(vocab, *batch)
    x = normal(*batch, vocab)
    yield "random, ragged mask", {"logits": x, "labels": labels, "mask": _ragged(*batch)}
    yield (
        "float mask, temperature 0.7",
        {"logits": x, "labels": labels, "mask": _ragged(*batch).float(), "temperature": 0.7},
    )
    per_token = torch.rand(*batch, generator=generator) + 0.3
    yield "per-token temperature", {"logits": x, "labels": labels, "temperature": per_token}
    holes = x.masked_fill(coin(*batch, vocab), -torch.inf)
    yield "-inf columns, labels among them", {"logits": holes, "labels": labels}
    dead = holes.clone()
    dead[1, 2:4] = -torch.inf
    yield "rows of only -inf", {"logits": dead, "labels": labels}
    kept = coin(*batch, vocab, p=0.3)
    yield "kept mask", {"logits": x, "labels": labels, "kept_tokens": kept.scatter(-1, labels.unsqueeze(-1), True)}
    yield (
        "kept mask without some labels, -inf too",
        {"logits": holes, "labels": labels, "kept_tokens": kept | coin(*batch, 1)},
    )
    ids = torch.stack([torch.randperm(vocab, generator=generator)[:20] for _ in range(15)]).view(*batch, 20)
    ids[0, :, 12:] = -1
    yield "kept ids, padded", {"logits": x, "labels": ids[..., 3].clone(), "kept_tokens": ids, "temperature": per_token}
    several = integers(vocab, *batch, 4)
    several[..., 1] = several[..., 0]
    yield "id_logprobs, repeated ids", {"logits": x, "labels": labels, "token_ids": several}
    wide = normal(3, 6, vocab + 8)
    yield "strided rows, unaligned", {"logits": wide[:, :-1, 3 : 3 + vocab], "labels": labels}
    huge = 1e4 if dtype != torch.float16 else 6e3
    yield "huge logits", {"logits": normal(*batch, vocab, by=huge), "labels": labels}
    peaked = normal(*batch, vocab).scatter(-1, labels.unsqueeze(-1), 90.0)
    yield "one certain token", {"logits": peaked, "labels": labels}
    yield "all logits equal", {"logits": torch.full((2, vocab), 7.0, dtype=dtype), "labels": labels[0, :2]}
    strange, targets = normal(4, vocab), labels[0, :4].clone()
    strange[0, 7], strange[2, 9] = torch.nan, torch.inf
    targets[2] = 9  # inf - inf: NaN for everybody
    yield "NaN and +inf logits", {"logits": strange, "labels": targets, "values_only": True}
    yield "V = 1", {"logits": normal(4, 1), "labels": integers(1, 4)}
    yield "V = 2", {"logits": normal(4, 2), "labels": integers(2, 4)}
    yield "empty batch", {"logits": normal(0, vocab), "labels": integers(vocab, 0)}
    yield "gradient in place", {"logits": x, "labels": labels, "mask": _ragged(*batch), "inplace": True}
    if not quick:
        yield "a real vocabulary", {"logits": normal(3, 151_936), "labels": integers(151_936, 3)}


def _ragged(rows: int, columns: int) -> Tensor:
    return torch.arange(columns) < torch.arange(rows).unsqueeze(-1) * 2 + 1


def _options(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in inputs.items() if k in ("temperature", "mask", "token_ids", "kept_tokens")}


def _ours(seed: int, inputs: Mapping[str, Any]) -> Tensors:
    x = leaf(inputs["logits"])
    inplace = bool(inputs.get("inplace"))
    names = tuple(n for n in ALL_OUTPUTS if n != "id_logprobs" or "token_ids" in inputs)
    logits = x.clone() if inplace else x  # the clone's memory becomes the gradient
    stats = token_logprobs(logits, inputs["labels"], outputs=names, inplace_backward=inplace, **_options(inputs))
    return _finished({name: getattr(stats, name) for name in names}, x, seed, inputs)


def _truth(seed: int, inputs: Mapping[str, Any]) -> Tensors:
    x = leaf(inputs["logits"], double=True)
    out = reference.token_logprobs(x, inputs["labels"], **_options(inputs))
    return _finished(out, x, seed, inputs)


def _plain_torch(seed: int, inputs: Mapping[str, Any]) -> Tensors:
    x = leaf(inputs["logits"])
    return _finished(eager.token_logprobs(x, inputs["labels"], **_options(inputs)), x, seed, inputs)


def _finished(out: Tensors, x: Tensor, seed: int, inputs: Mapping[str, Any]) -> Tensors:
    if inputs.get("values_only"):
        return {name: out[name].detach() for name in ("logprobs", "entropy")}
    ordered = {name: out[name] for name in ALL_OUTPUTS if name in out}
    # A mean is judged by the size of what it is a mean of.
    largest = inputs["logits"].double().abs().nan_to_num(posinf=0.0)
    ordered["mean_logit"] = ordered["mean_logit"].detach() / max(1.0, float(largest.max()) if largest.numel() else 0.0)
    grads = gradients({name: ordered[name] for name in ordered if name in DIFFERENTIABLE}, {"logits": x}, seed)
    return {name: value.detach() for name, value in ordered.items()} | grads
