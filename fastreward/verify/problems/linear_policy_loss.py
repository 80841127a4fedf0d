"""linear_policy_loss: loss and gradients for hidden states, weight and bias against float64."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch

from fastreward import losses
from fastreward.language.evaluate import evaluate
from fastreward.linear_policy_loss import linear_policy_loss
from fastreward.reference.policy_loss import aggregate
from fastreward.verify.problem import Problem, Tensors, gradients, leaf

_OPTIONS: dict[str, dict[str, Any]] = {
    "": {},
    ", bias": {"bias": True},
    ", softcap": {"softcap": 5.0, "logit_scale": 0.5},
}
_LEAVES = ("hidden", "weight", "bias")


def problems(quick: bool) -> Iterator[Problem]:
    """A loss by token (three GEMMs) and one that needs all log-probs first, with scale, softcap and bias."""
    for loss in (losses.ppo(), losses.gspo()):
        for name, options in _OPTIONS.items():
            yield Problem(
                "linear_policy_loss",
                f"{loss.name}{name}",
                "float32",
                _inputs(),
                partial(_ours, loss, options),
                partial(_torch, loss, options, True),
                partial(_torch, loss, options, False),
            )


def _inputs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    rows, width, hidden, vocab = 4, 30, 24, 301
    labels = torch.randint(0, vocab, (rows, width), generator=generator)
    return {
        "hidden": torch.randn(rows, width, hidden, generator=generator),
        "weight": torch.randn(vocab, hidden, generator=generator) * 0.4,
        "bias": torch.randn(vocab, generator=generator) * 0.1,
        "labels": labels,
        "old_logprobs": -5 + torch.randn(rows, width, generator=generator),
        "advantages": torch.randn(rows, generator=generator),
        "mask": torch.arange(width) < torch.tensor([30, 1, 0, 17]).unsqueeze(-1),
    }


def _ours(loss: losses.Loss, options: Mapping[str, Any], inputs: Mapping[str, Any]) -> Tensors:
    leaves = {name: leaf(inputs[name]) for name in _LEAVES if name != "bias" or options.get("bias")}
    given: dict[str, Any] = {k: v for k, v in inputs.items() if k not in _LEAVES} | leaves
    given |= {k: v for k, v in options.items() if k != "bias"}
    result = linear_policy_loss(**given, loss=loss, chunk_size=40)
    return {"loss": result.loss.detach()} | gradients({"loss": result.loss}, leaves, 0)


def _torch(loss: losses.Loss, options: Mapping[str, Any], double: bool, inputs: Mapping[str, Any]) -> Tensors:
    leaves = {name: leaf(inputs[name], double) for name in _LEAVES if name != "bias" or options.get("bias")}
    logits = leaves["hidden"] @ leaves["weight"].t() + leaves.get("bias", 0.0)
    logits = logits * options.get("logit_scale", 1.0)
    cap = options.get("softcap")
    logits = cap * torch.tanh(logits / cap) if cap else logits
    logprobs = torch.log_softmax(logits, -1).gather(-1, inputs["labels"].unsqueeze(-1)).squeeze(-1)
    terms = {"logprob": logprobs, "old_logprob": inputs["old_logprobs"], "advantage": inputs["advantages"]}
    value = evaluate(loss, inputs["mask"], None, terms, torch.float64 if double else torch.float32)
    token = value if value.ndim == 2 else torch.where(inputs["mask"], value.unsqueeze(-1), 0.0)
    total = aggregate(token, inputs["mask"], loss.aggregation)
    return {"loss": total.detach()} | gradients({"loss": total}, leaves, 0)
