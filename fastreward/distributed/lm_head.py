"""Log-probs from hidden states where each rank holds contiguous rows of the LM head: statistics cross, no logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.logits import check_token_ids
from fastreward._arguments.numbers import Number
from fastreward._arguments.transforms import refuse_double_backward
from fastreward._runtime.dispatch import implementation
from fastreward._runtime.layout import FLAG, STATE
from fastreward._runtime.lm_head import Head, head_gradients, head_ranks, head_state, inverse_temperature
from fastreward.distributed.crossing import Slices
from fastreward.distributed.ranks import Ranks

_LABEL, _RANK = STATE.index("label_logit"), STATE.index("rank")


class HeadShard(NamedTuple):
    """One rank's part of a call, besides hidden states, weight and bias."""

    labels: Tensor  # [N] i64, global
    temperature: Tensor | None  # [N] f64
    temperature_scalar: float  # where that is None
    logit_scale: Number
    softcap: Number  # 0 = none
    flags: int
    tile: list[int]
    compute_dtype: torch.dtype
    sum_hidden_grad: bool
    backend: str


def sharded_linear_token_logprobs(
    hidden: Tensor,  # [N, H], the same on every rank
    weight: Tensor,  # [V of this rank, H]
    bias: Tensor | None,  # [V of this rank]
    shard: HeadShard,
    ranks: Ranks,
) -> tuple[Tensor, Tensor]:
    """values f32 [8, N] and indices i64 [2, N]: the bits are the same on every rank."""
    slices = Slices(ranks, weight.shape[0], shard.labels, _same(hidden, shard))
    if check.values_checked(hidden, shard.labels):
        check_token_ids("labels", shard.labels, int(slices.vocab), None)
    result: tuple[Tensor, Tensor] = _Sharded.apply(hidden, weight, bias, shard, slices)  # type: ignore[no-untyped-call]
    return result


def _same(hidden: Tensor, shard: HeadShard) -> dict[str, object]:
    """What decides which collectives there are, those of the backward too, and what else would be wrong silently."""
    trained = hidden.requires_grad and torch.is_grad_enabled()
    return {
        "outputs": [name for name, bit in FLAG.items() if shard.flags & bit],
        "temperature": shard.temperature_scalar if shard.temperature is None else shard.temperature,
        "logit_scale": shard.logit_scale,
        "softcap": shard.softcap,
        "hidden": f"{hidden.dtype} {list(hidden.shape)}, requires_grad={trained}",
        "sum_hidden_grad": shard.sum_hidden_grad,
    }


class _Sharded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, shard: HeadShard, slices: Slices
    ) -> tuple[Tensor, Tensor]:
        kernels = implementation("linear_logprobs", shard.backend)
        inverse = inverse_temperature(shard.temperature, shard.temperature_scalar)
        head, local = _head(hidden, weight, bias, shard), slices.local(shard.labels)
        state = head_state(kernels, head, local, inverse, shard.flags)
        if shard.flags & FLAG["rank"]:
            found = torch.where(slices.inside(local), state[:, _LABEL], -torch.inf)
            state[:, _RANK] = head_ranks(kernels, head, local, inverse, slices.largest(found.float()))
        merged = slices.whole(state, inverse, shard.flags, None)
        values, indices = kernels.finish(merged, inverse, 1, shard.flags)
        ctx.save_for_backward(hidden, weight, bias, local, shard.temperature, values.clone())
        ctx.shard, ctx.ranks = shard._replace(labels=local, temperature=None), slices.ranks
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    def backward(ctx: Any, grad_values: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            refuse_double_backward()
        hidden, weight, bias, local, temperature, values = ctx.saved_tensors
        shard, needs = ctx.shard, list(ctx.needs_input_grad[:3])
        kernels = implementation("linear_logprobs", shard.backend)
        inverse = inverse_temperature(temperature, shard.temperature_scalar)
        head = _head(hidden, weight, bias, shard, backward=True)
        grads = head_gradients(kernels, head, local, inverse, values, grad_values, needs)
        if grads.hidden is not None and shard.sum_hidden_grad:
            ctx.ranks.add_(grads.hidden)
        return (*(g if needed else None for g, needed in zip(grads.finish(), needs, strict=True)), None, None)


def _head(hidden: Tensor, weight: Tensor, bias: Tensor | None, shard: HeadShard, *, backward: bool = False) -> Head:
    scale, cap = shard.logit_scale, shard.softcap
    return Head(hidden, weight, bias, scale, cap, shard.tile, shard.compute_dtype, backward=backward)
