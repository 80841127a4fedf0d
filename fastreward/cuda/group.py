"""Raw functions of `group` on CUDA tensors. The kernels: csrc/cuda/group.cu."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from fastreward._arguments.options import CENTERS, SCALES, GroupOptions
from fastreward._runtime.layout import GROUP_STATISTICS
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
        variance, sums, out, None, 0,
    )  # fmt: skip
    if batch_std:
        launch(_SOURCE, "group_batch_variance", variances, _WHOLE, arguments, device)
    launch(_SOURCE, "group_normalise", _blocks(rows, keys, group_size), _THREADS, arguments, device)
    return out


def statistics(
    x: Tensor, group_index: Tensor | None, group_size: int, weights: Tensor | None, exponentials: bool
) -> Tensor:
    """f64 [8, N]: layout.GROUP_STATISTICS of each entry's group, from x [N]."""
    rows = x.shape[0]
    found = torch.empty((len(GROUP_STATISTICS), rows), dtype=torch.float64, device=x.device)
    if rows == 0:
        return found
    keys = order = None
    if group_index is not None:
        keys, order = torch.sort(group_index, stable=True)
    x = x.contiguous()
    arguments = pack(
        x, int(x.dtype == torch.float64), rows, 1, keys, order, group_size, weights, None, None, None,
        CENTERS.index("mean"), SCALES.index("std"), 0, 0.0, None, 0, 0, 0, None, None, None, found, int(exponentials),
    )  # fmt: skip
    launch(_SOURCE, "group_statistics", _blocks(rows, keys, group_size), _THREADS, arguments, x.device)
    return found


def _blocks(rows: int, keys: Tensor | None, group_size: int) -> int:
    """A warp for each row that may begin a segment of sorted labels, or for each contiguous group."""
    warps = rows if keys is not None else -(-rows // group_size)
    return -(-warps * _WARP // _THREADS)


def _eps(eps: float | Tensor) -> tuple[float, Tensor | None]:
    return (0.0, eps) if isinstance(eps, Tensor) else (float(eps), None)
