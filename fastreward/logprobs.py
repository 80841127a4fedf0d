"""Log-probs, entropy and the other statistics of every token, from the logits, in one pass over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.arrays import accepts_arrays
from fastreward._arguments.logits import (
    check_kept_ids,
    check_logits,
    check_own_memory,
    check_token_ids,
    ids_of_tokens,
    kept_tokens,
    row_mask,
    temperatures,
)
from fastreward._arguments.numbers import Number
from fastreward._arguments.transforms import refuse_double_backward
from fastreward._runtime import logit_rows
from fastreward._runtime.custom_op import custom_op
from fastreward._runtime.dispatch import implementation, select
from fastreward._runtime.layout import ALL_OUTPUTS, DIFFERENTIABLE, INDICES, VALUES, flags_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class TokenStats:
    """What was asked for, by name (`stats.logprobs`, `stats.entropy`, ...); iterates in the order of `outputs`."""

    logprobs: Tensor
    entropy: Tensor
    logsumexp: Tensor
    label_logit: Tensor
    mean_logit: Tensor
    log_sum_sq_probs: Tensor
    max_logprob: Tensor
    argmax: Tensor
    rank: Tensor
    id_logprobs: Tensor

    def __init__(self, **outputs: Any) -> None:
        self.__dict__.update(outputs)

    def __getattr__(self, name: str) -> Tensor:
        """Only reached for what is not there: says how to get it."""
        if name in ALL_OUTPUTS:
            raise AttributeError(f"{name} was not asked for; pass outputs=(..., {name!r})")
        raise AttributeError(f"TokenStats has no output {name!r}; there are {', '.join(ALL_OUTPUTS)}")

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.__dict__.values())

    def __repr__(self) -> str:
        return f"TokenStats({', '.join(self.__dict__)})"

    def _map_tensors(self, function: Callable[[Tensor], Any]) -> TokenStats:
        return TokenStats(**{name: function(value) for name, value in self.__dict__.items()})


# ------------------------------------------------------------------------------------------------------ custom ops
@custom_op("token_logprobs")
def _token_logprobs(
    logits: Tensor,  # [..., V]
    labels: Tensor,  # [N] i64
    temperature: Tensor | None,  # [N] f64
    temperature_scalar: float,
    mask: Tensor | None,  # [N] bool
    keep_mask: Tensor | None,  # [..., V] bool
    keep_ids: Tensor | None,  # [N, k] i64
    token_ids: Tensor | None,  # [N, K] i64
    flags: int,
    inplace_backward: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # values f32 [8, N], indices i64 [2, N], id_logprobs f32 [N, K]
    kernels = implementation("logprobs", backend)
    inverse = temperature.reciprocal() if temperature is not None else 1.0 / temperature_scalar
    blocks = logit_rows.split(logits, gaps=keep_mask is None)
    parts = []
    for block in blocks:
        row_mask = _masked_gaps(block, mask, labels)
        scale = block.spread(inverse) if isinstance(inverse, Tensor) else inverse
        columns = None if keep_mask is None else block.matrix(keep_mask)
        label, kept, ids = block.spread(labels), block.spread(keep_ids), block.spread(token_ids)
        out = kernels.forward(block.matrix(logits), label, scale, row_mask, columns, kept, ids, flags)
        parts.append(_without_gaps(block, out))
    if len(parts) == 1:
        return parts[0]
    values, indices, id_logprobs = zip(*parts, strict=True)
    return torch.cat(values, 1), torch.cat(indices, 1), torch.cat(id_logprobs, 0)


@_token_logprobs.register_fake
def _(
    logits: Tensor,
    labels: Tensor,
    temperature: Tensor | None,
    temperature_scalar: float,
    mask: Tensor | None,
    keep_mask: Tensor | None,
    keep_ids: Tensor | None,
    token_ids: Tensor | None,
    flags: int,
    inplace_backward: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    n = labels.shape[0]
    values = logits.new_empty((len(VALUES), n), dtype=torch.float32)
    indices = labels.new_empty((len(INDICES), n))
    return values, indices, logits.new_empty((n, 0 if token_ids is None else token_ids.shape[1]), dtype=torch.float32)


@custom_op("token_logprobs_backward")
def _token_logprobs_backward(
    logits: Tensor,
    labels: Tensor,
    temperature: Tensor | None,
    temperature_scalar: float,
    mask: Tensor | None,
    keep_mask: Tensor | None,
    keep_ids: Tensor | None,
    token_ids: Tensor | None,
    values: Tensor,
    id_logprobs: Tensor,
    grad_values: Tensor,
    grad_ids: Tensor,
    backend: str,
) -> Tensor:
    blocks = logit_rows.split(logits, gaps=keep_mask is None)
    grad = logit_rows.like(logits, blocks)
    row_data = (labels, temperature, temperature_scalar, mask, keep_mask, keep_ids, token_ids)
    _write_gradient(blocks, logits, row_data, values, id_logprobs, grad_values, grad_ids, grad, backend)
    return grad


@_token_logprobs_backward.register_fake
def _(
    logits: Tensor,
    labels: Tensor,
    temperature: Tensor | None,
    temperature_scalar: float,
    mask: Tensor | None,
    keep_mask: Tensor | None,
    keep_ids: Tensor | None,
    token_ids: Tensor | None,
    values: Tensor,
    id_logprobs: Tensor,
    grad_values: Tensor,
    grad_ids: Tensor,
    backend: str,
) -> Tensor:
    return logit_rows.like(logits, logit_rows.split(logits, gaps=keep_mask is None), fake=True)


_token_logprobs_backward.refuse_double_backward()


@custom_op("token_logprobs_backward_", mutates_args=("logits",))
def _token_logprobs_backward_(
    logits: Tensor,
    labels: Tensor,
    temperature: Tensor | None,
    temperature_scalar: float,
    mask: Tensor | None,
    keep_mask: Tensor | None,
    keep_ids: Tensor | None,
    token_ids: Tensor | None,
    values: Tensor,
    id_logprobs: Tensor,
    grad_values: Tensor,
    grad_ids: Tensor,
    backend: str,
) -> None:
    blocks = logit_rows.split(logits, gaps=False)  # what lies in the gaps of a view is not ours to overwrite
    row_data = (labels, temperature, temperature_scalar, mask, keep_mask, keep_ids, token_ids)
    _write_gradient(blocks, logits, row_data, values, id_logprobs, grad_values, grad_ids, logits, backend)
    torch.autograd.graph.increment_version(logits)


@_token_logprobs_backward_.register_fake
def _(*_: Any) -> None:
    return None


def _write_gradient(
    blocks: list[logit_rows.RowBlock],
    logits: Tensor,
    row_data: tuple[Any, ...],
    values: Tensor,
    id_logprobs: Tensor,
    grad_values: Tensor,
    grad_ids: Tensor,
    grad: Tensor,
    backend: str,
) -> None:
    labels, temperature, temperature_scalar, mask, keep_mask, keep_ids, token_ids = row_data
    kernels = implementation("logprobs", backend)
    inverse = temperature.reciprocal() if temperature is not None else None
    for block in blocks:
        kernels.backward(
            block.matrix(logits),
            block.spread(labels),
            1.0 / temperature_scalar if inverse is None else block.spread(inverse),
            _masked_gaps(block, mask, labels),
            None if keep_mask is None else block.matrix(keep_mask),
            block.spread(keep_ids),
            block.spread(token_ids),
            _spread_columns(block, values),
            block.spread(id_logprobs),
            _spread_columns(block, grad_values),
            None if token_ids is None else block.spread(grad_ids),
            block.matrix(grad),
        )


def _masked_gaps(block: logit_rows.RowBlock, mask: Tensor | None, labels: Tensor) -> Tensor | None:
    """The row mask of a block's matrix: the caller's, and False in the gaps."""
    if mask is None and block.gap:
        mask = torch.ones_like(labels, dtype=torch.bool)
    return block.spread(mask)


def _spread_columns(block: logit_rows.RowBlock, x: Tensor) -> Tensor:
    """[F, N] to [F, rows], contiguous."""
    if not block.gap and block.count == x.shape[1]:
        return x.contiguous()
    spread = block.spread(x.t())
    assert spread is not None
    return spread.t().contiguous()


def _without_gaps(block: logit_rows.RowBlock, out: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    if not block.gap:
        return out
    values, indices, id_logprobs = out
    own = block.inside(values.device)
    return values[:, own], indices[:, own], id_logprobs[own]


# -------------------------------------------------------------------------------------------------------- autograd
def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, labels, temperature, scalar, mask, keep_mask, keep_ids, token_ids, _, inplace, backend = inputs
    values, _, id_logprobs = output
    # Copies, small beside the logits: the caller may edit the outputs in place before the backward.
    saved = (values.detach().clone(), id_logprobs.detach().clone())
    ctx.save_for_backward(logits, labels, temperature, mask, keep_mask, keep_ids, token_ids, *saved)
    ctx.scalar, ctx.inplace, ctx.backend = scalar, inplace, backend


def _backward(ctx: Any, grad_values: Tensor | None, _: Tensor | None, grad_ids: Tensor | None) -> tuple[Any, ...]:
    logits, labels, temperature, mask, keep_mask, keep_ids, token_ids, values, id_logprobs = ctx.saved_tensors
    grad_values = torch.zeros_like(values) if grad_values is None else grad_values
    grad_ids = torch.zeros_like(id_logprobs) if grad_ids is None else grad_ids
    row_data = (labels, temperature, ctx.scalar, mask, keep_mask, keep_ids, token_ids)
    args = (logits, *row_data, values, id_logprobs, grad_values, grad_ids.contiguous(), ctx.backend)
    if ctx.inplace and torch.is_grad_enabled():
        refuse_double_backward()
    if ctx.inplace:
        _token_logprobs_backward_(*args)
        grad = logits.detach()
    else:
        grad = _token_logprobs_backward(*args)
    return (grad, *[None] * 10)


_token_logprobs.register_autograd(_backward, setup_context=_setup_context)


# ------------------------------------------------------------------------------------------------- public function
@accepts_arrays
def token_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: Number = 1.0,
    mask: Tensor | None = None,
    outputs: tuple[str, ...] = ("logprobs",),
    token_ids: Tensor | None = None,
    keep: Tensor | None = None,
    process_group: ProcessGroup | None = None,
    inplace_backward: bool = False,
) -> TokenStats:
    """Log-prob of each label under softmax(logits / temperature), and the row's other statistics, in one pass.

    Args:
        logits: [..., V] float32, bfloat16 or float16; any leading strides, unit stride along V. Never copied.
        labels: [...] integers in [0, V) (anything where masked out).
        temperature: a positive number or 0-d tensor, or one per token [...] (anything where masked out).
        mask: [...] bool, integer or float, nonzero = compute; other rows are not read, all theirs is 0.
        outputs: any of logprobs, entropy (nats), logsumexp, label_logit, mean_logit (all of the tempered logits),
            log_sum_sq_probs (log of the sum of squared probabilities), max_logprob, argmax (first of equals), rank
            (number of tokens above the label; 0 = top), id_logprobs ([..., K], needs token_ids).
        token_ids: integers [K] or [..., K] in [0, V), whose log-probs id_logprobs gives.
        keep: the tokens that sampling kept (top-k, top-p): bool [..., V], or ids [..., k] in [0, V), unique in a row,
            negative = padding (anything where masked out). Probabilities are renormalised over them; with ids only
            those logits are read.
        process_group: the logits are this rank's contiguous slice of the vocabulary, in rank order; labels, token_ids
            are global. Per token only the slice's statistics cross ranks (64 bytes), never a logit.
        inplace_backward: the backward overwrites `logits` with its gradient (no second [..., V] tensor). Only where
            nothing else needs the logits afterwards.

    Returns:
        TokenStats with the asked-for outputs, each [...] (id_logprobs [..., K]), float32 (argmax, rank int64).
        Gradients flow to logits through logprobs, entropy, logsumexp, log_sum_sq_probs and id_logprobs, together in one
        pass, but no second derivatives. A row of only -inf gives NaN, as torch, and so does one with NaN or +inf (whose
        argmax is unspecified, whose logsumexp is NaN or +inf); a label outside `keep` has log-prob -inf.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device, label or name, before anything runs. Values are checked on
            the CPU; on a GPU only with FASTREWARD_DEBUG=1, under torch.compile never: there an illegal label or token
            id gives NaN, and a kept id outside [0, V) counts as padding.
    """
    _check_names(outputs, token_ids)
    check_logits(logits, labels)
    if inplace_backward:
        check_own_memory(logits)
    lead = tuple(labels.shape)
    rows = row_mask(mask, labels)
    scalar, per_token = temperatures(temperature, labels, mask)
    vocab = logits.shape[-1]
    keep_mask, keep_ids = kept_tokens(keep, logits)
    ids = None if token_ids is None else ids_of_tokens(token_ids, labels)
    flat = labels.reshape(-1).long()
    if process_group is not None:
        from fastreward.distributed.vocab_parallel import sharded_token_logprobs

        if keep is not None or inplace_backward or token_ids is not None:
            raise ValueError("process_group: keep, token_ids and inplace_backward are not supported with it")
        values, indices = sharded_token_logprobs(logits, flat, per_token, scalar, rows, outputs, process_group)
        return _collect(outputs, values, indices, values.new_empty(0), lead)
    if check.values_checked(logits, labels):
        check_token_ids("labels", labels, vocab, mask)
        if token_ids is not None:
            check_token_ids("token_ids", token_ids, vocab, None if mask is None or token_ids.ndim == 1 else mask)
        if keep is not None and keep_ids is not None:
            check_kept_ids(keep, vocab, mask)
    backend = select("logprobs", logits)
    values, indices, id_logprobs = _token_logprobs(
        logits, flat, per_token, scalar, rows, keep_mask, keep_ids, ids, flags_of(outputs), inplace_backward, backend
    )
    return _collect(outputs, values, indices, id_logprobs, lead)


def _collect(
    outputs: tuple[str, ...], values: Tensor, indices: Tensor, id_logprobs: Tensor, lead: tuple[int, ...]
) -> TokenStats:
    def output(name: str) -> Tensor:
        if name == "id_logprobs":
            return id_logprobs.reshape(*lead, id_logprobs.shape[-1])
        if name in INDICES:
            return indices[INDICES.index(name)].reshape(lead)
        x = values[VALUES.index(name)].reshape(lead)
        return x if name in DIFFERENTIABLE else x.detach()

    return TokenStats(**{name: output(name) for name in outputs})


# ---------------------------------------------------------------------------------------------------------- checks
def _check_names(outputs: tuple[str, ...], token_ids: Tensor | None) -> None:
    check.names("outputs", outputs, ALL_OUTPUTS)
    if ("id_logprobs" in outputs) != (token_ids is not None):
        raise ValueError("token_ids: needed for the output 'id_logprobs', and only for it")
