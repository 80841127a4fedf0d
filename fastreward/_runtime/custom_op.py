"""Registration of custom ops: what `torch.library.custom_op` does, without what that costs.

It imports Dynamo on the first call, which takes seconds, where a first call of fastreward should take milliseconds. At
every call its autograd walks all arguments and results as trees: a millisecond where nothing of that is in the cache.
`torch.library.opcheck` in the tests holds the ops to what `custom_op` would have checked at run time (no output aliases
an input or another output).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function  # type: ignore[attr-defined]
from torch.autograd import forward_ad

from fastreward._arguments.transforms import refuse_double_backward, refuse_forward_mode, refuse_vmap

_LIBRARY = torch.library.Library("fastreward", "FRAGMENT")  # type: ignore[no-untyped-call]


class CustomOp:
    """A registered op: call it, or give it a fake implementation and autograd."""

    def __init__(self, name: str, function: Callable[..., Any], mutates_args: Sequence[str]) -> None:
        schema = torch.library.infer_schema(function, mutates_args=mutates_args)
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        _LIBRARY.impl(name, _batched(name, mutates_args), "FuncTorchBatched")  # type: ignore[no-untyped-call]
        self._name = f"fastreward::{name}"
        self._overload = getattr(torch.ops.fastreward, name).default

    def __call__(self, *args: Any) -> Any:
        return self._overload(*args)

    def register_fake(self, function: Callable[..., Any]) -> None:
        """Shapes and dtypes of the outputs, for tracing."""
        torch.library.register_fake(self._name, function, lib=_LIBRARY)

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., Any]) -> None:
        """The backward, and what it saves: functions of (ctx, *grads) and of (ctx, inputs, output), as torch has them.

        Gradients flow to arguments that are tensors; tensors in lists are constants.
        """
        name, overload = self._name.removeprefix("fastreward::"), self._overload
        function, level = (
            _autograd_function(base, name, overload, backward, setup_context)
            for base in (torch.autograd.Function, torch.autograd.function._SingleLevelFunction)
        )

        def forward(keyset: Any, *args: Any) -> Any:
            tensors = [x for x in args if isinstance(x, Tensor)]
            if torch._C._are_functorch_transforms_active():  # called once for each level of torch.func's transforms
                with enable_single_level_autograd_function():
                    return level.apply(keyset, args, *tensors)
            differentiated = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
            if differentiated or forward_ad._current_level >= 0:
                return function.apply(keyset, args, *tensors)
            return _below_autograd(overload, keyset, args)

        _LIBRARY.impl(name, forward, "Autograd", with_keyset=True)  # type: ignore[no-untyped-call]

    def refuse_double_backward(self) -> None:
        """For a backward: differentiating it is an error, where torch would leave the terms out."""
        self.register_autograd(refuse_double_backward, setup_context=lambda ctx, inputs, output: None)


def _below_autograd(overload: Any, keyset: Any, args: Sequence[Any]) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)


def _autograd_function(
    base: Any, name: str, overload: Any, backward_of: Callable[..., Any], setup_context: Callable[..., Any]
) -> Any:
    class Op(base):  # type: ignore[misc]
        @staticmethod
        def forward(ctx: Any, keyset: Any, args: tuple[Any, ...], *_: Tensor) -> Any:
            if base is torch.autograd.Function:
                output = _below_autograd(overload, keyset, args)
            else:  # derivatives that are off at this level may be on at the next
                with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                    output = _below_autograd(overload, keyset, args)
            setup_context(ctx, args, output)
            ctx._places = [k for k, x in enumerate(args) if isinstance(x, Tensor)]
            ctx._count = len(args)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            own = ctx.needs_input_grad
            needs = dict(zip(ctx._places, own[2:], strict=True))
            ctx.needs_input_grad = tuple(needs.get(k, False) for k in range(ctx._count))  # by argument of the op
            try:
                found = backward_of(ctx, *grads)
            finally:
                ctx.needs_input_grad = own
            return (None, None, *(found[k] for k in ctx._places))

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:  # called where an input has a tangent
            refuse_forward_mode(name)

    return Op


def _batched(name: str, mutates_args: Sequence[str]) -> Callable[..., Any]:
    """The op under vmap, sample by sample: how torch.func.jacrev calls a backward."""

    def call(*args: Any) -> Any:
        from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
        from torch._functorch.vmap import unwrap_batched, wrap_batched
        from torch.utils import _pytree as pytree

        if mutates_args:
            refuse_vmap(name)
        interpreter: Any = retrieve_current_functorch_interpreter()
        given, places = unwrap_batched(args, interpreter.level())
        flat, spec = pytree.tree_flatten(given)
        flat_places = pytree._broadcast_to_and_flatten(places, spec)
        assert flat_places is not None
        with interpreter.lower():
            overload = getattr(torch.ops.fastreward, name).default
            results = []
            for sample in range(interpreter.batch_size()):
                own = [x if k is None else x.select(k, sample) for x, k in zip(flat, flat_places, strict=True)]
                results.append(overload(*pytree.tree_unflatten(own, spec)))
            single = isinstance(results[0], Tensor)
            stacked = tuple(map(torch.stack, [results] if single else zip(*results, strict=True)))
        wrapped: tuple[Tensor, ...] = wrap_batched(stacked, (0,) * len(stacked), interpreter.level())
        return wrapped[0] if single else wrapped

    return call


def custom_op(name: str, *, mutates_args: Sequence[str] = ()) -> Callable[[Callable[..., Any]], CustomOp]:
    """Registers a function as the op `fastreward::name`; a function that mutates must bump the versions itself."""
    return lambda function: CustomOp(name, function, mutates_args)
