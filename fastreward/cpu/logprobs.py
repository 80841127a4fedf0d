"""CPU backend of `logprobs`: torch tensors to pointers for csrc/cpu/logprobs_*.cpp. Inputs are validated already."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastreward import _core
from fastreward._runtime.addresses import address
from fastreward._runtime.layout import INDICES, VALUES

_DTYPES = {torch.float32: _core.DType.f32, torch.bfloat16: _core.DType.bf16, torch.float16: _core.DType.f16}


def forward(
    logits: Tensor,  # [N, V] f32/bf16/f16, unit column stride, any row stride
    labels: Tensor,  # [N] i64
    inv_temperature: float | Tensor,  # scalar or [N] f64
    mask: Tensor | None,  # [N] bool; False: the row is not read, its outputs are 0
    keep_mask: Tensor | None,  # [N, V] bool
    keep_ids: Tensor | None,  # [N, k] i64, outside [0, V) = padding
    token_ids: Tensor | None,  # [N, K] i64
    flags: int,  # fastreward._runtime.layout.FLAG
) -> tuple[Tensor, Tensor, Tensor]:
    """values f32 [8, N], indices i64 [2, N], id_logprobs f32 [N, K]; each logit is read once."""
    rows, alive = _rows(logits, labels, inv_temperature, mask, keep_mask, keep_ids, token_ids)
    n = logits.shape[0]
    values = torch.empty((len(VALUES), n), dtype=torch.float32, device="cpu")
    indices = torch.empty((len(INDICES), n), dtype=torch.int64, device="cpu")
    id_logprobs = logits.new_empty((n, 0 if token_ids is None else token_ids.shape[1]), dtype=torch.float32)
    _core.logprobs_forward(rows, flags, values.data_ptr(), indices.data_ptr(), id_logprobs.data_ptr())
    del alive
    return values, indices, id_logprobs


def backward(
    logits: Tensor,  # [N, V]
    labels: Tensor,  # [N] i64; outside [0, V): no gradient of its own (another slice of the vocabulary)
    inv_temperature: float | Tensor,
    mask: Tensor | None,
    keep_mask: Tensor | None,
    keep_ids: Tensor | None,
    token_ids: Tensor | None,
    values: Tensor,  # [8, N] f32, the forward's
    id_logprobs: Tensor,  # [N, K] f32
    grad_values: Tensor,  # [8, N] f32
    grad_ids: Tensor | None,  # [N, K] f32
    grad_logits: Tensor,  # [N, V], dtype of logits; may be logits itself
    inv_softcap: float = 0.0,
) -> None:
    """Writes the gradient of all differentiable outputs together: each logit read once, each gradient written once."""
    del id_logprobs
    rows, alive = _rows(logits, labels, inv_temperature, mask, keep_mask, keep_ids, token_ids)
    values, grad_values = values.contiguous(), grad_values.contiguous()
    grad_ids = None if grad_ids is None or token_ids is None else grad_ids.contiguous()
    _core.logprobs_backward(
        rows,
        values.data_ptr(),
        grad_values.data_ptr(),
        address(grad_ids),
        grad_logits.data_ptr(),
        grad_logits.stride(0),
        inv_softcap,
    )
    del alive


def accumulate(
    logits: Tensor,  # [N, Vc], columns vocab_start .. vocab_start + Vc of the full rows
    labels: Tensor,  # [N] i64, ids of the full vocabulary
    vocab_start: int,
    inv_temperature: float | Tensor,
    state: Tensor,  # [N, 8] f64, fastreward._runtime.layout.STATE; updated in place
    flags: int,
    label_logits: Tensor | None,  # [N] f32 raw, what rank compares with
) -> None:
    """Merges a slice of the vocabulary into `state`, in the order of the calls."""
    rows, alive = _rows(logits, labels, inv_temperature, None, None, None, None)
    threshold = None if label_logits is None else label_logits.float().contiguous()
    merged = state.contiguous()
    _core.logprobs_accumulate(rows, vocab_start, flags, address(threshold), merged.data_ptr())
    if merged is not state:
        state.copy_(merged)
    del alive


def finish(state: Tensor, inv_temperature: float | Tensor, vocab_size: int, flags: int) -> tuple[Tensor, Tensor]:
    """From `state` f64 [N, 8] to values f32 [8, N] and indices i64 [2, N]."""
    n = state.shape[0]
    state = state.contiguous()
    values = torch.empty((len(VALUES), n), dtype=torch.float32, device="cpu")
    indices = torch.empty((len(INDICES), n), dtype=torch.int64, device="cpu")
    scale, stride, scalar = _inv_temperature(inv_temperature)
    _core.logprobs_finish(
        state.data_ptr(), address(scale), stride, scalar, n, vocab_size, flags, values.data_ptr(), indices.data_ptr()
    )
    return values, indices


def _rows(
    logits: Tensor,
    labels: Tensor,
    inv_temperature: float | Tensor,
    mask: Tensor | None,
    keep_mask: Tensor | None,
    keep_ids: Tensor | None,
    token_ids: Tensor | None,
) -> tuple[Any, list[Tensor | None]]:
    """The C++ description of the call, and the tensors that must outlive it because it points into them."""
    scale, stride, scalar = _inv_temperature(inv_temperature)
    labels = labels.contiguous()
    mask = None if mask is None else mask.contiguous()
    keep_mask = _unit_columns(keep_mask)
    keep_ids = _unit_columns(keep_ids)
    token_ids = _unit_columns(token_ids)
    rows = _core.LogprobsRows()
    rows.logits, rows.dtype = logits.data_ptr(), _DTYPES[logits.dtype]
    rows.rows, rows.columns = logits.shape
    rows.row_stride = logits.stride(0)
    rows.labels = labels.data_ptr()
    if scale is None:
        rows.inv_temperature_scalar = scalar
    else:
        rows.inv_temperature, rows.inv_temperature_stride = scale.data_ptr(), stride
    if mask is not None:
        rows.mask = mask.data_ptr()
    if keep_mask is not None:
        rows.keep_mask, rows.keep_mask_stride = keep_mask.data_ptr(), keep_mask.stride(0)
    if keep_ids is not None:
        rows.keep_ids, rows.keep_ids_stride = address(keep_ids) or rows.labels, keep_ids.stride(0)
        rows.keep_count = keep_ids.shape[1]
    if token_ids is not None:
        rows.token_ids, rows.token_ids_stride = token_ids.data_ptr(), token_ids.stride(0)
        rows.token_count = token_ids.shape[1]
    rows.threads = torch.get_num_threads()
    return rows, [labels, scale, mask, keep_mask, keep_ids, token_ids]


def _inv_temperature(inv_temperature: float | Tensor) -> tuple[Tensor | None, int, float]:
    """(f64 tensor or None, its stride, the scalar used where there is no tensor)."""
    if not isinstance(inv_temperature, Tensor):
        return None, 0, float(inv_temperature)
    scale = inv_temperature.double()
    return scale, scale.stride(0) if scale.ndim else 0, 1.0


def _unit_columns(x: Tensor | None) -> Tensor | None:
    """`x` [N, k] with unit column stride; the row stride stays what it is (0 when expanded)."""
    return x if x is None or x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
