"""token_rewards: every place and KL estimate, masks with holes, sequences without a token or a score."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from fastreward._arguments.options import PLACES, REWARD_KLS
from fastreward._arguments.tokens import Tokens
from fastreward.reference import rewards as reference
from fastreward.rewards import token_rewards
from fastreward.verify import eager
from fastreward.verify.problem import Problem, Tensors, seeded


def problems(quick: bool) -> Iterator[Problem]:
    """Padded and packed, clamped and not, near and far from the reference."""
    yield from seeded("rewards", quick, _inputs, _ours, _truth, _plain)


def _inputs(seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    generator = torch.Generator().manual_seed(seed)
    shape = (7, 331)
    mask = torch.rand(shape, generator=generator) < 0.8
    mask[0], mask[1, 100:] = False, False
    scores = torch.randn(shape[0], generator=generator)
    scores[2] = torch.nan
    logprobs = -torch.rand(shape, generator=generator) * 3
    gap = torch.randn(shape, generator=generator)
    pair = {"logprobs": logprobs, "ref_logprobs": logprobs + 0.3 * gap}
    base = {"scores": scores, "mask": mask}
    for place in PLACES:
        yield f"scores alone, {place}", base | {"place": place, "clip": (-0.5, 1.0)}
        for kl in REWARD_KLS:
            yield f"{kl}, {place}", base | pair | {"place": place, "kl": kl, "kl_coef": 0.05}
    far = {"logprobs": logprobs, "ref_logprobs": logprobs + 12 * gap}
    for kl in REWARD_KLS:
        yield f"{kl}, far from the reference", base | far | {"kl": kl, "kl_coef": 0.01, "kl_value_clamp": 10.0}
    hidden = {name: x.masked_fill(~mask, torch.nan) for name, x in pair.items()}
    yield "NaN under the mask", base | hidden | {"kl_coef": 0.1}
    yield "packed", base | pair | {"kl": "k3", "kl_coef": 0.1, "packed": True}


def _ours(seed: int, inputs: Mapping[str, Any]) -> Tensors:
    given = dict(inputs)
    shape = given["mask"].shape
    if given.pop("packed", False):
        given |= {name: given[name].flatten() for name in ("mask", "logprobs", "ref_logprobs")}
        given["cu_seqlens"] = torch.arange(shape[0] + 1, device=given["mask"].device) * shape[1]
    return {"rewards": token_rewards(**given).view(shape)}


def _truth(seed: int, inputs: Mapping[str, Any]) -> Tensors:
    low, high = inputs.get("clip", (-torch.inf, torch.inf))
    numbers = (inputs.get("kl_coef", 0.0), 20.0, inputs.get("kl_value_clamp", torch.inf), low, high)
    pair = inputs.get("logprobs"), inputs.get("ref_logprobs")
    out = torch.empty(inputs["mask"].shape, dtype=torch.float64)
    tokens = Tokens(tuple(out.shape), inputs["mask"])
    how = inputs.get("kl", "k1"), inputs.get("place", "end")
    reference.token_rewards(inputs["scores"], *pair, tokens, *how, numbers, out)
    return {"rewards": out}


def _plain(seed: int, inputs: Mapping[str, Any]) -> Tensors:
    return {"rewards": eager.token_rewards(**{k: x for k, x in inputs.items() if k != "packed"})}
