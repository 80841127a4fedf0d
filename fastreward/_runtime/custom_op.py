"""Registration of custom ops: what `torch.library.custom_op` does, without what that costs.

It imports Dynamo on the first call, which takes seconds, where a first call of fastreward should take milliseconds. At
every call its autograd walks all arguments and results as trees: a millisecond where nothing of that is in the cache.
`torch.library.opcheck` in the tests holds the ops to what `custom_op` would have checked at run time (no output aliases
an input or another output).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function  # type: ignore[attr-defined]
from torch.autograd import forward_ad

from fastreward._arguments.transforms import refuse_double_backward, refuse_forward_mode, refuse_vmap

_LIBRARY = torch.library.Library("fastreward", "FRAGMENT")  # type: ignore[no-untyped-call]


class CustomOp:
    """A registered op: call it, or give it a fake implementation and autograd."""

    def __init__(self, name: str, function: Callable[..., Any], mutates_args: Sequence[str]) -> None:
        function = _flat(function)
        schema = torch.library.infer_schema(function, mutates_args=mutates_args)
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        _LIBRARY.impl(name, _batched(name, mutates_args), "FuncTorchBatched")  # type: ignore[no-untyped-call]
        self._name = f"fastreward::{name}"
        self._overload = getattr(torch.ops.fastreward, name).default
        self._function, self._node = function, None
        types = [str(argument.type) for argument in self._overload._schema.arguments]
        self._places = [k for k, of in enumerate(types) if of in ("Tensor", "Optional[Tensor]")]
        self._lists = [k for k, of in enumerate(types) if of == "List[Tensor]"]

    def __call__(self, *args: Any) -> Any:
        tensors = [args[k] for k in self._places]
        for k in self._lists:
            tensors += args[k]
        if not plain(tensors):
            return self._overload(*args)
        if not recording() or not any(x is not None and x.requires_grad for x in tensors):
            return self._function(*args)
        return self._overload(*args) if self._node is None else _recorded(self._node, self._function, args)

    def register_fake(self, function: Callable[..., Any]) -> None:
        """Shapes and dtypes of the outputs, for tracing: a function of those arguments that it names, or of *all."""
        names, own = [x.name for x in self._overload._schema.arguments], inspect.signature(function).parameters
        if any(x.kind is x.VAR_POSITIONAL for x in own.values()):
            torch.library.register_fake(self._name, function, lib=_LIBRARY)
        else:
            places = [names.index(name) for name in own]
            torch.library.register_fake(self._name, lambda *args: function(*(args[k] for k in places)), lib=_LIBRARY)

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., Any]) -> None:
        """The backward, and what it saves: functions of (ctx, *grads) and of (ctx, inputs, output), as torch has them.

        Gradients flow to arguments that are tensors; tensors in lists are constants.
        """
        name, overload = self._name.removeprefix("fastreward::"), self._overload
        function = _autograd_function(name, backward, setup_context)
        # That of torch's base class, which has one level of derivatives and does not look for torch.func's.
        self._node = node = super(torch.autograd.Function, function).apply  # type: ignore[misc]

        def forward(keyset: Any, *args: Any) -> Any:
            below = partial(_below_autograd, overload, keyset)
            if torch._C._are_functorch_transforms_active():  # called once for each level of torch.func's transforms
                with enable_single_level_autograd_function():
                    return _recorded(node, partial(_at_next_level, below), args)
            differentiated = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args)
            if differentiated or forward_ad._current_level >= 0:
                return _recorded(function.apply, below, args)
            return below(*args)

        _LIBRARY.impl(name, forward, "Autograd", with_keyset=True)  # type: ignore[no-untyped-call]

    def refuse_double_backward(self) -> None:
        """For a backward: differentiating it is an error, where torch would leave the terms out."""
        self.register_autograd(refuse_double_backward, setup_context=lambda ctx, inputs, output: None)


# ------------------------------------------------------------------------------------------- without the dispatcher
def _key_set(*names: str) -> int:
    bits = 0
    for name in names:
        bits |= torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)).raw_repr()
    return bits


#: What the dispatcher sees in a thread where no mode, tracer or transform is at work, and in dense tensors.
_KEYS: Final = _key_set("BackendSelect", "ADInplaceOrView")
_KEYS_OF_TENSORS: Final = _KEYS | _key_set(
    *(f"{prefix}{device}" for prefix in ("", "Autograd", "Autocast") for device in ("CPU", "CUDA"))
)
_AUTOGRAD: Final = torch._C.DispatchKey.AutogradFunctionality  # of every device


def plain(tensors: Iterable[Tensor | None]) -> bool:
    """Whether the dispatcher would do nothing but run the kernels on `tensors` as they are, and record the gradient.

    That costs some 50 us a call, so a plain call does without. No mode, tracer, transform or profiler wants to see the
    ops of this thread, and no tensor is a subclass, a wrapper or a lazy negation.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_function_stack() or torch._C._autograd._profiler_enabled():
        return False
    if torch._C._dispatch_tls_local_include_set().raw_repr() & ~_KEYS or forward_ad._current_level >= 0:
        return False
    keys = 0
    for x in tensors:
        if x is not None:
            if type(x) is not Tensor and type(x) is not torch.nn.Parameter:
                return False
            keys |= torch._C._dispatch_keys(x).raw_repr()
    return not keys & ~_KEYS_OF_TENSORS


def recording() -> bool:
    """Whether a plain call records a gradient: not in inference mode, nor inside the kernel of another custom op."""
    return torch.is_grad_enabled() and not torch._C._dispatch_tls_is_dispatch_key_excluded(_AUTOGRAD)


# ----------------------------------------------------------------------------------------------------------- autograd
def _recorded(node: Callable[..., Any], run: Callable[..., Any], args: Sequence[Any]) -> Any:
    """`run(*args)` as a node of the graph."""
    places = [k for k, x in enumerate(args) if isinstance(x, Tensor)]
    return node(run, args, places, *[args[k] for k in places])


def _below_autograd(overload: Any, keyset: Any, *args: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)


def _at_next_level(below: Callable[..., Any], *args: Any) -> Any:
    """Derivatives that are off at this level of torch.func's transforms may be on at the next."""
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
        return below(*args)


def _autograd_function(name: str, backward_of: Callable[..., Any], setup_context: Callable[..., Any]) -> Any:
    class Op(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, run: Callable[..., Any], args: Sequence[Any], places: list[int], *_: Tensor) -> Any:
            output = run(*args)
            setup_context(ctx, args, output)
            ctx._places, ctx._count = places, len(args)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            own = ctx.needs_input_grad
            needs = dict(zip(ctx._places, own[3:], strict=True))
            ctx.needs_input_grad = tuple(needs.get(k, False) for k in range(ctx._count))  # by argument of the op
            try:
                found = backward_of(ctx, *grads)
            finally:
                ctx.needs_input_grad = own
            return (None, None, None, *(found[k] for k in ctx._places))

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


def _flat(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with the fields of a NamedTuple in its place, as a schema has no other way to say them: `side: Side`
    becomes side_hidden, side_weight, ...
    """
    parameters: list[inspect.Parameter] = []
    packed: list[tuple[int, int, Callable[..., Any]]] = []
    signature = inspect.signature(function)
    for parameter in signature.parameters.values():
        of = function.__globals__.get(parameter.annotation)
        if not (isinstance(of, type) and issubclass(of, tuple) and hasattr(of, "_fields")):
            parameters.append(parameter)
            continue
        packed.append((len(parameters), len(parameters) + len(of._fields), of))
        for name in of._fields:
            type_ = of.__annotations__[name]
            own = parameter.replace(
                name=f"{parameter.name}_{name}", annotation=getattr(type_, "__forward_arg__", type_)
            )
            parameters.append(own)
    if not packed:
        return function

    def flat(*args: Any) -> Any:
        given = list(args)
        for start, stop, of in reversed(packed):
            given[start:stop] = [of(*given[start:stop])]
        return function(*given)

    flat.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return flat


def custom_op(name: str, *, mutates_args: Sequence[str] = ()) -> Callable[[Callable[..., Any]], CustomOp]:
    """Registers a function as the op `fastreward::name`; a function that mutates must bump the versions itself.

    The op takes the fields of a parameter that is a NamedTuple one by one, under its name: call it with `*side`.
    """
    return lambda function: CustomOp(name, function, mutates_args)
