"""Raw functions of policy_loss on CUDA tensors: one launch per direction. The kernels: csrc/cuda/policy_loss.cu."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from fastreward._layout import METRICS
from fastreward._options import AGGREGATIONS, KLS, PolicyOptions
from fastreward.cuda._launch import Member, countable, counter, launch, multiprocessors, pack

_SOURCE: Final = "policy_loss"
# As in the source.
_THREADS: Final = 256
_CHUNK: Final = 2048
_ROOM: Final = 16


def forward(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    ref_logprobs: Tensor | None,
    entropy: Tensor | None,
    weights: Tensor | None,
    cu_seqlens: Tensor | None,
    options: PolicyOptions,
    want_token_loss: bool,
    normalizer: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss [], metrics [12], gradient before row weights as logprobs, row weights [B], token losses or [0])."""
    device = logprobs.device
    layout, rows, units = _layout(logprobs, cu_seqlens)
    counted, kind = countable(mask)

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    loss, metrics, saved, row_weight = new(), new(len(METRICS)), torch.empty_like(logprobs), new(rows)
    token_loss = torch.empty_like(logprobs) if want_token_loss else new(0)
    sums = torch.empty((units, _ROOM), dtype=torch.float64, device=device)
    arguments = pack(
        logprobs, old_logprobs, advantages, int(advantages.shape != logprobs.shape), counted, kind,
        ref_logprobs, entropy, weights, *layout,
        1.0 - options.clip_low, 1.0 + options.clip_high, _or_infinity(options.dual_clip), _or_infinity(options.delta),
        _or_infinity(options.log_ratio_clamp), 0 if options.kl is None else 1 + KLS.index(options.kl),
        float(options.kl_coef), float(options.entropy_coef), AGGREGATIONS.index(options.aggregation), normalizer,
        loss, metrics, saved, row_weight, token_loss if want_token_loss else None, sums, counter(device),
    )  # fmt: skip
    launch(_SOURCE, "policy_loss_forward", _grid(units, device), _THREADS, arguments, device)
    return loss, metrics, saved, row_weight, token_loss


def backward(
    saved: Tensor,
    mask: Tensor | None,
    row_weight: Tensor,
    grad_loss: Tensor,
    cu_seqlens: Tensor | None,
    options: PolicyOptions,
) -> tuple[Tensor, Tensor]:
    """Gradients for logprobs and for entropy ([0] without an entropy bonus), in the shape of `saved`."""
    layout, _, units = _layout(saved, cu_seqlens)
    counted, kind = countable(mask)
    bonus = options.entropy_coef != 0.0
    grad_logprobs = torch.empty_like(saved)
    grad_entropy = torch.empty_like(saved) if bonus else saved.new_empty(0)
    arguments = pack(
        saved, counted, kind, row_weight, grad_loss, *layout, float(options.entropy_coef), grad_logprobs,
        grad_entropy if bonus else None,
    )  # fmt: skip
    launch(_SOURCE, "policy_loss_backward", _grid(units, saved.device), _THREADS, arguments, saved.device)
    return grad_logprobs, grad_entropy


def _layout(tokens: Tensor, cu_seqlens: Tensor | None) -> tuple[tuple[Member, int, int, int, int], int, int]:
    """The kernels' `Rows` struct, the number of rows and that of units (bounded for packed rows, never read back)."""
    if cu_seqlens is None:
        rows, width = tokens.shape
        per_row = max(1, -(-width // _CHUNK))
        return (None, rows, width, rows * per_row, per_row), rows, rows * per_row
    rows = cu_seqlens.shape[0] - 1
    units = tokens.shape[0] // _CHUNK + rows if rows else 0
    return (cu_seqlens, rows, 0, units, 0), rows, units


def _grid(units: int, device: torch.device) -> int:
    return max(1, min(units, 16 * multiprocessors(device)))


def _or_infinity(x: float | None) -> float:
    return math.inf if x is None else float(x)
