"""A batch for losses that start at the logits or at hidden states, and its loss and gradients in float64 torch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastreward import losses
from fastreward.reference.policy_loss import aggregate

VOCAB = 311
LOSSES = {
    "ppo": losses.ppo(dual_clip=3.0),
    "cispo": losses.cispo(),
    "sapo": losses.sapo(),
    "reinforce": losses.reinforce(),
    "gspo": losses.gspo(),  # needs all log-probs of a sequence first: two passes
    "real": losses.real(),  # of a group
}
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def batch(rows: int = 4, width: int = 11, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    logits = (2 * torch.randn(rows, width, VOCAB)).to(dtype)
    labels = torch.randint(0, VOCAB, (rows, width))
    logprobs = torch.log_softmax(logits.double(), -1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    mask = torch.arange(width) < torch.tensor([width, 1, 0, width // 2])[:rows].unsqueeze(-1)
    return {
        "logits": logits,
        "labels": labels,
        "old_logprobs": (logprobs + 0.3 * torch.randn(rows, width)).float(),
        "advantages": torch.tensor([1.0, -0.5, 1.0, -2.0])[:rows],
        "mask": mask,
    }


def truth(
    data: dict[str, Tensor],
    loss: losses.Loss,
    leaves: dict[str, Tensor],
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    entropy_coef: float = 0.0,
    aggregation: str | None = None,
    upstream: float = 1.0,
    **terms: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients in float64, the loss by the language's evaluation, its gradient by autograd."""
    scale = temperature.double().unsqueeze(-1) if isinstance(temperature, Tensor) else temperature
    distribution = torch.log_softmax(logits / scale, -1)
    logprobs = distribution.gather(-1, data["labels"].unsqueeze(-1)).squeeze(-1)
    mask = data["mask"]
    value = loss.evaluate(
        mask=mask,
        group_ids=[0, 1, 1, 0],
        logprob=logprobs,
        old_logprob=data["old_logprobs"],
        advantage=data["advantages"],
        **terms,
    )
    token = value if value.ndim == 2 else torch.where(mask, value.unsqueeze(-1), 0.0)
    entropy = -(distribution.exp() * distribution.nan_to_num(neginf=0.0)).sum(-1)
    token = token - entropy_coef * torch.where(mask, entropy, 0.0)
    total = aggregate(token, mask, aggregation or loss.aggregation, None, torch.tensor([0, 1, 1, 0]))
    grads = torch.autograd.grad(total, list(leaves.values()), torch.tensor(upstream, dtype=torch.float64))
    return total.detach(), dict(zip(leaves, grads, strict=True))


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    # A loss is a sum of log-probs of about 10 that cancel: its error is that of its terms.
    scale = max(float(expected.detach().abs().max()), 1e-9 if expected.ndim else 1.0)
    assert float((actual.detach().double() - expected.double()).abs().max()) <= tolerance * scale
