"""Raw function of group_advantages on CUDA tensors. The kernels: csrc/cuda/group.cu."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from fastreward._arguments.options import GroupOptions
from fastreward.cuda._launch import launch, pack

_SOURCE: Final = "group"
# As in the source.
_THREADS: Final = 256
_WHOLE: Final = 1024
_WARP: Final = 32


def forward(
    rewards: Tensor,
    group_index: Tensor | None,
    group_size: int,
    lengths: Tensor | None,
    component_weights: Tensor | None,
    center_values: Tensor | None,
    scale_values: Tensor | None,
    options: GroupOptions,
) -> Tensor:
    """Advantages f32 [B] from rewards [B, K]; group_index may hold any int64 labels, sorted here on the device."""
    rows, components = rewards.shape
    device = rewards.device
    out = torch.empty(rows, dtype=torch.float32, device=device)
    if rows == 0:
        return out
    keys = order = None
    if group_index is not None:
        keys, order = torch.sort(group_index, stable=True)
    separate = options.normalize == "normalize-then-sum"
    batch_std = options.scale == "batch-std"
    variances = components if separate else 1
    center, scale, singleton = options.numbers(center_values, scale_values)
    variance = torch.empty(variances, dtype=torch.float64, device=device) if batch_std else None
    sums = torch.empty(rows, dtype=torch.float64, device=device) if separate else None
    rewards = rewards.contiguous()
    arguments = pack(
        rewards, int(rewards.dtype == torch.float64), rows, components, keys, order, group_size,
        lengths, component_weights, center_values, scale_values,
        center, scale, options.ddof, *_eps(options.eps), int(options.eps_inside), singleton, int(separate),
        variance, sums, out,
    )  # fmt: skip
    if batch_std:
        launch(_SOURCE, "group_batch_variance", variances, _WHOLE, arguments, device)
    warps = rows if keys is not None else -(-rows // group_size)
    launch(_SOURCE, "group_normalise", -(-warps * _WARP // _THREADS), _THREADS, arguments, device)
    return out


def _eps(eps: float | Tensor) -> tuple[float, Tensor | None]:
    return (0.0, eps) if isinstance(eps, Tensor) else (float(eps), None)
