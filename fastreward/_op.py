"""Registration of custom ops: what `torch.library.custom_op` does, without its import of Dynamo on the first call.

That import takes seconds, and a first call of fastreward should take milliseconds. `torch.library.opcheck` in the
tests holds the ops to what `custom_op` would have checked at run time (no output aliases an input or another output).
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
        """The backward, and what it saves."""
        torch.library.register_autograd(self._name, backward, setup_context=setup_context, lib=_LIBRARY)

    def refuse_double_backward(self) -> None:
        """For a backward: differentiating it is an error, where torch would leave the terms out."""
        self.register_autograd(refuse_double_backward, setup_context=lambda ctx, inputs, output: None)


def refuse_double_backward(*_: Any) -> Any:
    """Raises, where a second derivative is asked for."""
    raise NotImplementedError("fastreward: gradients of gradients (double backward) are not supported")


def custom_op(name: str, *, mutates_args: Sequence[str] = ()) -> Callable[[Callable[..., Any]], CustomOp]:
    """Registers a function as the op `fastreward::name`; a function that mutates must bump the versions itself."""
    return lambda function: CustomOp(name, function, mutates_args)
