"""NumPy in, NumPy out; CuPy in, CuPy out: arrays share their memory by DLPack or the buffer protocol where they can."""

from __future__ import annotations

import functools
import inspect
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass, replace
from typing import Any, Literal, ParamSpec, TypeVar, cast

import torch

from fastreward._arguments import check
from fastreward._arguments.transforms import refuse_transforms, transformed

P = ParamSpec("P")
R = TypeVar("R")
Kind = Literal["numpy", "cupy", "distributed"]


def accepts_arrays(function: Callable[P, R]) -> Callable[P, R]:
    """Lets `function` of tensors take NumPy or CuPy arrays too.

    Results come in the first array's kind; beside a tensor arrays are tensors too, and results stay tensors, with their
    gradients.
    """

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        given = (*args, *kwargs.values(), *_inside(kwargs.values()))
        if transformed():
            refuse_transforms(function.__name__, given)
        kind = next((k for k in map(array_kind, given) if k is not None), None)
        if kind is None:
            return function(*args, **kwargs)
        if kind == "distributed":
            _refuse_distributed(function, args, kwargs)
        _check_writable(kwargs.get("out"))
        tensors = cast(Any, [as_tensor(a) for a in args])
        named = cast(Any, {name: as_tensor(a) for name, a in kwargs.items()})
        result = function(*tensors, **named)
        mixed = any(isinstance(x, torch.Tensor) for x in given)
        return result if mixed else cast(R, as_arrays(result, kind))

    return wrapper


def _refuse_distributed(function: Callable[..., Any], args: Iterable[object], kwargs: dict[str, object]) -> None:
    """Raises for the first DTensor among the arguments: a kernel would take this rank's part of it for all of it."""
    named = inspect.signature(function).bind_partial(*args, **kwargs).arguments
    named |= named.pop("extra", None) or {} if isinstance(named.get("extra"), dict) else {}
    for name, x in named.items():
        check.plain(name, x)


def _inside(values: Iterable[object]) -> list[object]:
    """Arrays inside mappings among `values` (extra=)."""
    return [x for value in values if isinstance(value, dict) for x in value.values()]


def _check_writable(out: Any) -> None:
    """`out` is the one argument that is written to; torch does not know of read-only memory."""
    if array_kind(out) != "numpy":
        return
    if not out.flags.writeable:
        raise ValueError("out: expected an array that may be written to, got a read-only one")
    if not _shareable(out):
        raise ValueError(f"out: expected native byte order and no negative strides, got {out.dtype!r}, {out.strides}")


def array_kind(x: object) -> Kind | None:
    """ "numpy" or "cupy" for a numeric array, None for all else (object arrays of group ids stay what they are).

    "distributed": a DTensor, which is none, and is refused.
    """
    if type(x) is torch.Tensor or type(x).__name__ not in ("ndarray", "memmap", "DTensor"):
        return None
    if type(x).__name__ == "DTensor":
        return "distributed"
    dtype = cast(Any, x).dtype
    if dtype.kind not in "fiub" or dtype.itemsize > 8:
        return None
    return "cupy" if type(x).__module__.startswith("cupy") else "numpy"


def as_tensor(x: Any) -> Any:
    """A tensor on `x`'s memory when it is a numeric array, a mapping of such, else `x`.

    Of an array whose memory torch cannot share (another byte order, negative strides) a copy.
    """
    if isinstance(x, dict):
        return {name: as_tensor(value) for name, value in x.items()}
    kind = array_kind(x)
    if kind == "cupy":
        return torch.utils.dlpack.from_dlpack(x)
    if kind == "numpy":
        if not _shareable(x):
            x = x.astype(x.dtype.newbyteorder("="), order="C")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # read-only arrays: only `out` is written to
            return torch.from_numpy(x)
    return x


def _shareable(x: Any) -> bool:
    """Whether torch can share the memory of a NumPy array."""
    return x.dtype.isnative and all(step >= 0 and step % x.itemsize == 0 for step in x.strides)


def as_arrays(result: Any, kind: Kind) -> Any:
    """`result` with every tensor turned into an array of `kind`, inside tuples, dictionaries and dataclasses too."""
    if isinstance(result, torch.Tensor):
        detached = result.detach()
        return detached.cpu().numpy() if kind == "numpy" else sys.modules["cupy"].from_dlpack(detached)
    if hasattr(result, "_map_tensors"):
        return result._map_tensors(lambda tensor: as_arrays(tensor, kind))
    if is_dataclass(result) and not isinstance(result, type):
        return replace(result, **{f.name: as_arrays(getattr(result, f.name), kind) for f in fields(result)})
    if isinstance(result, dict):
        return {name: as_arrays(value, kind) for name, value in result.items()}
    if isinstance(result, tuple):
        return tuple(as_arrays(item, kind) for item in result)
    return result
