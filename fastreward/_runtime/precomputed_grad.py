"""Autograd node for a gradient computed in the forward; its backward rescales it and may run once."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from fastreward._arguments.transforms import batched, refuse_double_backward, refuse_vmap
from fastreward._runtime import logit_rows
from fastreward._runtime.custom_op import custom_op, plain
from fastreward._runtime.dispatch import implementation


def with_precomputed_grad(
    name: str, loss: Tensor, applied: Tensor, backend: str, grads: list[Tensor], inputs: list[Tensor]
) -> Tensor:
    """`loss`, whose backward gives each of `inputs` its gradient; these were made for an upstream one of `applied`."""
    apply = _PrecomputedGrad.apply if torch.compiler.is_compiling() else _apply
    attached: Tensor = apply(name, loss, applied, backend, grads, *inputs)
    return attached


class _PrecomputedGrad(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, name: str, loss: Tensor, applied: Tensor, backend: str, grads: list[Tensor], *_: Tensor
    ) -> Tensor:
        ctx.name, ctx.applied, ctx.backend, ctx.grads = name, applied, backend, grads
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            refuse_double_backward()
        if batched(upstream):
            refuse_vmap(f"the backward of {ctx.name}")
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            raise RuntimeError(
                f"{ctx.name}: its gradient exists once and has been handed over; call it again for another backward"
            )
        wanted = upstream.detach().float().reshape(())
        as_expected = plain((wanted, ctx.applied)) and wanted.is_cpu and wanted.item() == ctx.applied.item()
        for grad in () if as_expected else grads:
            _rescale_(grad, wanted, ctx.applied, ctx.backend)
        return (None, None, None, None, None, *grads)


#: `_PrecomputedGrad.apply` without what it does for transforms of torch.func, under which nobody calls it.
_apply: Final[Any] = super(torch.autograd.Function, _PrecomputedGrad).apply


@custom_op("rescale_", mutates_args=("grad",))
def _rescale_(grad: Tensor, upstream: Tensor, applied: Tensor, backend: str) -> None:
    """grad *= upstream / applied, read where they are; costs nothing where the two are equal."""
    whole = grad if grad.ndim > 1 else grad.unsqueeze(0)
    for block in logit_rows.split(whole, gaps=False):
        rows = block.matrix(whole)
        if backend == "reference":
            rows.copy_(rows.double() * (upstream.double() / applied))
        else:
            implementation("logits_policy_loss", backend).rescale(rows, upstream, applied)


@_rescale_.register_fake
def _() -> None:
    return None
