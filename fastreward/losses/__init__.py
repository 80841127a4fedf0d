"""Policy losses, named as the field names them; each returns a loss to pass to `fastreward.policy_loss`."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PPO", "ppo"]


@dataclass(frozen=True, slots=True)
class PPO:
    """The clipped surrogate and its variants; make one with `losses.ppo`."""

    clip_low: float
    clip_high: float
    dual_clip: float | None
    delta: float | None
    log_ratio_clamp: float | None


def ppo(
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    delta: float | None = None,
    *,
    log_ratio_clamp: float | None = 20.0,
) -> PPO:
    """PPO-clip: max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)), r = exp(logprob - old_logprob).

    Args:
        clip_low, clip_high: widths of the clip range; unequal ones are DAPO's clip-higher (arXiv 2503.14476).
        dual_clip: c > 1 bounds the loss of tokens with A < 0 at -A c (arXiv 1912.09729; verl's default is 3.0).
        delta: upper bound of the ratio in the unclipped branch (two-sided clip of INTELLECT-2, as TRL's `delta`).
        log_ratio_clamp: the log-ratio is clamped to +- this, with gradient 0 outside (verl, OpenRLHF: 20); None never.

    Formula read in code: verl core_algos.py `compute_policy_loss_vanilla`, TRL grpo_trainer.py `_compute_loss`.
    """
    if not 0 <= clip_low <= 1:
        raise ValueError(f"clip_low: expected a number in [0, 1], got {clip_low}")
    if not clip_high >= 0:
        raise ValueError(f"clip_high: expected a number >= 0, got {clip_high}")
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip: expected None or a number > 1, got {dual_clip}")
    if delta is not None and not delta > 0:
        raise ValueError(f"delta: expected None or a positive number, got {delta}")
    if log_ratio_clamp is not None and not log_ratio_clamp > 0:
        raise ValueError(f"log_ratio_clamp: expected None or a positive number, got {log_ratio_clamp}")
    return PPO(clip_low, clip_high, dual_clip, delta, log_ratio_clamp)
