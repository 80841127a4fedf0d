"""Log-probs where each rank holds a contiguous slice of the vocabulary: only the slices' statistics cross ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.transforms import refuse_double_backward, transformed
from fastreward._runtime.dispatch import implementation, select
from fastreward._runtime.layout import STATE, flags_of
from fastreward._runtime.logprobs import initial_state, merge
from fastreward._runtime.memory import empty_like

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def sharded_token_logprobs(
    logits: Tensor,  # [..., V of this rank]
    labels: Tensor,  # [N] i64, global
    temperature: Tensor | None,  # [N] f64
    temperature_scalar: float,
    mask: Tensor | None,  # [N] bool
    outputs: tuple[str, ...],
    group: ProcessGroup,
) -> tuple[Tensor, Tensor]:
    """values f32 [8, N] and indices i64 [2, N], the same on every rank; differentiable for this rank's logits."""
    if transformed():
        raise NotImplementedError("fastreward: process_group is not available under torch.func or with dual tensors")
    rows = logits.reshape(-1, logits.shape[-1])
    own = torch.full((), rows.shape[1], dtype=torch.int64, device=rows.device)
    widths = torch.stack(_gather(own, group))  # stays on the device: the host need not know where our slice starts
    start, vocab = widths[: dist.get_rank(group)].sum(), widths.sum()
    if check.values_checked(logits, labels):
        lead = logits.shape[:-1]
        good = (labels >= 0) & (labels < vocab)
        good = good if mask is None else good | ~mask
        check.every(
            "labels", good.view(lead), labels.view(lead), f"integers in [0, {int(vocab)}), the whole vocabulary"
        )
    inverse: float | Tensor = 1.0 / temperature_scalar if temperature is None else temperature.reciprocal()
    settings = (start, vocab, flags_of(outputs), group, select("logprobs", logits))
    values, indices = _Sharded.apply(rows, labels, inverse, mask, settings)  # type: ignore[no-untyped-call]
    return values, indices


class _Sharded(torch.autograd.Function):
    """A collective is no part of a custom op's schema, so this is an autograd function on the raw kernels."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, labels: Tensor, inverse: float | Tensor, mask: Tensor | None, settings: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor]:
        start, vocab, flags, group, backend = settings
        kernels = implementation("logprobs", backend)
        state = initial_state(rows.shape[0], rows.device)
        local = labels - start
        kernels.accumulate(rows, local, 0, inverse, state, flags, _label_logits(rows, local, group))
        state[:, STATE.index("argmax")] += start
        merged = merge(_gather(state, group), inverse)
        merged[:, STATE.index("sum_logit")] /= vocab
        values, indices = kernels.finish(merged, inverse, 1, flags)
        if mask is not None:
            values, indices = values.masked_fill(~mask, 0.0), indices.masked_fill(~mask, 0)
        ctx.save_for_backward(rows, labels, mask, values.clone())  # the caller may edit the outputs
        ctx.inverse, ctx.start, ctx.backend = inverse, start, backend
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        if torch.is_grad_enabled():  # create_graph=True; torch's own once_differentiable sees no gradient to refuse
            refuse_double_backward()
        rows, labels, mask, values = ctx.saved_tensors
        grad = empty_like(rows)
        local = labels - ctx.start
        none = values.new_empty((rows.shape[0], 0))
        kernels = implementation("logprobs", ctx.backend)
        kernels.backward(
            rows, local, ctx.inverse, mask, None, None, None, values, none, grads[0].contiguous(), None, grad
        )
        return grad, None, None, None, None


def _label_logits(rows: Tensor, local: Tensor, group: ProcessGroup) -> Tensor:
    """The label's raw logit on every rank, f32 [N]: each rank looks into its slice, the largest is the one found."""
    inside = (local >= 0) & (local < rows.shape[1])
    found = rows.gather(1, local.clamp(0, rows.shape[1] - 1).unsqueeze(1)).squeeze(1).float()
    found = torch.where(inside, found, -torch.inf)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
    return found


def _gather(x: Tensor, group: ProcessGroup) -> list[Tensor]:
    out = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(out, x.contiguous(), group=group)
    return out
