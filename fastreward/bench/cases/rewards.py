"""rewards: scores to tokens less a KL penalty, into a given tensor and into a fresh one."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from fastreward.bench import peers, roofline
from fastreward.bench.case import OURS, Case, Contender, Target
from fastreward.bench.cases._steps import add_torch
from fastreward.rewards import token_rewards
from fastreward.verify import eager
from fastreward.verify.error import distance

CASES = ("k1-out", "k1-fresh", "k3-out")
DTYPES = ("float32",)
SHAPE = (4096, 8192)
QUICK = (64, 512)

_KL_COEF = 0.05


@lru_cache(maxsize=1)
def _data(shape: tuple[int, ...], device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores f32 [B], a ragged mask bool [B, T], log-probs and reference log-probs f32 [B, T]."""
    generator = torch.Generator(device=device).manual_seed(0)
    logprobs = -torch.rand(shape, generator=generator, device=device)
    reference = logprobs + 0.1 * torch.randn(shape, generator=generator, device=device)
    lengths = torch.randint(shape[1] // 4, shape[1] + 1, shape[:1], generator=generator, device=device)
    mask = torch.arange(shape[1], device=device) < lengths.unsqueeze(-1)
    return torch.randn(shape[0], generator=generator, device=device), mask, logprobs, reference


def build(case: str, dtype: torch.dtype, shape: tuple[int, ...], device: str) -> Case:
    """Scores [B] and log-probs [B, T] float32 with a mask."""
    kl, _, output = case.partition("-")
    scores, mask, logprobs, reference = _data(shape, device)
    out = torch.zeros_like(logprobs) if output == "out" else None  # a buffer that has been used before
    pair: dict[str, Any] = {"logprobs": logprobs, "ref_logprobs": reference, "kl": kl, "kl_coef": _KL_COEF}
    built = Case(
        operation="rewards",
        name=case,
        dtype=str(dtype).removeprefix("torch."),
        shape=shape,
        traffic=roofline.token_rewards(logprobs.numel()),
        error=partial(distance, want=eager.token_rewards(scores, mask, **pair)),
        contenders=[Contender(OURS, partial(token_rewards, scores, mask, **pair, out=out))],
        tolerance=1e-6,
        inputs=[scores, mask, logprobs, reference] + ([] if out is None else [out]),
        targets=(
            Target("share", 0.6 if out is not None else 0.3),
            Target("speedup", 2.0, "torch.compile"),
            Target("share", 0.85, device="cuda"),
        ),
    )
    add_torch(built, eager.token_rewards, lambda form: partial(form, scores, mask, **pair), 1e-5)
    peers.add(built, "verl", partial(_verl, scores, mask, logprobs, reference, kl))
    built.absent["TRL"] = "only in its experimental PPO trainer"
    built.absent["liger-kernel"] = "no such function"
    return built


def _verl(scores: Tensor, mask: Tensor, logprobs: Tensor, reference: Tensor, kl: str) -> Contender:
    """Its reward manager's placing (rm_scores[arange, length - 1] = score), then its apply_kl_penalty."""
    algos = peers.load("verl", "verl.trainer.ppo.core_algos")

    def call() -> Tensor:
        placed = torch.zeros_like(logprobs)
        placed[torch.arange(len(placed), device=placed.device), mask.sum(-1) - 1] = scores
        penalty: Tensor = algos.kl_penalty(logprobs, reference, kl_penalty=kl) * mask
        return placed - _KL_COEF * penalty

    return Contender("verl", call, tolerance=1e-5)
