"""Distillation on the student's own samples."""

from __future__ import annotations

import math

Rows = list[list[float]]


def opd(
    old_logprobs: Rows, teacher_logprobs: Rows, mask: Rows, rollout_logprobs: Rows | None = None,
    low: float = 0.5, high: float = 5.0,
) -> Rows:  # fmt: skip
    advantages = [[0.0] * len(row) for row in mask]
    for b, row in enumerate(mask):
        for t, counts in enumerate(row):
            if not counts:
                continue
            ratio = 1.0 if rollout_logprobs is None else math.exp(old_logprobs[b][t] - rollout_logprobs[b][t])
            if low <= ratio <= high:
                advantages[b][t] = teacher_logprobs[b][t] - old_logprobs[b][t]
    return advantages
