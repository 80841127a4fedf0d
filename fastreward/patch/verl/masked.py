"""verl.utils.torch_functional: sums and means over a mask, and whitening."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from fastreward._arguments.transforms import transformed
from fastreward.patch.usage import handed_on
from fastreward.patch.verl.replacement import TORCH, Replacement
from fastreward.whiten import whiten


def masked_whiten(stock: Any, values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """(values - mean) * rsqrt(var + 1e-8), under the mask too, where verl leaves what is not the policy's own."""
    if not _plain(values, mask):
        handed_on()
        return stock(values, mask, shift_mean)  # type: ignore[no-any-return]
    return whiten(values, mask, shift_mean=shift_mean)


def _plain(values: Tensor, mask: Tensor) -> bool:
    return values.dtype == torch.float32 and not values.requires_grad and not transformed()


REPLACEMENTS: Final = (
    Replacement(
        f"{TORCH}.masked_whiten",
        ("values", "mask", "shift_mean"),
        masked_whiten,
        "fastreward.whiten",
        "two passes over the tokens",
    ),
)
