"""policy_loss: loss, token losses, metrics and gradients for every clip, KL, aggregation and layout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fastreward import losses
from fastreward._arguments.options import AGGREGATIONS, KLS
from fastreward.policy_loss import policy_loss
from fastreward.reference import policy_loss as reference
from fastreward.verify import eager
from fastreward.verify.problem import Problem, Tensors, gradients, leaf, seeded
from fastreward.verify.problems._losses import differentiable, problem

_CLIPS = ("clip_low", "clip_high", "dual_clip", "delta")
_DATA = ("logprobs", "old_logprobs", "advantages", "mask")


def problems(quick: bool) -> Iterator[Problem]:
    """Every option in turn, then what breaks losses: edges, ties, infinities under the mask, empty sequences."""
    yield from _others()
    yield from seeded("policy_loss", quick, _inputs, _ours, _truth, _plain_torch)


def _others() -> Iterator[Problem]:
    """One loss of each kind: detached weights, gates, sequence and group statistics."""
    generator = torch.Generator().manual_seed(0)
    old = -torch.rand(6, 41, generator=generator) * 3
    mask = torch.arange(41) < torch.tensor([41, 1, 0, 30, 17, 5]).unsqueeze(-1)
    for spread in (0.3, 8.0):
        terms = {
            "logprob": old + torch.randn(6, 41, generator=generator) * spread,
            "old_logprob": old,
            "advantage": torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 1.0]),
            "mask": mask,
        }
        groups = {"group_ids": torch.tensor([5, 5, 2, 2, 2, 5])}
        of_tokens = (losses.cispo(), losses.dispo(), losses.sapo(), losses.vespo(), losses.fipo(), losses.m2po())
        later = (losses.kpop(), losses.cfpo(), losses.bapo())
        for loss in (*of_tokens, *later, losses.gspo(), losses.gmpo()):
            yield problem("policy_loss", f"{loss.name}, log-ratios of {spread:g}", loss, terms, _run_loss)
        for loss in (losses.real(), losses.pacs()):
            yield problem("policy_loss", f"{loss.name}, log-ratios of {spread:g}", loss, terms | groups, _run_loss)
        log_z = {"ref_logprob": old + 0.1, "log_z": torch.randn(6, generator=generator)}
        yield problem("policy_loss", f"flowrl, log-ratios of {spread:g}", losses.flowrl(), terms | log_z, _run_loss)


def _run_loss(loss: losses.Loss, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensors]:
    leaves = {name: leaf(inputs[name]) for name in differentiable(loss, inputs)}
    extra = {name: x for name, x in leaves.items() if name in loss.differentiable}
    out = policy_loss(
        leaves["logprob"],
        inputs["old_logprob"],
        inputs["advantage"],
        inputs["mask"],
        loss=loss,
        group_ids=inputs.get("group_ids"),
        ref_logprobs=inputs.get("ref_logprob"),
        extra=extra,
    )
    return out.loss, leaves


def _inputs(seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    generator = torch.Generator().manual_seed(seed)
    shape = (5, 67)

    def normal(by: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator) * by

    old = -normal().abs()
    lengths = torch.tensor([67, 1, 0, 30, 64])  # one token, none at all
    mask = torch.arange(shape[1]) < lengths.unsqueeze(-1)
    base = {"logprobs": old + normal(0.3), "old_logprobs": old, "advantages": normal(), "mask": mask}
    extra = {"ref_logprobs": old + normal(0.3), "entropy": normal().abs(), "weights": normal().abs()}
    for aggregation in AGGREGATIONS:
        grouped = {"group_ids": torch.tensor([3, 7, 3, 3, 7])} if aggregation == "group-mean" else {}
        yield aggregation, base | grouped | {"aggregation": aggregation}
        yield f"{aggregation}, normalizer", base | grouped | {"aggregation": aggregation, "normalizer": 77.0}
    for kl in KLS:
        yield f"KL {kl}", base | {"kl": kl, "kl_coef": 0.1, "ref_logprobs": extra["ref_logprobs"]}
    yield "no mask", {name: x for name, x in base.items() if name != "mask"}
    yield "asymmetric clip, float mask", base | {"clip_low": 0.1, "clip_high": 0.28, "mask": mask.float()}
    yield "entropy bonus", base | {"entropy": extra["entropy"], "entropy_coef": 0.01}
    yield "weights, dual clip, delta, k3, entropy", base | extra | {
        "dual_clip": 3.0, "delta": 2.0, "kl": "k3", "kl_coef": 0.05, "entropy_coef": 0.02,
        "aggregation": "seq-mean-token-mean",
    }  # fmt: skip
    yield "one advantage per sequence", base | {"advantages": base["advantages"][:, 0].clone()}
    yield "extreme log-ratios, dual clip", base | {"logprobs": old + normal(30.0), "dual_clip": 3.0}
    yield "extreme log-ratios, delta", base | {"logprobs": old + normal(12.0), "delta": 4.0}
    signs = torch.randint(0, 2, shape, generator=generator) * 2.0 - 1.0
    edge = torch.where(signs > 0, 1.2, 0.8) * (1 + 1e-4 * torch.randn(shape, generator=generator).sign())
    yield "just inside and outside both clip edges", base | {"logprobs": old + edge.log()}
    yield "ties: ratio 1, clip range 0", base | {"logprobs": old.clone(), "clip_low": 0.0, "clip_high": 0.0}
    yield "advantages 0", base | {"advantages": torch.zeros(shape)}
    bad = {"logprobs": torch.nan, "old_logprobs": torch.inf, "advantages": -torch.inf}
    poisoned = {name: base[name].masked_fill(~mask, value) for name, value in bad.items()}
    yield "NaN and infinities under the mask", base | poisoned
    yield "packed", base | {"packed": True, "aggregation": "seq-mean-token-sum-norm"}
    yield "packed, one advantage per sequence", base | {
        "packed": True, "advantages": base["advantages"][:, 0].clone(), "aggregation": "seq-mean-token-mean",
    }  # fmt: skip
    yield "no valid token, normalizer", base | {"mask": torch.zeros(shape), "normalizer": 10.0}


def _leaves(inputs: Mapping[str, Any], double: bool = False) -> Tensors:
    names = ("logprobs", "entropy") if inputs.get("entropy_coef") else ("logprobs",)
    return {name: leaf(inputs[name], double) for name in names}


def _ours(seed: int, inputs: Mapping[str, Any]) -> Tensors:
    leaves = _leaves(inputs)
    clips = {k: inputs[k] for k in _CLIPS if k in inputs}
    rest = {k: v for k, v in inputs.items() if k not in (*_CLIPS, *_DATA, "packed")}
    data: dict[str, Any] = {k: inputs[k] for k in _DATA if k in inputs} | rest | leaves
    inside = inputs["mask"] != 0 if inputs.get("packed") else None
    if inside is not None:  # the mask becomes the layout: what it drops is not there at all
        data = {k: v[inside] if isinstance(v, Tensor) and v.shape == inside.shape else v for k, v in data.items()}
        del data["mask"]
        data["cu_seqlens"] = torch.nn.functional.pad(inside.sum(-1).cumsum(0), (1, 0))
    out = policy_loss(**data, loss=losses.ppo(**clips), return_tokens=("loss", "ratio", "clip"))
    token = dict(out.tokens)
    if inside is not None:
        token = {k: torch.zeros(inside.shape, device=x.device).masked_scatter(inside, x) for k, x in token.items()}
    return _finished(out.loss, token, dict(out.metrics.items()), leaves, seed)


def _truth(seed: int, inputs: Mapping[str, Any]) -> Tensors:
    leaves = _leaves(inputs, double=True)
    options = {k: v for k, v in inputs.items() if k != "packed"} | leaves
    loss, token, metrics = reference.policy_loss(**options)
    return _finished(loss, {"loss": token, **_ratio_and_clip(inputs, torch.float64)}, metrics, leaves, seed)


def _plain_torch(seed: int, inputs: Mapping[str, Any]) -> Tensors:
    leaves = _leaves(inputs)
    options = {k: v for k, v in inputs.items() if k != "packed"} | leaves
    loss, token, metrics = eager.policy_loss(**options)
    return _finished(loss, {"loss": token, **_ratio_and_clip(inputs, torch.float32)}, metrics, leaves, seed)


def _ratio_and_clip(inputs: Mapping[str, Any], dtype: torch.dtype) -> Tensors:
    """The ratio of each token, and which clip acted: 1 low, 2 high, 3 dual."""
    advantages, counted = inputs["advantages"], inputs.get("mask")
    counted = torch.ones_like(inputs["logprobs"], dtype=torch.bool) if counted is None else counted != 0
    A = advantages if advantages.ndim == 2 else advantages[:, None].expand(counted.shape)
    lp, old, A = (torch.where(counted, x, 0.0).to(dtype) for x in (inputs["logprobs"], inputs["old_logprobs"], A))
    ratio = (lp - old).clamp(-20.0, 20.0).exp()
    clip = torch.where((ratio > 1 + inputs.get("clip_high", 0.2)) & (A > 0), 2.0, 0.0)
    clip = torch.where((ratio < 1 - inputs.get("clip_low", 0.2)) & (A < 0), 1.0, clip)
    whole = -A * ratio.clamp(max=inputs.get("delta", torch.inf))
    if "dual_clip" in inputs:
        clip = torch.where((A < 0) & (whole > -A * inputs["dual_clip"]), 3.0, clip)
    return {"ratio": torch.where(counted, ratio, 0.0), "clip": torch.where(counted, clip, 0.0)}


def _finished(loss: Tensor, token: Tensors, metrics: Tensors, leaves: Tensors, seed: int) -> Tensors:
    named = {f"token {name}": value.detach() for name, value in token.items()}
    named |= {f"metric {name}": value.detach() for name, value in metrics.items()}
    grads = gradients({"loss": loss}, leaves, seed)
    return {"loss": loss.detach()} | named | grads
