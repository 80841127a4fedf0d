"""Custom ops of token_logprobs, with their gradient, and what they give by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from fastreward._arguments.transforms import refuse_double_backward
from fastreward._runtime import logit_rows
from fastreward._runtime.custom_op import custom_op
from fastreward._runtime.dispatch import implementation
from fastreward._runtime.layout import ALL_OUTPUTS, DIFFERENTIABLE, FLAG, INDICES, STATE, VALUES
from fastreward._runtime.logit_rows import RowBlock


class TokenStats:
    """The outputs asked for, by name (`stats.logprobs`, `stats.entropy`, ...); iterates in the order of `outputs`."""

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


def collect(
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


# ------------------------------------------------------------------------------------------------------ custom ops
_KernelArguments = tuple[Tensor, Tensor, float | Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


@dataclass(slots=True, eq=False, repr=False)
class _Rows:
    """Description of N rows of logits, as the ops below take it one by one."""

    labels: Tensor  # [N] i64
    temperature: Tensor | None  # [N] f64
    temperature_scalar: float  # where that is None
    mask: Tensor | None  # [N] bool
    keep_mask: Tensor | None  # [..., V] bool
    keep_ids: Tensor | None  # [N, k] i64
    token_ids: Tensor | None  # [N, K] i64

    def blocks(self, logits: Tensor) -> list[RowBlock]:
        """Matrices that the logits and the mask of kept tokens lie in alike."""
        return logit_rows.split(logits, gaps=self.keep_mask is None)

    def inverse(self) -> float | Tensor:
        """1 / temperature, of all rows or of each."""
        return 1.0 / self.temperature_scalar if self.temperature is None else self.temperature.reciprocal()

    def of(self, block: RowBlock, logits: Tensor, inverse: float | Tensor) -> _KernelArguments:
        """Arguments of a backend for the rows of a block's matrix: all before the op's own."""
        mask = self.mask
        if mask is None and block.gap:
            mask = torch.ones_like(self.labels, dtype=torch.bool)
        return (
            block.matrix(logits),
            block.per_row(self.labels),
            block.per_row(inverse) if isinstance(inverse, Tensor) else inverse,
            block.per_row(mask),  # False in the gaps
            None if self.keep_mask is None else block.matrix(self.keep_mask),
            block.per_row(self.keep_ids),
            block.per_row(self.token_ids),
        )


@custom_op("token_logprobs")
def token_logprobs(
    logits: Tensor,  # [..., V]
    labels: Tensor,  # see _Rows
    temperature: Tensor | None,
    temperature_scalar: float,
    mask: Tensor | None,
    keep_mask: Tensor | None,
    keep_ids: Tensor | None,
    token_ids: Tensor | None,
    flags: int,
    inplace_backward: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # values f32 [8, N], indices i64 [2, N], id_logprobs f32 [N, K]
    kernels = implementation("logprobs", backend)
    rows = _Rows(labels, temperature, temperature_scalar, mask, keep_mask, keep_ids, token_ids)
    inverse = rows.inverse()
    parts = [
        _without_gaps(block, kernels.forward(*rows.of(block, logits, inverse), flags)) for block in rows.blocks(logits)
    ]
    if len(parts) == 1:
        return parts[0]
    values, indices, id_logprobs = zip(*parts, strict=True)
    return torch.cat(values, 1), torch.cat(indices, 1), torch.cat(id_logprobs, 0)


@token_logprobs.register_fake
def _(logits: Tensor, labels: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    n, token_ids = labels.shape[0], others[5]
    values = logits.new_empty((len(VALUES), n), dtype=torch.float32)
    indices = labels.new_empty((len(INDICES), n))
    return values, indices, logits.new_empty((n, 0 if token_ids is None else token_ids.shape[1]), dtype=torch.float32)


@custom_op("token_logprobs_backward")
def token_logprobs_backward(
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
    rows = _Rows(labels, temperature, temperature_scalar, mask, keep_mask, keep_ids, token_ids)
    blocks = rows.blocks(logits)
    grad = logit_rows.like(logits, blocks)
    _write_gradient(logits, rows, blocks, (values, id_logprobs, grad_values, grad_ids), grad, backend)
    return grad


@token_logprobs_backward.register_fake
def _(logits: Tensor, *others: Any) -> Tensor:
    return logit_rows.like(logits, logit_rows.split(logits, gaps=others[4] is None), fake=True)


token_logprobs_backward.refuse_double_backward()


@custom_op("token_logprobs_backward_", mutates_args=("logits",))
def token_logprobs_backward_(
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
    rows = _Rows(labels, temperature, temperature_scalar, mask, keep_mask, keep_ids, token_ids)
    blocks = logit_rows.split(logits, gaps=False)  # what lies in the gaps of a view is not ours to overwrite
    _write_gradient(logits, rows, blocks, (values, id_logprobs, grad_values, grad_ids), logits, backend)
    torch.autograd.graph.increment_version(logits)


@token_logprobs_backward_.register_fake
def _(*_: Any) -> None:
    return None


def _write_gradient(
    logits: Tensor,
    rows: _Rows,
    blocks: list[RowBlock],
    stats: tuple[Tensor, Tensor, Tensor, Tensor],  # values, id_logprobs and what flows into each
    grad: Tensor,
    backend: str,
) -> None:
    values, id_logprobs, grad_values, grad_ids = stats
    kernels, inverse = implementation("logprobs", backend), rows.inverse()
    for block in blocks:
        kernels.backward(
            *rows.of(block, logits, inverse),
            _columns(block, values),
            block.per_row(id_logprobs),
            _columns(block, grad_values),
            None if rows.token_ids is None else block.per_row(grad_ids),
            block.matrix(grad),
        )


def _columns(block: RowBlock, x: Tensor) -> Tensor:
    """[F, N] to [F, rows], contiguous."""
    if not block.gap and block.count == x.shape[1]:
        return x.contiguous()
    return block.per_row(x.t()).t().contiguous()


def _without_gaps(block: RowBlock, out: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
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
        token_logprobs_backward_(*args)
        grad = logits.detach()
    else:
        grad = token_logprobs_backward(*args)
    return (grad, *[None] * 10)


token_logprobs.register_autograd(_backward, setup_context=_setup_context)


# ------------------------------------------------------------------------------------------- slices of a vocabulary
#: A distance of two maxima in nats beyond which the lower one vanishes, also where it is multiplied by the distance.
_FAR: Final = -1e4


def initial_state(count: int, device: torch.device) -> Tensor:
    """The state of `count` rows before the first column, f64 [N, 8]."""
    state = torch.zeros((count, len(STATE)), dtype=torch.float64, device=device)
    state[:, STATE.index("max")] = -torch.inf
    state[:, STATE.index("label_logit")] = torch.nan
    return state


def slice_state(
    logits: Tensor,  # [..., V of the slice]
    labels: Tensor,  # see _Rows; labels and ids count from where the slice begins
    temperature: Tensor | None,
    temperature_scalar: float,
    mask: Tensor | None,
    keep_mask: Tensor | None,
    keep_ids: Tensor | None,
    flags: int,
    label_logits: Tensor | None,  # [N] f32 raw, what rank compares with
    backend: str,
) -> Tensor:
    """The state of a slice of the vocabulary, f64 [N, 8]. With a kept set: its label_logit and rank say nothing."""
    count = labels.shape[0]
    if not logits.shape[-1] or not count:
        return initial_state(count, logits.device)
    kernels = implementation("logprobs", backend)
    rows = _Rows(labels, temperature, temperature_scalar, mask, keep_mask, keep_ids, None)
    inverse, parts = rows.inverse(), []
    for block in rows.blocks(logits):
        matrix, local, scale, counted, kept, ids, _ = rows.of(block, logits, inverse)
        if kept is None and ids is None:
            state = initial_state(matrix.shape[0], logits.device)
            kernels.accumulate(matrix, local, 0, scale, state, flags, block.per_row(label_logits))
        else:
            flags &= ~FLAG["rank"]
            values, indices, _ = kernels.forward(matrix, local, scale, counted, kept, ids, None, flags)
            columns = kept.sum(-1) if kept is not None else _inside(ids, matrix.shape[1]).sum(-1)
            state = _state_of(values, indices, scale, columns)
        parts.append(state[block.inside(logits.device)] if block.gap else state)
    return torch.cat(parts)


def _state_of(values: Tensor, indices: Tensor, inverse: float | Tensor, columns: Tensor) -> Tensor:
    """The state that these results were made of, but for label_logit and rank."""
    _, entropy, _, _, mean, log_squares, max_logprob, peak = values.double()
    nothing, log_total = peak == -torch.inf, -max_logprob
    total = log_total.exp()
    zero = torch.zeros_like(total)
    logit_sum = torch.where(columns > 0, mean * columns / inverse, 0.0)
    sums = total, total * (log_total - entropy), (log_squares + 2.0 * log_total).exp()
    return torch.stack(
        [peak, *(torch.where(nothing, 0.0, x) for x in sums), logit_sum, zero + torch.nan, indices[0].double(), zero],
        -1,
    )


def _inside(ids: Tensor | None, columns: int) -> Tensor:
    assert ids is not None
    return (ids >= 0) & (ids < columns)


def merge(states: Tensor, inverse: float | Tensor) -> Tensor:
    """One state [N, 8] from those of consecutive slices [slices, N, 8], f64, in their order."""
    peaks, sums, weighted, squares, logits, labels, argmax, ranks = states.unbind(-1)
    peak = peaks.amax(0)
    base = torch.where(peak == -torch.inf, 0.0, peak)
    shift = torch.where(peaks == -torch.inf, 0.0, ((peaks - base) * inverse).clamp(min=_FAR))
    scale = torch.where(peaks == -torch.inf, 0.0, shift.exp())
    first = (peaks == peak).to(torch.int8).argmax(0, keepdim=True)
    seen = ~labels.isnan()
    label = torch.where(seen.any(0), torch.where(seen, labels, -torch.inf).amax(0), torch.nan)
    return torch.stack(
        [
            peak,
            (scale * sums).sum(0),
            (scale * (weighted + shift * sums)).sum(0),
            (scale * scale * squares).sum(0),
            logits.sum(0),
            label,
            argmax.gather(0, first).squeeze(0),
            ranks.sum(0),
        ],
        -1,
    )
