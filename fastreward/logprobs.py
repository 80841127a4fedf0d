"""Log-probs, entropy and the other statistics of every token, from the logits, in one pass over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.arrays import accepts_arrays
from fastreward._arguments.numbers import Number, number
from fastreward._arguments.transforms import refuse_double_backward, transformed
from fastreward._runtime import logit_rows
from fastreward._runtime.custom_op import custom_op
from fastreward._runtime.dispatch import implementation, select
from fastreward._runtime.layout import ALL_OUTPUTS, DIFFERENTIABLE, INDICES, VALUES, flags_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: Between these a temperature and its reciprocal are finite in float64, and 0 logits stay 0.
_COLDEST, _HOTTEST = 1e-300, 1e300
LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
    _check_logits(logits, labels)
    if inplace_backward:
        _check_own_memory(logits)
    lead = tuple(labels.shape)
    rows = _row_mask(mask, labels)
    scalar, per_token = _temperature(temperature, labels, mask)
    vocab = logits.shape[-1]
    keep_mask, keep_ids = _kept(keep, logits)
    ids = None if token_ids is None else _token_ids(token_ids, labels)
    flat = labels.reshape(-1).long()
    if process_group is not None:
        from fastreward.distributed.vocab_parallel import sharded_token_logprobs

        if keep is not None or inplace_backward or token_ids is not None:
            raise ValueError("process_group: keep, token_ids and inplace_backward are not supported with it")
        values, indices = sharded_token_logprobs(logits, flat, per_token, scalar, rows, outputs, process_group)
        return _collect(outputs, values, indices, values.new_empty(0), lead)
    if check.values_checked(logits, labels):
        _check_labels("labels", labels, vocab, mask)
        if token_ids is not None:
            _check_labels("token_ids", token_ids, vocab, None if mask is None or token_ids.ndim == 1 else mask)
        if keep is not None and keep_ids is not None:
            _check_kept_ids(keep, vocab, mask)
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


def _check_logits(logits: Tensor, labels: Tensor) -> None:
    check.dtype("logits", check.tensor("logits", logits), LOGITS_DTYPES)
    check.integers("labels", labels)
    if logits.ndim < 1 or logits.shape[-1] == 0:
        raise ValueError(f"logits: expected shape [..., V] with V > 0, got {list(logits.shape)}")
    check.shape("labels", labels, logits.shape[:-1], "the logits' shape without V")
    check.same_device("labels", labels, "logits", logits)
    if logits.stride(-1) != 1 and logits.shape[-1] > 1 and logits.numel():
        raise ValueError(f"logits: expected unit stride along V, got {logits.stride(-1)}; call .contiguous() first")


def _check_own_memory(logits: Tensor) -> None:
    """No two rows share an element, which an in-place gradient would overwrite before its second reading."""
    if transformed():
        raise NotImplementedError("fastreward: a gradient in place is not available under torch.func or dual tensors")
    steps = [(stride, size) for stride, size in zip(logits.stride(), logits.shape, strict=True) if size > 1]
    if torch.compiler.is_compiling():  # symbols can't be sorted: what `expand` makes is all that is seen
        steps = [step for step in steps if step[0] == 0]
    extent = 1
    for stride, size in [] if 0 in logits.shape else sorted(steps):
        if stride < extent:
            raise ValueError(
                "logits: expected rows that share no memory with inplace_backward=True, "
                f"got strides {list(logits.stride())} for shape {list(logits.shape)}"
            )
        extent += stride * (size - 1)


def _check_labels(name: str, ids: Tensor, vocab: int, mask: Tensor | None) -> None:
    ids = ids.long()  # a narrow dtype may not hold V
    good = (ids >= 0) & (ids < vocab) | _masked_out(mask, ids)
    check.every(name, good, ids, f"integers in [0, {vocab}), the vocabulary of logits")


def _temperature(temperature: Number, labels: Tensor, mask: Tensor | None) -> tuple[float, Tensor | None]:
    """(scalar, None) or (1.0, f64 [N]): a reciprocal that is rounded to f32 costs a large logit its last digits.

    Both have a finite reciprocal, which a 0 can be multiplied by. A temperature under the mask may be anything.
    """
    if not isinstance(temperature, Tensor) or (temperature.ndim == 0 and labels.ndim):
        value = number("temperature", temperature, labels, check.positive)
        if isinstance(value, Tensor):
            return 1.0, value.clamp(_COLDEST, _HOTTEST).repeat(labels.numel())
        return min(max(value, _COLDEST), _HOTTEST), None
    check.shape("temperature", temperature, labels.shape, "one per token, as labels")
    check.same_device("temperature", temperature, "labels", labels)
    if check.values_checked(temperature):
        good = (temperature > 0) & (temperature < torch.inf)
        good = good if mask is None else good | (mask == 0)
        check.every("temperature", good, temperature, "positive numbers")
    return 1.0, check.constant("temperature", temperature).reshape(-1).double().clamp(_COLDEST, _HOTTEST)


def _row_mask(mask: Tensor | None, labels: Tensor) -> Tensor | None:
    rows = check.mask(mask, "labels", labels)
    return None if rows is None else (rows if rows.dtype == torch.bool else rows != 0).reshape(-1)


def _kept(keep: Tensor | None, logits: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """(boolean mask, None), (None, ids [N, k]) or (None, None)."""
    if keep is None:
        return None, None
    check.same_device("keep", check.tensor("keep", keep), "logits", logits)
    if keep.dtype == torch.bool:
        check.shape("keep", keep, logits.shape, "a boolean per logit")
        return keep.contiguous(), None
    if keep.dtype.is_floating_point or keep.dtype.is_complex:
        name = str(keep.dtype).removeprefix("torch.")
        raise TypeError(f"keep: expected a boolean mask [..., V] or integer ids [..., k], got dtype {name}")
    if keep.ndim != logits.ndim or keep.shape[:-1] != logits.shape[:-1]:
        raise ValueError(
            f"keep: expected a boolean [..., V] or ids [..., k] for logits {list(logits.shape)}, got {list(keep.shape)}"
        )
    if keep.shape[-1] == 0:
        raise ValueError(f"keep: expected at least one id per token, got shape {list(keep.shape)}")
    return None, keep.reshape(-1, keep.shape[-1]).long().contiguous()


def _check_kept_ids(ids: Tensor, vocab: int, mask: Tensor | None) -> None:
    ids, anything = ids.long(), _masked_out(mask, ids)
    below = f"ids below {vocab}, the vocabulary of logits (negative = padding)"
    check.every("keep", (ids < vocab) | anything, ids, below)
    ordered, place = ids.sort(dim=-1, stable=True)
    repeats = torch.zeros_like(ids, dtype=torch.bool)
    repeats[..., 1:] = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    once = ~torch.zeros_like(repeats).scatter(-1, place, repeats) | anything
    if ids.shape[-1] == vocab and bool(((ids == 0) | (ids == 1)).all()):
        check.every("keep", once, ids, f"a boolean mask [..., {vocab}] (keep.bool(); integers are ids of kept tokens)")
    check.every("keep", once, ids, "ids unique within a row")


def _masked_out(mask: Tensor | None, ids: Tensor) -> Tensor:
    """Where `ids` [..., or ..., k] may be anything."""
    out = torch.zeros((), dtype=torch.bool, device=ids.device) if mask is None else mask == 0
    return out.unsqueeze(-1) if 0 < out.ndim < ids.ndim else out


def _token_ids(token_ids: Tensor, labels: Tensor) -> Tensor:
    """[K] or [..., K] to [N, K] (row stride 0 where shared)."""
    check.integers("token_ids", token_ids)
    check.same_device("token_ids", token_ids, "labels", labels)
    lead = tuple(labels.shape)
    count = 1
    for n in lead:
        count *= n
    if token_ids.ndim == 0:
        raise ValueError("token_ids: expected ids [K], or [..., K] over the labels' shape, got a single number")
    if token_ids.ndim == 1:
        return token_ids.long().expand(count, -1)
    check.shape("token_ids", token_ids, (*lead, token_ids.shape[-1]), "ids [K], or [..., K] over the labels' shape")
    return token_ids.reshape(count, token_ids.shape[-1]).long()
