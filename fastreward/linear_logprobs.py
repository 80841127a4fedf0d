"""Log-probs straight from hidden states and the LM head, tile by tile: the logits [N, V] never exist.

The GEMMs are the vendor's; a tile of logits is folded into eight statistics per token while it is in cache, and in the
backward it is recomputed and turned into its own gradient in place.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastreward._arguments import check
from fastreward._arguments.arrays import accepts_arrays
from fastreward._arguments.logits import LOGITS_DTYPES, check_token_ids, row_mask, temperatures
from fastreward._arguments.numbers import Number, joined, may_differ_from_0, number, split
from fastreward._runtime.custom_op import custom_op
from fastreward._runtime.dispatch import implementation, select
from fastreward._runtime.layout import FLAG, INDICES, OUTPUT_VALUES, STATE, VALUES, flags_of
from fastreward._runtime.memory import empty_like
from fastreward.distributed.vocab_parallel import initial_state
from fastreward.logprobs import TokenStats, _collect

_OUTPUTS = (*OUTPUT_VALUES, *INDICES)
_LABEL = STATE.index("label_logit")
_RANK = STATE.index("rank")

#: Tokens and vocabulary columns of a tile. On the CPU smaller tiles stay nearer to the core, but lose more in the GEMMs
#: than the fold gains (measured down to 1024 x 2048). On a GPU a tile must keep the GEMM at full rate.
_CPU_TILE = (1024, 16384)
_GPU_TILE = (4096, 32768)

#: What one GEMM call on the CPU sums over at most, and the fewest rows it gets. Elsewhere MKL adds in an order that
#: depends on the number of rows and of threads, and so would a token's bits; inside, its AVX-512 kernels do not (its
#: AVX2 kernels do, and nothing helps). From 64 rows on it costs nothing measurable; a single row takes 2 to 4 times as
#: long, as a GEMM of 16 where a product with a vector would do.
_CPU_SUM = 512
_CPU_ROWS = 16

#: A softcap above caps no logit of any model, one below makes all logits 0.
_LEAST_CAP, _WIDEST_CAP = 1.2e-38, 1e30
_LARGEST = torch.finfo(torch.float32).max


# ------------------------------------------------------------------------------------------------------ custom ops
@custom_op("linear_token_logprobs")
def _linear_token_logprobs(
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
    flags: int,
    tile: list[int],
    compute_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:  # values f32 [8, N], indices i64 [2, N]
    kernels = implementation("linear_logprobs", backend)
    inverse = _inverse(temperature, temperature_scalar)
    scale, cap = joined(logit_scale, given_scale, backend), joined(softcap, given_softcap, backend)
    head = _Head(hidden, weight, bias, scale, cap, tile, compute_dtype)
    state = initial_state(hidden.shape[0], hidden.device)
    for columns in head.column_chunks():
        for rows in head.row_chunks():
            logits = head.logits(rows, columns)
            kernels.fold(
                logits, labels[rows], columns.start, _rows_of(inverse, rows), state[rows], flags & ~FLAG["rank"], None
            )
    if flags & FLAG["rank"]:  # counting needs the label's logit first: a second pass over the tiles
        label_logits = state[:, _LABEL].float()
        counts = initial_state(hidden.shape[0], hidden.device)
        for columns in head.column_chunks():
            for rows in head.row_chunks():
                logits, threshold = head.logits(rows, columns), label_logits[rows]
                scale = _rows_of(inverse, rows)
                kernels.fold(logits, labels[rows], columns.start, scale, counts[rows], FLAG["rank"], threshold)
        state[:, _RANK] = counts[:, _RANK]
    values, indices = kernels.finish(state, inverse, weight.shape[0], flags)
    return values, indices


@_linear_token_logprobs.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    temperature: Tensor | None,
    temperature_scalar: float,
    logit_scale: float,
    given_scale: Tensor | None,
    softcap: float,
    given_softcap: Tensor | None,
    flags: int,
    tile: list[int],
    compute_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    n = hidden.shape[0]
    return hidden.new_empty((len(VALUES), n), dtype=torch.float32), labels.new_empty((len(INDICES), n))


@custom_op("linear_token_logprobs_backward")
def _linear_token_logprobs_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    temperature: Tensor | None,
    temperature_scalar: float,
    logit_scale: float,
    given_scale: Tensor | None,
    softcap: float,
    given_softcap: Tensor | None,
    tile: list[int],
    compute_dtype: torch.dtype,
    values: Tensor,
    grad_values: Tensor,
    needs: list[bool],  # gradient for hidden, weight, bias
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # an unneeded gradient is [0]
    kernels = implementation("linear_logprobs", backend)
    inverse = _inverse(temperature, temperature_scalar)
    factor, cap = joined(logit_scale, given_scale, backend), joined(softcap, given_softcap, backend)
    head = _Head(hidden, weight, bias, factor, cap, tile, compute_dtype, backward=True)
    grads = _HeadGradients(head, needs)
    slices = [(rows, values[:, rows].contiguous(), grad_values[:, rows].contiguous()) for rows in head.row_chunks()]
    for columns in head.column_chunks():
        for rows, stats, upstream in slices:
            logits = head.logits(rows, columns)
            local, scale = labels[rows] - columns.start, _rows_of(inverse, rows)
            head.backward(kernels, logits, local, scale, stats, upstream)
            grads.add(rows, columns, logits)
    return grads.finish()


@_linear_token_logprobs_backward.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    temperature: Tensor | None,
    temperature_scalar: float,
    logit_scale: float,
    given_scale: Tensor | None,
    softcap: float,
    given_softcap: Tensor | None,
    tile: list[int],
    compute_dtype: torch.dtype,
    values: Tensor,
    grad_values: Tensor,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    def grad(needed: bool, x: Tensor | None) -> Tensor:
        if not needed or x is None:
            return hidden.new_empty((0,))
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    return grad(needs[0], hidden), grad(needs[1], weight), grad(needs[2], bias)


_linear_token_logprobs_backward.refuse_double_backward()


class _Head:
    """The projection hidden @ weight.T + bias, scaled and soft-capped, one tile at a time in one buffer."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        logit_scale: Number,
        softcap: Number,  # 0 = none
        tile: list[int],
        compute_dtype: torch.dtype,
        *,
        backward: bool = False,
    ) -> None:
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.logit_scale, self.softcap, self.dtype = logit_scale, softcap, compute_dtype
        self.row_step, self.column_step = min(tile[0], max(len(hidden), 1)), min(tile[1], len(weight))
        device = hidden.device
        self.fewest = _CPU_ROWS if device.type == "cpu" else 1
        size = max(self.row_step, self.fewest) * self.column_step
        self.buffer = torch.empty(size, dtype=compute_dtype, device=device)
        # What follows the GEMM happens in float32: in the GEMM's own dtype every step would round again.
        # So do the CPU's GEMMs of a gradient, which would else each make that copy.
        self.scaled = isinstance(logit_scale, Tensor) or logit_scale != 1.0
        self.capped = may_differ_from_0(softcap)
        changed = bias is not None or self.scaled or self.capped or (backward and device.type == "cpu")
        wide = changed and compute_dtype != torch.float32
        self.wide = torch.empty(size, dtype=torch.float32, device=device) if wide else None

    def row_chunks(self) -> Iterator[slice]:
        return _chunks(len(self.hidden), self.row_step)

    def column_chunks(self) -> Iterator[slice]:
        return _chunks(len(self.weight), self.column_step)

    def logits(self, rows: slice, columns: slice) -> Tensor:
        """[rows, columns], float32 or the GEMMs' dtype, in a shared buffer; the next call overwrites it."""
        h, w = self.padded(self.hidden[rows].to(self.dtype)), self.weight[columns].to(self.dtype)
        tile = self.buffer[: len(h) * len(w)].view(len(h), len(w))
        if self.dtype == torch.float32:
            _addmm(tile, h, w.t(), accumulate=False)
        else:
            torch.mm(h, w.t(), out=tile)
        if self.wide is not None:
            tile = self.wide[: tile.numel()].view(tile.shape).copy_(tile)
        if self.bias is not None:
            tile.add_(self.bias[columns].to(tile.dtype))
        if self.scaled:
            tile.mul_(self.logit_scale)
        if self.capped:
            tile.div_(self.softcap).tanh_().mul_(self.softcap)
        return tile[: rows.stop - rows.start]

    def backward(
        self,
        kernels: Any,
        logits: Tensor,
        labels: Tensor,
        scale: float | Tensor,
        values: Tensor,
        upstream: Tensor,
    ) -> None:
        """Overwrites a tile of logits with its gradient, the softcap's included."""
        on_device = isinstance(self.softcap, Tensor)  # a kernel takes a number
        slope = 1.0 - (logits / self.softcap).square_() if on_device else None
        cap = 1.0 / self.softcap if self.capped and not on_device else 0.0
        none = values.new_empty((0, 0))
        kernels.backward(logits, labels, scale, None, None, None, None, values, none, upstream, None, logits, cap)
        if slope is not None:
            logits.mul_(slope)

    def padded(self, rows: Tensor) -> Tensor:
        """As many rows as a GEMM should have, zeros below the given."""
        return pad(rows, (0, 0, 0, self.fewest - len(rows))) if 0 < len(rows) < self.fewest else rows


class _HeadGradients:
    """Gradients of the head, accumulated over tiles in float32 whatever the inputs' dtype."""

    def __init__(self, head: _Head, needs: list[bool]) -> None:
        self.head = head
        device = head.hidden.device
        shape = (len(head.hidden) + head.fewest, head.hidden.shape[1])  # a padded product adds zeros to the rows below
        self.hidden = torch.zeros(shape, dtype=torch.float32, device=device) if needs[0] else None
        self.weight = empty_like(head.weight) if needs[1] else None
        self.bias = torch.zeros(len(head.weight), dtype=torch.float32, device=device) if needs[2] else None
        # A float32 weight gradient accumulates in place; another dtype needs one chunk of float32.
        exact = self.weight is not None and self.weight.dtype == torch.float32
        shape = (0 if exact or self.weight is None else head.column_step, head.hidden.shape[1])
        self.chunk = torch.empty(shape, dtype=torch.float32, device=device)

    def add(self, rows: slice, columns: slice, grad: Tensor) -> None:
        """Adds the gradient of one tile of logits. Tiles come with all their rows before the next columns."""
        head = self.head
        if head.scaled:
            grad.mul_(head.logit_scale)
        if self.bias is not None:
            self.bias[columns] += grad.sum(0, dtype=torch.float32)
        if head.wide is not None and grad.is_cuda:  # on the CPU the product would have to be rounded to that dtype
            grad = head.buffer[: grad.numel()].view(grad.shape).copy_(grad)
        if self.hidden is not None:
            upstream = head.padded(grad)
            target = self.hidden[rows.start : rows.start + len(upstream)]
            _addmm(target, upstream, head.weight[columns].to(head.dtype), accumulate=True)
        if self.weight is not None:
            exact = self.weight.dtype == torch.float32
            target = self.weight[columns] if exact else self.chunk[: columns.stop - columns.start]
            _addmm(target, grad.t(), head.hidden[rows].to(head.dtype), accumulate=rows.start > 0)
            if not exact and rows.stop == len(head.hidden):
                self.weight[columns] = target.to(self.weight.dtype)

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients in their inputs' dtypes; [0] for the unneeded."""
        head = self.head
        if self.weight is not None and not len(head.hidden):
            self.weight.zero_()
        return (
            _none(head) if self.hidden is None else self.hidden[: len(head.hidden)].to(head.hidden.dtype),
            _none(head) if self.weight is None else self.weight,
            _none(head) if self.bias is None or head.bias is None else self.bias.to(head.bias.dtype),
        )


def _none(head: _Head) -> Tensor:
    """A fresh [0]: outputs of a custom op may not be one tensor."""
    return head.hidden.new_empty((0,))


def _addmm(target: Tensor, a: Tensor, b: Tensor, *, accumulate: bool) -> None:
    """target (+)= a @ b for a float32 target, never rounding the product to the inputs' dtype."""
    if a.dtype != torch.float32 and target.device.type == "cuda":
        torch.addmm(target, a, b, out_dtype=torch.float32, beta=int(accumulate), out=target)
        return
    a, b, length = a.float(), b.float(), max(a.shape[1], 1)
    step = _CPU_SUM if target.device.type == "cpu" else length
    for start in range(0, length, step):
        part = slice(start, start + step)
        torch.addmm(target, a[:, part], b[part], beta=int(accumulate or start > 0), out=target)


def _chunks(total: int, step: int) -> Iterator[slice]:
    """Chunks of at most `step` and about one size: a sliver at the end would be another kind of GEMM."""
    line = 64 if step % 64 == 0 else 1  # whole cache lines, where that is possible
    lines, count = -(-total // line), -(-total // max(step, 1))
    starts = [min(line * (lines * i // max(count, 1)), total) for i in range(count)] + [total]
    return (slice(start, stop) for start, stop in itertools.pairwise(starts))


def _inverse(temperature: Tensor | None, scalar: float) -> float | Tensor:
    return 1.0 / scalar if temperature is None else temperature.reciprocal()


def _rows_of(inverse: float | Tensor, rows: slice) -> float | Tensor:
    return inverse[rows] if isinstance(inverse, Tensor) else inverse


# -------------------------------------------------------------------------------------------------------- autograd
def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, labels, temperature, *settings = inputs
    ctx.scalar, ctx.logit_scale, given_scale, ctx.softcap, given_softcap, _, ctx.tile, ctx.dtype, ctx.backend = settings
    given = (given_scale, given_softcap)
    ctx.save_for_backward(hidden, weight, bias, labels, temperature, *given, output[0].detach().clone())


def _backward(ctx: Any, grad_values: Tensor, _: Tensor) -> tuple[Any, ...]:
    hidden, weight, bias, labels, temperature, given_scale, given_softcap, values = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    grads = _linear_token_logprobs_backward(
        hidden,
        weight,
        bias,
        labels,
        temperature,
        ctx.scalar,
        ctx.logit_scale,
        given_scale,
        ctx.softcap,
        given_softcap,
        ctx.tile,
        ctx.dtype,
        values,
        grad_values,
        needs,
        ctx.backend,
    )
    return (*(grad if needed else None for grad, needed in zip(grads, needs, strict=True)), *[None] * 11)


_linear_token_logprobs.register_autograd(_backward, setup_context=_setup_context)


# ------------------------------------------------------------------------------------------------- public function
@accepts_arrays
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: Number = 1.0,
    logit_scale: Number = 1.0,
    softcap: Number | None = None,
    mask: Tensor | None = None,
    outputs: tuple[str, ...] = ("logprobs",),
    chunk_size: int | None = None,
) -> TokenStats:
    """`token_logprobs` of hidden @ weight.T, without ever holding the logits [N, V].

    Args:
        hidden: [..., H] float32, bfloat16 or float16. Under autocast the GEMMs run in autocast's dtype.
        weight: [V, H] of the LM head, the same dtype as hidden (or any under autocast); bias: [V].
        labels: [...] integers in [0, V) (anything where masked out).
        temperature: a positive number or 0-d tensor, or one per token [...].
        logit_scale, softcap: logits are softcap * tanh(logit_scale * x / softcap) where a softcap is given (Gemma),
            else logit_scale * x. Numbers or 0-d tensors.
        mask: [...], nonzero = compute. Other rows are dropped before the first GEMM, cost nothing and give 0. Counting
            them is the one host synchronisation on a GPU; select the rows yourself to avoid it. (Under
            torch.compile(fullgraph=True) it needs torch._dynamo.config.capture_dynamic_output_shape_ops.)
        outputs: as in `token_logprobs`, except id_logprobs. `rank` costs a second pass of GEMMs.
        chunk_size: vocabulary columns per tile (default: what suits the device's caches).

    Returns:
        TokenStats, float32 (argmax, rank int64). Gradients flow to hidden, weight and bias through logprobs, entropy,
        logsumexp and log_sum_sq_probs; the backward recomputes the tiles and accumulates in float32. A token's bits are
        as independent of its batch as the vendor's GEMMs: the CPU's are asked for sums and rows that MKL's AVX-512
        kernels and oneDNN treat alike in every batch; MKL's AVX2 kernels do not, and cuBLAS chooses by shape.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device, label or name, before anything runs.
    """
    check.names("outputs", outputs, _OUTPUTS)
    _check_head(hidden, weight, bias, labels)
    factor, cap = _scaling(logit_scale, softcap, hidden)
    if chunk_size is not None and check.whole("chunk_size", chunk_size, "columns of a tile") < 1:
        raise ValueError(f"chunk_size: expected a positive number of columns, got {chunk_size}")
    rows = row_mask(mask, labels)
    scalar, per_token = temperatures(temperature, labels, mask)
    if check.values_checked(hidden, labels):
        check_token_ids("labels", labels, weight.shape[0], mask)
    flat, flat_labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1).long()
    kept = None if rows is None else rows.nonzero().squeeze(-1)
    if kept is not None:
        flat, flat_labels = flat[kept], flat_labels[kept]
        per_token = None if per_token is None else per_token[kept]
    values, indices = _linear_token_logprobs(
        flat,
        weight,
        bias,
        flat_labels,
        per_token,
        scalar,
        *split(factor),
        *split(cap),
        flags_of(outputs),
        _tile(hidden.device, chunk_size),
        _compute_dtype(hidden),
        select("linear_logprobs", hidden),
    )
    if kept is not None:
        values = values.new_zeros((len(VALUES), labels.numel())).index_copy(1, kept, values)
        indices = indices.new_zeros((len(INDICES), labels.numel())).index_copy(1, kept, indices)
    return _collect(outputs, values, indices, values.new_empty(0), tuple(labels.shape))


def _tile(device: torch.device, chunk_size: int | None) -> list[int]:
    rows, columns = _CPU_TILE if device.type == "cpu" else _GPU_TILE
    return [rows, chunk_size or columns]


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _scaling(logit_scale: Number, softcap: Number | None, like: Tensor) -> tuple[Number, Number]:
    """Factor and softcap of the logits, 0 for none. A cap is brought to where float32 can divide and multiply by it."""
    factor = number("logit_scale", logit_scale, like, _float32)
    cap = 0.0 if softcap is None else number("softcap", softcap, like, check.positive)
    if isinstance(cap, Tensor):
        return factor, cap.clamp(_LEAST_CAP, _WIDEST_CAP)
    return factor, 0.0 if not 0.0 < cap < _WIDEST_CAP else max(cap, _LEAST_CAP)


def _float32(name: str, value: object) -> float:
    """A finite number, in float32 too."""
    result = check.finite(name, value)
    if not -_LARGEST < result < _LARGEST:
        raise ValueError(f"{name}: expected a number that float32 can hold, got {value!r}")
    return result


def _check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> None:
    check.dtype("hidden", check.tensor("hidden", hidden), LOGITS_DTYPES)
    check.dtype("weight", check.tensor("weight", weight), LOGITS_DTYPES)
    check.integers("labels", labels)
    if weight.ndim != 2 or hidden.ndim < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"weight: expected shape [V, {hidden.shape[-1]}] (hidden's last dimension), got {list(weight.shape)}"
        )
    if hidden.dtype != weight.dtype and not torch.is_autocast_enabled(hidden.device.type):
        raise TypeError(f"weight: expected hidden's dtype {hidden.dtype}, got {weight.dtype}")
    check.shape("labels", labels, hidden.shape[:-1], "hidden's shape without H")
    check.same_device("weight", weight, "hidden", hidden)
    check.same_device("labels", labels, "hidden", hidden)
    if not len(weight):
        raise ValueError(f"weight: expected at least one token of vocabulary, got shape {list(weight.shape)}")
    if bias is not None:
        check.dtype("bias", check.tensor("bias", bias), LOGITS_DTYPES)
        check.shape("bias", bias, (weight.shape[0],), "one per token of the vocabulary")
        check.same_device("bias", bias, "hidden", hidden)
