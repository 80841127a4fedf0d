"""CPU backend of `group`: torch tensors to pointers for csrc/cpu/group.cpp. Inputs are validated already."""

from __future__ import annotations

import torch
from torch import Tensor

from fastreward import _core
from fastreward._arguments.options import NORMALIZES, GroupOptions
from fastreward._runtime.addresses import address
from fastreward._runtime.layout import GROUP_STATISTICS


def forward(
    rewards: Tensor,  # [B, K] f32 or f64, NaN = not scored
    group_index: Tensor | None,  # [B] i64, any labels; or
    group_size: int,  # > 0: contiguous groups of this size
    lengths: Tensor | None,  # [B] f32
    component_weights: Tensor | None,  # [K] f32
    center_values: Tensor | None,  # [B] f32
    scale_values: Tensor | None,  # [B] f32
    options: GroupOptions,
) -> Tensor:
    """Advantages f32 [B]; statistics in float64."""
    rows, components = rewards.shape
    center, scale, singleton = options.numbers(center_values, scale_values)
    advantages = torch.empty(rows, dtype=torch.float32, device="cpu")
    _core.group_advantages(
        rewards.data_ptr(),
        rewards.dtype == torch.float64,
        rows,
        components,
        address(group_index),
        group_size,
        address(lengths),
        address(component_weights),
        address(center_values),
        address(scale_values),
        center,
        scale,
        options.ddof,
        float(options.eps),
        options.eps_inside,
        singleton,
        NORMALIZES.index(options.normalize),
        advantages.data_ptr(),
        torch.get_num_threads(),
    )
    return advantages


def statistics(
    x: Tensor,  # [N] f32 or f64, NaN = not there
    group_index: Tensor | None,  # [N] i64, any labels; or
    group_size: int,  # > 0: contiguous groups of this size
    weights: Tensor | None,  # [N] f32
    exponentials: bool,
) -> Tensor:
    """f64 [8, N]: layout.GROUP_STATISTICS of each entry's group."""
    rows = x.shape[0]
    found = torch.empty((len(GROUP_STATISTICS), rows), dtype=torch.float64, device="cpu")
    _core.group_statistics(
        x.data_ptr(),
        x.dtype == torch.float64,
        rows,
        address(group_index),
        group_size,
        address(weights),
        exponentials,
        found.data_ptr(),
        torch.get_num_threads(),
    )
    return found
