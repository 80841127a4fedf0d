"""The weight of an adaptive KL on a GPU: torch's sort, some rows at a time; no kernel of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from fastreward._arguments.divergence import DivergenceCall
from fastreward._runtime.layout import VALUES

_ELEMENTS = 1 << 26  # of the rows that are sorted at a time
_LARGEST, _LARGEST_LOG = VALUES.index("max_logit"), VALUES.index("max_logprob")


def head_share(
    logits: Tensor,  # [N, V]
    teacher_logits: Tensor,  # [N, V]
    call: DivergenceCall,
    student: Tensor,  # [8, N] f32, the forward's
    teacher: Tensor,  # [8, N] f32
    alpha: float,
) -> Tensor:
    """f32 [N]: what lies in the teacher's head of the difference between both; 0 in masked rows."""
    rows, columns = logits.shape
    shares = torch.empty(rows, dtype=torch.float32, device=logits.device)
    step = max(_ELEMENTS // max(columns, 1), 1)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        p = _probabilities(logits[part], call.inv_temperature, student[:, part], part)
        q = _probabilities(teacher_logits[part], call.inv_teacher_temperature, teacher[:, part], part)
        ordered, order = q.sort(stable=True)
        tail = ordered.cumsum(-1, dtype=torch.float64) <= alpha
        between = (p - q).abs().gather(-1, order).double()
        head, whole = torch.where(tail, 0.0, between).sum(-1), between.sum(-1)
        shares[part] = torch.where(whole == 0, 0.5, head / whole).float()
    return shares if call.mask is None else torch.where(call.mask, shares, 0.0)


def _probabilities(logits: Tensor, inverse: float | Tensor, values: Tensor, part: slice) -> Tensor:
    scale = inverse[part].float().unsqueeze(-1) if isinstance(inverse, Tensor) else inverse
    below = logits.float() - values[_LARGEST].unsqueeze(-1)
    return (below * scale + values[_LARGEST_LOG].unsqueeze(-1)).exp()
