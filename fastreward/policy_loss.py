"""The policy loss, its metrics and its gradient for log-probs and entropy."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastreward import _check
from fastreward._arrays import accepts_arrays
from fastreward._dispatch import select
from fastreward._numbers import Number, may_differ_from_0
from fastreward._options import KL, Aggregation
from fastreward._policy_call import GroupIds, prepare
from fastreward._program_op import evaluate
from fastreward._results import Metrics, PolicyLoss
from fastreward.losses import Loss


@accepts_arrays
def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
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
    return_token_loss: bool = False,
) -> PolicyLoss:
    """Policy loss with its metrics; the gradient for logprobs and entropy is made in the same pass.

    Args:
        logprobs: of the policy being trained, float32 [B, T], or packed [N] with cu_seqlens. Gradients flow to it.
        old_logprobs: of the policy that the ratio is against, same shape.
        advantages: [B], or per token in the shape of logprobs. Constants.
        mask: in the shape of logprobs, bool, integer or float; nonzero = a token that counts. What lies under a zero
            (NaN, inf) leaks nowhere and has gradient 0.
        loss: one of `fastreward.losses`, or your own (`losses.define`); default losses.ppo(). Under torch.compile make
            it outside the compiled function; another formula compiles anew, other numbers in it do not.
        aggregation: token-mean (sum / tokens), token-sum, seq-mean-token-mean (mean over sequences of their means),
            seq-mean-token-sum, seq-mean-token-sum-norm (sum / (sequences * T), Dr.GRPO), group-mean (mean over groups
            of the mean over their sequences); None: what the loss was published with (`loss.aggregation`; token-mean
            for ppo). Sequences without a counted token do not count. A loss per sequence counts for each of its tokens.
        normalizer: replaces that denominator as a whole (tokens; 1; sequences; sequences; sequences * T; groups), for
            gradient accumulation and data parallelism.
        ref_logprobs, kl, kl_coef: adds kl_coef * KL to the reference policy per token: "k1", "abs", "k2", "k3", with
            "+" the value of that estimator and k2's gradient, or "k3-corrected"; x = ref - logprob is clamped to +-20
            (see losses.kl).
        rollout_logprobs: as the inference engine reported them, for losses that read them.
        entropy, entropy_coef: subtracts entropy_coef * entropy per token; gradients flow to entropy.
        weights: constant factor of each token's (or [B]: sequence's) surrogate, such as rollout importance weights;
            a loss that reads t.weight applies it in its own way.
        keep: bool [B] or shape of logprobs: False drops the sequence or token, as if masked out.
        group_ids, group_size: which sequences belong together, as in group_advantages, for losses over groups.
        cu_seqlens: integers [B + 1], the packed sequences' bounds, from 0 to N. Where N == B a tensor of that length
            is one per token.
        extra: what the loss reads as t.extra(name): constants in the shape of logprobs, [B], or numbers.
        return_token_loss: also give the per-token loss before aggregation.

    kl_coef, entropy_coef, normalizer and the numbers of a loss are numbers or 0-d tensors; a tensor on a GPU is read
    there, without waiting for it. Under torch.compile another value compiles nothing (entropy_coef=0 is another
    formula).

    Returns:
        PolicyLoss(loss f32 [], metrics, token_loss f32 or None). The metrics that the call has the terms for, then what
        the loss reports itself: `help(result.metrics)` says what each is.

    Raises:
        TypeError, ValueError: wrong dtype, shape or name, a term that the loss reads and that is not there, a loss
            whose gradient is zero; on the CPU (on a GPU with FASTREWARD_DEBUG=1) also for NaN advantages where the mask
            is set (per token where they made the loss NaN), and for a mask that selects nothing without `normalizer`.
    """
    _check.dtype("logprobs", _check.tensor("logprobs", logprobs), (torch.float32,))
    if entropy is None and may_differ_from_0(entropy_coef):
        raise ValueError("entropy: needed where entropy_coef is not 0")
    if entropy is not None:
        _check.dtype("entropy", _check.tensor("entropy", entropy), (torch.float32,))
        _check.shape("entropy", entropy, logprobs.shape, "as logprobs")
        _check.same_device("entropy", entropy, "logprobs", logprobs)
    backend = select("policy_loss", logprobs)
    call = prepare(
        "logprobs",
        logprobs,
        old_logprobs,
        advantages,
        mask,
        loss=loss,
        aggregation=aggregation,
        normalizer=normalizer,
        ref_logprobs=ref_logprobs,
        rollout_logprobs=rollout_logprobs,
        kl=kl,
        kl_coef=kl_coef,
        entropy=entropy is not None,
        entropy_coef=entropy_coef,
        weights=weights,
        keep=keep,
        group_ids=group_ids,
        group_size=group_size,
        cu_seqlens=cu_seqlens,
        extra=extra,
        token_loss=return_token_loss,
        backend=backend,
    )
    total, values, token_loss = evaluate(
        call.objective,
        logprobs.contiguous(),
        None if entropy is None else entropy.contiguous(),
        call.tensors,
        [call.tokens],
        call.groups,
        call.parameters,
        call.numbers,
        backend,
    )
    metrics = Metrics(values, call.metrics)
    if _check.values_checked(logprobs):
        call.check_results(total.detach(), metrics)
    return PolicyLoss(total, metrics, token_loss if return_token_loss else None)


__all__ = ["Metrics", "PolicyLoss", "policy_loss"]
