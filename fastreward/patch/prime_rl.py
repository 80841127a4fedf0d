"""A loss for prime-rl: `[trainer.loss] type = "custom"`, import_path = "fastreward.patch.prime_rl.loss".

    kwargs = { loss = "dispo", pos_high = 5.0 }

Read in prime-rl at commits 559b447 and 008468c; no version of it is on a package index.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from fastreward.language.node import Node
from fastreward.language.terms import Terms
from fastreward.losses import Definition, abs, define, exp, where
from fastreward.patch.hooks import BY_SEQUENCE, arguments, hook, recipe
from fastreward.policy_loss import PolicyLoss, policy_loss

__all__ = ["LossOutputs", "loss"]


@dataclass
class LossOutputs:
    """prime-rl's, where its own is not beside the inputs that it passes."""

    loss: Tensor
    metrics: dict[str, Tensor]


class LossInputs(Protocol):
    """What prime-rl passes of one sequence, each [tokens]."""

    trainer_logprobs: Tensor
    inference_logprobs: Tensor
    advantages: Tensor
    loss_mask: Tensor


# ------------------------------------------------------------------------------------------------ prime-rl's own losses
@define
def _dppo(
    t: Terms, dppo_mask_low: float = 0.2, dppo_mask_high: float = 0.2, adv_tau: float = 1.0, kl_tau: float = 1e-3
) -> Node:
    """-A r while p - q <= high (A > 0), or p - q >= -low; plus kl_tau d^2. p, q: new and old probability."""
    moved = exp(t.logprob) - exp(t.old_logprob)
    high, low = moved > dppo_mask_high, moved < -dppo_mask_low
    return _regularized(t, where(t.advantage > 0, high, low), adv_tau, kl_tau)


@define
def _ipo(t: Terms, eps: float = 0.2, adv_tau: float = 1.0, kl_tau: float = 1e-3) -> Node:
    """-A r while |p - q| <= eps; plus kl_tau d^2. p, q: new and old probability."""
    return _regularized(t, abs(exp(t.logprob) - exp(t.old_logprob)) > eps, adv_tau, kl_tau)


@define
def _icepop(t: Terms, ratio_low: float = 0.5, ratio_high: float = 5.0, adv_tau: float = 1.0) -> Node:
    """-A r while ratio_low <= r <= ratio_high."""
    ratio = exp(t.log_ratio)
    return _regularized(t, (ratio < ratio_low) | (ratio > ratio_high), adv_tau, 0.0)


def _regularized(t: Terms, dropped: Node, adv_tau: float, kl_tau: float) -> Node:
    t.report(is_masked=dropped)
    kept = exp(where(dropped, 0.0, t.log_ratio))
    value = where(dropped, 0.0, -adv_tau * t.advantage * kept)
    return value + kl_tau * t.log_ratio * t.log_ratio


#: Its own by the names that loss= takes: "default" (DPPO's masks), "ipo" and "icepop" of its `type`.
_OWN: Final[dict[str, Definition[Any]]] = {
    "prime_rl.default": _dppo,
    "prime_rl.ipo": _ipo,
    "prime_rl.icepop": _icepop,
}


# -------------------------------------------------------------------------------------------------------- the function
@hook("prime-rl", lambda inputs, **_: inputs.trainer_logprobs.numel())
def loss(inputs: LossInputs, *, loss: str = "prime_rl.default", **options: Any) -> Any:
    """prime-rl's loss, or a recipe's: the sum over a sequence's tokens, which prime-rl divides by their global number.

    Args:
        inputs: trainer_logprobs, inference_logprobs, advantages and loss_mask of one sequence, each [tokens], and where
            they are read ref_logprobs and loss_weights (a factor of each token's loss; the KL of `_dppo` and `_ipo`
            included). inference_logprobs are what the ratio is against. Other fields go to recipes that need an
            argument of their name.
        loss: "prime_rl.default", "prime_rl.ipo" or "prime_rl.icepop", prime-rl's own with its options; or a recipe that
            returns a loss, with its own.
        options: of that loss. kl="k1", ..., with kl_coef=, adds a KL to ref_logprobs to a recipe's, which loss_weights
            do not weigh.

    Returns:
        prime-rl's LossOutputs: the loss [] and metrics by fastreward's names (those of `policy_loss`: docs/losses.md),
        of prime-rl's own losses is_masked too. Tokens under a mask of 0 count nothing, whatever lies there.

    Raises:
        ValueError: no such recipe, or one that needs what the inputs do not have. TypeError: an unknown option.
    """
    weights = getattr(inputs, "loss_weights", None)
    logprobs, old, mask = (
        x.unsqueeze(0) for x in (inputs.trainer_logprobs, inputs.inference_logprobs, inputs.loss_mask)
    )
    advantages = inputs.advantages.unsqueeze(0)
    call: dict[str, Any] = {"aggregation": "token-sum", "normalizer": 1, "empty": "zero"}
    call["weights"] = None if weights is None else weights.unsqueeze(0)
    if loss in _OWN:
        result = policy_loss(logprobs, old, advantages, mask, loss=_OWN[loss](**options), **call)
    else:
        result = _of_recipe(inputs, loss, options, call)
    none = result.metrics["token_count"] == 0  # of no token: 0, as prime-rl has it, which averages over sequences
    metrics = {name: torch.where(none, 0.0, value.detach()) for name, value in result.metrics.items()}
    outputs = getattr(sys.modules.get(type(inputs).__module__), "LossOutputs", LossOutputs)
    return outputs(loss=result.loss, metrics=metrics)


def _of_recipe(inputs: LossInputs, name: str, options: dict[str, Any], call: dict[str, Any]) -> PolicyLoss:
    found = recipe("loss", name, ("loss",))
    if options.keys() & call.keys():
        raise TypeError(f"loss: {', '.join(options.keys() & call.keys())} follow from prime-rl's own options")
    fields = {k: v.unsqueeze(0) for k, v in vars(inputs).items() if isinstance(v, Tensor) and v.ndim}
    given: dict[str, Any] = fields | {
        "logprobs": fields["trainer_logprobs"],
        "old_logprobs": fields["inference_logprobs"],
        "rollout_logprobs": fields["inference_logprobs"],
        "teacher_logprobs": fields.get("ref_logprobs"),
        "mask": fields["loss_mask"],
    }
    if name in BY_SEQUENCE:
        counted = fields["loss_mask"] != 0
        given["advantages"] = torch.where(counted, fields["advantages"], 0.0).sum(-1) / counted.sum(-1).clamp(min=1)
    if options.keys() & {"kl", "kl_coef"}:
        if "ref_logprobs" not in fields:
            raise ValueError("kl, kl_coef: expected ref_logprobs among the inputs, got None; give prime-rl a reference")
        call = call | {"ref_logprobs": fields["ref_logprobs"]}
    made = found.loss()
    if made is not None and made.reads("weight") and call["weights"] is not None:
        # in a way of its own, but linear in the advantages
        given["advantages"], call = given["advantages"] * call["weights"], call | {"weights": None}
    result: PolicyLoss = found.function(**arguments("loss", found, given, options), **call)
    return result
