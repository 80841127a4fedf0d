"""Checks of arguments: each raises before anything runs, and names the argument, what was expected and what came."""

from __future__ import annotations

import difflib
import importlib.util
import math
import operator
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from fastreward._arguments.transforms import refuse_transforms, transformed

#: What the kernels read as a mask without a conversion; whatever else a caller gives is compared with 0 first.
_MASK_DTYPES: Final = (torch.bool, torch.uint8, torch.int32, torch.int64, torch.float32)
#: What only Python would take for a number: texts and truth values.
_NO_NUMBERS: Final = (str, bytes, bool)
_NAN_PASSES: Final = ContextVar("fastreward_nan_passes", default=False)


def values_checked(*tensors: Tensor | None) -> bool:
    """Whether values may be read: always on the CPU; on a GPU (it synchronises) only with FASTREWARD_DEBUG=1."""
    if torch.compiler.is_compiling():
        return False
    return all(t is None or t.is_cpu for t in tensors) or os.environ.get("FASTREWARD_DEBUG") == "1"


@contextmanager
def nan_passes() -> Iterator[None]:
    """Inside of it NaN and infinity among numbers are no errors, and the results show them, as on a GPU.

    For functions that a trainer calls: on its own path it gets a loss that is NaN, and skips the step or goes on.
    """
    token = _NAN_PASSES.set(True)
    try:
        yield
    finally:
        _NAN_PASSES.reset(token)


def nan_refused() -> bool:
    """Whether a NaN that counts is an error."""
    return not _NAN_PASSES.get()


def tensor(name: str, x: object) -> Tensor:
    """`x` itself, if it is a tensor."""
    if not isinstance(x, Tensor):
        of = f" of {x.dtype}" if hasattr(x, "dtype") else ""
        hint = "; write torch.tensor(...), with nan for None" if isinstance(x, list | tuple) else ""
        raise TypeError(
            f"{name}: expected a torch tensor (or a NumPy or CuPy array of numbers), got {type(x).__name__}{of}{hint}"
        )
    if type(x) is not Tensor:
        plain(name, x)
    return x


def plain(name: str, x: object) -> None:
    """`x` is no DTensor, of which a kernel would take this rank's part for all of it."""
    if type(x).__name__ == "DTensor":
        raise TypeError(
            f"{name}: expected a plain tensor, got a DTensor with placements {getattr(x, 'placements', None)}; pass "
            f"{name}.full_tensor(), or {name}.to_local() with process_group=mesh.get_group() where each rank holds its "
            "slice of the vocabulary, its rollouts or its part of the tokens"
        )


def constant(name: str, x: Tensor) -> Tensor:
    """`x`, detached: an argument to which no gradient flows, which is an error where one is expected."""
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name}: expected a constant, as no gradient flows to it, got a tensor that requires grad; "
            "pass it with .detach()"
        )
    if transformed():
        refuse_transforms(name, (x,))
    return x.detach() if x.requires_grad else x


def dtype(name: str, x: Tensor, allowed: Sequence[torch.dtype]) -> None:
    """`x` has one of the `allowed` dtypes."""
    if x.dtype not in allowed:
        names = ", ".join(str(d).removeprefix("torch.") for d in allowed)
        raise TypeError(f"{name}: expected dtype {names}, got {str(x.dtype).removeprefix('torch.')}")


def rewards(name: str, x: object) -> Tensor:
    """Rewards in float32 or float64: bool and half precision become the one, integers the other (exact to 2^53)."""
    x = tensor(name, x)
    if x.dtype in (torch.float32, torch.float64):
        return x
    if x.dtype.is_complex:
        raise TypeError(f"{name}: expected real numbers, got {str(x.dtype).removeprefix('torch.')}")
    return x.float() if x.dtype.is_floating_point or x.dtype == torch.bool else x.double()


def floats(name: str, x: object) -> Tensor:
    """`x` as float32, if it holds floating-point numbers: exact from half precision, rounded from float64."""
    x = tensor(name, x)
    if not x.dtype.is_floating_point:
        raise TypeError(f"{name}: expected floating-point numbers, got {str(x.dtype).removeprefix('torch.')}")
    return x if x.dtype == torch.float32 else x.float()


def reals(name: str, x: object) -> Tensor:
    """`x` as float32, if it holds real numbers of any dtype, truth values among them."""
    x = tensor(name, x)
    if x.dtype.is_complex:
        raise TypeError(f"{name}: expected real numbers, got {str(x.dtype).removeprefix('torch.')}")
    return x if x.dtype == torch.float32 else x.float()


def integers(name: str, x: object) -> None:
    """`x` is a tensor of integers."""
    x = tensor(name, x)
    if x.dtype.is_floating_point or x.dtype.is_complex or x.dtype == torch.bool:
        raise TypeError(f"{name}: expected an integer tensor, got {str(x.dtype).removeprefix('torch.')}")


def whole(name: str, value: object, meaning: str) -> int:
    """`value` as an int, if it is a whole number."""
    if isinstance(value, int):  # torch.compile's symbols too, of which operator.index would make numbers
        return value
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name}: expected an integer ({meaning}), got {value!r}") from None


def flag(name: str, value: object) -> bool:
    """`value` as a bool, if it is a truth value and no text or collection, which are true whatever they say."""
    if isinstance(value, bool):
        return value
    if value is not None and not isinstance(value, int | Tensor) and type(value).__module__ != "numpy":
        raise TypeError(f"{name}: expected True or False, got {value!r}")
    return bool(value)


def positive(name: str, value: object) -> float:
    """`value` as a float, if it is a number above 0 (and finite)."""
    number = _real(name, value, "a positive number")
    if not 0 < number < math.inf:
        raise ValueError(f"{name}: expected a positive number, got {_shown(value)}")
    return number


def not_negative(name: str, value: object) -> float:
    """`value` as a float, if it is a finite number of at least 0."""
    if finite(name, value) < 0:
        raise ValueError(f"{name}: expected a number of at least 0, got {_shown(value)}")
    return float(value)  # type: ignore[arg-type]


def finite(name: str, value: object) -> float:
    """`value` as a float, if it is a finite number."""
    result = _real(name, value, "a number")
    if not -math.inf < result < math.inf:  # what torch.compile knows as a symbol can be compared, and no more
        raise ValueError(f"{name}: expected a finite number, got {_shown(value)}")
    return result


def not_nan(name: str, value: object) -> float:
    """`value` as a float, if it is a number or an infinity."""
    result = _real(name, value, "a number")
    if result != result:
        raise ValueError(f"{name}: expected a number, got {_shown(value)}")
    return result


def _real(name: str, value: object, expected: str) -> float:
    """`value` as a float."""
    if isinstance(value, _NO_NUMBERS):
        raise TypeError(f"{name}: expected {expected}, got {value!r}")
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected {expected}, got {value!r}") from None


def _shown(number: object) -> str:
    """A number for a message; Dynamo can't print its symbols."""
    return "another" if torch.compiler.is_compiling() else repr(number)


def names(name: str, given: object, allowed: Sequence[str]) -> None:
    """`given` is a tuple of some of the `allowed` names."""
    if not isinstance(given, tuple | list):
        hint = f"; write ({given!r},)" if isinstance(given, str) else ""
        raise TypeError(f"{name}: expected a tuple of names, got {given!r}{hint}")
    for value in given:
        choice(name, value, allowed)


def shape_among(x: Tensor, *shapes: Sequence[int]) -> bool:
    """Whether `x` has one of the shapes. Not `in {...}`: sizes that torch.compile knows as symbols have no hash."""
    return any(tuple(x.shape) == tuple(expected) for expected in shapes)


def shape(name: str, x: Tensor, expected: Sequence[int], meaning: str) -> None:
    """`x` has the `expected` shape, which is described by `meaning`."""
    if tuple(x.shape) != tuple(expected):
        raise ValueError(f"{name}: expected shape {list(expected)} ({meaning}), got {list(x.shape)}")


def mask(x: Tensor | None, reference: str, like: Tensor, name: str = "mask") -> Tensor | None:
    """The mask in a dtype that every kernel reads, with the shape and device of `like`. None: everything counts."""
    if x is None:
        return None
    shape(name, tensor(name, x), like.shape, f"as {reference}")
    same_device(name, x, reference, like)
    x = constant(name, x)
    return (x if x.dtype in _MASK_DTYPES else x != 0).contiguous()


def same_device(name: str, x: Tensor, reference: str, like: Tensor) -> None:
    """`x` lives where `like` does."""
    if x.device != like.device:
        raise ValueError(f"{name}: expected a tensor on {like.device}, where {reference} is, got one on {x.device}")


def choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """`value` is one of the `allowed` names; the message suggests the nearest."""
    if value not in allowed:
        near = difflib.get_close_matches(str(value), allowed, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}{hint}")


def every(name: str, good: Tensor, x: Tensor, expected: str) -> None:
    """All of `good` holds; else the message shows the first offending element of `x` (same shape)."""
    if bool(good.all()):
        return
    index = tuple(int(i) for i in (~good).nonzero()[0])
    where = f" at index {list(index)}" if index else ""
    raise ValueError(f"{name}: expected {expected}, got {x[index].item()}{where}")


def counted_finite(name: str, x: Tensor, mask: Tensor | None) -> None:
    """`x` is finite wherever its mask counts."""
    if not nan_refused():
        return
    finite = x.isfinite()
    every(name, finite if mask is None else finite | (mask == 0), x, "finite values where mask is set")


def segment_ids(name: str, ids: Tensor, segments: int) -> None:
    """Ids of segments are in [0, segments), or -1."""
    low, high = ids.aminmax() if ids.numel() else (ids.new_zeros(()), ids.new_zeros(()))
    if int(low) < -1 or (int(high) >= segments and ids.numel()):  # one pass finds whether, three where
        every(name, (ids >= -1) & (ids < segments), ids, f"-1 or ids in [0, {segments}), the segments of a row")


def numbers_where_set(named: Mapping[str, Tensor], mask: Tensor | None) -> None:
    """None of the tensors, in the mask's shape, is NaN where it counts."""
    for name, x in named.items() if nan_refused() else ():
        there = ~x.isnan()
        every(name, there if mask is None else there | (mask == 0), x, "numbers where mask is set")


def output(function: str, name: str, out: object, like: Tensor, reference: str) -> Tensor:
    """`out`, a contiguous f32 tensor in the shape of `like` into which `function` may write."""
    out = tensor(name, out)
    dtype(name, out, (torch.float32,))
    shape(name, out, like.shape, f"as {reference}")
    same_device(name, out, reference, like)
    if not out.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {list(out.stride())}")
    if out.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name}: expected a tensor without requires_grad (no gradient flows through it); use .detach()"
        )
    if transformed():
        raise NotImplementedError(
            f"fastreward: {function}({name}=) is not available under torch.func or with dual tensors"
        )
    return out


def own_memory(name: str, out: Tensor, others: Iterable[Tensor | None]) -> None:
    """`out` shares no memory with the other tensors, all of them contiguous."""
    if torch.compiler.is_compiling():  # a traced tensor has no address
        return
    begin, end = out.data_ptr(), out.data_ptr() + out.nbytes
    for x in others:
        if x is not None and x.data_ptr() < end and begin < x.data_ptr() + x.nbytes:
            raise ValueError(f"{name}: expected memory of its own, got some that another argument lies in")


# ------------------------------------------------------------------------------------------------------- output files
PICTURES: Final = (".png", ".svg", ".pdf")


def output_file(name: str, path: Path, *, picture: bool = False) -> None:
    """That `path` can be written, before the work whose result goes there.

    Raises:
        ValueError: no such folder, or one that can't be written to; a folder; no picture's ending.
        ModuleNotFoundError: a picture without matplotlib.
    """
    folder = path.parent
    if not folder.is_dir():
        raise ValueError(f"{name}: there is no folder {folder}")
    if path.is_dir():
        raise ValueError(f"{name}: expected a file, got the folder {path}")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise ValueError(f"{name}: {path} can't be written")
    if picture and path.suffix not in PICTURES:
        raise ValueError(f"{name}: expected a file that ends in {', '.join(PICTURES)}, got {path}")
    if picture:
        require_matplotlib()


def require_matplotlib() -> None:
    """That pictures can be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError("pictures need matplotlib: pip install matplotlib")
