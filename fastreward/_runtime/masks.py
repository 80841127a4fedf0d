"""What is asked of a mask before kernels read it: how many positions count, and whether it is one or has weights."""

from __future__ import annotations

import torch
from torch import Tensor

from fastreward._arguments.transforms import transformed
from fastreward._runtime.addresses import MASK_KINDS, address, mask_arguments


def count_valid(mask: Tensor) -> int:
    """How many positions of a mask, as `check.mask` returns it, are not 0. (torch's count waits for its threads.)"""
    if mask.device.type != "cpu" or transformed():  # a tensor of torch.func's has no address
        return int(mask.count_nonzero())
    from fastreward._core import mask_count

    return mask_count(*mask_arguments(mask), mask.numel(), torch.get_num_threads())


def zeros_and_ones(mask: Tensor, *, flags: Tensor | None = None, counts: Tensor | None = None) -> bool:
    """Whether a mask [..., T] on the CPU (of any real dtype, not one of torch.func) has no other numbers, in one read.

    flags: contiguous bool of its shape, counts: contiguous f32 [...]: where it goes as truth values, and how many of
    each row are not 0; both mean nothing where the answer is no.
    """
    if mask.dtype not in MASK_KINDS:
        there = mask != 0
        if flags is not None:
            flags.copy_(there)
        if counts is not None:
            torch.sum(there, -1, dtype=torch.float32, out=counts)
        return torch.equal(mask, there.to(mask.dtype))
    from fastreward._core import mask_flags

    mask = mask.contiguous()
    return mask_flags(
        *mask_arguments(mask),
        rows=mask.shape[:-1].numel(),
        columns=mask.shape[-1],
        flags=address(flags),
        counts=address(counts),
        threads=torch.get_num_threads(),
    )
