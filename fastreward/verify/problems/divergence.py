"""token_divergence: every named divergence and its gradients, on random logits and on those that break kernels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastreward.divergence import NAMES, token_divergence
from fastreward.verify import eager
from fastreward.verify.problem import Problem, Tensors, gradients, leaf, seeded

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OUTPUTS = ("entropy", "teacher_entropy", "logprobs")


def problems(quick: bool) -> Iterator[Problem]:
    """Random, ragged, tempered, with forbidden tokens, strided, tiny, empty."""
    for dtype in _DTYPES:
        yield from seeded("divergence", quick, partial(_inputs, dtype, quick), _ours, partial(_truth, True), _plain)


def _inputs(dtype: torch.dtype, quick: bool, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) * 3).to(dtype)

    batch, vocab = (3, 5), 1003
    labels = torch.randint(0, vocab, batch, generator=generator)
    x = normal(*batch, vocab)
    y = (x + normal(*batch, vocab) / 4).to(dtype)  # as near as teachers are
    mask = torch.arange(5) < torch.arange(3).unsqueeze(-1) * 2 + 1
    per_token = torch.rand(*batch, generator=generator) + 0.5
    forbidden = torch.rand(vocab, generator=generator) < 0.2
    for name in NAMES:
        both = {"logits": x, "teacher_logits": y, "divergence": name}
        yield f"{name}: random, ragged mask", {**both, "mask": mask}
        yield f"{name}: temperatures", {**both, "temperature": per_token, "teacher_temperature": 0.7}
        neither = x.masked_fill(forbidden, -torch.inf), y.masked_fill(forbidden, -torch.inf)
        likeliest = {"token_ids": x.topk(20).indices, "mask": mask}
        yield f"{name}: over ids and the rest", {**both, **likeliest}
        yield f"{name}: over ids, renormalised", {**both, **likeliest, "tail": False}
        yield f"{name}: tokens that neither allows", dict(zip(both, (*neither, name), strict=True))
    last = {"divergence": "jsd", "labels": labels}
    yield "with statistics", {"logits": x, "teacher_logits": y, **last, "temperature": 1.3}
    wide = normal(4, 6, vocab + 8), normal(4, 6, vocab + 8)
    rows = wide[0][:, :-1, 3 : 3 + vocab], wide[1][:, 1:, 5 : 5 + vocab]
    yield "strided rows, unaligned", {"logits": rows[0], "teacher_logits": rows[1], "divergence": "reverse-kl"}
    yield "V = 1", {"logits": normal(4, 1), "teacher_logits": normal(4, 1), "divergence": "jsd"}
    yield "empty batch", {"logits": normal(0, 7), "teacher_logits": normal(0, 7), "divergence": "jsd"}
    if not quick:
        sides = normal(3, 151_936), normal(3, 151_936)
        yield "a real vocabulary", {"logits": sides[0], "teacher_logits": sides[1], "divergence": "jsd"}


def _options(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in inputs.items() if k not in ("logits", "teacher_logits")}


def _ours(seed: int, inputs: Mapping[str, Any]) -> Tensors:
    sides = [leaf(inputs[name]) for name in ("logits", "teacher_logits")]
    outputs = _OUTPUTS if "labels" in inputs else ()
    found = token_divergence(*sides, outputs=outputs, **_options(inputs))
    return _finished({name: getattr(found, name) for name in ("divergence", *outputs)}, sides, seed)


def _truth(double: bool, seed: int, inputs: Mapping[str, Any]) -> Tensors:
    sides = [leaf(inputs[name], double=double) for name in ("logits", "teacher_logits")]
    return _finished(eager.token_divergence(sides[0], sides[1], **_options(inputs)), sides, seed)


def _plain(seed: int, inputs: Mapping[str, Any]) -> Tensors:
    return _truth(False, seed, inputs)


def _finished(out: Tensors, sides: list[Tensor], seed: int) -> Tensors:
    grads = gradients(out, dict(zip(("logits", "teacher_logits"), sides, strict=True)), seed)
    return {name: value.detach() for name, value in out.items()} | grads
