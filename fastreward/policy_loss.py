"""The policy loss, its metrics and its gradient for log-probs, entropy and what else a loss trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.arrays import accepts_arrays
from fastreward._arguments.groups import GroupIds
from fastreward._arguments.numbers import Number, may_differ_from_0
from fastreward._arguments.options import KL, Aggregation, Empty
from fastreward._loss_call.call import PolicyArguments, checked_loss, finish, prepare
from fastreward._loss_call.results import Metrics, PolicyLoss
from fastreward._runtime.dispatch import select
from fastreward.losses import Loss, ppo

_DEFAULT_LOSS: Final = ppo()


@accepts_arrays
def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor | None,
    mask: Tensor | None = None,
    *,
    loss: Loss | None = None,
    aggregation: Aggregation | None = None,
    normalizer: Number | None = None,
    ref_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    kl: KL | None = None,
    kl_coef: Number = 0.0,
    entropy: Tensor | None = None,
    entropy_coef: Number = 0.0,
    weights: Tensor | None = None,
    keep: Tensor | None = None,
    group_ids: GroupIds | None = None,
    group_size: int | None = None,
    cu_seqlens: Tensor | None = None,
    extra: Mapping[str, Tensor] | None = None,
    empty: Empty = "raise",
    return_token_loss: bool = False,
    return_tokens: Sequence[str] = (),
) -> PolicyLoss:
    """Policy loss with its metrics; the gradient for logprobs and entropy is made in the same pass.

    Args:
        logprobs: of the policy being trained, [B, T], or packed [N] with cu_seqlens. Gradients flow to it, in its
            dtype. All log-probs (and entropy) may be of any floating dtype; they are computed with in float32, to which
            float64 (NumPy's default) is rounded.
        old_logprobs: of the policy that the ratio is against, same shape. None for a loss that reads none; what is
            measured against them is then absent from the metrics.
        advantages: [B], or per token in the shape of logprobs, of any real dtype. Constants. None for a loss that
            reads none.
        mask: in the shape of logprobs, bool, integer or float; nonzero = a token that counts. What lies under a zero
            (NaN, inf) leaks nowhere and has gradient 0.
        loss: one of `fastreward.losses`, or your own (`losses.define`); default losses.ppo(). Under torch.compile make
            it outside the compiled function; another formula compiles anew, other numbers in it do not.
        aggregation: token-mean (sum / tokens), token-sum, seq-mean-token-mean (mean over sequences of their means),
            seq-mean-token-sum, seq-mean-token-sum-norm (Dr.GRPO: sum / (sequences * T), T the width of the padding, or
            the longest of packed sequences: the same tokens in wider padding have a smaller loss, unless a normalizer
            such as sequences * max_tokens is given), group-mean (mean over groups of the mean over their sequences);
            None: what the loss was published with (`loss.aggregation`; token-mean
            for ppo). Sequences without a counted token do not count. A loss per sequence counts for each of its tokens.
        normalizer: replaces that denominator as a whole (tokens; 1; sequences; sequences; sequences * T; groups), for
            gradient accumulation and data parallelism (`loss_normalizer`).
        ref_logprobs, kl, kl_coef: adds kl_coef * KL to the reference policy per token: "k1", "abs", "k2", "k3", with
            "+" the value of that estimator and k2's gradient, or "k3-corrected"; x = ref - logprob is clamped to +-20
            (see losses.kl).
        rollout_logprobs: as the inference engine reported them, for losses that read them.
        entropy, entropy_coef: subtracts entropy_coef * entropy per token; gradients flow to entropy.
        weights: constant factor of each token's (or [B]: sequence's) surrogate, such as rollout importance weights;
            a loss that reads t.weight applies it in its own way. Any real dtype, as extra.
        keep: bool [B] or shape of logprobs: False drops the sequence or token, as if masked out.
        group_ids, group_size: which sequences belong together, as in group_advantages, for losses over groups.
        cu_seqlens: integers [B + 1], the packed sequences' bounds, from 0 to N. Where N == B with empty sequences
            among them, a tensor [N] that would give other numbers per token than per sequence is an error (on a GPU,
            where looking would synchronise, it is per token); an extra that the loss reads with per="sequence" is per
            sequence.
        extra: what the loss reads as t.extra(name): constants in the shape of logprobs, [B], or numbers. Gradients flow
            to those that the loss declares differentiable, [B], in their dtype.
        empty: what a batch without a counted token is, such as a micro-batch that is masked out as a whole: "raise", an
            error, which on one rank of many leaves the others waiting; "zero": a loss of 0 whose gradients, zeros,
            flow as ever. On a GPU, where looking would synchronise, always "zero".
        return_token_loss: also give the per-token loss before aggregation.
        return_tokens: what happened at each token, by name, as `tokens` of the result: "ratio" (exp(logprob -
            old_logprob), the exponent clamped to +-20), "clip" (which clip acted: `fastreward.Clip`), "kl" (to the
            reference policy, as kl= says, else k3), "loss" (before aggregation), "logprob", "entropy", and whatever the
            loss reports (t.report; a condition is 1 or 0, and a report of one of these names is given in its place).
            f32 in the shape of logprobs, 0 where masked out, without gradient; made in the same pass, and loss, metrics
            and gradients stay what they are.

    kl_coef, entropy_coef, normalizer and the numbers of a loss are numbers or 0-d tensors; a tensor on a GPU is read
    there, without waiting for it. Under torch.compile another value compiles nothing (entropy_coef=0 is another
    formula).

    Returns:
        PolicyLoss(loss f32 [], metrics, token_loss f32 or None, tokens by name). The metrics that the call has the
        terms for, then what the loss reports itself: `help(result.metrics)` says what each is.

    Raises:
        TypeError, ValueError: wrong dtype, shape or name, a term that the loss reads and that is not there, a loss
            whose gradient is zero; on the CPU (on a GPU with FASTREWARD_DEBUG=1) also for a NaN where the mask is set
            that made the loss or a metric NaN (among advantages per sequence for any), and for a mask that selects
            nothing without empty="zero" or `normalizer`. Under torch.compile values are not looked at, as on a GPU.
    """
    logprobs = check.floats("logprobs", logprobs)
    if entropy is None and may_differ_from_0(entropy_coef):
        raise ValueError("entropy: needed where entropy_coef is not 0")
    if entropy is not None:
        entropy = check.floats("entropy", entropy)
        check.shape("entropy", entropy, logprobs.shape, "as logprobs")
        check.same_device("entropy", entropy, "logprobs", logprobs)
        trained = torch.is_grad_enabled() and logprobs.requires_grad
        if trained and not entropy.requires_grad and may_differ_from_0(entropy_coef):
            raise ValueError(
                "entropy: expected a tensor that requires grad where entropy_coef is not 0 (a bonus on a constant "
                'trains nothing); take it from token_logprobs(..., outputs=("logprobs", "entropy")) without .detach()'
            )
    backend = select("policy_loss", logprobs)
    given = PolicyArguments(
        old_logprobs=old_logprobs,
        advantages=advantages,
        mask=mask,
        loss=checked_loss(loss, _DEFAULT_LOSS),
        aggregation=aggregation,
        normalizer=normalizer,
        ref_logprobs=ref_logprobs,
        rollout_logprobs=rollout_logprobs,
        kl=kl,
        kl_coef=kl_coef,
        entropy_coef=entropy_coef,
        weights=weights,
        keep=keep,
        group_ids=group_ids,
        group_size=group_size,
        cu_seqlens=cu_seqlens,
        extra=extra,
        empty=empty,
        token_loss=return_token_loss,
        return_tokens=return_tokens,
    )
    call = prepare("logprobs", logprobs, given, entropy=entropy is not None, backend=backend)
    return finish(call, logprobs, entropy, backend, {"logprobs": logprobs, "entropy": entropy})


__all__ = ["Metrics", "PolicyLoss", "policy_loss"]
