"""logits_policy_loss: logits to PPO loss and logits gradient, beside log_softmax + gather + loss + backward."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from fastreward import losses
from fastreward.bench import roofline
from fastreward.bench.case import OURS, PEERS, Case, Contender, Target
from fastreward.bench.cases._steps import Tensors, add_torch, step
from fastreward.logits_policy_loss import logits_policy_loss
from fastreward.verify.error import distance

CASES = ("fresh", "inplace")
DTYPES = ("float32", "bfloat16")
SHAPE = (2048, 151_936)
QUICK = (64, 4096)

_SEQUENCE = 256  # tokens of a sequence; fewer where there are fewer rows
_COPY = "copy of the logits"


@lru_cache(maxsize=1)
def _data(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensors:
    """Logits [B, T, V], labels, old log-probs, advantages [B, T], mask [B, T]."""
    generator = torch.Generator(device=device).manual_seed(0)
    rows, vocab = shape
    width = min(_SEQUENCE, rows)
    lead = (rows // width, width)
    logits = torch.randn((*lead, vocab), generator=generator, device=device, dtype=torch.float32).mul_(2).to(dtype)
    labels = torch.randint(0, vocab, lead, generator=generator, device=device)
    noise = 0.2 * torch.randn(lead, generator=generator, device=device)
    old = _logprobs(logits, labels, torch.float32)
    advantages = torch.randn(lead, generator=generator, device=device)
    return logits, labels, old + noise, advantages, torch.ones(lead, dtype=torch.bool, device=device)


def _logprobs(logits: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, T], one sequence at a time: all of it in `dtype` would not fit."""
    rows = (
        torch.log_softmax(x.to(dtype), -1).gather(-1, y.unsqueeze(-1)).squeeze(-1)
        for x, y in zip(logits, labels, strict=True)
    )
    return torch.stack(list(rows))


def build(case: str, dtype: torch.dtype, shape: tuple[int, ...], device: str) -> Case:
    """Forward + backward on [N, V]."""
    data = _data(shape, dtype, device)
    logits, rest = data[0], data[1:]
    low = dtype != torch.float32
    rows, vocab = logits.shape[0] * logits.shape[1], shape[1]
    built = Case(
        operation="logits_policy_loss",
        name=case,
        dtype=str(dtype).removeprefix("torch."),
        shape=shape,
        traffic=roofline.logits_policy_loss(rows, vocab, dtype.itemsize),
        error=partial(_error, _truth(logits, rest)),
        contenders=[],
        tolerance=1e-2 if low else 1e-4,
        inputs=list(data),
        targets=(Target("ratio", 1.6, _COPY),) if case == "inplace" else (Target("speedup", 3.0, "torch.compile"),),
    )
    work = torch.empty_like(logits) if case == "inplace" else logits
    built.contenders.append(Contender(OURS, partial(step, partial(_ours, case == "inplace"), 1, work, *rest)))
    if case == "inplace":
        built.contenders[0].prepare = partial(_copy, work, logits)
        built.inputs.append(work)
        built.contenders.append(Contender(_COPY, partial(_copied, work, logits, built.error), tolerance=torch.inf))
        built.absent |= dict.fromkeys(PEERS, "makes a fresh gradient: see that case")
        return built
    add_torch(built, _plain, lambda form: partial(step, form, 1, *data), 3e-2 if low else 1e-3)
    built.absent["TRL"] = "no function from logits to loss; its steps are 'torch eager'"
    built.absent["verl"] = "no function from logits to loss"
    built.absent["liger-kernel"] = "its kernel needs a GPU"
    return built


def _ours(inplace: bool, *data: Tensor) -> Tensor:
    return logits_policy_loss(*data, loss=losses.ppo(), inplace=inplace).loss


def _copy(target: Tensor, logits: Tensor) -> None:
    target.copy_(logits)


def _copied(target: Tensor, logits: Tensor, error: Any) -> Tensors:
    target.copy_(logits)
    return torch.zeros(()), target


def _plain(logits: Tensor, labels: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    logprobs = torch.log_softmax(logits.float(), -1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    ratio = (logprobs - old).exp()
    token = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))
    return (token * mask).sum() / mask.sum()


def _truth(logits: Tensor, rest: Tensors) -> Tensors:
    """Loss, and the gradient of the first and the last rows: all of it in float64 would not fit."""
    labels, old, advantages, mask = rest
    leaf = _logprobs(logits, labels, torch.float64).requires_grad_()
    ratio = (leaf - old.double()).exp()
    token = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))
    loss = (token * mask).sum() / mask.sum()
    (upstream,) = torch.autograd.grad(loss, leaf)
    ends = []
    for b, t in ((0, 0), (-1, -1)):
        p = torch.softmax(logits[b, t].double(), -1)
        p[labels[b, t]] -= 1
        ends.append(-p * upstream[b, t])
    return (loss.detach(), *ends)


def _error(expected: Tensors, result: Tensors) -> float:
    loss, first, last = expected
    grad = result[1]
    rows = torch.stack([grad[0, 0], grad[-1, -1]])
    return max(distance(result[0], loss), distance(rows, torch.stack([first, last]), of_gradient=True))
