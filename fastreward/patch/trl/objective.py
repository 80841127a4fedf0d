"""The losses of TRL's GRPO and RLOO trainers, composed of the package's: surrogate, correction, KL, entropy bonus.

One program gives the loss, its gradient and the sums of every metric that the trainers log. A sum and not a mean is
reported, since TRL takes its means over all processes. TRL clamps no log-ratio, so nothing is clamped here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastreward import losses
from fastreward._arguments.options import Aggregation
from fastreward._loss_call.call import PolicyArguments, prepare
from fastreward._loss_call.op import evaluate
from fastreward._runtime.dispatch import select
from fastreward.language.functions import batch_max, batch_min, batch_sum, exp, seq_mean, seq_sum, where
from fastreward.language.node import Level, Node
from fastreward.language.terms import Terms
from fastreward.losses import Loss
from fastreward.losses.token import clipped_surrogate


# ---------------------------------------------------------------------------------------------------------- formulas
@losses.define
def clipped(
    t: Terms,
    clip_low: float,
    clip_high: float,
    delta: float | None,
    kl_coef: float,
    kl_corrected: bool,
    ratio_of: str,
) -> Node:
    """PPO-clip on the ratio of each token, or of the sequence (GSPO)."""
    if ratio_of == "token":
        value = losses.ppo(clip_low, clip_high, delta=delta, log_ratio_clamp=None)(t)
    else:
        value = clipped_surrogate(t, _ratio(t, ratio_of), t.advantage, clip_low, clip_high, delta)
    low, high = t.reported["clip_fraction_low"], t.reported["clip_fraction_high"]
    t.report(
        low_sum=_total(low),
        high_sum=_total(high),
        low_min=batch_min(seq_mean(_number(low))),
        high_max=batch_max(seq_mean(_number(high))),
    )
    return _whole(t, _weighted(t, value), kl_coef, kl_corrected, ratio_of)


@losses.define
def cispo(t: Terms, clip_high: float, kl_coef: float, kl_corrected: bool, ratio_of: str) -> Node:
    """The score function weighted by the bounded ratio."""
    value = losses.cispo(clip_high=clip_high, convention="trl", log_ratio_clamp=None)(t)
    t.report(high_sum=_total(t.reported["clip_fraction_high"]))
    return _whole(t, _weighted(t, value), kl_coef, kl_corrected, ratio_of)


@losses.define
def sapo(t: Terms, tau_pos: float, tau_neg: float, kl_coef: float, kl_corrected: bool, ratio_of: str) -> Node:
    """The soft gate."""
    value = losses.sapo(tau_pos, tau_neg, log_ratio_clamp=None)(t)
    return _whole(t, _weighted(t, value), kl_coef, kl_corrected, ratio_of)


@losses.define
def vespo(
    t: Terms,
    k_pos: float,
    lambda_pos: float,
    k_neg: float,
    lambda_neg: float,
    kl_coef: float,
    kl_corrected: bool,
    ratio_of: str,
) -> Node:
    """The gate on the whole sequence's ratio; weights are part of that ratio."""
    value = losses.vespo(k_pos, lambda_pos, k_neg, lambda_neg)(t)
    t.report(phi_sum=_total(t.reported["phi_mean"]))
    return _whole(t, value, kl_coef, kl_corrected, ratio_of)


@losses.define
def rloo(t: Terms, clip_low: float, clip_high: float) -> Node:
    """PPO-clip on whole completions: what is a token here is the summed log-prob of one of them."""
    value = losses.ppo(clip_low, clip_high, log_ratio_clamp=None)(t)
    low, high = _number(t.reported["clip_fraction_low"]), _number(t.reported["clip_fraction_high"])
    t.report(low_sum=_total(low), high_sum=_total(high), low_min=batch_min(low), high_max=batch_max(high))
    return value


def _ratio(t: Terms, ratio_of: str) -> Node:
    return exp(t.log_ratio if ratio_of == "token" else seq_mean(t.log_ratio))


def _weighted(t: Terms, value: Node) -> Node:
    """Times the call's weights: what corrects or masks the surrogate leaves KL and entropy alone."""
    return t.weight * value if t.has("weight") else value


def _whole(t: Terms, value: Node, kl_coef: float, kl_corrected: bool, ratio_of: str) -> Node:
    """With the KL to the reference policy and the entropy bonus, where the call has the terms; reports their sums."""
    if t.has("ref_logprob"):
        divergence = losses.kl(t, "k3", clamp=None)
        if kl_corrected:  # by the importance ratio (use_bias_correction_kl)
            divergence = divergence * _ratio(t, ratio_of)
        t.report(kl_sum=_total(divergence))
        value = value + kl_coef * divergence
    t.report(entropy_sum=_total(t.entropy), sequences=batch_sum(1.0, t.graph))
    if t.has("bonus"):
        acting = t.entropy * t.extra("acts") if t.has("acts") else t.entropy
        t.report(acting_sum=_total(acting))
        value = value - t.extra("bonus", per="sequence") * acting
    return value


def _number(x: Node) -> Node:
    return where(x, 1.0, 0.0) if x.boolean else x


def _total(x: Node) -> Node:
    """Sum over the tokens, of what is per sequence over the sequences."""
    x = _number(x)
    return batch_sum(seq_sum(x)) if x.level == Level.TOKEN else batch_sum(x)


# --------------------------------------------------------------------------------------------------------- evaluation
@dataclass(slots=True)
class Batch:
    """What a loss is computed of. logprobs, mask [B, T]; advantages and weights [B] or [B, T].

    entropy [B, T] is a constant unless extra has "bonus" [B], the factor of each sequence's entropies in the loss.
    """

    logprobs: Tensor
    mask: Tensor
    advantages: Tensor
    entropy: Tensor
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    weights: Tensor | None = None
    extra: dict[str, Tensor] | None = None


def run(
    batch: Batch, loss: Loss, aggregation: Aggregation, normalizer: float | Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss f32 [], what it reports by name), `policy_loss` without its checks of values.

    A NaN is no error here: TRL's loss becomes NaN then, and its loss scaler or its user sees to it.
    """
    given = PolicyArguments(
        mask=batch.mask,
        loss=loss,
        aggregation=aggregation,
        normalizer=normalizer,
        weights=batch.weights,
        keep=None,
        group_ids=None,
        group_size=None,
        cu_seqlens=None,
        extra=batch.extra,
        empty="zero",
        token_loss=False,
        old_logprobs=batch.old_logprobs,
        advantages=batch.advantages,
        ref_logprobs=batch.ref_logprobs,
    )
    backend = select("policy_loss", batch.logprobs)
    call = prepare("logprobs", batch.logprobs, given, entropy=True, backend=backend)
    found = evaluate(
        call.objective,
        batch.logprobs.contiguous(),
        batch.entropy.contiguous(),
        call.tensors,
        [call.tokens],
        call.groups,
        call.parameters,
        call.numbers,
        backend,
    )
    result = call.result(found)
    return result.loss, dict(result.metrics)


Run = Callable[[Batch, Loss, Aggregation, Any], tuple[Tensor, dict[str, Tensor]]]


def tokens(batch: Batch, *_: Any) -> int:
    """Tokens of a call of `run`, padding included."""
    return batch.logprobs.numel()
