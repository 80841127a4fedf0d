"""policy_loss: PPO with dual clip, forward + backward, as verl's vanilla loss has it (log-ratio clamp 20, c = 3)."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

import fastreward
from fastreward._distance import distance
from fastreward.bench import peers, roofline
from fastreward.bench._types import OURS, Case, Contender, Target
from fastreward.reference import policy_loss as reference

CASES = ("backward",)
DTYPES = ("float32",)
SHAPE = (512, 8192)
QUICK = (64, 512)

_DUAL_CLIP = 3.0
_VERL_COMPILED = "verl + torch.compile"

Tensors = tuple[Tensor, ...]


@lru_cache(maxsize=1)
def _data(shape: tuple[int, ...], device: str) -> Tensors:
    """Log-probs, old log-probs, advantages, all f32 [B, T], and a ragged mask bool [B, T]."""
    generator = torch.Generator(device=device).manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    old = -normal().abs()
    lengths = torch.randint(shape[1] // 4, shape[1] + 1, shape[:1], generator=generator, device=device)
    mask = torch.arange(shape[1], device=device) < lengths.unsqueeze(-1)
    return old + 0.2 * normal(), old, normal(), mask


def build(case: str, dtype: torch.dtype, shape: tuple[int, ...], device: str) -> Case:
    """Forward + backward on [B, T] float32."""
    data = _data(shape, device)
    built = Case(
        operation="policy_loss",
        name=case,
        dtype=str(dtype).removeprefix("torch."),
        shape=shape,
        traffic=roofline.policy_loss_forward_backward(shape[0] * shape[1]),
        error=partial(_error, _truth(*data)),
        contenders=[Contender(OURS, partial(_ours, *data))],
        tolerance=1e-5,
        inputs=list(data),
        targets=(
            Target("speedup", 1.3, "torch.compile"),
            Target("speedup", 1.3, _VERL_COMPILED),
            Target("speedup", 40.0, "verl"),
            Target("first_call", 0.02),
        ),
    )
    for name, compiled in (("torch eager", False), ("torch.compile", True)):
        function = peers.compiled(_obvious) if compiled else _obvious
        built.contenders.append(Contender(name, partial(_step, function, *data), tolerance=1e-4, compiled=compiled))
    for name, compiled in (("verl", False), (_VERL_COMPILED, True)):
        peers.add(built, name, partial(_verl, name, compiled, data))
    built.absent["TRL"] = "its loss is inside GRPOTrainer._compute_loss, no function of its own"
    built.absent["liger-kernel"] = "its GRPO loss starts from hidden states or logits"
    return built


def _ours(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensors:
    leaf = logprobs.detach().requires_grad_()
    loss = fastreward.losses.ppo(dual_clip=_DUAL_CLIP)
    out = fastreward.policy_loss(leaf, old, advantages, mask, loss=loss).loss
    return (out.detach(), *torch.autograd.grad(out, leaf))


def _obvious(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """The loss as one writes it down, without metrics or care for NaN: what a compiler does best with."""
    ratio = (logprobs - old).clamp(-20.0, 20.0).exp()
    clipped = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))
    token = torch.where(advantages < 0, torch.minimum(clipped, -advantages * _DUAL_CLIP), clipped)
    return (token * mask).sum() / mask.sum()


def _step(function: Any, logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensors:
    leaf = logprobs.detach().requires_grad_()
    out = function(leaf, old, advantages, mask)
    return (out.detach(), *torch.autograd.grad(out, leaf))


def _verl(name: str, compiled: bool, data: Tensors) -> Contender:
    algorithms = peers.load("verl", "verl.trainer.ppo.core_algos")
    config = peers.load("verl", "verl.workers.config").ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, clip_ratio_c=_DUAL_CLIP
    )
    vanilla = algorithms.compute_policy_loss_vanilla
    function = peers.compiled(vanilla) if compiled else vanilla

    def loss(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        with peers.quietly():  # torch.compile warns where `.item()` cuts its graph
            out: Tensor = function(old, logprobs, advantages, mask, "token-mean", config)[0]
        return out

    return Contender(name, partial(_step, loss, *data), tolerance=1e-4, compiled=compiled)


def _truth(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensors:
    leaf = logprobs.double().requires_grad_()
    loss, *_ = reference.policy_loss(leaf, old, advantages, mask, dual_clip=_DUAL_CLIP)
    return (loss.detach(), *torch.autograd.grad(loss, leaf))


def _error(expected: Tensors, result: Tensors) -> float:
    """Of the loss, and of the gradient away from the clip's edges, where float32 may fall on the other side."""
    loss, grad = expected
    close = (result[1] - grad).abs() <= 1e-4 * grad.abs().max()
    if float(close.double().mean()) < 1 - 1e-5:
        return distance(result[1], grad)
    return max(distance(result[0], loss), distance(result[1][close], grad[close]))
