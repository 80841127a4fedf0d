"""The policy loss, its metrics and its gradient for log-probs and entropy, in one pass over the tokens."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from fastreward import _check, losses
from fastreward._arrays import accepts_arrays
from fastreward._dispatch import implementation, select
from fastreward._layout import METRICS
from fastreward._op import custom_op, refuse_double_backward
from fastreward._options import AGGREGATIONS, KL, KLS, Aggregation, PolicyOptions


class Metrics(Mapping[str, Tensor]):
    """The loss's metrics: one device tensor `values` [12] f32, read by name without a host synchronisation."""

    def __init__(self, values: Tensor) -> None:
        self.values_tensor = values

    def __getitem__(self, name: str) -> Tensor:
        return self.values_tensor[METRICS.index(name)] if name in METRICS else self._missing(name)

    def __iter__(self) -> Iterator[str]:
        return iter(METRICS)

    def __len__(self) -> int:
        return len(METRICS)

    def __repr__(self) -> str:
        return f"Metrics({', '.join(METRICS)})"

    def floats(self) -> dict[str, float]:
        """All of them as Python floats, in one transfer."""
        return dict(zip(METRICS, self.values_tensor.tolist(), strict=True))

    def _map_tensors(self, function: Callable[[Tensor], Any]) -> Metrics:
        return Metrics(function(self.values_tensor))

    @staticmethod
    def _missing(name: str) -> Tensor:
        raise KeyError(f"no metric {name!r}; there are {', '.join(METRICS)}")


@dataclass(frozen=True, slots=True)
class PolicyLoss:
    """loss: scalar f32 with gradient; metrics: by name; token_loss: [B, T] before aggregation, if asked for."""

    loss: Tensor
    metrics: Metrics
    token_loss: Tensor | None = None


# ------------------------------------------------------------------------------------------------------ custom ops
@custom_op("policy_loss")
def _policy_loss(
    logprobs: Tensor,  # [B, T] or [N]
    entropy: Tensor | None,
    old_logprobs: Tensor,
    advantages: Tensor,  # as logprobs, or [B]
    mask: Tensor | None,
    ref_logprobs: Tensor | None,
    weights: Tensor | None,
    cu_seqlens: Tensor | None,  # i64 [B + 1]
    normalizer: Tensor | None,  # f32 []
    clip: list[float],  # clip_low, clip_high
    dual_clip: float | None,
    delta: float | None,
    log_ratio_clamp: float | None,
    aggregation: str,
    kl: str | None,
    kl_coef: float,
    entropy_coef: float,
    want_token_loss: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    options = _options(clip, dual_clip, delta, log_ratio_clamp, aggregation, kl, kl_coef, entropy_coef)
    result: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = implementation("policy_loss", backend).forward(
        logprobs,
        old_logprobs,
        advantages,
        mask,
        ref_logprobs,
        entropy,
        weights,
        cu_seqlens,
        options,
        want_token_loss,
        normalizer,
    )
    return result


@_policy_loss.register_fake
def _(
    logprobs: Tensor,
    entropy: Tensor | None,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    ref_logprobs: Tensor | None,
    weights: Tensor | None,
    cu_seqlens: Tensor | None,
    normalizer: Tensor | None,
    clip: list[float],
    dual_clip: float | None,
    delta: float | None,
    log_ratio_clamp: float | None,
    aggregation: str,
    kl: str | None,
    kl_coef: float,
    entropy_coef: float,
    want_token_loss: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = logprobs.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    new = logprobs.new_empty
    token_loss = new(logprobs.shape) if want_token_loss else new((0,))
    return new(()), new((len(METRICS),)), new(logprobs.shape), new((rows,)), token_loss


@custom_op("policy_loss_backward")
def _policy_loss_backward(
    saved: Tensor,
    mask: Tensor | None,
    row_weight: Tensor,
    grad_loss: Tensor,
    cu_seqlens: Tensor | None,
    entropy_coef: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    options = PolicyOptions(entropy_coef=entropy_coef)
    kernels = implementation("policy_loss", backend)
    grad, grad_entropy = kernels.backward(saved, mask, row_weight, grad_loss, cu_seqlens, options)
    return (grad.clone() if grad.data_ptr() == saved.data_ptr() else grad), grad_entropy


@_policy_loss_backward.register_fake
def _(
    saved: Tensor,
    mask: Tensor | None,
    row_weight: Tensor,
    grad_loss: Tensor,
    cu_seqlens: Tensor | None,
    entropy_coef: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(saved), torch.empty_like(saved) if entropy_coef else saved.new_empty((0,))


def _options(
    clip: list[float],
    dual_clip: float | None,
    delta: float | None,
    log_ratio_clamp: float | None,
    aggregation: str,
    kl: str | None,
    kl_coef: float,
    entropy_coef: float,
) -> PolicyOptions:
    known_aggregation = next(a for a in AGGREGATIONS if a == aggregation)
    known_kl: KL | None = next((k for k in KLS if k == kl), None)
    return PolicyOptions(
        clip[0], clip[1], dual_clip, delta, log_ratio_clamp, known_aggregation, known_kl, kl_coef, entropy_coef
    )


# -------------------------------------------------------------------------------------------------------- autograd
def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    mask, cu_seqlens = inputs[4], inputs[7]
    _, metrics, saved, row_weight, token_loss = output
    ctx.mark_non_differentiable(metrics, saved, row_weight, token_loss)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(saved.detach(), mask, row_weight.detach(), cu_seqlens)
    ctx.entropy_coef, ctx.backend = inputs[16], inputs[18]


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    if grad_loss is None:
        return (None,) * 19
    if torch.is_grad_enabled():  # create_graph=True: what is saved is the gradient, a constant to autograd
        refuse_double_backward()
    saved, mask, row_weight, cu_seqlens = ctx.saved_tensors
    if type(saved) is Tensor and saved.device.type == "cpu":
        # Not through the custom op, whose outputs may not alias its inputs: an upstream gradient of 1 costs nothing.
        options = PolicyOptions(entropy_coef=ctx.entropy_coef)
        kernels = implementation("policy_loss", ctx.backend)
        grad, grad_entropy = kernels.backward(saved, mask, row_weight, grad_loss, cu_seqlens, options)
    else:
        grad, grad_entropy = _policy_loss_backward(
            saved, mask, row_weight, grad_loss, cu_seqlens, ctx.entropy_coef, ctx.backend
        )
    return (grad, grad_entropy if ctx.needs_input_grad[1] and ctx.entropy_coef else None, *[None] * 17)


_policy_loss.register_autograd(_backward, setup_context=_setup_context)


# ------------------------------------------------------------------------------------------------- public function
@accepts_arrays
def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    loss: losses.PPO | None = None,
    aggregation: Aggregation = "token-mean",
    normalizer: float | Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    kl: KL | None = None,
    kl_coef: float = 0.0,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    weights: Tensor | None = None,
    keep: Tensor | None = None,
    group_ids: Tensor | Sequence[Hashable] | None = None,
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
        loss: `losses.ppo(...)`, the default.
        aggregation: token-mean (sum / tokens), seq-mean-token-mean (mean over sequences of their means),
            seq-mean-token-sum, seq-mean-token-sum-norm (sum / (sequences * T), Dr.GRPO). Sequences without a counted
            token do not count.
        normalizer: replaces that denominator as a whole (tokens; sequences; sequences; sequences * T), for gradient
            accumulation and data parallelism: a float or a 0-d tensor.
        ref_logprobs, kl, kl_coef: adds kl_coef * KL to the reference policy per token: "k1", "k2" or "k3" of
            x = ref - logprob, clamped to +-20 (http://joschu.net/blog/kl-approx.html).
        entropy, entropy_coef: subtracts entropy_coef * entropy per token; gradients flow to entropy.
        weights: constant factor of each token's surrogate (rollout importance weights), shape of logprobs.
        keep: bool [B] or shape of logprobs: False drops the sequence or token, as if masked out.
        cu_seqlens: integers [B + 1], the packed sequences' bounds, from 0 to N.
        group_ids, extra: for losses over groups and losses with terms of their own; the PPO family takes neither.
        return_token_loss: also give the per-token loss before aggregation.

    Returns:
        PolicyLoss(loss f32 [], metrics, token_loss f32 or None).

    Raises:
        TypeError, ValueError: wrong dtype, shape or name; on the CPU (on a GPU with FASTREWARD_DEBUG=1) also for NaN
            advantages where the mask is set, and for a mask that selects nothing while no `normalizer` is given.
    """
    settings = _settings(loss, group_ids, extra)
    _check.choice("aggregation", aggregation, AGGREGATIONS)
    _check_kl(kl, kl_coef, ref_logprobs)
    if entropy_coef and entropy is None:
        raise ValueError("entropy: needed where entropy_coef is not 0")
    bounds = _check_tokens(logprobs, old_logprobs, advantages, cu_seqlens)
    mask = _check.mask(mask, "logprobs", logprobs)
    for name, x in (("ref_logprobs", ref_logprobs), ("entropy", entropy), ("weights", weights)):
        if x is not None:
            _like_logprobs(name, x, logprobs)
    counted = _with_keep(mask, keep, logprobs, bounds)
    backend = select("policy_loss", logprobs)
    if backend != "cpu" and _check.values_checked(logprobs):  # the CPU kernel looks while it reads them anyway
        _check_advantages(advantages, counted, bounds)
    outputs = _policy_loss(
        logprobs.contiguous(),
        None if entropy is None else entropy.contiguous(),
        old_logprobs.detach().contiguous(),
        advantages.detach().float().contiguous(),
        None if counted is None else counted.contiguous(),
        None if ref_logprobs is None else ref_logprobs.detach().contiguous(),
        None if weights is None else weights.detach().contiguous(),
        bounds,
        _normalizer(normalizer, logprobs),
        [settings.clip_low, settings.clip_high],
        settings.dual_clip,
        settings.delta,
        settings.log_ratio_clamp,
        aggregation,
        kl,
        float(kl_coef),
        float(entropy_coef),
        return_token_loss,
        backend,
    )
    metrics = Metrics(outputs[1].detach())
    if normalizer is None and logprobs.numel() and _check.values_checked(logprobs):
        _check_counted(metrics["token_count"])  # the kernel has counted anyway: no pass over the mask for this
    return PolicyLoss(outputs[0], metrics, outputs[4].detach() if return_token_loss else None)


# ---------------------------------------------------------------------------------------------------------- checks
def _settings(loss: losses.PPO | None, group_ids: object, extra: object) -> losses.PPO:
    if loss is not None and not isinstance(loss, losses.PPO):
        raise TypeError(f"loss: expected one of fastreward.losses, such as losses.ppo(), got {type(loss).__name__}")
    for name, value in (("group_ids", group_ids), ("extra", extra)):
        if value is not None:
            raise ValueError(f"{name}: the PPO family has no term that uses it")
    return loss or losses.ppo()


def _check_kl(kl: str | None, kl_coef: float, ref_logprobs: Tensor | None) -> None:
    if kl is not None:
        _check.choice("kl", kl, get_args(KL))
        if ref_logprobs is None:
            raise ValueError(f"ref_logprobs: needed for kl={kl!r}")
    elif kl_coef:
        raise ValueError("kl: expected 'k1', 'k2' or 'k3' where kl_coef is not 0, got None")


def _check_tokens(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, cu_seqlens: Tensor | None
) -> Tensor | None:
    """Checks the token tensors against each other; returns cu_seqlens as i64 (None where padded)."""
    _check.dtype("logprobs", _check.tensor("logprobs", logprobs), (torch.float32,))
    _like_logprobs("old_logprobs", old_logprobs, logprobs)
    bounds = None if cu_seqlens is None else _bounds(cu_seqlens, logprobs)
    if bounds is None and logprobs.ndim != 2:
        raise ValueError(f"logprobs: expected [B, T], or [N] with cu_seqlens, got shape {list(logprobs.shape)}")
    sequences = logprobs.shape[0] if bounds is None else bounds.shape[0] - 1
    _check.tensor("advantages", advantages)
    if tuple(advantages.shape) not in {tuple(logprobs.shape), (sequences,)}:
        raise ValueError(
            f"advantages: expected shape {list(logprobs.shape)} (one per token) or [{sequences}] (one per sequence), "
            f"got {list(advantages.shape)}"
        )
    _check.same_device("advantages", advantages, "logprobs", logprobs)
    return bounds


def _check_advantages(advantages: Tensor, counted: Tensor | None, bounds: Tensor | None) -> None:
    good = ~advantages.isnan()
    if counted is not None and counted.shape == advantages.shape:
        good |= counted == 0
    elif counted is not None and bounds is None:
        good |= (counted == 0).all(-1)
    elif counted is not None and bounds is not None:
        tokens = torch.nn.functional.pad((counted != 0).cumsum(0), (1, 0))
        good |= tokens[bounds].diff() == 0
    _check.every("advantages", good, advantages, "finite values where mask is set")


def _like_logprobs(name: str, x: Tensor, logprobs: Tensor) -> None:
    _check.dtype(name, _check.tensor(name, x), (torch.float32,))
    _check.shape(name, x, logprobs.shape, "as logprobs")
    _check.same_device(name, x, "logprobs", logprobs)


def _bounds(cu_seqlens: Tensor, logprobs: Tensor) -> Tensor:
    _check.integers("cu_seqlens", cu_seqlens)
    _check.same_device("cu_seqlens", cu_seqlens, "logprobs", logprobs)
    if logprobs.ndim != 1 or cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(
            "cu_seqlens: expected [B + 1] bounds over packed logprobs [N], "
            f"got {list(cu_seqlens.shape)} over {list(logprobs.shape)}"
        )
    if cu_seqlens.shape[0] == 1 and logprobs.shape[0]:
        raise ValueError(f"cu_seqlens: expected bounds from 0 to {logprobs.shape[0]}, got those of no sequence")
    bounds = cu_seqlens.long()
    if _check.values_checked(bounds):
        _check.every("cu_seqlens", bounds.diff(prepend=bounds[:1]) >= 0, bounds, "bounds that never decrease")
        if int(bounds[0]) != 0 or int(bounds[-1]) != logprobs.shape[0]:
            raise ValueError(
                f"cu_seqlens: expected bounds from 0 to {logprobs.shape[0]} (the packed length), "
                f"got {int(bounds[0])} to {int(bounds[-1])}"
            )
        return bounds.contiguous()
    # Unchecked: whatever they are, no kernel may leave the tokens, and every token belongs to some sequence.
    bounds = bounds.clamp(0, logprobs.shape[0]).cummax(0).values
    bounds[:1], bounds[-1:] = 0, logprobs.shape[0]
    return bounds


def _with_keep(mask: Tensor | None, keep: Tensor | None, logprobs: Tensor, bounds: Tensor | None) -> Tensor | None:
    """The mask, less what `keep` drops."""
    if keep is None:
        return mask
    kept = _check.tensor("keep", keep) != 0
    _check.same_device("keep", keep, "logprobs", logprobs)
    sequences = logprobs.shape[0] if bounds is None else bounds.shape[0] - 1
    if kept.shape != logprobs.shape:
        _check.shape("keep", kept, (sequences,), "one per sequence, or as logprobs")
        if bounds is None:
            kept = kept.unsqueeze(-1).expand_as(logprobs)
        else:
            kept = kept.repeat_interleave(bounds.diff(), output_size=logprobs.shape[0])
    return kept if mask is None else kept & (mask != 0)


def _check_counted(token_count: Tensor) -> None:
    if not token_count:
        raise ValueError(
            "mask: expected at least one counted token, got an all-zero mask; "
            "pass normalizer=... where a micro-batch may be empty"
        )


def _normalizer(normalizer: float | Tensor | None, logprobs: Tensor) -> Tensor | None:
    if normalizer is None:
        return None
    if isinstance(normalizer, Tensor):
        _check.shape("normalizer", normalizer, (), "a float or a 0-d tensor")
        return normalizer.detach().to(device=logprobs.device, dtype=torch.float32)
    return torch.full((), _check.positive("normalizer", normalizer), dtype=torch.float32, device=logprobs.device)
