"""Log-probs of packed tokens: one logsumexp per row, a log-prob for each token that follows it, one gradient row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.logits import LOGITS_DTYPES, check_own_memory, check_token_ids, check_unit_stride
from fastreward._arguments.numbers import Number, joined, number, split
from fastreward._arguments.transforms import refuse_double_backward
from fastreward._runtime.custom_op import custom_op
from fastreward._runtime.dispatch import implementation, select
from fastreward._runtime.layout import VALUES, flags_of
from fastreward._runtime.logprobs import TokenStats
from fastreward._runtime.memory import empty_like
from fastreward.prefix_tree.layout import PackedLayout

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
    kernels, inverse = implementation("logprobs", backend), _inverse(divisor, labels)
    values, _, _ = kernels.forward(logits, labels, inverse, mask, None, None, None, flags)
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
    grad = empty_like(logits)
    row_data = (labels, mask, rows, ids, values, grad_values, grad_extra)
    _write_gradient(logits, *row_data, joined(temperature, given_temperature, backend), grad, backend)
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
    row_data = (labels, mask, rows, ids, values, grad_values, grad_extra)
    _write_gradient(logits, *row_data, joined(temperature, given_temperature, backend), logits, backend)
    torch.autograd.graph.increment_version(logits)


@_packed_backward_.register_fake
def _(*_: Any) -> None:
    return None


def _write_gradient(
    logits: Tensor,
    labels: Tensor,
    mask: Tensor,
    rows: Tensor,
    ids: Tensor,
    values: Tensor,
    grad_values: Tensor,
    grad_extra: Tensor,
    temperature: Number,
    grad: Tensor,
    backend: str,
) -> None:
    """That of token_logprobs, and of the further children.

    A further child's log-prob is its logit minus the row's logsumexp: what flows into the logsumexp is added up.
    Siblings differ in their first token, so that no place of the logits is written twice.
    """
    upstream = grad_values.contiguous()
    if rows.shape[0]:
        upstream = upstream.clone()
        upstream[_LOGSUMEXP].index_put_((rows,), -grad_extra, accumulate=True)
    none, inverse = values.new_empty((labels.shape[0], 0)), _inverse(temperature, labels)
    row_data = (labels, inverse, mask, None, None, None, values.contiguous(), none)
    implementation("logprobs", backend).backward(logits, *row_data, upstream, None, grad)
    if rows.shape[0]:
        grad[rows, ids] = (grad[rows, ids].double() + grad_extra.double() / temperature).to(grad.dtype)


def _inverse(temperature: Number, labels: Tensor) -> Tensor | float:
    """1 / temperature as the kernels take it: of each row where only a kernel may read it, else of all."""
    return temperature.repeat(labels.shape[0]).reciprocal() if isinstance(temperature, Tensor) else 1.0 / temperature


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
    packed: PackedLayout,
    further: Tensor,
    logits: Tensor,
    temperature: Number,
    outputs: tuple[str, ...],
    inplace_backward: bool,
) -> TokenStats:
    """See PackedTree.token_logprobs; `further` as `further_children` gives them."""
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
    inplace_backward = check.flag("inplace_backward", inplace_backward)
    if inplace_backward:
        check_own_memory(logits)
    temperature, given_temperature = split(number("temperature", temperature, logits, check.positive))
    labels, mask, rows, ids = _children(packed, further)
    if check.values_checked(logits):
        check_token_ids("token_ids", packed.token_ids, logits.shape[-1], packed.parent >= 0)
    flags = flags_of(outputs)
    backend = select("logprobs", logits)
    values, others = _packed_token_logprobs(
        logits, labels, mask, rows, ids, temperature, given_temperature, flags, inplace_backward, backend
    )
    return TokenStats(**{name: _of_tokens(packed, name, values, further, others) for name in outputs})


def further_children(packed: PackedLayout) -> Tensor:
    """Tokens with credit that do not stand right behind their parent: its second, third, ... children."""
    return (packed.credited & (packed.parent >= 0) & (packed.parent != packed.tin - 1)).nonzero().squeeze(1)


def _children(packed: PackedLayout, further: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(next token of each row, whether the row is read, rows and tokens of the further children)."""
    counts = packed.credited & (packed.parent >= 0)
    direct = torch.nn.functional.pad(packed.parent == packed.tin - 1, (0, 1))[1:]  # of the row before the token
    labels = torch.where(direct, packed.token_ids.roll(-1), 0)
    nowhere = len(packed)
    read = counts.new_zeros(nowhere + 1).index_fill_(0, torch.where(counts, packed.parent, nowhere), True)[:nowhere]
    return labels, read, packed.parent[further], packed.token_ids[further]


def _of_tokens(packed: PackedLayout, name: str, values: Tensor, further: Tensor, others: Tensor) -> Tensor:
    """A row's statistic for the tokens that follow it; a further child's log-prob is its own, one of `others`."""
    counts = packed.credited & (packed.parent >= 0)
    x = values[VALUES.index(name), packed.parent.clamp(min=0)]
    if name == "logprobs" and further.shape[0]:
        x = x.index_put((further,), others)
    return torch.where(counts, x, 0.0)
