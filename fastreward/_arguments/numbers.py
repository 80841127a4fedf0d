"""Numbers that a formula takes at run time: Python's own, 0-d tensors, and what torch.compile makes of either.

A number that the host knows is a float; an eager call reads a 0-d CPU tensor at once. All others are tensors f64 []
where the call's tensors are: on a GPU, because reading one would block the host, and in a compiled function, because
it has to serve the next value too. There an op for the CPU reads them when it runs, and one for the GPU hands them on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from fastreward._arguments import check

Number = float | Tensor

#: Backends whose ops read numbers when they run; the others' are on a GPU, where a kernel has to.
_READ_BY_OPS: Final = ("cpu", "reference")


def number(name: str, x: object, like: Tensor, rule: Callable[[str, object], float]) -> Number:
    """`x`, a number or a 0-d tensor, as a float if the host knows it, else f64 [] on the device of `like`.

    rule: of a value, such as `check.positive`; called wherever the value may be looked at.
    """
    if not isinstance(x, Tensor):
        value = rule(name, x)
        return value if _known(value) else torch.ones((), dtype=torch.float64, device=like.device) * value
    check.shape(name, x, (), "a number or a 0-d tensor")
    x = check.constant(name, x)
    if x.dtype.is_complex:
        raise TypeError(f"{name}: expected a real number, got dtype {str(x.dtype).removeprefix('torch.')}")
    if x.device.type != "cpu":
        check.same_device(name, x, "the call", like)
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        return rule(name, float(x))
    if check.values_checked(x):
        rule(name, float(x))
    return x.to(device=like.device, dtype=torch.float64)


def size(x: int, like: Tensor) -> Number:
    """A size of the call's tensors as a number of the formula."""
    return float(x) if _known(x) else torch.ones((), dtype=torch.float64, device=like.device) * x


def single(name: str, x: object, like: Tensor, rule: Callable[[str, object], float]) -> Tensor:
    """Convert to f32 [] on the device of `like`, always."""
    value = number(name, x, like, rule)
    if isinstance(value, Tensor):
        return value.float()
    return torch.scalar_tensor(value, dtype=torch.float32, device=like.device)


def stacked(name: str, values: object, like: Tensor, rule: Callable[[str, object], float]) -> Tensor:
    """A sequence of numbers and 0-d tensors as one tensor f64 on the device of `like`; rule: as of `number`."""
    if not isinstance(values, Sequence):
        raise TypeError(f"{name}: expected a tensor or a sequence of numbers, got {values!r}")
    numbers = [number(f"{name}[{k}]", x, like, rule) for k, x in enumerate(values)]
    if all(isinstance(x, float) for x in numbers):
        return torch.tensor(numbers, dtype=torch.float64, device=like.device)
    return torch.stack([torch.as_tensor(x, dtype=torch.float64, device=like.device) for x in numbers])


def is_number(x: object) -> bool:
    """Whether `x` is a number or a 0-d tensor."""
    return x.ndim == 0 if isinstance(x, Tensor) else isinstance(x, Real) and not isinstance(x, bool)


def may_differ_from_0(x: Number) -> bool:
    """Whether a coefficient, as it was given, is other than 0, or not known."""
    if isinstance(x, Tensor) and (x.device.type != "cpu" or torch.compiler.is_compiling()):
        return True
    if x == 0:  # noqa: SIM103  (at a branch torch.compile decides)
        return False
    return True


class Parameters(NamedTuple):
    """Named numbers as an op takes them.

    known: of each the value that the host knows, else 0. numbers: all of them f64 [n], if there are others and the op
    may read them (`read`). inputs: what it may not read, f32 [], by name: inputs of the program in place of numbers.
    """

    known: list[float]
    numbers: Tensor | None
    inputs: dict[str, Tensor]


def parameters(named: Mapping[str, Number], backend: str) -> Parameters:
    """The numbers of a call that `backend` serves."""
    known, numbers = split_all(list(named.values()))
    if numbers is None or backend in _READ_BY_OPS:
        return Parameters(known, numbers, {})
    return Parameters(known, None, {name: x.float() for name, x in named.items() if isinstance(x, Tensor)})


def read(known: list[float], numbers: Tensor | None) -> list[float]:
    """Inside an op: the numbers that `parameters` made ready."""
    return known if numbers is None else numbers.tolist()


def split(x: Number) -> tuple[float, Tensor | None]:
    """A number as two arguments of an op: what the host knows, and what counts instead where that is nothing."""
    return (0.0, x) if isinstance(x, Tensor) else (x, None)


def joined(known: float, given: Tensor | None, backend: str) -> Number:
    """Inside an op: the number that was `split`; a tensor where only a kernel may read it."""
    return known if given is None else float(given) if backend in _READ_BY_OPS else given


def split_all(xs: Sequence[Number]) -> tuple[list[float], Tensor | None]:
    """`split` of several: those that the host knows, and all of them f64 [n] where there are others."""
    known = [0.0 if isinstance(x, Tensor) else x for x in xs]
    tensors = [x for x in xs if isinstance(x, Tensor)]
    if not tensors:
        return known, None
    return known, torch.stack([x if isinstance(x, Tensor) else tensors[0].new_full((), x) for x in xs])


def joined_all(known: list[float], given: Tensor | None, backend: str) -> list[float] | Tensor:
    """Inside an op: the numbers that were split; f64 [n] where only a kernel may read them."""
    return known if given is None else given.tolist() if backend in _READ_BY_OPS else given


def anything(_: str, x: Any) -> float:
    """A check that lets everything through."""
    return float(x)


def _known(value: float) -> bool:
    """Whether a number is more than a symbol of torch.compile's."""
    if not torch.compiler.is_compiling():
        return True
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return has_static_value(value)
