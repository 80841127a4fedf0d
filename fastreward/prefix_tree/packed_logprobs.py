"""Log-probs of packed tokens: one logsumexp per row, a log-prob for each token that follows it, one gradient row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.logits import LOGITS_DTYPES, check_own_memory, check_token_ids, check_unit_stride
from fastreward._arguments.numbers import Number, joined, number, split
from fastreward._arguments.transforms import refuse_double_backward
from fastreward._runtime.custom_op import custom_op
from fastreward._runtime.dispatch import select
from fastreward._runtime.layout import VALUES, flags_of
from fastreward._runtime.logprobs import TokenStats, token_logprobs, token_logprobs_backward, token_logprobs_backward_

if TYPE_CHECKING:
    from fastreward.prefix_tree.packed import PackedTree

OUTPUTS = ("logprobs", "entropy", "logsumexp", "log_sum_sq_probs")
_LOGPROB, _LOGSUMEXP = VALUES.index("logprobs"), VALUES.index("logsumexp")


@custom_op("packed_token_logprobs")
def _packed_token_logprobs(
    logits: Tensor,  # [P, V]
    labels: Tensor,  # [P] i64: the token that follows a row next, anything where masked
    mask: Tensor,  # [P] bool: rows that are read
    rows: Tensor,  # [E] i64: of the tokens that follow a row as its second, third, ... child
    ids: Tensor,  # [E] i64
    temperature: float,
    given_temperature: Tensor | None,  # f64 []: instead of it, where the host does not know it
    flags: int,
    inplace_backward: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:  # values f32 [8, P], log-probs of the further children f32 [E]
    divisor = joined(temperature, given_temperature, backend)
    given = (*_per_row(divisor, labels), mask, None, None, None, flags, inplace_backward, backend)
    values, _, _ = token_logprobs(logits, labels, *given)
    if rows.shape[0] == 0:
        return values, values.new_empty(0)
    # Relative to the first child's log-prob: a logsumexp that is rounded to f32 costs large logits their last digits.
    x = logits[rows, ids].double() / divisor
    first = values[_LOGPROB, rows].double()
    near = first + (x - logits[rows, labels[rows]].double() / divisor)
    return values, torch.where(first.isfinite(), near, x - values[_LOGSUMEXP, rows].double()).float()


@_packed_token_logprobs.register_fake
def _(logits: Tensor, labels: Tensor, mask: Tensor, rows: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    values = logits.new_empty((len(VALUES), labels.shape[0]), dtype=torch.float32)
    return values, logits.new_empty((rows.shape[0],), dtype=torch.float32)


@custom_op("packed_token_logprobs_backward")
def _packed_backward(
    logits: Tensor,
    labels: Tensor,
    mask: Tensor,
    rows: Tensor,
    ids: Tensor,
    values: Tensor,
    grad_values: Tensor,
    grad_extra: Tensor,
    temperature: float,
    given_temperature: Tensor | None,
    backend: str,
) -> Tensor:
    divisor = joined(temperature, given_temperature, backend)
    row_data = _row_data(labels, mask, values, grad_values, grad_extra, rows, divisor)
    grad: Tensor = token_logprobs_backward(logits, *row_data, backend)
    _add_further(grad, rows, ids, grad_extra, divisor)
    return grad


@_packed_backward.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits)


_packed_backward.refuse_double_backward()


@custom_op("packed_token_logprobs_backward_", mutates_args=("logits",))
def _packed_backward_(
    logits: Tensor,
    labels: Tensor,
    mask: Tensor,
    rows: Tensor,
    ids: Tensor,
    values: Tensor,
    grad_values: Tensor,
    grad_extra: Tensor,
    temperature: float,
    given_temperature: Tensor | None,
    backend: str,
) -> None:
    divisor = joined(temperature, given_temperature, backend)
    row_data = _row_data(labels, mask, values, grad_values, grad_extra, rows, divisor)
    token_logprobs_backward_(logits, *row_data, backend)
    _add_further(logits, rows, ids, grad_extra, divisor)


@_packed_backward_.register_fake
def _(*_: Any) -> None:
    return None


def _row_data(
    labels: Tensor,
    mask: Tensor,
    values: Tensor,
    grad_values: Tensor,
    grad_extra: Tensor,
    rows: Tensor,
    temperature: Number,
) -> tuple[Any, ...]:
    """What the backward of token_logprobs takes beside the logits.

    A further child's log-prob is its logit minus the row's logsumexp: what flows into the logsumexp is added up.
    """
    none = values.new_empty((labels.shape[0], 0))
    upstream = grad_values.contiguous()
    if rows.shape[0]:
        upstream = upstream.clone()
        upstream[_LOGSUMEXP].index_put_((rows,), -grad_extra, accumulate=True)
    return labels, *_per_row(temperature, labels), mask, None, None, None, values, none, upstream, none


def _per_row(temperature: Number, labels: Tensor) -> tuple[Tensor | None, float]:
    """A temperature as token_logprobs takes it: of each row where only a kernel may read it, else of all."""
    return (temperature.repeat(labels.shape[0]), 1.0) if isinstance(temperature, Tensor) else (None, temperature)


def _add_further(grad: Tensor, rows: Tensor, ids: Tensor, grad_extra: Tensor, temperature: Number) -> None:
    """And into the logits: siblings differ in their first token, so that no place is written twice."""
    if rows.shape[0]:
        grad[rows, ids] = (grad[rows, ids].double() + grad_extra.double() / temperature).to(grad.dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, labels, mask, rows, ids, temperature, given_temperature, _, inplace, backend = inputs
    ctx.save_for_backward(logits, labels, mask, rows, ids, output[0].detach().clone(), given_temperature)
    ctx.temperature, ctx.inplace, ctx.backend = temperature, inplace, backend


def _backward(ctx: Any, grad_values: Tensor | None, grad_extra: Tensor | None) -> tuple[Any, ...]:
    logits, *rest, given_temperature = ctx.saved_tensors
    values, rows = rest[-1], rest[2]
    grad_values = torch.zeros_like(values) if grad_values is None else grad_values
    grad_extra = values.new_zeros(rows.shape[0]) if grad_extra is None else grad_extra
    args = (logits, *rest, grad_values, grad_extra, ctx.temperature, given_temperature, ctx.backend)
    if not ctx.inplace:
        return _packed_backward(*args), *[None] * 9
    if torch.is_grad_enabled():
        refuse_double_backward()
    _packed_backward_(*args)
    return logits.detach(), *[None] * 9


_packed_token_logprobs.register_autograd(_backward, setup_context=_setup_context)


def packed_token_logprobs(
    packed: PackedTree, logits: Tensor, temperature: Number, outputs: tuple[str, ...], inplace_backward: bool
) -> TokenStats:
    """See PackedTree.token_logprobs."""
    check.names("outputs", outputs, OUTPUTS)
    check.dtype("logits", check.tensor("logits", logits), LOGITS_DTYPES)
    if logits.ndim == 3 and logits.shape[0] == 1:
        logits = logits[0]
    if logits.ndim != 2 or logits.shape[0] != len(packed) or logits.shape[1] == 0:
        raise ValueError(
            f"logits: expected shape [{len(packed)}, V], one row per packed token, got {list(logits.shape)}"
        )
    check.same_device("logits", logits, "the tree", packed.token_ids)
    check_unit_stride(logits)
    if inplace_backward:
        check_own_memory(logits)
    temperature, given_temperature = split(number("temperature", temperature, logits, check.positive))
    labels, mask, rows, ids = _children(packed)
    if check.values_checked(logits):
        check_token_ids("token_ids", packed.token_ids, logits.shape[-1], packed.parent >= 0)
    flags = flags_of(outputs)
    backend = select("logprobs", logits)
    values, further = _packed_token_logprobs(
        logits, labels, mask, rows, ids, temperature, given_temperature, flags, inplace_backward, backend
    )
    return TokenStats(**{name: _of_tokens(packed, name, values, further) for name in outputs})


def _children(packed: PackedTree) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(next token of each row, whether the row is read, rows and tokens of the further children)."""
    counts = packed.credited & (packed.parent >= 0)
    direct = torch.nn.functional.pad(packed.parent == packed.tin - 1, (0, 1))[1:]  # of the row before the token
    labels = torch.where(direct, packed.token_ids.roll(-1), 0)
    nowhere = len(packed)
    read = counts.new_zeros(nowhere + 1).index_fill_(0, torch.where(counts, packed.parent, nowhere), True)[:nowhere]
    further = packed._further
    return labels, read, packed.parent[further], packed.token_ids[further]


def _of_tokens(packed: PackedTree, name: str, values: Tensor, further: Tensor) -> Tensor:
    """A row's statistic for the tokens that follow it; a further child's log-prob is its own."""
    counts = packed.credited & (packed.parent >= 0)
    x = values[VALUES.index(name), packed.parent.clamp(min=0)]
    if name == "logprobs" and further.shape[0]:
        x = x.index_put((packed._further,), further)
    return torch.where(counts, x, 0.0)
