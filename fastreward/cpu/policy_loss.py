"""CPU backend of `policy_loss`: torch tensors to pointers for csrc/cpu/policy_loss.cpp. Inputs are validated already,
except for the values of the advantages, which the kernel itself looks at while it reads them."""

from __future__ import annotations

import torch
from torch import Tensor

from fastreward import _core
from fastreward._layout import METRICS
from fastreward._memory import empty
from fastreward._options import AGGREGATIONS, KLS, PolicyOptions
from fastreward.cpu._pointers import address, mask_arguments


def forward(
    logprobs: Tensor,  # [B, T], or [N] with cu_seqlens; f32 contiguous, as all below
    old_logprobs: Tensor,  # as logprobs
    advantages: Tensor,  # as logprobs, or [B]
    mask: Tensor | None,  # as logprobs: bool, uint8, int32, int64 or f32
    ref_logprobs: Tensor | None,  # as logprobs
    entropy: Tensor | None,  # as logprobs
    weights: Tensor | None,  # as logprobs
    cu_seqlens: Tensor | None,  # [B + 1] i64
    options: PolicyOptions,
    want_token_loss: bool,
    normalizer: Tensor | None,  # [] f32
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss [], metrics [12], gradient for logprobs at upstream 1, row weight [B], token loss or [0]).

    Raises ValueError for a NaN advantage on a counted token.
    """
    rows, columns = _extent(logprobs, cu_seqlens)
    loss = torch.empty((), dtype=torch.float32, device="cpu")
    metrics = torch.empty(len(METRICS), dtype=torch.float32, device="cpu")
    saved = empty(logprobs.shape, torch.float32)
    row_weight = torch.empty(rows, dtype=torch.float32, device="cpu")
    token_loss = empty(logprobs.shape if want_token_loss else (0,), torch.float32)
    mask_address, mask_kind = mask_arguments(mask)
    per_row = advantages.shape != logprobs.shape
    at = _core.policy_forward(
        rows=rows,
        columns=columns,
        cu_seqlens=address(cu_seqlens),
        mask=mask_address,
        mask_kind=mask_kind,
        logprobs=logprobs.data_ptr(),
        old_logprobs=old_logprobs.data_ptr(),
        advantages=advantages.data_ptr(),
        advantage_per_row=per_row,
        ref_logprobs=address(ref_logprobs),
        entropy=address(entropy),
        weights=address(weights),
        normalizer=address(normalizer),
        clip_low=options.clip_low,
        clip_high=options.clip_high,
        dual_clip=options.dual_clip,
        delta=options.delta,
        log_ratio_clamp=options.log_ratio_clamp,
        aggregation=AGGREGATIONS.index(options.aggregation),
        kl=0 if options.kl is None else 1 + KLS.index(options.kl),
        kl_coef=options.kl_coef,
        entropy_coef=options.entropy_coef,
        loss=loss.data_ptr(),
        metrics=metrics.data_ptr(),
        gradient=saved.data_ptr(),
        row_weight=row_weight.data_ptr(),
        token_loss=token_loss.data_ptr() if want_token_loss else 0,
        threads=torch.get_num_threads(),
    )
    if at[0] >= 0:
        raise ValueError(_nan_message(at, advantages, cu_seqlens, per_row))
    return loss, metrics, saved, row_weight, token_loss


def backward(
    saved: Tensor,  # the forward's gradient, as logprobs
    mask: Tensor | None,
    row_weight: Tensor,  # [B]
    grad_loss: Tensor,  # [] f32
    cu_seqlens: Tensor | None,
    options: PolicyOptions,
) -> tuple[Tensor, Tensor]:
    """Gradients for logprobs (`saved` itself when grad_loss is 1) and for entropy ([0] without an entropy bonus)."""
    factor, threads = float(grad_loss), torch.get_num_threads()
    grad = saved
    if factor != 1.0:
        grad = empty(saved.shape, torch.float32)
        _core.policy_scale(saved.data_ptr(), factor, saved.numel(), grad.data_ptr(), threads)
    if not options.entropy_coef:
        return grad, torch.empty(0, dtype=torch.float32, device="cpu")
    grad_entropy = empty(saved.shape, torch.float32)
    _core.policy_spread(
        *_extent(saved, cu_seqlens),
        address(cu_seqlens),
        *mask_arguments(mask),
        row_weight.data_ptr(),
        -options.entropy_coef * factor,
        grad_entropy.data_ptr(),
        threads,
    )
    return grad, grad_entropy


def _extent(tokens: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int]:
    """Rows, and columns of the padded layout (0 when packed)."""
    if cu_seqlens is not None:
        return cu_seqlens.shape[0] - 1, 0
    return tokens.shape[0], tokens.shape[1]


def _nan_message(at: tuple[int, int], advantages: Tensor, cu_seqlens: Tensor | None, per_row: bool) -> str:
    row, column = at
    place = f"[{row}]" if per_row else f"[{row}, {column}]"
    if cu_seqlens is not None and not per_row:
        place = f"[{int(cu_seqlens[row]) + column}] (sequence {row}, token {column})"
    return f"advantages: expected finite values where mask is set, got nan at {place} of shape {list(advantages.shape)}"
