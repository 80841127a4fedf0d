"""Transforms of torch.func and forward-mode differentiation: whether they are at work, and how they are refused."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def transformed() -> bool:
    """Whether a transform of torch.func, or forward-mode differentiation, is at work."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def batched(x: Tensor) -> bool:
    """Whether vmap has made it, torch.func's or that of torch.autograd.grad(is_grads_batched=True)."""
    if torch.compiler.is_compiling():  # Dynamo knows no such tensors, nor how to ask
        return False
    functorch = torch._C._functorch
    return functorch.is_functorch_wrapped_tensor(x) or functorch.is_legacy_batchedtensor(x)


def refuse_transforms(name: str, values: Iterable[object]) -> None:
    """Raises where `name` is called on tensors that vmap has batched, or that have a tangent."""
    for x in values:
        if isinstance(x, Tensor):
            _refuse_levels(name, x)


def _refuse_levels(name: str, x: Tensor) -> None:
    """At this level of torch.func's transforms, and at those below it."""
    functorch = torch._C._functorch
    if functorch.is_batchedtensor(x):
        refuse_vmap(name)
    if x.dtype.is_floating_point and forward_ad.unpack_dual(x).tangent is not None:  # type: ignore[no-untyped-call]
        refuse_forward_mode(name)
    if torch._C._are_functorch_transforms_active():
        from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter

        interpreter: Any = retrieve_current_functorch_interpreter()
        own = functorch.maybe_get_level(x) == interpreter.level()
        with interpreter.lower():
            _refuse_levels(name, functorch.get_unwrapped(x) if own else x)


def refuse_forward_mode(name: str) -> None:
    """Raises, where a forward-mode derivative is asked for."""
    raise NotImplementedError(
        f"fastreward: {name} has no forward-mode derivative (jvp, jacfwd, hessian, dual tensors); "
        "use backward(), torch.func.grad, vjp or jacrev, or pass x.detach() if x is a constant"
    )


def refuse_vmap(name: str) -> None:
    """Raises, where vmap calls."""
    raise NotImplementedError(
        f"fastreward: {name} does not run under torch.func.vmap; pass the batch dimension directly "
        "(as a leading dimension, or sequence by sequence with cu_seqlens), or loop"
    )


def refuse_double_backward(*_: Any) -> Any:
    """Raises, where a second derivative is asked for."""
    raise NotImplementedError("fastreward: gradients of gradients (double backward) are not supported")
