"""Groups of rollouts or sequences: ids of any kind, or equal contiguous groups of a size, as numbers."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Hashable, Mapping, Sequence, Set
from typing import Any, Final

import torch
from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.transforms import transformed

GroupIds = Tensor | Sequence[Hashable]
_BY_IDENTITY: Final[object] = object.__hash__


def group_labels(group_ids: GroupIds | None, group_size: int | None, count: int, device: torch.device) -> Tensor | None:
    """Group ids of `count` sequences, i64 [B]; None where neither argument is given."""
    if group_ids is not None and group_size is not None:
        raise ValueError("group_ids, group_size: expected at most one of them")
    if group_size is not None:
        size = checked_group_size(group_size, count, "sequences")
        return torch.arange(count, device=device).div(size, rounding_mode="floor")
    return None if group_ids is None else factorize(group_ids, count, device)


def numbered_groups(group_ids: GroupIds | None, group_size: int | None, count: int, like: Tensor) -> Tensor | None:
    """Renumber group ids as 0, 1, ..."""
    labels = group_labels(group_ids, group_size, count, like.device)
    return labels if labels is None or group_size is not None else dense(labels)


def dense(labels: Tensor) -> Tensor:
    """Numbers 0, 1, ... in the order of the labels i64 [B], without a host synchronisation."""
    ordered, order = labels.sort(stable=True)
    steps = (ordered != ordered.roll(1)).long()
    if steps.shape[0]:
        steps[:1] = 0
    return torch.empty_like(labels).scatter_(0, order, steps.cumsum(0))


def checked_group_size(group_size: int, count: int, what: str) -> int:
    """A group size that divides the `count` rollouts, sequences, ... (`what`)."""
    group_size = check.whole("group_size", group_size, f"{what} of a group")
    if group_size < 1 or count % group_size:
        raise ValueError(f"group_size: expected a positive divisor of the {count} {what}, got {group_size}")
    return group_size


def factorize(group_ids: GroupIds, count: int, device: torch.device, name: str = "group_ids") -> Tensor:
    """Group labels i64 [B], contiguous: integers as they are, other labels as 0, 1, ... in first-seen order."""
    labels = group_ids if isinstance(group_ids, Tensor) else _labels(group_ids, name)
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


def _labels(group_ids: Sequence[Hashable], name: str) -> Tensor | list[Any]:
    """The ids as a list; as a tensor where they are 0-d tensors of one kind, so that no device is waited for."""
    labels: Any = None
    if not isinstance(group_ids, str | bytes | Set | Mapping):  # no sequence of ids: letters, or without an order
        with contextlib.suppress(TypeError):
            labels = group_ids.tolist() if hasattr(group_ids, "tolist") else list(group_ids)
    if not isinstance(labels, list):
        raise TypeError(f"{name}: expected integers [B] or a sequence of hashables, got {group_ids!r}")
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
