"""TRL trainers without a model: `_compute_loss` run on given log-probs and entropies, for any option that it reads."""

from __future__ import annotations

import types
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


class Accelerator:
    """One process: nothing to reduce or gather."""

    num_processes = 1
    sync_gradients = True

    def reduce(self, x: Tensor, reduction: str = "sum") -> Tensor:
        assert reduction == "sum"
        return x

    def gather(self, x: Tensor) -> Tensor:
        return x

    gather_for_metrics = gather

    def pad_across_processes(self, x: Tensor, **_: Any) -> Tensor:
        return x


class TwoLikeThis(Accelerator):
    """Two processes with the same data."""

    num_processes = 2

    def reduce(self, x: Tensor, reduction: str = "sum") -> Tensor:
        return 2 * x

    def gather(self, x: Tensor) -> Tensor:
        return torch.cat([torch.atleast_1d(x)] * 2)

    gather_for_metrics = gather


@dataclass
class Batch:
    """Rollouts [B, T]: a ragged mask, some rows may be empty; what lies under the mask is 0, as TRL has it."""

    logprobs: Tensor
    entropy: Tensor
    old: Tensor
    ref: Tensor
    sampled: Tensor
    weights: Tensor
    mask: Tensor
    advantages: Tensor
    tool_mask: Tensor | None = None

    @staticmethod
    def random(rows: int = 7, width: int = 11, *, spread: float = 0.3, seed: int = 0, empty: int = 0) -> Batch:
        generator = torch.Generator().manual_seed(seed)

        def normal(scale: float) -> Tensor:
            return torch.randn(rows, width, generator=generator) * scale

        lengths = torch.randint(1, width + 1, (rows,), generator=generator)
        lengths[:empty] = 0
        mask = (torch.arange(width) < lengths[:, None]).long()
        new = -normal(1.0).abs() - 0.1
        entropy = normal(1.0).abs()
        old, ref, sampled = new + normal(spread), new + normal(spread), new + normal(spread)
        sampled[0, 0] = torch.nan  # a token that vLLM did not score
        weights = torch.where(mask > 0, normal(0.3).exp().clamp(max=1.4), 1.0)
        advantages = torch.randn(rows, generator=generator)
        advantages[-1] = 0.0
        inside = [x.nan_to_num() * mask for x in (new, entropy, old, ref)]
        return Batch(*inside, sampled, weights, mask, advantages)


@dataclass
class Outcome:
    """What one call gave: loss, gradients under an upstream one that is not 1, and the metrics."""

    loss: Tensor
    gradients: list[Tensor]
    metrics: dict[str, list[float]] = field(default_factory=dict)


OPTIONS: dict[str, Any] = {
    "loss_type": "dapo",
    "importance_sampling_level": "token",
    "epsilon_low": 0.2,
    "epsilon_high": 0.28,
    "beta": 0.0,
    "aux_loss_enabled": False,
    "router_aux_loss_coef": 0.01,
    "top_entropy_quantile": 1.0,
    "off_policy_mask_threshold": None,
    "use_vllm": False,
    "vllm_importance_sampling_correction": True,
    "vllm_importance_sampling_mode": "token_truncate",
    "vllm_importance_sampling_clip_min": None,
    "vllm_importance_sampling_clip_max": 3.0,
    "max_completion_length": 16,
    "use_adaptive_entropy": False,
    "entropy_coef": 0.0,
    "current_gradient_accumulation_steps": 1,
    "_entropy_window_stats": None,
    "_last_world_entropy": 0.0,
}
ARGUMENTS: dict[str, Any] = {
    "delta": None,
    "use_bias_correction_kl": False,
    "sapo_temperature_pos": 1.0,
    "sapo_temperature_neg": 1.05,
    "vespo_k_pos": 2.0,
    "vespo_lambda_pos": 3.0,
    "vespo_k_neg": 3.0,
    "vespo_lambda_neg": 2.0,
    "steps_per_generation": 1,
    "entropy_target": 0.5,
    "entropy_coef_delta": 0.01,
    "entropy_coef_min": 0.0,
    "entropy_coef_max": 1.0,
}


def compute(
    trainer_class: Any,
    method: Callable[..., Tensor],
    batch: Batch,
    *,
    training: bool = True,
    accelerator: Accelerator | None = None,
    without: tuple[str, ...] = (),
    **options: Any,
) -> Outcome:
    """`method` (a trainer's `_compute_loss`) on a stand-in for the trainer. without: inputs that are not there."""
    unknown = options.keys() - OPTIONS.keys() - ARGUMENTS.keys()
    assert not unknown, unknown
    chosen = {k: options.get(k, v) for k, v in OPTIONS.items()}
    args = types.SimpleNamespace(**{k: options.get(k, v) for k, v in ARGUMENTS.items()})
    logprobs, entropy = (x.clone().requires_grad_(training) for x in (batch.logprobs, batch.entropy))
    aux = torch.tensor(0.7, requires_grad=training) if chosen["aux_loss_enabled"] else None
    kind = type(trainer_class.__name__, (), {})
    for name in ("get_high_entropy_mask", "get_off_policy_mask", "get_gamma_weights"):
        if name in vars(trainer_class):
            setattr(kind, name, vars(trainer_class)[name])
    trainer: Any = kind()
    vars(trainer).update(
        chosen,
        args=args,
        accelerator=accelerator or Accelerator(),
        model=types.SimpleNamespace(training=training),
        _entropy_bonus_enabled=chosen["entropy_coef"] != 0.0 or chosen["use_adaptive_entropy"],
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, entropy, aux),
    )
    ids = torch.zeros(batch.mask.shape, dtype=torch.int64)
    inputs = {
        "prompt_ids": ids,
        "prompt_mask": ids,
        "completion_ids": ids,
        "completion_mask": batch.mask,
        "advantages": batch.advantages,
        "old_per_token_logps": batch.old,
        "ref_per_token_logps": batch.ref,
        "old_logps": (batch.old * batch.mask).sum(1),
        "num_items_in_batch": 3 * batch.mask.sum(),
    }
    if batch.tool_mask is not None:
        inputs["tool_mask"] = batch.tool_mask
    if chosen["use_vllm"]:
        inputs |= {"importance_sampling_ratio": batch.weights, "sampling_per_token_logps": batch.sampled}
    with torch.set_grad_enabled(training):
        loss = method(trainer, None, {k: v for k, v in inputs.items() if k not in without})
    gradients = []
    if training:
        leaves = [x for x in (logprobs, entropy, aux) if x is not None]
        found = torch.autograd.grad(1.7 * loss, leaves, allow_unused=True)
        gradients = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]
    return Outcome(loss.detach(), gradients, dict(trainer._metrics["train" if training else "eval"]))
