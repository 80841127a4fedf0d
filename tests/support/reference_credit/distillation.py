"""Distillation on the student's own samples."""

from __future__ import annotations

import math
from typing import Any

Rows = list[list[float]]


def opd(old_logprobs: Rows, teacher_logprobs: Rows, mask: Rows, advantages: Any = None, coef: float = 1.0) -> Rows:
    found = [[0.0] * len(row) for row in mask]
    for b, row in enumerate(mask):
        for t in range(len(row)):
            if row[t]:
                found[b][t] = coef * (teacher_logprobs[b][t] - old_logprobs[b][t])
                if advantages is not None:
                    found[b][t] += advantages[b][t] if isinstance(advantages[b], list) else advantages[b]
    return found


def iw_opd(rollout_logprobs: Rows, teacher_logprobs: Rows, mask: Rows, gamma: float = 0.5, eps: float = 1e-8) -> Rows:
    found = [[0.0] * len(row) for row in mask]
    for b, row in enumerate(mask):
        counted = [t for t in range(len(row)) if row[t]]
        gaps = {t: teacher_logprobs[b][t] - rollout_logprobs[b][t] for t in counted}
        total = max(sum(abs(gaps[t]) for t in counted), eps)
        for t in counted:
            before = sum(abs(gaps[s]) for s in counted if s < t)
            found[b][t] = (1 + gamma * (1 - before / total)) * gaps[t]
    return found


def rlsd(
    advantages: list[float], old_logprobs: Rows, teacher_logprobs: Rows, mask: Rows,
    lam: float = 0.5, clip: float = 0.2, negative_only: bool = False,
) -> Rows:  # fmt: skip
    found = [[0.0] * len(row) for row in mask]
    for b, row in enumerate(mask):
        a = advantages[b]
        for t in range(len(row)):
            if row[t]:
                sign = (a > 0) - (a < 0)
                evidence = math.exp(sign * (teacher_logprobs[b][t] - old_logprobs[b][t]))
                weight = (1 - lam) + lam * min(max(evidence, 1 - clip), 1 + clip)
                found[b][t] = a if negative_only and a >= 0 else a * weight
    return found


def sdar(logprobs: Rows, teacher_logprobs: Rows, mask: Rows, beta: float = 5.0) -> Rows:
    found = [[0.0] * len(row) for row in mask]
    for b, row in enumerate(mask):
        for t in range(len(row)):
            if row[t]:
                found[b][t] = 1 / (1 + math.exp(-beta * (teacher_logprobs[b][t] - logprobs[b][t])))
    return found
