"""Logits straight to the policy loss and the logits' gradient.

A loss whose gradient at a token needs that token alone (and what is known beforehand) is one call: each logit is read
once from memory and its gradient written once. One with sums over log-probs (GSPO, VESPO, ...) takes a pass for the
statistics and a pass for the gradient: `token_logprobs`, `policy_loss` and their backwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.arrays import accepts_arrays
from fastreward._arguments.groups import GroupIds
from fastreward._arguments.logits import check_logits, check_own_memory, check_token_ids, temperatures
from fastreward._arguments.numbers import Number, number, read, single
from fastreward._arguments.options import KL, Aggregation, Empty
from fastreward._arguments.tokens import Tokens
from fastreward._arguments.transforms import transformed
from fastreward._loss_call.call import Call, PolicyArguments, checked_loss, finish, prepare, reads_entropy
from fastreward._loss_call.op import evaluate
from fastreward._loss_call.results import PolicyLoss
from fastreward._runtime import logit_rows
from fastreward._runtime.custom_op import custom_op
from fastreward._runtime.dispatch import implementation, select
from fastreward._runtime.precomputed_grad import with_precomputed_grad
from fastreward.distributed.ranks import own_part, refused_together
from fastreward.language.node import Level
from fastreward.language.objective import gradient_program
from fastreward.logprobs import token_logprobs
from fastreward.losses import Loss, ppo

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_DEFAULT_LOSS: Final = ppo()


# ------------------------------------------------------------------------------------------------------ custom ops
@custom_op("logits_gradient")
def _logits_gradient(
    logits: Tensor,  # [..., V]
    labels: Tensor,  # [N] i64
    temperature: Tensor | None,  # [N] f64
    temperature_scalar: float,
    tensors: list[Tensor],  # inputs of the gradient program besides logprob and entropy
    mask: Tensor | None,  # in the tokens' shape
    cu_seqlens: Tensor | None,
    groups: Tensor | None,
    parameters: list[float],
    numbers: Tensor | None,
    gradient: str,
    scale: Tensor,  # f32 []
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # gradient like logits; logprobs, entropy f32 [N] ([0] where not computed)
    out = logit_rows.like(logits, logit_rows.split(logits))
    args = (labels, temperature, temperature_scalar, tensors, mask, cu_seqlens, groups, parameters, numbers, gradient)
    return (out, *_write_gradient(logits, *args, scale, out, backend))


@_logits_gradient.register_fake
def _(logits: Tensor, labels: Tensor, gradient: str) -> tuple[Tensor, Tensor, Tensor]:
    def new() -> Tensor:
        return logits.new_empty(labels.shape, dtype=torch.float32)

    entropy = new() if gradient_program(gradient).entropy else logits.new_empty((0,), dtype=torch.float32)
    return logit_rows.like(logits, logit_rows.split(logits), fake=True), new(), entropy


@custom_op("logits_gradient_", mutates_args=("logits",))
def _logits_gradient_(
    logits: Tensor,
    labels: Tensor,
    temperature: Tensor | None,
    temperature_scalar: float,
    tensors: list[Tensor],
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    groups: Tensor | None,
    parameters: list[float],
    numbers: Tensor | None,
    gradient: str,
    scale: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor]:
    args = (labels, temperature, temperature_scalar, tensors, mask, cu_seqlens, groups, parameters, numbers, gradient)
    result = _write_gradient(logits, *args, scale, logits, backend)
    torch.autograd.graph.increment_version(logits)
    return result


@_logits_gradient_.register_fake
def _(logits: Tensor, labels: Tensor, gradient: str) -> tuple[Tensor, Tensor]:
    def new(count: int) -> Tensor:
        return logits.new_empty((count,), dtype=torch.float32)

    return new(labels.shape[0]), new(labels.shape[0] if gradient_program(gradient).entropy else 0)


def _write_gradient(
    logits: Tensor,
    labels: Tensor,
    temperature: Tensor | None,
    temperature_scalar: float,
    tensors: list[Tensor],
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    groups: Tensor | None,
    parameters: list[float],
    numbers: Tensor | None,
    gradient: str,
    scale: Tensor,
    out: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Logits' gradient into `out`; log-probs and entropy (or [0]) of the rows."""
    chosen = gradient_program(gradient)
    (block,) = logit_rows.split(logits, gaps=out is not logits)
    tokens = Tokens(tuple(labels.shape) if cu_seqlens is not None else tuple(logits.shape[:-1]), mask, cu_seqlens)
    inverse: float | Tensor = 1.0 / temperature_scalar if temperature is None else temperature.reciprocal()
    scalars = chosen.program.scalar_values(dict(zip(chosen.parameters, read(parameters, numbers), strict=True)))
    rest = iter(tensors)
    inputs = [None if name in ("logprob", "entropy") else next(rest) for name, _ in chosen.inputs]
    if block.gap:
        tokens, inputs = _with_gaps(block, tokens, chosen, inputs, labels)
        inverse = inverse if temperature is None else block.per_row(temperature.reciprocal())
    logprobs, entropy = implementation("logits_policy_loss", backend).run(
        chosen.program, block.matrix(logits), block.per_row(labels), inverse, inputs, tokens, scalars, groups, scale,
        block.matrix(out), chosen.gradients, chosen.entropy,
    )  # fmt: skip
    if block.gap:
        own = block.inside(logprobs.device)
        logprobs, entropy = logprobs[own], entropy[own] if chosen.entropy else entropy
    return logprobs.reshape(-1), entropy.reshape(-1)


def _with_gaps(
    block: logit_rows.RowBlock, tokens: Tokens, chosen: Any, inputs: list[Tensor | None], labels: Tensor
) -> tuple[Tokens, list[Tensor | None]]:
    """Padded rows with alien ones between them, as packed sequences whose last positions are masked out."""
    step, rows = block.length + block.gap, block.per_row(labels).shape[0]
    bounds = (torch.arange(tokens.rows + 1, device=labels.device) * step).clamp(max=rows)
    mask = torch.ones(labels.shape, dtype=torch.bool, device=labels.device) if tokens.mask is None else tokens.mask != 0
    flat = [
        x if x is None or node.level < Level.TOKEN else block.per_row(x.reshape(-1))
        for node, x in zip(chosen.program.inputs, inputs, strict=True)
    ]
    return Tokens((rows,), block.per_row(mask.reshape(-1)), bounds), flat


# ------------------------------------------------------------------------------------------------- public function
@accepts_arrays
@refused_together
def logits_policy_loss(
    logits: Tensor,
    labels: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor | None,
    mask: Tensor | None = None,
    *,
    temperature: Number = 1.0,
    loss: Loss | None = None,
    inplace: bool = False,
    scale: Number = 1.0,
    aggregation: Aggregation | None = None,
    normalizer: Number | None = None,
    ref_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    kl: KL | None = None,
    kl_coef: Number = 0.0,
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
    process_group: ProcessGroup | None = None,
) -> PolicyLoss:
    """`policy_loss` of the log-probs that logits give to labels, with the gradient for the logits, in one call.

    Args:
        logits: [B, T, V], or [N, V] with cu_seqlens; float32, bfloat16 or float16, any leading strides, unit stride
            along V. Gradients flow to it.
        labels: [B, T] or [N] integers in [0, V) (anything where masked out).
        old_logprobs, advantages, mask, ...: as in `policy_loss`.
        temperature: a positive number or 0-d tensor, or one per token.
        inplace: the gradient overwrites the logits at once: no second [..., V] tensor. Only where nothing else needs
            them afterwards. Not under torch.compile, which decides that itself.
        scale: the upstream gradient that is expected (1 / accumulation steps, a loss scale), a number or a 0-d tensor:
            the stored gradient is multiplied with it at once. Another one that arrives later is applied then, in one
            more pass over the gradient. That is the same but for what float16 can't hold: with a GradScaler pass its
            scale here, or small elements have become 0. The loss itself is not scaled.

    Returns:
        PolicyLoss, as policy_loss gives it. Its loss can be differentiated once: the gradient is handed over, not
        copied.

    Raises:
        TypeError, ValueError: as policy_loss and token_logprobs.
    """
    check_logits(logits, labels, sliced=process_group is not None)
    inplace = check.flag("inplace", inplace)
    if inplace:
        check_own_memory(logits)
        if torch.compiler.is_compiling():
            raise ValueError("inplace: not available under torch.compile")
    if not torch.compiler.is_compiling():  # which would make a constant of a number that nothing reads
        number("scale", scale, logits, check.positive)
    backend = select("logits_policy_loss", logits)
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
    wants_entropy = reads_entropy(given)
    call = prepare("labels", labels, given, entropy=wants_entropy, backend=backend, from_logits=True)
    scalar, per_token = temperatures(temperature, labels, call.tokens.mask)
    wanted = logits.requires_grad and torch.is_grad_enabled()
    fused = call.gradient is not None and wanted and backend != "reference" and not transformed()
    if process_group is not None or not fused or not _one_block(logits, inplace):
        outputs = ("logprobs", "entropy") if wants_entropy else ("logprobs",)
        valid = call.tokens.mask
        stats = token_logprobs(
            logits, labels, temperature=temperature, mask=valid, outputs=outputs, inplace_backward=inplace,
            process_group=process_group,
        )  # fmt: skip
        entropy = stats.entropy if wants_entropy else None
        on = select("policy_loss", logits)
        with own_part(process_group):
            return finish(call, stats.logprobs, entropy, on, {"logits": stats.logprobs})
    if check.values_checked(logits, labels):
        check_token_ids("labels", labels, logits.shape[-1], call.tokens.mask)
    applied = single("scale", scale, logits, check.positive)
    return _fused(logits, labels, scalar, per_token, call, wants_entropy, applied, inplace, backend)


def _one_block(logits: Tensor, inplace: bool) -> bool:
    return len(logit_rows.split(logits, gaps=not inplace)) == 1


def _fused(
    logits: Tensor,
    labels: Tensor,
    scalar: float,
    per_token: Tensor | None,
    call: Call,
    entropy_read: bool,
    applied: Tensor,
    inplace: bool,
    backend: str,
) -> PolicyLoss:
    args = (
        labels.reshape(-1).long(), per_token, scalar, call.gradient_tensors, call.tokens.mask, call.tokens.cu_seqlens,
        call.groups, call.parameters, call.numbers, call.gradient, applied, backend,
    )  # fmt: skip
    with torch.no_grad():
        if inplace:
            logprobs, entropy = _logits_gradient_(logits.detach(), *args)
            grad = logits.detach()
        else:
            grad, logprobs, entropy = _logits_gradient(logits.detach(), *args)
        shaped = [x.reshape(labels.shape) if x.numel() or not labels.numel() else None for x in (logprobs, entropy)]
        first = shaped[0]
        assert first is not None
        second = shaped[1] if entropy_read else None
        found = evaluate(
            call.objective, first, second, call.tensors, [call.tokens], call.groups, call.parameters, call.numbers,
            backend,
        )  # fmt: skip
    if check.values_checked(logits):
        call.check_results(found, lambda: {"logits": first})
    attached = with_precomputed_grad("logits_policy_loss", found.loss, applied, backend, [grad], [logits])
    return call.result(found, attached)
