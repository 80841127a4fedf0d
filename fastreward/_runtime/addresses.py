"""Arguments of the kernels in csrc/cpu: addresses for tensors, and a number for the dtype of a mask."""

from __future__ import annotations

import torch
from torch import Tensor

from fastreward._arguments.transforms import transformed

#: csrc/cpu/common/mask.hpp, MaskKind.
_MASK_KINDS = {torch.bool: 1, torch.uint8: 1, torch.int32: 2, torch.int64: 3, torch.float32: 4}


def address(x: Tensor | None) -> int:
    """Data pointer of a contiguous tensor; 0 for None."""
    return 0 if x is None else x.data_ptr()


def mask_arguments(mask: Tensor | None) -> tuple[int, int]:
    """(address, MaskKind) of a contiguous mask."""
    return (0, 0) if mask is None else (mask.data_ptr(), _MASK_KINDS[mask.dtype])


def count_valid(mask: Tensor) -> int:
    """How many positions of a mask, as `check.mask` returns it, are not 0. (torch's count waits for its threads.)"""
    if mask.device.type != "cpu" or transformed():  # a tensor of torch.func's has no address
        return int(mask.count_nonzero())
    from fastreward._core import mask_count

    return mask_count(*mask_arguments(mask), mask.numel(), torch.get_num_threads())
