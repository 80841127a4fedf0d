"""The policy loss straight from hidden states and the LM head: no [N, V] tensor, and one GEMM fewer.

Rows are taken a few hundred at a time: their logits (one GEMM) give log-probs, these the loss's gradient, that the
gradient of the logits in place, and it those of hidden states and weight (two GEMMs); a backward that comes later would
have to compute the logits again. A loss with sums over log-probs (GSPO, ...) needs all log-probs first and takes that
way: `linear_token_logprobs`, `policy_loss` and their backwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.arrays import accepts_arrays
from fastreward._arguments.groups import GroupIds
from fastreward._arguments.logits import check_token_ids, temperatures
from fastreward._arguments.numbers import Number, joined, number, read, single, split
from fastreward._arguments.options import KL, Aggregation, Empty
from fastreward._arguments.tokens import Tokens
from fastreward._arguments.transforms import transformed
from fastreward._loss_call.call import Call, PolicyArguments, checked_loss, finish, prepare, reads_entropy
from fastreward._loss_call.op import evaluate
from fastreward._loss_call.results import PolicyLoss
from fastreward._runtime.custom_op import custom_op
from fastreward._runtime.dispatch import implementation, select
from fastreward._runtime.layout import FLAG, VALUES
from fastreward._runtime.lm_head import (
    Head,
    HeadGradients,
    check_head,
    compute_dtype_of,
    fake_gradients,
    inverse_temperature,
    rows_of,
    scaling,
)
from fastreward._runtime.precomputed_grad import with_precomputed_grad
from fastreward.distributed.ranks import own_part, refused_together
from fastreward.language.objective import gradient_program
from fastreward.linear_logprobs import linear_token_logprobs
from fastreward.losses import Loss, ppo

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: Logits that exist at a time, as elements: on a GPU enough rows to keep the GEMMs at full rate.
_CPU_LOGITS: Final = 1 << 26
_GPU_LOGITS: Final = 1 << 29
_DEFAULT_LOSS: Final = ppo()
_ROW_OF: Final = {"logprob": VALUES.index("logprobs"), "entropy": VALUES.index("entropy")}


# ------------------------------------------------------------------------------------------------------- custom op
@custom_op("linear_policy_gradient")
def _linear_policy_gradient(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    labels: Tensor,  # [N] i64
    temperature: Tensor | None,  # [N] f64
    temperature_scalar: float,
    logit_scale: float,
    given_scale: Tensor | None,  # f64 []: instead of it, where the host does not know it
    softcap: float,  # 0 = none
    given_softcap: Tensor | None,
    rows: int,  # tokens at a time
    compute_dtype: torch.dtype,
    tensors: list[Tensor],  # inputs of the gradient program besides logprob and entropy; the tokens are packed
    cu_seqlens: Tensor,
    groups: Tensor | None,
    parameters: list[float],
    numbers: Tensor | None,
    gradient: str,
    needs: list[bool],  # gradient for hidden, weight, bias
    applied: Tensor,  # f32 []
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # three gradients ([0] where not needed), logprobs, entropy
    chosen = gradient_program(gradient)
    tile = [rows, weight.shape[0]]
    factor, cap = joined(logit_scale, given_scale, backend), joined(softcap, given_softcap, backend)
    head = Head(hidden, weight, bias, factor, cap, tile, compute_dtype, backward=True)
    grads = HeadGradients(head, needs)
    inverse = inverse_temperature(temperature, temperature_scalar)
    kernels, engine = implementation("logprobs", backend), implementation("program", backend)
    tokens = Tokens((hidden.shape[0],), None, cu_seqlens)
    scalars = chosen.program.scalar_values(dict(zip(chosen.parameters, read(parameters, numbers), strict=True)))
    seen = {name: hidden.new_zeros(hidden.shape[0], dtype=torch.float32) for name in ("logprob", "entropy")}
    rest = iter(tensors)
    inputs = [seen[name] if name in seen else next(rest) for name, _ in chosen.inputs]
    flags, whole = FLAG["entropy"] if chosen.entropy else 0, slice(0, weight.shape[0])
    for part in head.row_chunks():
        logits, scale = head.logits(part, whole), rows_of(inverse, part)
        values, _, _ = kernels.forward(logits, labels[part], scale, None, None, None, None, flags)
        for name, x in seen.items():
            x[part] = values[_ROW_OF[name]]
        # The program over all tokens: what it gives for those whose log-probs are not there yet is not looked at.
        outputs, _ = engine.run(chosen.program, inputs, [tokens], scalars, groups)
        upstream = torch.zeros_like(values)
        for name, output in zip(chosen.gradients, outputs, strict=True):
            upstream[_ROW_OF[name]] = output[part] * applied
        head.backward(kernels, logits, labels[part], scale, values, upstream)
        grads.add(part, whole, logits)
    entropy = seen["entropy"] if chosen.entropy else seen["entropy"].new_empty(0)
    return (*grads.finish(), seen["logprob"], entropy)


@_linear_policy_gradient.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, gradient: str, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    def per_token(wanted: bool) -> Tensor:
        return hidden.new_empty((hidden.shape[0] if wanted else 0,), dtype=torch.float32)

    entropy = per_token(gradient_program(gradient).entropy)
    return (*fake_gradients(hidden, weight, bias, needs), per_token(True), entropy)


# ------------------------------------------------------------------------------------------------- public function
@accepts_arrays
@refused_together
def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor | None,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    temperature: Number = 1.0,
    logit_scale: Number = 1.0,
    softcap: Number | None = None,
    chunk_size: int | None = None,
    scale: Number = 1.0,
    loss: Loss | None = None,
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
    sum_hidden_grad: bool = True,
) -> PolicyLoss:
    """`policy_loss` of the log-probs that hidden @ weight.T gives to labels, without ever holding the logits [N, V].

    Args:
        hidden: [B, T, H], or [N, H] with cu_seqlens; float32, bfloat16 or float16. weight: [V, H]; bias: [V].
        labels: [B, T] or [N] integers in [0, V) (anything where masked out).
        old_logprobs, advantages, mask, ...: as in `policy_loss`. Masked tokens are dropped before the first GEMM; as
            in linear_token_logprobs, counting them is one host synchronisation on a GPU.
        temperature, logit_scale, softcap: as in `linear_token_logprobs`.
        chunk_size: tokens whose logits exist at a time (default: what the device likes).
        scale: the upstream gradient that is expected, as in `logits_policy_loss`.
        process_group, sum_hidden_grad: weight and bias are this rank's contiguous rows of the LM head, as in
            `linear_token_logprobs`; all else is the same on every rank, and so are the loss's bits. The logits are then
            computed once more in the backward. (Denominators over data-parallel ranks:
            `normalizer=loss_normalizer(...)`.)

    Returns:
        PolicyLoss, as policy_loss gives it. Gradients flow to hidden, weight and bias; for all losses but those with
        sums over log-probs once: they are handed over, not copied.

    Raises:
        TypeError, ValueError: as policy_loss and linear_token_logprobs.
    """
    sliced = process_group is not None
    check_head(hidden, weight, bias, labels, sliced=sliced)
    factor, cap = scaling(logit_scale, softcap, hidden)
    if chunk_size is not None and check.whole("chunk_size", chunk_size, "tokens at a time") < 1:
        raise ValueError(f"chunk_size: expected a positive number of tokens, got {chunk_size}")
    if not torch.compiler.is_compiling():  # which would make a constant of a number that nothing reads
        number("scale", scale, hidden, check.positive)
    backend = select("linear_policy_loss", hidden)
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
    valid = call.tokens.mask
    scalar, per_token = temperatures(temperature, labels, valid)
    if check.values_checked(hidden, labels) and not sliced:
        check_token_ids("labels", labels, weight.shape[0], valid)
    inputs = (hidden, weight, bias)
    needs = [x is not None and x.requires_grad and torch.is_grad_enabled() for x in inputs]
    if sliced or call.gradient is None or not any(needs) or transformed():
        stats = linear_token_logprobs(
            hidden, weight, labels, bias=bias, temperature=temperature, logit_scale=logit_scale, softcap=softcap,
            mask=valid, outputs=("logprobs", "entropy") if wants_entropy else ("logprobs",),
            process_group=process_group, sum_hidden_grad=sum_hidden_grad,
        )  # fmt: skip
        entropy = stats.entropy if wants_entropy else None
        with own_part(process_group):
            return finish(call, stats.logprobs, entropy, backend, {"hidden": stats.logprobs})
    packed, applied = _Packed(call, labels), single("scale", scale, hidden, check.positive)
    with torch.no_grad():
        *grads, logprobs, entropy = _linear_policy_gradient(
            packed.rows(hidden.reshape(-1, hidden.shape[-1])),
            weight,
            bias,
            packed.rows(labels.reshape(-1).long()),
            None if per_token is None else packed.rows(per_token),
            scalar,
            *split(factor),
            *split(cap),
            chunk_size or _rows_at_a_time(hidden.device, weight.shape[0]),
            compute_dtype_of(hidden),
            [packed.tensor(x) for x in call.gradient_tensors],
            packed.bounds,
            call.groups,
            call.parameters,
            call.numbers,
            call.gradient,
            needs,
            applied,
            backend,
        )
        found = evaluate(
            call.objective,
            logprobs,
            entropy if wants_entropy else None,
            [packed.tensor(x) for x in call.tensors],
            [Tokens((logprobs.shape[0],), None, packed.bounds)],
            call.groups,
            call.parameters,
            call.numbers,
            backend,
        )
    if check.values_checked(hidden):
        call.check_results(found, lambda: {"hidden": packed.unpack(logprobs).reshape(labels.shape)})
    grads[0] = packed.unpack(grads[0]).reshape(hidden.shape) if needs[0] else grads[0]
    wanted = [(x, grad) for x, grad, needed in zip(inputs, grads, needs, strict=True) if x is not None and needed]
    attached = with_precomputed_grad(
        "linear_policy_loss", found.loss, applied, backend, [grad for _, grad in wanted], [x for x, _ in wanted]
    )
    return call.result(found, attached, lambda x: packed.unpack(x).reshape(labels.shape))


class _Packed:
    """The valid tokens of a call, packed; the others are gone."""

    def __init__(self, call: Call, labels: Tensor) -> None:
        tokens = call.tokens
        self.shape, self.count = tuple(labels.shape), labels.numel()
        self.kept = None if tokens.mask is None else (tokens.mask.reshape(-1) != 0).nonzero().squeeze(-1)
        bounds = tokens.cu_seqlens
        if bounds is None:
            rows, width = labels.shape
            bounds = torch.arange(rows + 1, device=labels.device) * width
        if tokens.mask is not None:
            before = torch.nn.functional.pad((tokens.mask.reshape(-1) != 0).cumsum(0), (1, 0))
            bounds = before[bounds]
        self.bounds = bounds

    def rows(self, x: Tensor) -> Tensor:
        """The valid ones of [all tokens, ...]."""
        return x if self.kept is None else x[self.kept]

    def tensor(self, x: Tensor) -> Tensor:
        """An input of the program: packed if it is per token."""
        return self.rows(x.reshape(-1)).contiguous() if tuple(x.shape) == self.shape else x

    def unpack(self, x: Tensor) -> Tensor:
        """[valid, ...] back to [all tokens, ...], 0 where masked out."""
        if self.kept is None:
            return x
        return x.new_zeros((self.count, *x.shape[1:])).index_copy(0, self.kept, x)


def _rows_at_a_time(device: torch.device, vocab: int) -> int:
    budget = _CPU_LOGITS if device.type == "cpu" else _GPU_LOGITS
    return max(64, budget // vocab // 64 * 64)
