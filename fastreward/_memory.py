"""Fresh CPU outputs: large ones are first touched as huge pages, which saves most of their page faults."""

from __future__ import annotations

import torch

_LARGE = 8 << 20  # bytes; below this a page-fault storm costs less than the system call


def empty(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised CPU tensor, advised to huge pages when it is large."""
    return advised(torch.empty(shape, dtype=dtype))


def advised(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` itself, after asking for huge pages behind its storage (a hint; harmless when refused)."""
    if tensor.device.type == "cpu" and tensor.nbytes >= _LARGE:
        from fastreward import _core

        _core.advise_huge_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor
