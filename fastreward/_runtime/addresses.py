"""Arguments of the kernels in csrc/cpu: addresses for tensors, and a number for the dtype of a mask."""

from __future__ import annotations

import torch
from torch import Tensor

#: The dtypes of masks that kernels read, as csrc/cpu/common/mask.hpp numbers them (MaskKind).
MASK_KINDS = {torch.bool: 1, torch.uint8: 1, torch.int32: 2, torch.int64: 3, torch.float32: 4}


def address(x: Tensor | None) -> int:
    """Data pointer of a contiguous tensor; 0 for None."""
    return 0 if x is None else x.data_ptr()


def mask_arguments(mask: Tensor | None) -> tuple[int, int]:
    """(address, MaskKind) of a contiguous mask."""
    return (0, 0) if mask is None else (mask.data_ptr(), MASK_KINDS[mask.dtype])
