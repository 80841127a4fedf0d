"""linear_policy_loss: hidden states and LM head to PPO loss and gradients, beside two calls of ours, torch, Liger."""

from __future__ import annotations

from functools import lru_cache, partial

import torch
from torch import Tensor

from fastreward.bench import peers, roofline
from fastreward.bench.case import OURS, Case, Contender, Target
from fastreward.bench.cases._steps import Tensors, add_torch, step, worst_of_step
from fastreward.linear_logprobs import linear_token_logprobs
from fastreward.linear_policy_loss import linear_policy_loss
from fastreward.policy_loss import policy_loss

CASES = ("backward",)
DTYPES = ("float32",)
SHAPE = (512, 512, 151_936)
QUICK = (64, 64, 4096)

_SEQUENCE = 128  # tokens of a sequence; fewer where there are fewer
_TWO_CALLS = "linear_token_logprobs + policy_loss"


@lru_cache(maxsize=1)
def _data(shape: tuple[int, ...], device: str) -> Tensors:
    """hidden [B, T, H], weight [V, H], labels, old log-probs [B, T], advantages [B], mask [B, T]."""
    rows, width, vocab = shape
    generator = torch.Generator(device=device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    length = min(_SEQUENCE, rows)
    lead = (rows // length, length)
    weight, hidden = normal(vocab, width) * (2 / width**0.5), normal(*lead, width)
    labels = torch.randint(0, vocab, lead, generator=generator, device=device)
    with torch.no_grad():
        old = linear_token_logprobs(hidden, weight, labels).logprobs
    mask = torch.ones(lead, dtype=torch.bool, device=device)
    return hidden, weight, labels, old + 0.2 * normal(*lead), normal(lead[0]), mask


def build(case: str, dtype: torch.dtype, shape: tuple[int, ...], device: str) -> Case:
    """Forward + backward at `shape` [N, H, V]."""
    rows, width, vocab = shape
    data = _data(shape, device)
    hidden, weight = data[:2]
    built = Case(
        operation="linear_policy_loss",
        name=case,
        dtype=str(dtype).removeprefix("torch."),
        shape=shape,
        traffic=roofline.linear_policy_loss(rows, width, vocab, hidden.element_size()),
        error=partial(worst_of_step, _truth(*data)),
        contenders=[
            Contender(OURS, partial(step, _ours, 2, *data)),
            Contender(_TWO_CALLS, partial(step, _two_calls, 2, *data)),
        ],
        tolerance=1e-4,
        inputs=list(data),
        gemm=(hidden.flatten(0, 1), weight.t()),
        targets=(Target("ratio", 1.0, _TWO_CALLS), Target("memory", 300 << 20)),
    )
    add_torch(built, _plain, lambda form: partial(step, form, 2, *data), 1e-3)
    peers.add(built, "liger-kernel", partial(_liger, data))
    built.absent["TRL"] = "uses liger-kernel's where use_liger_kernel=True; else its steps are 'torch eager'"
    built.absent["verl"] = "its fused head gives log-probs, no loss: see linear_logprobs"
    return built


def _ours(*data: Tensor) -> Tensor:
    return linear_policy_loss(*data).loss


def _two_calls(hidden: Tensor, weight: Tensor, labels: Tensor, *rest: Tensor) -> Tensor:
    return policy_loss(linear_token_logprobs(hidden, weight, labels).logprobs, *rest).loss


def _plain(hidden: Tensor, weight: Tensor, labels: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    logits = hidden @ weight.t()
    logprobs = torch.log_softmax(logits, -1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    ratio, cost = (logprobs - old).exp(), -advantages.unsqueeze(-1)
    token = torch.maximum(cost * ratio, cost * ratio.clamp(0.8, 1.2))
    return (token * mask).sum() / mask.sum()


def _liger(data: Tensors) -> Contender:
    losses = peers.load("liger-kernel", "liger_kernel.chunked_loss")
    with peers.quietly():
        head = losses.LigerFusedLinearGRPOLoss(beta=0.0, compiled=False, use_ref_model=False, loss_type="bnpo")

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        out: Tensor = head(hidden, weight, labels, mask, advantages, old_per_token_logps=old)[0]
        return out

    return Contender("liger-kernel", partial(step, loss, 2, *data), tolerance=1e-3)


def _truth(*data: Tensor) -> Tensors:
    return step(_plain, 2, *(x.double() if x.dtype == torch.float32 else x for x in data))
