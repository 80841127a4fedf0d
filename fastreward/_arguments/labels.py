"""Labels of any kind as integers: what Python calls equal gets one number."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Hashable, Mapping, Sequence, Set
from typing import Any, Final

import torch
from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.transforms import transformed

Labels = Tensor | Sequence[Hashable]
_BY_IDENTITY: Final[object] = object.__hash__


def numbered(labels: Labels, count: int, device: torch.device, name: str) -> Tensor:
    """i64 [count], contiguous: integers as they are, other labels as 0, 1, ... in first-seen order."""
    labels = labels if isinstance(labels, Tensor) else listed(labels, name)
    if isinstance(labels, Tensor):
        check.integers(name, labels)
        check.shape(name, labels, (count,), "one per rollout")
        return labels.to(device).long().contiguous()
    if len(labels) != count:
        raise ValueError(f"{name}: expected {count} ids (one per rollout), got {len(labels)}")
    # Dynamo follows a dict, and traces anew for other labels; fake tensors and functionalize's have no memory to write.
    in_python = torch.compiler.is_compiling() or transformed()
    if in_python or type(index := torch.empty(count, dtype=torch.int64, device="cpu")) is not Tensor:
        seen: dict[Any, int] = {}
        numbers = [seen.setdefault(_by_value(label, b, name), len(seen)) for b, label in enumerate(labels)]
        return torch.tensor(numbers, dtype=torch.int64, device=device)
    from fastreward import _core

    if not _core.number_labels(labels, index.data_ptr(), False):
        _core.number_labels([_by_value(label, b, name) for b, label in enumerate(labels)], index.data_ptr(), True)
    return index.to(device)


def renumbered(labels: Tensor, *, absent: bool = True) -> Tensor:
    """Labels i64 [N] as 0, 1, ... in first-seen order; `absent`: -1 is none and stays. The host waits for no device."""
    if labels.is_cpu and not torch.compiler.is_compiling() and type(index := torch.empty_like(labels)) is Tensor:
        from fastreward import _core

        _core.number_integers(labels.data_ptr(), labels.shape[0], absent, index.data_ptr())
        return index
    positions = torch.arange(labels.shape[0], device=labels.device)
    ordered, order = labels.sort(stable=True)
    begins = positions == 0
    begins[1:] = ordered[1:] != ordered[:-1]
    first = torch.empty_like(labels)  # of each label, the position where it is met first
    first[order] = order[torch.where(begins, positions, 0).cummax(0).values] if labels.shape[0] else order
    there = labels != -1 if absent else torch.ones_like(begins)
    numbers = ((first == positions) & there).cumsum(0) - 1
    return torch.where(there, numbers[first], -1)


def listed(given: Sequence[Hashable], name: str) -> Tensor | list[Any]:
    """The labels as a list; as a tensor where they are 0-d tensors of one kind, so that no device is waited for."""
    labels: Any = None
    if not isinstance(given, str | bytes | Set | Mapping):  # no sequence of ids: letters, or without an order
        with contextlib.suppress(TypeError):
            labels = given.tolist() if hasattr(given, "tolist") else list(given)
    if not isinstance(labels, list):
        raise TypeError(f"{name}: expected integers [B] or a sequence of hashables, got {given!r}")
    first = labels[0] if labels else None
    if (
        isinstance(first, Tensor)
        and first.ndim == 0
        and not (first.dtype.is_floating_point or first.dtype == torch.bool)
    ):
        kind = (first.dtype, first.device, first.shape)
        if all(isinstance(x, Tensor) and (x.dtype, x.device, x.shape) == kind for x in labels):
            return torch.stack(labels)
    return labels


def _by_value(label: Any, at: int, name: str) -> Hashable:
    """A label that is equal to others of the same value: tensors and scalars of arrays as numbers, also inside."""
    if isinstance(label, tuple | frozenset):
        parts = (_by_value(part, at, name) for part in label)
        return tuple(parts) if isinstance(label, tuple) else frozenset(parts)
    if dataclasses.is_dataclass(label) and not isinstance(label, type):
        for part in dataclasses.fields(label):
            if isinstance(getattr(label, part.name), Tensor):  # whose hash is its identity, and so the label's
                raise TypeError(
                    f"{name}: expected labels that compare by value, got {label!r} at index {at}: "
                    f"its {part.name} is a tensor; give {part.name}.item()"
                )
    scalar = getattr(label, "ndim", None) == 0 and hasattr(label, "item")
    if isinstance(label, Tensor) and not scalar:
        raise TypeError(f"{name}: expected numbers or 0-d tensors, got a tensor {list(label.shape)} at index {at}")
    if type(label).__hash__ is _BY_IDENTITY and label is not None:
        raise TypeError(
            f"{name}: expected labels that compare by value, got {label!r} at index {at}, which equals nothing but "
            "itself: give its id"
        )
    try:
        itself = bool(label == label)
        value: Hashable = label.item() if scalar else label
        hash(value)
    except TypeError as error:
        raise TypeError(f"{name}: expected hashable labels: {error} at index {at}") from None
    if not itself:
        raise ValueError(f"{name}: expected labels that equal themselves, got {label!r} at index {at}")
    return value
