"""Log-probs where each rank holds a contiguous slice of the vocabulary: only the slices' statistics cross ranks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.logits import check_kept_ids, check_token_ids
from fastreward._arguments.transforms import refuse_double_backward
from fastreward._runtime.dispatch import implementation
from fastreward._runtime.layout import FLAG, STATE
from fastreward._runtime.lm_head import inverse_temperature
from fastreward._runtime.logprobs import slice_state, token_logprobs_backward, token_logprobs_backward_
from fastreward.distributed.crossing import Slices
from fastreward.distributed.ranks import Ranks


class Shard(NamedTuple):
    """One rank's part of a call; ids are global."""

    labels: Tensor  # [N] i64
    temperature: Tensor | None  # [N] f64
    temperature_scalar: float  # where that is None
    mask: Tensor | None  # [N] bool
    keep_mask: Tensor | None  # [..., V of this rank] bool
    keep_ids: Tensor | None  # [N, k] i64
    token_ids: Tensor | None  # [N, K] i64
    flags: int
    inplace_backward: bool
    backend: str


def sharded_token_logprobs(
    logits: Tensor,  # [..., V of this rank]
    shard: Shard,
    ranks: Ranks,
) -> tuple[Tensor, Tensor, Tensor]:
    """values f32 [8, N], indices i64 [2, N], id_logprobs f32 [N, K]: the bits are the same on every rank.

    Differentiable for this rank's logits; the upstream gradients are taken to be the same on every rank.
    """
    mask = shard.mask
    counted = shard.labels if mask is None else shard.labels.masked_fill(~mask, 0)
    slices = Slices(ranks, logits.shape[-1], counted, _same(shard))
    if check.values_checked(logits, shard.labels):
        vocab, lead = int(slices.vocab), logits.shape[:-1]
        shaped = None if mask is None else mask.view(lead)
        check_token_ids("labels", shard.labels.view(lead), vocab, shaped)
        if shard.token_ids is not None:
            check_token_ids("token_ids", shard.token_ids, vocab, mask)
        if shard.keep_ids is not None:
            check_kept_ids(shard.keep_ids, vocab, mask)
    result: tuple[Tensor, Tensor, Tensor] = _Sharded.apply(logits, shard, slices)  # type: ignore[no-untyped-call]
    return result


def _same(shard: Shard) -> dict[str, object]:
    """What decides which collectives there are, and what else would be wrong without a word."""
    kept = shard.keep_ids if shard.keep_mask is None else "bool [..., V]"
    return {
        "mask": shard.mask,
        "outputs": [name for name, bit in FLAG.items() if shard.flags & bit],
        "temperature": shard.temperature_scalar if shard.temperature is None else shard.temperature,
        "token_ids": shard.token_ids,
        "kept_tokens": kept,
    }


class _Sharded(torch.autograd.Function):
    """A collective is no part of a custom op's schema, so this is an autograd function on the ops of one slice."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, shard: Shard, slices: Slices) -> tuple[Tensor, Tensor, Tensor]:
        own = shard._replace(
            labels=slices.local(shard.labels),
            keep_ids=None if shard.keep_ids is None else slices.local(shard.keep_ids),
            token_ids=None if shard.token_ids is None else slices.local(shard.token_ids),
        )
        inverse = inverse_temperature(shard.temperature, shard.temperature_scalar)
        merged = _merged(logits, own, slices, inverse)
        values, indices = implementation("logprobs", shard.backend).finish(merged, inverse, 1, shard.flags)
        id_logprobs = _id_logprobs(logits, own, slices, merged, inverse)
        if shard.mask is not None:
            out = ~shard.mask
            values, indices = values.masked_fill(out, 0.0), indices.masked_fill(out, 0)
            id_logprobs = id_logprobs.masked_fill(out.unsqueeze(-1), 0.0)
        # Copies, small beside the logits: the caller may edit the outputs in place before the backward.
        tensors = (own.labels, own.temperature, own.mask, own.keep_mask, own.keep_ids, own.token_ids)
        ctx.save_for_backward(logits, *tensors, values.clone(), id_logprobs.clone())
        ctx.scalar, ctx.inplace, ctx.backend = own.temperature_scalar, own.inplace_backward, own.backend
        ctx.mark_non_differentiable(indices)
        return values, indices, id_logprobs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        if torch.is_grad_enabled():  # create_graph=True; torch's own once_differentiable sees no gradient to refuse
            refuse_double_backward()
        logits, labels, temperature, mask, keep_mask, keep_ids, token_ids, values, id_logprobs = ctx.saved_tensors
        if not logits.numel():
            return torch.zeros_like(logits), None, None
        rows = (labels, temperature, ctx.scalar, mask, keep_mask, keep_ids, token_ids)
        upstream = (values, id_logprobs, grads[0].contiguous(), grads[2].contiguous())
        if not ctx.inplace:
            return token_logprobs_backward(logits, *rows, *upstream, ctx.backend), None, None
        token_logprobs_backward_(logits, *rows, *upstream, ctx.backend)
        return logits.detach(), None, None


def _merged(logits: Tensor, own: Shard, slices: Slices, inverse: float | Tensor) -> Tensor:
    """The state of the whole vocabulary. Rank needs the label's logit, wherever it is, before the slice is read."""
    found = _kept_logits(logits, own, own.labels.unsqueeze(-1), slices).squeeze(-1)
    kept = own.keep_mask is not None or own.keep_ids is not None
    whole = slices.largest(found) if own.flags & FLAG["rank"] else None
    state = slice_state(
        logits, own.labels, own.temperature, own.temperature_scalar, own.mask, own.keep_mask, own.keep_ids, own.flags,
        whole, own.backend,
    )  # fmt: skip
    state[:, STATE.index("label_logit")] = torch.where(slices.inside(own.labels), found, torch.nan)
    if kept and whole is not None:
        state[:, STATE.index("rank")] = _kept_above(logits, own, slices, whole)
    columns = None
    if kept and own.flags & FLAG["mean_logit"]:
        counted = slices.inside(own.keep_ids) if own.keep_ids is not None else own.keep_mask
        assert counted is not None
        columns = counted.reshape(own.labels.shape[0], -1).sum(-1)
    return slices.whole(state, inverse, own.flags, columns)


def _id_logprobs(logits: Tensor, own: Shard, slices: Slices, merged: Tensor, inverse: float | Tensor) -> Tensor:
    """f32 [N, K]; K floats a token cross."""
    if own.token_ids is None:
        return logits.new_empty((own.labels.shape[0], 0), dtype=torch.float32)
    found = slices.largest(_kept_logits(logits, own, own.token_ids, slices)).double()
    scale = inverse.unsqueeze(-1) if isinstance(inverse, Tensor) else inverse
    peak, total = (merged[:, STATE.index(name)].unsqueeze(-1) for name in ("max", "sum_exp"))
    ids = own.token_ids + slices.start
    known = (ids >= 0) & (ids < slices.vocab)
    return torch.where(known, (found - peak) * scale - total.log(), torch.nan).float()


def _kept_logits(logits: Tensor, own: Shard, columns: Tensor, slices: Slices) -> Tensor:
    """Raw logits f32 [N, K] at this slice's columns [N, K]; -inf where it has no such column, or has not kept it."""
    shape, inside = (*logits.shape[:-1], columns.shape[-1]), slices.inside(columns)
    if not slices.width:
        return columns.new_full(columns.shape, -torch.inf, dtype=torch.float32)
    at = columns.clamp(0, slices.width - 1)
    found = logits.detach().gather(-1, at.view(shape)).view(columns.shape).float()
    if own.keep_mask is not None:
        inside = inside & own.keep_mask.gather(-1, at.view(shape)).view(columns.shape)
    if own.keep_ids is not None:
        inside = inside & _listed(columns, own.keep_ids)
    return torch.where(inside, found, -torch.inf)


def _listed(columns: Tensor, listed: Tensor) -> Tensor:
    """Whether each of the columns [N, K] is among its row's list [N, k]."""
    if columns.shape[-1] <= listed.shape[-1]:
        return torch.stack([(listed == x.unsqueeze(-1)).any(-1) for x in columns.unbind(-1)], -1)
    return torch.stack([columns == x.unsqueeze(-1) for x in listed.unbind(-1)]).any(0)


def _kept_above(logits: Tensor, own: Shard, slices: Slices, label_logits: Tensor) -> Tensor:
    """How many kept columns of this slice have a logit above the label's, f64 [N]."""
    threshold, count = label_logits.unsqueeze(-1), own.labels.shape[0]
    if not slices.width:
        return label_logits.new_zeros(count, dtype=torch.float64)
    if own.keep_ids is not None:
        at = own.keep_ids.clamp(0, slices.width - 1)
        x = logits.detach().gather(-1, at.view(*logits.shape[:-1], at.shape[-1])).view(at.shape)
        return (slices.inside(own.keep_ids) & (x > threshold)).sum(-1).double()
    assert own.keep_mask is not None
    above = (logits.detach() > threshold.view(*logits.shape[:-1], 1)) & own.keep_mask
    return above.sum(-1).flatten().double()
