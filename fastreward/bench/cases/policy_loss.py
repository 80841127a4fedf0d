"""policy_loss, forward + backward, for four of the field's losses and one of a user's own, each beside the same loss in
plain torch, eager and compiled, and beside verl's own function for it; and for one with a scan (FIPO), beside the
quadratic form that trainers write and beside PPO, which is the same but for the scan."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Final

import torch
from torch import Tensor

from fastreward import losses
from fastreward._arguments.options import Aggregation
from fastreward.bench import peers, roofline
from fastreward.bench.case import OURS, Case, Contender, Target
from fastreward.bench.cases._steps import Tensors, add_torch, off_edges, step
from fastreward.policy_loss import policy_loss

CASES = ("ppo", "cispo", "gspo", "sapo", "own", "fipo")
DTYPES = ("float32",)
SHAPE = (512, 8192)
QUICK = (64, 512)

_DUAL_CLIP = 3.0
_CLAMP = 20.0
_GAMMA = 2 ** (-1 / 32)
_VERL_COMPILED = "verl + torch.compile"
_WITHOUT_SCAN = "fastreward's PPO"


# ---------------------------------------------------------------------------------------------- the losses in torch
# As one writes them down, without metrics or care for NaN: what a compiler does best with.
def _ratio(logprobs: Tensor, old: Tensor) -> Tensor:
    return (logprobs - old).clamp(-_CLAMP, _CLAMP).exp()


def _ppo(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    ratio = _ratio(logprobs, old)
    clipped = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))
    token = torch.where(advantages < 0, torch.minimum(clipped, -advantages * _DUAL_CLIP), clipped)
    return (token * mask).sum() / mask.sum()


def _cispo(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    weight = _ratio(logprobs, old).clamp(0.8, 1.2).detach()
    return (-weight * advantages * logprobs * mask).sum() / mask.sum()


def _gspo(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    lengths = mask.sum(-1).clamp(min=1)
    ratio = (((logprobs - old) * mask).sum(-1) / lengths).exp()
    advantage = (advantages * mask).sum(-1) / lengths
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - 0.0003, 1 + 0.0004)).mean()


def _sapo(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    tau = torch.where(advantages > 0, 1.0, 1.05)
    token = -advantages * torch.sigmoid(tau * (_ratio(logprobs, old) - 1)) * 4 / tau
    return ((token * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean()


def _fipo(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """What follows as products with blocks of powers of gamma, T^2 of them, as ms-swift has it."""
    d, width, block = ((logprobs - old) * mask).detach(), mask.shape[1], 128
    future, places = torch.zeros_like(d), torch.arange(width, device=d.device)
    for start in range(0, width, block):
        distance = places[start : start + block] - places.unsqueeze(1)
        powers = torch.where(distance >= 0, _GAMMA ** distance.clamp(min=0).to(d.dtype), 0.0)
        future += d[:, start : start + block] @ powers.t()
    weight, ratio = future.exp().clamp(1.0, 1.2), _ratio(logprobs, old)
    weight = torch.where((advantages < 0) & (ratio > 4.0), weight.clamp(0.8, 1.0), weight).detach()
    token = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.28))
    return (weight * token * mask).sum() / mask.sum()


@losses.define
def surprise(t: losses.Terms, floor: float = 0.1, cap: float = 2.0) -> losses.Node:
    """README's loss of a user's own: tokens count by how surprising they are in their sequence."""
    surprise = -t.logprob / losses.maximum(losses.seq_mean(-t.logprob), 0.01)
    weight = losses.stop_gradient(losses.clip(surprise, floor, cap))
    return -weight * t.advantage * losses.minimum(t.ratio, cap)


def _surprise(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    mean = (-logprobs * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    weight = (-logprobs / mean.clamp(min=0.01)).clamp(0.1, 2.0).detach()
    return (-weight * advantages * _ratio(logprobs, old).clamp(max=2.0) * mask).sum() / mask.sum()


@dataclass(frozen=True)
class Written:
    """One loss: ours, plain torch's, verl's (function of core_algos, its arguments; or none), promises."""

    loss: losses.Loss
    plain: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    verl: str | None
    settings: dict[str, Any]
    aggregation: Aggregation
    eager: float = 20.0  # how many times verl's eager form; 40 where that form is long
    quadratic: bool = False  # the plain form's time grows with the square of the sequence's length


_WRITTEN: Final = {
    "ppo": Written(
        losses.ppo(dual_clip=_DUAL_CLIP),
        _ppo,
        "compute_policy_loss_vanilla",
        {"clip_ratio_c": _DUAL_CLIP},
        "token-mean",
        40.0,
    ),
    "cispo": Written(losses.cispo(), _cispo, "compute_policy_loss_cispo", {}, "token-mean"),
    "gspo": Written(
        losses.gspo(),
        _gspo,
        "compute_policy_loss_gspo",
        {"clip_ratio_low": 0.0003, "clip_ratio_high": 0.0004},
        "seq-mean-token-mean",
    ),
    "sapo": Written(losses.sapo(), _sapo, "compute_policy_loss_sapo", {}, "seq-mean-token-mean"),
    "own": Written(surprise(), _surprise, None, {}, "token-mean"),
    "fipo": Written(losses.fipo(), _fipo, None, {}, "token-mean", quadratic=True),
}


@lru_cache(maxsize=1)
def _data(shape: tuple[int, ...], device: str) -> Tensors:
    """Log-probs, old log-probs, advantages, all f32 [B, T], and a ragged mask bool [B, T].

    An advantage is the same for all tokens of a sequence, as in GRPO, but given per token, as in verl.
    """
    generator = torch.Generator(device=device).manual_seed(0)

    def normal(size: tuple[int, ...]) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    old = -normal(shape).abs()
    lengths = torch.randint(shape[1] // 4, shape[1] + 1, shape[:1], generator=generator, device=device)
    mask = torch.arange(shape[1], device=device) < lengths.unsqueeze(-1)
    advantages = normal((shape[0], 1)).expand(shape).contiguous()
    return old + 0.2 * normal(shape), old, advantages, mask


def build(case: str, dtype: torch.dtype, shape: tuple[int, ...], device: str) -> Case:
    """Forward + backward on [B, T] float32."""
    data, written = _data(shape, device), _WRITTEN[case]
    built = Case(
        operation="policy_loss",
        name=case,
        dtype=str(dtype).removeprefix("torch."),
        shape=shape,
        traffic=roofline.policy_loss_forward_backward(shape[0] * shape[1]),
        error=partial(off_edges, _truth(written, *data)),
        contenders=[Contender(OURS, partial(step, partial(_ours, written), 1, *data))],
        tolerance=1e-5,
        inputs=list(data),
        targets=(*_promises(written), Target("first_call", 0.02)),
    )
    if written.quadratic:
        built.contenders.append(Contender("torch eager", partial(step, written.plain, 1, *data), tolerance=1e-4))
        ppo = partial(_ours, _WRITTEN["ppo"])
        built.contenders.append(Contender(_WITHOUT_SCAN, partial(step, ppo, 1, *data), tolerance=math.inf))
        built.absent["torch.compile"] = "the time is that of its matrix products, compiled or not"
    else:
        add_torch(built, written.plain, lambda form: partial(step, form, 1, *data), 1e-4)
    for name, compiled in (("verl", False), (_VERL_COMPILED, True)):
        peers.add(built, name, partial(_verl, name, compiled, written, data))
    built.absent["TRL"] = "its loss is inside GRPOTrainer._compute_loss, no function of its own"
    built.absent["liger-kernel"] = "its GRPO loss starts from hidden states or logits"
    return built


def _promises(written: Written) -> tuple[Target, ...]:
    if written.quadratic:
        return Target("ratio", 1.3, _WITHOUT_SCAN), Target("speedup", 50.0, "torch eager")
    verl = [Target("speedup", written.eager, "verl")] if written.verl else []
    return Target("speedup", 1.3, "torch.compile"), *verl


def _ours(written: Written, logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    return policy_loss(logprobs, old, advantages, mask, loss=written.loss, aggregation=written.aggregation).loss


def _verl(name: str, compiled: bool, written: Written, data: Tensors) -> Contender:
    algorithms = peers.load("verl", "verl.trainer.ppo.core_algos")
    config = peers.load("verl", "verl.workers.config").ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, **written.settings
    )
    if written.verl is None or not hasattr(algorithms, written.verl):
        raise peers.Absent("no such loss")
    function = getattr(algorithms, written.verl)
    function = peers.compiled(function) if compiled else function

    def loss(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        with peers.quietly():  # torch.compile warns where `.item()` cuts its graph
            out: Tensor = function(old, logprobs, advantages, mask, written.aggregation, config)[0]
        return out

    return Contender(name, partial(step, loss, 1, *data), tolerance=1e-4, compiled=compiled)


def _truth(written: Written, logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensors:
    return step(written.plain, 1, logprobs.double(), old.double(), advantages.double(), mask)
