"""The LM head tile by tile: what `linear_token_logprobs` and `linear_policy_loss` share. The GEMMs are the vendor's."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastreward._arguments import check
from fastreward._arguments.logits import LOGITS_DTYPES
from fastreward._arguments.numbers import Number, may_differ_from_0, number
from fastreward._runtime.layout import FLAG, STATE
from fastreward._runtime.logprobs import initial_state
from fastreward._runtime.memory import empty_like
from fastreward._runtime.protocols import LogprobsKernels

#: What one GEMM call on the CPU sums over at most, and the fewest rows it gets. Elsewhere MKL adds in an order that
#: depends on the number of rows and of threads, and so would a token's bits; inside, its AVX-512 kernels do not (its
#: AVX2 kernels do, and nothing helps). From 64 rows on it costs nothing measurable; a single row takes 2 to 4 times as
#: long, as a GEMM of 16 where a product with a vector would do.
_CPU_SUM = 512
_CPU_ROWS = 16

#: A softcap above caps no logit of any model, one below makes all logits 0.
_LEAST_CAP, _WIDEST_CAP = 1.2e-38, 1e30
_LARGEST = torch.finfo(torch.float32).max


# ---------------------------------------------------------------------------------------------------------- arguments
def compute_dtype_of(hidden: Tensor) -> torch.dtype:
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def scaling(logit_scale: Number, softcap: Number | None, like: Tensor, of: str = "") -> tuple[Number, Number]:
    """Factor and softcap of the logits, 0 for none. A cap is brought to where float32 can divide and multiply by it."""
    factor = number(f"{of}logit_scale", logit_scale, like, _float32)
    cap = 0.0 if softcap is None else number(f"{of}softcap", softcap, like, check.positive)
    if isinstance(cap, Tensor):
        return factor, cap.clamp(_LEAST_CAP, _WIDEST_CAP)
    return factor, 0.0 if not 0.0 < cap < _WIDEST_CAP else max(cap, _LEAST_CAP)


def _float32(name: str, value: object) -> float:
    """A finite number, in float32 too."""
    result = check.finite(name, value)
    if not -_LARGEST < result < _LARGEST:
        raise ValueError(f"{name}: expected a number that float32 can hold, got {value!r}")
    return result


def check_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *, sliced: bool = False, of: str = ""
) -> None:
    """Tensors that fit each other. sliced: the weight may have no row, others have more; of: before their names."""
    check.dtype(f"{of}hidden", check.tensor(f"{of}hidden", hidden), LOGITS_DTYPES)
    check.dtype(f"{of}weight", check.tensor(f"{of}weight", weight), LOGITS_DTYPES)
    check.integers("labels", labels)
    if weight.ndim != 2 or hidden.ndim < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{of}weight: expected shape [V, {hidden.shape[-1]}] ({of}hidden's last dimension), "
            f"got {list(weight.shape)}"
        )
    if hidden.dtype != weight.dtype and not torch.is_autocast_enabled(hidden.device.type):
        raise TypeError(f"{of}weight: expected {of}hidden's dtype {hidden.dtype}, got {weight.dtype}")
    if of:
        check.shape(f"{of}hidden", hidden, (*labels.shape, hidden.shape[-1]), "hidden's, but for the width")
    else:
        check.shape("labels", labels, hidden.shape[:-1], "hidden's shape without H")
    check.same_device(f"{of}weight", weight, f"{of}hidden", hidden)
    check.same_device("labels", labels, f"{of}hidden", hidden)
    if not len(weight) and not sliced:
        raise ValueError(f"{of}weight: expected at least one token of vocabulary, got shape {list(weight.shape)}")
    if bias is not None:
        check.dtype(f"{of}bias", check.tensor(f"{of}bias", bias), LOGITS_DTYPES)
        check.shape(f"{of}bias", bias, (weight.shape[0],), "one per token of the vocabulary")
        check.same_device(f"{of}bias", bias, f"{of}hidden", hidden)


# -------------------------------------------------------------------------------------------------------------- tiles
class Ids(NamedTuple):
    """Further ids of tokens: which, their log-probs, and what flows into these."""

    token_ids: Tensor  # i64 [N, K], outside a tile of the vocabulary: of another
    logprobs: Tensor  # f32 [N, K]
    grads: Tensor  # f32 [N, K]

    def rows(self, rows: slice) -> Ids:
        """Those of the rows."""
        return Ids(*(x[rows].contiguous() for x in self))

    def among(self, start: int) -> Ids:
        """With ids that count from column `start`."""
        return self._replace(token_ids=self.token_ids - start)


class Head:
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
        ids: Ids | None = None,
    ) -> None:
        """Overwrites a tile of logits with its gradient, the softcap's included."""
        on_device = isinstance(self.softcap, Tensor)  # a kernel takes a number
        slope = 1.0 - (logits / self.softcap).square_() if on_device else None
        cap = 1.0 / self.softcap if self.capped and not on_device else 0.0
        token_ids, id_logprobs, grad_ids = (None, values.new_empty((0, 0)), None) if ids is None else ids
        kernels.backward(
            logits, labels, scale, None, None, None, token_ids, values, id_logprobs, upstream, grad_ids, logits, cap
        )
        if slope is not None:
            logits.mul_(slope)

    def padded(self, rows: Tensor) -> Tensor:
        """As many rows as a GEMM should have, zeros below the given."""
        return pad(rows, (0, 0, 0, self.fewest - len(rows))) if 0 < len(rows) < self.fewest else rows


class HeadGradients:
    """Gradients of the head, accumulated over tiles in float32 whatever the inputs' dtype."""

    def __init__(self, head: Head, needs: list[bool]) -> None:
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


# ------------------------------------------------------------------------------------------------- over all the tiles
def head_state(
    kernels: LogprobsKernels,
    head: Head,
    labels: Tensor,
    inverse: float | Tensor,
    flags: int,
    token_ids: Tensor | None = None,  # [N, K]
    id_logits: Tensor | None = None,  # f64 [N, K], out: the raw logits of the ids that are among the columns
) -> Tensor:
    """The state f64 [N, 8] of the head's columns, but for rank; labels and ids count from the first of them."""
    state = initial_state(head.hidden.shape[0], head.hidden.device)
    for columns in head.column_chunks():
        for rows in head.row_chunks():
            logits, scale = head.logits(rows, columns), rows_of(inverse, rows)
            kernels.accumulate(logits, labels[rows], columns.start, scale, state[rows], flags & ~FLAG["rank"], None)
            if token_ids is not None and id_logits is not None:
                local = token_ids[rows] - columns.start
                own = logits.gather(1, local.clamp(0, logits.shape[1] - 1)).double()
                id_logits[rows] = torch.where((local >= 0) & (local < logits.shape[1]), own, id_logits[rows])
    return state


def head_ranks(
    kernels: LogprobsKernels, head: Head, labels: Tensor, inverse: float | Tensor, label_logits: Tensor
) -> Tensor:
    """How many of the head's columns have a logit above the label's, f64 [N]."""
    counts = initial_state(head.hidden.shape[0], head.hidden.device)
    for columns in head.column_chunks():
        for rows in head.row_chunks():
            logits, scale = head.logits(rows, columns), rows_of(inverse, rows)
            threshold = label_logits[rows]
            kernels.accumulate(logits, labels[rows], columns.start, scale, counts[rows], FLAG["rank"], threshold)
    return counts[:, STATE.index("rank")]


def head_gradients(
    kernels: LogprobsKernels,
    head: Head,
    labels: Tensor,
    inverse: float | Tensor,
    values: Tensor,  # [8, N], of the whole vocabulary
    grad_values: Tensor,  # [8, N]
    needs: list[bool],
    ids: Ids | None = None,
) -> HeadGradients:
    """The gradients of what token_logprobs gives, for hidden, weight and bias."""
    grads = HeadGradients(head, needs)
    slices = [
        (rows, values[:, rows].contiguous(), grad_values[:, rows].contiguous(), None if ids is None else ids.rows(rows))
        for rows in head.row_chunks()
    ]
    for columns in head.column_chunks():
        for rows, stats, upstream, further in slices:
            logits = head.logits(rows, columns)
            local, scale = labels[rows] - columns.start, rows_of(inverse, rows)
            here = None if further is None else further.among(columns.start)
            head.backward(kernels, logits, local, scale, stats, upstream, here)
            grads.add(rows, columns, logits)
    return grads


def fake_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Empty tensors like those that `HeadGradients.finish` returns, for tracing."""

    def fake(needed: bool, x: Tensor | None) -> Tensor:
        if not needed or x is None:
            return hidden.new_empty((0,))
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    return fake(needs[0], hidden), fake(needs[1], weight), fake(needs[2], bias)


def _none(head: Head) -> Tensor:
    """A fresh [0]: outputs of a custom op may not be one tensor."""
    return head.hidden.new_empty((0,))


def _addmm(target: Tensor, a: Tensor, b: Tensor, *, accumulate: bool) -> None:
    """target (+)= a @ b for a float32 target, never rounding the product to the inputs' dtype."""
    if a.dtype != torch.float32 and target.is_cuda:
        torch.addmm(target, a, b, out_dtype=torch.float32, beta=int(accumulate), out=target)
        return
    a, b, length = a.float(), b.float(), a.shape[1]
    if length <= _CPU_SUM or not target.is_cpu:
        torch.addmm(target, a, b, beta=int(accumulate), out=target)
        return
    for start in range(0, length, _CPU_SUM):
        part = slice(start, start + _CPU_SUM)
        torch.addmm(target, a[:, part], b[part], beta=int(accumulate or start > 0), out=target)


def _chunks(total: int, step: int) -> Iterator[slice]:
    """Chunks of at most `step` and about one size: a sliver at the end would be another kind of GEMM."""
    line = 64 if step % 64 == 0 else 1  # whole cache lines, where that is possible
    lines, count = -(-total // line), -(-total // max(step, 1))
    starts = [min(line * (lines * i // max(count, 1)), total) for i in range(count)] + [total]
    return (slice(start, stop) for start, stop in itertools.pairwise(starts))


def inverse_temperature(temperature: Tensor | None, scalar: float) -> float | Tensor:
    return 1.0 / scalar if temperature is None else temperature.reciprocal()


def rows_of(inverse: float | Tensor, rows: slice) -> float | Tensor:
    return inverse[rows] if isinstance(inverse, Tensor) else inverse
