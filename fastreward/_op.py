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

_LIBRARY = torch.library.Library("fastreward", "FRAGMENT")  # type: ignore[no-untyped-call]


class CustomOp:
    """A registered op: call it, or give it a fake implementation and autograd."""

    def __init__(self, name: str, function: Callable[..., Any], mutates_args: Sequence[str]) -> None:
        schema = torch.library.infer_schema(function, mutates_args=mutates_args)
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
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
        function = _autograd_function(self._overload, backward, setup_context)

        def forward(keyset: Any, *args: Any) -> Any:
            tensors = [x for x in args if isinstance(x, torch.Tensor)]
            if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
                return function.apply(keyset, args, *tensors)  # type: ignore[no-untyped-call]
            return _below_autograd(self._overload, keyset, args)

        _LIBRARY.impl(self._name.removeprefix("fastreward::"), forward, "Autograd", with_keyset=True)  # type: ignore[no-untyped-call]

    def refuse_double_backward(self) -> None:
        """For a backward: differentiating it is an error, where torch would leave the terms out."""
        self.register_autograd(refuse_double_backward, setup_context=lambda ctx, inputs, output: None)


def _below_autograd(overload: Any, keyset: Any, args: Sequence[Any]) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)


def _autograd_function(
    overload: Any, backward_of: Callable[..., Any], setup_context: Callable[..., Any]
) -> type[torch.autograd.Function]:
    class Op(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, args: tuple[Any, ...], *_: torch.Tensor) -> Any:
            output = _below_autograd(overload, keyset, args)
            setup_context(ctx, args, output)
            ctx._places = [k for k, x in enumerate(args) if isinstance(x, torch.Tensor)]
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

    return Op


def refuse_double_backward(*_: Any) -> Any:
    """Raises, where a second derivative is asked for."""
    raise NotImplementedError("fastreward: gradients of gradients (double backward) are not supported")


def custom_op(name: str, *, mutates_args: Sequence[str] = ()) -> Callable[[Callable[..., Any]], CustomOp]:
    """Registers a function as the op `fastreward::name`; a function that mutates must bump the versions itself."""
    return lambda function: CustomOp(name, function, mutates_args)
