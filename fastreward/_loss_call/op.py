"""The custom ops that run programs of the loss language: values and the gradient in one call, kept for the backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch._C._autograd import _get_current_graph_task_keep_graph

from fastreward._arguments.numbers import read
from fastreward._arguments.tokens import Tokens
from fastreward._arguments.transforms import batched
from fastreward._runtime.custom_op import custom_op, plain, recording
from fastreward._runtime.dispatch import implementation
from fastreward.language.objective import Gradient, Objective, registered_objective
from fastreward.language.program import Program

_ARGUMENTS: Final = 13  # of the op below


def run(
    objective: Objective,
    differentiable: Sequence[Tensor | None],  # first, second, extras of the op below
    tensors: Sequence[Tensor],
    sides: Sequence[Tokens],
    groups: Tensor | None,
    parameters: Sequence[float],
    backend: str,
) -> tuple[list[Tensor], Tensor]:
    """(outputs, batch values) of the objective's program. `tensors`: its inputs besides the differentiable ones."""
    *single, extras = differentiable
    trained = [*(x for x in single if x is not None), *(() if extras is None else extras.unbind())]
    kernels = implementation("program", backend)
    named = dict(zip(objective.inputs, tensors, strict=True))
    numbers = dict(zip(objective.parameters, parameters, strict=True))

    def result(program: Program, sources: Sequence[int]) -> tuple[list[Tensor], Tensor]:
        places = zip(program.inputs, sources, strict=True)
        inputs: list[Any] = [trained[k] if k >= 0 else named[n.name or "", n.side] for n, k in places]
        found: tuple[list[Tensor], Tensor] = kernels.run(program, inputs, sides, program.scalar_values(numbers), groups)
        return found

    for threshold, sources in objective.before:
        (values,), bound = result(threshold.program, sources)
        known = threshold.bound(threshold.program.scalar_values(numbers))
        given = bound[0] if known is None else known
        named[threshold.values, threshold.side] = values
        named[threshold.name, 0] = kernels.threshold(values, given, sides[threshold.side], threshold.share)
    return result(objective.program, objective.sources)


@custom_op("objective")
def _objective(
    first: Tensor,  # differentiable: logprobs; of a pair those of the chosen
    second: Tensor | None,  # differentiable: entropy; of a pair log-probs of the rejected
    extras: Tensor | None,  # differentiable: f32 [K, B], one per sequence each
    tensors: list[Tensor],
    mask: Tensor | None,
    second_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    second_cu_seqlens: Tensor | None,
    groups: Tensor | None,
    parameters: list[float],
    numbers: Tensor | None,  # f64 [parameters]: instead of them, where the host does not know them all
    objective: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    o = registered_objective(objective)
    sides = _sides(o, first, second, mask, second_mask, cu_seqlens, second_cu_seqlens)
    differentiable = (first, second, extras)
    tensors_out, batch = run(o, differentiable, tensors, sides, groups, read(parameters, numbers), backend)

    def output(index: int | None) -> Tensor:
        return batch.new_empty(0) if index is None else tensors_out[index]

    def stacked(indices: Sequence[int]) -> Tensor:
        return torch.stack([tensors_out[k] for k in indices]) if indices else output(None)

    saved, saved_second = (output(None if g is None else g.output) for g in o.gradients)
    saved_extras, row_weight = stacked([k for _, k in o.extras]), output(o.row_weight)
    tokens = output(o.token_loss), stacked(o.tokens)
    return batch[0].clone(), batch[1:].clone(), saved, saved_second, saved_extras, row_weight, *tokens


@_objective.register_fake
def _(
    first: Tensor,
    second: Tensor | None,
    extras: Tensor | None,
    cu_seqlens: Tensor | None,
    second_cu_seqlens: Tensor | None,
    objective: str,
) -> tuple[Tensor, ...]:
    o = registered_objective(objective)
    sides = _sides(o, first, second, None, None, cu_seqlens, second_cu_seqlens)
    new, rows = first.new_empty, sides[0].rows

    def kept(k: int, g: Gradient | None) -> Tensor:
        if g is None:
            return new((0,))
        return new(sides[min(k, len(sides) - 1)].shape) if g.per_token else new((rows,))

    weight = new((0,)) if o.row_weight is None else new((rows,))
    loss_shape = sides[0].shape if o.program.sides == 1 else (rows,)
    token_loss = new((0,)) if o.token_loss is None else new(loss_shape)
    saved = kept(0, o.gradients[0]), kept(1, o.gradients[1]), new((0,) if extras is None else extras.shape)
    tokens = new((len(o.tokens), *sides[0].shape)) if o.tokens else new((0,))
    return new(()), new((len(o.metrics),)), *saved, weight, token_loss, tokens


def _sides(
    o: Objective,
    first: Tensor,
    second: Tensor | None,
    mask: Tensor | None,
    second_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    second_cu_seqlens: Tensor | None,
) -> list[Tokens]:
    sides = [Tokens(tuple(first.shape), mask, cu_seqlens)]
    if o.program.sides == 2:
        assert second is not None
        sides.append(Tokens(tuple(second.shape), second_mask, second_cu_seqlens))
    return sides


# ---------------------------------------------------------------------------------------------------------- backward
@custom_op("objective_backward")
def _objective_backward(
    saved: Tensor,  # of one differentiable input: in its shape, or one per row of tokens
    row_weight: Tensor | None,
    grad_loss: Tensor,
    like: Tensor,  # tells the tokens' shape
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    per_token: bool,
    backend: str,
) -> Tensor:
    return _scaled(saved, row_weight, grad_loss, Tokens(tuple(like.shape), mask, cu_seqlens), per_token, backend)


@_objective_backward.register_fake
def _(like: Tensor) -> Tensor:
    return torch.empty_like(like)


def _scaled(
    saved: Tensor, row_weight: Tensor | None, grad_loss: Tensor, tokens: Tokens, per_token: bool, backend: str
) -> Tensor:
    kernels = implementation("program", backend)
    if not per_token:
        broadcast: Tensor = kernels.broadcast_to_tokens(saved, grad_loss, tokens)
        return broadcast
    scaled: Tensor = kernels.scale(saved, row_weight, grad_loss, tokens)
    return scaled


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    first, second, extras, _, mask, second_mask, cu_seqlens, second_cu_seqlens = inputs[:8]
    _, metrics, *saved, token_loss, tokens = output  # of saved the last is the weight of rows
    ctx.mark_non_differentiable(metrics, *saved, token_loss, tokens)
    ctx.set_materialize_grads(False)
    o = registered_objective(inputs[11])
    # The same as a plain call (`evaluate`): a checkpoint may be computed under a profiler, and again without.
    there = (*(g is not None for g in o.gradients), bool(o.extras), o.row_weight is not None)
    kept = [x.detach() if needed else None for x, needed in zip(saved, there, strict=True)]
    ctx.save_for_backward(*kept, mask, second_mask, cu_seqlens, second_cu_seqlens, first, second, extras)
    (ctx.objective, ctx.backend), ctx.constants = inputs[11:], len(inputs[3])


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    others = ([None] * ctx.constants, *[None] * (_ARGUMENTS - 4))
    return (*_gradients(ctx, registered_objective(ctx.objective), grad_loss, ctx.needs_input_grad[:3]), *others)


def _gradients(ctx: Any, o: Objective, grad_loss: Tensor | None, needs: Sequence[bool]) -> list[Tensor | None]:
    """The gradients for `first`, `second` and `extras`, of what was saved."""
    grads: list[Tensor | None] = [None, None, None]
    if grad_loss is None:
        return grads
    # create_graph=True: what is saved is the gradient, a constant to autograd; the op refuses to be differentiated.
    direct = not torch.is_grad_enabled() and not batched(grad_loss)
    kept = ctx.saved_tensors  # once: a checkpoint gives them out a single time
    saved, saved_second, of_extras, weight, mask, second_mask, cu_seqlens, second_cu_seqlens = kept[:8]
    first, second, extras = kept[8:]
    pair = o.program.sides == 2
    places = (
        (saved, weight, first, mask, cu_seqlens),
        (saved_second, weight, second, second_mask if pair else mask, second_cu_seqlens if pair else cu_seqlens),
        (of_extras, None, extras, None, None),  # like K sequences of B tokens, and weighted already
    )
    own = (*(None if g is None else g.per_token for g in o.gradients), True if o.extras else None)
    for k, (per_token, needed, (values, weight, like, counted, bounds)) in enumerate(
        zip(own, needs, places, strict=True)
    ):
        if per_token is None or not needed:
            continue
        if direct and type(values) is Tensor and values.is_cpu:
            # Not through the custom op, whose output may not be its input: an upstream gradient of 1 costs nothing.
            tokens = Tokens(tuple(like.shape), counted, bounds)
            ready = per_token and weight is None and ctx.backend == "cpu" and float(grad_loss) == 1.0
            handed_over = ready and not _get_current_graph_task_keep_graph()  # a leaf's .grad may become this memory
            grads[k] = values if handed_over else _scaled(values, weight, grad_loss, tokens, per_token, ctx.backend)
        else:
            grads[k] = _objective_backward(values, weight, grad_loss, like, counted, bounds, per_token, ctx.backend)
    return grads


_objective.register_autograd(_backward, setup_context=_setup_context)
_objective_backward.refuse_double_backward()


class Evaluation(NamedTuple):
    """loss [] with its gradient; metrics [M]; token_loss: of tokens or pairs, if that was asked for.

    tokens: what else was asked for of each token, in order.
    known: the loss and the metrics as numbers, where nothing has to be waited for.
    """

    loss: Tensor
    metrics: Tensor
    token_loss: Tensor
    tokens: Sequence[Tensor]
    known: list[float] | None

    def numbers(self) -> list[float]:
        """The loss and the metrics."""
        return [self.loss.detach().item(), *self.metrics.tolist()] if self.known is None else self.known


class _WithGradient(torch.autograd.Function):
    """A loss that has been computed, and the gradient that was computed with it."""

    @staticmethod
    def forward(ctx: Any, loss: list[Tensor], o: Objective, backend: str, kept: Sequence[Any], *inputs: Any) -> Tensor:
        ctx.save_for_backward(*kept, *inputs)
        ctx.objective, ctx.backend = o, backend
        return loss[0]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return (None, None, None, None, *_gradients(ctx, ctx.objective, grads[0], ctx.needs_input_grad[4:]))


#: `_WithGradient.apply` without what it does for transforms, none of which is at work in a plain call.
_with_gradient: Final[Any] = super(torch.autograd.Function, _WithGradient).apply


def evaluate(
    objective: str,
    first: Tensor,
    second: Tensor | None,
    tensors: list[Tensor],
    sides: Sequence[Tokens],
    groups: Tensor | None,
    parameters: list[float],
    numbers: Tensor | None,
    backend: str,
    extras: Tensor | None = None,
) -> Evaluation:
    """The value of a registered objective, and its gradient for autograd."""
    a, b = sides[0], sides[-1] if len(sides) == 2 else Tokens(())
    given = (a.mask, b.mask, a.cu_seqlens, b.cu_seqlens)
    if not plain((first, second, extras, numbers, groups, *given, *tensors)):
        result = _objective(first, second, extras, tensors, *given, groups, parameters, numbers, objective, backend)
        return Evaluation(result[0], result[1].detach(), result[6].detach(), result[7].detach().unbind(), None)
    o, inputs = registered_objective(objective), (first, second, extras)
    trained = any(x is not None and x.requires_grad for x in inputs)
    rest = (x.detach() if x is not None and x.requires_grad else x for x in (second, extras))
    values = (first.detach() if first.requires_grad else first, *rest)
    outputs, batch = run(o, values, tensors, sides, groups, read(parameters, numbers), backend)
    known = batch.tolist() if batch.is_cpu else None
    loss = batch[0].clone() if known is None else torch.scalar_tensor(known[0], dtype=torch.float32)
    token_loss = batch if o.token_loss is None else outputs[o.token_loss]
    if trained and recording():
        saved = [None if g is None else outputs[g.output] for g in o.gradients]
        saved.append(torch.stack([outputs[k] for _, k in o.extras]) if o.extras else None)
        weight = None if o.row_weight is None else outputs[o.row_weight]
        loss = _with_gradient([loss], o, backend, (*saved, weight, *given), *inputs)
    return Evaluation(loss, batch[1:], token_loss, [outputs[k] for k in o.tokens], known)
