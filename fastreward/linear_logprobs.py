"""Log-probs straight from hidden states and the LM head, tile by tile: the logits [N, V] never exist.

The GEMMs are the vendor's; a tile of logits is accumulated into eight statistics per token while it is in cache, and
in the backward it is recomputed and turned into its own gradient in place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.arrays import accepts_arrays
from fastreward._arguments.logits import check_token_ids, ids_of_tokens, row_mask, temperatures
from fastreward._arguments.numbers import Number, joined, split
from fastreward._runtime.custom_op import custom_op
from fastreward._runtime.dispatch import implementation, select
from fastreward._runtime.layout import ALL_OUTPUTS, FLAG, INDICES, STATE, VALUES, flags_of
from fastreward._runtime.lm_head import (
    Head,
    Ids,
    check_head,
    compute_dtype_of,
    fake_gradients,
    head_gradients,
    head_ranks,
    head_state,
    inverse_temperature,
    scaling,
)
from fastreward._runtime.logprobs import TokenStats, collect
from fastreward.distributed.lm_head import HeadShard, sharded_linear_token_logprobs
from fastreward.distributed.ranks import Ranks, refused_together

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_LABEL, _RANK, _MAX, _SUM = (STATE.index(name) for name in ("label_logit", "rank", "max", "sum_exp"))

#: Tokens and vocabulary columns of a tile. On the CPU smaller tiles stay nearer to the core, but lose more in the GEMMs
#: than the statistics gain (measured down to 1024 x 2048). On a GPU a tile must keep the GEMM at full rate.
_CPU_TILE = (1024, 16384)
_GPU_TILE = (4096, 32768)


# ------------------------------------------------------------------------------------------------------ custom ops
@custom_op("linear_token_logprobs")
def _linear_token_logprobs(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    labels: Tensor,  # [N] i64
    token_ids: Tensor | None,  # [N, K] i64
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
) -> tuple[Tensor, Tensor, Tensor]:  # values f32 [8, N], indices i64 [2, N], id_logprobs f32 [N, K]
    kernels = implementation("linear_logprobs", backend)
    inverse = inverse_temperature(temperature, temperature_scalar)
    scale, cap = joined(logit_scale, given_scale, backend), joined(softcap, given_softcap, backend)
    head = Head(hidden, weight, bias, scale, cap, tile, compute_dtype)
    id_logits = (
        _no_ids(hidden, torch.float64)
        if token_ids is None
        else hidden.new_full(token_ids.shape, torch.nan, dtype=torch.float64)
    )
    state = head_state(kernels, head, labels, inverse, flags, token_ids, id_logits)
    if flags & FLAG["rank"]:  # counting needs the label's logit first: a second pass over the tiles
        state[:, _RANK] = head_ranks(kernels, head, labels, inverse, state[:, _LABEL].float())
    values, indices = kernels.finish(state, inverse, weight.shape[0], flags)
    scale = inverse.unsqueeze(-1) if isinstance(inverse, Tensor) else inverse
    id_logprobs = (id_logits - state[:, _MAX, None]) * scale - state[:, _SUM, None].log()
    return values, indices, id_logprobs.float()


def _no_ids(hidden: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return hidden.new_empty((hidden.shape[0], 0), dtype=dtype)


@_linear_token_logprobs.register_fake
def _(hidden: Tensor, labels: Tensor, token_ids: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    n, new = hidden.shape[0], hidden.new_empty
    ids = _no_ids(hidden) if token_ids is None else new(token_ids.shape, dtype=torch.float32)
    return new((len(VALUES), n), dtype=torch.float32), labels.new_empty((len(INDICES), n)), ids


@custom_op("linear_token_logprobs_backward")
def _linear_token_logprobs_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    token_ids: Tensor | None,
    temperature: Tensor | None,
    temperature_scalar: float,
    logit_scale: float,
    given_scale: Tensor | None,
    softcap: float,
    given_softcap: Tensor | None,
    tile: list[int],
    compute_dtype: torch.dtype,
    values: Tensor,
    id_logprobs: Tensor,
    grad_values: Tensor,
    grad_ids: Tensor,  # f32 [N, K]
    needs: list[bool],  # gradient for hidden, weight, bias
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # an unneeded gradient is [0]
    kernels = implementation("linear_logprobs", backend)
    inverse = inverse_temperature(temperature, temperature_scalar)
    factor, cap = joined(logit_scale, given_scale, backend), joined(softcap, given_softcap, backend)
    head = Head(hidden, weight, bias, factor, cap, tile, compute_dtype, backward=True)
    ids = None if token_ids is None else Ids(token_ids, id_logprobs, grad_ids)
    return head_gradients(kernels, head, labels, inverse, values, grad_values, needs, ids).finish()


@_linear_token_logprobs_backward.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return fake_gradients(hidden, weight, bias, needs=others[-2])


_linear_token_logprobs_backward.refuse_double_backward()


# -------------------------------------------------------------------------------------------------------- autograd
def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, labels, token_ids, temperature, *settings = inputs
    ctx.scalar, ctx.logit_scale, given_scale, ctx.softcap, given_softcap, _, ctx.tile, ctx.dtype, ctx.backend = settings
    given, (values, _, id_logprobs) = (given_scale, given_softcap), output
    found = (values.detach().clone(), id_logprobs.detach().clone())
    ctx.save_for_backward(hidden, weight, bias, labels, token_ids, temperature, *given, *found)


def _backward(ctx: Any, grad_values: Tensor | None, _: Any, grad_ids: Tensor | None) -> tuple[Any, ...]:
    hidden, weight, bias, labels, token_ids, temperature, given_scale, given_softcap, values, id_logprobs = (
        ctx.saved_tensors
    )
    needs = list(ctx.needs_input_grad[:3])
    grads = _linear_token_logprobs_backward(
        hidden,
        weight,
        bias,
        labels,
        token_ids,
        temperature,
        ctx.scalar,
        ctx.logit_scale,
        given_scale,
        ctx.softcap,
        given_softcap,
        ctx.tile,
        ctx.dtype,
        values,
        id_logprobs,
        torch.zeros_like(values) if grad_values is None else grad_values,
        torch.zeros_like(id_logprobs) if grad_ids is None else grad_ids.contiguous(),
        needs,
        ctx.backend,
    )
    return (*(grad if needed else None for grad, needed in zip(grads, needs, strict=True)), *[None] * 12)


_linear_token_logprobs.register_autograd(_backward, setup_context=_setup_context)


# ------------------------------------------------------------------------------------------------- public function
@accepts_arrays
@refused_together
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
    token_ids: Tensor | None = None,
    chunk_size: int | None = None,
    process_group: ProcessGroup | None = None,
    sum_hidden_grad: bool = True,
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
        outputs, token_ids: as in `token_logprobs`. `rank` costs a second pass of GEMMs.
        chunk_size: vocabulary columns per tile (default: what suits the device's caches).
        process_group: weight and bias are this rank's contiguous rows of the LM head, in rank order (of any number, 0
            too; drop those that only pad the vocabulary); labels are global, and all else is the same on every rank.
            What crosses is that of `token_logprobs`, and in the backward the gradient for hidden, float32 [N, H].
        sum_hidden_grad: with process_group: that gradient is summed over the ranks, so that it is the whole head's, as
            Megatron's column-parallel layer does. False where the model does it itself (an autograd function that
            copies forwards and sums backwards, or sequence parallelism's reduce-scatter): each rank then gives its own
            slice's part. Without token_ids.

    Returns:
        TokenStats, float32 (argmax, rank int64). Gradients flow to hidden, weight and bias through logprobs, entropy,
        logsumexp, log_sum_sq_probs and id_logprobs; the backward recomputes the tiles and accumulates in float32. A
        token's bits are as independent of its batch as the vendor's GEMMs: the CPU's are asked for sums and rows that
        MKL's AVX-512 kernels and oneDNN treat alike in every batch; MKL's AVX2 kernels do not, and cuBLAS chooses by
        shape.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device, label or name, before anything runs.
    """
    check.names("outputs", outputs, ALL_OUTPUTS)
    if ("id_logprobs" in outputs) != (token_ids is not None):
        raise ValueError("token_ids: needed for the output 'id_logprobs', and only for it")
    sliced = process_group is not None
    if sliced and token_ids is not None:
        raise ValueError("token_ids: not with process_group; token_logprobs of this rank's logits takes both")
    check_head(hidden, weight, bias, labels, sliced=sliced)
    factor, cap = scaling(logit_scale, softcap, hidden)
    sum_hidden_grad = check.flag("sum_hidden_grad", sum_hidden_grad)
    if chunk_size is not None and check.whole("chunk_size", chunk_size, "columns of a tile") < 1:
        raise ValueError(f"chunk_size: expected a positive number of columns, got {chunk_size}")
    rows = row_mask(mask, labels)
    scalar, per_token = temperatures(temperature, labels, mask)
    if check.values_checked(hidden, labels) and not sliced:
        check_token_ids("labels", labels, weight.shape[0], mask)
    ids = None if token_ids is None else ids_of_tokens(token_ids, labels)
    if token_ids is not None and check.values_checked(hidden, token_ids):
        check_token_ids("token_ids", token_ids, weight.shape[0], None if token_ids.ndim == 1 else mask)
    flat, flat_labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1).long()
    kept = None if rows is None else rows.nonzero().squeeze(-1)
    if kept is not None:
        flat, flat_labels = flat[kept], flat_labels[kept]
        per_token = None if per_token is None else per_token[kept]
        ids = None if ids is None else ids[kept]
    flags, tile = flags_of(outputs), _tile(hidden.device, chunk_size)
    dtype, backend = compute_dtype_of(hidden), select("linear_logprobs", hidden)
    if process_group is not None:
        shard = HeadShard(
            flat_labels, per_token, scalar, factor, cap, flags, tile, dtype, sum_hidden_grad, backend
        )  # fmt: skip
        values, indices = sharded_linear_token_logprobs(flat, weight, bias, shard, Ranks.of(process_group))
        id_logprobs = _no_ids(values.t())
    else:
        values, indices, id_logprobs = _linear_token_logprobs(
            flat, weight, bias, flat_labels, ids, per_token, scalar, *split(factor), *split(cap), flags, tile, dtype,
            backend,
        )  # fmt: skip
    if kept is not None:
        values = values.new_zeros((len(VALUES), labels.numel())).index_copy(1, kept, values)
        indices = indices.new_zeros((len(INDICES), labels.numel())).index_copy(1, kept, indices)
        if ids is not None:
            id_logprobs = id_logprobs.new_zeros((labels.numel(), ids.shape[1])).index_copy(0, kept, id_logprobs)
    return collect(outputs, values, indices, id_logprobs, tuple(labels.shape))


def _tile(device: torch.device, chunk_size: int | None) -> list[int]:
    rows, columns = _CPU_TILE if device.type == "cpu" else _GPU_TILE
    return [rows, chunk_size or columns]
