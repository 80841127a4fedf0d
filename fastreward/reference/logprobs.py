"""Log-probs and the other per-token statistics of a row of logits, in float64 torch: the truth.

`token_logprobs` is the definition. `forward` and `backward` wrap it in the raw form that every backend exports, so
that `with fastreward.backend("reference")` serves real calls; gradients come from autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor

_VALUES = (
    "logprobs",
    "entropy",
    "logsumexp",
    "label_logit",
    "mean_logit",
    "log_sum_sq_probs",
    "max_logprob",
    "max_logit",
)


def token_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    token_ids: Tensor | None = None,
    kept_tokens: Tensor | None = None,
) -> dict[str, Tensor]:
    """Every output of `fastreward.token_logprobs`, in float64.

    logits [..., V]; labels [...]; temperature a float or [...]; mask [...]; token_ids [K] or [..., K]; kept_tokens a
    boolean [..., V] or ids [..., k] (negative = padding). Masked rows are 0 in every output.
    """
    vocab = logits.shape[-1]
    scale = torch.as_tensor(temperature, dtype=torch.float64, device=logits.device)
    x = logits.double()
    z = x / (scale.unsqueeze(-1) if scale.ndim else scale)
    kept = _kept_columns(kept_tokens, logits)
    if kept is not None:
        x, z = x.masked_fill(~kept, -torch.inf), z.masked_fill(~kept, -torch.inf)
    peak = x.amax(-1)
    above = z.amax(-1, keepdim=True)
    z_below = z - torch.where(
        above.isfinite(), above, 0.0
    )  # a large logsumexp has no digits left for small differences
    logp = z_below - torch.logsumexp(z_below, -1, keepdim=True)
    p = logp.exp()
    plogp = torch.where(p > 0, p * torch.where(p > 0, logp, 0.0), p)
    safe = labels.clamp(0, vocab - 1).unsqueeze(-1)
    raw_label = z.gather(-1, safe).squeeze(-1)
    counted = z if kept is None else torch.where(kept, z, 0.0)
    columns = vocab if kept is None else kept.sum(-1)
    out = {
        "logprobs": logp.gather(-1, safe).squeeze(-1),
        "entropy": -plogp.sum(-1),
        "logsumexp": torch.logsumexp(z, -1),
        "label_logit": raw_label,
        "mean_logit": counted.sum(-1) / columns,
        "log_sum_sq_probs": (p * p).sum(-1).log(),
        "max_logprob": logp.amax(-1),
        "max_logit": peak,
        "argmax": z.argmax(-1),
        "rank": (z > raw_label.unsqueeze(-1)).sum(-1),
    }
    if token_ids is not None:
        ids = token_ids.expand(*logits.shape[:-1], token_ids.shape[-1])
        found = logp.gather(-1, ids.clamp(0, vocab - 1))
        out["id_logprobs"] = torch.where((ids >= 0) & (ids < vocab), found, torch.nan)
    if mask is not None:
        keep_rows = mask != 0
        out = {
            name: torch.where(keep_rows.unsqueeze(-1) if name == "id_logprobs" else keep_rows, x, torch.zeros_like(x))
            for name, x in out.items()
        }
    return out


def _kept_columns(kept_tokens: Tensor | None, logits: Tensor) -> Tensor | None:
    if kept_tokens is None or kept_tokens.dtype == torch.bool:
        return kept_tokens
    vocab = logits.shape[-1]
    inside = (kept_tokens >= 0) & (kept_tokens < vocab)
    counts = torch.zeros(logits.shape, dtype=torch.int64, device=logits.device)
    return counts.scatter_add(-1, kept_tokens.clamp(0, vocab - 1), inside.long()) > 0


def forward(
    logits: Tensor,
    labels: Tensor,
    inv_temperature: float | Tensor,
    mask: Tensor | None,
    keep_mask: Tensor | None,
    keep_ids: Tensor | None,
    token_ids: Tensor | None,
    flags: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Raw form of `token_logprobs`: values f32 [8, N], indices i64 [2, N], id_logprobs f32 [N, K]."""
    del flags  # computes everything, always
    ids = token_ids if token_ids is not None else labels.new_zeros((labels.shape[0], 0))
    kept_tokens = keep_mask if keep_mask is not None else keep_ids
    temperature = 1.0 / torch.as_tensor(inv_temperature, dtype=torch.float64)
    out = token_logprobs(logits, labels, temperature=temperature, mask=mask, token_ids=ids, kept_tokens=kept_tokens)
    values = torch.stack([out[name] for name in _VALUES]).float()
    return values, torch.stack([out["argmax"], out["rank"]]), out["id_logprobs"].float()


def backward(
    logits: Tensor,
    labels: Tensor,
    inv_temperature: float | Tensor,
    mask: Tensor | None,
    keep_mask: Tensor | None,
    keep_ids: Tensor | None,
    token_ids: Tensor | None,
    values: Tensor,
    id_logprobs: Tensor,
    grad_values: Tensor,
    grad_ids: Tensor | None,
    grad_logits: Tensor,
    inv_softcap: float = 0.0,
) -> None:
    """Gradient of logprobs, entropy, logsumexp, log_sum_sq_probs and id_logprobs, into grad_logits [N, V].

    dz_j = p_j (c0 + c1 log p_j + c2 p_j) plus the upstream gradient at the label and at token_ids; labels outside
    [0, V) belong to another slice of the vocabulary and have no such term.
    """
    del id_logprobs
    vocab = logits.shape[-1]
    x = logits.double()
    inv = torch.as_tensor(inv_temperature, dtype=torch.float64, device=x.device).reshape(-1, 1)
    kept = _kept_columns(keep_mask if keep_mask is not None else keep_ids, logits)
    _, entropy, _, _, _, log_sum_sq, max_logprob, peak = values.double()
    g_logprob, g_entropy, g_lse, _, _, g_lss, _, _ = grad_values.double()
    c0 = -g_logprob + g_lse - g_entropy * entropy - 2 * g_lss
    if grad_ids is not None and token_ids is not None:
        c0 = c0 - grad_ids.double().sum(-1)
    c2 = torch.where(g_lss != 0, 2 * g_lss * torch.exp(-log_sum_sq), 0.0)
    logp = (x - peak.unsqueeze(-1)) * inv + max_logprob.unsqueeze(-1)
    if kept is not None:
        logp = logp.masked_fill(~kept, -torch.inf)
    p = logp.exp()
    plogp = torch.where(p == 0, 0.0, p * logp)
    dz = p * c0.unsqueeze(-1) - plogp * g_entropy.unsqueeze(-1) + p * p * c2.unsqueeze(-1)
    _add_at(dz, labels.unsqueeze(-1), g_logprob.unsqueeze(-1), vocab)
    if grad_ids is not None and token_ids is not None:
        _add_at(dz, token_ids.expand_as(grad_ids), grad_ids.double(), vocab)
    if kept is not None:
        dz = dz.masked_fill(~kept, 0.0)
    dx = dz * inv * (1 - (x * inv_softcap) ** 2 if inv_softcap else 1.0)
    dx = dx.clamp(-3.3e38, 3.3e38)  # finite in float32 and bfloat16, whatever the temperature
    if mask is not None:
        dx = dx.masked_fill(~mask.unsqueeze(-1), 0.0)
    grad_logits.copy_(dx)


def _add_at(dz: Tensor, ids: Tensor, amount: Tensor, vocab: int) -> None:
    inside = (ids >= 0) & (ids < vocab)
    dz.scatter_add_(-1, ids.clamp(0, vocab - 1), torch.where(inside, amount, 0.0))


def accumulate(
    logits: Tensor,
    labels: Tensor,
    vocab_start: int,
    inv_temperature: float | Tensor,
    state: Tensor,
    flags: int,
    label_logits: Tensor | None,
) -> None:
    """Merges columns vocab_start .. vocab_start + Vc into state f64 [N, 8] (fastreward._runtime.layout.STATE)."""
    del flags
    x = logits.double()
    inv = torch.as_tensor(inv_temperature, dtype=torch.float64, device=x.device).expand(x.shape[0])
    columns = x.shape[1]
    peak, peak_at = x.max(-1)
    local = labels - vocab_start
    inside = (local >= 0) & (local < columns)
    here = x.gather(-1, local.clamp(0, columns - 1).unsqueeze(-1)).squeeze(-1)
    label = torch.where(inside, here, state[:, 5])
    old_peak = state[:, 0].clone()
    new_peak = torch.maximum(old_peak, peak)
    base = torch.where(new_peak == -torch.inf, 0.0, new_peak)
    shift = torch.where(old_peak == -torch.inf, 0.0, (old_peak - base) * inv)
    scale = shift.exp()
    t = (x - base.unsqueeze(-1)) * inv.unsqueeze(-1)
    e = t.exp()
    weighted = torch.where(e > 0, t * e, e).sum(-1)
    state[:, 0] = new_peak
    state[:, 2] = scale * (state[:, 2] + shift * state[:, 1]) + weighted
    state[:, 1] = scale * state[:, 1] + e.sum(-1)
    state[:, 3] = scale * scale * state[:, 3] + (e * e).sum(-1)
    state[:, 4] += x.sum(-1)
    state[:, 5] = label
    state[:, 6] = torch.where(peak > old_peak, (peak_at + vocab_start).double(), state[:, 6])
    threshold = here if label_logits is None else label_logits.double()
    state[:, 7] += (x > threshold.unsqueeze(-1)).sum(-1)


def finish(state: Tensor, inv_temperature: float | Tensor, vocab_size: int, flags: int) -> tuple[Tensor, Tensor]:
    """From the merged state to values f32 [8, N] and indices i64 [2, N]."""
    del flags
    peak, total, weighted, squares, logit_sum, label, argmax, rank = state.unbind(-1)
    inv = torch.as_tensor(inv_temperature, dtype=torch.float64)
    log_total = total.log()
    values = torch.stack(
        [
            (label - peak) * inv - log_total,
            log_total - weighted / total,
            torch.where(peak.isinf(), peak, peak * inv + log_total),
            label * inv,
            logit_sum * inv / vocab_size,
            squares.log() - 2 * log_total,
            -log_total,
            peak,
        ]
    )
    return values.float(), torch.stack([argmax.long(), rank.long()])
